"""The arithmetic of train.memory against XLA:TPU's own figures, which tests/golden/memory.json keeps.

  python -m tests.test_memory                    the table, worst first
  python -m tests.test_memory --compile [NAME]   compiles the rows anew (libtpu; a minute each) and prints it
"""
import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
import time

import jax
import pytest
from flax import nnx

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.flags import override, versions
from model.config import ModelConfig
from model.sharding import abstract_mesh, make_mesh
from model.transformer import abstract_params
from tests.tiny import abstract_batch
from train.config import TrainConfig
from train.memory import estimate_memory
from train.step import abstract_state, make_train_step

GOLDEN = pathlib.Path(__file__).parent / "golden" / "memory.json"
# XLA's quickest way through its passes: a sixth of the time, and 1 % from the usual peak ("usual_peak").
OPTIONS = {"exec_time_optimization_effort": -1.0}
MOE = ("model.ffn=moe", "model.n_experts=8", "model.n_experts_per_token=2")
RAGGED = "model.grouped_impl=ragged_dot"
MLA = ("model.attention=mla", "model.n_kv_heads=16", "model.q_lora_rank=768", "model.kv_lora_rank=512",
       "model.qk_nope_head_dim=128", "model.qk_rope_head_dim=64", "model.v_head_dim=128")
LLAMA = ("model.n_layers=32", "model.d_model=4096", "model.n_heads=32", "model.d_ff=14336", "loss_chunk=2048")
# Name -> (topology, what differs from `base`): splash attention, full remat and FSDP if nothing else is said.
PAIRS = {
  "dense_full": ("v5e:2x2", ()),
  "dense_none": ("v5p:2x2x1", ("model.remat=none",)),
  "moe_fsdp": ("v5p:2x2x1", (*MOE, RAGGED)),
  "dense_dots": ("v5p:2x2x1", ("model.remat=dots",)),
  "moe_ep": ("v5p:2x2x1", (*MOE, RAGGED, "mesh.expert=4", "mesh.fsdp=1")),
  "dense_tensor": ("v5e:2x4", ("mesh.tensor=4", "mesh.fsdp=2")),
  "dense_accum": ("v5e:2x4", ("accum_steps=4", "batch_size=64")),
  "moe_a2a": ("v5p:2x2x2", (*MOE, "mesh.expert=4", "mesh.fsdp=2", "model.dispatch=capacity",
    "model.exchange=all_to_all")),
  "dense_seq": ("v5p:2x2x2", ("mesh.seq=4", "mesh.fsdp=2", "seq_len=8192", "batch_size=4",
    "model.context=ulysses")),
  "dense_outputs": ("v6e:2x2", ("model.remat=outputs",)),
  "dense_data": ("v5p:2x2x1", ("mesh.data=4", "mesh.fsdp=1")),
  "dense_slices": ("v5e:2x2", ("mesh.slices=2", "mesh.data=2", "mesh.fsdp=4")),
  "dense_stage": ("v5p:2x2x1", ("mesh.stage=2", "mesh.fsdp=2", "batch_size=16",
    "model.pipeline_microbatches=4")),
  "dense_seqpar": ("v6e:2x4", ("mesh.tensor=4", "mesh.fsdp=2", "model.rules.residual=('seq','tensor')")),
  "dense_zero1": ("v6e:2x2", ("model.rules.embed=()", "model.rules.gradient=()")),
  "moe_capacity": ("v6e:2x4", (*MOE, "model.dispatch=capacity", "mesh.fsdp=8", "batch_size=16")),
  "moe_ragged": ("v5p:2x2x1", (*MOE, "mesh.expert=4", "mesh.fsdp=1", "model.exchange=ragged")),
  "moe_dots": ("v5p:2x2x2", (*MOE, "model.remat=dots", "mesh.expert=2", "mesh.fsdp=4", "batch_size=16")),
  "dense_8b": ("v5p:2x4x4", (*LLAMA, "data.tokenizer.vocab_size=128256", "seq_len=8192", "batch_size=32")),
  "moe_shared": ("v5p:2x2x2", (*MOE, "model.n_shared_experts=1", "model.n_dense_layers=2",
    "model.router=sigmoid", "model.router_bias=True", "mesh.expert=2", "mesh.fsdp=4")),
  "moe_slices": ("v5p:2x2x1", (*MOE, "mesh.slices=2", "mesh.data=2", "mesh.fsdp=4")),
  "dense_long": ("v6e:4x4", ("model.n_layers=32", "seq_len=8192", "batch_size=16")),
  "dense_wide": ("v5p:2x2x2", ("model.d_model=4096", "model.n_heads=32", "model.d_ff=14336",
    "batch_size=16", "model.remat=dots")),
  "dense_pure": ("v5e:2x2", ("model.precision=pure_bf16",)),
  "dense_tight": ("v5e:2x2", ("model.n_layers=56", "batch_size=16", "data.tokenizer.vocab_size=64000")),
  "dense_dotproduct": ("v5e:2x2", ("model.attention_impl=dot_product",)),
  "mla_full": ("v5p:2x2x1", MLA),
  "mla_tensor": ("v5p:2x2x1", (*MLA, "mesh.tensor=2", "mesh.fsdp=2", "model.remat=none")),
  "moe_mixtral": ("v5p:4x4x4", (*MOE, *LLAMA, "mesh.expert=8", "mesh.fsdp=8", "seq_len=4096",
    "batch_size=64")),
}
USUAL = {  # At XLA's usual effort: 150 to 300 CPU-seconds each.
  "usual_small": ("v5e:2x2", (
    "model.d_model=1024", "model.n_heads=8", "model.n_kv_heads=4", "model.d_ff=2816", "seq_len=1024",
    "model.attention_impl=dot_product", "data.tokenizer.vocab_size=8192", "batch_size=16")),
}


def base() -> TrainConfig:
  """1.5 GB of state on 4 chips."""
  return TrainConfig(
    batch_size=8, seq_len=2048, loss_chunk=1024,
    model=ModelConfig(n_layers=8, d_model=2048, n_heads=16, n_kv_heads=8, d_ff=5632, remat="full",
                      attention_impl="splash"),
    data=DataConfig(sources=[SourceConfig(name="s", kind="synthetic", documents=10)],
                    tokenizer=TokenizerConfig(vocab_size=32_000)))


def config(name, n):
  return override(base(), list((PAIRS | USUAL)[name][1])).validate(n)


@functools.cache
def rows() -> list[dict]:
  """Of the golden file, with the model's figures and their relative errors; the worst first."""
  found = []
  for row in json.loads(GOLDEN.read_text())["rows"]:
    memory = estimate_memory(config(row["name"], row["devices"]), row["devices"], hoists=row["name"] in USUAL)
    arguments = sum(memory.arguments.values())
    found.append(row | {"model": memory.peak, "moment": memory.moment, "error": memory.peak / row["peak"] - 1,
                        "argument_error": arguments / row["arguments"] - 1})
  return sorted(found, key=lambda row: -abs(row["error"]))


def table() -> str:
  lines = ["| pair | topology | arguments, GB | error | peak by XLA, GB | model | error | fullest |",
           "|---|---|---|---|---|---|---|---|"]
  lines += [f"| {r['name']} | {r['topology']} | {r['arguments'] / 1e9:.3f} | {r['argument_error']:+.2%} | "
            f"{r['peak'] / 1e9:.3f} | {r['model'] / 1e9:.3f} | {r['error']:+.1%} | {r['moment']} |"
            for r in rows()]
  return "\n".join(lines)


def test_arguments_are_those_of_the_compiler():
  assert max(abs(row["argument_error"]) for row in rows()) < 0.02, table()


def test_the_peak_is_that_of_the_compiler():
  assert max(abs(row["error"]) for row in rows()) < 0.10, table()


def test_a_row_of_every_kind():
  names = " ".join(row["name"] for row in rows())
  kinds = ("moe", "dense", "usual", "slices", "none", "dots", "tensor", "accum", "seq", "stage")
  assert len(rows()) >= 20 and not [kind for kind in kinds if kind not in names]
  assert {row["topology"][:3] for row in rows()} == {"v5e", "v5p", "v6e"}


@pytest.mark.parametrize("remat, changes", [
  ("full", ()), ("outputs", ()), ("dots", ()), ("dots", MOE), ("dots", MLA)])
def test_saved_activations_are_what_the_gradient_of_a_block_keeps(remat, changes):
  """Against the residuals of the block's own trace, but for its parameters, positions and segments."""
  cfg = override(base(), [f"model.remat={remat}", *changes]).validate(4)
  m, mesh = cfg.model, abstract_mesh(fsdp=4)
  graphdef, params = abstract_params(m, mesh)

  def residuals(params, x_BTD, i_BT):
    group, stacked = nnx.merge(graphdef, params)._group(nnx.merge(graphdef, params).blocks)
    first = jax.tree.map(lambda a: a[0], stacked)
    return jax.vjp(lambda x_BTD, layer: group(x_BTD, i_BT, i_BT, layer, None), x_BTD, first)[1]

  place = lambda dtype, *dims: jax.ShapeDtypeStruct(
    dims, dtype, sharding=jax.NamedSharding(mesh, m.rules("batch", "residual", *(None,) * (len(dims) - 2))))
  x, i = place("bfloat16", 8, 2048, m.d_model), place("int32", 8, 2048)
  with jax.sharding.use_abstract_mesh(mesh):
    kept = [v.aval for v in jax.make_jaxpr(residuals)(params, x, i).jaxpr.outvars]
  weights = {a.shape[1:] for a in jax.tree.leaves(params)}
  tokens = lambda a: a.ndim > 1 and a.shape[0] in (8, 8 * 2048) and a.dtype != "int32"
  total = sum(math.prod(a.shape) * a.dtype.itemsize for a in kept if tokens(a) and a.shape not in weights) / 4
  saved = estimate_memory(cfg, 4).moments["backward"]["saved activations"] / m.n_layers
  assert saved == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("mesh", [
  dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(stage=2, expert=2, seq=2), dict(fsdp=2, tensor=4)])
@pytest.mark.parametrize("changes", [
  (), ("optim.name=muon",), ("optim.name=adafactor",), ("optim.ema=0.99", "model.rules.embed=()"),
  (*MOE, "model.n_shared_experts=1", "model.router=sigmoid", "model.router_bias=True"),
  (*MLA, "optim.name=muon")])
def test_every_array_of_the_state_is_counted_in_its_shards(mesh, changes):
  """Against the shard shapes that JAX gives on that very mesh."""
  cfg = override(base(), ["model.n_kv_heads=2", *changes, "model.context=ulysses",
                          *(f"mesh.{a}={k}" for a, k in mesh.items())])
  cfg.mesh.fsdp = max(cfg.mesh.fsdp, 1)
  n = math.prod(mesh.values())
  cfg.validate(n)
  _, state = abstract_state(cfg, abstract_mesh(**mesh))
  expected = {"parameters": state.params, "optimizer state": state.opt_state, "moving average": state.ema}
  memory = estimate_memory(cfg, n)
  padding = 1.02 if cfg.model.latent else 1.01  # 576 latents fill 640 lanes.
  for part, tree in expected.items():
    exact = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
    assert exact <= memory.arguments.get(part, 0) <= exact * padding + 4096, part
  rows = cfg.batch_size // math.prod(mesh.get(axis, 1) for axis in cfg.model.rules.batch)
  assert memory.arguments["batch"] == 5 * 4 * rows * cfg.seq_len
  assert memory.checkpoint == sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))


# Compiling.

def topology_mesh(cfg, topology):
  """The mesh of the config on a TPU that is not here."""
  from jax.experimental import topologies
  more = {"num_slices": cfg.mesh.slices} if cfg.mesh.slices > 1 else {}
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
  return make_mesh(devices=devices, **dataclasses.asdict(cfg.mesh))


def compile_row(name) -> dict:
  topology, _ = (PAIRS | USUAL)[name]
  n = int(math.prod(map(int, topology.partition(":")[2].split("x")))) * config_slices(name)
  cfg = config(name, n)
  mesh = topology_mesh(cfg, topology)
  graphdef, state = abstract_state(cfg, mesh)
  with jax.set_mesh(mesh):
    step = jax.jit(make_train_step(cfg, graphdef, state.params), donate_argnums=0)
    lowered = step.trace(state, abstract_batch(cfg, mesh)).lower(lowering_platforms=("tpu",))
  start = time.perf_counter()
  memory = lowered.compile(compiler_options=None if name in USUAL else OPTIONS).memory_analysis()
  print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
  return dict(name=name, topology=topology, devices=n, arguments=memory.argument_size_in_bytes,
              temporaries=memory.temp_size_in_bytes, peak=memory.peak_memory_in_bytes)


def config_slices(name):
  return override(base(), list((PAIRS | USUAL)[name][1])).mesh.slices


def main(argv):
  if "--compile" in argv:
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true")
    jax.config.update("jax_platforms", "cpu")
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"rows": []}
    old = {row["name"]: row for row in golden["rows"]}
    for name in [a for a in argv if a != "--compile"] or [*PAIRS, *USUAL]:
      old[name] = compile_row(name)
      kept = [old[name] for name in (*PAIRS, *USUAL) if name in old]
      text = json.dumps({"versions": versions(["jax", "libtpu"]), "options": OPTIONS, "rows": kept}, indent=1)
      GOLDEN.write_text(text + "\n")
  print(table())


if __name__ == "__main__":
  main(sys.argv[1:])

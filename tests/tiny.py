"""Small things that many tests share: a tiny model, packed rows, meshes by name."""
import dataclasses
import functools
import importlib
import inspect
import itertools
import pathlib

import jax
import numpy as np
from flax import nnx

from infer.load import decode_config
from model.attention import ATTENTION
from model.cache import init_paged_cache
from model.config import ModelConfig, RopeScaling
from model.ffn import FFN
from model.kernels.attention import KERNEL
from model.kernels.paged import Where
from model.layers import NORM
from model.moe import DISPATCH, ROUTER
from model.parametrization import PARAMETRIZATION
from model.sharding import fit, make_mesh
from model.transformer import NORM_POSITION, abstract_params, check_names, draw_params
from train.step import abstract_batch, abstract_state, make_train_step

ROOT = pathlib.Path(__file__).parents[1]
MESHES = {
  "one": dict(data=1),
  "data": dict(data=8),
  "fsdp": dict(fsdp=8),
  "tensor": dict(data=4, tensor=2),
  "fsdp_tensor": dict(fsdp=4, tensor=2),
  "all": dict(data=2, fsdp=2, tensor=2),
  "stage_expert_seq": dict(stage=2, expert=2, seq=2),
}
V, B, T = 300, 8, 48
MOE = dict(ffn="moe", n_experts=8, n_experts_per_token=2, d_expert=24)
MLA = dict(attention="mla", n_kv_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=6,
           qk_rope_head_dim=4, v_head_dim=8)
YARN = RopeScaling(kind="yarn", factor=4.0, original_length=16, mscale=1.0, mscale_all_dim=0.7)


def model_config(**changes) -> ModelConfig:
  values = dict(vocab_size=V, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, precision="fp32") | changes
  cfg = ModelConfig(**values).validate()
  check_names(cfg)
  return cfg


def mesh_of(name):
  """On the first devices where it needs fewer than there are."""
  sizes = MESHES[name]
  if name == "one":
    from jax.sharding import AxisType

    from model.sharding import MESH_AXES
    n = len(MESH_AXES)
    return jax.make_mesh((1,) * n, MESH_AXES, axis_types=(AxisType.Explicit,) * n, devices=jax.devices()[:1])
  return make_mesh(**sizes)


def packed_batch(seed=0, *, b=B, t=T, vocab=V):
  """Rows of three documents and some padding, with unequal numbers of trained tokens."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, vocab, (b, t + 1))
  segments, positions = np.zeros((b, t), np.int32), np.zeros((b, t), np.int32)
  for row in range(b):
    cuts = [0, *sorted(rng.choice(np.arange(3, t - 6), 2, replace=False)), t - int(rng.integers(0, 5))]
    for i, (start, stop) in enumerate(zip(cuts, cuts[1:])):
      segments[row, start:stop], positions[row, start:stop] = i + 1, np.arange(stop - start)
  weights = (segments > 0) * (rng.random((b, t)) < np.linspace(0.1, 1.0, b)[:, None])
  return dict(tokens=tokens[:, :-1].astype(np.int32), targets=tokens[:, 1:].astype(np.int32),
              weights=weights.astype(np.float32), positions=positions, segments=segments)


def put(cfg, mesh, batch):
  """The batch on the mesh, split by rows."""
  place = lambda a: jax.device_put(a, jax.NamedSharding(mesh, cfg.rules("batch", None)))
  return {name: place(a) for name, a in batch.items()}


def trace_step(cfg, mesh, closed=False):
  """(abstract state, what comes out of one train step as types, or its jaxpr). Nothing runs; `mesh` may be
  abstract."""
  graphdef, state = abstract_state(cfg, mesh)
  step, batch = make_train_step(cfg, graphdef, state.params), abstract_batch(cfg, mesh)
  with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
    return state, jax.make_jaxpr(step)(state, batch) if closed else jax.eval_shape(step, state, batch)


def experiment_classes(suffix):
  """Every nnx.Module under experiments/ whose name ends so: a new variant is tested because it is found
  here."""
  found = {}
  for path in sorted((ROOT / "experiments").glob("*.py")):
    text = path.read_text()
    if f"{suffix}(" not in text or "class " not in text:
      continue
    module = importlib.import_module(f"experiments.{path.stem}")
    for name, value in vars(module).items():
      if (inspect.isclass(value) and issubclass(value, nnx.Module) and value.__module__ == module.__name__
          and name.endswith(suffix)):
        found[f"{module.__name__}:{name}"] = value
  return found


def with_attention(name) -> dict:
  """The changes to the tiny model that make its attention this one."""
  return MLA if name == "mla" else dict(attention=name)


def variants() -> dict[str, dict]:
  """Name -> changes to the tiny model, one for each choice that the tables and experiments/ offer."""
  found = {f"attention={name}": with_attention(name)
           for name in [*ATTENTION, *experiment_classes("Attention")]}
  found |= {f"ffn={name}": MOE if name == "moe" else dict(ffn=name)
            for name in [*FFN, *experiment_classes("FFN")]}
  found |= {f"router={name}": MOE | dict(
      router=name, router_bias=True, n_shared_experts=2, n_dense_layers=1, n_expert_groups=4,
      n_groups_per_token=2, routed_scale=2.5, n_layers=3) for name in ROUTER if name != "softmax"}
  roomy = {"capacity": dict(capacity_factor=8.0)}
  found |= {f"dispatch={name}": MOE | dict(dispatch=name) | roomy.get(name, {})
            for name in DISPATCH if name != "dropless"}
  found["repeats"] = dict(n_layers=4, pipeline_repeats=2)
  # Splash is interpreted here, which compiles slowly: "window,splash" has a layer of each kind.
  found |= {f"attention_impl={name}": dict(attention_impl=name) for name in KERNEL if name != "splash"}
  found |= {f"window,{name}": dict(attention_impl=name, window=5, layer_pattern=("local", "global"))
            for name in KERNEL}
  found |= {f"norm={name}": dict(norm=name, qk_norm=name) for name in NORM}
  over = {"branch": dict(qk_norm="rmsnorm", qk_norm_over="all")}  # As OLMo 2 has them.
  found |= {f"norm_position={name}": dict(norm_position=name) | over.get(name, {}) for name in NORM_POSITION}
  widths = dict(mup_base_width=16, mup_base_head_dim=5)
  found |= {f"head_dim,parametrization={name}": dict(head_dim=10, parametrization=name, **widths)
            for name in PARAMETRIZATION if name != "standard"}
  found |= {
    "mla,yarn": MLA | MOE | dict(q_lora_rank=None, router_normalize=False, rope_scaling=YARN, out_bias=True),
    "rotary_dim,yarn": dict(
      rotary_dim=6, rope_scaling=dataclasses.replace(YARN, mscale=None, truncate=False)),
    "rope_theta_local,llama3": dict(
      window=5, layer_pattern=("local", "global"), rope_theta_local=100.0,
      rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_length=16)),
    "positions=learned": dict(positions="learned", max_length=T + 3, attention_scale=0.5),
    "positions=none": dict(positions="none", n_kv_heads=1),
    "mha": dict(n_kv_heads=4), "mqa": dict(n_kv_heads=1),
    "tied": dict(head="tied"),
    "biases": dict(qkv_bias=True, out_bias=True, ffn_bias=True),
    "soft caps": dict(attention_impl="chunked", attention_softcap=5.0, logit_softcap=5.0),
    "embed_scale,fan_in": dict(embed_scale=32**0.5, init="fan_in"),
  }
  return found


def make_params(cfg, mesh, seed=0):
  """init_params, operation by operation: compiling it whole takes longer than most tests."""
  graphdef, abstract = abstract_params(cfg, mesh)
  params = draw_params(fit(cfg, mesh), jax.random.key(seed))
  return graphdef, jax.device_put(params, jax.tree.map(lambda a: a.sharding, abstract))


@functools.cache
def tiny(name, mesh_name="one"):
  """(cfg, mesh, graphdef, params, logits) of a variant; logits(params, batch) is jitted and returns [B, T, V]
  NumPy."""
  cfg, mesh = model_config(**variants()[name]), mesh_of(mesh_name)
  graphdef, params = make_params(cfg, mesh)

  @jax.jit
  def forward(params, batch):
    model = nnx.merge(graphdef, params)
    return model.logits(model(batch["tokens"], batch["positions"], batch["segments"])[0])

  def logits(params, batch):
    with jax.set_mesh(mesh):
      return np.asarray(forward(params, put(cfg, mesh, batch)))[..., :cfg.vocab_size]

  return cfg, mesh, graphdef, params, logits


@functools.partial(jax.jit, static_argnums=0)
def _extend(graphdef, params, caches, where, token_1T, segment_1T):
  model = nnx.merge(graphdef, params)
  caches = tuple(dataclasses.replace(cache, where=where) for cache in caches)
  x_1TD, caches = model.extend(token_1T, where.pos_T, segment_1T, caches)
  return model.logits(x_1TD)[0], tuple(dataclasses.replace(cache, where=None) for cache in caches)


def decode_logits(cfg, mesh, params, tokens_2S, *, cut, chunk=12, page_size=5):
  """[2, S, V] of two sequences as the engine reads them: the first in chunks up to `cut`, then token by token
  beside the second, which comes in chunks. Their pages lie anywhere."""
  cfg, ends = decode_config(cfg, mesh), (cut, tokens_2S.shape[1])
  out_2SV = np.full((*tokens_2S.shape, cfg.vocab_size), np.nan, np.float32)
  page_2L = 1 + np.random.default_rng(0).permutation(2 * -(-ends[1] // page_size)).reshape(2, -1)
  chunks = [(i, at, min(chunk, end - at)) for i, end in enumerate(ends) for at in range(0, end, chunk)]
  rows = [None] * -(-cut // chunk) + [*range(cut, ends[1])]
  with jax.set_mesh(mesh):
    graphdef, _ = abstract_params(cfg, mesh)
    caches = init_paged_cache(cfg, 1, 1 + page_2L.size, page_size)
    for row, (i, start, n) in itertools.zip_longest(rows, chunks, fillvalue=(0, 0, 0)):
      token_1T, pos_1T, segment_1T = (np.zeros((1, 1 + chunk), np.int32) for _ in range(3))
      page_11L, part_1C = np.zeros((1, 1, page_2L.shape[1]), np.int32), np.zeros((1, chunk), np.int32)
      if row is not None:
        token_1T[0, 0], pos_1T[0, 0], segment_1T[0, 0], page_11L[0, 0] = tokens_2S[0, row], row, 1, page_2L[0]
      token_1T[0, 1:1 + n], segment_1T[0, 1:1 + n] = tokens_2S[i, start:start + n], 1
      pos_1T[0, 1:] = start + np.arange(chunk)
      where = Where(pos_1T, page_11L, page_2L[i:i + 1], part_1C[:, :1], part_1C, np.array([n], np.int32))
      logits_TV, caches = _extend(graphdef, params, caches, where, token_1T, segment_1T)
      logits_TV = np.asarray(logits_TV)[:, :cfg.vocab_size]
      if row is not None:
        out_2SV[0, row] = logits_TV[0]
      out_2SV[i, start:start + n] = logits_TV[1:1 + n]
  return out_2SV

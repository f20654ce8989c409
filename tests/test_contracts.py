"""What every variant must hold. Variants are discovered: a new entry of a table, or a class under
experiments/, is tested here because it exists."""
import dataclasses
import importlib
import math

import jax
import numpy as np
import pytest
from flax import nnx

from model.attention import ATTENTION
from model.ffn import FFN
from model.sharding import MESH_AXES, abstract_mesh
from tests.tiny import (
    MESHES,
    MOE,
    ROOT,
    T,
    V,
    model_config,
    packed_batch,
    put,
    tiny,
    trace_step,
    variants,
    with_attention,
)
from train.losses import loss_spec, next_token_loss
from train.rehearse import chips_in, shipped

VARIANTS = list(variants())


@pytest.mark.parametrize("name", VARIANTS)
def test_no_token_sees_a_later_one(name):
  *_, params, logits = tiny(name)
  batch = packed_batch()
  before = logits(params, batch)
  changed = batch["tokens"].copy()
  changed[:, T // 2] = (changed[:, T // 2] + 1) % V
  after = logits(params, batch | {"tokens": changed})
  assert np.array_equal(before[:, :T // 2], after[:, :T // 2])
  assert not np.array_equal(before[:, T // 2], after[:, T // 2])


@pytest.mark.parametrize("name", VARIANTS)
def test_no_document_sees_another(name):
  """Changing one document of a packed row changes no logit of any other, to the last bit."""
  *_, params, logits = tiny(name)
  batch = packed_batch()
  before = logits(params, batch)
  for document in (1, 2, 3):
    inside = batch["segments"] == document
    after = logits(params, batch | {"tokens": np.where(inside, (batch["tokens"] + 7) % V, batch["tokens"])})
    assert np.array_equal(before[~inside & (batch["segments"] > 0)], after[~inside & (batch["segments"] > 0)])
    assert not np.array_equal(before[inside], after[inside])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_packed_document_is_the_document_alone(name):
  *_, params, logits = tiny(name)
  batch = packed_batch()
  packed = logits(params, batch)
  alone = {key: np.zeros_like(a) for key, a in batch.items()}
  inside = batch["segments"] == 2
  for row in range(len(inside)):
    n = inside[row].sum()
    alone["tokens"][row, :n] = batch["tokens"][row, inside[row]]
    alone["positions"][row, :n], alone["segments"][row, :n] = np.arange(n), 1
  single = logits(params, alone)
  for row in range(len(inside)):
    np.testing.assert_allclose(packed[row, inside[row]], single[row, :inside[row].sum()], atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_first_loss_and_every_gradient(name):
  """ln V at the start, and no parameter that the loss does not reach."""
  cfg, mesh, graphdef, params, _ = tiny(name)
  spec = loss_spec(cfg, 64, 0.0)

  @jax.jit
  def gradient(params, batch):
    return jax.value_and_grad(lambda p: next_token_loss(spec, nnx.merge(graphdef, p), batch)[0])(params)

  with jax.set_mesh(mesh):
    batch = packed_batch()
    loss, grads = gradient(params, put(cfg, mesh, batch))
  assert float(loss) / batch["weights"].sum() == pytest.approx(
      np.log(V), rel=0.1 if cfg.init == "fan_in" else 0.02)
  for path, g in jax.tree_util.tree_flatten_with_path(grads)[0]:
    if path[-1].key == "balance_bias":  # It only selects.
      assert not np.asarray(g).any()
      continue
    assert np.isfinite(g).all() and np.abs(g).max() > 0, path
    if path[0].key == "blocks":  # Every layer of the stack, not only one of them.
      assert (np.abs(np.asarray(g)).reshape(g.shape[0], -1).max(1) > 0).all(), path


def tiny_run(**changes):
  from configs.tiny import get_config
  cfg = get_config()
  cfg.model = model_config(**changes)
  cfg.data.tokenizer.vocab_size = V
  return cfg


@pytest.mark.parametrize("mesh_name", [name for name in MESHES if name != "one"])
@pytest.mark.parametrize("ffn", FFN)
@pytest.mark.parametrize("attention", ATTENTION)
def test_every_pair_traces_on_every_mesh(attention, ffn, mesh_name):
  """Ambiguous shardings are errors of the trace, so this needs no devices; the state keeps its shardings."""
  cfg = tiny_run(**with_attention(attention), **MOE if ffn == "moe" else dict(ffn=ffn))
  cfg.mesh = dataclasses.replace(cfg.mesh, **({"fsdp": 1} | MESHES[mesh_name]))
  state, (after, metrics) = trace_step(cfg.validate(8), abstract_mesh(**MESHES[mesh_name]))
  assert metrics["loss"].shape == ()
  for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
    assert (old.shape, old.dtype) == (new.shape, new.dtype)
    assert old.sharding.is_equivalent_to(jax.NamedSharding(old.sharding.mesh, new.sharding.spec), old.ndim)


CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


TOPOLOGIES = shipped()


@pytest.mark.parametrize("path", TOPOLOGIES)
def test_a_declared_topology_has_as_many_chips_as_the_mesh(path):
  file, _, arg = path.partition(":")
  cfg = importlib.import_module(file.removesuffix(".py").replace("/", ".")).get_config(arg)
  n = cfg.mesh.slices * chips_in(TOPOLOGIES[path])
  assert n == math.prod(getattr(cfg.mesh, axis) for axis in MESH_AXES), "every size is written out"
  cfg.validate(n)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_loads_and_traces(name):
  from model.transformer import check_names
  module = importlib.import_module(f"configs.{name}")
  cfg = module.get_config().validate()
  if math.prod(getattr(cfg.mesh, axis) for axis in MESH_AXES) > 8:
    assert f"configs/{name}.py" in TOPOLOGIES, "a config for a pod says of which chips: TOPOLOGY"
  check_names(cfg.model)
  assert f"configs/{name}.py" in module.__doc__ and "Expected" in module.__doc__, \
      "say the command and what to expect"
  mesh = abstract_mesh(**{axis: max(getattr(cfg.mesh, axis), 1) for axis in MESH_AXES})
  _, (_, metrics) = trace_step(cfg, mesh)
  assert metrics["loss"].shape == ()

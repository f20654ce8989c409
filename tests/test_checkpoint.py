"""Checkpoints: bit-identical, all or nothing, never trusted by name, never lost."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.sharding import make_mesh
from train.checkpoint import Checkpointer
from train.config import CheckpointConfig

SPEC = jax.P("fsdp", "tensor")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  """Shaped like the training state: nested dicts, an optax state, scalars, and an EMA that may be off."""
  step: jax.Array
  params: dict
  opt_state: tuple
  ema: dict | None


def make_state(mesh, seed=0, n=16, ema=True):
  """Random bits, so NaN payloads, denormals and -0.0 too, in float32 and bfloat16."""
  bits = np.random.default_rng(seed).integers
  put = lambda x: jax.device_put(x, jax.NamedSharding(mesh, SPEC if x.ndim == 2 else jax.P()))
  draw = lambda kind: bits(0, 2**32, (n, 8), np.uint32).view(kind)[:n, :8]
  params = {"blocks": {"w": put(draw(np.float32))}, "embed": put(draw(jnp.bfloat16))}
  opt_state = jax.tree.map(put, optax.adamw(1e-3).init(params))
  opt_state = jax.tree.map(lambda x: put(draw(x.dtype)) if x.ndim else x, opt_state)
  return State(put(jnp.int32(seed)), params, opt_state, jax.tree.map(lambda x: x, params) if ema else None)


def abstract(state, mesh):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=jax.NamedSharding(mesh, x.sharding.spec)), state)


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(fsdp=4, tensor=2)


def test_round_trip(tmp_path, mesh):
  state = make_state(mesh, seed=7)
  checkpoints = Checkpointer(tmp_path / "checkpoints", CheckpointConfig())
  assert checkpoints.restore(abstract(state, mesh)) is None
  assert checkpoints.save(7, state, {"config": {"a": (1, None)}}, {"eval/val/loss": 2.5})
  checkpoints.wait()
  assert not checkpoints.save(7, state, {})
  for other in (mesh, make_mesh(data=2, fsdp=2, tensor=2), make_mesh(data=8)):
    restored = checkpoints.restore(abstract(state, other))
    assert_same_bits(restored.state, state)
    assert restored.state.params["blocks"]["w"].sharding.mesh == other
    assert restored.step == 7 == restored.meta["step"] and restored.rejected == []
    assert restored.meta["config"] == {"a": [1, None]}

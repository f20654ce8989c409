"""The chunked, sharded cross-entropy against optax on the whole logits."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.sharding import TRAIN
from tests.tiny import mesh_of
from train.losses import LossSpec, cross_entropy

B, T, D, V, REAL = 8, 12, 16, 256, 250


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  x_BTD, head_DV = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)
  weights_BT = ((rng.random((B, T)) < 0.7) * rng.random((B, T))).astype(np.float32)
  return x_BTD, head_DV, rng.integers(0, REAL, (B, T)).astype(np.int32), weights_BT


def dense(x_BTD, head_DV, targets_BT, weights_BT, softcap, z_loss):
  """The definition, with all logits at once."""
  logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, head_DV)[..., :REAL]
  if softcap is not None:
    logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
  nll_BT = optax.losses.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
  lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  return jnp.sum(weights_BT * (nll_BT + z_loss * lse_BT**2)), jnp.sum(weights_BT * nll_BT, axis=1)


@pytest.mark.parametrize("mesh_name, embed", [
  ("one", TRAIN.embed), ("all", ()), ("fsdp_tensor", TRAIN.embed), ("all", TRAIN.embed)])
@pytest.mark.parametrize("chunk", [1, 7, 24, 10_000])
@pytest.mark.parametrize("softcap, z_loss", [(None, 0.0), (3.0, 1e-2)])
def test_equals_dense(mesh_name, chunk, embed, softcap, z_loss):
  mesh = mesh_of(mesh_name)
  spec = LossSpec(chunk, REAL, softcap, z_loss, TRAIN.batch, TRAIN.loss_length, TRAIN.vocab, embed)
  x, head, targets, weights = arrays()
  with jax.enable_x64(True):  # A float32 oracle is as far from the truth as we are.
    (want, want_B), (want_dx, want_dhead) = jax.value_and_grad(dense, (0, 1), has_aux=True)(
        *(a.astype(np.float64) for a in (x, head)), targets, weights.astype(np.float64), softcap, z_loss)
  assert want_dx.dtype == np.float64
  with jax.set_mesh(mesh):
    rules = dataclasses.replace(TRAIN, embed=embed)
    put = lambda a, *axes: jax.device_put(a, jax.NamedSharding(mesh, rules(*axes)))
    args = (put(x, "batch", None, None), put(head, "embed", "vocab"), put(targets, "batch", None),
            put(weights, "batch", None))
    loss = jax.jit(lambda x, head, *rest: cross_entropy(spec, x, head, *rest))
    (got, (got_B, _)), (dx, dhead) = jax.jit(jax.value_and_grad(
        lambda x, head, *rest: jax.tree.map(lambda a: 0.5 * a, cross_entropy(spec, x, head, *rest)),
        (0, 1), has_aux=True))(*args)
    plain, (plain_B, _) = loss(*args)
  assert float(plain) == pytest.approx(float(want), rel=1e-6)
  assert float(got) == pytest.approx(float(want) / 2, rel=1e-6)
  np.testing.assert_allclose(plain_B, want_B, rtol=2e-6)
  np.testing.assert_allclose(2 * got_B, want_B, rtol=2e-6)
  for got, want in ((dx, want_dx), (dhead, want_dhead)):
    np.testing.assert_allclose(2 * got, want, rtol=0, atol=1e-6 * np.abs(want).max())
  assert not np.asarray(dhead)[:, REAL:].any(), "what pads the vocabulary has no gradient"
  assert not np.asarray(dx)[weights == 0].any(), "masked tokens have no gradient"


def test_uniform_logits_give_log_of_vocabulary():
  spec = LossSpec(16, REAL, None, 0.0, (), (), (), ())
  x, head, targets, _ = arrays()
  with jax.set_mesh(mesh_of("one")):
    loss, _ = cross_entropy(spec, x * 0, head, targets, np.ones((B, T), np.float32))
  assert float(loss) / (B * T) == pytest.approx(np.log(REAL), rel=1e-6)


def test_memory_does_not_grow_with_the_logits():
  """The compiler's own count: all logits would be b * t * V * 4 bytes."""
  b, t, d, v = 8, 256, 32, 8192
  shapes = [jax.ShapeDtypeStruct(s, dt) for s, dt in
            (((b, t, d), jnp.float32), ((d, v), jnp.float32), ((b, t), jnp.int32), ((b, t), jnp.float32))]
  def temporary(chunk):
    spec = LossSpec(chunk, v, None, 0.0, (), (), (), ())
    f = jax.jit(jax.grad(lambda *a: cross_entropy(spec, *a)[0], (0, 1)))
    with jax.set_mesh(mesh_of("one")):
      return f.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
  assert temporary(64) < b * t * v * 4 / 8 < temporary(b * t)

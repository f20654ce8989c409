"""Parts of the model against their definitions."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.tiny import get_config
from model.config import ModelConfig
from model.kernels.attention import KERNEL, Mask
from model.layers import LayerNorm, RMSNorm, dropout, weight
from model.positions import none, rope, sin_cos
from model.sharding import TRAIN, AxisRules, abstract_mesh, make_mesh, mesh_shape
from model.transformer import abstract_params, check_names
from tests.tiny import MOE, abstract_batch, make_params, mesh_of, model_config, packed_batch, put
from train.step import abstract_state, make_train_step


def test_rope_depends_on_distance_only():
  """At positions of 100,000 too, which 16-bit angles would fail."""
  rng = np.random.default_rng(0)
  q, k = (rng.normal(size=(1, 1, 1, 32)).astype(np.float32) for _ in range(2))
  at = lambda x, p: rope(x, *sin_cos(jnp.full((1, 1), p, jnp.int32), none(None, 10_000.0, 32)[0]))
  near = float(jnp.sum(at(q, 7) * at(k, 3)))
  far = float(jnp.sum(at(q, 100_007) * at(k, 100_003)))
  assert far == pytest.approx(near, abs=3e-2 * abs(near) + 1e-5 * 32)
  assert float(jnp.sum(at(q, 8) * at(k, 3))) != pytest.approx(near, abs=1e-3)


def test_rope_is_the_complex_rotation():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
  pos = rng.integers(0, 1000, (2, 5)).astype(np.int32)
  freq = 500.0 ** (-np.arange(4) / 4)
  turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * pos[:, :, None, None] * freq)
  np.testing.assert_allclose(rope(x, *sin_cos(pos, none(None, 500.0, 8)[0])),
                             np.concatenate([turned.real, turned.imag], -1), atol=2e-4)


def test_norms():
  cfg = model_config(norm_eps=1e-5)
  x = np.random.default_rng(0).normal(3.0, 2.0, (2, 4, 16)).astype(np.float32)
  rms, layer = RMSNorm(cfg, 16), LayerNorm(cfg, 16)
  np.testing.assert_allclose(rms(x), x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5), atol=1e-5)
  want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(layer(x), want, atol=1e-5)
  assert rms(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_dropout():
  x = jnp.ones((1000,))
  y = dropout(x, 0.25, jax.random.key(0))
  assert dropout(x, 0.25, None) is x
  assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)} and float(y.mean()) == pytest.approx(1.0, abs=0.1)


def attention_inputs(t=300, seed=0):
  rng = np.random.default_rng(seed)
  q, k, v = (rng.normal(size=(2, t, n, 16)).astype(np.float32) for n in (4, 2, 2))
  segment = np.sort(rng.integers(1, 4, (2, t)), axis=1).astype(np.int32)
  pos = np.stack([np.concatenate([np.arange((row == s).sum()) for s in np.unique(row)])
                  for row in segment]).astype(np.int32)
  return q, k, v, pos, segment


def slow_attention(q, k, v, pos, segment, window, cap):
  """One query at a time, in float64."""
  out = np.zeros_like(q, np.float64)
  for b, t, n in np.ndindex(*q.shape[:3]):
    seen = [s for s in range(t + 1)
            if segment[b, s] == segment[b, t] and (window is None or pos[b, t] - pos[b, s] < window)]
    logits = k[b, seen, n // 2].astype(np.float64) @ q[b, t, n] / 4
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    p = np.exp(logits - logits.max())
    out[b, t, n] = p / p.sum() @ v[b, seen, n // 2]
  return out


@pytest.mark.parametrize("window, cap", [(None, None), (40, None), (None, 2.0), (130, 2.0)])
def test_kernels_against_one_query_at_a_time(window, cap):
  q, k, v, pos, segment = attention_inputs()
  want = slow_attention(q, k, v, pos, segment, window, cap)
  for name, kernel in KERNEL.items():
    if name == "dot_product" and cap is not None:
      continue
    mask = Mask(pos, segment, pos, segment, window, aligned=True)
    got = jax.jit(lambda *a, kernel=kernel, mask=mask: kernel(*a, mask, scale=0.25, cap=cap))(q, k, v)
    np.testing.assert_allclose(got, want, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", KERNEL)
@pytest.mark.parametrize("window", [None, 40])
def test_kernels_keep_documents_apart_to_the_bit(name, window):
  """Over several blocks of 128: what one document's keys and values are changes nothing for another."""
  q, k, v, pos, segment = attention_inputs()
  run = jax.jit(lambda k, v: KERNEL[name](
      q, k, v, Mask(pos, segment, pos, segment, window, aligned=True), scale=0.25, cap=None))
  before = np.asarray(run(k, v))
  for document in (1, 2, 3):
    inside = segment == document
    noise = np.where(inside[..., None, None], 100.0, 0.0).astype(np.float32)
    after = np.asarray(run(k - noise, v + noise))
    assert (np.array_equal(before[~inside], after[~inside])
            and not np.array_equal(before[inside], after[inside]))


def test_initial_weights_have_the_spread_that_is_asked_for():
  cfg = model_config(d_model=256, init_std=0.05)
  w = weight(cfg, (256, 512), ("embed", "mlp"), nnx.Rngs(0), fan_in=256)[...]
  assert float(w.std()) == pytest.approx(0.05, rel=0.01) and float(jnp.abs(w).max()) < 0.05 * 2.3


@pytest.mark.parametrize("t, window", [(300, 50), (700, None), (700, 600)])
def test_chunked_gradient_is_plain_gradient(t, window):
  q, k, v, pos, segment = attention_inputs(t)
  mask = Mask(pos, segment, pos, segment, window, aligned=True)
  grads = [jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a, mask, scale=0.25, cap=3.0))),
                            (0, 1, 2)))(q, k, v)
           for f in (KERNEL["plain"], KERNEL["chunked"])]
  for a, b in zip(*grads):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_axis_rules():
  rules = AxisRules()
  assert rules("batch", None, "heads") == jax.P(("data", "fsdp", "expert"), None, "tensor")
  with pytest.raises(AttributeError):
    rules("hed")
  assert mesh_shape({"fsdp": -1, "tensor": 2}, 8) == (1, 1, 4, 1, 1, 2)
  with pytest.raises(ValueError, match="needs 3 devices"):
    mesh_shape({"fsdp": -1, "tensor": 3}, 8)


def test_a_large_model_is_traced_without_devices():
  """70B parameters on 512 chips, each knowing its share."""
  cfg = ModelConfig(vocab_size=128_000, n_layers=80, d_model=8192, n_heads=64, n_kv_heads=8,
                    d_ff=28_672).validate()
  _, params = abstract_params(cfg, abstract_mesh(fsdp=64, tensor=8))
  leaves = jax.tree.leaves(params)
  total = sum(a.size for a in leaves)
  held = sum(np.prod(a.sharding.shard_shape(a.shape)) for a in leaves)
  assert 69e9 < total < 72e9 and held < total / 500


@pytest.mark.parametrize("field, wrong, right", [
  ("attention", "gpa", "gqa"), ("attention_impl", "chunk", "chunked"), ("ffn", "swigl", "swiglu"),
  ("norm", "rmnorm", "rmsnorm"), ("remat", "ful", "full"), ("head", "tide", "tied"),
  ("context", "rings", "ring"), ("init", "fanin", "fan_in"), ("norm_position", "prae", "pre")])
def test_misspelt_names_are_refused_with_the_right_one(field, wrong, right):
  cfg = ModelConfig(vocab_size=100, **{field: wrong}).validate()
  with pytest.raises(ValueError, match=f"model.{field}='{wrong}'.*did you mean '{right}'"):
    check_names(cfg)


@pytest.mark.parametrize("field, wrong, right", [
  ("router", "sigmod", "sigmoid"), ("dispatch", "droples", "dropless"), ("exchange", "raged", "ragged")])
def test_misspelt_names_of_a_mixture_are_refused(field, wrong, right):
  cfg = ModelConfig(vocab_size=100, **MOE | {field: wrong}).validate()
  with pytest.raises(ValueError, match=f"model.{field}='{wrong}'.*did you mean '{right}'"):
    check_names(cfg)


def test_a_soft_cap_needs_a_kernel_that_has_one():
  capped = dict(vocab_size=100, attention_softcap=5.0)
  with pytest.raises(ValueError, match="nearest valid: 'chunked' or 'plain'"):
    check_names(ModelConfig(**capped, attention_impl="dot_product").validate())
  check_names(ModelConfig(**capped).validate())  # auto chooses one.


@pytest.mark.parametrize("sizes, changes, model", [
  (dict(tensor=2, data=4), dict(heads=()), {}), (dict(tensor=4, data=2), dict(kv_heads=()), {}),
  (dict(tensor=4, data=2), dict(mlp=()), {}),
  (dict(seq=2, tensor=4), dict(length=("seq", "tensor"), residual=("seq", "tensor"), heads=(), kv_heads=(),
                               mlp=(), vocab=(), loss_length=("seq", "tensor")), {}),
  (dict(fsdp=2, tensor=4), {}, dict(qk_norm="rmsnorm", qk_norm_over="all", positions="learned",
                                    max_length=48, n_layers=1))])
def test_other_rules_are_the_same_model(sizes, changes, model):
  """Heads, kv heads and widths may each be split or not; norms and tables that go over what is split."""
  def hidden(cfg, mesh):
    with jax.set_mesh(mesh):
      graphdef, params = make_params(cfg, mesh)
      batch = put(cfg, mesh, packed_batch())
      forward = jax.jit(lambda params, *rows: nnx.merge(graphdef, params)(*rows)[0])
      return np.asarray(forward(params, *(batch[k] for k in ("tokens", "positions", "segments"))))

  rules = dataclasses.replace(TRAIN, **changes)
  want = hidden(model_config(**model), mesh_of("one"))
  np.testing.assert_allclose(hidden(model_config(rules=rules, **model), make_mesh(**sizes)), want, atol=1e-5)


def test_the_partitioner_has_no_surprise(capfd):
  """Nothing is "involuntarily rematerialised" on the mesh that splits the tables both ways."""
  cfg, mesh = get_config(), mesh_of("fsdp_tensor")
  cfg.mesh.fsdp, cfg.mesh.tensor = 4, 2
  graphdef, state = abstract_state(cfg.validate(8), mesh)
  with jax.set_mesh(mesh):
    step = jax.jit(make_train_step(cfg, graphdef, state.params))
    text = step.lower(state, abstract_batch(cfg, mesh)).compile().as_text()
  assert "Involuntary full rematerialization" not in capfd.readouterr().err
  assert "all-gather" in text and "all-reduce" in text

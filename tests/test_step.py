"""One step: the same on every mesh, in any number of micro-batches, under every remat policy; bad steps
change nothing."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import PRECISION
from model.transformer import REMAT, init_params
from tests.tiny import MESHES, T, abstract_batch, mesh_of, model_config, packed_batch, put, trace_step
from train.config import OPTIMIZER_KNOBS, OptimConfig, TrainConfig
from train.host import Stopwatch
from train.loop import prepare_run
from train.step import GUARD_STEPS, Guard, _accumulate, _watch, abstract_state, init_state, make_train_step


def run_config(mesh_name="one", *, model=None, **changes):
  cfg = TrainConfig(steps=100, batch_size=8, seq_len=T, loss_chunk=32, **changes)
  cfg.model, cfg.data.sources[0].kind = model_config(**(model or {})), "synthetic"
  cfg.data.tokenizer.vocab_size = cfg.model.vocab_size
  cfg.optim = dataclasses.replace(cfg.optim, warmup_steps=2, lr=1e-2) if "optim" not in changes else cfg.optim
  cfg.mesh = dataclasses.replace(cfg.mesh, **({"fsdp": 1} | MESHES[mesh_name]))
  return cfg.validate()


def _run(mesh_name, steps=2):
  model = dict(window=9, layer_pattern=("local", "global"), qk_norm="rmsnorm", logit_softcap=30.0)
  cfg = run_config(mesh_name, model=model, accum_steps=2, z_loss=1e-3,
                   optim=OptimConfig(name="muon", warmup_steps=2, lr=1e-2))
  mesh = mesh_of(mesh_name)
  graphdef, state = init_state(cfg, mesh)
  with jax.set_mesh(mesh):
    step = jax.jit(make_train_step(cfg, graphdef, state.params), donate_argnums=0)
    history = []
    for i in range(steps):
      state, metrics = step(state, put(cfg.model, mesh, packed_batch(i)))
      history.append((float(metrics["loss"]), float(metrics["grad_norm"]), float(metrics["tokens"])))
    nll_B = np.asarray(metrics["nll_B"])
  return history, jax.tree.map(np.asarray, state.params), nll_B


def test_muon_and_micro_batches_are_the_same_on_a_mesh():
  """AdamW, and every mesh: test_parallel.py."""
  want, want_params, want_nll = _run("one")
  got, params, nll = _run("all")
  np.testing.assert_allclose(got, want, rtol=2e-5)
  np.testing.assert_allclose(nll, want_nll, rtol=2e-4)
  for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(want_params)[0], jax.tree.leaves(params)):
    np.testing.assert_allclose(a, b, atol=3e-5, err_msg=str(path))


def test_another_init_seed_is_other_weights_on_the_same_rows(tmp_path):
  """0 is the key of the seed itself, to the bit."""
  mesh = mesh_of("one")
  first = lambda **seeds: np.asarray(init_state(run_config(**seeds), mesh)[1].params["embed"])
  with jax.set_mesh(mesh):
    want = np.asarray(init_params(run_config().model, mesh, jax.random.key(3))[1]["embed"])
  assert np.array_equal(first(seed=3), want) and not np.array_equal(first(seed=3, init_seed=1), want)

  def row(**seeds):
    cfg = run_config("fsdp", model=dict(vocab_size=384), **seeds)
    cfg.data.cache_path, cfg.data.sources[0].documents = str(tmp_path), 50
    return prepare_run(cfg, Stopwatch()).rows.row(2, 5)["tokens"].tolist()

  assert row() == row(init_seed=1)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_accumulation_is_the_big_batch(k):
  """With rows of very unequal numbers of trained tokens."""
  def gradient(k):
    cfg = run_config(accum_steps=k)
    mesh = mesh_of("one")
    graphdef, state = init_state(cfg, mesh)
    batch = packed_batch()
    with jax.set_mesh(mesh):
      f = jax.jit(lambda params, batch: _accumulate(cfg, graphdef, params, batch, None))
      (loss, aux), grads = f(state.params, put(cfg.model, mesh, batch))
    n = batch["weights"].sum()
    return float(loss) / n, np.asarray(aux["nll_B"]), jax.tree.map(lambda g: np.asarray(g) / n, grads)

  want, want_nll, want_grads = gradient(1)
  loss, nll, grads = gradient(k)
  assert loss == pytest.approx(want, rel=1e-6)
  np.testing.assert_allclose(nll, want_nll, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(want_grads), jax.tree.leaves(grads)):
    np.testing.assert_allclose(a, b, atol=1e-6)


@functools.cache
def _remat(policy):
  cfg = run_config(model=dict(remat=policy, n_layers=8, d_model=64))
  mesh = mesh_of("one")
  graphdef, state = init_state(cfg, mesh)
  with jax.set_mesh(mesh):
    f = jax.jit(lambda params, batch: _accumulate(cfg, graphdef, params, batch, None))
    args = state.params, put(cfg.model, mesh, packed_batch())
    compiled = f.lower(*args).compile()
    return jax.tree.map(np.asarray, compiled(*args)[1]), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("policy", [p for p in REMAT if p != "none"])
def test_remat_changes_memory_and_nothing_else(policy):
  want, most = _remat("none")
  got, memory = _remat(policy)
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
    np.testing.assert_allclose(a, b, atol=1e-5)
  assert memory <= most


def test_remat_memory_falls_from_policy_to_policy():
  none, dots, outputs, full = (_remat(p)[1] for p in ("none", "dots", "outputs", "full"))
  assert none > dots > outputs >= full


@functools.cache
def _stepper(**optim):
  cfg = run_config(optim=OptimConfig(warmup_steps=2, lr=1e-2, ema=0.9, **optim))
  mesh = mesh_of("one")
  graphdef, _ = abstract_state(cfg, mesh)
  with jax.set_mesh(mesh):
    step = jax.jit(make_train_step(cfg, graphdef, abstract_state(cfg, mesh)[1].params))

  def run(state, batch):
    with jax.set_mesh(mesh):
      return step(state, put(cfg.model, mesh, batch))
  return cfg, init_state(cfg, mesh)[1], run


def leaves(state):
  return [np.asarray(a) for a in jax.tree.leaves((state.params, state.opt_state, state.ema))]


def test_a_step_with_nan_changes_nothing_but_the_step():
  _, state, run = _stepper()
  state, _ = run(state, packed_batch())
  poisoned = packed_batch(1)
  poisoned["weights"][3, 5] = np.nan
  after, metrics = run(state, poisoned)
  assert all(np.array_equal(a, b) for a, b in zip(leaves(state), leaves(after)))
  assert int(after.step) == int(state.step) + 1 and int(metrics["skipped"]) == 1
  after, metrics = run(after, poisoned)
  assert int(metrics["skipped"]) == 2
  after, metrics = run(after, packed_batch(2))
  assert int(metrics["skipped"]) == 0 and not np.array_equal(leaves(after)[0], leaves(state)[0])


def test_a_spike_is_skipped_and_ordinary_noise_is_not():
  _, state, run = _stepper()
  for i in range(GUARD_STEPS + 5):
    state, metrics = run(state, packed_batch(i % 3))
    assert int(metrics["skipped"]) == 0
  wild = dataclasses.replace(state, params=jax.tree.map(lambda p: p * 30, state.params))
  after, metrics = run(wild, packed_batch())
  assert int(metrics["skipped"]) == 1 and float(metrics["sigmas"]) > 8
  assert np.argmax(np.asarray(metrics["nll_B"])) >= 0
  assert all(np.array_equal(a, b) for a, b in zip(leaves(wild), leaves(after)))


def test_a_lasting_rise_is_accepted_after_a_few_steps():
  """Another source begins: the loss rises by 12 standard deviations and stays there."""
  guard, skipped = Guard(jnp.float32(2.5), jnp.float32(0.02**2), jnp.int32(100), jnp.int32(0)), []
  for i in range(20):
    loss = jnp.float32(2.8 + 0.02 * np.cos(i))
    good, guard, _ = _watch(OptimConfig(), guard, loss, jnp.float32(1.0))
    skipped.append(not good)
  assert 0 < sum(skipped) <= OptimConfig().max_skips and not any(skipped[5:])


def test_a_single_spike_does_not_open_the_door_to_the_next():
  guard = Guard(jnp.float32(2.5), jnp.float32(0.02**2), jnp.int32(100), jnp.int32(0))
  for i in range(30):
    good, guard, _ = _watch(OptimConfig(), guard, jnp.float32(50.0 if i % 15 == 5 else 2.5), jnp.float32(1.0))
    assert bool(good) == (i % 15 != 5)


@pytest.mark.parametrize("optimizer", OPTIMIZER_KNOBS)
@pytest.mark.parametrize("precision", PRECISION)
def test_the_state_keeps_its_types(precision, optimizer):
  """Whatever the precision and the optimizer, a step gives back the types that it took: it compiles once."""
  cfg = run_config(model=dict(precision=precision),
                   optim=OptimConfig(name=optimizer, ema=0.9, warmup_steps=2))
  state, (after, _) = trace_step(cfg, mesh_of("one"))
  for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
    assert (old.shape, old.dtype) == (new.shape, new.dtype)


def test_dropout_masks_are_made_in_shards():
  """No device draws the mask of the whole batch."""
  cfg, mesh = run_config("fsdp", model=dict(dropout=0.1, d_model=96)), mesh_of("fsdp")
  graphdef, state = abstract_state(cfg, mesh)
  with jax.set_mesh(mesh):
    step = jax.jit(make_train_step(cfg, graphdef, state.params))
    text = step.lower(state, abstract_batch(cfg, mesh)).compile().as_text()
  assert f"[1,{T},96]" in text and f"[8,{T},96]" not in text


def test_ema_is_the_written_out_average():
  _, state, run = _stepper()
  want = np.asarray(state.params["embed"], np.float64)
  for i in range(4):
    state, _ = run(state, packed_batch(i))
    want = 0.9 * want + 0.1 * np.asarray(state.params["embed"])
  np.testing.assert_allclose(state.ema["embed"], want, atol=1e-6)


def test_one_batch_can_be_learned_by_heart():
  cfg = run_config(model=dict(n_layers=1, vocab_size=128),
                   optim=OptimConfig(lr=2e-2, warmup_steps=5, schedule="constant"))
  mesh = mesh_of("one")
  graphdef, state = init_state(cfg, mesh)
  with jax.set_mesh(mesh):
    step = jax.jit(make_train_step(cfg, graphdef, state.params), donate_argnums=0)
    batch = put(cfg.model, mesh, packed_batch(vocab=128))
    for _ in range(200):
      state, metrics = step(state, batch)
  assert float(metrics["loss"]) < 0.1


def test_bf16_keeps_float32_where_it_matters():
  """The jaxpr of a bf16 step: every exponential, logarithm, root and maximum is float32, every product of the
  blocks and the head multiplies bf16, and the head's accumulate in float32."""
  cfg = run_config(model=dict(precision="bf16", attention_impl="plain"))
  state, jaxpr = trace_step(cfg, mesh_of("one"), closed=True)
  dots, checked = [], set()

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      kind = eqn.primitive.name
      if kind == "dot_general":
        dots.append((*(str(v.aval.dtype) for v in eqn.invars), str(eqn.outvars[0].aval.dtype)))
      elif kind in ("exp", "log", "rsqrt", "sin", "cos", "reduce_max"):
        checked.add(kind)
        assert eqn.invars[0].aval.dtype == jnp.float32, eqn
      for sub in jax.core.jaxprs_in_params(eqn.params):
        walk(sub)

  walk(jaxpr.jaxpr)
  assert checked == {"exp", "log", "rsqrt", "sin", "cos", "reduce_max"}
  low = [d for d in dots if d[:2] == ("bfloat16", "bfloat16")]
  assert len(low) >= 7 + 3 + 7 and ("bfloat16", "bfloat16", "float32") in low
  assert all(a.dtype == jnp.float32 for a in jax.tree.leaves((state.params, state.opt_state)) if a.ndim)

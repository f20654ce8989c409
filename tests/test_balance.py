"""Balance of the experts: losses over the whole batch, the bias, and what both do to a run."""
import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.test_step import run_config
from tests.tiny import MOE, mesh_of, packed_batch, put
from train.balance import router_metrics, update_biases
from train.config import BalanceConfig, OptimConfig
from train.log import LostLoss, StepLog
from train.step import _accumulate, init_state, make_train_step

SIGMOID = MOE | dict(router="sigmoid", router_bias=True)


def gradients(k, mesh_name="one"):
  cfg = run_config(mesh_name, model=MOE, accum_steps=k,
                   balance=BalanceConfig(loss=1.0, z_loss=0.1, sequence_loss=0.5))
  mesh = mesh_of(mesh_name)
  graphdef, state = init_state(cfg, mesh)
  with jax.set_mesh(mesh):
    f = jax.jit(lambda params, batch: _accumulate(cfg, graphdef, params, batch, None))
    (_, aux), grads = f(state.params, put(cfg.model, mesh, packed_batch()))
  kept = ("balance_loss", "router_z_loss", "sequence_loss", "router")
  return jax.device_get({name: aux[name] for name in kept}), grads


def test_losses_are_over_the_global_batch_however_it_is_cut():
  """2 micro-batches, whose loads differ, on 8 devices: the losses and the router's gradient of one batch."""
  want, want_grads = gradients(1)
  got, grads = gradients(2, "tensor")
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  router = lambda grads: np.asarray(grads["blocks"]["0"]["ffn"]["w_router"])
  assert np.linalg.norm(router(grads) - router(want_grads)) < 1e-5 * np.linalg.norm(router(want_grads))


def test_losses_are_the_written_out_ones():
  got, _ = gradients(1)
  s, k, E = got["router"]["0"], 2, 8
  n = (packed_batch()["segments"] > 0).sum()
  want = sum(E * (load / (k * n) * prob / n).sum() for load, prob in zip(s["load_E"], s["prob_E"]))
  assert s["load_E"].sum(1).tolist() == [k * n] * 2 and got["balance_loss"] == pytest.approx(want, rel=1e-5)
  assert got["router_z_loss"] == pytest.approx(s["z"].sum() / n, rel=1e-6)
  assert got["balance_loss"] > 2 * 0.99  # 1 a layer where all is even, and hardly ever below.


def test_biases_move_towards_the_mean_load_until_they_stop():
  cfg = run_config(model=SIGMOID, balance=BalanceConfig(bias_rate=0.1, bias_until=0.5))
  bias = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
  load = np.arange(16, dtype=np.float32).reshape(2, 8) % 5
  params = {"blocks": {"0": {"ffn": {"balance_bias": jax.numpy.asarray(bias)}}}}
  with jax.set_mesh(mesh_of("one")):
    move = lambda step: np.asarray(
        update_biases(cfg, step, params, {"0": load})["blocks"]["0"]["ffn"]["balance_bias"])
    want = bias + 0.1 * np.sign(load.mean(1, keepdims=True) - load)
    np.testing.assert_allclose(move(49), want, rtol=1e-6)
    np.testing.assert_array_equal(move(50), bias)


def test_metrics_of_a_forced_imbalance():
  """All tokens to 2 of 8 experts in one layer, evenly to all in the other, a tenth dropped."""
  sums = {"load_E": np.array([[40, 40, 0, 0, 0, 0, 0, 0], [10] * 8], np.float32),
          "tokens": np.array([40, 40], np.float32), "dropped": np.array([8, 0], np.float32),
          "entropy": np.array([0, 40 * np.log(8)], np.float32)}
  got = router_metrics(run_config(model=MOE).model, {"0": jax.tree.map(jax.numpy.asarray, sums)})
  assert got["moe/max_over_mean_load"].tolist() == [4, 1] and got["moe/dead_experts"].tolist() == [6, 0]
  np.testing.assert_allclose(got["moe/drop_fraction"], [0.1, 0])
  np.testing.assert_allclose(got["moe/entropy"], [0, np.log(8)], rtol=1e-6)


def test_a_loss_that_is_asked_for_and_does_not_arrive_ends_the_run():
  cfg = run_config(model=MOE)
  log = StepLog(cfg, None, None, None, None, 0)
  log._check_balance({"balance_loss": 2.0})
  with pytest.raises(LostLoss, match="balance.loss=0.01, but balance_loss is 0.0"):
    log._check_balance({"balance_loss": 0.0})


# What the two ways do to a run on a skewed stream.

def skewed(seed, b=32, t=48):
  """Zipf's words in a chain that can be learned: each follows from the last, 9 times of 10."""
  rng = np.random.default_rng(seed)
  zipf = 1 / np.arange(1, 301)
  draw = lambda: rng.choice(300, b, p=zipf / zipf.sum())
  rows = [draw()]
  for _ in range(t):
    rows.append(np.where(rng.random(b) < 0.9, (rows[-1] * 7 + 3) % 300, draw()))
  tokens = np.stack(rows, 1).astype(np.int32)
  ones = np.ones((b, t), np.int32)
  return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=ones.astype(np.float32), segments=ones,
              positions=np.arange(t, dtype=np.int32)[None].repeat(b, 0))


@functools.cache
def train(router_bias, steps=300):
  """(loss, max / mean load of the worst layer) of each step; two experts are everybody's favourites at
  first."""
  cfg = run_config(model=SIGMOID | dict(router_bias=router_bias, d_model=64),
                   balance=BalanceConfig(bias_rate=0.003) if router_bias else BalanceConfig(),
                   optim=OptimConfig(lr=2e-3, warmup_steps=10))
  cfg.batch_size, cfg.steps, mesh = 32, steps, mesh_of("one")
  graphdef, state = init_state(cfg, mesh)
  with jax.set_mesh(mesh):
    params = state.params
    common = np.random.default_rng(0).normal(size=64).astype(np.float32)
    ffn = params["blocks"]["0"]["ffn"]
    favour = ffn["w_router"].at[:, :, :2].add(0.01 * common[None, :, None])
    params = {**params, "embed": params["embed"] + 0.02 * common[None],
              "blocks": {"0": {**params["blocks"]["0"], "ffn": {**ffn, "w_router": favour}}}}
    step = jax.jit(make_train_step(cfg, graphdef, params), donate_argnums=0)
    state, history = dataclasses.replace(state, params=params), []
    for i in range(steps):
      state, metrics = step(state, put(cfg.model, mesh, skewed(i)))
      history.append((float(metrics["loss"]), float(np.max(metrics["moe/max_over_mean_load"]))))
  return np.array(history)


@pytest.mark.slow
def test_the_bias_evens_out_a_skewed_stream_at_no_cost_to_the_loss():
  bias, loss = train(True), train(False)
  print("bias", bias[0], bias[-20:].mean(0), "auxiliary loss", loss[0], loss[-20:].mean(0))
  assert bias[0, 1] > 3 and bias[-20:, 1].mean() < 1.3
  assert bias[-20:, 0].mean() <= 1.005 * loss[-20:, 0].mean()


def test_one_expert_a_token_still_teaches_the_router():
  """Its weight is its probability (Switch): normalised to 1, the language model would not move the router."""
  cfg = run_config(model=MOE | dict(n_experts_per_token=1), balance=BalanceConfig(loss=0.0))
  mesh = mesh_of("one")
  graphdef, state = init_state(cfg, mesh)
  with jax.set_mesh(mesh):
    f = jax.jit(lambda params, batch: _accumulate(cfg, graphdef, params, batch, None)[1])
    grads = f(state.params, put(cfg.model, mesh, packed_batch()))
  assert np.abs(grads["blocks"]["0"]["ffn"]["w_router"]).max() > 1e-6


def test_a_frozen_bias_stays():
  cfg = run_config(model=SIGMOID)
  params = {"blocks": {"0": {"ffn": {"balance_bias": np.zeros((2, 8), np.float32)}}}}
  cfg.optim.freeze = (("balance_bias", True),)
  moved = update_biases(cfg, 0, params, {"0": np.arange(16, dtype=np.float32).reshape(2, 8)})
  assert not moved["blocks"]["0"]["ffn"]["balance_bias"].any()

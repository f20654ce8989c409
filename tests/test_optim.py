"""Optimizers against written-out mathematics, schedules against closed forms, rules against parameter
lists."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tiny import mesh_of, model_config
from train.config import OPTIMIZER_KNOBS, SCHEDULES, OptimConfig, TrainConfig
from train.optim import OPTIMIZER, SCHEDULE, check_optimizer, learning_rate, make_optimizer, match, path_name
from train.step import init_state


def config(steps=100, **optim):
  return TrainConfig(steps=steps, optim=OptimConfig(**optim).validate())


def test_tables_are_those_of_the_schema():
  assert set(OPTIMIZER) == set(OPTIMIZER_KNOBS) and set(SCHEDULE) == set(SCHEDULES)


@pytest.mark.parametrize("name", OPTIMIZER)
def test_every_knob_is_read_and_no_other(name):
  """A knob that the schema admits changes the update, and the others are refused."""
  params = {"blocks": {"0": {"w": jnp.ones((2, 4, 4))}}, "norm": jnp.ones((3,))}

  def run(**knobs):
    tx = make_optimizer(config(name=name, weight_decay=0.0, grad_clip=None, **knobs), params)
    state, out = tx.init(params), None
    for i in range(3):
      grads = jax.tree.map(
          lambda p, i=i: jnp.cos(jnp.arange(p.size, dtype=jnp.float32) + i).reshape(p.shape) * 0.1, params)
      out, state = tx.update(grads, state, params)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(out)])
  base = run()
  for knob in ("b1", "b2", "eps", "momentum"):
    if knob in OPTIMIZER_KNOBS[name]:
      assert not np.allclose(base, run(**{knob: 0.5})), knob
      assert knob == "eps" or not np.allclose(base, run(**{knob: 0.0})), f"{knob}=0 is not the default"
    else:
      with pytest.raises(ValueError, match=f"optim.{knob}=0.5 is not read by optim.name='{name}'"):
        run(**{knob: 0.5})


def test_adamw_is_the_papers(seed=0):
  """100 steps of AdamW (arXiv:1711.05101) with clipping, in float64 NumPy."""
  rng = np.random.default_rng(seed)
  cfg = config(lr=0.01, warmup_steps=10, weight_decay=0.1, grad_clip=1.0,
               decay_scale=(("norm", 0.0), (".*", 1.0)), eps=1e-8)
  params = {"w": rng.normal(size=(5, 7)).astype(np.float32), "norm": rng.normal(size=7).astype(np.float32)}
  got = jax.tree.map(jnp.asarray, params)
  want = {k: v.astype(np.float64) for k, v in params.items()}
  m, v = ({k: np.zeros_like(p) for k, p in want.items()} for _ in range(2))
  tx, schedule = make_optimizer(cfg, got), learning_rate(cfg)
  state = tx.init(got)

  @jax.jit
  def step(got, state, grads, t):
    updates, state = tx.update(grads, state, got)
    return jax.tree.map(lambda p, u: p - schedule(t) * u, got, updates), state

  for t in range(100):
    grads = {k: rng.normal(size=p.shape).astype(np.float32) for k, p in params.items()}
    got, state = step(got, state, grads, t)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
    progress = np.clip((t - 10) / (99 - 10), 0, 1)
    lr = 0.01 * min((t + 1) / 10, 1) * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * progress)))
    for k, g in grads.items():
      g = g.astype(np.float64) / max(norm, 1.0)
      m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.95 * v[k] + 0.05 * g * g
      direction = (m[k] / (1 - 0.9 ** (t + 1))) / (np.sqrt(v[k] / (1 - 0.95 ** (t + 1))) + 1e-8)
      want[k] = want[k] - lr * (direction + (0.1 * want[k] if k == "w" else 0.0))
  for k in want:
    np.testing.assert_allclose(got[k], want[k], atol=1e-6)


def test_adamw_equals_torch():
  torch = pytest.importorskip("torch", reason="the oracle is not installed")
  rng = np.random.default_rng(1)
  start = rng.normal(size=(6, 5)).astype(np.float32)
  cfg = config(lr=0.02, schedule="constant", warmup_steps=0, weight_decay=0.1, grad_clip=None, eps=1e-8,
               decay_scale=((".*", 1.0),))
  theirs = torch.nn.Parameter(torch.tensor(start).double())
  oracle = torch.optim.AdamW([theirs], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
  ours = {"w": jnp.asarray(start)}
  tx = make_optimizer(cfg, ours)
  state, update = tx.init(ours), jax.jit(tx.update)
  for _ in range(100):
    g = rng.normal(size=start.shape).astype(np.float32)
    theirs.grad = torch.tensor(g).double()
    oracle.step()
    updates, state = update({"w": g}, state, ours)
    ours = {"w": ours["w"] - 0.02 * updates["w"]}
  np.testing.assert_allclose(ours["w"], theirs.detach().numpy(), atol=1e-6)


def test_muon_of_a_stack_is_muon_of_each_layer():
  """Stacked layers are a batch of matrices and heads belong to one side; the update is nearly orthogonal."""
  rng = np.random.default_rng(0)
  shapes = {"wq": (3, 16, 4, 8), "wo": (3, 4, 8, 16), "w_up": (3, 16, 24)}
  grads = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
  flat = {"wq": (16, 32), "wo": (32, 16), "w_up": (16, 24)}

  def update(grads):
    params = {"blocks": {"0": {"a": grads}}, "norm": jnp.ones((4, 4))}
    tx = make_optimizer(config(name="muon", weight_decay=0.0, grad_clip=None), params)
    with jax.set_mesh(mesh_of("one")):
      return jax.jit(tx.update)(params, tx.init(params), params)[0]["blocks"]["0"]["a"]

  stacked = update(grads)
  for name, shape in flat.items():
    for layer in range(3):
      alone = update({"w_up": grads[name][layer].reshape(1, *shape)})["w_up"][0]
      np.testing.assert_allclose(np.reshape(stacked[name][layer], shape), alone, atol=1e-5)
      singular = np.linalg.svd(np.asarray(alone, np.float64), compute_uv=False) / (0.2 * max(shape) ** 0.5)
      assert singular.min() > 0.68 and singular.max() < 1.16, "what the polynomial makes of 0.005 to 1"


def kellers_muon(grads, beta, corrected):
  """The update of each step in float64, as Jordan et al. wrote it: Nesterov's momentum, then five steps of a
  quintic on the matrix over its norm. Corrected: with NAdam's divisors of average and gradient, as optax."""
  average = 0.0
  for t, g in enumerate(grads, 1):
    average = beta * average + (1 - beta) * g
    now, then = (1 - beta**t, 1 - beta**(t + 1)) if corrected else (1, 1)
    x = beta * average / then + (1 - beta) * g / now
    x = x / np.linalg.norm(x)
    for _ in range(5):
      a = x @ x.T
      x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    yield x * 0.2 * max(x.shape) ** 0.5


@pytest.mark.parametrize("beta, steps", [(0.95, (0, 1, 5)), (0.5, (0, 22))])
def test_muon_is_kellers(beta, steps):
  """To 1e-5. Optax divides as NAdam does, which changes the mixture of average and gradient in the first
  steps; at the first of all, and once the divisors are 1, it is the update of the original."""
  rng = np.random.default_rng(0)
  grads = rng.normal(size=(23, 1, 16, 24)).astype(np.float32)
  params = {"blocks": {"0": {"a": {"w_up": jnp.ones((1, 16, 24))}}}, "norm": jnp.ones(4)}
  tx = make_optimizer(config(name="muon", weight_decay=0.0, grad_clip=None, momentum=beta), params)
  with jax.set_mesh(mesh_of("one")):
    state, update, got = tx.init(params), jax.jit(tx.update), []
    for g in grads:
      one, state = update({"blocks": {"0": {"a": {"w_up": g}}}, "norm": jnp.ones(4)}, state, params)
      got.append(np.asarray(one["blocks"]["0"]["a"]["w_up"][0]))
  exact = [list(kellers_muon(grads[:, 0].astype(np.float64), beta, corrected)) for corrected in (True, False)]
  for step in steps:
    np.testing.assert_allclose(got[step], exact[0][step], atol=1e-5)
  for step in {0, 22} & set(steps):
    np.testing.assert_allclose(got[step], exact[1][step], atol=1e-5)


def test_schedules_at_their_knots():
  o = dict(lr=2.0, warmup_steps=10, final_lr_fraction=0.1)
  at = lambda name, step, **more: float(learning_rate(config(steps=100, schedule=name, **o | more))(step))
  for name in SCHEDULE:
    assert at(name, 0) == pytest.approx(0.2) and at(name, 9) == pytest.approx(2.0), name
  assert at("constant", 99) == 2.0
  assert at("linear", 99) == pytest.approx(0.2) and at("linear", 10 + 89 / 2) == pytest.approx(1.1)
  assert at("cosine", 99) == pytest.approx(0.2) and at("cosine", 10 + 89 / 2) == pytest.approx(1.1)
  assert at("cosine", 10 + 89 / 4) == pytest.approx(0.2 + 1.8 * (1 + np.sqrt(0.5)) / 2)
  assert at("inverse_sqrt", 40) == pytest.approx(1.0)
  assert at("wsd", 79) == 2.0 and at("wsd", 99) == pytest.approx(0.2)
  assert at("wsd", 84) == pytest.approx(2.0 * (1 - 0.9 * 0.5)), "1 - sqrt at a quarter of the decay"


def test_a_longer_wsd_run_shares_the_stable_part():
  short, long = (learning_rate(config(steps=n, schedule="wsd")) for n in (200, 300))
  assert [float(short(s)) for s in range(150)] == [float(long(s)) for s in range(150)]


def test_default_decay_list():
  """Matrices decay; norms and biases do not."""
  cfg = model_config(norm="layernorm", qkv_bias=True, ffn_bias=True, out_bias=True, qk_norm="rmsnorm")
  from model.transformer import abstract_params
  _, params = abstract_params(cfg, mesh_of("one"))
  decay = match("decay_scale", OptimConfig().decay_scale, params)
  for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]:
    name = path_name(path)
    leaf = name.rsplit("/", 1)[-1]
    scale = decay
    for key in name.split("/"):
      scale = scale[key]
    assert (scale == 0.0) == (leaf == "scale" or leaf.endswith("bias")), name


def test_rules_that_miss():
  params = {"a": jnp.ones(2), "b": jnp.ones(2)}
  with pytest.raises(ValueError, match="no pattern.*parameter b"):
    match("lr_scale", (("a", 1.0),), params)
  with pytest.raises(ValueError, match="patterns \\['c'\\] decide for no parameter.*'a', 'b'"):
    match("lr_scale", (("c", 1.0), (".*", 1.0)), params)


@pytest.mark.parametrize("optim, words", [
  (dict(name="tests.nowhere:make"), "optim.name='tests.nowhere:make' cannot be imported"),
  (dict(freeze=(("embd", True), (".*", False))), "patterns \\['embd'\\] decide for no parameter"),
  (dict(lr_scale=(("embed", 1.0),)), "no pattern of \\['embed'\\] matches parameter"),
])
def test_a_check_before_anything_runs(optim, words):
  from configs.tiny import get_config
  cfg = get_config()
  cfg.optim = OptimConfig(warmup_steps=4, **optim)
  with pytest.raises(ValueError, match=words):
    check_optimizer(cfg.validate())
  for cfg.optim.name in OPTIMIZER:
    cfg.optim = OptimConfig(warmup_steps=4, name=cfg.optim.name)
    check_optimizer(cfg.validate())


def test_freeze_and_lr_scale():
  params = {"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones(3)}
  cfg = config(weight_decay=0.0, grad_clip=None, decay_scale=((".*", 1.0),),
               freeze=(("a", True), (".*", False)), lr_scale=(("b", 0.5), (".*", 1.0)))
  tx = make_optimizer(cfg, params)
  state = tx.init(params)
  updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
  assert not updates["a"].any()
  np.testing.assert_allclose(updates["b"], 0.5 * updates["c"])
  assert sum(x.size for x in jax.tree.leaves(state)) == 2 * 6 + 1, "no moments for what is frozen"


def test_adafactor_memory_is_factored():
  params = {"w": jnp.ones((256, 512))}
  cfg = config(name="adafactor", grad_clip=None, weight_decay=0.0, decay_scale=((".*", 1.0),))
  state = make_optimizer(cfg, params).init(params)
  assert sum(x.size for x in jax.tree.leaves(state)) < 256 + 512 + 16


def test_moments_live_where_their_parameters_do():
  from configs.tiny import get_config
  cfg = get_config()
  cfg.model = model_config()
  cfg.data.tokenizer.vocab_size = cfg.model.vocab_size
  mesh = mesh_of("fsdp_tensor")
  _, state = init_state(cfg.validate(8), mesh)
  is_adam = lambda s: isinstance(s, optax.ScaleByAdamState)
  adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s))
  for p, m in zip(jax.tree.leaves(state.params), jax.tree.leaves(adam.mu)):
    assert p.sharding == m.sharding



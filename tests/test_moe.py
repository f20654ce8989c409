"""The mixture of experts against loops over tokens, and on many devices against one."""
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.exchange import emulated_ragged_all_to_all, shift
from model.ffn import FFN
from model.moe import SUMS, route
from model.sharding import DECODE, AxisRules, abstract_mesh, make_mesh, staged
from tests.tiny import mesh_of, model_config

E, K, D, B, T = 8, 2, 16, 8, 8
ALL = [("dense", "gather"), ("dropless", "gather"), ("capacity", "gather"), ("capacity", "all_to_all"),
       ("dropless", "ragged")]
ROUTERS = {
  "softmax": dict(),
  "softmax groups": dict(n_expert_groups=4, n_groups_per_token=2, router_bias=True),
  "sigmoid": dict(router="sigmoid", router_bias=True, routed_scale=2.5, n_experts_per_token=3),
  "sigmoid groups": dict(router="sigmoid", router_bias=True, n_expert_groups=2, n_groups_per_token=1,
                         n_shared_experts=2),
}


def moe_config(**changes):
  return model_config(**dict(ffn="moe", d_model=D, n_experts=E, n_experts_per_token=K, d_expert=8,
                             dispatch="dropless", grouped_impl="ragged_dot",
                             capacity_factor=100.0) | changes)


def weights(cfg, seed=0, hot=0.0):
  """path -> (float32 NumPy, axes). Expert 3 gets `hot` more of the logits, through the constant first feature
  of `inputs`."""
  rng = np.random.default_rng(seed)
  state = nnx.to_flat_state(nnx.state(FFN["moe"](cfg, rngs=nnx.Rngs(0))))
  found = {}
  for path, param in state:
    value = rng.normal(size=param.get_value().shape).astype(np.float32)
    scale = 1.0 if path[-1] == "balance_bias" else value.shape[-2] ** -0.5
    found[path] = (value * np.float32(scale), param.get_metadata()["axes"])
  found["w_router",][0][0, 3] += hot
  return found


def inputs(seed=0, shape=(B, T)):
  """(x_BTD, segment_BT); one row is padding only."""
  rng = np.random.default_rng(seed)
  x, segment = rng.normal(size=(*shape, D)).astype(np.float32), (rng.random(shape) < 0.8).astype(np.int32)
  x[..., 0], segment[1] = 1.0, 0
  return x, segment


@functools.cache
def graph(cfg):
  return nnx.split(FFN["moe"](cfg, rngs=nnx.Rngs(0)))[0]


def apply(cfg, params, x, segment):
  return nnx.merge(graph(cfg), nnx.traversals.unflatten_mapping(params))(x, segment)


def run(cfg, values, x, segment, mesh=None, grads=True):
  """((y, aux), gradients of a loss that reads all of it) as NumPy, on one device or on a mesh."""
  mesh, rules = mesh or mesh_of("one"), cfg.rules
  put = lambda a, *axes: jax.device_put(a, jax.NamedSharding(mesh, rules(*axes)))
  with jax.set_mesh(mesh):
    params = {path: put(value, *axes) for path, (value, axes) in values.items()}
    args = params, put(x, "batch", "length", None), put(segment, "batch", "length")

    def loss(params, x):
      y, aux = apply(cfg, params, x, args[2])
      assert jax.typeof(y).sharding.spec == rules("batch", "residual", None)
      return jnp.sin(y).sum() + aux["sequence"] + (aux["prob_E"] ** 2).sum() + aux["z"], (y, aux)

    f = jax.value_and_grad(loss, (0, 1), has_aux=True) if grads else loss
    out = jax.tree.map(np.asarray, jax.jit(f)(*args[:2]))
  return (out[0][1], out[1]) if grads else (out[1], None)


def close(got, want, tol=1e-5):
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=tol * max(1.0, np.abs(b).max()), err_msg=str(path))


def choose(cfg, logits, bias):
  """One token: (experts in order of preference, their weights, probabilities of all)."""
  logits = logits.astype(np.float64)
  exp = np.exp(logits - logits.max())
  score = exp / exp.sum() if cfg.router == "softmax" else 1 / (1 + np.exp(-logits))
  select = {i: score[i] + bias[i] for i in range(E)}
  if cfg.n_expert_groups:
    size = E // cfg.n_expert_groups
    groups = [range(g * size, (g + 1) * size) for g in range(cfg.n_expert_groups)]
    best = 1 if cfg.router == "softmax" else 2
    rank = sorted(groups, key=lambda group: -sum(sorted((select[i] for i in group), reverse=True)[:best]))
    select = {i: select[i] for group in rank[:cfg.n_groups_per_token] for i in group}
  ids = sorted(select, key=lambda i: -select[i])[:cfg.n_experts_per_token]
  return ids, score[ids] / score[ids].sum() * cfg.routed_scale, score / score.sum()


def reference(cfg, values, x, segment, groups=None, room=None):
  """(y, aux) in float64, one token at a time.

  Args:
    groups: int [B, T], which tokens compete for the `room` of each expert; None is for all.
  """
  w = {path: value.astype(np.float64) for path, (value, _) in values.items()}
  silu = lambda a: a / (1 + np.exp(-a))
  swiglu = lambda x, gate, up, down: (silu(x @ gate) * (x @ up)) @ down
  bias = w.get(("balance_bias",), np.zeros(E))
  y, aux = np.zeros(x.shape), dict.fromkeys(SUMS, 0.0) | {"load_E": np.zeros(E), "prob_E": np.zeros(E)}
  used, k = {}, cfg.n_experts_per_token
  for b in range(x.shape[0]):
    load, prob, n = np.zeros(E), np.zeros(E), 0
    for t in range(x.shape[1]):
      if cfg.n_shared_experts:
        y[b, t] += swiglu(x[b, t], *(w["shared", name] for name in ("w_gate", "w_up", "w_down")))
      if not segment[b, t]:
        continue
      logits = x[b, t].astype(np.float64) @ w["w_router",]
      ids, weight, p = choose(cfg, logits, bias)
      for i, share in zip(ids, weight):
        load[i] += 1
        place = (i, 0 if groups is None else groups[b, t])
        used[place] = used.get(place, 0) + 1
        if room is not None and used[place] > room:
          aux["dropped"] += 1
          continue
        y[b, t] += share * swiglu(x[b, t], w["w_gate",][i], w["w_up",][i], w["w_down",][i])
      prob, n = prob + p, n + 1
      aux["z"] += np.log(np.exp(logits).sum()) ** 2
      aux["entropy"] -= (p * np.log(p)).sum()
    for name, value in (("load_E", load), ("prob_E", prob), ("tokens", n)):
      aux[name] = aux[name] + value
    if n:
      aux["sequence"] += n * E * (load / (k * n) * prob / n).sum()
  return y, aux


@pytest.mark.parametrize("name", ROUTERS)
def test_outputs_and_sums_are_those_of_a_loop_over_tokens(name):
  cfg = moe_config(**ROUTERS[name])
  values, (x, segment) = weights(cfg), inputs()
  got, _ = run(cfg, values, x, segment, grads=False)
  close(got, reference(cfg, values, x, segment), 2e-5)
  assert got[1]["dropped"] == 0 and (cfg.n_shared_experts or not got[0][segment == 0].any())


@pytest.mark.parametrize("name", ROUTERS)
def test_choices_are_those_of_a_loop_over_tokens(name):
  """On many tokens, with biases that outweigh the scores and leave most of the sums below zero."""
  cfg = moe_config(**ROUTERS[name])
  rng = np.random.default_rng(1)
  logits, bias = rng.normal(size=(500, E)).astype(np.float32), rng.normal(size=E).astype(np.float32) - 2.0
  ids, weight, prob = route(cfg, logits, jnp.asarray(bias))
  for n, want in enumerate(choose(cfg, row, bias) for row in logits):
    assert ids[n].tolist() == want[0]
    np.testing.assert_allclose(weight[n], want[1], rtol=1e-5)
    np.testing.assert_allclose(prob[n], want[2], rtol=1e-5)


def test_gradients_are_those_of_all_experts_on_all_tokens():
  cfg = moe_config(**ROUTERS["sigmoid groups"])
  values, (x, segment) = weights(cfg), inputs()
  settings = ("dense", 1.0), ("dropless", 1.0), ("capacity", 100.0)
  want, *others = (run(moe_config(**ROUTERS["sigmoid groups"], dispatch=dispatch, capacity_factor=factor),
                       values, x, segment) for dispatch, factor in settings)
  for got in others:
    close(got, want)
  for _, (grads, _) in (want, *others):
    assert all(g.any() for path, g in grads.items() if path != ("balance_bias",))
    assert not grads["balance_bias",].any()


@pytest.mark.parametrize("exchange, sizes", [("gather", None), ("gather", dict(data=4, expert=2)),
                                             ("all_to_all", dict(data=2, expert=4))])
def test_a_full_expert_drops_later_tokens(exchange, sizes):
  """The tokens of one device share the room; those of two rows here, or all."""
  cfg = moe_config(dispatch="capacity", capacity_factor=0.75, exchange=exchange)
  values, (x, segment) = weights(cfg, hot=1.0), inputs()
  n_groups = 1 if sizes is None else 8
  groups = np.broadcast_to(np.arange(B)[:, None] // (B // n_groups), (B, T))
  room = math.ceil(0.75 * K * B * T / n_groups / E)
  want = reference(cfg, values, x, segment, groups, room)
  assert 5 < want[1]["dropped"] < (segment > 0).sum() * K / 2
  got, _ = run(cfg, values, x, segment, sizes and make_mesh(**sizes), grads=False)
  close(got, want, 2e-5)


def test_permuted_experts_with_their_router_columns_change_nothing():
  cfg = moe_config(router="sigmoid", router_bias=True)
  values, (x, segment) = weights(cfg), inputs()
  order = np.random.default_rng(0).permutation(E)
  by_last = ("w_router",), ("balance_bias",)
  permuted = {path: (a[..., order] if path in by_last else a[order], axes)
              for path, (a, axes) in values.items()}
  (want, aux), _ = run(cfg, values, x, segment, grads=False)
  (got, new_aux), _ = run(cfg, permuted, x, segment, grads=False)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert new_aux["load_E"].tolist() == aux["load_E"][order].tolist()


@functools.cache
def on_one_device(changes, hot):
  cfg = moe_config(**dict(changes), dispatch="dense")
  return run(cfg, weights(cfg, hot=hot), *inputs())


@pytest.mark.parametrize("dispatch, exchange", ALL)
@pytest.mark.parametrize("sizes", [dict(data=4, expert=2), dict(fsdp=2, expert=4), dict(expert=8)], ids=str)
def test_experts_on_many_devices(sizes, dispatch, exchange):
  """With an expert that most tokens choose."""
  cfg = moe_config(dispatch=dispatch, exchange=exchange)
  values, (x, segment) = weights(cfg, hot=6.0), inputs()
  mesh = make_mesh(**{"data": -1} | sizes)
  want = on_one_device((), 6.0)
  assert want[0][1]["load_E"][3] > 0.95 * want[0][1]["tokens"]
  close(run(cfg, values, x, segment, mesh), want)


SPLIT = {
  "tensor": (dict(expert=4, tensor=2), AxisRules()),
  "length": (dict(expert=2, fsdp=2, seq=2), AxisRules()),
  "residual": (dict(expert=2, seq=2, tensor=2), AxisRules(residual=("seq", "tensor"))),
}


@pytest.mark.parametrize("split, dispatch, exchange", [
    ("tensor", "dropless", "gather"), ("tensor", "capacity", "all_to_all"), ("tensor", "dropless", "ragged"),
    ("length", "dropless", "gather"), ("length", "capacity", "all_to_all"), ("length", "dropless", "ragged"),
    ("residual", "dropless", "ragged"), ("residual", "capacity", "gather")])
def test_experts_split_in_width_and_rows_in_length(split, dispatch, exchange):
  sizes, rules = SPLIT[split]
  changes = ROUTERS["sigmoid groups"]
  cfg = moe_config(**changes, dispatch=dispatch, exchange=exchange, rules=rules)
  close(run(cfg, weights(cfg, hot=1.0), *inputs(), make_mesh(**sizes)),
        on_one_device(tuple(changes.items()), 1.0))


def test_one_token_a_row_under_the_rules_of_decode():
  cfg = moe_config(rules=DECODE)
  values, (x, segment) = weights(cfg), inputs(shape=(B, 1))
  got, _ = run(cfg, values, x, segment, make_mesh(fsdp=2, expert=2, tensor=2), grads=False)
  close(got, reference(cfg, values, x, segment), 2e-5)


@pytest.mark.parametrize("dispatch, exchange", [("dropless", "ragged"), ("capacity", "all_to_all")])
def test_stages_of_a_pipeline(dispatch, exchange):
  """Two stages at once, each with its layer and its rows, as model.pipeline maps them; gradients too."""
  cfg = moe_config(dispatch=dispatch, exchange=exchange, router_bias=True)
  layers, rows = [weights(cfg, seed) for seed in (0, 1)], [inputs(seed) for seed in (0, 1)]
  mesh, rules = make_mesh(stage=2, data=2, expert=2), cfg.rules
  place = lambda *axes: jax.NamedSharding(mesh, rules("layers", *axes))
  put = lambda arrays, *axes: jax.device_put(np.stack(arrays), place(*axes))

  with jax.set_mesh(mesh):
    params = {path: put([layer[path][0] for layer in layers], *axes)
              for path, (_, axes) in layers[0].items()}
    x, segment = zip(*rows)
    x, segment = put(x, "batch", "length", None), put(segment, "batch", "length")

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(params, x):
      with staged():
        y, aux = jax.vmap(functools.partial(apply, cfg))(params, x, segment)
      return jnp.sin(y).sum() + (aux["sequence"] + (aux["prob_E"] ** 2).sum(-1) + aux["z"]).sum(), (y, aux)

    (_, out), grads = jax.tree.map(np.asarray, jax.jit(loss)(params, x))
  dense = moe_config(dispatch="dense", router_bias=True)
  for s in range(2):
    close(jax.tree.map(lambda a, s=s: a[s], (out, grads)), run(dense, layers[s], *rows[s]))


@pytest.mark.parametrize("seed", range(4))
def test_emulated_ragged_all_to_all(seed):
  """Device s sends send_sizes[d] rows from input_offsets[d] on to device d, at output_offsets[d]. There may
  be gaps, and what nobody writes stays."""
  rng, n, axes = np.random.default_rng(seed), 4, ("fsdp", "expert")
  sizes = rng.integers(0, 5, (n, n)) * (rng.random((n, n)) < 0.7)
  starts = np.cumsum(sizes + rng.integers(0, 2, (n, n)), axis=1) - sizes
  ats = np.argsort(rng.random((n, n)), axis=0) * 5  # Each receiver has its own order of senders.
  operand, output = (rng.normal(size=(n, 30, 3)).astype(np.float32) for _ in range(2))
  want = output.copy()
  for s, d in np.ndindex(n, n):
    want[d, ats[s, d]:ats[s, d] + sizes[s, d]] = operand[s, starts[s, d]:starts[s, d] + sizes[s, d]]
  mesh = make_mesh(data=2, fsdp=2, expert=2)
  with jax.set_mesh(mesh):
    f = jax.shard_map(lambda *a: emulated_ragged_all_to_all(*(x[0] for x in a), axis_name=axes)[None],
                      in_specs=(jax.P(axes),) * 6, out_specs=jax.P(axes))
    args = operand, output, starts, sizes, ats, sizes.T
    got = jax.jit(f)(*(jax.device_put(a, jax.NamedSharding(mesh, jax.P(axes))) for a in args))
  np.testing.assert_array_equal(got, want)


def test_a_tpu_gets_the_ragged_all_to_all_itself():
  mesh = abstract_mesh(expert=4)
  spec = jax.NamedSharding(mesh, jax.P("expert", None))
  f = jax.shard_map(lambda x, counts: shift(x, counts, 40, ("expert",)),
                    in_specs=(jax.P("expert", None), jax.P()), out_specs=jax.P("expert", None))
  both = lambda x, counts: jax.vjp(lambda x: f(x, counts), x)[1](jnp.ones((160, 5), out_sharding=spec.spec))
  args = (jax.ShapeDtypeStruct((40, 5), jnp.float32, sharding=spec),
          jax.ShapeDtypeStruct((4, 4), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P())))
  with jax.sharding.use_abstract_mesh(mesh):
    lower = lambda f, platform: jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    assert all("ragged_all_to_all" in lower(g, "tpu") and "ragged_all_to_all" not in lower(g, "cpu")
               for g in (f, both))


def test_collectives():
  """Rows travel twice each way; of the experts' gradients only what a device keeps is all-reduced."""
  cfg = moe_config(dispatch="capacity", exchange="all_to_all", capacity_factor=1.0, d_expert=40)
  mesh, (x, segment) = make_mesh(data=2, fsdp=2, expert=2), inputs()
  put = lambda a, *axes: jax.device_put(a, jax.NamedSharding(mesh, cfg.rules(*axes)))
  with jax.set_mesh(mesh):
    params = {path: put(value, *axes) for path, (value, axes) in weights(cfg).items()}
    loss = lambda params, x, segment: jnp.sin(apply(cfg, params, x, segment)[0]).sum()
    text = jax.jit(jax.grad(loss, (0, 1))).lower(
        params, put(x, "batch", "length", None), put(segment, "batch", "length")).compile().as_text()
  found = re.findall(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all)\(", text)
  elements = lambda kind: [math.prod(map(int, dims.split(","))) for shapes, name in found if name == kind
                           for dims in re.findall(r"\w\[([\d,]+)\]", shapes)]
  weight, room = E // 2 * D * 40, math.ceil(K * B * T / 8 / E)
  assert elements("all-gather") == [weight] * 3 and elements("reduce-scatter") == [weight // 2] * 3
  assert max(elements("all-reduce")) <= weight // 2
  assert sum(elements("all-to-all")) == 4 * E * room * D


@pytest.mark.parametrize("dispatch, factor", [("dropless", 1.0), ("capacity", 0.5)])
def test_forced_imbalance_has_the_numbers_of_the_closed_form(dispatch, factor):
  """Equal probabilities, and a bias by which all choose the same K experts."""
  cfg = moe_config(dispatch=dispatch, capacity_factor=factor, router_bias=True)
  values, (x, segment) = weights(cfg), inputs()
  values["w_router",] = (np.zeros((D, E), np.float32), (None, None))
  values["balance_bias",] = (np.where(np.isin(np.arange(E), [2, 5]), 1, 0).astype(np.float32), (None,))
  (_, aux), _ = run(cfg, values, x, segment, grads=False)
  n = (segment > 0).sum()
  room = math.ceil(factor * K * B * T / E)
  close(aux, {"load_E": np.where(np.isin(np.arange(E), [2, 5]), n, 0), "prob_E": np.full(E, n / E),
              "tokens": n, "z": n * math.log(E) ** 2, "entropy": n * math.log(E), "sequence": n,
              "dropped": K * (n - room) if dispatch == "capacity" else 0}, 1e-6)


def test_the_router_is_float32_and_the_rest_is_not():
  """In bf16 logits, two experts whose columns differ by 1e-4 of a logit would tie."""
  cfg = moe_config(precision="pure_bf16", n_experts_per_token=1, router_bias=True)
  state = nnx.to_pure_dict(nnx.state(FFN["moe"](cfg, rngs=nnx.Rngs(0))))
  assert {name for name, a in state.items() if a.dtype == jnp.float32} == {"w_router", "balance_bias"}
  values, (x, segment) = weights(cfg), inputs()
  router, bias = np.zeros((D, E), np.float32), np.zeros(E, np.float32)
  router[0] = 10.0 + 1e-4 * np.random.default_rng(0).permutation(E)
  values = {path: (a.astype(jnp.bfloat16), axes) for path, (a, axes) in values.items()}
  values |= {("w_router",): (router, (None, None)), ("balance_bias",): (bias, (None,))}
  (y, aux), _ = run(cfg, values, x.astype(jnp.bfloat16), segment, grads=False)
  assert y.dtype == jnp.bfloat16 and aux["load_E"][router[0].argmax()] == aux["tokens"]

"""Pipeline parallelism in one program: every stage computes at every iteration, on another micro-batch.

GPipe (arXiv:1811.06965) when each micro-batch visits a stage once; circular (arXiv:2104.04473, interleaved)
when it visits each stage `repeats` times, the layers dealt out in turns. The backward pass is JAX's of the
loop.
"""
import jax
import jax.numpy as jnp

from model.sharding import on_devices, staged


def iterations(n_stages: int, n_micro: int, repeats: int) -> int:
  """Of the loop: each stage is idle in n_stages - 1 of them (the bubble)."""
  return n_micro * repeats + n_stages - 1


def pipeline(stage_fn, params, x_BTD, others, *, n_stages: int, n_micro: int, repeats: int, rules):
  """Runs x through the layers that `params` stack.

  Stage s holds the chunks of layers s, s + p, s + 2p, ... of p stages. At iteration t it works on item t - s;
  item w is the visit w // m of micro-batch w % m. What leaves the last stage comes back to stage 0, which
  keeps it for the next visit; hence m >= p when there are several.

  Args:
    stage_fn: (layers, x_bTD, *others) -> (x_bTD, aux), aux a tree of arrays that lead with the layers.
    params: a tree of arrays that lead with [layers], or [repeats, layers] where repeats > 1, split over
      "layers".
    others: arrays [B, T, ...] that travel with x: positions, segments.

  Returns:
    (x_BTD, aux summed over the micro-batches, leading with all layers).
  """
  p, m, v = n_stages, n_micro, repeats
  stage_P = jax.sharding.reshard(jnp.arange(p), rules("layers"))
  chunks = jax.tree.map(lambda a: _by_stage(a, p, v), params)
  micro = [_split(a, m) for a in (x_BTD, *others)]
  # Each stage has a buffer of all micro-batches; only that of stage 0 is ever read.
  buffer = jax.tree.map(lambda a: jnp.where(_like(stage_P == 0, a.ndim + 1), a[None], 0), micro[0])
  zeros = lambda a: jnp.zeros((p, *a.shape[1:]), a.dtype,
                              out_sharding=jax.P(*rules("layers"), *jax.typeof(a).sharding.spec[1:]))
  current = [zeros(a) for a in micro]

  def iteration(carry, t):
    current, buffer, total = carry
    x, *rest = current
    take = lambda a, axis: jax.lax.dynamic_index_in_dim(a, t % m, axis, keepdims=False)
    fresh = [take(buffer, 1), *(take(a, 0)[None] for a in micro[1:])]
    current = [jnp.where(_like(stage_P == 0, a.ndim), new, a) for new, a in zip(fresh, (x, *rest))]
    item_P = t - stage_P
    visit_P = jnp.clip(item_P // m, 0, v - 1)
    layers = _choose(chunks, visit_P, v, rules)
    with staged():
      x, aux = jax.vmap(stage_fn)(layers, *current)
    real_P = (item_P >= 0) & (item_P < m * v)
    total = jax.tree.map(lambda a, new: a + _at_visit(new, visit_P, real_P, v), total, aux)
    current = [_shift(a, p) for a in (x, *current[1:])]
    done = t - (p - 1)  # The item that has just come back to stage 0.
    update = jax.lax.dynamic_update_index_in_dim(buffer, current[0], done % m, 1)
    return (current, jnp.where(done >= 0, update, buffer), total), None

  with staged():
    shapes = jax.eval_shape(lambda layers, x: jax.vmap(stage_fn)(layers, *x)[1],
                            jax.tree.map(lambda a: a[:, 0], chunks), current)
  total = jax.tree.map(
      lambda a: jnp.zeros((p, v, *a.shape[1:]), a.dtype, out_sharding=rules("layers")), shapes)
  (_, buffer, total), _ = jax.lax.scan(iteration, (current, buffer, total), jnp.arange(iterations(p, m, v)))
  out = jnp.where(_like(stage_P == 0, buffer.ndim), buffer, 0).sum(0)
  return _join(out), jax.tree.map(_all_layers, total)


def _by_stage(a, p, v):
  """[layers, ...] or [v, layers / v, ...] -> [p, v, layers / (p v), ...], without moving anything."""
  *rest, = jax.typeof(a).sharding.spec[1 if v == 1 else 2:]
  stages = jax.typeof(a).sharding.spec[0 if v == 1 else 1]
  shape = a.shape[1:] if v == 1 else a.shape[2:]
  a = a.reshape(v, p, -1, *shape, out_sharding=jax.P(None, stages, None, *rest))
  return jnp.swapaxes(a, 0, 1)


def _choose(chunks, visit_P, v, rules):
  """Of each stage, the chunk of its present visit: [p, v, layers, ...] -> [p, layers, ...]."""
  if v == 1:
    return jax.tree.map(lambda a: a[:, 0], chunks)

  def one(a):
    spec = jax.typeof(a).sharding.spec
    pick = lambda a, visit_p: jax.lax.dynamic_index_in_dim(a, visit_p[0], 1, keepdims=False)
    return on_devices(pick, (spec, rules("layers")), jax.P(spec[0], *spec[2:]))(a, visit_P)

  return jax.tree.map(one, chunks)


def _at_visit(aux, visit_P, real_P, v):
  """[p, layers, ...] -> [p, v, layers, ...], zero but at the visit that it is of, if it is of any."""
  here_Pv = (visit_P[:, None] == jnp.arange(v)[None]) & real_P[:, None]
  return jnp.where(_like(here_Pv, aux.ndim + 1), aux[:, None], 0)


def _all_layers(total):
  """[p, v, layers, ...] -> [v p layers, ...], the order of the layers, on every device."""
  total = jax.sharding.reshard(total, jax.P())
  return jnp.swapaxes(total, 0, 1).reshape(-1, *total.shape[3:])


def _shift(a, p):
  """What stage s made goes to stage s + 1, that of the last to stage 0."""
  spec = jax.typeof(a).sharding.spec
  send = lambda a: jax.lax.ppermute(a, spec[0], [(s, (s + 1) % p) for s in range(p)])
  return on_devices(send, (spec,), spec)(a)


def _split(a, m):
  """[B, T, ...] -> [m, B / m, T, ...]: rows i, i + m, ... make a micro-batch, so every device takes part."""
  spec = jax.typeof(a).sharding.spec
  return jnp.swapaxes(a.reshape(-1, m, *a.shape[1:], out_sharding=jax.P(spec[0], None, *spec[1:])), 0, 1)


def _join(a):
  a = jnp.swapaxes(a, 0, 1)
  spec = jax.typeof(a).sharding.spec
  return a.reshape(-1, *a.shape[2:], out_sharding=jax.P(spec[0], *spec[2:]))


def _like(a, ndim):
  return a.reshape(*a.shape, *[1] * (ndim - a.ndim), out_sharding=jax.P(*jax.typeof(a).sharding.spec))

"""How attention reaches the keys of a row whose length is split over devices.

Each function of CONTEXT runs on every device inside shard_map. Shapes: b rows, t tokens, N query and K kv
heads of this device, H head dim; in the ring, C leads where t is cut into chunks; P devices share a row.
Queries and keys of one segment must be as far apart in position as they are in the row.
"""
import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np

from model.kernels.attention import (
    Mask,
    blockwise,
    blockwise_gradient,
    chunked,
    join_heads,
    row_delta,
    split_heads,
)
from model.kernels.platform import AUTO


def gather(axes, kernel, q_btNH, k_btKH, v_btKH, pos_bt, segment_bt, window, *, scale, cap):
  """Every device gets all keys and values: simple, and the memory of whole rows. Any kernel, any order."""
  k_bTKH, v_bTKH, pos_bT, segment_bT = jax.lax.all_gather(
      (k_btKH, v_btKH, pos_bt, segment_bt), axes, axis=1, tiled=True)
  mask = Mask(pos_bt, segment_bt, pos_bT, segment_bT, window, aligned=False)
  return kernel(q_btNH, k_bTKH, v_bTKH, mask, scale=scale, cap=cap)


def ulysses(axes, kernel, q_btNH, k_btKH, v_btKH, pos_bt, segment_bt, window, *, scale, cap):
  """Exchanges length for heads: whole rows of N / P heads, and back (arXiv:2309.14509). Any kernel.

  Of kv heads each device gets those of its query heads, which repeats them where P does not divide K.
  """
  ways, K = jax.lax.axis_size(axes), k_btKH.shape[2]
  k_btKH, v_btKH = (jnp.repeat(x, math.lcm(K, ways) // K, axis=2) for x in (k_btKH, v_btKH))
  q_bTnH, k_bTkH, v_bTkH = (jax.lax.all_to_all(x, axes, 2, 1, tiled=True) for x in (q_btNH, k_btKH, v_btKH))
  pos_bT, segment_bT = jax.lax.all_gather((pos_bt, segment_bt), axes, axis=1, tiled=True)
  mask = Mask(pos_bT, segment_bT, pos_bT, segment_bT, window, aligned=True)
  out_bTnH = kernel(q_bTnH, k_bTkH, v_bTkH, mask, scale=scale, cap=cap)
  return jax.lax.all_to_all(out_bTnH, axes, 1, 2, tiled=True)


def ring(axes, kernel, q_btNH, k_btKH, v_btKH, pos_bt, segment_bt, window, *, scale, cap, chunks=1):
  """Keys and values go round, each device merging what its queries see of them (arXiv:2310.01889): the memory
  of t tokens, in both directions.

  Made of the blocks of `chunked`, which must be the kernel. What causality hides is not computed, so that the
  last device works longest: see `zigzag`.
  """
  assert kernel is chunked, kernel
  how = _Ring(axes, chunks, window, scale, cap)
  return join_heads(_ring(how, *split_heads(q_btNH, k_btKH, v_btKH), pos_bt, segment_bt))


def zigzag(*args, **settings):
  """The ring where device i holds the chunks i and 2P - 1 - i of 2P (`zigzag_order`; the split of
  arXiv:2407.21783): all have as much to compute, at every step."""
  return ring(*args, **settings, chunks=2)


CONTEXT = {"gather": gather, "ring": ring, "zigzag": zigzag, "ulysses": ulysses}


def zigzag_order(T: int, ways: int) -> np.ndarray:
  """The row indices, so ordered that an even split gives every device its two chunks."""
  chunks = np.arange(T).reshape(2 * ways, -1)
  return np.stack([chunks[:ways], chunks[ways:][::-1]], axis=1).reshape(-1)


def check_context(cfg, *, ways: int, heads_ways: int, seq_len: int | None):
  """
  Args:
    ways, heads_ways: over how many devices the length and the heads are split.

  Raises:
    ValueError: cfg.context cannot do that, with the names, the values and the nearest valid choice.
  """
  if ways == 1:
    return
  if cfg.context in ("ring", "zigzag") and cfg.attention_impl not in (AUTO, "chunked"):
    raise ValueError(f"model.context={cfg.context!r} is made of the blocks of 'chunked', not of "
                     f"model.attention_impl={cfg.attention_impl!r}; nearest valid: model.attention_impl="
                     "'chunked', or model.context='gather'")
  if cfg.context == "gather" and cfg.attention_impl == "splash":
    raise ValueError(f"model.context='gather' has more keys than queries, and model.attention_impl="
                     f"{cfg.attention_impl!r} needs whole rows of both; nearest valid: "
                     "model.context='ulysses', or model.attention_impl='chunked'")
  heads = cfg.n_heads // heads_ways
  if cfg.context == "ulysses" and heads % ways:
    raise ValueError(f"model.context='ulysses' deals the {heads} heads that a device has of model.n_heads="
                     f"{cfg.n_heads} to the {ways} devices of a row, which must divide them; nearest valid: "
                     f"a row over {math.gcd(heads, ways)}, or model.n_heads="
                     f"{_nearest(cfg.n_heads, ways * heads_ways)}")
  if cfg.context == "zigzag" and seq_len is not None and seq_len % (2 * ways):
    raise ValueError(f"model.context='zigzag' cuts a row into {2 * ways} equal chunks, two for each of "
                     f"{ways} devices, which seq_len={seq_len} is not a multiple of; nearest valid seq_len: "
                     f"{_nearest(seq_len, 2 * ways)}")


def _nearest(value, step):
  low = value // step * step
  return ", ".join(str(v) for v in (low, low + step) if v)


def work(ways: int, size: int, chunks: int, window: int | None) -> np.ndarray:
  """int [device, step]: the query-key pairs that each device of a ring computes at each step, where it holds
  `chunks` of `size` tokens."""
  rank, step = np.indices((ways, ways))
  pairs = np.zeros((ways, ways), np.int64)
  for query in _held(rank, ways, chunks):
    for key in _held((rank - step) % ways, ways, chunks):
      pairs += _sees(query, key, size, window) * np.where(query == key, size * (size + 1) // 2, size**2)
  return pairs


def _held(rank, ways, chunks):
  """Which of the row's chunks a device holds."""
  return (rank, 2 * ways - 1 - rank)[:chunks]


def _sees(query, key, size, window):
  """Whether any query of one chunk may see any key of another; of numbers or arrays."""
  causal = key <= query
  return causal if window is None else causal & ((query - key - 1) * size + 1 < window)


class _Ring(typing.NamedTuple):
  axes: tuple[str, ...]
  chunks: int
  window: int | None
  scale: float
  cap: float | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(how, q_bKGtH, k_bKtH, v_bKtH, pos_bt, segment_bt):
  return _ring_forward(how, q_bKGtH, k_bKtH, v_bKtH, pos_bt, segment_bt)[0]


def _ring_forward(how, q_bKGtH, k_bKtH, v_bKtH, pos_bt, segment_bt):
  own = Mask(pos_bt, segment_bt, pos_bt, segment_bt, how.window, aligned=True)  # Its chunks ascend.
  state_C = _cut(how, blockwise(how.scale, how.cap, q_bKGtH, k_bKtH, v_bKtH, own), (3, 3))
  queries_C = _cut(how, (q_bKGtH, pos_bt, segment_bt), (3, 1, 1))
  keys_C = _cut(how, (k_bKtH, v_bKtH, pos_bt, segment_bt), (2, 2, 1, 1))

  def visit(step, state_C, keys_C):
    def pair(n, m, state_C):
      (q, *places), (k, v, *theirs), (out, lse) = _at(queries_C, n), _at(keys_C, m), _at(state_C, n)
      mask = Mask(*places, *theirs, how.window, aligned=False)
      more, more_lse = blockwise(how.scale, how.cap, q, k, v, mask)
      both = jnp.logaddexp(lse, more_lse)
      out = out * jnp.exp(lse - both)[..., None] + more * jnp.exp(more_lse - both)[..., None]
      return _put(state_C, n, (out, both))

    return _visible_pairs(how, step, pair, state_C, keys_C)

  out_bKGtH, lse_bKGt = _join(_travel(how, visit, state_C, keys_C)[0], (3, 3))
  out_bKGtH = out_bKGtH.astype(q_bKGtH.dtype)
  return out_bKGtH, (q_bKGtH, k_bKtH, v_bKtH, pos_bt, segment_bt, out_bKGtH, lse_bKGt)


def _ring_backward(how, saved, dout_bKGtH):
  """Keys and values go round again, and their gradients with them. A device computes its part of these while
  the sum of the others' arrives."""
  q_bKGtH, k_bKtH, v_bKtH, pos_bt, segment_bt, out_bKGtH, lse_bKGt = saved
  own = Mask(pos_bt, segment_bt, pos_bt, segment_bt, how.window, aligned=True)
  delta_bKGt = row_delta(out_bKGtH, dout_bKGtH)
  gradient = functools.partial(blockwise_gradient, how.scale, how.cap)
  dq, dk, dv = gradient(q_bKGtH, k_bKtH, v_bKtH, own, lse_bKGt, delta_bKGt, dout_bKGtH)
  queries_C = _cut(how, (q_bKGtH, lse_bKGt, delta_bKGt, dout_bKGtH, pos_bt, segment_bt), (3, 3, 3, 3, 1, 1))
  keys_C = _cut(how, (k_bKtH, v_bKtH, pos_bt, segment_bt), (2, 2, 1, 1))
  grads_C = _cut(how, (dq, dk, dv), (3, 2, 2))

  def visit(step, grads_C, keys_C):
    def pair(n, m, grads_C):
      (q, lse, delta, dout, *places), (k, v, *theirs) = _at(queries_C, n), _at(keys_C, m)
      mask = Mask(*places, *theirs, how.window, aligned=False)
      dq, *dkv = gradient(q, k, v, mask, lse, delta, dout)
      dq_C, *dkv_C = grads_C
      return _put(dq_C, n, _at(dq_C, n) + dq), *_put(dkv_C, m, jax.tree.map(jnp.add, _at(dkv_C, m), dkv))

    dq_C, *dkv_C = grads_C
    arriving_C = _rotate(how, dkv_C, 1)
    dq_C, *dkv_C = _visible_pairs(how, step, pair, (dq_C, *jax.tree.map(jnp.zeros_like, dkv_C)), keys_C)
    return dq_C, *jax.tree.map(jnp.add, arriving_C, dkv_C)

  (dq_C, *dkv_C), hops = _travel(how, visit, grads_C, keys_C)
  grads = _join((dq_C, *_rotate(how, dkv_C, -hops)), (3, 2, 2))
  return *(g.astype(x.dtype) for g, x in zip(grads, saved)), None, None


_ring.defvjp(_ring_forward, _ring_backward)


def _travel(how, visit, state, keys_C):
  """(state after visit(step, state, keys_C) of the keys from `step` devices back, up to the last step at
  which any device sees any; that step). The next keys are on their way during a visit."""
  ways, size = jax.lax.axis_size(how.axes), keys_C[0].shape[3]
  last = int(np.flatnonzero(work(ways, size, how.chunks, how.window).sum(0))[-1])
  if last == 0:
    return state, 0
  keys_C = _rotate(how, keys_C, 1)

  def step(carry, step):
    state, keys_C = carry
    return (visit(step, state, keys_C), _rotate(how, keys_C, 1)), None

  if last > 1:
    (state, keys_C), _ = jax.lax.scan(step, (state, keys_C), jnp.arange(1, last))
  return visit(jnp.int32(last), state, keys_C), last


def _visible_pairs(how, step, pair, state, keys_C):
  """pair(n, m, state) for those of this device's chunks n and the visiting chunks m where n may see m.

  The predicate has nothing that a vmap over stages batches: what is hidden is skipped there too.
  """
  C, ways, rank = how.chunks, jax.lax.axis_size(how.axes), jax.lax.axis_index(how.axes)
  queries, keys = (jnp.stack(_held(r, ways, C)) for r in (rank, (rank - step) % ways))
  size = keys_C[0].shape[3]

  def one(state, nm):
    n, m = nm
    seen = _sees(queries[n], keys[m], size, how.window)
    return jax.lax.cond(seen, pair, lambda n, m, state: state, n, m, state), None

  return jax.lax.scan(one, state, tuple(jnp.indices((C, C)).reshape(2, -1)))[0]


def _rotate(how, tree, hops):
  """What device i holds goes to device i + hops, around."""
  ways = jax.lax.axis_size(how.axes)
  if hops % ways == 0:
    return tree
  return jax.lax.ppermute(tree, how.axes, [(i, (i + hops) % ways) for i in range(ways)])


def _cut(how, arrays, dims):
  """The dim of each array that is t -> [C, ..., t / C, ...]."""
  cut = lambda a, dim: a.reshape(*a.shape[:dim], how.chunks, -1, *a.shape[dim + 1:])
  return tuple(jnp.moveaxis(cut(a, dim), dim, 0) for a, dim in zip(arrays, dims))


def _join(arrays, dims):
  whole = lambda a, dim: jnp.moveaxis(a, 0, dim).reshape(*a.shape[1:dim + 1], -1, *a.shape[dim + 2:])
  return tuple(whole(a, dim) for a, dim in zip(arrays, dims))


def _at(tree, n):
  return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, n, 0, keepdims=False), tree)


def _put(tree, n, new):
  return jax.tree.map(lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new, n, 0), tree, new)

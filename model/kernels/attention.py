"""softmax(Q K^T) V by name. Each kernel sees one device's batch rows and heads.

Shapes: B batch, T queries, S keys, N query heads, K kv heads, G = N / K, H head dim. A kernel is a function
(q_BTNH, k_BSKH, v_BSKH, mask, *, scale, cap) -> out_BTNH; a name "module:function" in the config adds
another. The H of values, and so of the result, may be another than that of queries and keys.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp

from model.kernels.splash import splash
from model.layers import softcap

HIDDEN = -1e30  # Finite: exp(HIDDEN - max) is exactly 0, and a row with nothing to see stays a number.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """Which keys a query sees: of its own segment, at or before it, and within the window."""
  pos_BT: jax.Array
  segment_BT: jax.Array
  pos_BS: jax.Array
  segment_BS: jax.Array
  window: int | None = dataclasses.field(metadata=dict(static=True))
  # The keys are the queries' own sequence in the same order, so what stands later is never seen.
  aligned: bool = dataclasses.field(metadata=dict(static=True))

  def visible(self) -> jax.Array:
    """bool [B, T, S]."""
    distance_BTS = self.pos_BT[:, :, None] - self.pos_BS[:, None, :]
    visible_BTS = (self.segment_BT[:, :, None] == self.segment_BS[:, None, :]) & (distance_BTS >= 0)
    return visible_BTS if self.window is None else visible_BTS & (distance_BTS < self.window)

  def block(self, queries: slice, keys: slice) -> "Mask":
    return dataclasses.replace(self, pos_BT=self.pos_BT[:, queries], segment_BT=self.segment_BT[:, queries],
                               pos_BS=self.pos_BS[:, keys], segment_BS=self.segment_BS[:, keys])


def logits(q_BTNH, k_BSKH, mask, *, scale, cap):
  """float32 [B, K, G, T, S], HIDDEN where the mask says so."""
  B, T, N, H = q_BTNH.shape
  q_BTKGH = q_BTNH.reshape(B, T, k_BSKH.shape[2], -1, H)
  logits_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  return jnp.where(mask.visible()[:, None, None], softcap(logits_BKGTS * scale, cap), HIDDEN)


def plain(q_BTNH, k_BSKH, v_BSKH, mask, *, scale, cap):
  """The definition, in float32: what the others are tested against."""
  probs_BKGTS = jax.nn.softmax(
      logits(q_BTNH, k_BSKH, mask, scale=scale, cap=cap), axis=-1).astype(v_BSKH.dtype)
  return jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH).reshape(*q_BTNH.shape[:3], -1)


def dot_product(q_BTNH, k_BSKH, v_BSKH, mask, *, scale, cap):
  """JAX's own. It has no soft cap: `check_names` refuses the pair."""
  assert cap is None
  if v_BSKH.shape[-1] != k_BSKH.shape[-1]:  # It has one width for all.
    return _as_wide(dot_product, q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, cap=cap)
  return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask.visible()[:, None], scale=scale)


def _as_wide(kernel, q_BTNH, k_BSKH, v_BSKH, *args, **settings):
  """The kernel, whose arrays must be equally wide, on narrower values or narrower queries and keys: zeros
  fill them up."""
  width = max(k_BSKH.shape[-1], v_BSKH.shape[-1])
  fill = lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),))
  return kernel(fill(q_BTNH), fill(k_BSKH), fill(v_BSKH), *args, **settings)[..., :v_BSKH.shape[-1]]


def chunked(q_BTNH, k_BSKH, v_BSKH, mask, *, scale, cap):
  """Online softmax over blocks (arXiv:2112.05682, arXiv:2205.14135): no [T, S] array exists, in either
  direction.

  Blocks that causality or the window hides from all their queries are never computed, which at long T saves
  half.
  """
  q_BKGTH, k_BKSH, v_BKSH = split_heads(q_BTNH, k_BSKH, v_BSKH)
  return join_heads(_chunked(scale, cap, q_BKGTH, k_BKSH, v_BKSH, mask))


def split_heads(q_BTNH, k_BSKH, v_BSKH):
  """As `blockwise` takes them: q_BKGTH, k_BKSH, v_BKSH."""
  B, T, _, H = q_BTNH.shape
  q_BKGTH = jnp.einsum("BTKGH->BKGTH", q_BTNH.reshape(B, T, k_BSKH.shape[2], -1, H))
  return q_BKGTH, *(jnp.einsum("BSKH->BKSH", x) for x in (k_BSKH, v_BSKH))


def join_heads(out_BKGTH):
  B, K, G, T, H = out_BKGTH.shape
  return jnp.einsum("BKGTH->BTKGH", out_BKGTH).reshape(B, T, K * G, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(scale, cap, q_BKGTH, k_BKSH, v_BKSH, mask):
  return _chunked_forward(scale, cap, q_BKGTH, k_BKSH, v_BKSH, mask)[0]


def _chunked_forward(scale, cap, q_BKGTH, k_BKSH, v_BKSH, mask):
  out_BKGTH, lse_BKGT = blockwise(scale, cap, q_BKGTH, k_BKSH, v_BKSH, mask)
  out_BKGTH = out_BKGTH.astype(q_BKGTH.dtype)
  return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, mask, out_BKGTH, lse_BKGT)


def _chunked_backward(scale, cap, saved, dout_BKGTH):
  q_BKGTH, k_BKSH, v_BKSH, mask, out_BKGTH, lse_BKGT = saved
  delta_BKGT = row_delta(out_BKGTH, dout_BKGTH)
  grads = blockwise_gradient(scale, cap, q_BKGTH, k_BKSH, v_BKSH, mask, lse_BKGT, delta_BKGT, dout_BKGTH)
  return *(g.astype(x.dtype) for g, x in zip(grads, (q_BKGTH, k_BKSH, v_BKSH))), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def blockwise(scale, cap, q_BKGTH, k_BKSH, v_BKSH, mask):
  """Attention to these keys alone, in float32.

  Returns:
    (out_BKGTH, lse_BKGT): lse is the logarithm of each row's normaliser, by which parts over different keys
    are merged (model.context).
  """
  out, lse = [], []
  for rows, key_blocks in _blocks(q_BKGTH.shape[3], k_BKSH.shape[2], mask):
    top_BKGT, total_BKGT, out_BKGTH = HIDDEN, 0.0, 0.0
    for keys in key_blocks:
      logits_BKGTS = _block_logits(scale, cap, q_BKGTH, k_BKSH, mask, rows, keys)
      new_BKGT = jnp.maximum(top_BKGT, logits_BKGTS.max(-1))
      weight_BKGTS = jnp.exp(logits_BKGTS - new_BKGT[..., None])
      shrink_BKGT = jnp.exp(top_BKGT - new_BKGT)
      value_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weight_BKGTS.astype(v_BKSH.dtype), v_BKSH[:, :, keys],
                               preferred_element_type=jnp.float32)
      top_BKGT, total_BKGT = new_BKGT, total_BKGT * shrink_BKGT + weight_BKGTS.sum(-1)
      out_BKGTH = out_BKGTH * shrink_BKGT[..., None] + value_BKGTH
    out.append(out_BKGTH / total_BKGT[..., None])
    lse.append(top_BKGT + jnp.log(total_BKGT))
  return jnp.concatenate(out, axis=3), jnp.concatenate(lse, axis=3)


def row_delta(out_BKGTH, dout_BKGTH):
  """sum_s weight_s dweight_s of each query, over all its keys."""
  return jnp.einsum("BKGTH,BKGTH->BKGT", out_BKGTH, dout_BKGTH, preferred_element_type=jnp.float32)


def blockwise_gradient(scale, cap, q_BKGTH, k_BKSH, v_BKSH, mask, lse_BKGT, delta_BKGT, dout_BKGTH):
  """What these keys are to the gradient of attention to perhaps more, whose normaliser and `row_delta` are
  given: the weights of each block are made again from them (algorithm 4 of arXiv:2205.14135).

  Returns:
    (dq_BKGTH, dk_BKSH, dv_BKSH) in float32.
  """
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  dq, dk_BKSH, dv_BKSH = [], jnp.zeros(k_BKSH.shape, jnp.float32), jnp.zeros(v_BKSH.shape, jnp.float32)
  for rows, key_blocks in _blocks(q_BKGTH.shape[3], k_BKSH.shape[2], mask):
    dout, q, total = dout_BKGTH[..., rows, :], q_BKGTH[..., rows, :], 0.0
    for keys in key_blocks:
      logits_BKGTS = _block_logits(scale, cap, q_BKGTH, k_BKSH, mask, rows, keys)
      weight_BKGTS = jnp.exp(logits_BKGTS - lse_BKGT[..., rows, None])
      dweight_BKGTS = dot("BKGTH,BKSH->BKGTS", dout, v_BKSH[:, :, keys])
      dlogits_BKGTS = weight_BKGTS * (dweight_BKGTS - delta_BKGT[..., rows, None]) * scale
      if cap is not None:  # Where the weight is 0 the logit may be HIDDEN, and its square infinite.
        dlogits_BKGTS *= 1 - (jnp.maximum(logits_BKGTS, -cap) / cap) ** 2
      dlogits_BKGTS = dlogits_BKGTS.astype(q.dtype)
      dv_BKSH = dv_BKSH.at[:, :, keys].add(dot("BKGTS,BKGTH->BKSH", weight_BKGTS.astype(dout.dtype), dout))
      dk_BKSH = dk_BKSH.at[:, :, keys].add(dot("BKGTS,BKGTH->BKSH", dlogits_BKGTS, q))
      total = total + dot("BKGTS,BKSH->BKGTH", dlogits_BKGTS, k_BKSH[:, :, keys])
    dq.append(total)
  return jnp.concatenate(dq, axis=3), dk_BKSH, dv_BKSH


def _blocks(T, S, mask):
  """(queries, [keys, ...]) of each block of queries: the blocks of keys that may hold one that it sees."""
  size = max(128, -(-T // 16))  # At most 16 blocks of queries: they are unrolled.
  wide = max(512, size)  # Of keys: a wider block rescales less often.
  for start in range(0, T, size):
    first, stop = 0, S
    if mask.aligned:
      stop = min(start + size, T)
      first = 0 if mask.window is None else max(0, start + 1 - mask.window) // size * size
    yield (slice(start, min(start + size, T)),
           [slice(s, min(s + wide, stop)) for s in range(first, stop, wide)])


def _block_logits(scale, cap, q_BKGTH, k_BKSH, mask, rows, keys):
  logits_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH[..., rows, :], k_BKSH[:, :, keys],
                            preferred_element_type=jnp.float32)
  visible_BTS = mask.block(rows, keys).visible()
  return jnp.where(visible_BTS[:, None, None], softcap(logits_BKGTS * scale, cap), HIDDEN)


KERNEL = {"plain": plain, "dot_product": dot_product, "chunked": chunked, "splash": splash}

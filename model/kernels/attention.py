"""softmax(Q K^T) V by name. Each kernel sees one device's batch rows and heads.

Shapes: B batch, T queries, S keys, N query heads, K kv heads, G = N / K, H head dim. A kernel is a function
(q_BTNH, k_BSKH, v_BSKH, mask, *, scale, cap) -> out_BTNH; a name "module:function" in the config adds another.
"""
import dataclasses

import jax
import jax.numpy as jnp

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
  probs_BKGTS = jax.nn.softmax(logits(q_BTNH, k_BSKH, mask, scale=scale, cap=cap), axis=-1).astype(v_BSKH.dtype)
  return jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH).reshape(q_BTNH.shape)


def dot_product(q_BTNH, k_BSKH, v_BSKH, mask, *, scale, cap):
  """JAX's own. It has no soft cap: `check_names` refuses the pair."""
  assert cap is None
  return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask.visible()[:, None], scale=scale)


def chunked(q_BTNH, k_BSKH, v_BSKH, mask, *, scale, cap):
  """Online softmax over blocks (arXiv:2112.05682, arXiv:2205.14135): no [T, S] array exists, in either direction.

  Blocks that causality or the window hides from all their queries are never computed, which at long T saves half.
  """
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  size = max(128, -(-T // 16))  # At most 16 blocks of queries: they are unrolled.
  out = []
  for start in range(0, T, size):
    rows = slice(start, min(start + size, T))
    first, stop = 0, S
    if mask.aligned:
      stop = rows.stop
      first = 0 if mask.window is None else max(0, start + 1 - mask.window) // size * size
    out.append(_one_block(q_BTNH[:, rows], k_BSKH[:, first:stop], v_BSKH[:, first:stop],
                          mask.block(rows, slice(first, stop)), size, scale=scale, cap=cap))
  return jnp.concatenate(out, axis=1)


def _one_block(q_BTNH, k_BSKH, v_BSKH, mask, size, *, scale, cap):
  """All blocks of keys for one block of queries, with the running maximum and normaliser of each row."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]

  @jax.checkpoint
  def add(carry, q_BTNH, k_BSKH, v_BSKH, mask):
    top_BKGT, total_BKGT, out_BKGTH = carry
    logits_BKGTS = logits(q_BTNH, k_BSKH, mask, scale=scale, cap=cap)
    new_BKGT = jnp.maximum(top_BKGT, logits_BKGTS.max(-1))
    weight_BKGTS = jnp.exp(logits_BKGTS - new_BKGT[..., None])
    shrink_BKGT = jnp.exp(top_BKGT - new_BKGT)
    value_BKGTH = jnp.einsum("BKGTS,BSKH->BKGTH", weight_BKGTS.astype(v_BSKH.dtype), v_BSKH,
                             preferred_element_type=jnp.float32)
    return new_BKGT, total_BKGT * shrink_BKGT + weight_BKGTS.sum(-1), out_BKGTH * shrink_BKGT[..., None] + value_BKGTH

  zeros_BKGTH = jnp.zeros((B, K, N // K, T, H), jnp.float32)
  carry = (jnp.full(zeros_BKGTH.shape[:-1], HIDDEN), jnp.zeros(zeros_BKGTH.shape[:-1]), zeros_BKGTH)
  for start in range(0, k_BSKH.shape[1], size):
    keys = slice(start, start + size)
    carry = add(carry, q_BTNH, k_BSKH[:, keys], v_BSKH[:, keys], mask.block(slice(None), keys))
  _, total_BKGT, out_BKGTH = carry
  out_BKGTH = out_BKGTH / total_BKGT[..., None]
  return jnp.einsum("BKGTH->BTKGH", out_BKGTH).reshape(q_BTNH.shape).astype(q_BTNH.dtype)


KERNEL = {"plain": plain, "dot_product": dot_product, "chunked": chunked}

"""Attention of many sequences to keys and values that lie in pages, as decode reads them.

Shapes: T tokens: one of each of the first R sequences, the others of one more (a chunk of its prompt);
L pages a sequence may have; P pages there are, of A tokens; N query and K kv heads, H head dim.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp

from model.kernels.attention import HIDDEN
from model.kernels.platform import platform
from model.layers import softcap

BLOCK = 128  # Tokens of each sequence that are looked at together, where there is no kernel.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Where:
  """Where the tokens of a step stand. Without a chunk the last sequence has no token.

  A sequence without a request has position 0 and page 0, which nobody reads.
  """
  pos_T: jax.Array
  page_ML: jax.Array  # M = R + 1 sequences: which pages, in order.
  n_chunk: jax.Array  # int32 scalar: the chunk's tokens; those after them are padding.

  @property
  def n_rows(self) -> int:
    return self.page_ML.shape[0] - 1

  def slots(self, page_size: int):
    """(page_T, offset_T) of each token; what pads the chunk goes to page 0."""
    T, R = self.pos_T.shape[0], self.n_rows
    sequence_T = jnp.minimum(jnp.arange(T), R)
    page_T = self.page_ML[sequence_T, self.pos_T // page_size]
    return jnp.where(jnp.arange(T) < R + self.n_chunk, page_T, 0), self.pos_T % page_size


def paged(q_TNH, read, where: Where, kv_PAKH=None, *, window, scale, cap):
  """Each token attends to its sequence's, up to itself; theirs and its own are in the pages already.

  On TPU by JAX's Pallas kernel (jax.experimental.pallas.ops.tpu.ragged_paged_attention), where the pages are
  as that has them; elsewhere block by block, with an online softmax (arXiv:2205.14135). There, what the
  longest sequence of the step has more than another changes no bit of that one: its blocks weigh exactly 0.

  Args:
    read: pages [B, n] -> (k_BSKH, v_BSKH), what lies in them.
    kv_PAKH: [P, A, 2 K, H], the key of each kv head before its value; None: not as the kernel has them.

  Returns:
    out_TNH; of padding and of sequences without a request, anything but NaN.
  """
  R, T = where.n_rows, q_TNH.shape[0]
  if platform() == "tpu" and kv_PAKH is not None:
    return _by_kernel(q_TNH, kv_PAKH, where, window=window, scale=scale, cap=cap)
  attend = functools.partial(by_blocks, read=read, window=window, scale=scale, cap=cap)
  rows = attend(q_TNH[:R, None], page_BL=where.page_ML[:R], pos_BT=where.pos_T[:R, None])[:, 0]
  if T == R:
    return rows
  pos_1T = jnp.where(jnp.arange(T - R) < where.n_chunk, where.pos_T[R:], 0)[None]
  return jnp.concatenate([rows, attend(q_TNH[None, R:], page_BL=where.page_ML[R:], pos_BT=pos_1T)[0]])


def _by_kernel(q_TNH, kv_PAKH, where, *, window, scale, cap):
  from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
  R, L = where.n_rows, where.page_ML.shape[1]
  has_chunk = q_TNH.shape[0] > R
  start_M = jnp.concatenate([jnp.arange(R + 1), (R + where.n_chunk)[None]])
  last_M = jnp.concatenate([where.pos_T[:R], where.pos_T[R:R + 1] + where.n_chunk - 1]) if has_chunk else (
    jnp.concatenate([where.pos_T, jnp.zeros((1,), where.pos_T.dtype)]))
  n_sequences = R + (where.n_chunk > 0) if has_chunk else jnp.int32(R)
  # Blocks are said: the kernel would look for those of the chip of this process, which may be none.
  return ragged_paged_attention(
      q_TNH, kv_PAKH, last_M + 1, where.page_ML, start_M.astype(jnp.int32),
      n_sequences.astype(jnp.int32)[None], sm_scale=scale, sliding_window=window, soft_cap=cap,
      num_kv_pages_per_block=min(L, max(1, 512 // kv_PAKH.shape[1])),
      num_queries_per_block=min(q_TNH.shape[0], 32))


def by_blocks(q_BTNH, page_BL, pos_BT, *, read, window, scale, cap):
  """`paged` in plain JAX, of sequences with T queries each."""
  B, T, N, _ = q_BTNH.shape
  k_1, v_1 = jax.eval_shape(read, page_BL[:, :1])
  A, K, width = k_1.shape[1], k_1.shape[2], v_1.shape[3]
  n = min(max(1, BLOCK // A), page_BL.shape[1])  # Pages a block.
  page_BL = jnp.pad(page_BL, ((0, 0), (0, -page_BL.shape[1] % n)))
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, -1)

  def step(block, carry):
    top_BKGT, total_BKGT, out_BKGTH = carry
    k_BSKH, v_BSKH = read(jax.lax.dynamic_slice_in_dim(page_BL, block * n, n, axis=1))
    behind_BTS = pos_BT[:, :, None] - (block * n * A + jnp.arange(n * A))[None, None]
    visible_BTS = behind_BTS >= 0 if window is None else (behind_BTS >= 0) & (behind_BTS < window)
    logits_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    logits_BKGTS = jnp.where(visible_BTS[:, None, None], softcap(logits_BKGTS * scale, cap), HIDDEN)
    new_BKGT = jnp.maximum(top_BKGT, logits_BKGTS.max(-1))
    weight_BKGTS = jnp.exp(logits_BKGTS - new_BKGT[..., None])
    shrink_BKGT = jnp.exp(top_BKGT - new_BKGT)
    # What no query may see must not reach a sum, were it NaN.
    v_BSKH = jnp.where(visible_BTS.any(axis=1)[..., None, None], v_BSKH, 0)
    value_BKGTH = jnp.einsum("BKGTS,BSKH->BKGTH", weight_BKGTS.astype(v_BSKH.dtype), v_BSKH,
                             preferred_element_type=jnp.float32)
    return (new_BKGT, total_BKGT * shrink_BKGT + weight_BKGTS.sum(-1),
            out_BKGTH * shrink_BKGT[..., None] + value_BKGTH)

  first = 0 if window is None else jnp.maximum(pos_BT.min() - window + 1, 0) // (n * A)
  empty = jnp.zeros((B, K, N // K, T), jnp.float32)
  carry = empty + HIDDEN, empty, jnp.zeros((*empty.shape, width), jnp.float32)
  _, total_BKGT, out_BKGTH = jax.lax.fori_loop(first, pos_BT.max() // (n * A) + 1, step, carry)
  out_BKGTH = out_BKGTH / total_BKGT[..., None]
  return jnp.einsum("BKGTH->BTKGH", out_BKGTH).reshape(B, T, N, width).astype(q_BTNH.dtype)

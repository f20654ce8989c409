"""Attention of many sequences to keys and values that lie in pages, as decode reads them.

Shapes: T tokens of all sequences, one after another; B sequences; L pages each may have; P pages there are,
of A tokens; N query and K kv heads, H head dim.
"""
import jax.numpy as jnp

from model.kernels.attention import Mask, plain
from model.kernels.platform import platform


def paged(q_TNH, kv_PAKH, length_B, page_BL, start_B, n_sequences, *, window, scale, cap):
  """Each sequence's newest tokens attend to all of its own up to themselves, causally.

  On TPU by JAX's Pallas kernel (jax.experimental.pallas.ops.tpu.ragged_paged_attention); elsewhere the pages
  are gathered.

  Args:
    kv_PAKH: [P, A, 2 K, H], the key of each kv head before its value; the queries' own are there already.
    length_B: how many tokens each sequence has in pages, the queries' among them.
    page_BL: which pages, in order.
    start_B: [B + 1], where each sequence's queries start in T, and where the last one's end.
    n_sequences: int32 scalar, how many of B there are; no array says anything of the others.

  Returns:
    out_TNH, undefined where no sequence has a token.
  """
  where = q_TNH, kv_PAKH, length_B, page_BL, start_B
  if platform() != "tpu":
    return gathered(*where, n_sequences, window=window, scale=scale, cap=cap)
  from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
  # Blocks are said: the kernel would look for those of the chip of this process, which may be none.
  n_pages = min(page_BL.shape[1], max(1, 512 // kv_PAKH.shape[1]))
  return ragged_paged_attention(
      *where, n_sequences[None], sm_scale=scale, sliding_window=window, soft_cap=cap,
      num_kv_pages_per_block=n_pages, num_queries_per_block=min(q_TNH.shape[0], 32))


def gathered(q_TNH, kv_PAKH, length_B, page_BL, start_B, n_sequences, *, window, scale, cap):
  """`paged` in plain JAX: every token gets its sequence's pages, which is T L A keys and values in memory."""
  T, L, A = q_TNH.shape[0], page_BL.shape[1], kv_PAKH.shape[1]
  token_T = jnp.arange(T)
  row_T = jnp.clip(jnp.searchsorted(start_B, token_T, side="right") - 1, 0, jnp.maximum(n_sequences, 1) - 1)
  pos_T = length_B[row_T] - start_B[row_T + 1] + token_T
  kv_TSKH = kv_PAKH[page_BL[row_T]].reshape(T, L * A, *kv_PAKH.shape[2:])
  pos_TS = jnp.arange(L * A)[None] + jnp.zeros((T, 1), jnp.int32)
  held_TS = (pos_TS < length_B[row_T][:, None]).astype(jnp.int32)
  mask = Mask(pos_T[:, None], jnp.ones((T, 1), jnp.int32), pos_TS, held_TS, window, aligned=False)
  # A row of the batch for each token; what lies in no sequence's pages must not reach a sum, were it NaN.
  k, v = (jnp.where(held_TS[..., None, None] > 0, kv_TSKH[:, :, i::2], 0) for i in (0, 1))
  return plain(q_TNH[:, None], k, v, mask, scale=scale, cap=cap)[:, 0]

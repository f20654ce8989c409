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

# How many pages are one block of attention: for a sequence's one token, and for a chunk. They are copied
# beside each other. On a CPU that costs more than it saves where it serves one token; a GPU needs half the
# time for a step, most of which is the launching of kernels.
TOGETHER, TOGETHER_ON_CPU = (8, 8), (1, 4)


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


def paged(q_TNH, read, where: Where, *, window, scale, cap):
  """Each token attends to its sequence's, up to itself; theirs and its own are in the pages already.

  Page by page, with an online softmax (arXiv:2205.14135): what the longest sequence of the step has more than
  another changes no bit of that one, whose pages then weigh exactly 0.

  Args:
    read: page_B -> (k_BKAH, v_BKAH), what lies in them.

  Returns:
    out_TNH; of padding and of sequences without a request, anything but NaN.
  """
  R, T = where.n_rows, q_TNH.shape[0]
  attend = functools.partial(by_pages, read=read, window=window, scale=scale, cap=cap)
  out, (of_rows, of_chunk) = [], TOGETHER_ON_CPU if platform() == "cpu" else TOGETHER
  if R:
    out.append(attend(q_TNH[:R, None], page_BL=where.page_ML[:R], pos_BT=where.pos_T[:R, None],
                      together=of_rows)[:, 0])
  if T > R:
    pos_1T = jnp.where(jnp.arange(T - R) < where.n_chunk, where.pos_T[R:], 0)[None]
    out.append(attend(q_TNH[None, R:], page_BL=where.page_ML[R:], pos_BT=pos_1T, together=of_chunk)[0])
  return jnp.concatenate(out)


def paged_on_tpu(q_TNH, kv_PAKH, where: Where, *, window, scale, cap):
  """`paged` by JAX's Pallas kernel (jax.experimental.pallas.ops.tpu.ragged_paged_attention); kv_PAKH
  [P, A, 2 K, H] has the key of each kv head before its value."""
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


def by_pages(q_BTNH, page_BL, pos_BT, *, read, window, scale, cap, together):
  """`paged`, of sequences with T queries each; so many pages at a time."""
  (B, L), n = page_BL.shape, min(together, page_BL.shape[1])
  page_Bln = jnp.pad(page_BL, ((0, 0), (0, -L % n))).reshape(B, -1, n)
  T, N = q_BTNH.shape[1:3]
  k, v = jax.eval_shape(read, page_BL[:, 0])
  K, A, width = k.shape[1], k.shape[2] * n, v.shape[3]
  q_BKQH = jnp.einsum("BTKGH->BKTGH", q_BTNH.reshape(B, T, K, N // K, -1)).reshape(B, K, T * N // K, -1)
  pos_BQ = jnp.repeat(pos_BT, N // K, axis=1)

  def step(l, carry):
    top_BKQ, total_BKQ, out_BKQH = carry
    page_B = jax.lax.dynamic_index_in_dim(page_Bln, l, axis=1, keepdims=False).reshape(-1)
    k_BKAH, v_BKAH = (x.reshape(B, n, *x.shape[1:]).swapaxes(1, 2).reshape(B, K, A, -1)
                      for x in read(page_B))
    behind_BQA = pos_BQ[:, :, None] - (l * A + jnp.arange(A))[None, None]
    visible_BQA = behind_BQA >= 0 if window is None else (behind_BQA >= 0) & (behind_BQA < window)
    logits_BKQA = jnp.einsum("BKQH,BKAH->BKQA", q_BKQH, k_BKAH, preferred_element_type=jnp.float32)
    logits_BKQA = jnp.where(visible_BQA[:, None], softcap(logits_BKQA * scale, cap), HIDDEN)
    new_BKQ = jnp.maximum(top_BKQ, logits_BKQA.max(-1))
    weight_BKQA = jnp.exp(logits_BKQA - new_BKQ[..., None])
    shrink_BKQ = jnp.exp(top_BKQ - new_BKQ)
    # What no query may see must not reach a sum, were it NaN.
    v_BKAH = jnp.where(visible_BQA.any(axis=1)[:, None, :, None], v_BKAH, 0)
    value_BKQH = jnp.einsum("BKQA,BKAH->BKQH", weight_BKQA.astype(v_BKAH.dtype), v_BKAH,
                            preferred_element_type=jnp.float32)
    return (new_BKQ, total_BKQ * shrink_BKQ + weight_BKQA.sum(-1),
            out_BKQH * shrink_BKQ[..., None] + value_BKQH)

  first = 0 if window is None else jnp.maximum(pos_BT.min() - window + 1, 0) // A
  empty = jnp.zeros(q_BKQH.shape[:3], jnp.float32)
  carry = empty + HIDDEN, empty, jnp.zeros((*empty.shape, width), jnp.float32)
  _, total_BKQ, out_BKQH = jax.lax.fori_loop(first, pos_BT.max() // A + 1, step, carry)
  out_BKTGH = (out_BKQH / total_BKQ[..., None]).reshape(B, K, T, N // K, width)
  return jnp.einsum("BKTGH->BTKGH", out_BKTGH).reshape(B, T, N, width).astype(q_BTNH.dtype)

"""Attention of many sequences to keys and values that lie in pages, as decode reads them.

Shapes: T tokens: one of each of R sequences, the others a chunk of C: tokens of up to G more sequences (of
their prompts), those of each together; L pages are listed; P pages there are, of A tokens; N query and K kv
heads, H head dim.
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
  """Where the tokens of a step stand.

  A sequence without a request has position 0 and page 0, which nobody reads.
  """
  pos_T: jax.Array
  page_RL: jax.Array  # Which pages, in order.
  page_L: jax.Array  # Those of the chunk's first sequence, of its second, ...
  first_G: jax.Array  # Where among them each one's begin; L or more: there are no more sequences.
  part_C: jax.Array  # Of which of them each token of the chunk is.
  n_chunk: jax.Array  # int32 scalar: the chunk's tokens; those after them are padding.

  @property
  def n_rows(self) -> int:
    return self.page_RL.shape[0]

  @property
  def is_there_C(self):
    return jnp.arange(self.part_C.shape[0]) < self.n_chunk

  def places(self, page_size: int):
    """Of each token of the chunk, its position if the pages of page_L held one sequence; of padding 0."""
    place_C = self.first_G[self.part_C] * page_size + self.pos_T[self.n_rows:]
    return jnp.where(self.is_there_C, place_C, 0)

  def slots(self, page_size: int):
    """(page_T, offset_T) of each token; what pads the chunk goes to page 0."""
    R = self.n_rows
    page_R = self.page_RL[jnp.arange(R), self.pos_T[:R] // page_size]
    page_C = jnp.where(self.is_there_C, self.page_L[self.places(page_size) // page_size], 0)
    return jnp.concatenate([page_R, page_C]), self.pos_T % page_size


def paged(q_TNH, read, where: Where, *, page_size, window, scale, cap):
  """Each token attends to its sequence's, up to itself; theirs and its own are in the pages already.

  Page by page, with an online softmax (arXiv:2205.14135): what the longest sequence of the step has more than
  another changes no bit of that one, whose pages then weigh exactly 0. So do, for the tokens of a chunk, the
  pages of its other sequences.

  Args:
    read: page_B -> (k_BKAH, v_BKAH), what lies in them.

  Returns:
    out_TNH; of padding and of sequences without a request, anything but NaN.
  """
  R, T = where.n_rows, q_TNH.shape[0]
  attend = functools.partial(by_pages, read=read, window=window, scale=scale, cap=cap)
  out, (of_rows, of_chunk) = [], TOGETHER_ON_CPU if platform() == "cpu" else TOGETHER
  if R:
    pos_R1 = where.pos_T[:R, None]
    out.append(attend(q_TNH[:R, None], where.page_RL, pos_R1, pos_R1, together=of_rows)[:, 0])
  if T > R:
    place_1C = where.places(page_size)[None]
    pos_1C = jnp.where(where.is_there_C, where.pos_T[R:], 0)[None]
    out.append(attend(q_TNH[None, R:], where.page_L[None], pos_1C, place_1C, together=of_chunk)[0])
  return jnp.concatenate(out)


def paged_on_tpu(q_TNH, kv_PAKH, where: Where, *, window, scale, cap):
  """`paged` by JAX's Pallas kernel (jax.experimental.pallas.ops.tpu.ragged_paged_attention); kv_PAKH
  [P, A, 2 K, H] has the key of each kv head before its value."""
  from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
  length_M, page_ML, start_M, n_sequences = by_sequence(where)
  # Blocks are said: the kernel would look for those of the chip of this process, which may be none.
  return ragged_paged_attention(
      q_TNH, kv_PAKH, length_M, page_ML, start_M, n_sequences[None], sm_scale=scale, sliding_window=window,
      soft_cap=cap, num_kv_pages_per_block=min(page_ML.shape[1], max(1, 512 // kv_PAKH.shape[1])),
      num_queries_per_block=min(q_TNH.shape[0], 32))


def by_sequence(where: Where):
  """(tokens of each sequence so far, its pages, where its tokens begin and, last, where all end, how many
  sequences there are): the rows, then those of the chunk."""
  R, L, G = where.n_rows, where.page_L.shape[0], where.first_G.shape[0]
  if not where.part_C.shape[0]:
    return where.pos_T + 1, where.page_RL, jnp.arange(R + 1, dtype=jnp.int32), jnp.int32(R)
  is_of_GC = (where.part_C[None] == jnp.arange(G)[:, None]) & where.is_there_C[None]
  length_G = jnp.max(jnp.where(is_of_GC, where.pos_T[R:][None] + 1, 0), axis=1)
  start_G = jnp.cumsum(is_of_GC.sum(axis=1))
  page_GL = where.page_L[jnp.minimum(where.first_G[:, None] + jnp.arange(L)[None], L - 1)]
  page_ML = jnp.concatenate([where.page_RL, page_GL])
  start_M = jnp.concatenate([jnp.arange(R + 1), R + start_G]).astype(jnp.int32)
  n_sequences = R + (length_G > 0).sum(dtype=jnp.int32)
  return jnp.concatenate([where.pos_T[:R] + 1, length_G]), page_ML, start_M, n_sequences


def by_pages(q_BTNH, page_BL, pos_BT, place_BT, *, read, window, scale, cap, together):
  """`paged`, for B lists of pages with T queries each; so many pages at a time.

  Args:
    place_BT: positions, as if each list were one sequence. A query sees the pos + 1 that end there.
  """
  (B, L), n = page_BL.shape, min(together, page_BL.shape[1])
  page_Bln = jnp.pad(page_BL, ((0, 0), (0, -L % n))).reshape(B, -1, n)
  T, N = q_BTNH.shape[1:3]
  k, v = jax.eval_shape(read, page_BL[:, 0])
  K, A, width = k.shape[1], k.shape[2] * n, v.shape[3]
  q_BKTGH = jnp.einsum("BTKGH->BKTGH", q_BTNH.reshape(B, T, K, N // K, -1))
  reach_BT = pos_BT + 1 if window is None else jnp.minimum(pos_BT + 1, window)

  def step(l, carry):
    top_BKTG, total_BKTG, out_BKTGH = carry
    page_B = jax.lax.dynamic_index_in_dim(page_Bln, l, axis=1, keepdims=False).reshape(-1)
    k_BKAH, v_BKAH = (x.reshape(B, n, *x.shape[1:]).swapaxes(1, 2).reshape(B, K, A, -1)
                      for x in read(page_B))
    behind_BTA = place_BT[:, :, None] - (l * A + jnp.arange(A))[None, None]
    visible_BTA = (behind_BTA >= 0) & (behind_BTA < reach_BT[:, :, None])
    logits_BKTGA = jnp.einsum("BKTGH,BKAH->BKTGA", q_BKTGH, k_BKAH, preferred_element_type=jnp.float32)
    logits_BKTGA = jnp.where(visible_BTA[:, None, :, None], softcap(logits_BKTGA * scale, cap), HIDDEN)
    new_BKTG = jnp.maximum(top_BKTG, logits_BKTGA.max(-1))
    weight_BKTGA = jnp.exp(logits_BKTGA - new_BKTG[..., None])
    shrink_BKTG = jnp.exp(top_BKTG - new_BKTG)
    # What no query may see must not reach a sum, were it NaN.
    v_BKAH = jnp.where(visible_BTA.any(axis=1)[:, None, :, None], v_BKAH, 0)
    value_BKTGH = jnp.einsum("BKTGA,BKAH->BKTGH", weight_BKTGA.astype(v_BKAH.dtype), v_BKAH,
                             preferred_element_type=jnp.float32)
    return (new_BKTG, total_BKTG * shrink_BKTG + weight_BKTGA.sum(-1),
            out_BKTGH * shrink_BKTG[..., None] + value_BKTGH)

  first = 0 if window is None else (place_BT - reach_BT + 1).min() // A
  empty = jnp.zeros(q_BKTGH.shape[:4], jnp.float32)
  carry = empty + HIDDEN, empty, jnp.zeros((*empty.shape, width), jnp.float32)
  _, total_BKTG, out_BKTGH = jax.lax.fori_loop(first, place_BT.max() // A + 1, step, carry)
  out_BTKGH = jnp.einsum("BKTGH->BTKGH", out_BKTGH / total_BKTG[..., None])
  return out_BTKGH.reshape(B, T, N, width).astype(q_BTNH.dtype)

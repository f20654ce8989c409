"""Splash attention: JAX's Pallas kernel for TPU (jax.experimental.pallas.ops.tpu.splash_attention), which has
no [T, T] array in either direction and skips the blocks that nobody sees. Shapes as in
model/kernels/attention.py."""
import jax
import jax.numpy as jnp

from model.kernels.platform import interpreted

LANES = 128  # What the blocks of kernels for TPU are multiples of.


def splash(q_BTNH, k_BTKH, v_BTKH, mask, *, scale, cap):
  """Of whole rows, in their own order: `mask` must be aligned. Rows are padded to a multiple of 128.

  Elsewhere than on a TPU it is interpreted: right, and slow.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds
  assert mask.aligned
  T, N = q_BTNH.shape[1:3]
  more = -T % LANES
  row = lambda x: jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2))
  heads = lambda x_BTNH: jnp.swapaxes(row(x_BTNH), 1, 2)
  segment_BT = row(mask.segment_BT)
  kernel = _kernel(T + more, N, mask.window, cap)
  attend = lambda q, k, v, segment: kernel(q, k, v, segment_ids=SegmentIds(segment, segment))
  out_BNTH = jax.vmap(attend)(heads(q_BTNH * scale), heads(k_BTKH), heads(v_BTKH), segment_BT)
  return jnp.swapaxes(out_BNTH, 1, 2)[:, :T]


def _kernel(T, N, window, cap):
  """Made anew for each trace, whose arrays it holds; JAX remembers the blocks of a mask."""
  # Imported when needed: Pallas takes a fifth of a second, which most runs on a CPU do without.
  from jax.experimental.pallas.ops.tpu import splash_attention as pallas
  one = pallas.CausalMask((T, T)) if window is None else pallas.LocalMask((T, T), (window - 1, 0), 0)
  size = next(size for size in (1024, 512, 256, LANES) if T % size == 0)
  inner = min(size, 512)
  blocks = pallas.BlockSizes(
      block_q=size, block_kv=size, block_kv_compute=inner, block_q_dq=size, block_kv_dq=size,
      block_q_dkv=size, block_kv_dkv=size, block_kv_dkv_compute=inner)
  return pallas.make_splash_mha_single_device(
      pallas.MultiHeadMask([one] * N), block_sizes=blocks, attn_logits_soft_cap=cap, interpret=interpreted())

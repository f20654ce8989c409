"""Where a token stands: rotary embeddings."""
import jax.numpy as jnp


def rope(x_BTNH, pos_BT, theta):
  """Rotates the pairs (i, i + H/2) by pos * theta^(-2i/H) (arXiv:2104.09864, in the rotate-half layout of
  Llama).

  Positions come from the packer, so they restart in each document. Angles are float32: bf16 cannot count past
  256.
  """
  half = x_BTNH.shape[-1] // 2
  freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = pos_BT[:, :, None, None].astype(jnp.float32) * freq[None, None, None, :]
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTNH.dtype)

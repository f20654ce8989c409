"""Keys and values of the tokens seen so far, as pytrees. One cache a layer; `attend` runs on each device's
heads."""
import dataclasses

import jax
import jax.numpy as jnp

from model.kernels.paged import Where, paged
from model.kernels.splash import LANES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
  """Pages of A tokens (arXiv:2309.06180): which sequence has which is said in `where`, anew for each step.

  Everything leads with the W ways of the batch: each has a pool of its own, and its row holds the tokens of
  all its sequences, as model.kernels.paged has them.
  """
  kv_WPAKH: jax.Array  # The key of each kv head before its value; of latent attention, the latent alone.
  scale_WPAK: jax.Array | None  # Of int8 pages: what each key or value is a multiple of.
  where: Where | None

  def attend(self, q_1TNH, k_1TKH, v_1TKH, *, own_heads, latent, **settings):
    """Writes the step's tokens, and lets them attend.

    Args:
      own_heads: k_BSKH -> the kv heads of these queries.
      latent: how many numbers of a key are its value, where v_1TKH is None.

    Returns:
      (out_1TNH, cache).
    """
    where = jax.tree.map(lambda a: a[0], self.where)
    kv_TKH = k_1TKH[0]
    if v_1TKH is not None:
      kv_TKH = jnp.stack([kv_TKH, v_1TKH[0]], axis=2).reshape(kv_TKH.shape[0], -1, kv_TKH.shape[2])
    slots = where.slots(self.kv_WPAKH.shape[2])
    scale_PAK, dtype = None, q_1TNH.dtype
    if self.scale_WPAK is not None:
      kv_TKH, scale_TK = quantise(kv_TKH)
      scale_PAK = self.scale_WPAK[0].at[slots].set(scale_TK)
    kv_PAKH = self.kv_WPAKH[0].at[slots].set(kv_TKH.astype(self.kv_WPAKH.dtype))

    def read(page_Bn):
      kv_BSKH = kv_PAKH[page_Bn]
      if scale_PAK is not None:
        kv_BSKH = (kv_BSKH * scale_PAK[page_Bn][..., None]).astype(dtype)
      kv_BSKH = kv_BSKH.reshape(len(page_Bn), -1, *kv_PAKH.shape[2:])
      if latent is not None:
        return kv_BSKH, kv_BSKH[..., :latent]
      return own_heads(kv_BSKH[:, :, 0::2]), own_heads(kv_BSKH[:, :, 1::2])

    as_kernel = (latent is None and scale_PAK is None and own_heads(k_1TKH) is k_1TKH
                 and kv_TKH.shape[2] % LANES == 0)
    out_TNH = paged(q_1TNH[0], read, where, kv_PAKH if as_kernel else None, **settings)
    scale_WPAK = None if scale_PAK is None else scale_PAK[None]
    return out_TNH[None], PagedCache(kv_PAKH[None], scale_WPAK, self.where)


def quantise(x_TKH):
  """(int8, float32 scale_TK): to the nearest of 255 values between a head's extremes of either sign."""
  x_TKH = x_TKH.astype(jnp.float32)
  scale_TK = jnp.maximum(jnp.abs(x_TKH).max(axis=-1), 1e-20) / 127
  return jnp.round(x_TKH / scale_TK[..., None]).astype(jnp.int8), scale_TK


def init_paged_cache(cfg, ways: int, n_pages: int, page_size: int, dtype: str | None = None) -> tuple:
  """One pool a layer, for each of the `ways` of the batch; `dtype` "int8", or the compute dtype."""
  heads, width = 2 * cfg.n_kv_heads, cfg.head_dim
  if cfg.latent:
    heads, width = 1, cfg.kv_lora_rank + cfg.turned_dim
  spec = cfg.rules("batch", None, None, None if cfg.latent else "kv_heads")
  shape, dtype = (ways, n_pages, page_size, heads), jnp.dtype(dtype or cfg.compute_dtype)

  def one():
    scale = jnp.zeros(shape, jnp.float32, out_sharding=spec) if dtype == jnp.int8 else None
    return PagedCache(jnp.zeros((*shape, width), dtype, out_sharding=jax.P(*spec, None)), scale, None)

  return tuple(one() for _ in range(cfg.n_layers))

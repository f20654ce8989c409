"""Keys and values of the tokens seen so far, as pytrees. One cache a layer; `attend` runs on each device's
heads."""
import dataclasses

import jax
import jax.numpy as jnp

from model.kernels.paged import Where, paged, paged_on_tpu
from model.kernels.platform import platform
from model.kernels.splash import LANES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
  """Pages of A tokens (arXiv:2309.06180): which sequence has which is said in `where`, anew for each step.

  Everything leads with the W ways of the batch: each has a pool of its own, and its row holds the tokens of
  all its sequences, as model.kernels.paged has them.
  """
  kv_WPcKAH: jax.Array  # c: keys, values; of latent attention, the latent alone.
  scale_WPcKA: jax.Array | None  # Of int8 pages: what each key or value is a multiple of.
  where: Where | None
  # Pages that each slot has for itself and uses in turn, where a window needs no more.
  n_ring: int | None = dataclasses.field(default=None, metadata={"static": True})

  def attend(self, q_1TNH, k_1TKH, v_1TKH, *, own_heads, latent, **settings):
    """Writes the step's tokens, and lets them attend.

    Args:
      own_heads: k_BKAH -> the kv heads of these queries.
      latent: how many numbers of a key are its value, where v_1TKH is None.

    Returns:
      (out_1TNH, cache).
    """
    where = jax.tree.map(lambda a: a[0], self.where)
    kv_TcKH = jnp.stack([x[0] for x in (k_1TKH, v_1TKH) if x is not None], axis=1)
    page_T, offset_T = where.slots(self.kv_WPcKAH.shape[4])
    put = lambda pool, x: _put(pool[0], x.astype(pool.dtype), page_T, offset_T)
    scale_PcKA, dtype = None, q_1TNH.dtype
    if self.scale_WPcKA is not None:
      kv_TcKH, scale_TcK = quantise(kv_TcKH)
      scale_PcKA = put(self.scale_WPcKA, scale_TcK)
    kv_PcKAH = put(self.kv_WPcKAH, kv_TcKH)

    def read_one(c, page_B):  # As rows of one array: XLA:CPU would copy what it slices of pages.
      pick = lambda a: a.reshape(-1, *a.shape[2:]).at[a.shape[1] * page_B + c].get(mode="promise_in_bounds")
      x_BKAH = pick(kv_PcKAH)
      return x_BKAH if scale_PcKA is None else (x_BKAH * pick(scale_PcKA)[..., None]).astype(dtype)

    def read(page_B):
      if latent is not None:
        k_B1AH = read_one(0, page_B)
        return k_B1AH, k_B1AH[..., :latent]
      return own_heads(read_one(0, page_B)), own_heads(read_one(1, page_B))

    out_TNH = paged(q_1TNH[0], read, where, page_size=self.kv_WPcKAH.shape[4], **settings)
    scale_WPcKA = None if scale_PcKA is None else scale_PcKA[None]
    return out_TNH[None], dataclasses.replace(self, kv_WPcKAH=kv_PcKAH[None], scale_WPcKA=scale_WPcKA)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TPUPagedCache:
  """PagedCache in the order that the Pallas kernel reads: the key of each kv head before its value."""
  kv_WPAKH: jax.Array
  where: Where | None
  n_ring: int | None = dataclasses.field(default=None, metadata={"static": True})

  def attend(self, q_1TNH, k_1TKH, v_1TKH, *, own_heads, latent, **settings):
    del own_heads, latent
    where = jax.tree.map(lambda a: a[0], self.where)
    kv_TKH = jnp.stack([k_1TKH[0], v_1TKH[0]], axis=2).reshape(k_1TKH.shape[1], -1, k_1TKH.shape[3])
    slots = where.slots(self.kv_WPAKH.shape[2])
    kv_PAKH = self.kv_WPAKH[0].at[slots].set(kv_TKH.astype(self.kv_WPAKH.dtype), mode="promise_in_bounds")
    out_TNH = paged_on_tpu(q_1TNH[0], kv_PAKH, where, **settings)
    return out_TNH[None], dataclasses.replace(self, kv_WPAKH=kv_PAKH[None])


def _put(pool_PcKA, x_TcK, page_T, offset_T):
  """Each token's at its place of its page; both may have more dims."""
  # XLA:CPU makes another thing of a scatter of one, and copies the pool for it: one is written twice.
  twice = 2 if len(x_TcK) == 1 else 1
  x_TcK, page_T, offset_T = (jnp.repeat(a, twice, axis=0) for a in (x_TcK, page_T, offset_T))
  return pool_PcKA.at[page_T, :, :, offset_T].set(x_TcK, mode="promise_in_bounds")


def quantise(x_TcKH):
  """(int8, float32 scale_TcK): to the nearest of 255 values between a head's extremes of either sign."""
  x_TcKH = x_TcKH.astype(jnp.float32)
  scale_TcK = jnp.maximum(jnp.abs(x_TcKH).max(axis=-1), 1e-20) / 127
  return jnp.round(x_TcKH / scale_TcK[..., None]).astype(jnp.int8), scale_TcK


def init_paged_cache(cfg, ways: int, n_pages: int, page_size: int, dtype: str | None = None,
                     ring: tuple[int, int] | None = None) -> tuple:
  """One pool a layer, for each of the `ways` of the batch.

  Args:
    dtype: "int8", or the compute dtype.
    ring: (slots, tokens of a chunk): layers with a window keep only what it needs, for each slot.
  """
  dtype, heads = jnp.dtype(dtype or cfg.compute_dtype), None if cfg.latent else "kv_heads"

  def zeros(dtype, *shape_and_axes):
    shape, axes = zip(*shape_and_axes)
    return jnp.zeros(shape, dtype, out_sharding=cfg.rules(*axes))

  def one(window):
    n_ring, n = None, n_pages
    if ring is not None and window is not None:
      n_ring = -(-(window + ring[1] - 1) // page_size) + 1  # A chunk is written before its first token looks.
      n = 1 + ring[0] * n_ring
    W, P, A = (ways, "batch"), (n, None), (page_size, None)
    if (platform() == "tpu" and not cfg.latent and dtype != jnp.int8 and cfg.head_dim % LANES == 0
        and cfg.rules.kv_heads == cfg.rules.heads):
      kv = zeros(dtype, W, P, A, (2 * cfg.n_kv_heads, heads), (cfg.head_dim, None))
      return TPUPagedCache(kv, None, n_ring)
    c, K = ((1, None), (1, None)) if cfg.latent else ((2, None), (cfg.n_kv_heads, heads))
    width = cfg.kv_lora_rank + cfg.turned_dim if cfg.latent else cfg.head_dim
    scale = zeros(jnp.float32, W, P, c, K, A) if dtype == jnp.int8 else None
    return PagedCache(zeros(dtype, W, P, c, K, A, (width, None)), scale, None, n_ring)

  return tuple(one(window) for window in cfg.windows * (cfg.n_layers // len(cfg.windows)))

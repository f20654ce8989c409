"""Keys and values of the tokens seen so far, as pytrees. One cache a layer; `update` and `attend` run on each
device's rows and heads.

Heads come before slots in memory, so that a head's keys lie together: decoding reads them all for every
token.
"""
import dataclasses

import jax
import jax.numpy as jnp

from model.kernels.paged import Where, paged


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
  """Slot s holds position s. For layers that see everything.

  Values are None here, in RingCache and in `update` where they are part of the keys (latent attention).
  """
  k_BKSH: jax.Array
  v_BKSH: jax.Array | None

  def update(self, k_BTKH, v_BTKH, pos_BT, segment_BT):
    """Writes the tokens whose segment is not 0.

    Returns:
      (cache, k_BSKH, v_BSKH, pos_BS, segment_BS): what the queries of these tokens may look at.
    """
    B, _, S, _ = self.k_BKSH.shape
    slot_BT = jnp.where(segment_BT > 0, pos_BT, S)  # Past the end: dropped.
    cache = DenseCache(_put(self.k_BKSH, slot_BT, k_BTKH), _put(self.v_BKSH, slot_BT, v_BTKH))
    pos_BS = jnp.broadcast_to(jnp.arange(S, dtype=pos_BT.dtype)[None], (B, S))
    return cache, _slots_first(cache.k_BKSH), _slots_first(cache.v_BKSH), pos_BS, jnp.ones_like(pos_BS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingCache:
  """Slot s holds the newest position that is s modulo W. For layers with a window of W tokens."""
  k_BKWH: jax.Array
  v_BKWH: jax.Array | None
  pos_BW: jax.Array  # -1 where nothing was written.

  def update(self, k_BTKH, v_BTKH, pos_BT, segment_BT):
    """As DenseCache.update; the tokens of a row stand at consecutive positions."""
    pos_BT = jnp.where(segment_BT > 0, pos_BT, -1)
    if pos_BT.shape[1] == 1:  # The slot written is the one that leaves the window: write, then look.
      cache = self._write(k_BTKH, v_BTKH, pos_BT)
      return (cache, _slots_first(cache.k_BKWH), _slots_first(cache.v_BKWH), cache.pos_BW,
              _segment(cache.pos_BW))
    # The first of several tokens still sees what the last of them overwrites: look at both.
    join = lambda old, new: None if old is None else jnp.concatenate([old, new.astype(old.dtype)], axis=1)
    pos_BS = join(self.pos_BW, pos_BT)
    return (self._write(k_BTKH, v_BTKH, pos_BT), join(_slots_first(self.k_BKWH), k_BTKH),
            join(_slots_first(self.v_BKWH), v_BTKH), pos_BS, _segment(pos_BS))

  def _write(self, k_BTKH, v_BTKH, pos_BT):
    W = self.pos_BW.shape[1]
    last_B1 = pos_BT.max(axis=1, keepdims=True)
    # A token that a later one of the same call overwrites is dropped, so that no slot is written twice.
    slot_BT = jnp.where((pos_BT >= 0) & (pos_BT > last_B1 - W), pos_BT % W, W)
    row_B1 = jnp.arange(len(slot_BT))[:, None]
    return RingCache(_put(self.k_BKWH, slot_BT, k_BTKH), _put(self.v_BKWH, slot_BT, v_BTKH),
                     self.pos_BW.at[row_B1, slot_BT].set(pos_BT, mode="drop"))


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

    as_kernel = latent is None and scale_PAK is None and own_heads(k_1TKH) is k_1TKH
    out_TNH = paged(q_1TNH[0], read, where, kv_PAKH if as_kernel else None, **settings)
    scale_WPAK = None if scale_PAK is None else scale_PAK[None]
    return out_TNH[None], PagedCache(kv_PAKH[None], scale_WPAK, self.where)


def quantise(x_TKH):
  """(int8, float32 scale_TK): to the nearest of 255 values between a head's extremes of either sign."""
  x_TKH = x_TKH.astype(jnp.float32)
  scale_TK = jnp.maximum(jnp.abs(x_TKH).max(axis=-1), 1e-20) / 127
  return jnp.round(x_TKH / scale_TK[..., None]).astype(jnp.int8), scale_TK


def _put(buffer_BKSH, slot_BT, new_BTKH):
  """Writes each token's heads at its slot; a slot past the end drops it."""
  if buffer_BKSH is None:
    return None
  row_B1 = jnp.arange(len(slot_BT))[:, None]
  return buffer_BKSH.at[row_B1, :, slot_BT].set(new_BTKH.astype(buffer_BKSH.dtype), mode="drop")


def _slots_first(a_BKSH):
  """As the kernels name it. XLA folds this into the product that reads it: nothing moves."""
  return None if a_BKSH is None else jnp.swapaxes(a_BKSH, 1, 2)


def _segment(pos_BS):
  return jnp.where(pos_BS >= 0, 1, -1)


def init_cache(cfg, batch: int, length: int) -> tuple:
  """One empty cache a layer, for sequences of up to `length` tokens, sharded by the config's rules."""
  def one(window):
    slots = length if window is None else min(window, length)
    heads, width = (1, cfg.kv_lora_rank + cfg.turned_dim) if cfg.latent else (cfg.n_kv_heads, cfg.head_dim)
    spec = cfg.rules("batch", None if cfg.latent else "kv_heads", None, None)
    k = jnp.zeros((batch, heads, slots, width), jnp.dtype(cfg.compute_dtype), out_sharding=spec)
    v = None if cfg.latent else k
    if window is None:
      return DenseCache(k, v)
    return RingCache(k, v,
                     jnp.full((batch, slots), -1, jnp.int32, out_sharding=cfg.rules("batch", None)))

  return tuple(one(window) for window in cfg.windows * (cfg.n_layers // len(cfg.windows)))


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

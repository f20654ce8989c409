"""Keys and values of the tokens seen so far, as pytrees. One cache a layer; `update` runs on each device's
rows and heads.

Heads come before slots in memory, so that a head's keys lie together: decoding reads them all for every
token.
"""
import dataclasses

import jax
import jax.numpy as jnp


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

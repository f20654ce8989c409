"""Keys and values of the tokens seen so far, as pytrees. One cache a layer; `update` runs on each device's rows and heads."""
import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
  """Slot s holds position s. For layers that see everything."""
  k_BSKH: jax.Array
  v_BSKH: jax.Array

  def update(self, k_BTKH, v_BTKH, pos_BT, segment_BT):
    """Writes the tokens whose segment is not 0.

    Returns:
      (cache, k_BSKH, v_BSKH, pos_BS, segment_BS): what the queries of these tokens may look at.
    """
    B, S = self.k_BSKH.shape[:2]
    slot_BT = jnp.where(segment_BT > 0, pos_BT, S)  # Past the end: dropped.
    row_B1 = jnp.arange(B)[:, None]
    put = lambda buffer, new: buffer.at[row_B1, slot_BT].set(new.astype(buffer.dtype), mode="drop")
    cache = DenseCache(put(self.k_BSKH, k_BTKH), put(self.v_BSKH, v_BTKH))
    pos_BS = jnp.broadcast_to(jnp.arange(S, dtype=pos_BT.dtype)[None], (B, S))
    return cache, cache.k_BSKH, cache.v_BSKH, pos_BS, jnp.ones_like(pos_BS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingCache:
  """Slot s holds the newest position that is s modulo W. For layers with a window of W tokens."""
  k_BWKH: jax.Array
  v_BWKH: jax.Array
  pos_BW: jax.Array  # -1 where nothing was written.

  def update(self, k_BTKH, v_BTKH, pos_BT, segment_BT):
    """As DenseCache.update; the tokens of a row stand at consecutive positions."""
    pos_BT = jnp.where(segment_BT > 0, pos_BT, -1)
    if pos_BT.shape[1] == 1:  # The slot written is the one that leaves the window: write, then look.
      cache = self._put(k_BTKH, v_BTKH, pos_BT)
      return cache, cache.k_BWKH, cache.v_BWKH, cache.pos_BW, _segment(cache.pos_BW)
    # The first of several tokens still sees what the last of them overwrites: look at both.
    join = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1)
    pos_BS = join(self.pos_BW, pos_BT)
    return (self._put(k_BTKH, v_BTKH, pos_BT), join(self.k_BWKH, k_BTKH), join(self.v_BWKH, v_BTKH), pos_BS,
            _segment(pos_BS))

  def _put(self, k_BTKH, v_BTKH, pos_BT):
    B, W = self.pos_BW.shape
    last_B1 = pos_BT.max(axis=1, keepdims=True)
    # A token that a later one of the same call overwrites is dropped, so that no slot is written twice.
    slot_BT = jnp.where((pos_BT >= 0) & (pos_BT > last_B1 - W), pos_BT % W, W)
    row_B1 = jnp.arange(B)[:, None]
    put = lambda buffer, new: buffer.at[row_B1, slot_BT].set(new.astype(buffer.dtype), mode="drop")
    return RingCache(put(self.k_BWKH, k_BTKH), put(self.v_BWKH, v_BTKH), put(self.pos_BW, pos_BT))


def _segment(pos_BS):
  return jnp.where(pos_BS >= 0, 1, -1)


def init_cache(cfg, batch: int, length: int) -> tuple:
  """One empty cache a layer, for sequences of up to `length` tokens, sharded by the config's rules."""
  def one(window):
    slots = length if window is None else min(window, length)
    spec = cfg.rules("batch", None, "kv_heads", None)
    zeros = jnp.zeros((batch, slots, cfg.n_kv_heads, cfg.head_dim), jnp.dtype(cfg.compute_dtype), out_sharding=spec)
    if window is None:
      return DenseCache(zeros, zeros)
    return RingCache(zeros, zeros, jnp.full((batch, slots), -1, jnp.int32, out_sharding=cfg.rules("batch", None)))

  return tuple(one(window) for window in cfg.windows * (cfg.n_layers // len(cfg.windows)))

"""Attention variants: projections around a kernel. Shapes as in model/kernels/attention.py."""
import functools

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.kernels.attention import KERNEL, Mask
from model.layers import NORM, bias, lift, linear, read, weight
from model.lookup import lookup
from model.positions import rope


def attend(cfg, window, q_BTNH, k_BTKH, v_BTKH, pos_BT, segment_BT, cache=None):
  """The configured kernel on each device's own rows and heads, after the cache has taken the new keys and
  values.

  Returns:
    (out_BTNH, cache).
  """
  kernel = functools.partial(lookup(KERNEL, cfg.attention_impl, "model.attention_impl"),
                             scale=cfg.head_dim**-0.5, cap=cfg.attention_softcap)

  def local(q_BTNH, k_BTKH, v_BTKH, pos_BT, segment_BT, cache):
    if cache is None:
      mask = Mask(pos_BT, segment_BT, pos_BT, segment_BT, window, aligned=True)
      return kernel(q_BTNH, k_BTKH, v_BTKH, mask), None
    cache, k_BSKH, v_BSKH, pos_BS, segment_BS = cache.update(k_BTKH, v_BTKH, pos_BT, segment_BT)
    mask = Mask(pos_BT, segment_BT, pos_BS, segment_BS, window, aligned=False)
    return kernel(q_BTNH, k_BSKH, v_BSKH, mask), cache

  rules = cfg.rules
  bt, q, kv = (
      rules("batch", None), rules("batch", None, "heads", None), rules("batch", None, "kv_heads", None))
  caches = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, cache)
  return jax.shard_map(local, in_specs=(q, kv, kv, bt, bt, caches), out_specs=(q, caches), check_vma=False)(
      q_BTNH, k_BTKH, v_BTKH, pos_BT, segment_BT, cache)


class GQAttention(nnx.Module):
  """Grouped-query attention (arXiv:2305.13245) with rotary positions; n_kv_heads = n_heads is MHA, 1 is
  MQA."""

  def __init__(self, cfg, window, *, rngs):
    D, N, K, H = cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
    self.cfg, self.window = cfg, window
    self.wq = weight(cfg, (D, N, H), ("embed", "heads", None), rngs, fan_in=D)
    self.wk = weight(cfg, (D, K, H), ("embed", "kv_heads", None), rngs, fan_in=D)
    self.wv = weight(cfg, (D, K, H), ("embed", "kv_heads", None), rngs, fan_in=D)
    self.wo = weight(cfg, (N, H, D), ("heads", None, "embed"), rngs, fan_in=N * H, residual=True)
    if cfg.qkv_bias:
      self.q_bias = bias(cfg, (N, H), ("heads", None))
      self.k_bias = bias(cfg, (K, H), ("kv_heads", None))
      self.v_bias = bias(cfg, (K, H), ("kv_heads", None))
    if cfg.out_bias:
      self.o_bias = bias(cfg, (D,), ("embed",))
    if cfg.qk_norm is not None:
      self.q_norm, self.k_norm = NORM[cfg.qk_norm](cfg, H), NORM[cfg.qk_norm](cfg, H)

  def project(self, x_BTD, pos_BT):
    """(q_BTNH, k_BTKH, v_BTKH), turned to their positions."""
    cfg = self.cfg
    q_BTNH, k_BTKH, v_BTKH = (linear(cfg, "BTD,DNH->BTNH", x_BTD, w) for w in (self.wq, self.wk, self.wv))
    if cfg.qkv_bias:
      q_BTNH, k_BTKH, v_BTKH = (x + lift(read(cfg, b), 4) for x, b in
                                ((q_BTNH, self.q_bias), (k_BTKH, self.k_bias), (v_BTKH, self.v_bias)))
    if cfg.qk_norm is not None:
      q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
    return rope(q_BTNH, pos_BT, cfg.rope_theta), rope(k_BTKH, pos_BT, cfg.rope_theta), v_BTKH

  def output(self, out_BTNH):
    # Contracts a sharded dim: explicit mode makes us say where the sum lives (all-reduce over "tensor").
    out_BTD = linear(self.cfg, "BTNH,NHD->BTD", out_BTNH, self.wo,
                     out_sharding=self.cfg.rules("batch", None, None))
    out_BTD = out_BTD + lift(read(self.cfg, self.o_bias), 3) if self.cfg.out_bias else out_BTD
    return checkpoint_name(out_BTD, "attention_out")

  def __call__(self, x_BTD, pos_BT, segment_BT, cache=None):
    """Returns (out_BTD, cache); with a cache the tokens extend what it holds."""
    q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, pos_BT)
    out_BTNH, cache = attend(self.cfg, self.window, q_BTNH, k_BTKH, v_BTKH, pos_BT, segment_BT, cache)
    return self.output(out_BTNH), cache


ATTENTION = {"gqa": GQAttention}

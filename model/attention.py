"""Attention variants: projections around a kernel. Shapes as in model/kernels/attention.py."""
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.context import CONTEXT
from model.kernels.attention import KERNEL, UNALIGNED, Mask
from model.layers import NORM, bias, lift, linear, read, weight
from model.lookup import lookup
from model.positions import rope
from model.sharding import on_devices


def attend(cfg, window, q_BTNH, k_BTKH, v_BTKH, pos_BT, segment_BT, cache=None):
  """The configured kernel on each device's own rows and heads, after the cache has taken the new keys and
  values.

  Returns:
    (out_BTNH, cache).
  """
  impl, rules = cfg.attention_impl, cfg.rules
  impl = impl if cache is None else UNALIGNED.get(impl, impl)
  kernel = lookup(KERNEL, impl, "model.attention_impl")
  settings = dict(scale=cfg.head_dim**-0.5, cap=cfg.attention_softcap)

  def local(q_btnh, k_btkh, v_btkh, pos_bt, segment_bt, cache):
    if cache is not None:
      cache, k_bskh, v_bskh, pos_bs, segment_bs = cache.update(k_btkh, v_btkh, pos_bt, segment_bt)
      mask = Mask(pos_bt, segment_bt, pos_bs, segment_bs, window, aligned=False)
      k_bskh, v_bskh = (_own_heads(cfg, x, q_btnh.shape[2]) for x in (k_bskh, v_bskh))
      return kernel(q_btnh, k_bskh, v_bskh, mask, **settings), cache
    k_btkh, v_btkh = (_own_heads(cfg, x, q_btnh.shape[2]) for x in (k_btkh, v_btkh))
    if rules.length and jax.lax.axis_size(rules.length) > 1:
      return CONTEXT[cfg.context](rules.length, kernel, q_btnh, k_btkh, v_btkh, pos_bt, segment_bt, window,
                                  **settings), None
    mask = Mask(pos_bt, segment_bt, pos_bt, segment_bt, window, aligned=True)
    return kernel(q_btnh, k_btkh, v_btkh, mask, **settings), None

  bt, q, kv = (rules("batch", "length"), rules("batch", "length", "heads", None),
               rules("batch", "length", "kv_heads", None))
  caches = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, cache)
  return on_devices(local, (q, kv, kv, bt, bt, caches), (q, caches), check_vma=False)(
      q_BTNH, k_BTKH, v_BTKH, pos_BT, segment_BT, cache)


def _own_heads(cfg, x_bskh, n):
  """Of kv heads that every device holds, those that the n query heads of this one attend to."""
  heads = cfg.rules.heads
  if cfg.rules.kv_heads == heads or jax.lax.axis_size(heads) == 1:
    return x_bskh
  group, first = cfg.n_heads // cfg.n_kv_heads, jax.lax.axis_index(heads) * n
  if group % n == 0:
    return jax.lax.dynamic_slice_in_dim(x_bskh, first // group, 1, axis=2)
  return jnp.take(x_bskh, (first + jnp.arange(n)) // group, axis=2)


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
    out_BTD = linear(self.cfg, "BTNH,NHD->BTD", out_BTNH, self.wo)
    out_BTD = out_BTD + lift(read(self.cfg, self.o_bias), 3) if self.cfg.out_bias else out_BTD
    return checkpoint_name(out_BTD, "attention_out")

  def __call__(self, x_BTD, pos_BT, segment_BT, cache=None):
    """Returns (out_BTD, cache); with a cache the tokens extend what it holds."""
    q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, pos_BT)
    out_BTNH, cache = attend(self.cfg, self.window, q_BTNH, k_BTKH, v_BTKH, pos_BT, segment_BT, cache)
    return self.output(out_BTNH), cache


ATTENTION = {"gqa": GQAttention}

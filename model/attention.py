"""Attention variants: projections around a kernel. Shapes as in model/kernels/attention.py."""
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.context import CONTEXT
from model.kernels.attention import KERNEL, Mask
from model.layers import NORM, bias, lift, linear, read, weight
from model.lookup import lookup
from model.positions import turn
from model.sharding import on_devices


def attend(cfg, window, q_BTNH, k_BTKH, v_BTKH, pos_BT, segment_BT, cache=None, kv_heads="kv_heads"):
  """The configured kernel on each device's own rows and heads; with a cache, that takes the new keys and
  values, and attends.

  Args:
    pos_BT, segment_BT: not read with a cache, which knows where they stand.
    v_BTKH: None where the first cfg.kv_lora_rank numbers of a key are its value.
    kv_heads: the logical axis of K; None: one head, of which every device has all.

  Returns:
    (out_BTNH, cache).
  """
  rules = cfg.rules
  settings = dict(scale=cfg.scale, cap=cfg.attention_softcap)
  own_heads = lambda x, n, axis=2: _own_heads(cfg, x, n, axis) if kv_heads == "kv_heads" else x

  def local(q_btnh, k_btkh, v_btkh, pos_bt, segment_bt, cache):
    if cache is not None:
      return cache.attend(q_btnh, k_btkh, v_btkh, own_heads=lambda x: own_heads(x, q_btnh.shape[2], axis=1),
                          latent=cfg.kv_lora_rank if v_btkh is None else None, window=window, **settings)
    kernel = lookup(KERNEL, cfg.attention_impl, "model.attention_impl")
    k_btkh, v_btkh = (own_heads(x, q_btnh.shape[2]) for x in (k_btkh, v_btkh))
    if rules.length and jax.lax.axis_size(rules.length) > 1:
      return CONTEXT[cfg.context](rules.length, kernel, q_btnh, k_btkh, v_btkh, pos_bt, segment_bt, window,
                                  **settings), None
    mask = Mask(pos_bt, segment_bt, pos_bt, segment_bt, window, aligned=True)
    return kernel(q_btnh, k_btkh, v_btkh, mask, **settings), None

  bt, q, kv = (rules("batch", "length"), rules("batch", "length", "heads", None),
               rules("batch", "length", kv_heads, None))
  caches = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, cache)
  if cache is not None:
    pos_BT = segment_BT = bt = None
  v = None if v_BTKH is None else kv
  return on_devices(local, (q, kv, v, bt, bt, caches), (q, caches), check_vma=False)(
      q_BTNH, k_BTKH, v_BTKH, pos_BT, segment_BT, cache)


def _own_heads(cfg, x, n, axis):
  """Of kv heads that every device holds, along `axis`, those that the n query heads of this one attend to."""
  heads = cfg.rules.heads
  if cfg.rules.kv_heads == heads or jax.lax.axis_size(heads) == 1:
    return x
  group, first = cfg.n_heads // cfg.n_kv_heads, jax.lax.axis_index(heads) * n
  if group % n == 0:
    return jax.lax.dynamic_slice_in_dim(x, first // group, 1, axis=axis)
  return jnp.take(x, (first + jnp.arange(n)) // group, axis=axis)


class GQAttention(nnx.Module):
  """Grouped-query attention (arXiv:2305.13245); n_kv_heads = n_heads is MHA, 1 is MQA."""

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
      heads = ((N,), (K,)) if cfg.qk_norm_over == "all" else ((), ())
      self.q_norm, self.k_norm = (lookup(NORM, cfg.qk_norm)(cfg, *n, H) for n in heads)

  def join(self):
    """From here on wq is wq, wk and wv beside each other, [D, N + 2 K, H]: one product."""
    self.wk = self.wv = None

  def project(self, x_BTD, pos_BT):
    """(q_BTNH, k_BTKH, v_BTKH), turned to their positions."""
    cfg, window = self.cfg, self.window
    if self.wk is None:
      N, K = cfg.n_heads, cfg.n_kv_heads
      parts = jnp.split(linear(cfg, "BTD,DNH->BTNH", x_BTD, self.wq), (N, N + K), axis=2)
    else:
      parts = (linear(cfg, "BTD,DNH->BTNH", x_BTD, w) for w in (self.wq, self.wk, self.wv))
    q_BTNH, k_BTKH, v_BTKH = parts
    if cfg.qkv_bias:
      q_BTNH, k_BTKH, v_BTKH = (x + lift(read(cfg, b), 4) for x, b in
                                ((q_BTNH, self.q_bias), (k_BTKH, self.k_bias), (v_BTKH, self.v_bias)))
    if cfg.qk_norm is not None:
      q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
    return turn(cfg, window, q_BTNH, pos_BT), turn(cfg, window, k_BTKH, pos_BT), v_BTKH

  def output(self, out_BTNH):
    out_BTD = linear(self.cfg, "BTNH,NHD->BTD", out_BTNH, self.wo)
    out_BTD = out_BTD + lift(read(self.cfg, self.o_bias), 3) if self.cfg.out_bias else out_BTD
    return checkpoint_name(out_BTD, "attention_out")

  def __call__(self, x_BTD, pos_BT, segment_BT, cache=None):
    """Returns (out_BTD, cache); with a cache the tokens extend what it holds."""
    q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, pos_BT)
    out_BTNH, cache = attend(self.cfg, self.window, q_BTNH, k_BTKH, v_BTKH, pos_BT, segment_BT, cache)
    return self.output(out_BTNH), cache


class MLAttention(nnx.Module):
  """Multi-head latent attention (DeepSeek V2, arXiv:2405.04434): the keys and values of all heads are made
  from one latent of R = kv_lora_rank numbers a token, and from a rotary key that the heads share.

  P = qk_nope_head_dim and r = qk_rope_head_dim numbers make a head's H = head_dim. With a cache, which holds
  latents and rotary keys, W_k and W_v are applied to queries and results instead (absorbed): all heads attend
  to the latents themselves, as MQA with wide heads.
  """

  def __init__(self, cfg, window, *, rngs):
    D, N, H, R, Q = cfg.d_model, cfg.n_heads, cfg.head_dim, cfg.kv_lora_rank, cfg.q_lora_rank
    P, V, norm = cfg.qk_nope_head_dim, cfg.v_head_dim, lookup(NORM, cfg.norm)
    self.cfg, self.window = cfg, window
    if Q is None:
      self.wq = weight(cfg, (D, N, H), ("embed", "heads", None), rngs, fan_in=D)
    else:  # "embed" here and below is the rank: what FSDP splits.
      self.wq_a = weight(cfg, (D, Q), ("embed", None), rngs, fan_in=D)
      self.q_a_norm = norm(cfg, Q)
      self.wq_b = weight(cfg, (Q, N, H), ("embed", "heads", None), rngs, fan_in=Q)
    self.wkv_a = weight(cfg, (D, R + cfg.qk_rope_head_dim), ("embed", None), rngs, fan_in=D)
    self.kv_a_norm = norm(cfg, R)
    self.wk_b = weight(cfg, (R, N, P), ("embed", "heads", None), rngs, fan_in=R)
    self.wv_b = weight(cfg, (R, N, V), ("embed", "heads", None), rngs, fan_in=R)
    self.wo = weight(cfg, (N, V, D), ("heads", None, "embed"), rngs, fan_in=N * V, residual=True)
    if cfg.out_bias:
      self.o_bias = bias(cfg, (D,), ("embed",))

  def project(self, x_BTD, pos_BT):
    """(q_BTNP and q_BTNr, the second turned; latent_BTR; the shared keys k_BT1r, turned)."""
    cfg, window, P, R = self.cfg, self.window, self.cfg.qk_nope_head_dim, self.cfg.kv_lora_rank
    if cfg.q_lora_rank is None:
      q_BTNH = linear(cfg, "BTD,DNH->BTNH", x_BTD, self.wq)
    else:
      q_BTQ = self.q_a_norm(linear(cfg, "BTD,DQ->BTQ", x_BTD, self.wq_a))
      q_BTNH = linear(cfg, "BTQ,QNH->BTNH", q_BTQ, self.wq_b)
    kv_BTR = linear(cfg, "BTD,DR->BTR", x_BTD, self.wkv_a)
    return (q_BTNH[..., :P], turn(cfg, window, q_BTNH[..., P:], pos_BT), self.kv_a_norm(kv_BTR[..., :R]),
            turn(cfg, window, kv_BTR[:, :, None, R:], pos_BT))

  def __call__(self, x_BTD, pos_BT, segment_BT, cache=None):
    """Returns (out_BTD, cache); with a cache the tokens extend what it holds."""
    cfg, where = self.cfg, (pos_BT, segment_BT)
    q_BTNP, q_BTNr, latent_BTR, k_BT1r = self.project(x_BTD, pos_BT)
    if cache is None:
      k_BTNP = linear(cfg, "BTR,RNP->BTNP", latent_BTR, self.wk_b)
      v_BTNH = linear(cfg, "BTR,RNH->BTNH", latent_BTR, self.wv_b)
      q_BTNH, k_BTNH = (_beside(cfg, *parts) for parts in ((q_BTNP, q_BTNr), (k_BTNP, k_BT1r)))
      out_BTNH, _ = attend(cfg, self.window, q_BTNH, k_BTNH, v_BTNH, *where, kv_heads="heads")
    else:
      q_BTNR = linear(cfg, "BTNP,RNP->BTNR", q_BTNP, self.wk_b)
      k_BT1H = jnp.concatenate([latent_BTR[:, :, None], k_BT1r], axis=-1)
      out_BTNR, cache = attend(cfg, self.window, _beside(cfg, q_BTNR, q_BTNr), k_BT1H, None, *where, cache,
                               kv_heads=None)
      out_BTNH = linear(cfg, "BTNR,RNH->BTNH", out_BTNR, self.wv_b)
    return GQAttention.output(self, out_BTNH), cache


def _beside(cfg, left_BTNP, right_BTnR):
  """[B, T, N, P + R]; n is N, or 1 for what all heads share. On each device, for its own heads."""
  def join(left, right):
    return jnp.concatenate([left, jnp.broadcast_to(right, (*left.shape[:3], right.shape[3]))], axis=-1)

  spec = lambda axis: cfg.rules("batch", "length", axis, None)
  own = spec("heads")
  return on_devices(join, (own, own if right_BTnR.shape[2] > 1 or cfg.n_heads == 1 else spec(None)), own)(
      left_BTNP, right_BTnR)


ATTENTION = {"gqa": GQAttention, "mla": MLAttention}

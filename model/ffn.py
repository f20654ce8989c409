"""Feed-forward variants: (x_BTD, segment_BT) -> (y_BTD, aux: a dict of arrays, see model.moe)."""
import functools

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.layers import bias, lift, linear, read, weight
from model.moe import MoE


class FeedForward(nnx.Module):
  """activation(x W_up) W_down; gated: activation(x W_gate) * (x W_up) (arXiv:2002.05202). F = d_ff, of the
  config where it is not given."""

  def __init__(self, cfg, *, rngs, activation, gated, d_ff=None):
    D, F = cfg.d_model, d_ff or cfg.d_ff
    self.cfg, self.activation, self.gated = cfg, activation, gated
    if gated:
      self.w_gate = weight(cfg, (D, F), ("embed", "mlp"), rngs, fan_in=D)
    self.w_up = weight(cfg, (D, F), ("embed", "mlp"), rngs, fan_in=D)
    self.w_down = weight(cfg, (F, D), ("mlp", "embed"), rngs, fan_in=F, residual=True)
    if cfg.ffn_bias:
      self.up_bias, self.down_bias = bias(cfg, (F,), ("mlp",)), bias(cfg, (D,), ("embed",))

  def __call__(self, x_BTD, segment_BT=None):
    cfg = self.cfg
    h_BTF = linear(cfg, "BTD,DF->BTF", x_BTD, self.w_up)
    if cfg.ffn_bias:
      h_BTF = h_BTF + lift(read(cfg, self.up_bias), 3)
    if self.gated:
      h_BTF = self.activation(linear(cfg, "BTD,DF->BTF", x_BTD, self.w_gate)) * h_BTF
    else:
      h_BTF = self.activation(h_BTF)
    y_BTD = linear(cfg, "BTF,FD->BTD", h_BTF, self.w_down)
    y_BTD = y_BTD + lift(read(cfg, self.down_bias), 3) if cfg.ffn_bias else y_BTD
    return checkpoint_name(y_BTD, "ffn_out"), {}


swiglu = functools.partial(FeedForward, activation=jax.nn.silu, gated=True)
FFN = {
  "swiglu": swiglu,
  "geglu": functools.partial(FeedForward, activation=jax.nn.gelu, gated=True),
  "gelu": functools.partial(FeedForward, activation=jax.nn.gelu, gated=False),
  "relu": functools.partial(FeedForward, activation=jax.nn.relu, gated=False),
  "moe": functools.partial(MoE, shared=swiglu),
}

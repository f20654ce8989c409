r"""Does a gate on each head's output help? (arXiv:2505.06708: a sigmoid gate after the attention, from the
layer's input.)

python -m train.main --config=configs/tiny.py \
    --config.model.attention=experiments.gated_attention:GatedAttention
"""
import jax
import jax.numpy as jnp

from model.attention import GQAttention, attend
from model.layers import read, weight


class GatedAttention(GQAttention):
  def __init__(self, cfg, window, *, rngs):
    super().__init__(cfg, window, rngs=rngs)
    self.w_gate = weight(cfg, (cfg.d_model, cfg.n_heads), ("embed", "heads"), rngs, fan_in=cfg.d_model)

  def __call__(self, x_BTD, pos_BT, segment_BT, cache=None):
    q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, pos_BT)
    out_BTNH, cache = attend(self.cfg, self.window, q_BTNH, k_BTKH, v_BTKH, pos_BT, segment_BT, cache)
    gate_BTN = jax.nn.sigmoid(jnp.einsum("BTD,DN->BTN", x_BTD, read(self.cfg, self.w_gate)))
    return self.output(out_BTNH * gate_BTN[..., None]), cache

"""Where a token stands: rotary embeddings, and how they are stretched past the length of training.

Learned positions are a table that model.transformer adds to the embeddings.
"""
import math

import jax
import jax.numpy as jnp
import numpy as np


def turn(cfg, window, x_BTNH, pos_BT):
  """The queries or keys of a layer, turned to their positions; as they are where cfg.positions is not "rope".

  Only the first cfg.turned_dim dims of a head turn. A layer with a window has its own base where
  cfg.rope_theta_local says so, and no scaling then (Gemma 3).

  Args:
    pos_BT: or what `make_sines` made of them.
  """
  if cfg.positions != "rope":
    return x_BTNH
  dim, local = cfg.turned_dim, _is_local(cfg, window)
  sin_cos = pos_BT[local] if isinstance(pos_BT, dict) else _sin_cos(cfg, local, pos_BT)
  if dim == x_BTNH.shape[-1]:
    return rope(x_BTNH, *sin_cos)
  return jnp.concatenate([rope(x_BTNH[..., :dim], *sin_cos), x_BTNH[..., dim:]], axis=-1)


def make_sines(cfg, pos_BT):
  """What all layers share of `turn`, made once: XLA:CPU would make it again for every head. Whatever leaves a
  conditional is not made again, and where there are positions it is taken."""
  if cfg.positions != "rope":
    return {}
  kinds = {_is_local(cfg, window) for window in cfg.windows}
  make = lambda pos_BT: {local: _sin_cos(cfg, local, pos_BT) for local in kinds}
  nothing = lambda pos_BT: jax.tree.map(jnp.zeros_like, make(pos_BT))
  return jax.lax.cond(pos_BT.max() >= 0, make, nothing, pos_BT)


def _is_local(cfg, window):
  return window is not None and cfg.rope_theta_local is not None


def _sin_cos(cfg, local, pos_BT):
  theta, kind = (cfg.rope_theta_local, "none") if local else (cfg.rope_theta, cfg.rope_scaling.kind)
  return sin_cos(pos_BT, *SCALING[kind](cfg.rope_scaling, theta, cfg.turned_dim))


def sin_cos(pos_BT, freq, factor=1.0):
  """Of the angles pos * freq, each [B, T, 1, pairs], and stretched by `factor`.

  Positions come from the packer, so they restart in each document. Angles are float32: bf16 cannot count past
  256.
  """
  angle = pos_BT[:, :, None, None].astype(jnp.float32) * jnp.asarray(freq, jnp.float32)[None, None, None, :]
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  return (sin, cos) if factor == 1.0 else (sin * factor, cos * factor)


def rope(x_BTNH, sin_BT1r, cos_BT1r):
  """Rotates the pairs (i, i + H/2) (arXiv:2104.09864, in the rotate-half layout of Llama)."""
  x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([x1 * cos_BT1r - x2 * sin_BT1r, x2 * cos_BT1r + x1 * sin_BT1r],
                         axis=-1).astype(x_BTNH.dtype)


# Each: (RopeScaling, base, dims that turn) -> (radians a token of each pair, what cos and sin are multiplied
# by). Those that stretch compute in float64.

def none(scaling, theta, dim):
  """theta^(-2i / dim)."""
  half = dim // 2
  return theta ** (-jnp.arange(half, dtype=jnp.float32) / half), 1.0


def linear(scaling, theta, dim):
  """Positions divided by the factor (arXiv:2306.15595)."""
  return _frequencies(theta, dim) / scaling.factor, 1.0


def dynamic(scaling, theta, dim):
  """A larger base, so that the slowest pair turns as far in `length` tokens as it did in the original ones:
  NTK-aware, by the length of use."""
  ratio = max(_length(scaling) / scaling.original_length, 1.0)
  stretch = scaling.factor * ratio - (scaling.factor - 1)
  return _frequencies(theta * stretch ** (dim / (dim - 2)), dim), 1.0


def yarn(scaling, theta, dim):
  """Pairs that turn often stay, those that turn once or less are divided by the factor, with a ramp between
  (arXiv:2309.00071)."""
  turns = np.array([scaling.beta_fast, scaling.beta_slow])
  bounds = dim * np.log(scaling.original_length / (2 * np.pi * turns)) / (2 * np.log(theta))
  low, high = (math.floor(bounds[0]), math.ceil(bounds[1])) if scaling.truncate else bounds
  low, high = max(low, 0), min(high, dim - 1)
  ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 1e-3), 0, 1)
  freq = _frequencies(theta, dim)
  if scaling.attention_factor is not None:
    factor = scaling.attention_factor
  elif scaling.mscale and scaling.mscale_all_dim:
    factor = magnitude(scaling.factor, scaling.mscale) / magnitude(scaling.factor, scaling.mscale_all_dim)
  else:
    factor = magnitude(scaling.factor, 1.0)
  return freq / scaling.factor * ramp + freq * (1 - ramp), factor


def llama3(scaling, theta, dim):
  """Waves are divided by the factor where they are long, kept where they are short (Llama 3.1)."""
  freq = _frequencies(theta, dim)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  turns = scaling.original_length * freq / (2 * np.pi)  # In a row of training.
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return freq * (kept + (1 - kept) / scaling.factor), 1.0


def longrope(scaling, theta, dim):
  """Each pair divided by its own factor, found by search (arXiv:2402.13753)."""
  original = scaling.original_length
  factors = scaling.long_factors if _length(scaling) > original else scaling.short_factors
  factor = scaling.attention_factor
  if factor is None:
    factor = math.sqrt(1 + math.log(max(scaling.factor, 1.0)) / math.log(original))
  return _frequencies(theta, dim) / np.array(factors), factor


SCALING = {"none": none, "linear": linear, "dynamic": dynamic, "yarn": yarn, "llama3": llama3,
           "longrope": longrope}


def magnitude(factor: float, mscale: float) -> float:
  """What YaRN multiplies queries and keys by, so that attention stays as sharp over more keys."""
  return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _frequencies(theta, dim):
  return theta ** (-np.arange(dim // 2, dtype=np.float64) / (dim // 2))


def _length(scaling):
  return scaling.length or scaling.original_length * scaling.factor

"""Small pieces that every block uses: a parameter and its use, norms, dropout, soft caps."""
import jax
import jax.numpy as jnp
from flax import nnx

# name -> (cfg, fan_in) -> standard deviation of a weight.
INIT = {
  "normal": lambda cfg, fan_in: cfg.init_std,
  "fan_in": lambda cfg, fan_in: fan_in**-0.5,
}


def weight(cfg, shape, axes, rngs, *, fan_in, residual=False):
  """A truncated-normal parameter whose dims carry logical axis names.

  Args:
    fan_in: how many inputs each output sums.
    residual: it writes to the residual stream, so its scale shrinks with depth (GPT-2: 1/sqrt(2 L)).
  """
  assert len(shape) == len(axes), (shape, axes)
  std = INIT[cfg.init](cfg, fan_in) / ((2 * cfg.n_layers) ** 0.5 if residual else 1.0)
  std /= 0.87962566  # What cutting at two standard deviations leaves of one.
  value = nnx.initializers.truncated_normal(std)(rngs.params(), shape, jnp.dtype(cfg.param_dtype))
  return nnx.Param(value, axes=axes)


def bias(cfg, shape, axes):
  return nnx.Param(jnp.zeros(shape, jnp.dtype(cfg.param_dtype)), axes=axes)


def read(cfg, param):
  """The parameter in the compute dtype, gathered over what splits "embed" (FSDP) and nothing else.

  Cast first, so that the gather moves the small dtype; its transpose is the reduce-scatter of the gradient.
  """
  axes = (None if a == "embed" else a for a in param.get_metadata()["axes"])
  return jax.sharding.reshard(param[...].astype(cfg.compute_dtype), cfg.rules(*axes))


def linear(cfg, equation, x, param, *, out_sharding=None):
  """einsum(equation, x, read(param)), where x and the result lead with B and T.

  The two go in as one dim. A weight's gradient sums over both, and over two dims XLA:CPU sums only after it
  has copied the operands transposed, into a slower product.
  """
  B, T = x.shape[:2]
  batch, length, *rest = jax.typeof(x).sharding.spec
  if length is not None or out_sharding is not None and out_sharding[1] is not None:
    # Dims that are both split do not merge.
    return jnp.einsum(equation, x, read(cfg, param), out_sharding=out_sharding)
  tokens = x.reshape(B * T, *x.shape[2:], out_sharding=jax.P(batch, *rest))
  out = None if out_sharding is None else jax.P(out_sharding[0], *out_sharding[2:])
  y = jnp.einsum(equation.replace("BT", "C"), tokens, read(cfg, param), out_sharding=out)
  batch, *rest = jax.typeof(y).sharding.spec
  return y.reshape(B, T, *y.shape[1:], out_sharding=jax.P(batch, None, *rest))


def lift(v, ndim):
  """[D] -> [1, ..., 1, D]: broadcasting is written out."""
  return v.reshape((1,) * (ndim - v.ndim) + v.shape)


class RMSNorm(nnx.Module):
  """x / rms(x) * scale in float32 (arXiv:1910.07467)."""

  def __init__(self, cfg, dim):
    self.eps = cfg.norm_eps
    self.scale = nnx.Param(jnp.ones((dim,), jnp.dtype(cfg.param_dtype)), axes=(None,))

  def __call__(self, x):
    x32 = x.astype(jnp.float32)  # The mean square of bf16 loses 3 digits.
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    return (x32 * inverse * lift(self.scale[...].astype(jnp.float32), x.ndim)).astype(x.dtype)


class LayerNorm(nnx.Module):
  """(x - mean) / std * scale + bias in float32 (arXiv:1607.06450)."""

  def __init__(self, cfg, dim):
    self.eps = cfg.norm_eps
    self.scale = nnx.Param(jnp.ones((dim,), jnp.dtype(cfg.param_dtype)), axes=(None,))
    self.bias = bias(cfg, (dim,), (None,))

  def __call__(self, x):
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
    scale, shift = (lift(p[...].astype(jnp.float32), x.ndim) for p in (self.scale, self.bias))
    return (centred * inverse * scale + shift).astype(x.dtype)


NORM = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def dropout(x, rate, key):
  """Zeroes a share `rate` of x and scales the rest; key None is evaluation."""
  if key is None or rate == 0.0:
    return x
  # Each device its own.
  keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=jax.typeof(x).sharding)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def softcap(x, cap):
  """cap * tanh(x / cap) (Gemma 2, arXiv:2408.00118); cap None is off."""
  return x if cap is None else cap * jnp.tanh(x / cap)

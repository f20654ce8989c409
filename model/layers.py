"""Small pieces that every block uses: a parameter and its use, norms, dropout, soft caps."""
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from model.products import multiply, turned
from model.sharding import is_alone, on_devices

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


def linear(cfg, equation, x, param):
  """einsum(equation, x, param), where x and the result lead with B and T. Each device multiplies its own
  tokens.

  Each device gathers what it lacks of "embed". The gradient goes the other way: its terms are summed where
  the slice is held (reduce-scatter), and only the slices over the remaining devices. Where the sum is over a
  split dim (Megatron's row-parallel product, arXiv:1909.08053) it ends on every device, or each has its part
  of the length, as the residual stream does (reduce-scatter: sequence parallelism, arXiv:2205.05198).

  What is gathered is whole in the result too, if it is a dim of that.

  B and T go in as one dim: over two dims XLA:CPU sums a weight's gradient only after it has copied the
  operands transposed, into a slower product.
  """
  rules, axes, n_turned = cfg.rules, param.get_metadata()["axes"], turned(param)
  w, w_spec = embed_shards(cfg, param)
  inputs, out = equation.split("->")
  left, right = inputs.split(",")
  right = right[n_turned:] + right[:n_turned]
  x_spec = jax.typeof(x).sharding.spec
  place = dict(zip(right, w_spec)) | dict(zip(left, x_spec))
  over = names(spec for letter, spec, axis in zip(right, w_spec, axes)
               if letter not in out and axis != "embed")
  finer = finer_than_length(rules, over)
  if finer:
    place["T"] = rules("residual")[0]
  dim = axes.index("embed") if "embed" in axes else None

  def local(x, w):
    if dim is not None:
      w = gather_embed(rules, w, w_spec, dim)
    b, t = x.shape[:2]
    y = multiply(f"{left},{right}->{out}".replace("BT", "C"), x.reshape(b * t, *x.shape[2:]), w, n_turned)
    y = y.reshape(b, t, *y.shape[1:])
    return sum_over(y, over, finer)

  if dim is not None:
    place[right[dim]] = None
  spec = jax.P(*(place[letter] for letter in out))
  y = on_devices(local, (x_spec, w_spec), spec)(x, w)
  to_residual = dim is not None and out[2:] == right[dim] and place["T"] != rules("residual")[0]
  return jax.sharding.reshard(y, rules("batch", "residual", None)) if to_residual else y


def embed_shards(cfg, param):
  """(the parameter in the compute dtype, its spec), still split over those axes of "embed" that split tokens
  too: `gather_embed` puts it together on the device."""
  rules = dataclasses.replace(cfg.rules, embed=token_axes(cfg.rules))
  spec = rules(*param.get_metadata()["axes"])
  return jax.sharding.reshard(param[...].astype(cfg.compute_dtype), spec), spec


def gather_embed(rules, w, spec, dim):
  """Inside on_devices: w, split as `spec` says, with all of its dim "embed". Its gradient is scattered first,
  and then summed over the other devices that have tokens for it."""
  axes = several(token_axes(rules))
  others = tuple(axis for axis in rules.batch + rules.length if axis not in names(spec))
  w = jax.lax.pcast(w, others, to="varying") if others else w
  return jax.lax.all_gather(w, axes, axis=dim, tiled=True) if axes else w


def token_axes(rules) -> tuple[str, ...]:
  """Those axes of "embed" that split tokens too (FSDP): a parameter is gathered over them where it is
  used."""
  return tuple(axis for axis in rules.embed if axis in rules.batch + rules.length)


def several(axes) -> tuple[str, ...]:
  """Inside on_devices: the axes that have more than one device. XLA:CPU does not drop a collective of one."""
  return tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)


def finer_than_length(rules, over):
  """The axes of a sum that split the residual stream where they do not split the length."""
  n = len(rules.length)
  rest = rules.residual[n:]
  return rest if rules.residual[:n] == rules.length and set(rest) <= set(over) else ()


def sum_over(y, over, finer=()):
  """Inside on_devices: the sum over `over`, of which `finer` leave each device a part of dim 1."""
  if finer:
    y = jax.lax.psum_scatter(y, finer, scatter_dimension=1, tiled=True)
  rest = tuple(axis for axis in over if axis not in finer)
  return jax.lax.psum(y, rest) if rest and not is_alone() else y


def names(specs) -> tuple[str, ...]:
  """The mesh axes in entries of a PartitionSpec."""
  return tuple(a for spec in specs if spec is not None for a in ((spec,) if isinstance(spec, str) else spec))


def lift(v, ndim):
  """[D] -> [1, ..., 1, D]: broadcasting is written out."""
  return v.reshape((1,) * (ndim - v.ndim) + v.shape)


class RMSNorm(nnx.Module):
  """x / rms(x) * scale in float32 (arXiv:1910.07467), over the last dims, whose sizes are given."""

  def __init__(self, cfg, *dims):
    self.eps, self.over = cfg.norm_eps, tuple(range(-len(dims), 0))
    self.scale = nnx.Param(jnp.ones(dims, jnp.dtype(cfg.param_dtype)), axes=(None,) * len(dims))

  def __call__(self, x):
    x32 = x.astype(jnp.float32)  # The mean square of bf16 loses 3 digits.
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=self.over, keepdims=True) + self.eps)
    return (x32 * inverse * lift(self.scale[...].astype(jnp.float32), x.ndim)).astype(x.dtype)


class RMSNormPlus1(RMSNorm):
  """x / rms(x) * (1 + scale): weights decay towards 1 (Gemma)."""

  def __init__(self, cfg, *dims):
    super().__init__(cfg, *dims)
    self.scale = nnx.Param(jnp.zeros(dims, jnp.dtype(cfg.param_dtype)), axes=(None,) * len(dims))

  def __call__(self, x):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=self.over, keepdims=True) + self.eps)
    return (x32 * inverse * (1 + lift(self.scale[...].astype(jnp.float32), x.ndim))).astype(x.dtype)


class LayerNorm(nnx.Module):
  """(x - mean) / std * scale + bias in float32 (arXiv:1607.06450), over the last dims."""

  def __init__(self, cfg, *dims):
    self.eps, self.over = cfg.norm_eps, tuple(range(-len(dims), 0))
    self.scale = nnx.Param(jnp.ones(dims, jnp.dtype(cfg.param_dtype)), axes=(None,) * len(dims))
    self.bias = bias(cfg, dims, (None,) * len(dims))

  def __call__(self, x):
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=self.over, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=self.over, keepdims=True) + self.eps)
    scale, shift = (lift(p[...].astype(jnp.float32), x.ndim) for p in (self.scale, self.bias))
    return (centred * inverse * scale + shift).astype(x.dtype)


NORM = {"rmsnorm": RMSNorm, "rmsnorm_plus1": RMSNormPlus1, "layernorm": LayerNorm}


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

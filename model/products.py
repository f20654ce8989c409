"""Products of tokens and weights, and how weights lie in memory for them."""
import math

import jax
import jax.numpy as jnp

FEW = 16  # Tokens.


def multiply(equation, x, w, n_turned, **settings):
  """einsum(equation, x, w), where x and the result lead with tokens.

  Args:
    n_turned: of `turned(param)`. Then XLA:CPU multiplies few tokens fastest as w x (YNNPACK, 1.5 to 2 times);
      the barriers keep it from making x w of it, for which it would copy w turned back. More it multiplies
      fastest as x w (1.2 times), of matrices: YNNPACK knows nothing else.
  """
  inputs, out = equation.split("->")
  shared = set.intersection(*map(set, inputs.split(",")), out)
  if not n_turned or shared:
    return jnp.einsum(equation, x, w, **settings)
  n_in, kept = math.prod(w.shape[-n_turned:]), jax.lax.optimization_barrier
  x_CI, w_OI = x.reshape(-1, n_in), w.reshape(-1, n_in)
  if x_CI.shape[0] > FEW:
    y_CO = jnp.einsum("CI,OI->CO", x_CI, w_OI, **settings)
  else:
    y_CO = kept(jnp.matmul(w_OI, kept(x_CI.T), **settings)).T
  return y_CO.reshape(-1, *w.shape[:-n_turned])


def turned(param) -> int:
  """How many dims a product sums over, where they are the last of the parameter and not the first."""
  return param.get_metadata().get("n_turned", 0)


def turn(param) -> None:
  """Says of a parameter that its array is, or will be, turned: [in, ..., out, ...] -> [out, ..., in, ...].
  Those that are no matrix of `linear` stay as they are."""
  axes = param.get_metadata()["axes"]
  n_in = 1 if axes[0] == "embed" else len(axes) - 1 if axes[-1] == "embed" and "experts" not in axes else 0
  if len(axes) > 1 and n_in:
    param.set_metadata(axes=axes[n_in:] + axes[:n_in], n_turned=n_in)

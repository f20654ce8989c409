"""Rows times the matrix of their group, by name: what a mixture of experts is made of.

Shapes: M rows sorted by group, E groups, K in, N out. A product is a function
(x_MK, w_EKN, sizes_E) -> y_MN; rows past the last group, and their gradients, are undefined.
"""
import functools
import importlib

import jax
import jax.numpy as jnp

from model.kernels.platform import interpreted

LANES = 128


def ragged_dot(x_MK, w_EKN, sizes_E):
  """JAX's own. XLA multiplies all rows with all matrices on a CPU, and on TPU v6e."""
  # Sharding is said for JAX's look at one stage of a pipeline, where it infers none.
  return jax.lax.ragged_dot(x_MK, w_EKN, sizes_E, out_sharding=jax.P(None, None))


def megablox(x_MK, w_EKN, sizes_E):
  """JAX's Pallas kernels for TPU (jax.experimental.pallas.ops.tpu.megablox; arXiv:2211.15841)."""
  M, axes = x_MK.shape[0], _varying(x_MK, w_EKN, sizes_E)
  x_MK = jnp.pad(x_MK, ((0, -M % LANES), (0, 0)))
  return _megablox(*(_vary(a, axes) for a in (x_MK, w_EKN, sizes_E)))[:M]


@jax.custom_vjp
def _megablox(x_MK, w_EKN, sizes_E):
  dims = (*x_MK.shape, w_EKN.shape[2])
  return _kernel("gmm", dims, x_MK, w_EKN, sizes_E, preferred_element_type=x_MK.dtype)


def _megablox_backward(saved, g_MN):
  (x_MK, w_EKN, sizes_E), (M, N) = saved, g_MN.shape
  K = x_MK.shape[1]
  dx_MK = _kernel("gmm", (M, N, K), g_MN, w_EKN, sizes_E, preferred_element_type=x_MK.dtype,
                  transpose_rhs=True)
  dw_EKN = _kernel("tgmm", (M, K, N), x_MK.T, g_MN, sizes_E, preferred_element_type=w_EKN.dtype)
  return dx_MK, dw_EKN, None


_megablox.defvjp(lambda *args: (_megablox(*args), args), _megablox_backward)


def _kernel(name, dims, *args, **settings):
  """The kernels do not say over which mesh axes their results vary, as a shard_map that checks it must know.
  Here a shard_map that does not stands around each alone, and splits nothing."""
  # Imported when needed, as in splash.py; as an attribute of its package the name is another's.
  kernels = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
  kernel = functools.partial(getattr(kernels, name), tiling=_tiles(args[0].dtype, *dims),
                             interpret=interpreted(), **settings)
  if jax.sharding.get_abstract_mesh().empty:
    return kernel(*args)
  out = jax.shard_map(kernel, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)(*args)
  return _vary(out, _varying(*args))


def _tiles(dtype, M, K, N):
  """Two of each operand and the float32 sum fit the 16 MiB that a core gives a kernel."""
  width = 2048 // dtype.itemsize
  wide = lambda n: min(width, -(-n // LANES) * LANES)
  return next(size for size in (512, 256, LANES) if M % size == 0), wide(K), wide(N)


def _varying(*arrays):
  return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def _vary(a, axes):
  missing = tuple(axes - _varying(a))
  return jax.lax.pcast(a, missing, to="varying") if missing else a


GROUPED = {"ragged_dot": ragged_dot, "megablox": megablox}

"""How tokens reach experts on other devices. Runs on each device, inside model.sharding.on_devices.

An exchange takes the mesh axes that split the experts, of which device i has n_local from i * n_local on, and
a dispatch of model.moe, whose first arguments are bound:
dispatch(x_nD, ids_nk, weights_nk, n_experts, n_groups, move) -> (y_nD, dropped).
"""
import functools

import jax
import jax.numpy as jnp


def gather(axes, n_local, dispatch, x_nD, ids_nk, weights_nk):
  """Every device sees the tokens of all and does what its own experts have to do with them."""
  all_x, all_ids, all_weights = (
      jax.lax.all_gather(a, axes, tiled=True) for a in (x_nD, ids_nk, weights_nk))
  ids = all_ids - jax.lax.axis_index(axes) * n_local
  ids = jnp.where((ids >= 0) & (ids < n_local), ids, n_local)
  y, dropped = dispatch(all_x, ids, all_weights, n_local, n_groups=jax.lax.axis_size(axes))
  return jax.lax.psum_scatter(y, axes, tiled=True), dropped


def all_to_all(axes, n_local, dispatch, x_nD, ids_nk, weights_nk):
  """Rows [E, C, D] of equal room go to the experts (GShard, arXiv:2006.16668), and come back."""
  n_devices = jax.lax.axis_size(axes)

  def move(rows_ECD, sizes):
    there = jax.lax.all_to_all(rows_ECD, axes, 0, 1, tiled=True)
    return there, sizes, lambda rows_eCD: jax.lax.all_to_all(rows_eCD, axes, 1, 0, tiled=True)

  return dispatch(x_nD, ids_nk, weights_nk, n_local * n_devices, move=move)


def ragged(axes, n_local, dispatch, x_nD, ids_nk, weights_nk):
  """Only the rows that are there travel, their numbers first.

  Any device may be sent all rows of all: what it receives into has room for that, [devices n k, D]. Memory is
  the price of dropping nothing, as shapes are static.
  """
  n_devices = jax.lax.axis_size(axes)

  def move(rows_mD, sizes_E):
    """Rows sorted by expert -> those of this device's experts, sorted by expert."""
    m = rows_mD.shape[0]
    sizes_sde = jax.lax.all_gather(sizes_E, axes).reshape(n_devices, n_devices, n_local)
    counts_sd = sizes_sde.sum(-1)
    got = shift(rows_mD, counts_sd, n_devices * m, axes)
    # By device they came, and then by expert.
    sizes_se = jax.lax.dynamic_index_in_dim(sizes_sde, jax.lax.axis_index(axes), 1, keepdims=False)
    ends = jnp.cumsum(sizes_se.reshape(-1))
    part = jnp.searchsorted(ends, jnp.arange(n_devices * m), side="right")
    expert = jnp.where(part < ends.shape[0], part % n_local, n_local)
    order = jnp.argsort(expert, stable=True)
    place = jnp.argsort(order)

    def back(rows):
      return shift(take(rows, place, order[:, None]), counts_sd.T, m, axes)

    return take(got, order, place[:, None]), sizes_se.sum(0), back

  return dispatch(x_nD, ids_nk, weights_nk, n_local * n_devices, move=move)


# name -> (axes, n_local, dispatch, x_nD, ids_nk, weights_nk) -> (y_nD, how many pairs were not computed).
EXCHANGE = {"gather": gather, "all_to_all": all_to_all, "ragged": ragged}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def shift(rows_mD, counts_sd, size, axes):
  """Device s sends counts_sd[s, d] rows to device d. Its rows lie by d; what arrives lies by s, then zeros.

  Args:
    counts_sd: the same on all devices.
    size: rows to make room for.
  """
  me, counts_sd = jax.lax.axis_index(axes), counts_sd.astype(jnp.int32)
  before = lambda counts, axis: jnp.cumsum(counts, axis) - counts
  mine = lambda table: jax.lax.dynamic_index_in_dim(table, me, 0, keepdims=False)
  start, at = mine(before(counts_sd, 1)), mine(before(counts_sd, 0))
  out = jnp.zeros_like(rows_mD, shape=(size, *rows_mD.shape[1:]))
  # XLA:CPU has none (jax issue 34755).
  return jax.lax.platform_dependent(
      rows_mD, out, start, mine(counts_sd), at, mine(counts_sd.T),
      cpu=functools.partial(emulated_ragged_all_to_all, axis_name=axes),
      default=functools.partial(jax.lax.ragged_all_to_all, axis_name=axes))


def _shift_forward(rows_mD, counts_sd, size, axes):
  return shift(rows_mD, counts_sd, size, axes), (rows_mD[:, :0], counts_sd)


def _shift_backward(size, axes, saved, g):
  rows, counts_sd = saved
  return shift(g, counts_sd.T, rows.shape[0], axes), None


shift.defvjp(_shift_forward, _shift_backward)


def emulated_ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *,
                               axis_name):
  """What jax.lax.ragged_all_to_all is documented to do, by gathering everything."""
  del recv_sizes  # Of device s it is send_sizes of s for this device.
  me, row = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
  operands, starts, sizes, ats = (
      jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets))
  for s in range(jax.lax.axis_size(axis_name)):
    i = row - ats[s, me]
    sent = operands[s].at[starts[s, me] + i].get(mode="fill", fill_value=0)
    hit = ((i >= 0) & (i < sizes[s, me])).reshape(-1, *[1] * (output.ndim - 1))
    output = jnp.where(hit, sent, output)
  return output


@jax.custom_vjp
def take(v_mD, index_p, inverse_mr):
  """v[index], zeros where the index is past the end. Its gradient is a take too, where JAX would scatter.

  Args:
    inverse_mr: the places of the result that read row m; past the end where there are fewer than r.
  """
  return v_mD.at[index_p].get(mode="fill", fill_value=0)


def _take_backward(inverse_mr, g_pD):
  rows_mrD = g_pD.at[inverse_mr].get(mode="fill", fill_value=0)
  return rows_mrD.sum(1), None, None


take.defvjp(lambda v, index, inverse: (take(v, index, inverse), inverse), _take_backward)

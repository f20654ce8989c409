"""Weights from a checkpoint to where decode reads them: one array a layer, turned and cast. Nothing else that
is as large as the model is in memory on the way."""
import collections
import math
import mmap

import jax
import numpy as np

from model.hub.orbax import STATE, CheckpointError, Unread
from model.hub.store import StateReader
from model.sharding import place
from model.transformer import JOINED, Turns, layer_place, stack_dims


def read_weights(cfg, mesh, unread: Unread, shapes, turns: Turns | None):
  """What `model.transformer.make_unstack(cfg, turns)` makes of the parameters, cast as infer.load.cast_params
  does.

  Args:
    shapes: of the result, as (params, layers).

  Raises:
    CheckpointError: the files cannot be read.
  """
  try:
    return _read_all(cfg, mesh, unread, shapes, turns)
  except (OSError, ValueError) as e:  # TensorStore's.
    raise CheckpointError(f"{unread.step_dir} cannot be read: {e}") from None


def _read_all(cfg, mesh, unread, shapes, turns):
  reader = StateReader(unread.step_dir / STATE, cache=0)
  params, layers = shapes
  begun, made = collections.deque(), []

  def begin(sources, *how):
    begun.append(_begin(reader, mesh, [f"{unread.which}/{name}" for name in sources], *how))
    if len(begun) > 1:  # One is read while the one before is put on the devices.
      made.append(begun.popleft()())

  stacks = collections.defaultdict(list)
  for n in range(cfg.n_layers):
    stacks[layer_place(cfg, n)[:2]].append(n)
  alone, alone_tree = jax.tree_util.tree_flatten_with_path(
      {name: a for name, a in params.items() if name not in ("first_blocks", "blocks")})
  for path, leaf in alone:
    name = _name(path)
    begin([name], 0, int(turns is not None and name in turns.heads), [leaf])
  for (blocks, i), ns in stacks.items():
    n_turned = jax.tree.leaves(turns.layers[ns[0]] if turns else jax.tree.map(lambda _: 0, layers[ns[0]]))
    of_layers = zip(*(jax.tree.leaves(layers[n]) for n in ns))
    for (path, _), n, leaves in zip(jax.tree_util.tree_leaves_with_path(layers[ns[0]]), n_turned, of_layers):
      name = f"{blocks}/{i}/{_name(path)}"
      joined = JOINED if turns and turns.are_joined and name.endswith("/attention/wq") else (path[-1].key,)
      begin([f"{name.rpartition('/')[0]}/{each}" for each in joined], stack_dims(cfg, name), n, leaves)
  made += [end() for end in begun]

  whole = alone_tree.unflatten([leaf for leaf, in made[:len(alone)]])
  nothing = lambda a: jax.device_put(np.zeros(a.shape, a.dtype), place(mesh, jax.P()))
  stubs = {name: jax.tree.map(nothing, stub) for name, stub in params.items() if name not in whole}
  by_layer, at = [None] * cfg.n_layers, len(alone)
  for ns in stacks.values():
    tree = jax.tree.structure(layers[ns[0]])
    for n, leaves in zip(ns, zip(*made[at:at + tree.num_leaves])):
      by_layer[n] = tree.unflatten(leaves)
    at += tree.num_leaves
  return {**whole, **stubs}, by_layer


def _begin(reader, mesh, names, n_lead, n_turned, leaves):
  """Begins to read arrays of the checkpoint, beside each other if they are several: a function that waits for
  them, and returns `leaves`, which are their parts along n_lead dims."""
  lead, shape, dtype = reader.shape(names[0])[:n_lead], leaves[0].shape, leaves[0].dtype
  sharding = place(mesh, leaves[0].sharding.spec)
  parts, of_device = {}, {}  # What several devices hold is read once.
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    bounds = tuple(cut.indices(n)[:2] for cut, n in zip(index, shape))
    of_device[device] = bounds
    if bounds in parts:
      continue
    into = _empty((*lead, *(stop - start for start, stop in bounds)), dtype)
    index = (*index[len(index) - n_turned:], *index[:len(index) - n_turned])
    as_stored = np.moveaxis(into, range(-n_turned, 0), range(n_lead, n_lead + n_turned))
    reading, at = [], 0
    for name in names:
      n = reader.shape(name)[n_lead + n_turned] if len(names) > 1 else None
      beside = (slice(None),) * (n_lead + n_turned) + (slice(at, n and at + n),)
      reading.append(reader.read_into(name, (slice(None),) * n_lead + index, as_stored[beside]))
      at += n or 0
    parts[bounds] = into, reading

  def end():
    by_part = {}
    for bounds, (into, reading) in parts.items():
      for each in reading:
        each.result()
      by_part[bounds] = into.reshape(-1, *into.shape[n_lead:])
    return [jax.make_array_from_single_device_arrays(
      shape, sharding, [jax.device_put(by_part[bounds][n], device) for device, bounds in of_device.items()])
      for n in range(len(leaves))]

  return end


def _empty(shape, dtype):
  """Begins at a page: XLA:CPU takes such memory as it is, and copies nothing. NumPy would ask for huge pages,
  which a virtual machine has to get from its host (0.5 s of the start for half a gigabyte)."""
  size = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
  memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)


def _name(path):
  return "/".join(str(k.key) for k in path)

"""Which slice of which leaf of ours is which tensor of theirs: one list, read by import and by export."""
import dataclasses
import functools
import math
import typing

import jax
import numpy as np

from model.hub.errors import HubError
from model.hub.family import Family, Piece
from model.hub.store import chunk_shape, name_params
from model.sharding import MESH_AXES
from model.transformer import abstract_params, layer_place, stack_dims

NEVER_CAST = ("balance_bias",)  # Stays float32 in theirs too.


class Part(typing.NamedTuple):
  """One piece of one layer (and expert), with its sizes.

  Attributes:
    leaf: name in the checkpoint, without its first part: "blocks/0/attention/wq".
    where: index of the layer (and expert) in the leaf; () outside of the layers.
    shape: of ours there, without what pads the vocabulary.
    their_shape: of what the move makes of it.
  """
  piece: Piece
  leaf: str
  where: tuple[int, ...]
  shape: tuple[int, ...]
  their_shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
  """
  Attributes:
    leaves: name -> ShapeDtypeStruct of ours.
    tensors: their name -> its parts, side by side.
    chunks: name of a leaf -> the shape of what a write should cover.
  """
  leaves: dict
  tensors: dict[str, list[Part]]
  chunks: dict

  def shape(self, name: str) -> tuple[int, ...]:
    """Of one of their tensors."""
    return flat_shape(joined_shape(self.tensors[name]))

  def dtype(self, name: str):
    return self.leaves[self.tensors[name][0].leaf].dtype


def make_plan(family: Family, cfg) -> Plan:
  """Raises HubError where the family's list and the model's parameters are not the same: a fault of ours, or
  a model that the family cannot say."""
  leaves = _find_leaves(cfg)
  tensors, chunks, seen = {}, {}, {}
  for n in (None, *range(cfg.n_layers)):
    for piece in family.top(cfg) if n is None else family.layer(cfg, n):
      for part in _parts(cfg, leaves, piece, n):
        e = part.where[-1] if "{e}" in piece.theirs else None
        tensors.setdefault(piece.theirs.format(n=n, e=e), []).append(part)
        leaf = leaves[part.leaf]
        seen[part.leaf] = seen.get(part.leaf, 0) + 1
        axis = 0 if piece.move.axis is None else piece.move.axis
        chunks.setdefault(part.leaf, chunk_shape(leaf, len(part.where), axis))
  wrong = [name for name, leaf in leaves.items()
           if seen.get(name, 0) != math.prod(leaf.shape[:len(_lead(tensors, name))])]
  if wrong:
    raise HubError(f"{family.name} has no tensors for these parameters of the model: {', '.join(wrong[:8])}")
  return Plan(leaves, tensors, chunks)


@functools.lru_cache(maxsize=4)
def _find_leaves(cfg):
  """Tracing a block takes longer than moving a small one."""
  _, params = abstract_params(cfg, jax.sharding.AbstractMesh((1,) * len(MESH_AXES), MESH_AXES))
  return {name.removeprefix("params/"): leaf for name, leaf in name_params(params).items()}


def _lead(tensors, name):
  return next((part.where for parts in tensors.values() for part in parts if part.leaf == name), ())


def _parts(cfg, leaves, piece, n):
  """The piece of layer n (None: outside), once or for each expert."""
  if n is None:
    name, where = piece.ours, ()
  else:
    blocks, i, pick = layer_place(cfg, n)
    name = f"{blocks}/{i}/{piece.ours}"
    index = pick(_Index())
    where = index if isinstance(index, tuple) else (index,)
    assert len(where) == stack_dims(cfg, name)
  if name not in leaves:
    raise HubError(f"the model has no parameter {name} for {piece.theirs}")
  experts = range(cfg.n_experts) if "{e}" in piece.theirs else (None,)
  for e in experts:
    at = where if e is None else (*where, e)
    shape = leaves[name].shape[len(at):]
    if piece.ours in ("embed", "unembed"):
      shape = tuple(cfg.vocab_size if size == cfg.padded_vocab_size else size for size in shape)
    yield Part(piece, name, at, shape, _their_shape(piece.move, shape))


class _Index:
  """Says what it is indexed by."""

  def __getitem__(self, index):
    return index


@functools.cache
def _their_shape(move, shape):
  return jax.eval_shape(move.to_theirs, jax.ShapeDtypeStruct(shape, np.float32)).shape


def joined_shape(parts: list[Part]) -> tuple[int, ...]:
  """Of the parts side by side, before the dims in front become one."""
  shape, join = list(parts[0].their_shape), parts[0].piece.join
  if join is not None:
    shape[join] = sum(part.their_shape[join] for part in parts)
  return tuple(shape)


def flat_shape(shape):
  return shape if len(shape) <= 2 else (math.prod(shape[:-1]), shape[-1])


def compare(plan: Plan, tensors: dict, ignored=lambda name: False, tied: str | None = None) -> list[str]:
  """A line for each tensor that is missing, left over or of another shape; [] if they are the family's.

  Args:
    tensors: name -> what has a shape.
    tied: a tensor that may be there or not.
  """
  missing = [f"missing: {name} {list(plan.shape(name))}" for name in plan.tensors if name not in tensors]
  left = [f"left over: {name} {list(t.shape)}" for name, t in tensors.items()
          if name not in plan.tensors and not ignored(name) and name != tied]
  other = [f"{name} is {list(tensors[name].shape)}, the settings say {list(plan.shape(name))}"
           for name in plan.tensors if name in tensors and tuple(tensors[name].shape) != plan.shape(name)]
  return missing + left + other


# Moving. `read` is (start row, stop row) -> rows of theirs; bands are as long as a chunk of ours.

def bands(plan: Plan, part: Part):
  """(start, stop) on the axis of the move, in steps of whole chunks; (None, None) where it has none."""
  axis = part.piece.move.axis
  if axis is None:
    yield None, None
    return
  step, n = plan.chunks[part.leaf][len(part.where) + axis], part.shape[axis]
  for start in range(0, n, step):
    yield start, min(start + step, n)


def import_tensor(plan: Plan, name: str, tensor, write) -> None:
  """Moves one of theirs into ours.

  Args:
    tensor: has read(start, stop).
    write: (leaf, index, values).
  """
  parts = plan.tensors[name]
  if parts[0].piece.join not in (None, 0):  # Side by side in each row: small enough to read at once.
    x = tensor.read().reshape(joined_shape(parts))
    ends = np.cumsum([part.their_shape[part.piece.join] for part in parts])
    for part, own in zip(parts, np.split(x, ends[:-1], axis=parts[0].piece.join)):
      write(part.leaf, part.where, _fit(plan, part, part.piece.move.to_ours(own, part.shape), None, None))
    return
  first = 0
  for part in parts:
    rows, axis = part.their_shape[0], part.piece.move.axis
    for start, stop in bands(plan, part):
      if axis is None:
        x, shape = tensor.read(first, first + rows), part.shape
      else:
        unit = rows // part.shape[axis]
        x = tensor.read(first + start * unit, first + stop * unit)
        shape = (*part.shape[:axis], stop - start, *part.shape[axis + 1:])
      values = _fit(plan, part, part.piece.move.to_ours(x, shape), start, stop)
      index = list(part.where)
      if axis is not None:
        index += [slice(None)] * axis + [slice(start, start + values.shape[axis])]
      write(part.leaf, tuple(index), values)
    first += rows



def _fit(plan, part, values, start, stop):
  """In our dtype; the last rows of a vocabulary are followed by the zeros that pad it."""
  leaf, axis = plan.leaves[part.leaf], part.piece.move.axis
  values = values.astype(leaf.dtype)
  if axis is not None and stop == part.shape[axis] != leaf.shape[len(part.where) + axis]:
    pad = [(0, 0)] * values.ndim
    pad[axis] = (0, leaf.shape[len(part.where) + axis] - stop)
    values = np.pad(values, pad)
  return values


def export_rows(plan: Plan, name: str, read):
  """Yields one of theirs, rows after rows.

  Args:
    read: (leaf, index) -> array.
  """
  parts = plan.tensors[name]
  crop = lambda part: tuple(slice(0, size) for size in part.shape)
  if parts[0].piece.join not in (None, 0):
    arrays = [part.piece.move.to_theirs(read(part.leaf, (*part.where, *crop(part)))) for part in parts]
    yield np.concatenate(arrays, axis=parts[0].piece.join)
    return
  for part in parts:
    for start, stop in bands(plan, part):
      index = list(crop(part))
      if start is not None:
        index[part.piece.move.axis] = slice(start, stop)
      yield part.piece.move.to_theirs(read(part.leaf, (*part.where, *index)))

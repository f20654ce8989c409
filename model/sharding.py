"""Logical axes -> mesh axes. The only file that names mesh axes."""
import dataclasses
import math

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# Slow to fast links. Unused axes have size 1; none is ever absent.
MESH_AXES = ("stage", "data", "fsdp", "expert", "seq", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AxisRules:
  """What a dimension is -> the mesh axes it is split over; () means replicated.

  Static and hashable, and a field of ModelConfig, so it is part of every jit cache key.
  """
  batch: tuple[str, ...] = ("data", "fsdp", "expert")
  length: tuple[str, ...] = ("seq",)
  vocab: tuple[str, ...] = ("tensor",)
  embed: tuple[str, ...] = ("fsdp",)
  heads: tuple[str, ...] = ("tensor",)
  kv_heads: tuple[str, ...] = ("tensor",)
  mlp: tuple[str, ...] = ("tensor",)

  def __call__(self, *axes: str | None) -> PartitionSpec:
    """rules("batch", None, "heads") -> P(("data", "fsdp", "expert"), None, "tensor")."""
    return PartitionSpec(*(self._one(a) for a in axes))

  def _one(self, axis):
    names = () if axis is None else getattr(self, axis)
    return None if not names else names[0] if len(names) == 1 else names


TRAIN = AxisRules()
DECODE = AxisRules(embed=(), length=())  # Weights stay gathered over "fsdp".


def mesh_shape(sizes: dict, n_devices: int) -> tuple[int, ...]:
  """Sizes by axis name, of which one may be -1 (what is left), -> a shape over MESH_AXES.

  Raises:
    ValueError: unknown axes, or sizes whose product is not the number of devices.
  """
  if unknown := sizes.keys() - set(MESH_AXES):
    raise ValueError(f"unknown mesh axes {sorted(unknown)}; known: {MESH_AXES}")
  shape = [sizes.get(a, 1) for a in MESH_AXES]
  fixed = math.prod(s for s in shape if s != -1)
  if -1 in shape and n_devices % fixed == 0:
    shape[shape.index(-1)] = n_devices // fixed
  if math.prod(shape) != n_devices:
    raise ValueError(f"mesh {sizes} needs {fixed} devices or a multiple; this run has {n_devices}")
  return tuple(shape)


def make_mesh(**sizes: int) -> jax.sharding.Mesh:
  """make_mesh(fsdp=-1, tensor=2) over all devices of all processes, with Explicit axes."""
  shape = mesh_shape(sizes, jax.device_count())
  return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def abstract_mesh(**sizes: int) -> jax.sharding.AbstractMesh:
  """The mesh of a machine that is not here: enough to trace and check a step, with no devices."""
  shape = mesh_shape(sizes, math.prod(sizes.values()))
  return jax.sharding.AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def place(mesh, spec) -> NamedSharding:
  return NamedSharding(mesh, spec)

"""Logical axes -> mesh axes. The only file that names mesh axes."""
import contextlib
import contextvars
import dataclasses
import math

import jax
from jax.custom_batching import custom_vmap
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from model.kernels.platform import choose, platform

# Slow to fast links. Unused axes have size 1; none is ever absent.
MESH_AXES = ("stage", "data", "fsdp", "expert", "seq", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AxisRules:
  """What a dimension is -> the mesh axes it is split over; () means replicated.

  Static and hashable, and a field of ModelConfig, so it is part of every jit cache key.
  """
  batch: tuple[str, ...] = ("data", "fsdp", "expert")
  length: tuple[str, ...] = ("seq",)
  residual: tuple[str, ...] = ("seq",)  # The length of the residual stream and norms: length, or finer.
  loss_length: tuple[str, ...] = ("seq", "stage")  # The length where the head and the loss run.
  vocab: tuple[str, ...] = ("tensor",)
  embed: tuple[str, ...] = ("fsdp",)
  heads: tuple[str, ...] = ("tensor",)
  kv_heads: tuple[str, ...] = ("tensor",)
  mlp: tuple[str, ...] = ("tensor",)
  experts: tuple[str, ...] = ("expert",)
  layers: tuple[str, ...] = ("stage",)
  gradient: tuple[str, ...] = ("fsdp",)  # "embed" of gradients (ZeRO-2) and of optimizer state (ZeRO-1),
  moment: tuple[str, ...] = ("fsdp",)  # which may be split where the parameters are not.

  def __call__(self, *axes: str | None) -> PartitionSpec:
    """rules("batch", None, "heads") -> P(("data", "fsdp", "expert"), None, "tensor")."""
    return PartitionSpec(*(self._one(a) for a in axes))

  def _one(self, axis):
    names = () if axis is None else getattr(self, axis)
    return None if not names else names[0] if len(names) == 1 else names


TRAIN = AxisRules()
DECODE = AxisRules(embed=(), length=(), residual=(), layers=())  # Weights stay gathered over "fsdp".


def ways(mesh, axes: tuple[str, ...]) -> int:
  """Over how many devices a dimension is split that lives on these axes of the mesh."""
  return math.prod(mesh.shape[axis] for axis in axes)


def fit(cfg, mesh):
  """The ModelConfig for this mesh: kv heads that cannot be split as the heads are kept by every device, which
  uses those that its query heads need (model.attention); without stages the layers are one stack to scan
  over; kernels that are "auto" get their names (model.kernels.platform)."""
  rules = cfg.rules
  if rules.kv_heads != rules.heads or cfg.n_kv_heads % ways(mesh, rules.kv_heads):
    rules = dataclasses.replace(rules, kv_heads=())
  if ways(mesh, rules.layers) == 1:
    rules = dataclasses.replace(rules, layers=())
  return choose(dataclasses.replace(cfg, rules=rules), platform(mesh), ways(mesh, rules.length))


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


def make_mesh(*, slices: int = 1, slice_axis: str = "data", devices=None, **sizes: int) -> jax.sharding.Mesh:
  """make_mesh(fsdp=-1, tensor=2) over all devices of all processes, with Explicit axes.

  Args:
    devices: others than those, e.g. of a machine that is not here (train.rehearse).
    slices: groups of devices with a slow network between them: as the devices know them, on CPUs the
      processes. `slice_axis`, whose size they divide, is the axis that goes over it, slices varying slowest.

  Raises:
    ValueError: another number of devices, or of slices.
  """
  devices = jax.devices() if devices is None else devices
  shape, types = mesh_shape(sizes, len(devices)), (AxisType.Explicit,) * len(MESH_AXES)
  if slices == 1:  # Where a mesh axis is no product of sides of the TPUs' torus, it takes parts of sides.
    devices = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(devices, MESH_AXES, axis_types=types)
  over = tuple(slices if axis == slice_axis else 1 for axis in MESH_AXES)
  within = tuple(n // slow for n, slow in zip(shape, over))
  by_process = devices[0].platform == "cpu"
  there = len({device.process_index if by_process else device.slice_index for device in devices})
  if there != slices:
    raise ValueError(f"mesh.slices={slices}, but this run has {there} "
                     f"{'processes' if by_process else 'slices'}; nearest valid: {there}")
  devices = mesh_utils.create_hybrid_device_mesh(
      within, over, devices, process_is_granule=by_process, allow_split_physical_axes=True)
  return jax.sharding.Mesh(devices, MESH_AXES, axis_types=types)


def abstract_mesh(*, on: str | None = None, **sizes: int) -> jax.sharding.AbstractMesh:
  """The mesh of a machine that is not here: enough to trace and check a step, with no devices.

  Args:
    on: cpu | gpu | tpu, where a kernel is chosen by that.
  """
  shape = mesh_shape(sizes, math.prod(sizes.values()))
  device = on and jax.sharding.AbstractDevice(device_kind=on, num_cores=None, platform=on)
  return jax.sharding.AbstractMesh(
      shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES), abstract_device=device)


def place(mesh, spec) -> NamedSharding:
  return NamedSharding(mesh, spec)


_STAGED = contextvars.ContextVar("staged", default=False)


@contextlib.contextmanager
def staged(on: bool = True):
  """What is traced inside is under a vmap over the pipeline's stages (model.pipeline)."""
  token = _STAGED.set(on)
  try:
    yield
  finally:
    _STAGED.reset(token)


def is_staged() -> bool:
  return _STAGED.get()


def is_alone() -> bool:
  """Whether the mesh is one device: XLA:CPU does not drop a collective of one."""
  return jax.sharding.get_abstract_mesh().size == 1


def on_devices(f, in_specs: tuple, out_specs, *, check_vma: bool = True):
  """jax.shard_map(f) over all axes of the mesh, for code with its hands on the wire. Inside a pipeline each
  device runs `f` for its own stage.

  JAX's own batching of shard_map under explicit axes would gather the stages (seen with jax 0.10.2), so the
  rule is ours: the mapped dim goes to the front, split over "stage".

  Args:
    in_specs: one PartitionSpec per array, in a tree like f's arguments.
  """
  check_vma = check_vma and not is_alone()  # What varies over axes of one device would have to be summed.
  whole = lambda f, ins, outs: jax.shard_map(f, in_specs=ins, out_specs=outs, check_vma=check_vma)
  if not _STAGED.get():
    return whole(f, in_specs, out_specs)
  in_front = lambda spec: PartitionSpec("stage", *spec.partitions, unreduced=spec.unreduced)
  is_spec = lambda x: isinstance(x, PartitionSpec)

  @custom_vmap
  def call(*args):
    return whole(f, in_specs, out_specs)(*args)

  @call.def_vmap
  def staged_call(n_stages, batched, *args):
    batched = tuple(batched)

    def own_stage(*args):
      args = jax.tree.map(lambda b, a: jax.lax.squeeze(a, (0,)) if b else a, batched, args)
      return jax.tree.map(lambda a: a[None], f(*args))

    ins = jax.tree.map(lambda spec, b: in_front(spec) if b else spec, in_specs, batched, is_leaf=is_spec)
    outs = jax.tree.map(in_front, out_specs, is_leaf=is_spec)
    result = whole(own_stage, ins, outs)(*args)
    return result, jax.tree.map(lambda _: True, result)

  return call

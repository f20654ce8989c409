"""Where the program that is being traced will run."""
import jax


def platform(mesh=None) -> str:
  """cpu | gpu | tpu: of the mesh's devices, by default the mesh that is set, else JAX's own. A mesh without
  devices is of no platform: ''."""
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else getattr(mesh, "abstract_mesh", mesh)
  if not mesh.empty:
    return mesh.abstract_device.platform if mesh.abstract_device is not None else ""
  return jax.default_backend()


def interpreted() -> bool:
  """Whether Pallas kernels for TPU are to be run by their definition."""
  return platform() != "tpu"

"""Where the program that is being traced will run, and which kernels that is a reason for."""
import dataclasses

import jax

AUTO = "auto"


def platform(mesh=None) -> str:
  """cpu | gpu | tpu: of the mesh's devices, by default the mesh that is set, else JAX's own. A mesh without
  devices is of no platform: ''."""
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else getattr(mesh, "abstract_mesh", mesh)
  if not mesh.empty:
    return mesh.abstract_device.platform if mesh.abstract_device is not None else ""
  return jax.default_backend()


def choose(cfg, on: str, row_ways: int):
  """The ModelConfig with names for "auto": what can serve it there.

  Args:
    on: as `platform` gives it.
    row_ways: over how many devices a row is split.
  """
  on_tpu, chosen = on == "tpu", {}
  if cfg.attention_impl == AUTO:
    split = cfg.context if row_ways > 1 else None
    if split in ("ring", "zigzag"):
      name = "chunked"  # What they are made of.
    elif on_tpu:
      name = "splash" if split != "gather" else "chunked"
    else:  # dot_product is a [T, T] array to XLA, and the fastest where that fits.
      name = "dot_product" if cfg.attention_softcap is None else "chunked"
    chosen["attention_impl"] = name
  if cfg.grouped_impl == AUTO:
    chosen["grouped_impl"] = "megablox" if on_tpu else "ragged_dot"
  return dataclasses.replace(cfg, **chosen)


def interpreted() -> bool:
  """Whether Pallas kernels for TPU are to be run by their definition."""
  return platform() != "tpu"

"""Programs as they were traced, kept beside what was compiled of them: tracing is a quarter of the work of a
start that compiles nothing.

A program is found again by all that it is made of: the sources of `infer`, `model` and of every module that
was loaded from outside of Python's own folders, the versions of the libraries that trace, JAX's settings, the
mesh, the model's config, and the shapes of what it is given. It is kept as JAX exports it (jax.export).
"""
import hashlib
import importlib.metadata
import os
import pathlib
import site
import sys
import sysconfig

import jax
from jax import export

OURS = [pathlib.Path(__file__).parents[1] / name for name in ("infer", "model")]
LIBRARIES = "jax", "jaxlib", "flax", "numpy"


class Traced:
  """Usage:
    traced = Traced(cfg, mesh)
    lowered = traced.lower(function, 2, (weights, inputs, state), result=(state, made))
  """

  def __init__(self, cfg, mesh, folder: str | None = None):
    """folder: safe to run programs from (infer.compile_cache); None: the compile cache's. Where that is none,
    or a bucket, nothing is kept."""
    folder = folder or jax.config.jax_compilation_cache_dir
    self._folder = None if not folder or "://" in folder else pathlib.Path(folder)
    device = mesh.devices.flat[0]
    self._of = (
      _hash_sources(), sys.version, [importlib.metadata.version(name) for name in LIBRARIES],
      sorted((name, repr(value)) for name, value in jax.config.values.items() if "cache" not in name),
      mesh.shape_tuple, device.platform, device.device_kind, repr(cfg))

  def lower(self, function, donated: int, args: tuple, result) -> jax.stages.Lowered:
    """jax.jit(function, donate_argnums=donated).lower(*args), under the mesh.

    Args:
      args: trees of arrays, or of jax.ShapeDtypeStruct with shardings.
      result: a tree with the structure of what the function returns.
    """
    if self._folder is None:
      return jax.jit(function, donate_argnums=donated).lower(*args)
    name, structure = getattr(function, "func", function).__name__, jax.tree.structure(result)
    leaves, tree = jax.tree.flatten(args)
    given = [(a.shape, str(a.dtype), str(getattr(a.sharding, "spec", None))) for a in leaves]
    key = hashlib.sha256(repr((name, self._of, str(tree), str(structure), given)).encode()).hexdigest()
    file = self._folder / f"traced_{name}-{key}"
    if (exported := _read(file)) is None:

      def flat(*leaves):
        made = function(*tree.unflatten(leaves))
        assert jax.tree.structure(made) == structure, (jax.tree.structure(made), structure)
        return jax.tree.leaves(made)

      try:
        exported = export.export(jax.jit(flat))(*leaves)
      except (ValueError, NotImplementedError):  # Something of it cannot be kept.
        return jax.jit(function, donate_argnums=donated).lower(*args)
      _write(file, exported)

    def call(*args):
      return structure.unflatten(exported.call(*jax.tree.leaves(args)))

    call.__name__ = name
    return jax.jit(call, donate_argnums=donated).lower(*args)


def _hash_sources() -> str:
  files = {file for folder in OURS for file in folder.rglob("*.py")}
  installed = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
  installed += [*site.getsitepackages(), site.getusersitepackages()]
  installed = tuple(os.path.join(path, "") for folder in installed
                    for path in (os.path.abspath(folder), os.path.realpath(folder)))
  for module in [*sys.modules.values()]:
    path = os.path.abspath(getattr(module, "__file__", None) or "")
    if path.endswith(".py") and not path.startswith(installed):
      files.add(pathlib.Path(path))
  return hashlib.sha256(repr(sorted(map(_hash_source, files))).encode()).hexdigest()


def _hash_source(file):
  try:
    return file.name, hashlib.sha256(file.read_bytes()).hexdigest()
  except OSError:  # A module may have outlived it.
    return str(file), "gone"


def _read(file):
  """What was written there; None where there is nothing, or not all of it."""
  try:
    content = file.read_bytes()
  except OSError:
    return None
  if hashlib.sha256(content[32:]).digest() != content[:32]:
    return None
  return export.deserialize(bytearray(content[32:]))


def _write(file, exported):
  content = exported.serialize()
  part = file.with_name(f"{file.name}.{os.getpid()}")
  try:
    part.write_bytes(hashlib.sha256(content).digest() + content)
    part.replace(file)
  except OSError:  # It is only a cache.
    part.unlink(missing_ok=True)

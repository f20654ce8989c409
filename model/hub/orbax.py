"""Our own checkpoints, read: which there are, whether every byte is what was written, the arrays.

A run keeps them under DIR/checkpoints, which must be a file system (local, NFS, a mounted bucket):
  100/state/...      the arrays, in Orbax's format (OCDBT), readable by any Orbax
  100/meta.json      step, time, metrics, the resolved config and what else the run said of itself
  100/manifest.json  the length and SHA-256 of every other file; without it nothing is trusted
  200.saving         a save in progress, or one that a kill cut short (removed when the run goes on)
  200.damaged        a checkpoint that failed its manifest, set aside for a human
  100.deleting       an old checkpoint on its way out
`train.checkpoint` writes this; inference and the command line only read it.
"""
import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

STATE, META, MANIFEST = "state", "meta.json", "manifest.json"
MANIFEST_FORMAT = 1


class CheckpointError(RuntimeError):
  """A checkpoint cannot be written, or none of those that are there can be trusted."""


def find_checkpoints(path) -> pathlib.Path:
  """The folder that holds the steps, for a run's folder or that folder itself.

  Raises:
    FileNotFoundError: `path` does not exist, or has no checkpoints in it.
  """
  path = pathlib.Path(path)
  for root in (path / "checkpoints", path):
    if root.is_dir() and (root.name == "checkpoints" or find_steps(root)):
      return root
  what = "has no checkpoints in it" if path.exists() else "does not exist"
  raise FileNotFoundError(f"{path} {what}; give a run's folder, its checkpoints folder or one step")


def find_steps(root) -> list[int]:
  """The steps under `root` that were saved whole (if not damaged since), oldest first."""
  root = pathlib.Path(root)
  if not root.is_dir():
    return []
  return sorted(int(p.name) for p in root.iterdir() if p.name.isdecimal() and p.is_dir())


def is_step(path) -> bool:
  """Whether `path` is one checkpoint, however damaged."""
  return any((pathlib.Path(path) / name).exists() for name in (STATE, META, MANIFEST))


def read_meta(step_dir) -> dict:
  """What the run said about itself at this step: `step`, `time`, `metrics`, `config`, ..."""
  return json.loads((pathlib.Path(step_dir) / META).read_text())


# The manifest.

def write_manifest(step_dir) -> None:
  """Records every file of `step_dir`, and flushes them and the manifest to the disk."""
  step_dir = pathlib.Path(step_dir)
  hashed = _hash_files(step_dir, _list_files(step_dir), sync=True)
  files = {name: [size, digest] for name, size, digest in hashed}
  part = step_dir / (MANIFEST + ".part")
  with open(part, "w") as f:
    json.dump({"format": MANIFEST_FORMAT, "hash": "sha256", "files": files}, f, indent=1)
    f.flush()
    os.fsync(f.fileno())
  part.rename(step_dir / MANIFEST)
  for folder in {step_dir, *((step_dir / name).parent for name in files)}:
    sync_folder(folder)


def find_damage(step_dir) -> list[str]:
  """Compares a checkpoint with its manifest, each byte: a line per bad file, [] if all is well."""
  step_dir = pathlib.Path(step_dir)
  try:
    manifest = json.loads((step_dir / MANIFEST).read_text())
    files = {name: (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
    kind = manifest["format"], manifest["hash"]
    if kind != (MANIFEST_FORMAT, "sha256"):
      return [f"{MANIFEST}: of kind {kind}, which this version does not read"]
  except FileNotFoundError:
    return [f"{MANIFEST}: missing"]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    return [f"{MANIFEST}: unreadable ({type(e).__name__}: {e})"]
  present = set(_list_files(step_dir))
  damage = [f"{name}: missing" for name in sorted(files.keys() - present)]
  damage += [f"{name}: not in the manifest" for name in sorted(present - files.keys())]
  for name, size, digest in _hash_files(step_dir, sorted(files.keys() & present)):
    if isinstance(digest, OSError):
      damage.append(f"{name}: cannot be read ({digest})")
    elif size != files[name][0]:
      damage.append(f"{name}: {size} bytes, {files[name][0]} were written")
    elif digest != files[name][1]:
      damage.append(f"{name}: its {size} bytes are not those that were written (sha256 differs)")
  if damage or not step_dir.name.isdecimal():
    return damage
  step = read_meta(step_dir)["step"]
  return [] if step == int(step_dir.name) else [f"{META}: is of step {step}, not {step_dir.name}"]


def find_newest_good(root) -> tuple[pathlib.Path | None, list[tuple[int, str]]]:
  """(The newest checkpoint whose bytes are right, the newer ones that were rejected and why).

  Returns:
    (None, []) where nothing was ever saved.

  Raises:
    CheckpointError: there are checkpoints and every one is damaged. Starting from scratch is then a
      human's decision, never ours.
  """
  root, rejected = pathlib.Path(root), []
  for step in reversed(find_steps(root)):
    if not (damage := find_damage(root / str(step))):
      return root / str(step), rejected
    rejected.append((step, _shorten(damage)))
  if rejected:
    listing = "\n".join(f"  step {step}: {reason}" for step, reason in rejected)
    raise CheckpointError(f"every checkpoint under {root} is damaged:\n{listing}\n"
                          "Put a copy back, or move the folder away to start from scratch.")
  return None, []


def _list_files(step_dir):
  names = (p.relative_to(step_dir).as_posix() for p in step_dir.rglob("*") if not p.is_dir())
  return sorted(n for n in names if n not in (MANIFEST, MANIFEST + ".part"))


def _hash_files(step_dir, names, sync=False):
  """(name, bytes, hex digest) of each file; unless `sync`, an OSError may take the digest's place.

  SHA-256 runs at 1.8 GB/s a core where the processor has instructions for it (BLAKE2b 1.2, MD5 0.8)
  and releases the interpreter lock, so threads add up (two: 3.5) until the disk is the limit.
  """
  def hash_one(name):
    try:
      with open(step_dir / name, "rb", buffering=0) as f:
        digest = hashlib.file_digest(f, "sha256")
        size = f.tell()
        if sync:
          os.fsync(f.fileno())
    except OSError as e:
      if sync:
        raise
      return name, 0, e
    return name, size, digest.hexdigest()

  with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
    return list(pool.map(hash_one, names))


def sync_folder(path) -> None:
  """Makes the names in a folder survive a power cut."""
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def _shorten(lines, n=3):
  return "; ".join(lines[:n]) + (f"; and {len(lines) - n} more" if len(lines) > n else "")


# The arrays.

def leaf_name(path) -> str:
  """A jax key path -> "opt_state/0/mu/blocks/w"."""
  part = lambda k: str(next(getattr(k, a) for a in ("key", "name", "idx") if hasattr(k, a)))
  return "/".join(part(k) for k in path)


def read_tree(step_dir) -> dict:
  """Name -> Orbax's ArrayMetadata (shape, dtype, sharding) of each array, without reading it."""
  return _name_leaves(_read_metadata(step_dir))


def read_array(step_dir, name: str) -> np.ndarray:
  """One array of a checkpoint, by its name in `read_tree`; needs nothing of the run's code."""
  def choose(path, leaf):
    wanted = leaf_name(path) == name
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if wanted else ocp.PLACEHOLDER

  item = jax.tree_util.tree_map_with_path(choose, _read_metadata(step_dir))
  return _name_leaves(_restore(step_dir, item, partial=False))[name]


def restore_arrays(step_dir, abstract, *, partial: bool = False):
  """Reads the arrays of a checkpoint, whose manifest the caller has checked.

  Args:
    abstract: a pytree of jax.ShapeDtypeStruct. Where one has a sharding, the array is born with it,
      on any mesh; where it has none, a NumPy array is returned.
    partial: `abstract` may lack parts of what was saved; only what it names is read.

  Raises:
    ValueError: a name, shape or dtype differs; nothing is padded, cut or cast.
  """
  _check_fit(step_dir, abstract, partial)
  return _restore(step_dir, abstract, partial)


def restore_params(path, abstract_params, which: str = "params"):
  """`find_params`, read: (params, meta, rejected)."""
  found, *more = find_params(path, lambda: abstract_params, which)
  return found.read(), *more


@dataclasses.dataclass(frozen=True)
class Unread:
  """Parameters that are on the disk, every byte as it was written."""
  abstract: dict  # As `restore_arrays`'s.
  step_dir: pathlib.Path
  which: str

  def read(self):
    return _restore(self.step_dir, {self.which: self.abstract}, partial=True)[self.which]


def find_params(path, make_abstract, which: str = "params"):
  """The parameters alone, of the newest good checkpoint of a run; the optimizer is not read.

  Args:
    path: a run's folder, its checkpoints folder, or one step.
    make_abstract: () -> as `restore_arrays`'s `abstract`; called while every byte is read.
    which: "params", or "ema" for their moving average.

  Returns:
    (Unread, meta, rejected): `meta["step"]` is the step; `rejected` holds (step, reason) of the
    newer, damaged ones, for the caller to print.

  Raises:
    FileNotFoundError: nothing was saved there.
    CheckpointError: what was saved is damaged.
    ValueError: it is of another shape, or has no `which`.
  """
  with concurrent.futures.ThreadPoolExecutor(1) as beside:
    finding = beside.submit(_find_sound, path)
    abstract = make_abstract()
    step_dir, rejected = finding.result()
  _check_fit(step_dir, {which: abstract}, partial=True)
  return Unread(abstract, step_dir, which), read_meta(step_dir), rejected


def _find_sound(path):
  if not is_step(path):
    step_dir, rejected = find_newest_good(find_checkpoints(path))
    if step_dir is None:
      raise FileNotFoundError(f"{path} has no finished checkpoint yet")
    return step_dir, rejected
  if damage := find_damage(path):
    raise CheckpointError(f"{path} is damaged: {_shorten(damage)}")
  return pathlib.Path(path), []


def check_shapes(path, abstract_params, which: str = "params") -> None:
  """Raises ValueError, naming them, where arrays of the newest checkpoint are not as these. Reads none."""
  root = find_checkpoints(path)
  _check_fit(root / str(find_steps(root)[-1]), {which: abstract_params}, partial=True)


def _check_fit(step_dir, abstract, partial):
  if misfits := _find_misfits(read_tree(step_dir), _name_leaves(abstract), partial):
    raise ValueError(f"checkpoint {step_dir} does not fit: {_shorten(misfits, 8)}")


def _find_misfits(saved, wanted, partial):
  saved = {name: f"{a.dtype}{list(a.shape)}" for name, a in saved.items()}
  wanted = {name: f"{a.dtype}{list(a.shape)}" for name, a in wanted.items()}
  misfits = [f"{name} ({kind}) was not saved" for name, kind in wanted.items() if name not in saved]
  misfits += [f"{name} is {saved[name]} there, {kind} here" for name, kind in wanted.items()
              if saved.get(name, kind) != kind]
  if not partial:
    misfits += [f"{name} ({saved[name]}) has no place here" for name in saved if name not in wanted]
  return misfits


def _name_leaves(tree):
  return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _read_metadata(step_dir):
  with _reader() as reader:
    return reader.metadata(_state(step_dir)).item_metadata.tree


def _restore(step_dir, item, partial):
  def how(leaf):
    if getattr(leaf, "sharding", None) is None:
      return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)

  with _reader() as reader:
    return reader.restore(_state(step_dir), args=ocp.args.PyTreeRestore(
      item=item, restore_args=jax.tree.map(how, item), partial_restore=partial))


def _reader():
  return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _state(step_dir):
  return pathlib.Path(step_dir).absolute() / STATE  # Orbax insists on absolute paths.


def _hush(record):
  """Orbax logs a dozen lines per save, and an error once per thread with its traceback.

  Its errors are kept, a line each: the exception itself reaches the caller.
  """
  if f"{os.sep}orbax{os.sep}checkpoint{os.sep}" not in record.pathname:
    return True
  record.exc_info = None
  return record.levelno >= logging.ERROR


logging.getLogger("absl").addFilter(_hush)

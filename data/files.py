"""Files that are there whole or not at all."""
import contextlib
import hashlib
import json
import os
import pathlib


@contextlib.contextmanager
def replacing(path: pathlib.Path):
  """Gives a temporary path; what was written there becomes `path` at the end, or goes if anything
  failed.
  """
  part = path.with_name(f"{path.name}.{os.getpid()}.part")
  try:
    yield part
    with open(part, "rb") as file:
      os.fsync(file.fileno())
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value):
  with replacing(path) as part:
    part.write_text(json.dumps(value, indent=1, sort_keys=True))


def file_hash(path: pathlib.Path) -> str:
  """sha256 of the bytes of a file, in hex."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()

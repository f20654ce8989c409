"""Safetensors files: a header that is believed only after every number in it was checked, and rows of a
tensor. Read with pread, not mapped: a file that shrinks is then an error and not a signal, and what was read
is not counted twice.

The format: 8 bytes of length, that much JSON (name -> dtype, shape, data_offsets), then the data.
"""
import json
import math
import os
import pathlib

import ml_dtypes
import numpy as np

from model.hub.errors import HubError

DTYPES = {
  "F64": np.dtype("float64"), "F32": np.dtype("float32"), "F16": np.dtype("float16"),
  "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype("int64"), "I32": np.dtype("int32"),
  "I16": np.dtype("int16"), "I8": np.dtype("int8"), "U8": np.dtype("uint8"), "BOOL": np.dtype("bool"),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # Bytes: the limit of the reference implementation.
MAX_DIMS, MAX_NAME = 8, 512
ENTRY = {"dtype", "shape", "data_offsets"}


class FileTensor:
  """One tensor of a file.

  Attributes:
    shape, dtype: as stored.
  """

  def __init__(self, path, name, shape, dtype, begin):
    self.path, self.name, self.shape, self.dtype, self._begin = path, name, tuple(shape), dtype, begin

  def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows start to stop (of the first dim). Raises HubError where the file has become shorter."""
    stop = self.shape[0] if stop is None else stop
    row = math.prod(self.shape[1:])
    out = np.empty((stop - start, *self.shape[1:]), self.dtype)
    read_into(self.path, self._begin + start * row * self.dtype.itemsize, out)
    return out


def read_into(path, begin: int, out: np.ndarray) -> None:
  """Fills `out` with the bytes of the file from `begin`."""
  view, done = memoryview(out.reshape(-1).view(np.uint8)), 0
  with open(path, "rb", buffering=0) as f:
    while done < len(view):
      n = os.preadv(f.fileno(), [view[done:]], begin + done)
      if n == 0:
        raise HubError(f"{path} ends at byte {begin + done}, inside a tensor: it has become shorter")
      done += n


def read_safetensors(path) -> dict[str, FileTensor]:
  """Name -> tensor. Nothing but the header is read.

  Raises:
    HubError: the header contradicts the format, itself or the size of the file.
  """
  path = pathlib.Path(path)
  size = path.stat().st_size
  with open(path, "rb") as f:
    first = f.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
      raise HubError(f"{path} is no safetensors file: its header would have {length} bytes, of {size}")
    raw = f.read(length)
  header = _parse_json(path, raw)
  metadata = header.pop("__metadata__", {})
  tensors = {name: _check_entry(path, name, entry) for name, entry in header.items()}
  if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
    raise HubError(f"{path}: __metadata__ must be strings by name")
  end = 0
  for name, (_, _, begin, stop) in sorted(tensors.items(), key=lambda item: item[1][2:]):
    if begin != end:
      what = "overlaps the tensor before it" if begin < end else "leaves bytes before it unused"
      raise HubError(f"{path}: {name}, from byte {begin} of the data, {what}")
    end = stop
  if 8 + length + end != size:
    raise HubError(f"{path}: the tensors end at byte {8 + length + end} of a file of {size}")
  return {name: FileTensor(path, name, shape, dtype, 8 + length + begin)
          for name, (dtype, shape, begin, _) in tensors.items()}


def _parse_json(path, raw):
  def unique(pairs):
    if len(names := dict(pairs)) != len(pairs):
      raise HubError(f"{path}: a name is there twice in its header")
    return names

  try:
    header = json.loads(raw.decode(), object_pairs_hook=unique)
  except HubError:
    raise
  except (ValueError, RecursionError) as e:
    raise HubError(f"{path} is no safetensors file: its header is not JSON ({e})") from None
  if not isinstance(header, dict):
    raise HubError(f"{path} is no safetensors file: its header is a {type(header).__name__}")
  return header


def _check_entry(path, name, entry):
  """(dtype, shape, begin, stop), which agree with each other."""
  check_name(path, name)
  where = f"{path}: {name}"
  if not isinstance(entry, dict) or set(entry) != ENTRY:
    raise HubError(f"{where} must have exactly {', '.join(sorted(ENTRY))}")
  if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
    raise HubError(f"{where} has dtype {entry['dtype']!r:.40}; known: {', '.join(DTYPES)}")
  dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
  whole = lambda values: isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in values)
  if not whole(shape) or len(shape) > MAX_DIMS:
    raise HubError(f"{where} has shape {shape!r:.60}: it must be up to {MAX_DIMS} numbers")
  if not whole(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
    raise HubError(f"{where} has data_offsets {offsets!r:.60}, which do not hold {entry['dtype']}{shape}")
  return dtype, shape, *offsets


def check_name(path, name: str) -> None:
  """Raises HubError for a name that could be more than a name once printed or used."""
  if not name or len(name) > MAX_NAME or not name.isprintable() or "/" in name or "\\" in name:
    raise HubError(f"{path}: {name[:40]!r} is no name of a tensor")


def write_safetensors(path, tensors: dict, rows) -> None:
  """Writes a file front to back.

  Args:
    tensors: name -> (shape, dtype), in the order of the data.
    rows: name -> iterable of arrays, which together are the tensor's data.
  """
  header, at = {"__metadata__": {"format": "pt"}}, 0
  for name, (shape, dtype) in tensors.items():
    end = at + math.prod(shape) * np.dtype(dtype).itemsize
    header[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [at, end]}
    at = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as f:
    f.write(len(text).to_bytes(8, "little") + text)
    for name, (shape, dtype) in tensors.items():
      written = 0
      for block in rows(name):
        written += f.write(np.ascontiguousarray(block.astype(dtype, copy=False)).view(np.uint8).data)
      assert written == math.prod(shape) * np.dtype(dtype).itemsize, (name, written, shape)
    f.flush()
    os.fsync(f.fileno())

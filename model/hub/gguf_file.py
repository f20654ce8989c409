"""GGUF files: a header whose counts and lengths are bounded by the file before anything is made of them, and
rows of a tensor, dequantised to float32 a few at a time.

The format: "GGUF", version, counts; fields (name, type, value); tensors (name, dims from fast to slow, type,
offset); then the data, aligned. Dequantising K-quants and the like is the `gguf` package's.
"""
import math
import os
import pathlib
import struct

import ml_dtypes
import numpy as np

from model.hub.errors import HubError
from model.hub.safetensors_file import MAX_NAME, check_name, read_into

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_FIELDS, MAX_TENSORS, MAX_DIMS, MAX_DEPTH = 1 << 16, 1 << 16, 4, 1  # No arrays of arrays.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Type -> (name, numbers in a block, bytes of a block). What is not plain is read by the gguf package.
TYPES = {
  0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
  7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
  12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18),
  23: ("IQ4_XS", 256, 136), 30: ("BF16", 1, 2),
}
PLAIN = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}


class GGUFTensor:
  """One tensor, as safetensors_file.FileTensor; quantised ones are float32 once read."""

  def __init__(self, path, name, shape, kind, begin):
    self.path, self.name, self.shape, self.kind, self._begin = path, name, tuple(shape), kind, begin
    self.quant, self._block, self._bytes = TYPES[kind]
    self.dtype = PLAIN.get(self.quant, np.dtype("float32"))

  def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    stop = self.shape[0] if stop is None else stop
    row = math.prod(self.shape[1:])
    n, at = (stop - start) * row, start * row
    raw = np.empty(n // self._block * self._bytes, np.uint8)
    read_into(self.path, self._begin + at // self._block * self._bytes, raw)
    shape = (stop - start, *self.shape[1:])
    if self.quant in PLAIN:
      return raw.view(self.dtype).reshape(shape)
    return _quants(self.quant).dequantize(
        raw.reshape(-1, self._bytes), _types()[self.quant]).astype(np.float32, copy=False).reshape(shape)


def _quants(quant):
  try:
    from gguf import quants
  except ImportError:
    raise HubError(f"a tensor is quantised as {quant}, which needs the gguf package: "
                   "pip install -e '.[hub]'") from None
  return quants


def _types():
  from gguf import GGMLQuantizationType
  return GGMLQuantizationType.__members__


class _Cursor:
  """Reads the file front to back; nothing is taken that the file cannot hold."""

  def __init__(self, path, f, size):
    self.path, self._f, self.size = path, f, size

  def fail(self, why):
    raise HubError(f"{self.path} is no GGUF file that can be read: {why} (near byte {self._f.tell()})")

  def left(self):
    return self.size - self._f.tell()

  def take(self, n):
    if n > self.left():
      self.fail(f"{n} bytes are wanted, {self.left()} are left")
    return self._f.read(n)

  def number(self, code):
    return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

  def text(self, limit):
    n = self.number("Q")
    if n > min(limit, self.left()):
      self.fail(f"a text of {n} bytes")
    try:
      return self.take(n).decode()
    except UnicodeDecodeError:
      self.fail("a text that is not UTF-8")

  def value(self, kind, depth=0):
    if kind in SCALARS:
      return bool(self.number("B")) if kind == 7 else self.number(SCALARS[kind])
    if kind == STRING:
      return self.text(1 << 24)
    if kind != ARRAY or depth >= MAX_DEPTH:
      self.fail(f"a value of type {kind}")
    kind, n = self.number("I"), self.number("Q")
    least = struct.calcsize(SCALARS[kind]) if kind in SCALARS else 8
    if n * least > self.left():
      self.fail(f"an array of {n} values")
    if kind in SCALARS:
      return np.frombuffer(self.take(n * least), "<" + SCALARS[kind].replace("?", "B")).tolist()
    return [self.value(kind, depth + 1) for _ in range(n)]


def read_gguf(path) -> tuple[dict, dict[str, GGUFTensor]]:
  """(fields by name, tensors by name, dims from slow to fast). No tensor's data is read.

  Raises:
    HubError: the header contradicts the format, itself or the size of the file.
  """
  path = pathlib.Path(path)
  size = path.stat().st_size
  with open(path, "rb") as f:
    cursor = _Cursor(path, f, size)
    if size < 24 or cursor.take(4) != MAGIC:
      cursor.fail("it does not begin with GGUF")
    if (version := cursor.number("I")) not in VERSIONS:
      cursor.fail(f"version {version}; known: {VERSIONS}")
    n_tensors, n_fields = cursor.number("Q"), cursor.number("Q")
    if n_tensors > min(MAX_TENSORS, cursor.left() // 24) or n_fields > min(MAX_FIELDS, cursor.left() // 12):
      cursor.fail(f"{n_tensors} tensors and {n_fields} fields in {size} bytes")
    fields = {}
    for _ in range(n_fields):
      name = cursor.text(MAX_NAME)
      if name in fields or not name.isprintable():
        cursor.fail(f"the field {name[:40]!r}, twice or no name")
      fields[name] = cursor.value(cursor.number("I"))
    entries = {}
    for _ in range(n_tensors):
      name, entry = _read_entry(cursor)
      if name in entries:
        cursor.fail(f"the tensor {name}, twice")
      entries[name] = entry
    align = fields.get("general.alignment", 32)
    if type(align) is not int or not 1 <= align <= 1 << 16 or align & (align - 1):
      cursor.fail(f"an alignment of {align!r:.40}")
    data = -(-f.tell() // align) * align
  return fields, _place(cursor, entries, data, align)


def _read_entry(cursor):
  name = cursor.text(MAX_NAME)
  check_name(cursor.path, name)
  n_dims = cursor.number("I")
  if not 1 <= n_dims <= MAX_DIMS:
    cursor.fail(f"{name} of {n_dims} dims")
  shape = [cursor.number("Q") for _ in range(n_dims)][::-1]
  kind, offset = cursor.number("I"), cursor.number("Q")
  if kind not in TYPES:
    known = ", ".join(name for name, _, _ in TYPES.values())
    cursor.fail(f"{name} of type {kind}; known: {known}")
  _, block, n_bytes = TYPES[kind]
  if shape[-1] % block or not all(shape) or math.prod(shape) > 8 * cursor.size:
    cursor.fail(f"{name} of shape {shape}")
  return name, (shape, kind, offset, math.prod(shape) // block * n_bytes)


def _place(cursor, entries, data, align):
  end = 0
  for name, (_, _, offset, n_bytes) in sorted(entries.items(), key=lambda item: item[1][2]):
    if offset % align or offset < end:
      raise HubError(f"{cursor.path}: {name} at {offset} overlaps the tensor before it, or is not aligned")
    end = offset + n_bytes
    if data + end > cursor.size:
      raise HubError(f"{cursor.path}: {name} ends at byte {data + end} of a file of {cursor.size}")
  return {name: GGUFTensor(cursor.path, name, shape, kind, data + offset)
          for name, (shape, kind, offset, _) in entries.items()}


def is_gguf(path) -> bool:
  """Whether a file begins as one."""
  if not os.path.isfile(path):
    return False
  with open(path, "rb") as f:
    return f.read(4) == MAGIC

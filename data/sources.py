"""Where documents come from: one entry of SOURCE per kind, each of two functions.

plan(config) lists parts, the smallest pieces of work, from names and sizes alone; read(config,
part) gives the documents of one. A part is a plain tuple, so it can be hashed, written as JSON and
given to another process.
"""
import collections.abc
import glob
import gzip
import io
import json
import os
import pathlib
import random
import sys
import sysconfig
from typing import NamedTuple

from data.config import SourceConfig

PART_BYTES = 1 << 24  # Files that can be entered anywhere are cut into parts of about this size.


class Part(NamedTuple):
  """What is read in one go: path[start:stop] in bytes (jsonl), row groups, records or documents."""
  path: str
  start: int
  stop: int
  n_bytes: int  # On disk, to share the work out.
  mtime_ns: int  # With the size, tells when the file has changed.


class Document(NamedTuple):
  key: str  # Where it is: a path, and the byte, row or record within it.
  text: str | None
  reason: str | None = None  # Why there is no text.


def plan(cfg: SourceConfig) -> list[Part]:
  """The parts of a source, in a fixed order.

  Raises:
    ValueError: an unknown kind, or nothing found at the path.
  """
  return _kind(cfg).plan(cfg)


def read(cfg: SourceConfig, part: Part) -> collections.abc.Iterator[Document]:
  """The documents of a part, in order; those that cannot be used come with the reason."""
  for key, text, reason in _kind(cfg).read(cfg, part):
    if text is not None:
      text, reason = _checked(text)
    yield Document(key, text, reason)


def _checked(text) -> tuple[str | None, str | None]:
  if isinstance(text, bytes):
    try:
      text = text.decode()
    except UnicodeDecodeError:
      return None, "not_utf8"
  if not isinstance(text, str):
    return None, "not_text"
  if not text:
    return None, "empty"
  try:
    text.encode()
  except UnicodeEncodeError:  # JSON can spell half of a surrogate pair.
    return None, "not_utf8"
  return text, None


def _kind(cfg):
  if cfg.kind not in SOURCE:
    raise ValueError(f"data.sources: {cfg.name}: kind {cfg.kind!r} is not one of {sorted(SOURCE)}")
  return SOURCE[cfg.kind]


def find_files(cfg: SourceConfig) -> list[str]:
  """The files that cfg.path names, sorted; {stdlib} stands for Python's own library, {site} for what pip
  installed, and !GLOB takes files out again.

  Raises:
    ValueError: no file is found. A pattern without a match beside others that have some is a warning.
  """
  found, idle = set(), []
  for pattern in cfg.path.split(","):
    is_stdlib = "{stdlib}" in pattern
    full = pattern.strip().removeprefix("!")
    for name, folder in _folders():
      full = full.replace(name, glob.escape(folder))
    matches = {path for path in glob.glob(full, recursive=True) if os.path.isfile(path)}
    if pattern.strip().startswith("!"):
      found -= matches
      continue
    if is_stdlib:  # What pip installed is not the library.
      matches = {p for p in matches if "site-packages" not in p and "__pycache__" not in p}
    if not matches:
      idle.append(pattern.strip())
    found |= matches
  if not found:
    raise ValueError(f"data.sources: {cfg.name}: no file matches {cfg.path!r} (looked in {os.getcwd()})")
  if idle:
    print(f"WARNING: data.sources: {cfg.name}: no file matches {', '.join(idle)}", file=sys.stderr)
  return sorted(found)


def _address(path: str) -> str:
  """A path as documents are addressed: the same on machines that keep Python elsewhere."""
  for name, folder in _folders():
    if path.startswith(folder + os.sep):
      return path.replace(folder, name, 1)
  return path


def _folders():
  paths = sysconfig.get_paths()
  return ("{site}", paths["purelib"]), ("{stdlib}", paths["stdlib"])  # One may be in the other.


def _part(path, start=0, stop=1, n_bytes=None) -> Part:
  stat = os.stat(path)
  return Part(path, start, stop, stat.st_size if n_bytes is None else n_bytes, stat.st_mtime_ns)


def _ranges(path: str, n: int) -> list[Part]:
  """Cuts n records into parts of about PART_BYTES."""
  size = os.path.getsize(path)
  step = max(1, n * PART_BYTES // max(size, 1))
  return [_part(path, i, min(i + step, n), min(step, n - i) * size // n) for i in range(0, n, step)]


# text: a file is a document.
def _plan_text(cfg):
  return [_part(path) for path in find_files(cfg)]


def _read_text(cfg, part):
  yield _address(part.path), pathlib.Path(part.path).read_bytes(), None


# jsonl: a line is a document, addressed by the byte (of the plain text) where it starts.
def _plan_jsonl(cfg):
  parts = []
  for path in find_files(cfg):
    size = os.path.getsize(path)
    if path.endswith((".gz", ".zst")):
      parts.append(_part(path, 0, -1))
    else:
      parts += [_part(path, at, min(at + PART_BYTES, size), min(PART_BYTES, size - at))
                for at in range(0, size, PART_BYTES)]
  return parts


def _read_jsonl(cfg, part):
  with _open(part.path) as file:
    at = part.start
    if at:  # A line belongs to the part in which it starts.
      file.seek(at - 1)
      at += len(file.readline()) - 1
    while part.stop < 0 or at < part.stop:
      line = file.readline()
      if not line:
        break
      key, at = f"{_address(part.path)}@{at}", at + len(line)
      if line.strip():
        yield key, *_parse(line, cfg.text_key)


def _open(path):
  if path.endswith(".gz"):
    return gzip.open(path, "rb")
  if path.endswith(".zst"):
    import zstandard
    return io.BufferedReader(zstandard.open(path, "rb"))
  return open(path, "rb")


def _parse(line, text_key):
  try:
    record = json.loads(line)
  except UnicodeDecodeError:
    return None, "not_utf8"
  except ValueError:
    return None, "bad_json"
  if not isinstance(record, dict) or record.get(text_key) is None:
    return None, "missing_field"
  return record[text_key], None


# parquet: a row is a document; a part is a row group.
def _plan_parquet(cfg):
  import pyarrow.parquet
  parts = []
  for path in find_files(cfg):
    file = pyarrow.parquet.ParquetFile(path)
    if cfg.text_key not in file.schema_arrow.names:
      raise ValueError(f"data.sources: {cfg.name}: text_key {cfg.text_key!r} is no column of "
                       f"{path}, which has {file.schema_arrow.names}")
    sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    parts += [_part(path, i, i + 1, size) for i, size in enumerate(sizes)]
  return parts


def _read_parquet(cfg, part):
  import pyarrow.parquet
  file = pyarrow.parquet.ParquetFile(part.path)
  row = sum(file.metadata.row_group(i).num_rows for i in range(part.start))
  for group in range(part.start, part.stop):
    for batch in file.iter_batches(row_groups=[group], columns=[cfg.text_key]):
      for value in batch.column(0).to_pylist():
        yield f"{_address(part.path)}#{row}", value, "missing_field" if value is None else None
        row += 1


# array_record: a record is a document.
def _plan_array_record(cfg):
  counts = {path: open_array_record(path).num_records() for path in find_files(cfg)}
  return [part for path, n in counts.items() for part in _ranges(path, n)]


def _read_array_record(cfg, part):
  reader = open_array_record(part.path)
  for i in range(part.start, part.stop):
    yield f"{_address(part.path)}#{i}", reader.read([i])[0], None


def open_array_record(path):
  """A reader for random access, safe from several threads."""
  from array_record.python import array_record_module
  return array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0")


# tfds: an example is a document. Without TensorFlow, so from datasets prepared as array_record.
def _tfds(cfg):
  import tensorflow_datasets as tfds
  path = os.path.expanduser(cfg.path)
  if os.path.isdir(path):
    return tfds.builder_from_directory(path)
  return tfds.builder(cfg.path, file_format="array_record", try_gcs=False)


def _plan_tfds(cfg):
  builder = _tfds(cfg)
  if not builder.info.splits:
    raise ValueError(f"data.sources: {cfg.name}: {cfg.path!r} is not prepared in "
                     f"{builder.data_dir}; prepare it with file_format='array_record', or give the "
                     "folder of a prepared one as path")
  if cfg.split not in builder.info.splits:
    raise ValueError(
      f"data.sources: {cfg.name}: split {cfg.split!r} is not one of {sorted(builder.info.splits)}"
    )
  if cfg.text_key not in builder.info.features:
    raise ValueError(f"data.sources: {cfg.name}: text_key {cfg.text_key!r} is not one of the "
                     f"features {sorted(builder.info.features)}")
  if "array_record" not in str(builder.info.file_format).lower():
    raise ValueError(f"data.sources: {cfg.name}: {cfg.path!r} is stored as "
                     f"{builder.info.file_format}; only file_format='array_record' can be read "
                     "without TensorFlow")
  split = builder.info.splits[cfg.split]
  mtime = max(os.stat(path).st_mtime_ns for path in split.filepaths)
  n, size = split.num_examples, max(split.num_bytes, 1)
  step = max(1, n * PART_BYTES // size)
  return [
    Part(cfg.path, i, min(i + step, n), min(step, n - i) * size // n, mtime)
    for i in range(0, n, step)
  ]


def _read_tfds(cfg, part):
  import tensorflow_datasets as tfds
  builder = _tfds(cfg)
  others = {
    name: tfds.decode.SkipDecoding() for name in builder.info.features if name != cfg.text_key
  }
  examples = builder.as_data_source(split=cfg.split, decoders=others)
  for i in range(part.start, part.stop):
    yield f"{cfg.path}/{cfg.split}#{i}", examples[i][cfg.text_key], None


# synthetic: made up, so that tests and first steps need no file. Small grammar, so that a tiny
# model learns it.
NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Ivy"]
THINGS = ["apple", "book", "chair", "drum", "lamp", "map", "ring", "stone"]
VERBS = ["finds", "takes", "wants", "hides", "draws", "sells"]
PLACES = ["garden", "kitchen", "market", "river", "tower", "village"]
VARIABLES = ["total", "count", "index", "value", "result", "size"]


def make_text(number: int) -> str:
  """Document `number` of the synthetic source: a story or a few Python functions."""
  rng = random.Random(f"synthetic {number}")
  pick = rng.choice
  if number % 2:
    who = pick(NAMES)
    lines = [f"{who} {pick(VERBS)} a {pick(THINGS)} in the {pick(PLACES)}. "
             f"Then {who} goes to the {pick(PLACES)}." for _ in range(rng.randint(2, 10))]
    return f"A story of {who}, number {number}.\n\n" + "\n".join(lines) + "\n"
  functions = []
  for _ in range(rng.randint(1, 4)):
    a, b = rng.sample(VARIABLES, 2)
    functions.append(f"def {pick(VERBS)}_{pick(THINGS)}({a}, {b}):\n  for i in range({a}):\n"
                     f"    {b} += i * {a}\n  return {b}\n")
  return f"# module {number}\n" + "\n".join(functions)


def _plan_synthetic(cfg):
  step = 10_000
  return [Part("synthetic", i, min(i + step, cfg.documents), min(step, cfg.documents - i) * 300, 0)
          for i in range(0, cfg.documents, step)]


def _read_synthetic(cfg, part):
  for i in range(part.start, part.stop):
    yield f"synthetic#{i}", make_text(i), None


class Kind(NamedTuple):
  plan: collections.abc.Callable
  read: collections.abc.Callable


SOURCE = {
  "text": Kind(_plan_text, _read_text),
  "jsonl": Kind(_plan_jsonl, _read_jsonl),
  "parquet": Kind(_plan_parquet, _read_parquet),
  "array_record": Kind(_plan_array_record, _read_array_record),
  "tfds": Kind(_plan_tfds, _read_tfds),
  "synthetic": Kind(_plan_synthetic, _read_synthetic),
}

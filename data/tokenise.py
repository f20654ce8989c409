"""One unit of work of data.prepare: some parts of a source become two shards (train, val).

Run as a process of its own, `python -m data.tokenise FOLDER` reads unit numbers from its input and
answers each with a line. It is started by prepare, which thereby needs no fork (the caller may hold
threads and devices) and does not import the caller's main module again; when prepare is killed its
input closes and it ends.
"""
import collections
import contextlib
import hashlib
import json
import pathlib
import struct
import sys
from typing import NamedTuple

import numpy as np
from array_record.python import array_record_module

from data import sources
from data.config import SourceConfig
from data.files import file_hash, replacing, write_json
from data.tokenizer import Tokenizer, load_tokenizer

BATCH_CHARS = 1 << 20  # Text given to the tokenizer at a time.
HEADER = struct.Struct("<BHQ")  # Bytes per token id, bytes of the key, bytes of the text.


class Record(NamedTuple):
  """A tokenised document. In the shards: header, key (UTF-8), ids (little-endian)."""
  key: str
  n_bytes: int  # Of the text.
  tokens: np.ndarray  # uint16 or uint32 [n], from the beginning marker to the end marker.

  def pack(self) -> bytes:
    key = self.key.encode()
    return HEADER.pack(self.tokens.itemsize, len(key), self.n_bytes) + key + self.tokens.tobytes()

  @classmethod
  def unpack(cls, raw: bytes) -> "Record":
    itemsize, n_key, n_bytes = HEADER.unpack_from(raw)
    at = HEADER.size + n_key
    tokens = np.frombuffer(raw, f"<u{itemsize}", offset=at)
    return cls(raw[HEADER.size:at].decode(), n_bytes, tokens)


def is_validation(text: str, fraction: float) -> bool:
  """By the content, so that copies of a document fall on one side."""
  digest = hashlib.sha256(text.encode()).digest()
  return int.from_bytes(digest[:8], "little") < fraction * 2**64


class ShardWriter:
  """Writes a shard and the lengths of its documents; both appear when the stack ends well."""

  def __init__(self, path: pathlib.Path, stack: contextlib.ExitStack):
    lengths_path = path.with_suffix(".lengths.npy")
    self._parts = {p.name: stack.enter_context(replacing(p)) for p in (path, lengths_path)}
    self._part, self._lengths_part = self._parts.values()
    # One record a group: rows are read at random. Ids of a good tokenizer hardly compress.
    options = "group_size:1,uncompressed"
    self._writer = array_record_module.ArrayRecordWriter(str(self._part), options)
    self._content = hashlib.sha256()
    self._lengths = []
    self._n_bytes = 0

  def add(self, record: Record):
    self._writer.write(record.pack())
    self._content.update(struct.pack("<Q", len(record.tokens)))
    self._content.update(record.tokens.astype("<u4").tobytes())
    self._lengths.append(len(record.tokens))
    self._n_bytes += record.n_bytes

  def finish(self) -> dict:
    """Closes, and checks what is on the disk.

    Raises:
      OSError, RuntimeError: the disk is full, or did not keep what was written.
    """
    self._writer.close()
    found = array_record_module.ArrayRecordReader(str(self._part)).num_records()
    if found != len(self._lengths):
      raise OSError(f"{self._part}: wrote {len(self._lengths)} records, found {found}")
    with open(self._lengths_part, "wb") as file:
      np.save(file, np.array(self._lengths, np.uint32))
    files = [{"name": name, "size": part.stat().st_size, "sha256": file_hash(part)}
             for name, part in self._parts.items()]
    return {"documents": len(self._lengths), "tokens": sum(self._lengths), "bytes": self._n_bytes,
            "content": self._content.hexdigest(), "files": files}


def tokenise_unit(folder: pathlib.Path, spec: dict, number: int, tokenizer: Tokenizer) -> dict:
  """Makes a unit's shards, then NUMBER.json, whose presence says that they are whole.

  Args:
    folder: of the source in the cache.
    spec: what data.prepare wrote there as spec.json.

  Returns:
    What the JSON holds: documents read and dropped by reason; for each split the counts, files and
    hash of the content.

  Raises:
    OSError, RuntimeError: nothing that counts as finished is left.
  """
  source = SourceConfig(**spec["source"])
  dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
  writers, dropped, batch, size, n_read = {}, collections.Counter(), [], 0, 0

  def flush(stack):
    for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch])):
      split = "val" if is_validation(document.text, spec["val_fraction"]) else "train"
      if split not in writers:
        writers[split] = ShardWriter(folder / f"{number:05d}.{split}.array_record", stack)
      tokens = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype)
      writers[split].add(Record(document.key, len(document.text.encode()), tokens))
    batch.clear()

  with contextlib.ExitStack() as stack:
    for part in spec["units"][number]:
      for document in sources.read(source, sources.Part(*part)):
        n_read += 1
        if document.text is None:
          dropped[document.reason] += 1
          continue
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS:
          flush(stack)
          size = 0
    flush(stack)
    splits = {split: writer.finish() for split, writer in sorted(writers.items())}
  unit = {"read": n_read, "dropped": dict(sorted(dropped.items())), "splits": splits}
  write_json(folder / f"{number:05d}.json", unit)
  return unit


def main(argv=None):
  folder = pathlib.Path((argv or sys.argv[1:])[0])
  spec = json.loads((folder / "spec.json").read_text())
  tokenizer = load_tokenizer(spec["tokenizer_path"], spec["tokenizer_kind"])
  for line in sys.stdin:
    tokenise_unit(folder, spec, int(line), tokenizer)
    print(line.strip(), flush=True)


if __name__ == "__main__":
  main()

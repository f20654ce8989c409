"""Tokenises the sources of a config once, into a cache of shards that every later run reads.

python -m data.prepare --config=configs/quickstart.py

Each source has a folder in data.cache_path, named by the hash of all that determines its content:
the files found (with size and time), the fields of the source, the tokenizer and the validation
fraction. It holds shards (ArrayRecord, one record a document), the lengths of their documents, and
manifest.json, which is written last. A killed run goes on where it stopped; units that were
finished are kept. Training calls this too, and only reads when nothing is missing.
"""
import argparse
import bisect
import collections
import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import pathlib
import queue
import re
import subprocess
import sys
import time

import numpy as np
import rich.console
import rich.table

from data import flags, sources
from data.config import DataConfig, SourceConfig
from data.files import file_hash, write_json
from data.tokenise import Record, is_validation, tokenise_unit
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

FORMAT = 1  # Of the cache; a change makes new folders.
SPLITS = ("train", "val")
UNIT_BYTES = (1 << 22, 1 << 29)  # A unit is 1/256 of a source, within these.
VERIFY_BYTES = 1 << 32  # Larger sources have only the sizes of their files checked at every start.
READ_FACTOR = 32  # Training a tokenizer on n bytes reads at most about this times n.


@dataclasses.dataclass(kw_only=True, eq=False)
class PreparedSource:
  """The shards of one source.

  Attributes:
    name: as in the config.
    folder: where they are.
    manifest: counts (read, kept, dropped by reason; documents, tokens, bytes of each split) and
      hashes.
  """
  name: str
  folder: pathlib.Path
  manifest: dict

  def count(self, split: str, what: str) -> int:
    """documents, tokens (markers included) or bytes (of text) of a split."""
    return self.manifest["splits"][split][what]

  def verify(self) -> None:
    """Raises ValueError, OSError: the manifest or a file is not what was written, by size and hash."""
    if _checked(self.folder, {}, verify=True) != self.manifest:
      raise ValueError(f"{self.folder / 'manifest.json'} is not the one that this run began with")

  @functools.cache  # noqa: B019, a handful of objects that live as long as the run.
  def lengths(self, split: str) -> np.ndarray:
    """int64 [documents], tokens of each, markers included."""
    paths = [self.folder / file["name"] for unit in self._units(split) for file in unit["files"]
             if file["name"].endswith(".npy")]
    return np.concatenate([np.zeros(0, np.int64), *map(np.load, paths)]).astype(np.int64)

  def read(self, split: str, document: int) -> Record:
    """One document; safe from several threads.

    Raises:
      RuntimeError: the shard is damaged there (ArrayRecord keeps a hash of each record).
    """
    firsts, readers = self._readers(split)
    shard = bisect.bisect_right(firsts, document) - 1
    return Record.unpack(readers[shard].read([document - firsts[shard]])[0])

  def _units(self, split):
    return [unit["splits"][split] for unit in self.manifest["units"] if split in unit["splits"]]

  @functools.cache  # noqa: B019
  def _readers(self, split):
    units = self._units(split)
    firsts = [0, *itertools.accumulate(unit["documents"] for unit in units)]
    paths = [self.folder / unit["files"][0]["name"] for unit in units]
    return firsts[:-1], [sources.open_array_record(path) for path in paths]


@dataclasses.dataclass(kw_only=True, eq=False)
class Prepared:
  """What `prepare` made or found."""
  tokenizer_path: str
  tokenizer: Tokenizer
  sources: list[PreparedSource]

  def count(self, split: str, what: str) -> int:
    """documents, tokens or bytes of a split, over all sources."""
    return sum(source.count(split, what) for source in self.sources)

  @property
  def content_hash(self) -> str:
    """Of every token of every source: equal on machines that hold the same data."""
    return _hash([source.manifest["content"] for source in self.sources])


def documents(prepared: Prepared, split: str) -> collections.abc.Iterator[tuple[str, str, str]]:
  """(source, key, text) of every document of a split, in the order of the shards."""
  for source in prepared.sources:
    for i in range(source.count(split, "documents")):
      record = source.read(split, i)
      yield source.name, record.key, prepared.tokenizer.decode(record.tokens.tolist())


def prepare(cfg: DataConfig, log=print, verify: bool = False) -> Prepared:
  """Makes the cache of a validated config, or finds it; several processes may call it at once.

  Args:
    log: receives a line now and then.
    verify: hash every file, however large the cache is.

  Raises:
    ValueError: a source has no usable document; the vocabulary does not suit the text; a shard or a
      manifest is not what was written (named, with what was expected and found).
    OSError, RuntimeError: reading or writing failed. What is unfinished does not count as prepared.
  """
  parts = {source.name: sources.plan(source) for source in cfg.sources}
  cache = pathlib.Path(cfg.cache_path)
  cache.mkdir(parents=True, exist_ok=True)
  tokenizer_path = _tokenizer_path(cfg, parts, cache, log)
  tokenizer = load_tokenizer(tokenizer_path, cfg.tokenizer.kind)
  prepared = [
    _prepare_source(cfg, source, parts[source.name], tokenizer_path, tokenizer, log, verify)
    for source in cfg.sources
  ]
  prepared = Prepared(tokenizer_path=str(tokenizer_path), tokenizer=tokenizer, sources=prepared)
  if cfg.val_fraction and not prepared.count("val", "documents"):
    log(f"no document fell into the validation split: data.val_fraction={cfg.val_fraction} of "
        f"{prepared.count('train', 'documents')}")
  return prepared


def _hash(value) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _identity(source: SourceConfig) -> dict:
  """The fields that determine which documents a source has."""
  return {key: getattr(source, key) for key in ("kind", "path", "text_key", "split", "documents")}


@contextlib.contextmanager
def _locked(path: pathlib.Path):
  with open(path, "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _tokenizer_path(cfg, parts, cache, log) -> pathlib.Path:
  """The given tokenizer, or one trained on the training documents of all sources."""
  if cfg.tokenizer.path is not None:
    return pathlib.Path(cfg.tokenizer.path)
  wanted = {
    "tokenizer": [cfg.tokenizer.model, cfg.tokenizer.vocab_size, cfg.tokenizer.train_bytes],
    "sources": [[_identity(s), parts[s.name]] for s in cfg.sources],
    "val_fraction": cfg.val_fraction,
  }
  path = cache / f"tokenizer-{_hash([FORMAT, wanted])[:12]}.model"
  with _locked(path.with_suffix(".lock")):
    if not path.exists():
      begin = time.perf_counter()
      total = sum(part.n_bytes for ps in parts.values() for part in ps)
      stride = max(1, -(-total // (READ_FACTOR * cfg.tokenizer.train_bytes)))
      chosen = {name: ps[::stride] for name, ps in parts.items()}
      log(f"training a {cfg.tokenizer.model} tokenizer of {cfg.tokenizer.vocab_size} pieces")
      train_tokenizer(_training_texts(cfg, chosen), cfg.tokenizer, path,
                      sum(part.n_bytes for ps in chosen.values() for part in ps))
      log(f"tokenizer {path}, {time.perf_counter() - begin:.1f} s")
  return path


def _training_texts(cfg, parts):
  """The texts of the training split.

  Raises:
    ValueError: there is none.
  """
  dropped = collections.Counter()

  def texts():
    for source in cfg.sources:
      for part in parts[source.name]:
        for document in sources.read(source, part):
          if document.text is None:
            dropped[f"{source.name}: {document.reason}"] += 1
          elif not is_validation(document.text, cfg.val_fraction):
            yield document.text

  found = texts()
  first = next(found, None)
  if first is None:
    raise ValueError(f"data.sources: no document to train a tokenizer on; dropped {dict(dropped)}")
  return itertools.chain([first], found)


def _group(parts: list) -> list[list]:
  """Consecutive parts as units of work; the same on every machine."""
  low, high = UNIT_BYTES
  unit_bytes = min(max(sum(part.n_bytes for part in parts) // 256, low), high)
  units, size = [[]], 0
  for part in parts:
    if size >= unit_bytes:
      units.append([])
      size = 0
    units[-1].append(part)
    size += part.n_bytes
  return units


def _prepare_source(cfg, source, parts, tokenizer_path, tokenizer, log, verify) -> PreparedSource:
  wanted = {"format": FORMAT, "source": _identity(source), "parts": _hash(parts),
            "tokenizer_sha256": tokenizer.sha256, "val_fraction": cfg.val_fraction}
  safe_name = re.sub(r"[^\w.-]", "_", source.name)
  folder = pathlib.Path(cfg.cache_path) / f"{safe_name}-{_hash(wanted)[:12]}"
  folder.mkdir(exist_ok=True)
  with _locked(folder / "lock"):
    if not (folder / "manifest.json").exists():
      spec = {"source": _identity(source), "units": _group(parts), "val_fraction": cfg.val_fraction,
              "tokenizer_path": str(tokenizer_path), "tokenizer_kind": cfg.tokenizer.kind}
      for left in folder.glob("*.part"):  # By a run that was killed.
        left.unlink()
      write_json(folder / "spec.json", spec)
      units = _tokenise(folder, spec, source.name, cfg.workers, tokenizer, log)
      manifest = _summary(units, source.name, wanted)
      write_json(folder / "manifest.json", manifest)
    manifest = _checked(folder, wanted, verify)
  return PreparedSource(name=source.name, folder=folder, manifest=manifest)


def _tokenise(folder, spec, name, workers, tokenizer, log) -> list[dict]:
  """The records of all units, made where missing, in worker processes if there are several."""
  done = lambda number: folder / f"{number:05d}.json"
  n_units = len(spec["units"])
  missing = [number for number in range(n_units) if not done(number).exists()]
  n_bytes = sum(part.n_bytes for unit in spec["units"] for part in unit)
  n_workers = min(workers or os.cpu_count(), len(missing))
  log(f"{name}: tokenising {len(missing)} of {n_units} units ({n_bytes / 1e6:.1f} MB in all), "
      f"{max(n_workers, 1)} at a time")
  begin = last = time.perf_counter()
  for i, _ in enumerate(_run(folder, spec, missing, n_workers, tokenizer), start=1):
    if time.perf_counter() - last > 10:
      last = time.perf_counter()
      expected = (last - begin) * len(missing) / i
      log(f"{name}: {i} of {len(missing)} units, {last - begin:.0f} s of about {expected:.0f}")
  return [json.loads(done(number).read_text()) for number in range(n_units)]


def _run(folder, spec, numbers, n_workers, tokenizer):
  """Makes the units; yields as they are finished."""
  if n_workers <= 1:
    for number in numbers:
      yield tokenise_unit(folder, spec, number, tokenizer)
    return
  idle = queue.SimpleQueue()
  with contextlib.ExitStack() as stack:
    for _ in range(n_workers):
      idle.put(stack.enter_context(_worker(folder)))
    pool = concurrent.futures.ThreadPoolExecutor(n_workers)
    try:
      yield from pool.map(lambda number: _ask(idle, folder, number), numbers)
    finally:
      pool.shutdown(cancel_futures=True)


def _worker(folder) -> subprocess.Popen:
  root = pathlib.Path(__file__).parents[1]
  env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
         "TOKENIZERS_PARALLELISM": "false"}
  command = [sys.executable, "-m", "data.tokenise", str(folder)]
  pipe = subprocess.PIPE
  return subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, env=env)


def _ask(idle, folder, number):
  worker = idle.get()
  try:
    with contextlib.suppress(BrokenPipeError):  # A dead worker answers nothing, below.
      worker.stdin.write(b"%d\n" % number)
    if worker.stdout.readline() != b"%d\n" % number:
      raise RuntimeError(f"{folder}: unit {number} failed in its worker process (exit code "
                         f"{worker.wait()}); its error is above")
  finally:
    idle.put(worker)


def _summary(units: list[dict], name: str, wanted: dict) -> dict:
  """The manifest, from what the units counted."""
  n_read = sum(unit["read"] for unit in units)
  dropped = collections.Counter()
  for unit in units:
    dropped.update(unit["dropped"])
  splits = {split: {what: sum(unit["splits"].get(split, {}).get(what, 0) for unit in units)
                    for what in ("documents", "tokens", "bytes")} for split in SPLITS}
  kept = sum(split["documents"] for split in splits.values())
  if n_read != kept + sum(dropped.values()):
    raise RuntimeError(f"{name}: read {n_read} documents, kept {kept}, dropped {dict(dropped)}")
  if not splits["train"]["documents"]:
    raise ValueError(f"data.sources: {name}: no document to train on; read {n_read}, dropped "
                     f"{dict(dropped)}, validation {splits['val']['documents']}")
  content = _hash([
    [unit["splits"].get(split, {}).get("content") for unit in units] for split in SPLITS
  ])
  manifest = {
    **wanted,
    "read": n_read,
    "kept": kept,
    "dropped": dict(sorted(dropped.items())),
    "splits": splits,
    "content": content,
    "units": units,
  }
  return {**manifest, "sha256": _hash(manifest)}


def _checked(folder, wanted, verify) -> dict:
  """The manifest of a folder, held against what is wanted and what is there."""
  path = folder / "manifest.json"
  again = f"; delete {folder} to make it again"
  try:
    manifest = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is damaged: {error}{again}") from None
  expected = manifest.pop("sha256", None)
  if (found := _hash(manifest)) != expected:
    raise ValueError(f"{path}: expected sha256 {expected}, found {found}{again}")
  for key, value in wanted.items():
    if manifest[key] != value:
      raise ValueError(f"{path}: {key}: expected {value}, found {manifest[key]}{again}")
  splits = [split for unit in manifest["units"] for split in unit["splits"].values()]
  files = [file for split in splits for file in split["files"]]
  for file in files:
    path = folder / file["name"]
    found = path.stat().st_size if path.exists() else "no file"
    if found != file["size"]:
      raise ValueError(f"{path}: expected {file['size']} bytes, found {found}{again}")
  if verify or sum(file["size"] for file in files) <= VERIFY_BYTES:
    paths = [folder / file["name"] for file in files]
    with concurrent.futures.ThreadPoolExecutor() as pool:
      for path, file, found in zip(paths, files, pool.map(file_hash, paths)):
        if found != file["sha256"]:
          raise ValueError(f"{path}: expected sha256 {file['sha256']}, found {found}{again}")
  return manifest


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--verify", action="store_true", help="hash every file of the cache, however large it is"
  )
  config, args = flags.load(parser, argv)
  try:
    prepared = prepare(config.data, log=functools.partial(print, file=sys.stderr),
                       verify=args.verify)
  except ValueError as error:
    print(f"{parser.prog}: error: {error}", file=sys.stderr)
    return 2
  _print_table(prepared)
  return 0


def _print_table(prepared):
  table = rich.table.Table(
    title=f"tokenizer {prepared.tokenizer_path}, {prepared.tokenizer.vocab_size} pieces"
  )
  for column in ("source", "read", "kept", "dropped", "train tokens", "val tokens", "bytes/token"):
    table.add_column(column, justify="left" if column in ("source", "dropped") else "right")
  for source in prepared.sources:
    manifest = source.manifest
    dropped = ", ".join(f"{reason} {n}" for reason, n in manifest["dropped"].items()) or "none"
    n_bytes = sum(source.count(split, "bytes") for split in SPLITS)
    n_tokens = sum(source.count(split, "tokens") for split in SPLITS)
    table.add_row(source.name, f"{manifest['read']:,}", f"{manifest['kept']:,}", dropped,
                  f"{source.count('train', 'tokens'):,}", f"{source.count('val', 'tokens'):,}",
                  f"{n_bytes / n_tokens:.2f}")
  console = rich.console.Console()
  console.print(table)
  for source in prepared.sources:
    console.print(f"{source.name} is in {source.folder}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
  sys.exit(main())

"""Rows with addresses: the row at (step, slot) is a pure function of data, config and seed.

  (step, slot) -> row number -> the mixture: (source, its n-th row) -> (epoch, row) -> pieces

Each epoch of a source packs all its documents in a fresh order and visits the rows in a fresh
order. So the state of the pipeline is the step, and any number of hosts, each asking for its own
slots, see together the same batches.
"""
import collections.abc
import functools
import threading
from typing import NamedTuple

import grain
import numpy as np

from data.config import DataConfig
from data.mixture import Mixture, permutation
from data.packing import PACKING, Plan, make_row
from data.prepare import Prepared, PreparedSource

READ_THREADS = 4


class Piece(NamedTuple):
  """Part of a row: predictions [start, stop) of a document, which read its tokens [start, stop]."""
  source: str
  document: str  # Its key: a path, and the byte, row or record within it.
  start: int
  stop: int


class Epochs:
  """The rows of one source, epoch after epoch."""

  def __init__(self, source: PreparedSource, *, split: str, packing: str, seq_len: int, seed: int):
    self.source, self.split = source, split
    self._lengths = source.lengths(split) - 1  # Predictions.
    self._pack = functools.partial(PACKING[packing], seq_len=seq_len)
    self._key = (seed, source.name)
    self._lock = threading.Lock()
    self._plan = functools.lru_cache(maxsize=2)(self._make_plan)
    # The same in every epoch: the order of documents does not change it.
    self.n_rows = self.plan(0)[0].n_rows

  def plan(self, epoch: int) -> tuple[Plan, np.ndarray, np.ndarray]:
    """(plan, the document behind each of its numbers, the order in which its rows are visited)."""
    with self._lock:  # Threads that come to a new epoch together plan it once.
      return self._plan(epoch)

  def _make_plan(self, epoch):
    documents = permutation(len(self._lengths), "documents", *self._key, epoch)
    plan = self._pack(self._lengths[documents])
    return plan, documents, permutation(plan.n_rows, "rows", *self._key, epoch)

  def pieces(self, n: int) -> list[tuple[int, int, int]]:
    """(document, start, length) of each piece of the n-th row ever."""
    epoch, row = divmod(n, self.n_rows)
    plan, documents, order = self.plan(epoch)
    return [(int(documents[d]), start, length) for d, start, length in plan.row(order[row])]


class Rows:
  """Every row of a run.

  Args:
    prepared: the data.
    cfg: the config that it was prepared from: packing, weights, temperature, stages, epochs.
    seq_len: T, predictions in a row.
    batch_size: slots of a step, over all hosts.
    seed: of every shuffle. The validation split has a fixed order, so that runs compare.
    split: train, which never ends, or val, whose steps end at `len(rows)` rows.
    steps: how long the run is, if it is to be checked against max_epochs.

  Raises:
    ValueError: the split is empty; a source would be repeated more than its max_epochs within
      `steps`.
  """

  def __init__(
    self,
    prepared: Prepared,
    cfg: DataConfig,
    *,
    seq_len: int,
    batch_size: int,
    seed: int = 0,
    split: str = "train",
    steps: int | None = None,
  ):
    self.tokenizer, self.split = prepared.tokenizer, split
    self.seq_len, self.batch_size = seq_len, batch_size
    used = [source for source in prepared.sources if source.count(split, "documents")]
    if not used:
      raise ValueError(f"the {split} split has no documents (data.val_fraction={cfg.val_fraction}, "
                       f"{prepared.count('train', 'documents')} to train on)")
    self.sources = [Epochs(source, split=split, packing=cfg.packing, seq_len=seq_len,
                           seed=seed if split == "train" else 0) for source in used]
    self.names = [source.name for source in used]
    if split == "train":
      self.mixture = Mixture(self.names, _stages(cfg, used, batch_size), seed)
      if steps is not None:
        self._check_epochs(cfg, steps)
    else:
      self._ends = np.cumsum([source.n_rows for source in self.sources])
      # So that the first rows are a fair sample.
      self._order = permutation(int(self._ends[-1]), "validation")

  def __len__(self) -> int:
    """Rows of the validation split; of one epoch of every source for training."""
    return sum(source.n_rows for source in self.sources)

  def row(self, step: int, slot: int) -> dict[str, np.ndarray]:
    """One row; past the end of the validation split, one of weight 0.

    Returns:
      tokens, targets, weights, positions, segments [T] as packing.make_row gives them, and for the
      validation split bytes, int32 []: how many bytes of the text its targets stand for.
    """
    source, pieces = self._locate(step, slot)
    tokens = [source.source.read(self.split, document).tokens[start:start + length + 1]
              for document, start, length in pieces]
    row = make_row(tokens, self.seq_len, self.tokenizer.pad_id)
    if self.split != "train":
      n_bytes_T = self.tokenizer.n_bytes_V[row["targets"]] * (row["segments"] > 0)
      row["bytes"] = n_bytes_T.sum(dtype=np.int32)
    return row

  def address(self, step: int, slot: int) -> list[Piece]:
    """Where each piece of the row comes from."""
    source, pieces = self._locate(step, slot)
    return [Piece(source.source.name, source.source.read(self.split, d).key, start, start + length)
            for d, start, length in pieces]

  def _locate(self, step, slot):
    """(the Epochs of the row's source, its pieces)."""
    if not 0 <= slot < self.batch_size:
      raise ValueError(f"slot {slot} is not in [0, batch_size={self.batch_size})")
    number = step * self.batch_size + slot
    if self.split == "train":
      i, n = self.mixture.locate(number)
    elif number < len(self):
      n = int(self._order[number])
      i = int(np.searchsorted(self._ends, n, side="right"))
      n -= int(self._ends[i - 1]) if i else 0
    else:
      return self.sources[0], []
    return self.sources[i], self.sources[i].pieces(n)

  def _check_epochs(self, cfg, steps):
    limits = {source.name: source.max_epochs for source in cfg.sources}
    drawn = self.mixture.counts(steps * self.batch_size)
    for i, epochs in enumerate(self.sources):
      limit = limits[self.names[i]]
      if limit is None or drawn[i] <= limit * epochs.n_rows:
        continue
      row = self.mixture.first_row_beyond(i, int(limit * epochs.n_rows), steps * self.batch_size)
      last = row // self.batch_size
      raise ValueError(f"data.sources: {self.names[i]}: max_epochs={limit} of its {epochs.n_rows} "
                       f"rows are used up at step {last}, but steps={steps} take {drawn[i]} "
                       f"({drawn[i] / epochs.n_rows:.2f} epochs); nearest valid steps: {last}")


def _stages(cfg, used, batch_size):
  """(first row, weights) of each stage, for the sources that have documents."""
  weights = [source.weight for source in cfg.sources]
  if weights[0] is None:
    size = {source.name: source.count("train", "tokens") for source in used}
    weights = [size[source.name] ** (1 / cfg.temperature) for source in cfg.sources]
  later = [(step * batch_size, list(then)) for step, then in cfg.weights_from_step]
  return [(0, weights), *later]


def make_batches(
  rows: Rows, *, start_step: int, slots: collections.abc.Sequence[int], prefetch: int
) -> collections.abc.Iterator[dict[str, np.ndarray]]:
  """Batches of steps start_step, start_step + 1, ... without end, read ahead in threads.

  Args:
    slots: which slots of each step to make, in order: those whose devices this process holds.
    prefetch: batches made ahead.

  Returns:
    [len(slots), T] arrays, named as in Rows.row.
  """
  n = len(slots)
  numbers = grain.MapDataset.range(start_step * n, 1 << 62)
  return _read(numbers.map(lambda i: rows.row(i // n, slots[i % n])), n, prefetch)


def val_batches(
  rows: Rows, *, slots: collections.abc.Sequence[int], limit: int | None = None, prefetch: int = 2
) -> collections.abc.Iterator[dict[str, np.ndarray]]:
  """The batches of the validation split, or of its first `limit` rows.

  The last is filled with rows of weight 0. With `bytes` [len(slots)] it is, over all processes,
  bits per byte = sum(weights * nll) / ln 2 / sum(bytes).
  """
  n = len(slots)
  n_rows = min(limit or len(rows), len(rows))
  n_steps = -(-n_rows // rows.batch_size)

  def row(i):
    step, slot = i // n, slots[i % n]
    past = step * rows.batch_size + slot >= n_rows
    return rows.row(len(rows), slot) if past else rows.row(step, slot)

  return _read(grain.MapDataset.range(n_steps * n).map(row), n, prefetch)


def _read(rows, n, prefetch):
  """Iterates over batches of n rows, read in threads."""
  options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=max(1, prefetch * n))
  return iter(rows.batch(n).to_iter_dataset(options))

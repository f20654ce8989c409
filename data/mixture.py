"""Which source each row comes from: a pure function of (weights, seed, row number).

Rows are dealt in windows of WINDOW. Each window holds the number of rows of each source that the
weights ask for, rounded to whole rows with what rounding owes carried to the next, in an order
shuffled by the seed; over a PERIOD of windows the shares are exact to one row. A change of weights
begins new windows.
"""
import functools
import hashlib
from typing import NamedTuple

import numpy as np

WINDOW = 1024  # Rows.
PERIOD = 64  # Windows after which the pattern of counts repeats.


def permutation(n: int, *key) -> np.ndarray:
  """int64 [n], a shuffle of range(n) by the key alone, whatever the version of NumPy."""
  state = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
  with np.errstate(over="ignore"):  # SplitMix64 (Steele et al. 2014), the i-th output for i < n.
    x = np.uint64(state) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
  return np.argsort(x, kind="stable")


def largest_remainder(total: int, shares: np.ndarray) -> np.ndarray:
  """Whole numbers that sum to total, each within one of total * shares (which sum to 1)."""
  ideal = total * np.asarray(shares, np.float64)
  counts = np.floor(ideal).astype(np.int64)
  most_owed = np.argsort(counts - ideal, kind="stable")[:total - counts.sum()]
  counts[most_owed] += 1
  return counts


class Stage(NamedTuple):
  """Weights in force from a row on."""
  first_row: int
  shares: np.ndarray  # [sources], sums to 1.
  counts: np.ndarray  # [PERIOD, sources] rows of each source in each window.
  before: np.ndarray  # [sources] rows of each source before the stage.


class Mixture:
  """Deals rows to sources.

  Args:
    names: of the sources, for messages.
    stages: (first row, weight of each source) in ascending order; the first begins at row 0.
    seed: of the order within windows.

  Raises:
    ValueError: a weight too small to be dealt a row in a period.
  """

  def __init__(self, names: list[str], stages: list[tuple[int, list[float]]], seed: int):
    self.names, self.seed = names, seed
    self.stages = []
    before = np.zeros(len(names), np.int64)
    for i, (first_row, weights) in enumerate(stages):
      shares = np.asarray(weights, np.float64) / np.sum(weights)
      counts = _window_counts(names, shares)
      self.stages.append(Stage(first_row, shares, counts, before))
      if i + 1 < len(stages):
        before = self.counts(stages[i + 1][0])
    self._window = functools.lru_cache(maxsize=64)(self._window)

  def stage(self, row: int) -> int:
    """The number of the stage in force at a row."""
    return sum(row >= stage.first_row for stage in self.stages) - 1

  def locate(self, row: int) -> tuple[int, int]:
    """(source, how many earlier rows came from that source)."""
    i = self.stage(row)
    window, offset = divmod(row - self.stages[i].first_row, WINDOW)
    sources, ranks = self._window(i, window)
    source = int(sources[offset])
    return source, int(self._before(i, window)[source] + ranks[offset])

  def counts(self, row: int) -> np.ndarray:
    """int64 [sources], the rows of each source among the first `row` rows."""
    i = self.stage(max(row - 1, 0))
    window, offset = divmod(row - self.stages[i].first_row, WINDOW)
    sources = _deal(self.stages[i].counts[window % PERIOD], self.seed, i, window)[:offset]
    return self._before(i, window) + np.bincount(sources, minlength=len(self.names))

  def target(self, n_rows: int) -> np.ndarray:
    """float64 [sources], the shares that the weights ask of the first n_rows rows."""
    ends = [*(stage.first_row for stage in self.stages[1:]), n_rows]
    spans = [max(0, min(end, n_rows) - stage.first_row) for stage, end in zip(self.stages, ends)]
    return sum(span * stage.shares for span, stage in zip(spans, self.stages)) / n_rows

  def first_row_beyond(self, source: int, n: int, n_rows: int) -> int | None:
    """The first of n_rows rows that would be the source's row number n (from 0), or None."""
    if self.counts(n_rows)[source] <= n:
      return None
    low, high = 0, n_rows - 1
    while low < high:
      middle = (low + high) // 2
      low, high = (low, middle) if self.counts(middle + 1)[source] > n else (middle + 1, high)
    return low

  def _before(self, i, window):
    periods, rest = divmod(window, PERIOD)
    stage = self.stages[i]
    return stage.before + periods * stage.counts.sum(0) + stage.counts[:rest].sum(0)

  def _window(self, i, window):
    """The source of each row of a window, and its rank among that source's rows there."""
    sources = _deal(self.stages[i].counts[window % PERIOD], self.seed, i, window)
    ranks = np.empty(WINDOW, np.int64)
    for source in range(len(self.names)):
      mine = sources == source
      ranks[mine] = np.arange(mine.sum())
    return sources, ranks


def _window_counts(names, shares):
  period = largest_remainder(PERIOD * WINDOW, shares)
  if (lost := (period == 0) & (shares > 0)).any():
    i = int(np.argmax(lost))
    raise ValueError(f"data.sources: {names[i]} has {shares[i]:.2g} of the rows, less than 1 of "
                     f"{PERIOD * WINDOW}: give it a weight of 0, or at least "
                     f"{1 / (PERIOD * WINDOW):.2g} of the sum")
  counts = np.empty((PERIOD, len(shares)), np.int64)
  given = np.zeros(len(shares), np.int64)
  for window in range(PERIOD):
    # What is still owed, spread over the windows that are left: the last one settles it.
    owed = period - given
    counts[window] = largest_remainder(WINDOW, owed / owed.sum())
    given += counts[window]
  return counts


def _deal(counts, seed, stage, window):
  return np.repeat(np.arange(len(counts)), counts)[
    permutation(WINDOW, "mixture", seed, stage, window)
  ]

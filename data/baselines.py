"""What a model has to beat: bits per byte of old compressors on the same held-out text."""
import gzip
from typing import NamedTuple

import numpy as np

ORDER = 5  # Bytes in an n-gram: up to four of context and the one predicted.


def gzip_bits_per_byte(train: bytes, val: bytes) -> float:
  """gzip -9 of the validation text by itself; the training text is not read."""
  return 8 * len(gzip.compress(val, 9)) / len(val)


def ngram_bits_per_byte(train: bytes, val: bytes) -> float:
  """An order-5 byte model, interpolated by Witten-Bell."""
  return float(-np.log2(score_ngram(fit_ngram(train), val)).mean())


BASELINE = {"gzip": gzip_bits_per_byte, "ngram5": ngram_bits_per_byte}


class Counts(NamedTuple):
  """Of one n; n-grams and contexts are numbers in base 256, ascending."""
  grams: np.ndarray  # uint64 [distinct n-grams]
  gram_counts: np.ndarray  # How often each occurs.
  contexts: np.ndarray  # uint64 [distinct contexts], the first n - 1 bytes of the n-grams.
  context_counts: np.ndarray  # How often each is followed by a byte.
  context_types: np.ndarray  # By how many different bytes.


def fit_ngram(train: bytes, order: int = ORDER) -> list[Counts]:
  """Counts of all n-grams for n = 1 .. order. Needs about 30 bytes of memory per byte of text."""
  tables = []
  for n in range(1, order + 1):
    grams, gram_counts = _runs(np.sort(_grams(train, n)))
    contexts, context_types = _runs(grams >> np.uint64(8))
    begins = np.cumsum(context_types) - context_types
    context_counts = np.add.reduceat(gram_counts, begins) if len(begins) else gram_counts
    tables.append(Counts(grams, gram_counts, contexts, context_counts, context_types))
  return tables


def score_ngram(tables: list[Counts], data: bytes) -> np.ndarray:
  """float64 [len(data)], the probability of each byte after those before it.

  p_n(b | c) = (count(cb) + types(c) p_{n-1}(b | c')) / (count(c) + types(c)), with c' = c without
  its first byte, and p_0 = 1/256 (Witten and Bell 1991, method C, interpolated). The first bytes
  have less context.
  """
  p = np.full(len(data), 1 / 256)
  for n, table in enumerate(tables, start=1):
    grams = _grams(data, n)
    count = _look_up(grams, table.grams, table.gram_counts)
    context = grams >> np.uint64(8)
    total = _look_up(context, table.contexts, table.context_counts)
    types = _look_up(context, table.contexts, table.context_types)
    seen = total > 0  # After an unknown context the shorter one decides alone.
    tail = p[n - 1:]
    tail[seen] = (count[seen] + types[seen] * tail[seen]) / (total[seen] + types[seen])
  return p


def _grams(data, n):
  """uint64 [len(data) - n + 1]: the n bytes from each place, as one number."""
  bytes_ = np.frombuffer(data, np.uint8).astype(np.uint64)
  length = max(0, len(bytes_) - n + 1)
  grams = np.zeros(length, np.uint64)
  for i in range(n):
    grams = (grams << np.uint64(8)) | bytes_[i:i + length]
  return grams


def _runs(ascending):
  """The distinct values, and how often each occurs."""
  begins = np.flatnonzero(
    np.concatenate([[True], ascending[1:] != ascending[:-1]])[: len(ascending)]
  )
  return ascending[begins], np.diff(begins, append=len(ascending))


def _look_up(keys, table, values):
  """values where keys are in the ascending table, else 0."""
  if not len(table):
    return np.zeros(len(keys), np.int64)
  at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
  return np.where(table[at] == keys, values[at], 0)

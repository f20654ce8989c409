"""How documents become rows: which piece of which document stands where. Pure functions of document
lengths.

The unit is the prediction. A document of L tokens makes L - 1 of them (from each token but the
last, the next), and a row of T holds T. A piece of n predictions reads tokens[start : start + n]
and is trained on tokens[start + 1 : start + n + 1], so a document cut over two rows loses no
prediction and repeats none: every token but the first of each document is a target exactly once per
epoch.
"""
from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
  """The pieces of all rows; those of row r are [first[r] : first[r + 1]] of the other arrays, from
  left to right.
  """
  first: np.ndarray  # int64 [rows + 1]
  document: np.ndarray  # int64 [pieces], into the lengths that were planned.
  start: np.ndarray  # int64 [pieces], predictions.
  length: np.ndarray  # int32 [pieces], predictions.

  @property
  def n_rows(self) -> int:
    return len(self.first) - 1

  def row(self, r: int) -> list[tuple[int, int, int]]:
    """(document, start, length) of each piece of a row."""
    span = slice(self.first[r], self.first[r + 1])
    return list(
      zip(self.document[span].tolist(), self.start[span].tolist(), self.length[span].tolist())
    )

  def efficiency(self, seq_len: int) -> float:
    """The share of the rows' places that is not padding."""
    return float(self.length.sum(dtype=np.int64)) / max(1, self.n_rows * seq_len)


def concat(lengths: np.ndarray, seq_len: int) -> Plan:
  """One stream, cut every seq_len predictions: only the last row has padding, and many documents
  are cut.

  Args:
    lengths: predictions of each document.
  """
  lengths = np.asarray(lengths, np.int64)
  ends = np.cumsum(lengths)
  total = int(ends[-1]) if len(ends) else 0
  # A piece begins where a document does and where a row does.
  begins = np.union1d((ends - lengths)[lengths > 0], np.arange(0, total, seq_len))
  document = np.searchsorted(ends, begins, side="right")
  length = np.diff(begins, append=total)
  first = np.searchsorted(begins, np.arange(0, total, seq_len))
  return Plan(
    np.append(first, len(begins)),
    document,
    begins - (ends - lengths)[document],
    length.astype(np.int32),
  )


def best_fit(lengths: np.ndarray, seq_len: int) -> Plan:
  """Best-fit decreasing (Ding et al. 2024, 2404.10830) cuts only documents longer than a row.

  Longer ones are cut into full rows and a rest; then each rest, longest first, goes into the
  fullest row that has room for it. The number of rows depends on the lengths alone, not on their
  order. About a second per million documents.
  """
  lengths = np.asarray(lengths, np.int64)
  n_full, rest = np.divmod(lengths, seq_len)
  full_document = np.repeat(np.arange(len(lengths)), n_full)
  full_start = (
    np.arange(len(full_document)) - np.repeat(np.cumsum(n_full) - n_full, n_full)
  ) * seq_len

  order = np.argsort(-rest, kind="stable")
  order = order[rest[order] > 0]
  row = np.empty(len(order), np.int64)
  rows_with = [[] for _ in range(seq_len + 1)]  # By how much room they have.
  rooms = 0  # Bit `room` is set where rows_with[room] is not empty.
  n_rows = 0
  for i, size in enumerate(rest[order].tolist()):
    fits = rooms >> size
    if fits:
      room = size + (fits & -fits).bit_length() - 1  # The least that fits.
      rows = rows_with[room]
      r = rows.pop()
      if not rows:
        rooms ^= 1 << room
    else:
      room, r, n_rows = seq_len, n_rows, n_rows + 1
    row[i] = r
    if room > size:
      rows_with[room - size].append(r)
      rooms |= 1 << (room - size)

  by_row = np.argsort(row, kind="stable")
  rest_document = order[by_row]
  counts = np.concatenate([
    np.ones(len(full_document), np.int64),
    np.bincount(row, minlength=n_rows),
  ])
  return Plan(
    np.concatenate([[0], np.cumsum(counts)]),
    np.concatenate([full_document, rest_document]),
    np.concatenate([full_start, (n_full * seq_len)[rest_document]]),
    np.concatenate([np.full(len(full_document), seq_len), rest[rest_document]]).astype(np.int32),
  )


PACKING = {"concat": concat, "best_fit": best_fit}


def make_row(pieces: list[np.ndarray], seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
  """Lays pieces out as one row.

  Args:
    pieces: for n predictions, the n + 1 tokens they go from and to.

  Returns:
    [seq_len] arrays. tokens, targets int32; weights float32, 1 where a prediction is trained;
    positions int32, from 0 in each piece; segments int32, 1, 2, ... for the pieces and 0 for
    padding.
  """
  tokens_T = np.full(seq_len, pad_id, np.int32)
  targets_T = np.full(seq_len, pad_id, np.int32)
  weights_T = np.zeros(seq_len, np.float32)
  positions_T = np.zeros(seq_len, np.int32)
  segments_T = np.zeros(seq_len, np.int32)
  at = 0
  for segment, piece in enumerate(pieces, start=1):
    n = len(piece) - 1
    span = slice(at, at + n)
    tokens_T[span], targets_T[span] = piece[:-1], piece[1:]
    weights_T[span] = 1
    positions_T[span] = np.arange(n)
    segments_T[span] = segment
    at += n
  return {"tokens": tokens_T, "targets": targets_T, "weights": weights_T, "positions": positions_T,
          "segments": segments_T}

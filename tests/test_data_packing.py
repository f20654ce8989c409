import collections

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data.packing import PACKING, best_fit, concat, make_row

LENGTHS = st.lists(st.integers(0, 70), max_size=60)


def predictions(plan):
  """How often each (document, prediction) stands in the plan."""
  return collections.Counter((d, i) for r in range(plan.n_rows) for d, start, n in plan.row(r)
                             for i in range(start, start + n))


@pytest.mark.parametrize("name", sorted(PACKING))
@hypothesis.given(lengths=LENGTHS, seq_len=st.integers(1, 32))
@hypothesis.settings(max_examples=100, deadline=None)
def test_every_prediction_stands_in_exactly_one_row(name, lengths, seq_len):
  plan = PACKING[name](np.array(lengths, np.int64), seq_len)
  assert predictions(plan) == collections.Counter(
    (d, i) for d, n in enumerate(lengths) for i in range(n)
  )
  for r in range(plan.n_rows):
    assert 0 < sum(n for _, _, n in plan.row(r)) <= seq_len
    assert all(n > 0 for _, _, n in plan.row(r))


@hypothesis.given(lengths=LENGTHS, seq_len=st.integers(1, 32))
@hypothesis.settings(max_examples=100, deadline=None)
def test_concat_pads_only_the_last_row(lengths, seq_len):
  plan = concat(np.array(lengths, np.int64), seq_len)
  assert plan.n_rows == -(-sum(lengths) // seq_len)
  stream = [(d, i) for d, n in enumerate(lengths) for i in range(n)]
  laid = [
    (d, i)
    for r in range(plan.n_rows)
    for d, start, n in plan.row(r)
    for i in range(start, start + n)
  ]
  assert laid == stream


def naive_best_fit(lengths, seq_len):
  """The paper's algorithm, as it is told: one item after another over all rows."""
  items = sorted((n % seq_len for n in lengths if n % seq_len), reverse=True)
  rooms = []
  for size in items:
    fitting = [room for room in rooms if room >= size]
    if fitting:
      rooms.remove(min(fitting))
      rooms.append(min(fitting) - size)
    else:
      rooms.append(seq_len - size)
  return sum(n // seq_len for n in lengths) + len(rooms), sorted(rooms)


@hypothesis.given(lengths=LENGTHS, seq_len=st.integers(2, 32), seed=st.integers(0, 9))
@hypothesis.settings(max_examples=100, deadline=None)
def test_best_fit_is_the_textbook_algorithm_in_any_order(lengths, seq_len, seed):
  shuffled = np.random.default_rng(seed).permutation(np.array(lengths, np.int64))
  plan = best_fit(shuffled, seq_len)
  rooms = sorted(seq_len - sum(n for _, _, n in plan.row(r)) for r in range(plan.n_rows))
  n_rows, naive_rooms = naive_best_fit(lengths, seq_len)
  assert plan.n_rows == n_rows and [r for r in rooms if r] == [r for r in naive_rooms if r]


def test_best_fit_cuts_no_document_that_fits():
  lengths = np.random.default_rng(0).integers(1, 200, 500)
  pieces = collections.Counter(best_fit(lengths, 100).document.tolist())
  assert all(pieces[d] == -(-n // 100) for d, n in enumerate(lengths.tolist()))
  cut = collections.Counter(concat(lengths, 100).document.tolist())
  assert sum(cut.values()) > sum(pieces.values())


def test_best_fit_wastes_little_on_long_tailed_lengths():
  lengths = (np.random.default_rng(0).pareto(1.1, 20_000) * 200 + 20).astype(np.int64)
  assert best_fit(lengths, 512).efficiency(512) > 0.97


def test_row_layout():
  row = make_row(
    [np.array([1, 7, 8, 2], np.uint16), np.array([1, 9], np.uint16)], seq_len=6, pad_id=0
  )
  expected = {
    "tokens": [1, 7, 8, 1, 0, 0],
    "targets": [7, 8, 2, 9, 0, 0],
    "weights": [1, 1, 1, 1, 0, 0],
    "positions": [0, 1, 2, 0, 0, 0],
    "segments": [1, 1, 1, 2, 0, 0],
  }
  assert {name: array.tolist() for name, array in row.items()} == expected
  assert {name: array.dtype.name for name, array in row.items()} == {
    "tokens": "int32",
    "targets": "int32",
    "weights": "float32",
    "positions": "int32",
    "segments": "int32",
  }

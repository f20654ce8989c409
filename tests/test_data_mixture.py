import collections
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data.mixture import PERIOD, WINDOW, Mixture, largest_remainder, permutation

WEIGHTS = st.lists(st.floats(0.1, 100), min_size=1, max_size=6)


def deal(mixture, rows):
  return [mixture.locate(row) for row in rows]


@hypothesis.given(total=st.integers(0, 10_000), weights=WEIGHTS)
@hypothesis.settings(deadline=None)
def test_largest_remainder(total, weights):
  shares = np.array(weights) / sum(weights)
  counts = largest_remainder(total, shares)
  assert counts.sum() == total and np.all(np.abs(counts - total * shares) < 1 + 1e-6)


@hypothesis.given(weights=WEIGHTS, seed=st.integers(0, 99))
@hypothesis.settings(max_examples=20, deadline=None)
def test_every_window_and_period_holds_its_share(weights, seed):
  mixture = Mixture([str(i) for i in range(len(weights))], [(0, weights)], seed)
  shares = np.array(weights) / sum(weights)
  counts = np.array([mixture.counts(w * WINDOW) for w in range(PERIOD + 1)])
  assert np.all(np.abs(np.diff(counts, axis=0) - WINDOW * shares) < 2)
  assert np.all(np.abs(counts[-1] - PERIOD * WINDOW * shares) < 1 + 1e-6)


def test_rates_over_a_million_rows():
  weights = np.array([0.7, 0.2, 0.0999, 0.0001])
  counts = Mixture(list("abcd"), [(0, weights)], 0).counts(1_000_000)
  assert np.all(np.abs(counts - 1e6 * weights) < 3 * np.sqrt(1e6 * weights * (1 - weights)))
  assert np.all(np.abs(counts / 1e6 - weights) < 1e-4)


def test_each_source_is_read_in_order_without_a_gap():
  mixture = Mixture(list("abc"), [(0, [5, 3, 0.01]), (1500, [0, 1, 1]), (4001, [1, 1, 1])], 7)
  seen = collections.Counter()
  for row in range(6000):
    if row % 700 == 0:
      assert mixture.counts(row).tolist() == [seen[0], seen[1], seen[2]]
    source, n = mixture.locate(row)
    assert n == seen[source]
    seen[source] += 1


def test_weights_change_at_the_row():
  mixture = Mixture(list("ab"), [(0, [1, 0]), (1500, [0, 1])], 0)
  assert [s for s, _ in deal(mixture, range(1498, 1502))] == [0, 0, 1, 1]
  assert mixture.target(3000).tolist() == [0.5, 0.5] and mixture.target(1500).tolist() == [1, 0]


def test_the_deal_depends_on_seed_and_row_alone():
  make = lambda seed: Mixture(list("ab"), [(0, [0.5, 0.5])], seed)
  whole = deal(make(3), range(5000))
  assert deal(make(3), range(4999, 3000, -1)) == whole[4999:3000:-1]
  assert deal(make(4), range(5000)) != whole


def test_where_a_source_runs_out():
  mixture = Mixture(list("ab"), [(0, [3, 1])], 0)
  dealt = deal(mixture, range(5000))
  for source, n in itertools.product((0, 1), (0, 1, 300, 1000)):
    assert mixture.first_row_beyond(source, n, 5000) == dealt.index((source, n))
  assert mixture.first_row_beyond(1, 1300, 5000) is None


def test_a_weight_that_would_never_be_dealt_is_refused():
  with pytest.raises(ValueError, match="rare has 1e-09 of the rows"):
    Mixture(["big", "rare"], [(0, [1, 1e-9])], 0)
  assert Mixture(["big", "off"], [(0, [1, 0])], 0).counts(9999).tolist() == [9999, 0]


def test_permutations_are_pinned():
  """A run must find its rows again with any later version of NumPy or of this project."""
  assert permutation(8, "rows", 0, "text", 1).tolist() == [4, 5, 1, 2, 3, 7, 0, 6]
  assert sorted(permutation(1000, 1).tolist()) == list(range(1000))
  assert permutation(1000, 1).tolist() != permutation(1000, 2).tolist()

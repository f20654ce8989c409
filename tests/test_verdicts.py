"""Verdicts: two cells are scipy's paired t-test, limma's arithmetic by another path, and by simulation the
level, the intervals' coverage and the power. `python -m tests.test_verdicts` prints the whole table."""
import numpy as np
import pytest
from scipy import optimize, special, stats

from experiments.verdicts import LEVEL, estimate_noise, holm, judge

SPREAD = {  # Standard deviations [cells] of the runs' noise, cell 0 the baseline.
  "equal": lambda rng, n_cells: np.ones(n_cells),
  "by chance": lambda rng, n_cells: np.exp(rng.normal(0, 0.5, n_cells)),  # Half of the variances 2 x off.
  "one cell x5": lambda rng, n_cells: np.where(np.arange(n_cells) == n_cells - 1, 5.0, 1.0),
  "one cell x20": lambda rng, n_cells: np.where(np.arange(n_cells) == n_cells - 1, 20.0, 1.0),
  "half x3": lambda rng, n_cells: np.where(np.arange(n_cells) % 2, 3.0, 1.0),
  "baseline x3": lambda rng, n_cells: np.where(np.arange(n_cells), 1.0, 3.0),
}


def verdicts(judged):
  return [c.verdict for c in judged.comparisons]


def simulate(rng, spread, n_cells, n_seeds, n_sweeps, planted=0.0):
  """Sweeps without a difference but `planted`, in cell 1; the seeds' own effect is 10 times the noise.

  Returns shares: (sweeps that flag any cell but a planted one, more than one, those that find cell 1, true
  differences inside their intervals, the least of one cell, sweeps with all inside the intervals for all).
  """
  flagged, found, inside, all_inside = [], [], [], []
  for _ in range(n_sweeps):
    metric = SPREAD[spread](rng, n_cells)[:, None] * rng.normal(size=(n_cells, n_seeds))
    metric += 10 * rng.normal(size=n_seeds)
    metric[1] += planted
    comparisons = judge(metric).comparisons[1:]
    truth = [planted] + [0] * (n_cells - 2)
    flagged.append(sum(c.verdict != "within noise" for c in comparisons[planted != 0:]))
    found.append(comparisons[0].verdict == "worse")
    inside.append([c.low <= t <= c.high for c, t in zip(comparisons, truth)])
    all_inside.append(all(c.low_all <= t <= c.high_all for c, t in zip(comparisons, truth)))
  flagged = np.array(flagged)
  return ((flagged > 0).mean(), (flagged > 1).mean(), np.mean(found), np.mean(inside),
          np.mean(inside, axis=0).min(), np.mean(all_inside))


@pytest.mark.parametrize("n", [2, 3, 8])
def test_two_cells_are_the_paired_t_test(n):
  metric = np.random.default_rng(n).normal(size=(2, n)) + np.arange(n) * 100
  known = stats.ttest_rel(metric[1], metric[0])
  interval, mean = known.confidence_interval(0.95), stats.t.interval(0.95, n - 1, metric[1].mean(),
                                                                     stats.sem(metric[1]))
  cell = judge(metric).comparisons[1]
  np.testing.assert_allclose([cell.p, cell.p_adjusted, cell.low, cell.high, cell.low_all, cell.high_all],
                             [known.pvalue] * 2 + [interval.low, interval.high] * 2, rtol=1e-9)
  np.testing.assert_allclose([cell.mean - cell.half, cell.mean + cell.half], mean, rtol=1e-9)


def test_the_prior_is_that_of_the_paper():
  """Equations 4 to 6 of Smyth (2004) by scipy's root finder; residuals by least squares on dummies."""
  rng = np.random.default_rng(7)
  n_cells, n = 12, 6
  metric = rng.normal(size=(n_cells, n)) * np.sqrt(5 / rng.chisquare(5, (n_cells, 1))) + rng.normal(size=n)
  noise = estimate_noise(metric)
  assert not noise.noisy_A.any() and np.isfinite(noise.prior_df)
  design = np.array([[a == i for i in range(n_cells)] + [s == j for j in range(1, n)]
                     for a in range(n_cells) for s in range(n)], float)
  beta, *_ = np.linalg.lstsq(design, metric.ravel(), rcond=None)
  residual = (metric.ravel() - design @ beta).reshape(n_cells, n)
  own, d = (residual ** 2).sum(1) / (n - 1) * n_cells / (n_cells - 1), n - 1
  e = np.log(own) - special.digamma(d / 2) + np.log(d / 2)
  target = np.mean((e - e.mean()) ** 2 * n_cells / (n_cells - 1) - special.polygamma(1, d / 2))
  prior_df = optimize.brentq(lambda d0: special.polygamma(1, d0 / 2) - target, 0.1, 1e4)
  prior = np.exp(e.mean() + special.digamma(prior_df / 2) - np.log(prior_df / 2))
  np.testing.assert_allclose([noise.prior_df, noise.variance], [prior_df, prior], rtol=1e-6)
  np.testing.assert_allclose(noise.variance_A, (prior_df * prior + d * own) / (prior_df + d), rtol=1e-6)
  assert noise.df == pytest.approx(prior_df + d)


def test_holm_is_that_of_its_definition():
  p = [0.01, 0.04, 0.03, 0.005, 1.0]
  assert holm(p) == pytest.approx([0.04, 0.09, 0.09, 0.025, 1.0])  # By hand: 5, 4, 3, 2, 1 times, in order.
  assert holm([0.02]) == [0.02]


@pytest.mark.parametrize("spread,n_seeds,most", [
  ("equal", 2, 0.06), ("equal", 3, 0.06), ("by chance", 3, 0.13), ("one cell x20", 3, 0.09)])
def test_twenty_cells_that_are_the_same_are_called_the_same(spread, n_seeds, most):
  """100 sweeps: `most` lies two standard errors and more above the rates of the slow test."""
  any_, several, _, inside, _, all_inside = simulate(np.random.default_rng(0), spread, 21, n_seeds, 100)
  assert any_ <= most and several <= 0.05
  assert 0.92 < inside < 0.98 and all_inside > 1 - most - 0.02


@pytest.mark.slow
@pytest.mark.parametrize("n_seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", SPREAD)
def test_the_level_the_coverage_and_the_power(spread, n_seeds):
  """1000 A/A sweeps of 20 cells and the baseline: what the docstring of experiments/verdicts.py says."""
  level = {"equal": 0.045, "half x3": {2: 0.075}.get(n_seeds, 0.065),
           "by chance": {2: 0.105, 3: 0.09}.get(n_seeds, 0.07),
           "one cell x5": {2: 0.125, 3: 0.085}.get(n_seeds, 0.06),
           "one cell x20": {2: 0.11}.get(n_seeds, 0.06),
           "baseline x3": {2: 0.16, 3: 0.125}.get(n_seeds, 0.07)}[spread]
  any_, several, _, inside, least, _ = simulate(np.random.default_rng(1), spread, 21, n_seeds, 1000)
  assert any_ <= level
  if spread != "baseline x3":
    assert several <= 0.035 and 0.93 < inside < 0.98


@pytest.mark.parametrize("n_seeds,least", [(2, 0.3), (3, 0.5)])
def test_a_true_difference_is_found_where_pairs_alone_find_nothing(n_seeds, least):
  """4 standard errors: Holm over paired t-tests of each cell finds it in 1 % (2 seeds) and 4 % (3)."""
  rng, planted = np.random.default_rng(2), 4 * (2 / n_seeds) ** 0.5
  _, _, found, *_ = simulate(rng, "equal", 21, n_seeds, 60, planted)
  paired = 0
  for _ in range(60):
    metric = rng.normal(size=(21, n_seeds)) + planted * (np.arange(21) == 1)[:, None]
    paired += holm(stats.ttest_rel(metric[1:], metric[:1], axis=1).pvalue)[0] < LEVEL
  assert found > least > paired / 60 + 0.2


def test_the_band_is_what_is_found_by_half_and_by_four_in_five():
  rng, table = np.random.default_rng(3), np.random.default_rng(0).normal(size=(21, 4))
  judged = judge(table)
  assert judged.noise.prior_df == np.inf and not judged.noise.noisy_A.any()
  se, df = (2 * judged.noise.variance / 4) ** 0.5, judged.noise.df
  t = (rng.normal(size=100_000) + np.array([judged.band, judged.found])[:, None] / se) / np.sqrt(
    rng.chisquare(df, 100_000) / df)
  called = (t > stats.t.ppf(1 - LEVEL / 2 / 20, df)).mean(1)
  np.testing.assert_allclose(called, [0.5, 0.8], atol=0.015)


def test_the_direction_is_the_metrics():
  metric = np.array([[3.0, 3.1, 3.2], [2.0, 2.11, 2.2], [4.0, 4.1, 4.21]])
  assert verdicts(judge(metric)) == ["baseline", "better", "worse"]
  assert verdicts(judge(metric, higher_is_better=True)) == ["baseline", "worse", "better"]
  turned = judge(metric[::-1], baseline=2)
  assert verdicts(turned) == ["worse", "better", "baseline"]
  assert turned.comparisons[1].difference == judge(metric).comparisons[1].difference


def test_runs_that_are_the_same_differ_by_nothing_and_are_no_second_witness():
  rng = np.random.default_rng(5)
  metric = rng.normal(size=(4, 3))
  judged, again = judge(metric), judge(np.concatenate([metric, metric[[0, 0, 2]]]))
  for a in (4, 5):
    cell = again.comparisons[a]
    assert cell.same and cell.verdict == "within noise"
    assert (cell.low, cell.difference, cell.high) == (0, 0, 0)
  assert again.noise.variance == judged.noise.variance and again.noise.df == judged.noise.df
  assert verdicts(judge(np.ones((3, 3)))) == ["baseline", "within noise", "within noise"]
  constant = judge(np.array([[1.0, 2.0], [1.5, 2.5], [1.0, 2.0]]))  # No noise at all.
  assert verdicts(constant) == ["baseline", "worse", "within noise"]


def test_runs_that_are_missing():
  metric = np.random.default_rng(6).normal(size=(5, 3))
  holes = metric.copy()
  holes[2, 1], holes[3, 0] = np.nan, np.inf
  judged, rest = judge(holes), judge(metric[[0, 1, 4]])
  assert verdicts(judged)[2:4] == ["", ""] and judged.comparisons[2].mean is None
  assert [judged.comparisons[i] for i in (0, 1, 4)] == rest.comparisons
  one = judge(metric[:, :1])
  assert one.reason == "no verdict: a verdict needs 2 seeds or more, and there is 1" and one.noise is None
  assert one.comparisons[1].difference == metric[1, 0] - metric[0, 0] and one.comparisons[1].low is None
  half = metric.copy()
  half[2:, 2] = np.nan  # The third seed has been run by two of five.
  assert judge(half).seeds == [0, 1] and "2 of 3 seeds count" in judge(half).warnings[1]
  half[0] = np.nan
  assert "the baseline has no finished run" in judge(half).reason
  with pytest.raises(ValueError, match=r"shape \(5, 3\) with baseline=5; nearest valid: .* 0 to 4"):
    judge(metric, baseline=5)


def test_a_wild_cell_is_judged_by_its_own_pairs_and_spoils_nothing():
  rng = np.random.default_rng(7)
  metric = rng.normal(size=(12, 3))
  metric[5] = [40, -55, 70]
  judged, calm = judge(metric), estimate_noise(np.delete(metric, 5, axis=0))
  assert judged.comparisons[5].noisy and not judged.comparisons[4].noisy
  assert judged.comparisons[5].p == pytest.approx(stats.ttest_rel(metric[5], metric[0]).pvalue)
  np.testing.assert_allclose(np.delete(judged.noise.variance_A, 5), calm.variance_A)
  assert "the baseline scatters more" in judge(metric, baseline=5).warnings[0]


def main():
  print("21 cells, 2000 sweeps; planted: 4 standard errors of a difference, in one cell\n"
        "spread        seeds  any flagged  >1 flagged  coverage  least  all at once  planted is found")
  for spread in SPREAD:
    for n in (2, 3, 5):
      rng = np.random.default_rng(n)
      any_, several, _, inside, least, all_ = simulate(rng, spread, 21, n, 2000)
      found = simulate(rng, spread, 21, n, 500, 4 * (2 / n) ** 0.5)[2]
      print(f"{spread:<13} {n:5} {any_:12.1%} {several:11.1%} {inside:9.1%} {least:6.1%} {all_:12.1%}"
            f" {found:17.0%}", flush=True)


if __name__ == "__main__":
  main()

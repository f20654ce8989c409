"""Is the difference real? Each cell of a sweep against the baseline, over the seeds that both have run.

Runs of one seed read the same rows, so the seed's own effect is taken out: a two-way table, cells x seeds.
What is left is noise. Cells with few seeds hardly know their own noise, so each cell's variance is drawn
towards that of the others by empirical Bayes (Smyth 2004, doi:10.2202/1544-6115.1027, the moderated t). A
cell that scatters plainly more than the others (F-test, NOISY) is judged by the paired t-test of its own runs
instead, as all cells are where the baseline is such a cell. Two cells: the paired t-test. Holm's correction
over all comparisons.

By simulation (python -m tests.test_verdicts; 20 cells and the baseline, none different), a sweep calls any
difference in 2 to 3 % of cases where the noise is alike in all cells. Where variances differ by chance or one
cell is wild: 2 seeds 9 %, 3 seeds 7 %, 5 seeds 5 % at worst. A baseline with three times the noise of the
others: 13, 9 and 5 %.
"""
import dataclasses
import typing

import numpy as np
from scipy import special

LEVEL = 0.05  # Of the verdicts, over all comparisons together; intervals cover 1 - LEVEL.
NOISY = 0.05  # A cell with a smaller p of scattering no more than the others is judged by its own runs.
POWER = 0.8
ROUNDING = 1e-12  # Relative to the largest metric: standard deviations below it are none.


class Noise(typing.NamedTuple):
  """How much the runs of a sweep scatter, the seeds' own effect taken out.

  Attributes:
    variance_A: of one run, moderated; that of the prior for cells outside of the pool.
    df: degrees of freedom of each variance.
    prior_df: what the other cells add to a cell's own; infinite: all cells share one variance.
    variance: of the prior, which is that of a typical cell.
    noisy_A: cells that scatter plainly more than the others.
  """
  variance_A: np.ndarray
  df: float
  prior_df: float
  variance: float
  noisy_A: np.ndarray


@dataclasses.dataclass(slots=True)
class Comparison:
  """One cell beside the baseline. None: not known, for want of seeds or because a run is missing.

  Attributes:
    verdict: "better", "worse", "within noise", "baseline"; "": none, see Judgement.reason.
    mean: of the metric over the seeds that count; half: half of its interval, of these runs alone.
    difference: cell - baseline, mean over the seeds; low, high: its interval.
    low_all, high_all: intervals that cover all differences of the sweep at once (Bonferroni).
    p: of no difference; p_adjusted: Holm's.
    noisy: judged by the paired t-test of its own runs.
    same: every run has the very numbers of the baseline's.
  """
  verdict: str = ""
  mean: float | None = None
  half: float | None = None
  difference: float | None = None
  low: float | None = None
  high: float | None = None
  low_all: float | None = None
  high_all: float | None = None
  p: float | None = None
  p_adjusted: float | None = None
  noisy: bool = False
  same: bool = False


@dataclasses.dataclass(slots=True)
class Judgement:
  """A sweep's verdicts.

  Attributes:
    comparisons: one for each cell, in order.
    seeds: indices of the seeds that count: finished by the baseline and by half of the cells or more.
    noise: None where nothing can be judged; reason says why.
    band: a difference beyond it is called one: the median half-width of the intervals for all at once.
    found: a true difference of this size is called one in POWER of sweeps, before Holm's later steps help.
    warnings: sentences for the reader.
  """
  comparisons: list[Comparison]
  seeds: list[int]
  noise: Noise | None = None
  band: float | None = None
  found: float | None = None
  reason: str = ""
  warnings: list[str] = dataclasses.field(default_factory=list)


def judge(metric_AN, baseline: int = 0, *, higher_is_better: bool = False, level: float = LEVEL) -> Judgement:
  """
  Args:
    metric_AN: the metric of each cell and seed; NaN or infinite: no such run. Cells without a number in a
      seed that counts are left out of everything.
    baseline: the row that the others are compared with.

  Raises:
    ValueError: a table that is not two-dimensional, a baseline outside of it.
  """
  metric_AN = np.asarray(metric_AN, float)
  if metric_AN.ndim != 2 or not 0 <= baseline < len(metric_AN):
    raise ValueError(f"metrics of shape {metric_AN.shape} with baseline={baseline}; nearest valid: [cells, "
                     f"seeds] with a baseline of 0 to {len(metric_AN) - 1}")
  finite_AN = np.isfinite(metric_AN)
  seeds = np.flatnonzero(finite_AN[baseline] & (finite_AN.mean(0) >= 0.5))
  whole_A = finite_AN[:, seeds].all(1) & bool(len(seeds))
  judged = Judgement([Comparison() for _ in metric_AN], seeds.tolist())
  judged.comparisons[baseline].verdict = "baseline"
  whole, n = np.flatnonzero(whole_A), len(seeds)
  others = whole[whole != baseline]
  x_AN = metric_AN[:, seeds]
  if n:
    for a, mean in zip(whole, x_AN[whole].mean(1)):
      judged.comparisons[a].mean = float(mean)
    for a, difference in zip(others, (x_AN[others] - x_AN[baseline]).mean(1)):
      judged.comparisons[a].difference = float(difference)
  if n > 1:
    for a, half in zip(whole, _quantile(n - 1.0, level) * x_AN[whole].std(1, ddof=1) / n ** 0.5):
      judged.comparisons[a].half = float(half)
  judged.reason = _why_not(n, len(others), metric_AN.shape[1])
  if not judged.reason:
    _compare(judged, x_AN, baseline, others, -1 if higher_is_better else 1, level)
    judged.warnings = _warn(judged, n, metric_AN.shape[1], baseline, others)
  return judged


def holm(p):
  """Holm's adjusted p-values (1979): the least level at which each comparison is still called."""
  p = np.asarray(p, float)
  order = np.argsort(p, kind="stable")
  stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
  adjusted = np.empty_like(p)
  adjusted[order] = np.minimum(stepped, 1)
  return adjusted


def estimate_noise(x_AN) -> Noise:
  """The noise of the runs of A >= 2 cells over N >= 2 seeds, all finite. Rows that are equal count once."""
  x_AN = np.asarray(x_AN, float)
  rows_UN, inverse_A = np.unique(x_AN, axis=0, return_inverse=True)
  n_rows, n = rows_UN.shape
  floor = (ROUNDING * np.abs(x_AN).max()) ** 2
  if n_rows == 1:
    return Noise(np.full(len(x_AN), floor), n - 1, np.inf, floor, np.zeros(len(x_AN), bool))
  centred_UN = rows_UN - rows_UN.mean(1, keepdims=True)
  pool_U = np.ones(n_rows, bool)
  for _ in range(min(n_rows // 3, n_rows - 3)):  # The wildest leaves, then the others are looked at again.
    p_U = np.where(pool_U, _scatter_p(centred_UN, pool_U, floor), 1)
    if p_U.min() * pool_U.sum() >= NOISY:
      break
    pool_U[p_U.argmin()] = False
  noisy_U = ~pool_U
  if n_rows > 2:
    noisy_U |= _scatter_p(centred_UN, pool_U, floor) < NOISY
  residual_UN = centred_UN[pool_U] - centred_UN[pool_U].mean(0)
  squares_U, most = (residual_UN ** 2).sum(1), (pool_U.sum() - 1) * (n - 1)
  own_U = squares_U / (n - 1) * pool_U.sum() / (pool_U.sum() - 1) + floor
  prior_df, variance = _prior(own_U, n - 1)
  variance_U = np.full(n_rows, variance)
  if np.isfinite(prior_df):
    variance_U[pool_U] = (prior_df * variance + (n - 1) * own_U) / (prior_df + n - 1)
  return Noise(variance_U[inverse_A.ravel()], float(min(prior_df + n - 1, most)), float(prior_df),
               float(variance), noisy_U[inverse_A.ravel()])


def _scatter_p(centred_UN, pool_U, floor):
  """p of the F-test that a row scatters no more around the pool's mean than the pool's other rows do."""
  n = centred_UN.shape[1]
  in_pool_U1 = pool_U[:, None].astype(float)
  size_U1 = pool_U.sum() - in_pool_U1  # Of the pool without the row.
  mean_UN = ((centred_UN * in_pool_U1).sum(0) - centred_UN * in_pool_U1) / size_U1
  squares_U = ((centred_UN ** 2 * in_pool_U1).sum(0) - centred_UN ** 2 * in_pool_U1
               - size_U1 * mean_UN ** 2).sum(1)
  df_U = (size_U1[:, 0] - 1) * (n - 1)
  own_U = ((centred_UN - mean_UN) ** 2).sum(1) / (n - 1) / (1 + 1 / size_U1[:, 0])
  return special.fdtrc(n - 1, df_U, (own_U + floor) / (np.maximum(squares_U, 0) / df_U + floor))


def _prior(variance_A, df):
  """(prior degrees of freedom, prior variance) by the moments of the logarithms: Smyth 2004, section 6.2."""
  logs_A = np.log(np.maximum(variance_A, 1e-5 * np.median(variance_A)))
  logs_A += np.log(df / 2) - special.digamma(df / 2)
  spread = logs_A.var(ddof=1) - special.polygamma(1, df / 2) if len(logs_A) > 2 else 0.0
  if spread <= 0:  # No more than chance makes of one common variance.
    return np.inf, variance_A.mean()
  half = _inverse_trigamma(spread)
  return 2 * half, np.exp(logs_A.mean() + special.digamma(half) - np.log(half))


def _inverse_trigamma(value: float) -> float:
  """y with trigamma(y) = value > 0, by Newton's method on 1 / trigamma, which is nearly straight."""
  y = 0.5 + 1 / value
  for _ in range(50):
    now = special.polygamma(1, y)
    step = now * (1 - now / value) / special.polygamma(2, y)
    y += step
    if abs(step) < 1e-10 * y:
      break
  return float(y)


def _compare(judged, x_AN, baseline, others, worse_sign, level):
  """Fills in the comparisons of `others`, the noise, the band."""
  n, rows = x_AN.shape[1], np.append(baseline, others)
  judged.noise = noise = estimate_noise(x_AN[rows])
  floor = (ROUNDING * np.abs(x_AN[rows]).max()) ** 2
  paired_M = (x_AN[others] - x_AN[baseline]).var(1, ddof=1) + floor
  own_M = noise.noisy_A[1:] | noise.noisy_A[0]
  same_M = (x_AN[others] == x_AN[baseline]).all(1)
  variance_M = np.where(own_M, paired_M, noise.variance_A[1:] + noise.variance_A[0])
  se_M = np.sqrt(np.where(same_M, 0, variance_M) / n)
  df_M = np.where(own_M, n - 1.0, noise.df)
  difference_M = np.array([judged.comparisons[a].difference for a in others])
  p_M = np.where(same_M, 1, 2 * special.stdtr(df_M, -np.abs(difference_M) / np.where(same_M, 1, se_M)))
  adjusted_M = holm(p_M)
  half_M, half_all_M = _quantile(df_M, level) * se_M, _quantile(df_M, level / len(others)) * se_M
  for i, a in enumerate(others):
    comparison, difference = judged.comparisons[a], difference_M[i]
    comparison.low, comparison.high = float(difference - half_M[i]), float(difference + half_M[i])
    comparison.low_all = float(difference - half_all_M[i])
    comparison.high_all = float(difference + half_all_M[i])
    comparison.p, comparison.p_adjusted = float(p_M[i]), float(adjusted_M[i])
    comparison.noisy, comparison.same = bool(own_M[i]), bool(same_M[i])
    worse = difference * worse_sign > 0
    comparison.verdict = "within noise" if adjusted_M[i] > level else "worse" if worse else "better"
  counted = ~same_M if not same_M.all() else same_M
  judged.band = float(np.median(half_all_M[counted]))
  judged.found = float(np.median((half_all_M + special.stdtrit(df_M, POWER) * se_M)[counted]))


def _quantile(df, level):
  return special.stdtrit(df, 1 - level / 2)


def _why_not(n_seeds, n_others, n_asked):
  if n_seeds == 0:
    return "no verdict: the baseline has no finished run in a seed that half of the cells have run"
  if n_seeds == 1:
    return ("no verdict: a verdict needs 2 seeds or more, and there is "
            + ("1" if n_asked == 1 else f"1 of {n_asked} that the baseline and half of the cells have run"))
  return "" if n_others else "no verdict: no cell but the baseline has finished all its seeds"


def _warn(judged, n, n_asked, baseline, others):
  warnings = []
  if n < 3:
    warnings.append("2 seeds only: verdicts lean on the noise being alike in all cells; 3 or more are better")
  if n < n_asked:
    warnings.append(f"{n} of {n_asked} seeds count: those that the baseline and half of the cells have run")
  if judged.noise.noisy_A[0]:
    warnings.append("the baseline scatters more than the other cells: each cell is judged by its own pairs "
                    "alone, which finds little")
  return warnings

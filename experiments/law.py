"""Scaling laws, L(N, D) = (E + A / N^alpha + B / D^beta)^gamma: fitted, resampled, and what they say of a
budget C = 6 N D FLOP.

Hoffmann et al. (arXiv:2203.15556, approach 3) have gamma = 1, Kaplan et al. (arXiv:2001.08361, eq. 1.5) E = 0
and beta = 1. The fit minimises the sum of Huber losses of log L, written as a log-sum-exp, by L-BFGS from a
grid of starts. Their sum, not their mean: divided by the number of rows the objective falls below L-BFGS's
tolerances, and it stops early (Besiroglu et al., arXiv:2404.10102). It does so too where it begins near the
end, as with resampled rows, whose spread came out a tenth of what it is. Hence the last steps are those of
least squares, which see the valley that L-BFGS does not.

L is in nats a token, D in tokens, N in whatever the rows count.
"""
import dataclasses
import itertools
import json
import math
import pathlib

import numpy as np
from scipy.optimize import least_squares, minimize

from data.files import replacing

DELTA = 1e-3  # Of the Huber loss: errors of log L above it count in proportion, not squared.
NAMES = ("a", "b", "e", "alpha", "beta", "gamma")  # Logarithms of A, B and E, then the exponents.
# form -> the value at which each of NAMES is held; None: it is fitted.
FORM = {
  "chinchilla": (None, None, None, None, None, 1.0),
  "kaplan": (None, None, -math.inf, None, 1.0, None),
}
# Where the fits begin: Hoffmann's grid, with the exponents that Kaplan's has besides.
GRID = {"a": (0, 5, 10, 15, 20, 25), "b": (0, 5, 10, 15, 20, 25), "e": (-1, -0.5, 0, 0.5, 1),
        "alpha": (0, 0.5, 1, 1.5, 2), "beta": (0, 0.5, 1, 1.5, 2), "gamma": (0.05, 0.1, 0.2, 0.5)}
MOST_STARTS = 24  # Of the grid, those where the objective is least.
TIGHT = 1e-12  # Relative, of the objective, the constants and the gradient.
RESAMPLES = 200
LEVEL = 0.95
SAME_BUDGET = 0.1  # Rows whose 6 N D differ by less, relative, are of one budget.
# After so many repetitions, or times the size that is best for the text, one more is worth 1/e of the first:
# of tokens and of parameters (arXiv:2305.16264, appendix A).
REPEATS = {"tokens": 15.387756, "parameters": 5.309743}


@dataclasses.dataclass(frozen=True, slots=True)
class Law:
  E: float
  A: float
  B: float
  alpha: float
  beta: float
  gamma: float = 1.0

  def loss(self, n, d):
    """Nats a token after training n parameters on d tokens; arrays broadcast."""
    falls = lambda whole, x, power: np.exp(math.log(whole) - power * np.log(x))  # Powers alone may overflow.
    return (self.E + falls(self.A, n, self.alpha) + falls(self.B, d, self.beta))**self.gamma

  @property
  def exponent(self) -> float:
    """Of N_opt ~ C^exponent; that of D_opt is what is left to 1."""
    return self.beta / (self.alpha + self.beta)

  def optimum(self, flops: float) -> tuple[float, float]:
    """(N, D) of the least loss with 6 N D = flops, where both terms fall equally fast."""
    scale = (self.alpha * self.A / (self.beta * self.B))**(1 / (self.alpha + self.beta))
    n = scale * (flops / 6)**self.exponent
    return n, flops / 6 / n

  def repeated_loss(self, n: float, d: float, unique: float) -> float:
    """The loss where only `unique` of the d tokens differ (arXiv:2305.16264): what is repeated is worth less
    each time, and so are parameters beyond those that the unique tokens are enough for."""
    if d <= unique:
      return float(self.loss(n, d))
    power = self.exponent / (1 - self.exponent)  # Of N_opt ~ D_opt^power.
    n_one, d_one = self.optimum(6.0)
    enough = min(n, n_one * (unique / d_one)**power)
    worth = lambda base, whole, r: base * (1 + r * -math.expm1(-(whole / base - 1) / r))
    return float(self.loss(worth(enough, n, REPEATS["parameters"]), worth(unique, d, REPEATS["tokens"])))


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
  """A law with the rows that it is from.

  Attributes:
    rows: [rows, 3], N, D and the loss.
    laws: of resampled rows, whose spread is the law's own.
  """
  form: str
  law: Law
  rows: np.ndarray
  laws: tuple[Law, ...] = ()
  source: str = ""

  @property
  def residuals(self) -> np.ndarray:
    """log of measured over fitted, a row each."""
    n, d, loss = self.rows.T
    return np.log(loss / self.law.loss(n, d))

  def interval(self, value, level: float = LEVEL) -> tuple[float, float]:
    """Within which value(law) lies in `level` of the resampled laws; NaN without any."""
    return _quantiles([value(law) for law in self.laws], level)

  def predict(self, n: float, d: float, level: float = LEVEL) -> tuple[float, float, float]:
    """(loss, low, high) of one run to come: an interval of the laws, and of how far runs are from theirs."""
    values = np.array([law.loss(n, d) for law in self.laws])
    runs = values[:, None] * np.exp(self.residuals)
    return (float(self.law.loss(n, d)), *_quantiles(runs.ravel(), level))


def _quantiles(values, level):
  if not len(values):
    return math.nan, math.nan
  low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


# The fit.

def errors(theta, rows) -> tuple[np.ndarray, np.ndarray]:
  """(log of fitted over measured [rows], its derivatives [rows, 6]).

  Args:
    theta: the six of NAMES.
    rows: [rows, 3], N, D and the loss.
  """
  a, b, e, alpha, beta, gamma = theta
  n, d, loss = np.log(rows).T
  terms = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)], 1)
  top = terms.max(1, keepdims=True)
  shares = np.exp(terms - top)
  total = shares.sum(1, keepdims=True)
  shares /= total
  whole = (top + np.log(total))[:, 0]
  by = gamma * shares
  return gamma * whole - loss, np.stack([*by.T, -by[:, 0] * n, -by[:, 1] * d, whole], 1)


def objective(theta, rows) -> tuple[float, np.ndarray]:
  """(sum of the Huber losses of `errors`, its gradient [6])."""
  error, slopes = errors(theta, rows)
  size = np.abs(error)
  value = np.where(size <= DELTA, error**2 / 2, DELTA * (size - DELTA / 2)).sum()
  return value, np.clip(error, -DELTA, DELTA) @ slopes


def fit_law(rows, form: str = "chinchilla", *, resamples: int = RESAMPLES, seed: int = 0,
            source: str = "") -> Fit:
  """
  Args:
    rows: (N, D, loss) of each run.
    form: a key of FORM.
    resamples: how often rows are drawn anew, with replacement, for the intervals.

  Raises:
    ValueError: an unknown form; too few rows, sizes or lengths to tell the terms apart; a number that is not
      positive.
  """
  rows = _check_rows(rows, form)
  held = FORM[form]
  axes = [GRID[name] if value is None else (value,) for name, value in zip(NAMES, held)]
  starts = np.array(list(itertools.product(*axes)), float)
  nearest = np.argsort(_objectives(starts, rows), kind="stable")[:MOST_STARTS]
  found = min((_descend(theta, rows, held) for theta in starts[nearest]), key=lambda result: result[0])
  theta = _settle(found[1], rows, held)
  rng, laws = np.random.default_rng(seed), []
  while len(laws) < resamples:
    drawn = rows[rng.integers(0, len(rows), len(rows))]
    if len({*drawn[:, 0]}) > 2 and len({*drawn[:, 1]}) > 2:  # Fewer say nothing of an exponent.
      laws.append(_as_law(_settle(theta, drawn, held)))
  return Fit(form, _as_law(theta), rows, tuple(laws), source)


def _check_rows(rows, form):
  if form not in FORM:
    raise ValueError(f"form={form!r}: known: {', '.join(FORM)}")
  rows = np.asarray(rows, float).reshape(-1, 3)
  if not (np.isfinite(rows).all() and (rows > 0).all()):
    bad = rows[~(np.isfinite(rows) & (rows > 0)).all(1)][0]
    raise ValueError(f"a row has N, D, loss = {', '.join(f'{v:g}' for v in bad)}; all must be above 0")
  free, sizes, lengths = FORM[form].count(None), len({*rows[:, 0]}), len({*rows[:, 1]})
  if len(rows) <= free or min(sizes, lengths) < 3:
    raise ValueError(f"{len(rows)} rows of {sizes} sizes and {lengths} numbers of tokens cannot tell the "
                     f"{free} constants apart; nearest valid: {free + 1} rows, 3 sizes, 3 numbers of tokens")
  return rows


def _objectives(starts, rows):
  """[starts], in blocks that fit a cache."""
  n, d, loss = np.log(rows).T
  out = []
  for block in np.array_split(starts, -(-len(starts) // 256)):
    a, b, e, alpha, beta, gamma = block.T[:, :, None]
    whole = np.logaddexp(np.logaddexp(a - alpha * n, b - beta * d), e)
    size = np.abs(gamma * whole - loss)
    out.append(np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2)).sum(1))
  return np.concatenate(out)


def _descend(theta, rows, held):
  """(objective, theta) where L-BFGS stops; what is held stays."""
  theta, free = np.array(theta, float), [i for i, value in enumerate(held) if value is None]

  def at(part):
    theta[free] = part
    value, slope = objective(theta, rows)
    return value, slope[free]

  found = minimize(at, theta[free], jac=True, method="L-BFGS-B")
  theta[free] = found.x
  return found.fun, theta


def _settle(theta, rows, held):
  """From nearby to the last digits: least squares take steps along the valley between A and alpha, or B and
  beta, where the objective itself changes less than L-BFGS sees."""
  theta, free = np.array(theta, float), [i for i, value in enumerate(held) if value is None]

  def at(part):
    theta[free] = part
    return errors(theta, rows)

  theta[free] = least_squares(
    lambda part: at(part)[0], theta[free], jac=lambda part: at(part)[1][:, free], loss="huber", f_scale=DELTA,
    x_scale="jac", ftol=TIGHT, xtol=TIGHT, gtol=TIGHT, max_nfev=1000).x
  return theta


def _as_law(theta):
  a, b, e, alpha, beta, gamma = (min(float(v), 700.0) for v in theta)  # Of senseless rows: beyond a float.
  return Law(math.exp(e), math.exp(a), math.exp(b), alpha, beta, gamma)


# Without a law: the least loss of each budget (Hoffmann's approach 2).

@dataclasses.dataclass(frozen=True, slots=True)
class Parabola:
  """Of one budget: loss = least + curvature * log(N / n)^2."""
  flops: float
  n: float
  least: float


def isoflop(rows) -> tuple[list[Parabola], float]:
  """(a parabola through the rows of each budget, the exponent of N_opt ~ C^exponent).

  Budgets of fewer than 3 sizes, and those whose best size is none between two others, are left out; the
  exponent of fewer than 2 budgets is NaN.
  """
  rows = sorted((6 * n * d, n, loss) for n, d, loss in np.asarray(rows, float))
  found = []
  for flops, n, loss in _budgets(rows):
    if len(set(n)) < 3:
      continue
    middle = np.log(n).mean()
    curvature, slope, level = np.polyfit(np.log(n) - middle, loss, 2)
    best = middle - slope / (2 * curvature) if curvature > 0 else math.inf
    if np.log(n).min() < best < np.log(n).max():
      found.append(Parabola(flops, math.exp(best), level - slope**2 / (4 * curvature)))
  if len(found) < 2:
    return found, math.nan
  return found, float(np.polyfit([math.log(p.flops) for p in found], [math.log(p.n) for p in found], 1)[0])


def _budgets(rows):
  """(FLOP, sizes, losses) of each budget, of rows (FLOP, N, loss) in order."""
  group = []
  for row in [*rows, (math.inf, 0, 0)]:
    if group and row[0] > group[0][0] * (1 + SAME_BUDGET):
      flops, n, loss = (np.array(column) for column in zip(*group))
      yield float(np.exp(np.log(flops).mean())), n, loss
      group = []
    group.append(row)


# Files.

def write_fit(path, fit: Fit):
  """As JSON, all or nothing; a line for each row and each resampled law."""
  lines = lambda table: ",\n".join(json.dumps([float(f"{v:.7g}") for v in row]) for row in table)
  head = {"form": fit.form, "source": fit.source, "law": dataclasses.asdict(fit.law)}
  with replacing(pathlib.Path(path)) as part:
    part.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines(fit.rows)}\n],\n "laws": [\n'
                    f"{lines(map(dataclasses.astuple, fit.laws))}\n]}}\n")


def read_fit(path) -> Fit:
  """Raises ValueError: no such file, or not one of `write_fit`."""
  try:
    tree = json.loads(pathlib.Path(path).read_text())
    return Fit(tree["form"], Law(**tree["law"]), np.array(tree["rows"], float).reshape(-1, 3),
               tuple(Law(*values) for values in tree["laws"]), tree["source"])
  except FileNotFoundError:
    raise ValueError(f"{path}: no such file") from None
  except (ValueError, KeyError, TypeError) as e:
    raise ValueError(f"{path} holds no fit of experiments.law: {e}") from e

"""Scaling laws: a published fit to its printed digits, known constants found, closed forms against a search.

python -m tests.test_law rewrites experiments/fits/chinchilla.json.
"""
import itertools
import math

import numpy as np
import pytest
from scipy.optimize import brentq, minimize, minimize_scalar

from experiments.law import FORM, Fit, Law, fit_law, isoflop, objective, read_fit, write_fit
from tests.tiny import ROOT

HOFFMANN = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)  # arXiv:2203.15556, as they print it.
SHIPPED = ROOT / "experiments/fits/chinchilla.json"
SOURCE = "Besiroglu et al., Epoch AI (arXiv:2404.10102): 240 runs of Hoffmann et al. (arXiv:2203.15556)"


def chinchilla_rows():
  """[240, 3], N, D and loss."""
  n, flops, loss = np.loadtxt(ROOT / "tests/data/chinchilla.csv", delimiter=",", skiprows=4).T
  kept = np.sort(np.argsort(loss)[:-5])
  return np.stack([n, flops / (6 * n), loss], 1)[kept]


def made_up(law, seed=0, noise=0.003, sizes=6, lengths=6):
  n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e6, 1e9, sizes), np.geomspace(1e8, 1e11, lengths)))
  return np.stack([n, d, law.loss(n, d) * np.exp(np.random.default_rng(seed).normal(0, noise, n.shape))], 1)


@pytest.fixture(scope="module")
def epoch():
  return fit_law(chinchilla_rows(), resamples=25)


def test_the_refit_of_chinchilla_to_its_printed_digits(epoch):
  law = epoch.law
  assert len(epoch.rows) == 240
  assert f"{law.A:.1f} {law.B:.1f} {law.E:.4f} {law.alpha:.4f} {law.beta:.4f}" == (
    "477.8 2143.4 1.8172 0.3473 0.3672")
  theta = [math.log(law.A), math.log(law.B), math.log(law.E), law.alpha, law.beta, 1.0]
  assert objective(theta, epoch.rows)[0] == pytest.approx(0.0010182740, abs=5e-11)  # Their notebook's.
  assert law.exponent == pytest.approx(0.514, abs=5e-4)
  n, d = law.optimum(5.76e23)
  assert d / n == pytest.approx(17.9, abs=0.05)
  n, d = HOFFMANN.optimum(5.76e23)
  assert d / n == pytest.approx(92.6, abs=0.05)


def mean_fit(rows, starts):
  """The constants where L-BFGS, at scipy's tolerances, stops on the mean of the Huber losses."""
  def mean(theta):
    value, slope = objective([*theta, 1.0], rows)
    return value / len(rows), slope[:5] / len(rows)

  return min((minimize(mean, start, jac=True, method="L-BFGS-B") for start in starts), key=lambda r: r.fun).x


def test_the_mean_in_place_of_the_sum_lands_elsewhere(epoch):
  """From those of Hoffmann's 4500 starts with e = -1 and exponents of 0, where the best of all is (below).
  Where it stops depends on the rounding, a little."""
  starts = [(a, b, -1, 0, 0) for a, b in itertools.product((0, 5, 10, 15, 20, 25), repeat=2)]
  alpha, beta = mean_fit(epoch.rows, starts)[3:]
  assert (alpha, beta, beta / (alpha + beta)) == pytest.approx((0.381, 0.312, 0.450), abs=2e-3)


@pytest.mark.slow
def test_the_mean_from_all_starts(epoch):
  axes = (0, 5, 10, 15, 20, 25), (0, 5, 10, 15, 20, 25), (-1, -0.5, 0, 0.5, 1), (0, 0.5, 1, 1.5, 2), (
    0, 0.5, 1, 1.5, 2)
  alpha, beta = mean_fit(epoch.rows, itertools.product(*axes))[3:]
  assert (alpha, beta, beta / (alpha + beta)) == pytest.approx((0.381, 0.312, 0.450), abs=2e-3)


def test_the_gradient_is_the_slope():
  rows, theta = made_up(HOFFMANN), np.array([5.0, 7.0, 0.4, 0.3, 0.4, 0.9])
  _, slope = objective(theta, rows)
  for i, step in enumerate(np.eye(6) * 1e-6):
    up, down = objective(theta + step, rows)[0], objective(theta - step, rows)[0]
    assert slope[i] == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("form, law", [
  ("chinchilla", Law(1.7, 400.0, 2000.0, 0.34, 0.37)), ("kaplan", Law(0.0, 3e10, 1e13, 0.8, 1.0, 0.11))])
def test_known_constants_lie_in_their_intervals(form, law):
  fit = fit_law(made_up(law, sizes=10, lengths=10), form, resamples=25)
  for name, held in zip(("A", "B", "E", "alpha", "beta", "gamma"), FORM[form]):
    low, high = fit.interval(lambda one: getattr(one, name), 0.99)
    assert low <= getattr(law, name) * (1 + 1e-9) and getattr(law, name) <= high * (1 + 1e-9), name
    assert (high > low) == (held is None)
  loss, low, high = fit.predict(1e10, 1e12)
  assert low < law.loss(1e10, 1e12) < high and loss == pytest.approx(law.loss(1e10, 1e12), rel=0.01)


def test_without_noise_the_constants_are_found():
  law = Law(1.7, 400.0, 2000.0, 0.34, 0.37)
  found = fit_law(made_up(law, noise=0), resamples=0).law
  for name in ("A", "B", "E", "alpha", "beta"):
    assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-4)


def test_spread_of_the_resampled_fits_is_epochs(epoch):
  """Epoch's standard errors are alpha 0.02, beta 0.02, E 0.03. L-BFGS at its usual tolerances stops near
  where it begins: it made alpha's 0.0006."""
  spread = lambda name: np.std([getattr(law, name) for law in epoch.laws])
  assert 0.01 < spread("alpha") < 0.03 and 0.01 < spread("beta") < 0.03 and 0.015 < spread("E") < 0.045


@pytest.mark.parametrize("law", [HOFFMANN, Law(0.0, 3e10, 1e13, 0.8, 1.0, 0.11)])
def test_the_optimum_is_where_a_search_finds_it(law):
  for flops in (1e18, 5.76e23):
    at = lambda log_n: float(law.loss(math.exp(log_n), flops / 6 / math.exp(log_n)))
    best = minimize_scalar(at, bounds=(math.log(1e6), math.log(1e13)), method="bounded",
                           options={"xatol": 1e-9}).x
    n, d = law.optimum(flops)
    assert n == pytest.approx(math.exp(best), rel=1e-3) and 6 * n * d == pytest.approx(flops)
  (n, _), (m, _) = law.optimum(1e20), law.optimum(1e22)
  assert math.log(m / n) / math.log(100) == pytest.approx(law.exponent)


def test_parabolas_find_the_best_sizes():
  law, rows = HOFFMANN, []
  for flops in (1e19, 1e20, 1e21, 1e22):
    best, _ = law.optimum(flops)
    rows += [(n, flops / 6 / n, law.loss(n, flops / 6 / n)) for n in best * np.geomspace(0.5, 3, 7)]
  found, exponent = isoflop(rows)
  assert [p.flops for p in found] == pytest.approx([1e19, 1e20, 1e21, 1e22])
  for p in found:
    n, d = law.optimum(p.flops)
    assert p.n == pytest.approx(n, rel=0.05) and p.least == pytest.approx(law.loss(n, d), rel=3e-4)
  assert exponent == pytest.approx(law.exponent, abs=2e-3)
  alone = [row for row in rows if row[0] > law.optimum(6 * row[0] * row[1])[0] * 1.01]  # No bottom to see.
  assert isoflop(alone)[0] == [] and math.isnan(isoflop(rows[:7])[1])


def test_repeated_tokens_are_worth_less():
  """arXiv:2305.16264: epochs are never better than one over (1 + 15.4) times the text; a model too large for
  its text loses by that too."""
  law, unique = HOFFMANN, 1e10
  enough = brentq(lambda log_n: log_best_tokens(law, log_n) - math.log(unique), math.log(1e6), math.log(1e13))
  small, large = math.exp(enough) / 2, math.exp(enough) * 20
  assert law.repeated_loss(small, unique, unique) == law.loss(small, unique)
  for epochs in (2, 4, 1000):
    worth = unique * (1 + 15.387756 * (1 - math.exp(-(epochs - 1) / 15.387756)))
    assert law.repeated_loss(small, epochs * unique, unique) == pytest.approx(law.loss(small, worth))
    assert law.repeated_loss(large, epochs * unique, unique) > law.loss(large, worth)
  loss = law.repeated_loss(small, 4 * unique, unique)
  assert law.loss(small, 4 * unique) < loss < law.loss(small, 3 * unique)


def log_best_tokens(law, log_n):
  """Logarithm of the tokens for which exp(log_n) parameters are the optimum."""
  n = math.exp(log_n)
  flops = brentq(lambda log_c: math.log(law.optimum(math.exp(log_c))[0] / n), math.log(1e10), math.log(1e40))
  return math.log(law.optimum(math.exp(flops))[1])


def test_a_file_holds_the_fit(tmp_path):
  laws = HOFFMANN, Law(1.7, 400.0, 2000.0, 0.34, 0.37)
  fit = Fit("chinchilla", HOFFMANN, made_up(HOFFMANN), laws, "made up")
  write_fit(tmp_path / "fit.json", fit)
  again = read_fit(tmp_path / "fit.json")
  assert again.law == fit.law and (again.form, again.source) == ("chinchilla", "made up")
  assert again.predict(1e10, 1e12) == pytest.approx(fit.predict(1e10, 1e12), rel=1e-5)
  (tmp_path / "wrong.json").write_text('{"law": 1}')
  with pytest.raises(ValueError, match="wrong.json holds no fit"):
    read_fit(tmp_path / "wrong.json")
  with pytest.raises(ValueError, match="no such file"):
    read_fit(tmp_path / "none.json")


@pytest.mark.parametrize("rows, form, said", [
  ([(1, 1, 1)] * 9, "chinchilla", "nearest valid: 6 rows, 3 sizes"),
  ([(1, 1, math.nan)], "chinchilla", "N, D, loss = 1, 1, nan; all must be above 0"),
  ([(1, 1, 1)], "chinchila", "known: chinchilla, kaplan")])
def test_mistakes_are_named(rows, form, said):
  with pytest.raises(ValueError, match=said):
    fit_law(rows, form)


def test_rows_without_a_law_give_constants_all_the_same():
  law = fit_law(np.concatenate([made_up(HOFFMANN)[:, :2], np.full((36, 1), 9.0)], 1), resamples=2).law
  assert law.loss(1e8, 1e10) == pytest.approx(9, rel=0.01)


def test_the_shipped_fit_is_this_one(epoch):
  shipped = read_fit(SHIPPED)
  assert math.isclose(shipped.law.B, epoch.law.B, rel_tol=1e-6) and shipped.source == SOURCE
  assert len(shipped.laws) == 200 and shipped.rows == pytest.approx(epoch.rows, rel=1e-6)


if __name__ == "__main__":
  SHIPPED.parent.mkdir(exist_ok=True)
  write_fit(SHIPPED, fit_law(chinchilla_rows(), source=SOURCE))
  print(SHIPPED)

"""What a budget is best spent on: the laws' own optimum, and mistakes named before anything is said."""
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from experiments import plan
from experiments.law import Fit, Law, fit_law, write_fit
from experiments.plan import count, find_dial, short


def said(capsys, *args):
  assert plan.main(list(args)) == 0
  return capsys.readouterr().out


def row(text, label):
  return next(line for line in text.splitlines() if line.startswith(label)).removeprefix(label).split()


def test_the_optimum_and_what_other_sizes_lose(capsys):
  text = said(capsys, "--budget=5.76e23")
  n, d, ratio, loss, off = row(text, "best")
  assert ratio == "17.9" and off == "+0.0000"  # Epoch's; Hoffmann's own constants give 92.6.
  assert row(said(capsys, "--budget=5.76e23", "--fit=hoffmann"), "best")[2] == "92.6"
  fit = plan.get_fit("chinchilla")
  best = fit.law.optimum(5.76e23)[0]
  for label, size in (("half the size", best / 2), ("twice the size", 2 * best)):
    assert row(text, label)[3] == f"{float(fit.law.loss(size, 5.76e23 / 6 / size)):.4f}"
  assert "extrapolated to" in text and "times the largest" in text


def test_a_day_of_256_chips(capsys):
  """v5e: 197e12 FLOP/s."""
  text = said(capsys, "--chip=v5e", "--n=256", "--hours=24", "--mfu=0.5", "--price_per_chip_hour=2")
  assert text.startswith(f"{256 * 24 * 3600 * 0.5 * 197e12:.3g} FLOP")
  assert "24.0 hours, 6,144 chip-hours, 12,288 at 2 a chip-hour" in text
  assert "12.0 hours, 12 chip-hours" in said(  # Two devices a chip: 1153.5e12 each.
    capsys, f"--budget={2 * 1153.5e12 * 0.4 * 12 * 3600}", "--chip=v7x", "--n=2")


def test_the_nearest_dial():
  for dial in ("s3", "d2", "d7", "d20"):
    assert find_dial(1.02 * count(dial)) == (dial, count(dial))
  assert find_dial(1e15) is None and find_dial(10) is None
  assert [short(v) for v in (2.93e9, 999_999, 40.2)] == ["2.93B", "1M", "40.2"]


def test_little_text_makes_a_smaller_model_best(capsys):
  law, unique, flops = plan.get_fit("chinchilla").law, 2e9, 1e21
  line = next(x for x in said(capsys, f"--budget={flops}", f"--unique_tokens={unique}").splitlines()
              if x.startswith("of 2B different tokens"))
  sizes = np.geomspace(1e8, 1e11, 4000)
  best = min(sizes, key=lambda n: law.repeated_loss(n, flops / 6 / n, unique))
  assert f"best then: {short(best)[:3]}" in line and best < law.optimum(flops)[0]


def test_a_fit_of_ones_own(tmp_path, capsys):
  n, d = (a.ravel() for a in np.meshgrid([1e5, 3e5, 1e6], [1e7, 3e7, 1e8]))
  law = Law(1.5, 40.0, 300.0, 0.3, 0.4)
  write_fit(tmp_path / "fit.json", fit_law(np.stack([n, d, law.loss(n, d)], 1), resamples=3))
  text = said(capsys, "--budget=1e14", f"--fit={tmp_path}/fit.json")
  best = minimize_scalar(lambda log_n: float(law.loss(math.exp(log_n), 1e14 / 6 / math.exp(log_n))),
                         bounds=(5, 25), method="bounded").x
  assert row(text, "best")[0] == short(math.exp(best))


def test_constants_that_are_often_quoted_are_refused(tmp_path, capsys):
  write_fit(tmp_path / "fit.json", Fit("chinchilla", Law(1.69, 406.4, 410.7, 0.07, 0.21), np.empty((0, 3))))
  assert plan.main(["--budget=1e21", f"--fit={tmp_path}/fit.json"]) == 2
  error = capsys.readouterr().err
  assert "alpha=0.07, beta=0.21" in error and "are wrong" in error and "e+13 parameters" in error


@pytest.mark.parametrize("args, words", [
  ([], "give --budget=FLOP"), (["--budget=1e21", "--hours=2", "--chip=v5e", "--n=4"], "not both"),
  (["--budget=1e21", "--chip=v5e"], "--chip and --n go together"),
  (["--budget=1e21", "--mfu=0.4"], "--mfu=0.4 is of chips"),
  (["--budget=1e21", "--chip=v5e", "--n=4", "--mfu=40"], "nearest valid: 0.4"),
  (["--budget=-1"], "--budget=-1 must be a number above 0"), (["--budget=nan"], "must be a number above 0"),
  (["--budget=1e21", "--chip=v8", "--n=4"], "not in the table; known: v4"),
  (["--budget=1e21", "--fit=chinchila"], "did you mean chinchilla?"),
  (["--budget=1e21", "--fit=x/fit.json"], "x/fit.json: no such file")])
def test_mistakes_exit_with_2(args, words, capsys):
  assert plan.main(args) == 2
  assert words in capsys.readouterr().err

"""Noise is called noise, and a planted difference is found: real runs of experiments/aa.py by the sweep."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from experiments.report import read_sweep
from tests.tiny import ROOT


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
  """20 cells that differ in their first weights alone, 4 seeds each: 80 runs."""
  folder = tmp_path_factory.mktemp("aa") / "sweep"
  subprocess.run([sys.executable, "-m", "experiments.sweep", "experiments.aa", f"--out={folder}", "--jobs=2"],
                 cwd=ROOT, check=True, timeout=1800)
  return folder


@pytest.mark.slow
def test_of_twenty_cells_that_are_alike_at_most_one_is_called(sweep):
  report = read_sweep(sweep)
  assert len(report.rows) == 20 and report.judgement.seeds == [0, 1, 2, 3]
  assert report.count["better"] + report.count["worse"] <= 1
  covering = sum(row.comparison.low <= 0 <= row.comparison.high for row in report.rows[1:])
  assert covering >= 16  # 95 % of 19 are 18; they share the baseline's luck.
  assert len({run.value for row in report.rows for run in row.runs}) == 80  # Other weights are other runs.


@pytest.mark.slow
@pytest.mark.parametrize("sign,verdict", [(1, "worse"), (-1, "better")])
def test_a_planted_difference_is_found_and_covered(sweep, sign, verdict, tmp_path):
  """9 standard errors of a difference, about two noise bands, added to the raw files of one cell."""
  report = read_sweep(sweep)
  table = np.array([[run.value for run in row.runs] for row in report.rows])
  residual = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
  planted, cell = sign * 9 * ((residual ** 2).sum() / (19 * 3) * 2 / 4) ** 0.5, report.rows[7]
  shutil.copytree(sweep, tmp_path / "sweep", ignore=shutil.ignore_patterns("checkpoints"))
  for path in (tmp_path / "sweep" / cell.id).glob("seed=*/metrics.jsonl"):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
      if report.metric in line:
        line[report.metric] += planted
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  found = read_sweep(tmp_path / "sweep")
  c = found.rows[7].comparison
  assert c.verdict == verdict and c.low <= planted <= c.high
  assert [row.kind for i, row in enumerate(found.rows) if i != 7] == [
    row.kind for i, row in enumerate(report.rows) if i != 7]

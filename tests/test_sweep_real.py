"""A sweep of real runs: killed twice it ends as the sweep that was not, and it takes as long as was said."""
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from experiments.cells import read_outcome
from experiments.page import build_page
from experiments.report import read_sweep

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.slow
JOBS = 2 if os.cpu_count() > 1 else 1


def command(folder, *more):
  return [sys.executable, "-m", "experiments.sweep", "tests.grid_of_twelve", f"--out={folder}",
          f"--jobs={JOBS}", *more]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """(its folder, seconds that were expected, seconds that it took)."""
  folder = tmp_path_factory.mktemp("undisturbed")
  env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
  said = subprocess.run(command(folder, "--dry_run"), cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE,
                        text=True)
  number, unit = re.search(r"^time: ([\d.]+) (s|min)", said.stdout, re.MULTILINE).groups()
  begin = time.monotonic()
  subprocess.run(command(folder), cwd=ROOT, env=env, check=True)
  return folder, float(number) * {"s": 1, "min": 60}[unit], time.monotonic() - begin


def metrics(run):
  """What was measured, without the times."""
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  timed = lambda key: key.endswith(("_ms", "/s")) or key in ("tokens_per_s", "mfu")
  return [{key: value for key, value in line.items() if not timed(key)} for line in lines]


def test_it_takes_as_long_as_the_dry_run_said(undisturbed):
  _, expected, took = undisturbed
  print(f"expected {expected:.0f} s, took {took:.0f} s: {took / expected - 1:+.0%}")
  assert abs(took / expected - 1) < 0.25


def test_killed_twice_it_ends_as_if_it_had_not_been(undisturbed, tmp_path):
  rng, folder = random.Random(), undisturbed[0]
  for _ in range(2):
    process = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    wait = rng.uniform(20, 90)
    print(f"killed after {wait:.1f} s")
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
  subprocess.run(command(tmp_path), cwd=ROOT, check=True)
  runs = sorted(p.relative_to(tmp_path) for p in tmp_path.glob("*/seed=*"))
  assert runs == sorted(p.relative_to(folder) for p in folder.glob("*/seed=*") if "probe" not in p.parts)
  assert len(runs) == 24
  for run in runs:
    assert read_outcome(tmp_path / run).status == "done"
    assert metrics(tmp_path / run) == metrics(folder / run)
    steps = [line["step"] for line in metrics(tmp_path / run) if "loss" in line]
    assert steps == list(range(1, 61))  # Each once.
  pages = [build_page(read_sweep(path), times=False) for path in (folder, tmp_path)]
  assert pages[0] == pages[1] and len(pages[0]) > 10_000

"""What a sweep will cost: FLOPs and tokens by arithmetic; time by the model of train.roofline on a chip by
name, or, for this machine, by the same model set right by runs that were made here."""
import heapq
import itertools
import math
import pathlib
import shutil
import threading
import typing

import numpy as np

from data.flags import known_devices
from experiments.cells import Cell, Experiment, Run, make_cell, read_outcome
from experiments.local import run_one, split_machine
from model.sharding import MESH_AXES
from train.chips import Chip
from train.metrics import read_metrics
from train.roofline import estimate_step

PROBE_STEPS = 30


class Sample(typing.NamedTuple):
  """What a run took here, in seconds."""
  step: float  # The median.
  evaluation: float  # One.
  rest: float  # Start, compiling, saving, the report.


# Only how the times of two programs compare is asked of it.
_ANY_CPU = Chip(kinds=("cpu",), flops={"float32": 2e11, "bfloat16": 2e11}, hbm_bytes=2**34,
                hbm_bandwidth=1e10, link_bandwidth=1e9, dims=0, domain=2**20, dcn_bandwidth=1e9, mxu=1,
                source="made up")


def count(experiment: Experiment) -> dict[str, dict]:
  """Cell's id -> {"flops", "tokens"} of one run, by the convention of model.count."""
  figures = {}
  for cell in experiment.cells:
    cfg = cell.resolved
    figures[cell.id] = {"flops": cfg.steps * modelled(cell).model_flops,
                        "tokens": cfg.steps * cfg.batch_size * cfg.seq_len}
  return figures


def modelled(cell: Cell, chip: Chip = _ANY_CPU, n: int | None = None):
  """The Estimate of one step of a cell.

  Raises:
    ValueError: which cell has no such mesh.
  """
  sizes = [getattr(cell.resolved.mesh, axis) for axis in MESH_AXES]
  n = n or (known_devices() if -1 in sizes else None) or math.prod(max(size, 1) for size in sizes)
  try:
    return estimate_step(cell.resolved.validate(n), chip, n)
  except ValueError as e:
    raise ValueError(f"cell {cell.name!r}: {e}") from None


def sample(workdir) -> Sample | None:
  """What a finished run took; None where it did not finish, or went on from a checkpoint."""
  outcome = read_outcome(workdir)
  if outcome is None or outcome.status != "done":
    return None
  lines = read_metrics(pathlib.Path(workdir) / "metrics.jsonl")
  steps = [line["step_ms"] / 1e3 for line in lines if "step_ms" in line]
  evaluations = [line["eval/val/s"] for line in lines if "eval/val/s" in line]
  rest = outcome.seconds - sum(steps) - sum(evaluations)
  if not steps or rest < 0:  # It was killed and went on: its steps are more than its last attempt's.
    return None
  return Sample(float(np.median(steps)), float(np.mean(evaluations or [0.0])), rest)


def expected(cell: Cell, samples: list[tuple[float, Sample]]) -> float:
  """Seconds that a run of this cell takes here, by (modelled seconds of a step, what was measured)."""
  times, found = zip(*sorted(samples))
  here = modelled(cell).step_s
  between = lambda values: float(np.interp(np.log(here), np.log(times), values))
  step = here * between([s.step / t for t, s in zip(times, found)])
  steps, every = cell.resolved.steps, cell.resolved.eval.every
  evaluations = 1 + (-(-steps // every) if every else 1)
  return (steps * step + evaluations * between([s.evaluation for s in found])
          + between([s.rest for s in found]))


def makespan(seconds: list[float], jobs: int) -> float:
  """When the last of these runs ends, begun in this order, `jobs` at a time."""
  free = [0.0] * jobs
  for s in seconds:
    heapq.heapreplace(free, free[0] + s)
  return max(free)


class Probe(typing.NamedTuple):
  """Samples by the modelled time of a step: of a program's first run, and of another of the same program."""
  cold: list[tuple[float, Sample]]
  warm: list[tuple[float, Sample]]

  def expected(self, runs: list[Run]) -> dict[pathlib.Path, float]:
    """A run's folder -> seconds. The first run of each cell compiles."""
    seen, seconds = set(), {}
    for run in runs:
      samples = self.warm if run.cell.id in seen else self.cold
      seconds[run.workdir] = expected(run.cell, samples)
      seen.add(run.cell.id)
    return seconds


def probe(experiment: Experiment, folder, jobs: int, note) -> Probe:
  """Runs the cheapest and the dearest cell for PROBE_STEPS steps, twice, as the sweep would run them.

  Raises:
    ValueError: a cell does not run, with what it said; or there are fewer cores than `jobs`.
  """
  cheap, *_, dear = sorted([*experiment.cells] * 2, key=lambda cell: modelled(cell).step_s)
  chosen = [cheap, dear] if modelled(dear).step_s > 1.1 * modelled(cheap).step_s else [cheap]
  folder, places = pathlib.Path(folder) / "probe", split_machine(jobs)
  shutil.rmtree(folder, ignore_errors=True)
  cold, warm = [], []
  for number, into in enumerate((cold, warm)):
    runs = [Run(_shorten(cell), number, folder / f"{cell.id}-{number}") for cell in chosen]
    runs = [run._replace(workdir=run.workdir.with_name(f"{run.workdir.name}-{i}"))  # All places are busy.
            for i, run in zip(range(max(jobs, len(runs))), itertools.cycle(runs))]
    for i in range(0, len(runs), jobs):
      group = runs[i:i + jobs]
      note(f"probing: {', '.join(sorted({run.cell.name for run in group}))}, {PROBE_STEPS} steps, "
           + ("compiling" if into is cold else "compiled"))
      threads = [threading.Thread(target=run_one, args=(run, place)) for run, place in zip(group, places)]
      for thread in threads:
        thread.start()
      for thread in threads:
        thread.join()
    for cell, run in zip([*chosen] * len(runs), runs):
      if (found := sample(run.workdir)) is None:
        outcome = read_outcome(run.workdir)
        raise ValueError(f"cell {cell.name!r} does not run: {outcome.error if outcome else 'it was stopped'} "
                         f"({run.workdir}/output.log)")
      into.append((modelled(run.cell).step_s, found))
  return Probe(_mean(cold), _mean(warm))


def _shorten(cell):
  """The same cell for a few steps."""
  steps = min(PROBE_STEPS, cell.resolved.steps)
  return make_cell(cell.config, {**cell.overrides, "steps": steps, "optim.warmup_steps": min(
    cell.resolved.optim.warmup_steps, steps - 1)}, cell.name)


def _mean(samples):
  """One sample for each modelled time."""
  times = sorted({time for time, _ in samples})
  return [(time, Sample(*np.mean([s for t, s in samples if t == time], axis=0))) for time in times]

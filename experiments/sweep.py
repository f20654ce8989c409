"""Runs what is missing of an experiment: python -m experiments.sweep experiments.NAME

Each cell is run by train.main with each seed, in a folder of its own under runs/sweeps/NAME. Killed and
started again it goes on: what is done stays, what is half done goes on from its checkpoint. A run that fails
is reported, and does not stop the others.
"""
import argparse
import fnmatch
import math
import pathlib
import sys
import typing

from data.files import write_json
from data.flags import nearest
from experiments.cells import (
  Experiment,
  Outcome,
  Run,
  check_unchanged,
  describe,
  find_runs,
  read_experiment,
  read_outcome,
  setting,
  shipped,
)
from experiments.report import amount, duration
from model.sharding import MESH_AXES

EPILOG = """examples:
  python -m experiments.sweep experiments.qk_norm --dry_run         the cells, and what they will cost here
  python -m experiments.sweep experiments.qk_norm --jobs=2          two runs at a time; run it again to go on
  python -m experiments.sweep experiments.qk_norm --only='*lr=0.01*'
  python -m experiments.sweep experiments.qk_norm --dry_run --chip=v5e --n=16 --price_per_chip_hour=1.2
  python -m experiments.sweep experiments.qk_norm --render=slurm --set=partition=gpu --set=gpus_per_node=1
  python -m experiments.sweep experiments.qk_norm --on=ray --set=num_gpus=1
  python -m experiments.report experiments.qk_norm                  is the difference real?

An experiment is a file: python -m pydoc experiments.cells. Exit codes: 0 all runs are done, 1 some failed,
2 a mistake (nothing was run), 143 stopped by a signal, after saving."""


def parse(argv=None):
  parser = argparse.ArgumentParser(prog="experiments.sweep", description=__doc__, allow_abbrev=False,
                                   epilog=f"{EPILOG}\n\nexperiments: {', '.join(shipped())}",
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("experiment", help="a module: experiments.NAME")
  parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="default: runs/sweeps/NAME")
  parser.add_argument("--dry_run", action="store_true", help="print the cells and their cost; train nothing")
  parser.add_argument("--only", metavar="GLOB", help="the cells whose name or id it matches")
  parser.add_argument("--jobs", type=int, default=1, metavar="N",
                      help="runs at a time, each on its share of the cores or chips; default: %(default)s")
  parser.add_argument("--chip", help="price it on this chip instead of this machine: python -m train.chips")
  parser.add_argument("--n", type=int, help="with --chip: how many a run has; default: what its mesh says")
  parser.add_argument("--price_per_chip_hour", type=float, help="with --chip, in any currency")
  parser.add_argument("--on", default="local", choices=("local", "ray"), help="where; default: %(default)s")
  parser.add_argument("--render", metavar="KIND", help="run nothing: write files for slurm or jobset (GKE)")
  parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                      help="of --render or --on=ray, e.g. partition=gpu; repeatable")
  args = parser.parse_args(argv)
  if args.jobs < 1:
    parser.error(f"--jobs={args.jobs} must be at least 1")
  if args.n is not None and args.chip is None:
    parser.error(f"--n={args.n} is of --chip, which is not given")
  if args.price_per_chip_hour is not None and args.chip is None:
    parser.error(f"--price_per_chip_hour={args.price_per_chip_hour:g} is of --chip, which is not given")
  if args.jobs > 1 and args.on == "ray":
    parser.error(f"--jobs={args.jobs} is of this machine: Ray runs as many at a time as it has resources for")
  if args.set and args.render is None and args.on == "local":
    parser.error(f"--set={args.set[0]} is of --render or --on=ray, which are not given")
  return args


def main(argv=None) -> int:
  args = parse(argv)
  try:
    experiment, module = read_experiment(args.experiment)
    folder = args.out or pathlib.Path("runs/sweeps") / experiment.module.rpartition(".")[2]
    return search_for(experiment, module, folder, args) if hasattr(module, "suggest") else sweep(
      experiment, folder, args)
  except ValueError as e:
    print(f"experiments.sweep: error: {e}", file=sys.stderr)
    return 2


def sweep(experiment: Experiment, folder: pathlib.Path, args) -> int:
  """Raises ValueError: a mistake of the user's."""
  from experiments.estimate import count
  from experiments.local import Board, run_local
  from experiments.on_ray import read_settings, run_on_ray
  from experiments.render import write
  figures = count(experiment)
  ray = read_settings(args.set) if args.on == "ray" else None
  runs = choose(find_runs(experiment, folder), args.only)
  check_unchanged(runs)
  outcomes = {run.workdir: read_outcome(run.workdir) for run in runs}
  missing = [run for run in runs if (o := outcomes[run.workdir]) is None or o.status == "failed"]
  cost = price(experiment, folder, missing, args) if args.dry_run or args.chip or experiment.budget else None
  print(tabulate(experiment, runs, outcomes, figures, cost), flush=True)
  if cost is not None and experiment.budget is not None and cost.chip_hours > experiment.budget:
    text = (f"what is missing costs about {cost.chip_hours:.3g} {cost.unit}s, more than "
            f"{experiment.module}.BUDGET={experiment.budget:g}")
    if not args.dry_run:
      raise ValueError(f"{text}; nearest valid: a larger BUDGET, or a part by --only")
    print(f"WARNING: {text}")
  if args.dry_run:
    return 0
  if args.render:
    for path in write(args.render, args.set, experiment.module, runs, folder, cost.seconds if cost else None):
      print(path)
    write_json(folder / "sweep.json", describe(experiment, figures))
    return 0
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / "sweep.json", describe(experiment, figures))
  if missing:
    board = Board(len(runs), experiment.metric, args.jobs, cost.seconds if cost else None,
                  done=len(runs) - len(missing))
    with board:
      ended = run_local(missing, args.jobs, board) if ray is None else run_on_ray(missing, ray, board)
    outcomes |= {run.workdir: ended.get(run.workdir) for run in missing}
  return conclude(experiment, folder, runs, outcomes)


def search_for(experiment, module, folder, args) -> int:
  """Raises ValueError: a mistake of the user's."""
  from experiments.estimate import count
  from experiments.local import Board
  from experiments.search import check_search, describe_best, search
  for flag, given in (("--only", args.only), ("--render", args.render), ("--on=ray", args.on == "ray")):
    if given:
      raise ValueError(f"{flag} is of a grid: {experiment.module} is a search, whose trials depend on each "
                       "other, and run on this machine")
  check_search(experiment, module)
  trials = setting(module, "TRIALS")
  print(f"{experiment.question.partition(chr(10))[0]}\n\na search of {trials} trials", flush=True)
  if args.dry_run:
    return 0
  done = len(list(folder.glob("*/seed=*/outcome.json")))
  with Board(trials, experiment.metric, args.jobs, done=done) as board:
    found = search(experiment, module, folder, args.jobs, board, count)
  for text in found.refused:
    print(f"refused: {text}", file=sys.stderr)
  print(describe_best(found))
  code = conclude(found.experiment, folder, found.runs, found.outcomes) if found.runs else 1
  if found.left:
    print(f"stopped with {found.left} of {trials} trials to go; the same command goes on")
    return 143
  return code or int(bool(found.refused))


def choose(runs: list[Run], glob: str | None) -> list[Run]:
  """Raises ValueError: no cell matches."""
  if glob is None:
    return runs
  chosen = [run for run in runs
            if any(fnmatch.fnmatchcase(name, glob) for name in (run.cell.name, run.cell.id))]
  if not chosen:
    names = list(dict.fromkeys(run.cell.name for run in runs))
    near = nearest(glob.strip("*"), names) or names[:3]
    raise ValueError(f"--only={glob} matches no cell; nearest valid: {', '.join(map(repr, near))}")
  return chosen


# What it costs.

class Cost(typing.NamedTuple):
  """Of the runs that are missing."""
  seconds: dict[pathlib.Path, float]  # Of each, by its folder.
  total_s: float  # Until the last has ended.
  chip_hours: float  # Of all together.
  unit: str  # chip-hour; on this machine, an hour of all of it.
  source: str
  price: float | None = None  # Of one.


def price(experiment, folder, runs, args) -> Cost:
  """Raises ValueError: no such chip, no number of them, a cell that does not run here."""
  from experiments.estimate import makespan, modelled, probe
  if args.chip is None:
    found = probe(experiment, folder, args.jobs, lambda text: print(text, file=sys.stderr)) if runs else None
    seconds = found.expected(runs) if found else {}
    total = makespan(list(seconds.values()), args.jobs)
    return Cost(seconds, total, total / 3600, "machine-hour",
                "this machine, by probing: each run with its start, its compiling and its report")
  from train.chips import get_chip
  chip = get_chip(args.chip)
  seconds, chip_hours = {}, 0.0
  for run in runs:
    sizes = {axis: getattr(run.cell.resolved.mesh, axis) for axis in MESH_AXES}
    if args.n is None and -1 in sizes.values():
      axis = next(axis for axis, size in sizes.items() if size == -1)
      raise ValueError(f"--chip needs --n, as mesh.{axis}=-1 of cell {run.cell.name!r} takes what is there")
    n = args.n or math.prod(sizes.values())
    seconds[run.workdir] = run.cell.resolved.steps * modelled(run.cell, chip, n).step_s
    chip_hours += seconds[run.workdir] * n / chip.per_chip / 3600
  return Cost(seconds, makespan(list(seconds.values()), args.jobs), chip_hours, "chip-hour",
              f"{args.chip}, modelled: the steps alone, without starts and compiling",
              args.price_per_chip_hour)


def tabulate(experiment, runs, outcomes, figures, cost) -> str:
  """A line for each cell, and the sums."""
  cells = {run.cell.id: run.cell for run in runs}
  wide = max(len(id) for id in cells)
  lines = [experiment.question.partition("\n")[0], "",
           f"{'cell':{wide}}  {'FLOP a run':>10}  {'tokens':>8}  {'time a run':>10}  done"]
  for id in cells:
    mine = [run for run in runs if run.cell.id == id]
    done = sum((o := outcomes[run.workdir]) is not None and o.status != "failed" for run in mine)
    failed = sum((o := outcomes[run.workdir]) is not None and o.status == "failed" for run in mine)
    half = sum(outcomes[run.workdir] is None and (run.workdir / "checkpoints").exists() for run in mine)
    times = [cost.seconds[run.workdir] for run in mine if cost and run.workdir in cost.seconds]
    state = f"{done}/{len(mine)}" + f", {failed} failed" * bool(failed) + f", {half} half done" * bool(half)
    lines.append(f"{id:{wide}}  {figures[id]['flops']:10.3g}  {amount(figures[id]['tokens']):>8}  "
                 f"{duration(sum(times) / len(times)) if times else '':>10}  {state}"
                 + ("  baseline" if id == experiment.baseline else ""))
  left = [run for run in runs if (o := outcomes[run.workdir]) is None or o.status == "failed"]
  flops = sum(figures[run.cell.id]["flops"] for run in left)
  lines += ["", f"{len(cells)} cells x {len(runs) // len(cells)} seeds = {len(runs)} runs, "
            f"{len(left)} of them missing: {flops:.3g} FLOP"]
  if cost:
    money = "" if cost.price is None else f", {cost.chip_hours * cost.price:,.4g} at {cost.price:g} an hour"
    lines += [f"time: {duration(cost.total_s)}, {cost.chip_hours:.3g} {cost.unit}s{money} ({cost.source})"]
  return "\n".join(lines)


def conclude(experiment, folder, runs, outcomes: dict[pathlib.Path, Outcome | None]) -> int:
  """Says what failed and what to do next; the exit code."""
  by_status = lambda status: [run for run in runs if (o := outcomes[run.workdir]) is not None
                              and o.status == status]
  failed, ended = by_status("failed"), sum(outcomes[run.workdir] is not None for run in runs)
  for run in failed:
    print(f"failed: {run.cell.name} seed {run.seed}: {outcomes[run.workdir].error}\n  "
          f"{run.workdir}/output.log", file=sys.stderr)
  if ended < len(runs):
    print(f"stopped with {len(runs) - ended} of {len(runs)} runs to go; the same command goes on")
    return 143
  print(f"{len(runs) - len(failed)} of {len(runs)} runs are done in {folder}\n\n"
        f"    python -m experiments.report {folder}   # is the difference real?\n"
        f"    python -m experiments.query --runs={folder}   # the numbers")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())

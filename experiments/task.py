"""python -m experiments.task --config=... --workdir=DIR: one run of a sweep, started by a scheduler.

Takes the command line of train.main, and leaves in DIR what a sweep leaves: output.log and outcome.json. What
is done already ends at once. Where several processes make one run, the first does this, and the others are
train.main. Exit codes: 0 done, 143 stopped after saving (start it again), else those of train.main.
"""
import os
import pathlib
import sys
import threading
import typing

from experiments.cells import read_outcome
from experiments.local import PROGRAM, run_one, until_signal

# What SLURM and GKE call a process's number, in a slice where there are several.
RANKS = ("SLURM_PROCID", "TPU_WORKER_ID", "MEGASCALE_SLICE_ID")
STOPPED = 143


class Task(typing.NamedTuple):
  """What run_one asks of a run."""
  workdir: pathlib.Path
  command: list[str]


def is_first() -> bool:
  """Whether this process is the first of its run."""
  return not any(int(os.environ.get(name) or 0) for name in RANKS)


def main(argv=None) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  folders = [arg.removeprefix("--workdir=") for arg in argv if arg.startswith("--workdir=")]
  if {"-h", "--help"} & set(argv):
    print(__doc__)
    return 0
  if len(folders) != 1:
    print("experiments.task: error: give the command line of train.main, with --workdir=DIR", file=sys.stderr)
    return 2
  workdir = pathlib.Path(folders[0])
  try:
    outcome = read_outcome(workdir)
  except ValueError as e:
    print(f"experiments.task: error: {e}", file=sys.stderr)
    return 2
  if outcome is not None and outcome.status != "failed":
    print(f"{workdir} is {outcome.status}")
    return 0
  if not is_first():
    os.execv(sys.executable, [sys.executable, "-m", PROGRAM, *argv])
  print(f"see {workdir}/output.log", flush=True)
  stop = threading.Event()
  with until_signal(stop):
    outcome = run_one(Task(workdir, argv), stop=stop)
  if outcome is None:
    return STOPPED
  if outcome.error:
    print(outcome.error, file=sys.stderr)
  return outcome.exit_code if outcome.exit_code >= 0 else 128 - outcome.exit_code


if __name__ == "__main__":
  sys.exit(main())

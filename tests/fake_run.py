"""Stands in for train.main where the sweep is tested: the same flags, files, signals and exit codes, at once.

A run is 10 steps of --config.log.profile_steps hundredths of a second, the loss is the rate plus the seed; a
rate above 1 is a failure. metrics.jsonl has a line for each step that was done, starts.log for each start.
"""
import argparse
import fcntl
import json
import os
import pathlib
import signal
import sys
import time

STEPS = 10


def main() -> int:
  parser = argparse.ArgumentParser()
  for name in ("config", "config.optim.lr", "config.seed", "workdir", "config.log.profile_steps"):
    parser.add_argument("--" + name, default="0")
  args = vars(parser.parse_args())
  workdir, stopped = pathlib.Path(args["workdir"]), []
  lock = open(workdir / "lock", "a+")  # noqa: SIM115
  fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  lock.truncate(0)
  lock.write(str(os.getpid()))
  lock.flush()
  signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
  with open(workdir / "starts.log", "a") as f:
    f.write("start\n")
  rate, seed = float(args["config.optim.lr"]), int(args["config.seed"])
  if rate > 1:
    print("all is well\nfake_run: failed: the rate is too high\n")
    return 1
  path = workdir / "metrics.jsonl"
  done = len(path.read_bytes().splitlines()) if path.exists() else 0
  for step in range(done + 1, STEPS + 1):
    time.sleep(int(args["config.log.profile_steps"]) / 100)
    line = {"step": step, "loss": rate + seed, "step_ms": 1.0}
    with open(path, "a") as f:
      f.write(json.dumps(line | ({"eval/val/loss": rate + seed} if step == STEPS else {})) + "\n")
    if stopped:
      return 143
  return 0


if __name__ == "__main__":
  sys.exit(main())

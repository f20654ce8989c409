"""A sweep on a Ray cluster gives what it gives here. Slow ones need ray: pip install -e ".[ray]"."""
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from experiments.cells import make_cell, read_outcome
from experiments.on_ray import _check_resources, read_settings
from tests.tiny import ROOT

SCRIPT = """
import pathlib, sys
from experiments.cells import Run, make_cell
from experiments.local import Board, run_local
from experiments.on_ray import Ray, run_on_ray

out, where, steps, names = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
cells = [make_cell("configs/tiny.py", {"optim.lr": float(lr), "steps": steps, "optim.warmup_steps": 2,
                                       "checkpoint.every": None}) for lr in names]
runs = [Run(cell, 0, out / cell.id / "seed=0") for cell in cells]
out.mkdir(exist_ok=True)
with Board(len(runs), "eval/val/loss", 1) as board:
  ended = run_on_ray(runs, Ray(), board) if where == "ray" else run_local(runs, 1, board)
print("ended", *(outcome.status for outcome in ended.values()))
"""


def test_settings_are_read_and_checked_against_the_nodes():
  assert read_settings([]).resources == {"CPU": 1}
  assert read_settings(["num_cpus=0", "num_tpus=4", "address=auto"]).resources == {"TPU": 4}
  for text, said in (("num_gpu=1", "did you mean num_gpus?"), ("num_cpus=-1", "must be a number from 0"),
                     ("num_cpus=nan", "must be a number from 0"), ("num_cpus=0", "valid: num_cpus=1")):
    with pytest.raises(ValueError, match=re.escape(said)):
      read_settings([text])
  nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "node:10.0.0.1": 1.0, "memory": 1e9}},
           {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 4.0}},
           {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}]
  ray = types.SimpleNamespace(nodes=lambda: nodes)
  _check_resources(ray, {"CPU": 2, "GPU": 4})
  for resources, said in (({"CPU": 16}, "num_cpus=16, but no node of this Ray has more than 8; nearest"),
                          ({"TPU": 4}, "num_tpus=4, but no node of this Ray has more than 0"),
                          ({"CPU": 4, "GPU": 1}, "no node of this Ray has num_cpus=4 and num_gpus=1")):
    with pytest.raises(ValueError, match=re.escape(said)):
      _check_resources(ray, resources)


def start(out, where, steps, *rates):
  env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | {"JAX_PLATFORMS": "cpu"}
  return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out), where, str(steps), *rates], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def numbers(out):
  """Of each run, what its metrics say but for times."""
  from train.metrics import read_metrics
  timed = ("tokens_per_s", "mfu", "data_wait_ms", "step_ms")
  keep = lambda line: {k: v for k, v in line.items() if k not in timed and not k.endswith("/s")}
  return {path.parts[-3]: list(map(keep, read_metrics(path)))
          for path in sorted(out.glob("*/*/metrics.jsonl"))}


def listening(pid):
  """Addresses, in hex, on which a process and those it started listen."""
  stats = {int(p.parent.name): p.read_text().rsplit(")", 1)[1].split() for p in pathlib.Path("/proc").glob(
    "[0-9]*/stat")}
  family = {pid}
  for _ in range(5):
    family |= {child for child, fields in stats.items() if int(fields[1]) in family}
  sockets = set()
  for member in family:
    for fd in pathlib.Path(f"/proc/{member}/fd").glob("*"):
      try:
        sockets.add(os.readlink(fd))
      except OSError:
        continue
  lines = [line.split() for name in ("tcp", "tcp6")
           for line in pathlib.Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
  return {line[1].rpartition(":")[0] for line in lines
          if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}  # 0A: listens.


@pytest.mark.slow
def test_runs_on_ray_are_those_of_this_machine_and_one_that_fails_stops_no_other(tmp_path):
  pytest.importorskip("ray", reason="what this is about")
  here = start(tmp_path / "here", "here", 6, "0.01", "0.001")
  text = here.communicate()[0]
  assert text.splitlines()[-1] == "ended done done", text
  changes = {"optim.lr": 0.003, "steps": 6, "optim.warmup_steps": 2, "checkpoint.every": None}
  wrong = tmp_path / "ray" / make_cell("configs/tiny.py", changes).id / "seed=0"
  (wrong / "config.json").mkdir(parents=True)
  process, addresses = start(tmp_path / "ray", "ray", 6, "0.003", "0.01", "0.001"), set()
  while process.poll() is None:
    addresses |= listening(process.pid)
    time.sleep(0.5)
  text = process.stdout.read()
  assert sorted(text.splitlines()[-1].split()) == ["done", "done", "ended", "failed"], text
  assert "IsADirectoryError" in text and read_outcome(wrong).exit_code == 1
  # 127.0.0.1, and the same as IPv6 writes it.
  assert addresses and addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}, addresses
  shutil.rmtree(wrong)
  assert len(numbers(tmp_path / "here")) == 2 and numbers(tmp_path / "here") == numbers(tmp_path / "ray")


@pytest.mark.slow
def test_sigterm_saves_what_runs_on_ray(tmp_path):
  pytest.importorskip("ray", reason="what this is about")
  process = start(tmp_path / "out", "ray", 100_000, "0.01", "0.001", "0.003")
  timer = threading.Timer(300, process.kill)
  timer.start()
  while process.poll() is None and not any(p.stat().st_size for p in tmp_path.glob("*/*/*/metrics.jsonl")):
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  text = process.communicate()[0]
  timer.cancel()
  assert text.splitlines()[-1] == "ended" and "stopped" in text, text
  assert not list(tmp_path.glob("*/*/*/outcome.json"))
  assert max(int(p.name) for p in tmp_path.glob("*/*/*/checkpoints/[0-9]*")) > 0

"""Several real processes on this machine: the same numbers, and an end with a name when one is missing."""
import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from model.hub.orbax import leaf_name, read_array, read_tree, restore_arrays
from model.sharding import make_mesh
from tests.test_loop import record
from tests.tiny import ROOT
from train.coordinator import DONE
from train.launch import free_port
from train.together import Peer, describe, judge

# The programs.

ENV = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")}


def train_command(workdir, cache, *more):
  return [f"--workdir={workdir}", "--config=configs/tiny.py", f"--config.data.cache_path={cache}",
          "--config.steps=8", "--config.eval.every=4", "--config.checkpoint.every=4",
          "--config.optim.warmup_steps=2", "--config.model.d_model=32", *more]


@contextlib.contextmanager
def launched(logs, command, *, processes=2, devices=1, grace=60):
  """The launcher; whatever it started is killed in the end."""
  launcher = subprocess.Popen(
      [sys.executable, "-m", "train.launch", f"--processes={processes}", f"--devices={devices}",
       f"--logs={logs}", f"--grace={grace}", "--", *command],
      cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  try:
    yield launcher
  finally:
    for pid in pids(logs):
      with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    launcher.kill()
    launcher.communicate()


def pids(logs):
  found = [re.search(r"^# .* process (\d+), pid (\d+):", p.read_text(), re.M) for p in logs.glob("*.log")]
  return [pid for _, pid in sorted((int(m[1]), int(m[2])) for m in found if m)]


def log_of(logs, i):
  return (logs / f"process-{i}.log").read_text()


def wait_for_step(workdir, step, launcher, limit_s=240):
  deadline, path = time.monotonic() + limit_s, workdir / "metrics.jsonl"
  while not (path.exists() and f'"step": {step}, "loss"' in path.read_text()):
    assert launcher.poll() is None, launcher.stdout.read()
    assert time.monotonic() < deadline, f"step {step} of {workdir}"
    time.sleep(0.05)


def finish(logs, command, **kwargs):
  with launched(logs, command, **kwargs) as launcher:
    output = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 0, output + log_of(logs, 1)
  return output


def finish_alone(command, devices):
  subprocess.run([sys.executable, "-m", "train.main", *command], cwd=ROOT, check=True, timeout=300,
                 env=ENV | {"JAX_NUM_CPU_DEVICES": str(devices)}, capture_output=True)


# The launcher.

def small(tmp_path, code, **kwargs):
  """(exit code, output, seconds) of processes that run `code`."""
  begin = time.monotonic()
  with launched(tmp_path / "logs", ["python", "-c", f"import os, signal, sys, time\nme = "
                                    f"int(os.environ['JAX_PROCESS_ID'])\n{code}"], **kwargs) as launcher:
    output = launcher.communicate(timeout=60)[0]
  return launcher.returncode, output, time.monotonic() - begin


def test_slices_are_along_the_axis_that_is_named(tmp_path):
  """Processes stand for slices: along "fsdp" both are met, slowest first; other axes stay within one."""
  code, output, _ = small(tmp_path, """
from train.host import start_distributed
start_distributed()
from model.sharding import make_mesh
mesh = make_mesh(slices=2, slice_axis="fsdp", fsdp=4, tensor=2)
places = [[d.process_index for d in row] for row in mesh.devices.reshape(4, 2)]
assert places == [[0, 0], [0, 0], [1, 1], [1, 1]], places
try:
  make_mesh(slices=4, slice_axis="fsdp", fsdp=4, tensor=2)
except ValueError as e:
  assert str(e) == "mesh.slices=4, but this run has 2 processes; nearest valid: 2", e
else:
  raise AssertionError("4 slices of 2 processes")
""", devices=4)
  assert code == 0, output


def test_each_process_knows_its_place(tmp_path):
  code, output, _ = small(tmp_path, "print(sorted((k, v) for k, v in os.environ.items() if k[:4] == 'JAX_'))",
                          processes=3, devices=5)
  said = [log_of(tmp_path / "logs", i) for i in range(3)]
  assert code == 0 and "exit 0" in output and all("('JAX_NUM_CPU_DEVICES', '5')" in text for text in said)
  assert [f"('JAX_PROCESS_ID', '{i}')" in said[i] for i in range(3)] == [True] * 3
  assert said[0].splitlines()[-1] in output and "('JAX_PROCESS_ID', '1')" not in output
  address = {re.search(r"127.0.0.1:\d+", text)[0] for text in said}
  assert len(address) == 1


@pytest.mark.parametrize("code, expected, words", [
  ("sys.exit(7 * me)", 7, "process 1: exit 7"),
  ("sys.exit(143)", 143, "process 0: exit 143"),
  ("os.kill(os.getpid(), signal.SIGKILL) if me else time.sleep(0.5)", 137, "process 1: killed by SIGKILL"),
  ("time.sleep(60) if me == 0 else sys.exit('broken here')", 1, "broken here"),
])
def test_the_exit_code_is_that_of_the_first_that_failed(tmp_path, code, expected, words):
  returned, output, seconds = small(tmp_path, code, grace=1)
  assert returned == expected and words in output and seconds < 20


@pytest.mark.parametrize("number, expected", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_all(tmp_path, number, expected):
  code = ("import signal, sys, time\nfor n in (15, 2): signal.signal(n, lambda n, _: sys.exit(128 + n))\n"
          "print('rea' + 'dy', flush=True)\ntime.sleep(60)")
  with launched(tmp_path / "logs", ["python", "-c", code]) as launcher:
    logs = [tmp_path / "logs" / f"process-{i}.log" for i in range(2)]
    while not all(log.exists() and "ready" in log.read_text() for log in logs):
      time.sleep(0.05)
    launcher.send_signal(number)
    output = launcher.communicate(timeout=20)[0]
  assert launcher.returncode == expected
  assert output.count(f": exit {expected}") == 2


@pytest.mark.parametrize("arguments, words", [
  ([], "--processes"),
  (["--processes=0", "--devices=1", "--", "true"], "0 must be at least 1"),
  (["--processes=2", "--devices=1"], "no command"),
  (["--processes=2", "--devices=1", "--", "no-such-program"], "no program is called 'no-such-program'"),
  (["--processes=2", "--devices=1", "--logs=/proc/none", "--", "true"], "/proc/none cannot be written"),
])
def test_mistakes_are_named_before_anything_starts(arguments, words):
  done = subprocess.run([sys.executable, "-m", "train.launch", *arguments], cwd=ROOT, env=ENV, text=True,
                        capture_output=True)
  assert done.returncode == 2 and words in done.stderr


# Who is missing.

def peers(*places, ended=None):
  """Peers by (marks, phase, seconds since it was heard, since it moved), at time 1000."""
  made = [Peer(1000 - heard, 1000 - moved, marks=marks, step=5, phase=phase)
          for marks, phase, heard, moved in places]
  for i, what in (ended or {}).items():
    made[i].ended = what
  return made


@pytest.mark.parametrize("places, missing", [
  ([(9, "training", 0, 9), (9, "training", 0, 9)], None),
  ([(9, "training", 0, 11), (9, "training", 10.5, 11)], (1,)),  # Silent.
  ([(9, "training", 0, 11), (8, "waiting for data", 0, 11)], (1,)),  # An endless loop.
  ([(9, "training", 0, 11), (8, "waiting for data", 0, 11), (9, "training", 0, 5)], None),  # One still moves.
  ([(9, "barrier: data", 0, 100), (8, "preparing data", 0, 100)], None),  # It may take long,
  ([(9, "barrier: data", 0, 100), (8, "preparing data", 10.5, 100)], (1,)),  # if it is alive,
  ([(9, "barrier: data", 0, 130), (8, "preparing data", 0, 121)], (1,)),  # and not for ever.
  ([(9, "training", 0, 11), (9, "training", 0, 11)], (0, 1)),
  ([(8, "waiting for data", 0, 11), (9, "training", 0, 11)], (0,)),  # It may be oneself.
])
def test_the_judge(places, missing):
  verdict = judge(peers(*places), 0, 1000.0, 10.0)
  assert (verdict and verdict.missing) == missing


def test_what_another_process_says_of_itself_is_taken_at_once():
  ended = {"why": "ValueError: no", "missing": [2], "code": 1}
  verdict = judge(peers(*[(9, "training", 0, 0)] * 3, ended={1: ended}), 0, 1000.0, 10.0)
  assert verdict.missing == (2,) and verdict.why == "ValueError: no"


def test_the_table_names_process_step_phase_and_age():
  all_ = peers((9, "training", 0, 11), (8, "waiting for data", 0.4, 11))
  text = describe(all_, judge(all_, 0, 1000.0, 10.0), 0, 1000.0)
  assert text.splitlines()[0] == ("process 1: alive, but behind the others: no process has moved for 10 s")
  assert re.search(r"1 +5  waiting for data  11.0 s +0.4 s ago  <--$", text.splitlines()[-1])


def test_processes_agree_to_the_bit(tmp_path):
  """Round after round, under names that come in any order of their own; what was read by all is forgotten."""
  code, output, _ = small(tmp_path, """
import numpy as np
from jax._src import distributed
from train.host import Stopwatch, start_distributed
from train.together import agree
start_distributed()
clock = Stopwatch()
for n in range(20):
  time.sleep(0.003 * ((n + me) % 3))
  said = agree("number", clock, np.array([me, n / 7], np.float64))
  assert said.dtype == np.float64 and said.tolist() == [[i, n / 7] for i in range(3)], said
  assert agree("flag", clock, me == n % 3).tolist() == [i == n % 3 for i in range(3)]
agree("end", clock, 0)
left = [key for key, _ in distributed.global_state.client.key_value_dir_get_bytes("assay/agree/number")]
assert len(left) == 3, left
agree("read", clock, 0)
""", processes=3)
  assert code == 0, output


# Training.

def test_two_processes_train(tmp_path):
  """The quick one: they meet, train, save, agree, and part."""
  output = finish(tmp_path / "logs", ["python", "-m", "train.main", *train_command(
      tmp_path / "run", tmp_path / "cache", "--config.steps=3", "--config.eval.every=None",
      "--config.model.n_layers=1", "--config.checkpoint.every=None")])
  assert "process 1: exit 0" in output and "barrier: stop" in output
  assert [line["step"] for line in record(tmp_path / "run") if "loss" in line] == [1, 2, 3]
  assert (tmp_path / "run" / "checkpoints" / "3" / "manifest.json").exists()


def test_a_workdir_that_is_not_shared_is_named(tmp_path):
  code = ("import os, sys; from train.main import main; "
          f"sys.exit(main([f'--workdir={tmp_path}/run' + os.environ['JAX_PROCESS_ID'], *sys.argv[1:]]))")
  command = ["python", "-c", code, *train_command(tmp_path, tmp_path)[1:]]
  with launched(tmp_path / "logs", command) as launcher:
    launcher.communicate(timeout=60)
  assert launcher.returncode == 2
  for i in range(2):
    assert "is not shared: process 1 of 2 does not see what process 0 writes there" in log_of(
        tmp_path / "logs", i)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, splits", [
  (dict(data=2, fsdp=2, tensor=2), [(1, 8), (2, 4), (4, 2)]),
  (dict(tensor=2, fsdp=1), [(1, 2), (2, 1)]),
  (dict(fsdp=2), [(1, 2), (2, 1)]),
])
def test_any_number_of_processes_gives_the_same_record(tmp_path, mesh, splits):
  """Between 2 x 4 and 4 x 2 to the bit, as seen; one process adds in another order than Gloo: 2e-7."""
  records = []
  for processes, devices in splits:
    workdir = tmp_path / f"{processes}x{devices}"
    command = train_command(workdir, tmp_path / "cache", *(f"--config.mesh.{a}={n}" for a, n in mesh.items()))
    if processes == 1:
      finish_alone(command, devices)
    else:
      finish(tmp_path / f"logs{processes}", ["python", "-m", "train.main", *command], processes=processes,
             devices=devices)
    records.append(record(workdir))
  assert len(records[0]) == 8 + 3 and "loss" in records[0][-2]
  for other in records[1:]:
    for one, two in zip(records[0], other, strict=True):
      assert one == pytest.approx(two, rel=1e-6)
      for name in {"step", "tokens", "lr", "skipped"} & one.keys():
        assert one[name] == two[name]


@pytest.mark.slow
def test_saved_by_two_continued_by_one(tmp_path):
  """SIGTERM to one of 2 x 4: both save the same step; 1 x 2 goes on with the same rows."""
  work, cache, steps = tmp_path / "run", tmp_path / "cache", "--config.steps=40"
  finish_alone(train_command(tmp_path / "whole", cache, steps), 1)
  mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
  command = ["env", "FAULT=none", sys.executable, "-c", SLOWLY, *train_command(work, cache, steps, *mesh)]
  with launched(tmp_path / "logs", command, devices=4) as launcher:
    wait_for_step(work, 6, launcher)
    os.kill(pids(tmp_path / "logs")[1], signal.SIGTERM)
    output = launcher.communicate(timeout=120)[0]
  assert launcher.returncode == 143 and output.count(": exit 143") == 2, output
  stopped = max(int(p.name) for p in (work / "checkpoints").iterdir() if p.name.isdecimal())
  assert record(work)[-1]["step"] == stopped < 40

  saved = work / "checkpoints" / str(stopped)
  mesh, wanted = make_mesh(fsdp=8), {}
  for name, a in read_tree(saved).items():
    if name.startswith("params/"):
      axis = next((i for i, n in enumerate(a.shape) if n % 8 == 0), None)
      spec = jax.P(*("fsdp" if i == axis else None for i in range(len(a.shape))))
      *folders, last = name.split("/")
      place = wanted
      for folder in folders:
        place = place.setdefault(folder, {})
      place[last] = jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec))
  split = jax.tree_util.tree_leaves_with_path(restore_arrays(saved, wanted, partial=True))
  assert len(split) > 5 and any(not a.is_fully_replicated for _, a in split)
  for path, a in split:
    assert np.asarray(a).tobytes() == read_array(saved, leaf_name(path)).tobytes(), leaf_name(path)

  finish_alone(train_command(work, cache, steps, "--config.mesh.fsdp=2"), 2)
  whole, got = record(tmp_path / "whole"), record(work)
  assert [line["step"] for line in got] == [line["step"] for line in whole]
  for a, b in zip(whole, got):
    assert a.get("tokens") == b.get("tokens")  # The rows have unequal numbers of trained tokens.
    for name in a.keys() & {"loss", "eval/val/loss"}:
      assert b[name] == pytest.approx(a[name], rel=2e-5), (a["step"], name)


# Faults.

STALL_S = 8
SLOWLY = """
import os, sys, time
import train.loop as loop
from train.main import main
make_batches = loop.make_batches
def slow(*args, **kwargs):
  for step, batch in enumerate(make_batches(*args, **kwargs)):
    time.sleep(0.3)
    while step == 9 and os.environ["JAX_PROCESS_ID"] == "1" and "loop" == os.environ["FAULT"]:
      pass
    yield batch
loop.make_batches = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault, victim", [
  ("SIGSTOP", 0), ("SIGSTOP", 1), ("SIGKILL", 0), ("SIGKILL", 1), ("loop", 1)])
def test_the_others_end_in_time_and_name_the_one(tmp_path, fault, victim):
  other, logs, work = 1 - victim, tmp_path / "logs", tmp_path / "run"
  command = train_command(work, tmp_path / "cache", "--config.steps=100000", "--config.eval.every=None",
                          "--config.checkpoint.every=None", f"--config.stall_s={STALL_S}")
  with launched(logs, ["env", f"FAULT={fault}", sys.executable, "-c", SLOWLY, *command],
                grace=STALL_S + 30) as launcher:
    wait_for_step(work, 8, launcher)  # Written when the next one is done; the loop is in the tenth.
    begin, all_ = time.monotonic(), pids(logs)
    if fault != "loop":
      os.kill(all_[victim], signal.Signals[fault])
    while running(all_[other]):
      assert time.monotonic() - begin < STALL_S + 10, log_of(logs, other)[-3000:]
      time.sleep(0.1)
    took = time.monotonic() - begin
    if fault == "SIGSTOP":
      os.kill(all_[victim], signal.SIGKILL)
    output = launcher.communicate(timeout=60)[0]
  assert launcher.returncode != 0 and re.search(rf"process {other}: exit 1 ", output), output
  said = log_of(logs, other)
  print(f"{fault} of {victim}: {took:.1f} s\n" + said[said.index("train.main: failed"):])
  assert f"train.main: failed: process {victim}: " in said
  phase = "waiting for data" if fault == "loop" else r"\S.*\S"
  (step,) = re.findall(rf"^ +{victim} +(\d+)  {phase}  +[\d.]+ s +[\d.]+ s ago  <--$", said, re.M)
  assert int(step) == 9 if fault == "loop" else 4 <= int(step) <= 11  # As of its last beat.
  assert "train/loop.py" in said  # A traceback, or where the main thread hangs.
  assert ("The main thread of process" in said) == (fault != "SIGKILL")


def running(pid):
  """Not ended, nor a zombie that its parent has not looked at."""
  try:
    return not re.search(r"^State:\s+Z", open(f"/proc/{pid}/status").read(), re.M)
  except FileNotFoundError:
    return False


def test_a_stop_before_there_is_a_state_ends_all(tmp_path):
  """SIGTERM to one while it prepares the data: the others do not wait for stall_s."""
  code = ("import os, signal, sys, time, train.loop as loop\nfrom train.main import main\n"
          "def slow(*args, **kwargs):\n  os.kill(os.getpid(), signal.SIGTERM)\n  time.sleep(60)\n"
          "loop.prepare = slow\nsys.exit(main(sys.argv[1:]))")
  with launched(tmp_path / "logs", ["python", "-c", code, *train_command(
      tmp_path / "run", tmp_path / "cache")]) as launcher:
    output = launcher.communicate(timeout=90)[0]
  assert launcher.returncode == 143 and output.count(": exit 143") == 2, output


# The coordinator.

def coordinator(port):
  command = [sys.executable, "-m", "train.coordinator", f"[::]:{port}", "1", "100", "100", "60"]
  process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL)
  return process, process.stdout.readline().strip()


def test_a_port_serves_one_run_and_the_next_when_that_has_died():
  port = free_port()
  first, said = coordinator(port)
  second, refused = coordinator(port)
  assert said == "up" and f"port {port} is used by another run, coordinator serving {first.pid}" in refused
  first.stdin.close()  # Its process 0 has died.
  time.sleep(0.5)
  assert first.poll() is None, "it stays for the others to find out"
  third, said = coordinator(port)
  assert said == "up" and first.wait(5) == -signal.SIGKILL
  third.stdin.write(DONE)
  third.stdin.close()
  assert third.wait(10) == 0
  second.wait(5)

"""Signals, and where the time goes."""
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.tiny import ROOT
from train.host import StopSignal, Stopwatch, peak_memory


class Exit(Exception):
  pass


@pytest.fixture
def handlers(monkeypatch):
  def leave(code):
    raise Exit(code)

  monkeypatch.setattr(os, "_exit", leave)
  before = {n: signal.getsignal(n) for n in StopSignal.EXIT}
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


def test_a_signal_ends_the_process_at_once_until_there_is_a_state(handlers):
  stop = StopSignal()
  with pytest.raises(Exit, match="143"):
    os.kill(os.getpid(), signal.SIGTERM)
  stop.at_once = False
  os.kill(os.getpid(), signal.SIGTERM)
  assert stop.requested(0) and stop.exit_code == 143


def test_a_second_ctrl_c_does_not_wait(handlers):
  stop = StopSignal()
  stop.at_once = False
  os.kill(os.getpid(), signal.SIGINT)
  assert stop.exit_code == 130
  with pytest.raises(Exit):
    os.kill(os.getpid(), signal.SIGINT)


def test_the_phases_sum_to_the_wall():
  start, clock = time.perf_counter(), Stopwatch()
  clock.enter("training")
  for _ in range(3):
    with clock.within("waiting for data"):
      time.sleep(0.01)
    time.sleep(0.005)
  text = clock.describe()
  wall = time.perf_counter() - start
  assert sum(clock.seconds.values()) == pytest.approx(wall, rel=0.05, abs=0.002)
  assert clock.seconds["waiting for data"] >= 0.03
  assert text.startswith("time: ") and "waiting for data" in text


def test_the_place_of_a_process_is_the_number_of_phases_it_entered():
  """train.together finds the process that is behind by it: describing must not count, nor a note of one."""
  one, other = Stopwatch(), Stopwatch()
  for clock in (one, other):
    with clock.within("waiting for data"):
      pass
  one.describe()
  one.notes += 1
  assert one.marks == other.marks == 2 and one.phase == "start"


def test_the_start_counts_from_the_command():
  """Against the clock of the process that gives it."""
  code = "import time, train.host; time.sleep(0.2); print(train.host.process_age())"
  before = time.time()
  process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  age = float(process.communicate()[0])
  assert 0.2 < age < time.time() - before + 0.02  # It counts in hundredths.
  clock = Stopwatch("imports", age=3.0)
  with clock.within("tracing"):
    time.sleep(0.06)
  assert re.fullmatch(r"first step after 3\.1 s: imports 3\.0, tracing 0\.1", clock.describe_start())


def test_peak_memory_names_what_it_measures():
  assert "GiB" in peak_memory()

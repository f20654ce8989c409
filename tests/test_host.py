"""Signals, the compile cache, and where the time goes."""
import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from tests.tiny import ROOT
from train.host import CompileCache, StopSignal, Stopwatch, peak_memory


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


def test_a_compile_cache_that_cannot_be_is_a_warning(tmp_path, capsys, monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  before = jax.config.jax_compilation_cache_dir
  (tmp_path / "file").write_text("in the way")
  cache = CompileCache(tmp_path / "file" / "cache")
  assert "compiling without it" in capsys.readouterr().err and cache.describe() == "no cache"
  assert jax.config.jax_compilation_cache_dir == before


def test_the_second_process_finds_what_the_first_compiled(tmp_path):
  code = ("import jax, sys; from train.host import CompileCache; c = CompileCache(sys.argv[1]);"
          "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0);"
          "jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((64, 64))); print(c.describe())")
  env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"JAX_PLATFORMS": "cpu"}
  first, second = (subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env, text=True,
                                  capture_output=True, check=True).stdout for _ in range(2))
  assert "cache hit 0/" in first and "cache hit 0/" not in second


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


def test_peak_memory_names_what_it_measures():
  assert "GiB" in peak_memory()

"""The run as a whole: it learns, it stops and goes on to the last bit, and it explains what it skips."""
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train.evaluate as evaluate
import train.loop as loop
from configs.tiny import get_config
from tests.tiny import ROOT
from train.host import StopSignal, Stopwatch
from train.log import TooManySkips
from train.metrics import read_metrics

STEPS = 12


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


def tiny_run(cache, **changes):
  cfg = get_config()
  cfg.steps, cfg.eval.every, cfg.checkpoint.every, cfg.data.cache_path = STEPS, 4, 4, str(cache)
  cfg.model.d_model, cfg.model.dropout = 32, 0.1
  for name, value in changes.items():
    section, field = name.split("__") if "__" in name else (None, name)
    setattr(getattr(cfg, section) if section else cfg, field, value)
  return cfg.validate(8)


def run(cfg, workdir, **kwargs):
  workdir.mkdir(exist_ok=True)
  handlers = {n: signal.getsignal(n) for n in StopSignal.EXIT}
  try:
    return loop.train(cfg, workdir, loop.prepare_run(cfg, Stopwatch()), stop=StopSignal(), **kwargs)
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)


EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "skipped", "eval/val/loss", "eval/val/bpb")


def record(workdir):
  """What must not depend on when and where a run was stopped: every number that is not a time."""
  return [{k: line[k] for k in EXACT if k in line} for line in read_metrics(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def reference(cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("reference")
  assert run(tiny_run(cache), workdir) == 0
  return record(workdir)


def test_the_record_is_complete(reference):
  steps = [line["step"] for line in reference if "loss" in line]
  evals = [line["step"] for line in reference if "eval/val/bpb" in line]
  assert steps == list(range(1, STEPS + 1)) and evals == [0, 4, 8, 12]
  assert reference[-1]["eval/val/loss"] < reference[0]["eval/val/loss"] - 0.5


def test_nothing_compiles_once_the_steps_have_begun(cache, tmp_path, monkeypatch, capsys):
  """That each program is compiled once, a run asserts."""
  compiled, make_batches = [], loop.make_batches

  def counted(*args, **kwargs):
    compiled.clear()
    return make_batches(*args, **kwargs)

  count = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
  jax.monitoring.register_event_duration_secs_listener(count)
  monkeypatch.setattr(loop, "make_batches", counted)
  try:
    assert run(tiny_run(cache), tmp_path) == 0
    said = capsys.readouterr()
    assert compiled == [] and "WARNING" not in said.out + said.err
    assert re.search(r"^compile: [\d.]+ s, .*\btrain_step [\d.]+ s", said.out, re.M)
    assert re.search(r"^expected of 8 x cpu \(modelled\): [\d.]+ GiB a device", said.out, re.M)
    assert re.search(r"^measured: step .* by the compiler .*; expected: step ", said.out, re.M)
    assert re.search(r"^first step after [\d.]+ s: .*\btracing [\d.]+, initialising [\d.]+", said.out, re.M)
    jax.jit(lambda x: x * 3.5)(jnp.ones(3))
    assert compiled, "the count counts"
  finally:
    jax.monitoring.unregister_event_duration_listener(count)


class Crash(Exception):
  pass


@pytest.mark.parametrize("crash_at", [(1,), (4, 5), (3, 11)])
def test_a_crashed_run_goes_on_to_the_last_bit(cache, reference, tmp_path, monkeypatch, crash_at):
  """It dies when it asks for the rows of these steps, between and right after checkpoints."""
  make_batches = loop.make_batches
  for step in crash_at:
    def until(*args, start_step, step=step, **kwargs):
      for n, batch in enumerate(make_batches(*args, start_step=start_step, **kwargs), start_step):
        if n == step:
          raise Crash
        yield batch
    monkeypatch.setattr(loop, "make_batches", until)
    with pytest.raises(Crash):
      run(tiny_run(cache), tmp_path)
  monkeypatch.setattr(loop, "make_batches", make_batches)
  assert run(tiny_run(cache), tmp_path) == 0
  assert record(tmp_path) == reference


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_loses_no_step(cache, reference, tmp_path, monkeypatch, number, code):
  make_batches = loop.make_batches

  def signalled(*args, start_step, **kwargs):
    for n, batch in enumerate(make_batches(*args, start_step=start_step, **kwargs), start_step):
      if n == 5:
        os.kill(os.getpid(), number)
      yield batch

  monkeypatch.setattr(loop, "make_batches", signalled)
  assert run(tiny_run(cache), tmp_path) == code
  assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == 6
  monkeypatch.setattr(loop, "make_batches", make_batches)
  assert run(tiny_run(cache), tmp_path) == 0
  assert record(tmp_path) == reference


def test_a_signal_during_evaluation_redoes_it_once(cache, reference, tmp_path, monkeypatch):
  val_batches = evaluate.val_batches
  calls = []

  def signalled(*args, **kwargs):
    calls.append(0)
    for n, batch in enumerate(val_batches(*args, **kwargs)):
      yield batch
      if len(calls) == 3 and n == 0:  # The evaluation at step 8.
        os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(evaluate, "val_batches", signalled)
  assert run(tiny_run(cache), tmp_path) == 143
  assert not any(line["step"] == 8 and "eval/val/loss" in line for line in record(tmp_path))
  monkeypatch.setattr(evaluate, "val_batches", val_batches)
  assert run(tiny_run(cache), tmp_path) == 0
  assert record(tmp_path) == reference


@pytest.mark.parametrize("at", [0, STEPS])
def test_a_signal_in_the_first_or_last_evaluation(cache, reference, tmp_path, monkeypatch, at):
  """Before anything was recorded, and when there is nothing left to train."""
  val_batches = evaluate.val_batches
  calls = []

  def signalled(*args, **kwargs):
    calls.append(0)
    if len(calls) == (1 if at == 0 else 4):
      os.kill(os.getpid(), signal.SIGTERM)
    yield from val_batches(*args, **kwargs)

  monkeypatch.setattr(evaluate, "val_batches", signalled)
  assert run(tiny_run(cache), tmp_path) == 143
  monkeypatch.setattr(evaluate, "val_batches", val_batches)
  assert run(tiny_run(cache, checkpoint__best="eval/val/loss"), tmp_path) == 0
  assert record(tmp_path) == reference
  for step in (8, 12):
    meta = json.loads((tmp_path / "checkpoints" / str(step) / "meta.json").read_text())
    assert meta["metrics"]["eval/val/loss"] == next(
        line["eval/val/loss"] for line in reference if line["step"] == step and "eval/val/loss" in line)


def test_a_damaged_checkpoint_costs_its_steps_only(cache, reference, tmp_path, capsys):
  assert run(tiny_run(cache), tmp_path) == 0
  newest = tmp_path / "checkpoints" / str(STEPS)
  victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(victim.read_bytes())
  data[len(data) // 2] ^= 1
  victim.write_bytes(data)
  assert run(tiny_run(cache), tmp_path) == 0
  assert "checkpoint 12 is damaged" in capsys.readouterr().out
  assert record(tmp_path) == reference


def poison(monkeypatch, steps, slot=3):
  make_batches = loop.make_batches

  def poisoned(*args, start_step, **kwargs):
    for n, batch in enumerate(make_batches(*args, start_step=start_step, **kwargs), start_step):
      if n in steps:
        batch["weights"][slot] = np.nan
      yield batch

  monkeypatch.setattr(loop, "make_batches", poisoned)


def test_a_bad_row_is_skipped_and_named(cache, tmp_path, monkeypatch):
  poison(monkeypatch, {6})
  assert run(tiny_run(cache), tmp_path) == 0
  lines = [line for line in record(tmp_path) if "loss" in line]
  assert [line["skipped"] for line in lines] == [0] * 6 + [1] + [0] * 5
  report = json.loads((tmp_path / "skipped" / "7.json").read_text())
  assert report["rows"][0]["slot"] == 3 and report["rows"][0]["pieces"][0]["source"] == "synthetic"
  assert report["non_finite_parameters"] == [] and len(report["rows"]) == 8


def test_a_run_of_bad_rows_ends_the_run(cache, tmp_path, monkeypatch):
  poison(monkeypatch, {4, 5, 6})
  with pytest.raises(TooManySkips, match="3 steps skipped in a row, more than optim.max_skips=2"):
    run(tiny_run(cache, optim__max_skips=2), tmp_path)


def test_other_data_is_refused(cache, tmp_path, monkeypatch):
  cfg = tiny_run(cache)
  cfg.steps = 5
  assert run(cfg, tmp_path) == 0
  cfg = tiny_run(cache)
  cfg.data.sources[0].documents = 390
  with pytest.raises(loop.Refused, match="data.sources\\[0\\].documents: 400 there, 390 here"):
    run(cfg, tmp_path, allowed=["steps"])
  with pytest.raises(loop.Refused, match="the data has changed since step 5"):
    run(cfg, tmp_path, allowed=["steps", "data"])


# Real processes, killed for real.

def command(workdir, cache, *more):
  return [sys.executable, "-m", "train.main", "--config=configs/tiny.py", f"--workdir={workdir}",
          "--config.steps=60", "--config.checkpoint.every=7", "--config.eval.every=10",
          f"--config.data.cache_path={cache}", *more]


def launch(workdir, cache, *more):
  env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")}
  return subprocess.Popen(command(workdir, cache, *more), cwd=ROOT, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_until(process, condition, what):
  for _ in range(200_000):
    if condition():
      return
    assert process.poll() is None, f"ended with {process.returncode} before {what}:\n{process.stdout.read()}"
    time.sleep(0.001)
  raise AssertionError(what)


def reached(workdir, step):
  path = workdir / "metrics.jsonl"
  return lambda: path.exists() and f'"step": {step}, "loss"' in path.read_text()


def finish(workdir, cache, *more):
  process = launch(workdir, cache, *more)
  output = process.communicate(timeout=300)[0]
  assert process.returncode == 0, output
  return output


@pytest.mark.slow
def test_kill_9_five_times(tmp_path):
  finish(tmp_path / "whole", tmp_path / "cache")
  work, rng, at = tmp_path / "killed", random.Random(0), 0
  saving = lambda: list((work / "checkpoints").glob("*.saving"))
  for kill in range(5):
    process = launch(work, tmp_path / "cache")
    if kill == 2:
      wait_until(process, saving, "a save")
    else:
      at = rng.randrange(at + 1, 60 - 10 * (4 - kill))
      wait_until(process, reached(work, at), f"step {at}")
    process.kill()
    process.wait()
  finish(work, tmp_path / "cache")
  assert record(work) == record(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["data", "compile", "step", "evaluation", "save"])
def test_sigterm_in_any_phase(tmp_path, phase):
  finish(tmp_path / "whole", tmp_path / "cache")
  work = tmp_path / "stopped"
  process = launch(work, tmp_path / ("other" if phase == "data" else "cache"))
  ready = {
    "data": lambda: (tmp_path / "other").exists(),
    "compile": lambda: (work / "tokenizer.model").exists(),
    "step": reached(work, 17),
    "evaluation": reached(work, 20),
    "save": lambda: any((work / "checkpoints").glob("1*.saving")),
  }[phase]
  wait_until(process, ready, phase)
  process.send_signal(signal.SIGTERM)
  output = process.communicate(timeout=120)[0]
  assert process.returncode == 143, output
  finish(work, tmp_path / "cache")
  assert record(work) == record(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(tmp_path):
  """SIGTERM to one of them: both save, exit with 143, and go on from there."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]

  def both(*more):
    for i in range(2):
      yield subprocess.Popen(
          command(tmp_path / "run", tmp_path / "cache", "--config.mesh.tensor=2",
                  "--config.checkpoint.every=1000", *more),
          cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {
              "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2",
              "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
              "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)})

  steps = "--config.steps=1000"
  first, second = both(steps)
  wait_until(first, reached(tmp_path / "run", 12), "step 12")
  second.send_signal(signal.SIGTERM)
  outputs = [p.communicate(timeout=120)[0] for p in (first, second)]
  assert (first.returncode, second.returncode) == (143, 143), outputs
  stopped = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
  assert stopped == record(tmp_path / "run")[-1]["step"]
  first, second = both(steps)
  wait_until(first, reached(tmp_path / "run", stopped + 3), "the steps after")
  for p in (first, second):
    p.kill()
    p.wait()
  got = [line["step"] for line in record(tmp_path / "run") if "loss" in line]
  assert got == list(range(1, len(got) + 1))


@pytest.mark.slow
def test_a_workdir_serves_one_run(tmp_path):
  first = launch(tmp_path / "run", tmp_path / "cache", "--config.steps=100000")
  wait_until(first, reached(tmp_path / "run", 3), "step 3")
  second = launch(tmp_path / "run", tmp_path / "cache", "--config.steps=100000")
  output = second.communicate(timeout=60)[0]
  first.kill()
  first.wait()
  assert second.returncode == 2 and f"is in use by process {first.pid}" in output


@pytest.mark.slow
def test_profile_names_the_lines_of_the_model(tmp_path):
  output = finish(tmp_path / "run", tmp_path / "cache", "--profile")
  assert "CD,DF->CF" in output and (tmp_path / "run" / "profile" / "top_operations.txt").exists()


@pytest.mark.slow
def test_exit_codes_and_changed_settings(tmp_path):
  finish(tmp_path / "run", tmp_path / "cache")
  process = launch(tmp_path / "run", tmp_path / "cache", "--config.optim.lr=0.5")
  output = process.communicate(timeout=60)[0]
  assert process.returncode == 2 and "optim.lr: 0.003 there, 0.5 here" in output
  output = finish(tmp_path / "run", tmp_path / "cache", "--config.steps=64", "--allow_change=steps")
  assert "resuming from step 60" in output
  assert record(tmp_path / "run")[-1]["step"] == 64

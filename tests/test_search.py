"""A search proposes and prunes what optuna by itself does, and is the same search after kills."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest

from configs.tiny import get_config
from data.files import write_json
from experiments import search as module_under_test
from experiments.cells import Cell, Experiment, Outcome, label, make_cell
from experiments.search import PRUNER, SAMPLER, describe_best, search
from tests.tiny import ROOT

optuna = pytest.importorskip("optuna", reason="experiments.search is made of it")

LOSS = "eval/val/loss"
STEPS = 40  # Of configs/tiny.py, which evaluates every 20.


def suggest(trial):
  return {"optim.lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True),
          "optim.b2": trial.suggest_categorical("b2", [0.9, 0.95, 0.99])}


def curve(overrides):
  """Step -> loss, as a smooth function of the settings."""
  lr, b2 = overrides["optim.lr"], overrides["optim.b2"]
  end = abs(lr - 0.02) * 20 + abs(b2 - 0.95)
  return {step: end + 3 / step for step in (10, 20, 30, STEPS)}


def make(**settings):
  defaults = dict(__name__="experiments.made_up", BASE="configs/tiny.py", suggest=suggest, TRIALS=12)
  metric = settings.pop("METRIC", LOSS)
  experiment = Experiment(module="experiments.made_up", question="?", metric=metric, higher_is_better=False,
                          seeds=settings.pop("SEEDS", (0,)), budget=None, baseline=None, cells=[])
  return experiment, types.SimpleNamespace(**(defaults | settings))


class Killed(BaseException):
  pass


@pytest.fixture
def world(monkeypatch):
  """A stand-in for runs: world.kill_at is a list of (how many runs were begun, when in it). Configs are
  checked where world.strict is set, which takes its time."""
  resolved = get_config().validate()
  state = types.SimpleNamespace(ran=[], begun=0, kill_at=[], stop_at=None, strict=False)

  def run_one(run, place, *, stop, prune):
    state.begun += 1
    when = next((when for n, when in state.kill_at if n == state.begun), None)
    run.workdir.mkdir(parents=True, exist_ok=True)
    if when == "before":
      raise Killed
    if stop.is_set() or state.begun == state.stop_at:
      stop.set()
      return None
    outcome, lines = Outcome("done", 0, 1.0), []
    for step, loss in curve(run.cell.overrides).items():
      lines.append(json.dumps({"step": step, LOSS: loss}) + "\n")
      (run.workdir / "metrics.jsonl").write_text("".join(lines) + '{"step": 1')  # The last is half written.
      if prune is not None and prune():
        outcome = Outcome("pruned", 143, 1.0)
        break
      if when == "between":
        raise Killed
    (run.workdir / "metrics.jsonl").write_text("".join(lines))
    state.ran.append(run.cell.id)
    write_json(run.workdir / "outcome.json", outcome._asdict())
    if when == "after":
      raise Killed
    return outcome

  def quick(base, overrides, name=None, metric=""):
    if state.strict:
      return make_cell(base, overrides, name, metric)
    tag = hashlib.sha256(repr(overrides).encode()).hexdigest()[:6]
    return Cell(label(overrides), f"{label(overrides)}-{tag}", base, overrides, resolved)

  monkeypatch.setattr(module_under_test, "run_one", run_one)
  monkeypatch.setattr(module_under_test, "make_cell", quick)
  return state


def go(folder, jobs=1, **settings):
  board = types.SimpleNamespace(begin=lambda run: None, end=lambda run, outcome: None)
  count = lambda experiment: {cell.id: {"flops": 1.0, "tokens": 1} for cell in experiment.cells}
  return search(*make(**settings), folder, jobs, board, count)


def trials(folder):
  """(parameters, value, state, what was reported) of each, in order."""
  backend = optuna.storages.journal.JournalFileBackend(str(folder / "trials.journal"))
  study = optuna.load_study(study_name="experiments.made_up", storage=optuna.storages.JournalStorage(backend))
  return [(t.params, t.value, t.state.name, t.intermediate_values) for t in study.trials]


@pytest.mark.parametrize("sampler, pruner", [
  ("tpe", None), ("random", "median"), ("tpe", "halving"), ("tpe", "hyperband")])
def test_proposals_and_prunings_are_those_of_optuna(sampler, pruner, world, tmp_path):
  """Against a loop of optuna's own, without files and runs."""
  found = go(tmp_path / "sweep", SAMPLER=sampler, PRUNER=pruner, TRIALS=14)
  study = optuna.create_study(study_name="experiments.made_up", pruner=PRUNER[pruner](optuna, STEPS, 20))
  for number in range(14):
    study.sampler = SAMPLER[sampler](optuna, number)
    trial, pruned = study.ask(), False
    steps = curve(suggest(trial))
    for step, loss in steps.items():
      if pruner is not None:
        trial.report(loss, step)
        pruned = trial.should_prune() and step < STEPS
      if pruned:
        break
    study.tell(trial, state=optuna.trial.TrialState.PRUNED) if pruned else study.tell(trial, steps[STEPS])
  wanted = [(t.params, t.value, t.state.name, t.intermediate_values) for t in study.trials]
  assert [t[0] for t in trials(tmp_path / "sweep")] == [t[0] for t in wanted]
  assert [t[2:] for t in trials(tmp_path / "sweep")] == [t[2:] for t in wanted]
  assert (pruner is None) == all(t[2] == "COMPLETE" for t in wanted)
  assert found.left == 0 and not found.refused and len(found.runs) == len(world.ran) == 14
  best = min(t.value for t in study.trials if t.state.name == "COMPLETE")
  assert f"{LOSS} {best:.6g}" in describe_best(found)


@pytest.mark.filterwarnings("error::UserWarning")  # optuna's: that a step was reported before.
def test_killed_it_goes_on_as_if_it_had_not_been(world, tmp_path):
  kills = [(1, "before"), (4, "between"), (8, "after"), (9, "before"), (13, "between")]
  whole = go(tmp_path / "whole", PRUNER="median")
  ran, world.ran = world.ran, []
  world.begun, world.kill_at = 0, kills
  times, killed = 0, None
  while killed is None:
    try:
      killed = go(tmp_path / "killed", PRUNER="median")
    except Killed:
      times += 1
  assert times >= 4  # Where a run is pruned before it is killed "between", it is not.
  assert trials(tmp_path / "killed") == trials(tmp_path / "whole") and len(trials(tmp_path / "whole")) == 12
  assert world.ran == ran and len(set(ran)) == len(ran)
  texts = [(tmp_path / name / "sweep.json").read_text() for name in ("whole", "killed")]
  assert texts[0] == texts[1]
  assert {k.name: v for k, v in whole.outcomes.items()} == {k.name: v for k, v in killed.outcomes.items()}
  begun = world.begun
  assert go(tmp_path / "killed", PRUNER="median").left == 0 and world.begun == begun


def test_stopped_it_goes_on(world, tmp_path):
  world.stop_at = 5
  found = go(tmp_path / "sweep")
  assert found.left == 8 and len(world.ran) == 4 and list(found.outcomes.values()).count(None) == 1
  world.stop_at = None
  assert go(tmp_path / "sweep").left == 0 and len(world.ran) == 12
  go(tmp_path / "whole")
  assert trials(tmp_path / "sweep") == trials(tmp_path / "whole")
  assert go(tmp_path / "sweep", TRIALS=14).left == 0 and len(trials(tmp_path / "sweep")) == 14  # Two more.


def test_what_was_proposed_before_is_not_run_again(world, tmp_path):
  few = lambda trial: {"optim.lr": trial.suggest_categorical("lr", [0.01, 0.02, 0.03]), "optim.b2": 0.95}
  found = go(tmp_path / "sweep", suggest=few)
  assert len(world.ran) == len(found.runs) == 3 and len(trials(tmp_path / "sweep")) == 12
  for params, value, state, _ in trials(tmp_path / "sweep"):
    assert state == "COMPLETE" and value == curve({"optim.lr": params["lr"], "optim.b2": 0.95})[STEPS]


def test_two_at_a_time_run_each_once(world, tmp_path, monkeypatch):
  monkeypatch.setattr(module_under_test, "split_machine", lambda jobs: [None] * jobs)
  found = go(tmp_path / "sweep", jobs=3, TRIALS=20)
  assert found.left == 0 and sorted(world.ran) == sorted({run.cell.id for run in found.runs})
  assert len(trials(tmp_path / "sweep")) == 20


def test_a_proposal_that_is_no_config_is_reported_and_stops_no_other(world, tmp_path):
  def odd(trial):
    heads = trial.suggest_int("heads", 2, 5)
    return {"model.n_heads": heads, "model.n_kv_heads": 2, "optim.lr": 0.02, "optim.b2": 0.95}
  world.strict = True
  found = go(tmp_path / "sweep", suggest=odd, TRIALS=6)
  states = {params["heads"]: state for params, _, state, _ in trials(tmp_path / "sweep")}
  assert {heads: state for heads, state in states.items() if heads in (3, 5)} == dict.fromkeys(
    states.keys() & {3, 5}, "FAIL") and states.keys() & {3, 5} and states.keys() & {2, 4}
  assert found.left == 0 and "model.n_heads" in found.refused[0] and found.refused[0].startswith("trial ")


MISTAKES = [
  (dict(SAMPLER="tp"), "SAMPLER='tp': nearest valid: 'tpe'"),
  (dict(PRUNER="medan"), "PRUNER='medan': nearest valid: 'median'"),
  (dict(TRIALS=0), "TRIALS=0 must be a number from 1"),
  (dict(SEEDS=(0, 1)), "SEEDS=(0, 1): a search runs each cell once"),
  (dict(BASE=None), "has no BASE"),
  (dict(suggest=lambda trial: {"optim.lrr": trial.suggest_float("lr", 0.1, 1)}), "did you mean optim.lr?"),
]


@pytest.mark.parametrize("settings, said", MISTAKES, ids=lambda value: str(value)[:30])
def test_mistakes_are_named_before_anything_is_written(settings, said, world, tmp_path):
  world.strict = True
  with pytest.raises(ValueError) as error:
    go(tmp_path / "sweep", **settings)
  assert said in str(error.value) and not list(tmp_path.iterdir()) and not world.begun


def test_a_folder_is_of_one_search_at_a_time(world, tmp_path):
  go(tmp_path / "sweep", TRIALS=1)
  with pytest.raises(ValueError, match="minimize eval/val/loss, this one is to minimize eval/val/bpb"):
    go(tmp_path / "sweep", METRIC="eval/val/bpb")
  with module_under_test._locked(tmp_path / "sweep"), pytest.raises(ValueError, match="in use by another"):
    go(tmp_path / "sweep")


def test_a_loss_that_is_lost_is_the_worst(world, tmp_path, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], "curve", lambda o: {1: "NaN" if o["optim.lr"] > 0.01 else 1.0})
  found = go(tmp_path / "sweep")
  values = {params["lr"] > 0.01: value for params, value, _, _ in trials(tmp_path / "sweep")}
  assert values == {True: float("inf"), False: 1.0} and f"{LOSS} 1 " in describe_best(found)


SCRIPT = """
import pathlib, sys, types
from experiments.cells import Experiment
from experiments.estimate import count
from experiments.local import Board
from experiments.search import describe_best, search
suggest = lambda trial: {"optim.lr": trial.suggest_float("lr", 1e-3, 1e-1, log=True), "steps": 8,
                         "optim.warmup_steps": 2, "eval.every": 4, "checkpoint.every": 4}
module = types.SimpleNamespace(__name__="experiments.made_up", BASE="configs/tiny.py", suggest=suggest,
                               TRIALS=3)
experiment = Experiment(module=module.__name__, question="?", metric="eval/val/loss", higher_is_better=False,
                        seeds=(0,), budget=None, baseline=None, cells=[])
with Board(3, experiment.metric, 1) as board:
  print(describe_best(search(experiment, module, pathlib.Path(sys.argv[1]), 1, board, count)))
"""


@pytest.mark.slow
def test_real_runs_killed_by_the_system(tmp_path):
  env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | {"JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", SCRIPT]
  start = lambda name: subprocess.Popen([*command, str(tmp_path / name)], cwd=ROOT, env=env)
  assert start("whole").wait() == 0
  for wanted in ("*/*/metrics.jsonl", "*/*/outcome.json"):
    process = start("killed")
    while process.poll() is None and not list((tmp_path / "killed").glob(wanted)):
      time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert start("killed").wait() == 0
  assert trials(tmp_path / "killed") == trials(tmp_path / "whole")

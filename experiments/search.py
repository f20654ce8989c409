"""A search in place of a grid, by optuna: experiments/NAME.py has, instead of runs(),

  def suggest(trial):  the overrides of a cell: {"optim.lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True)}
  TRIALS = 20
  SAMPLER = "tpe"      a key of SAMPLER
  PRUNER = None        a key of PRUNER: what stops runs that are behind the others

Each trial is a cell, with the folder and files of one. The trials are in trials.journal: a search that was
killed goes on with those that were under way. What is proposed depends on the number of the trial and on the
trials that had ended, on nothing else.
"""
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import math
import queue
import statistics
import threading
import typing

from data.files import write_json
from data.flags import nearest
from experiments.cells import Experiment, Run, describe, find_runs, make_cell, read_outcome, setting
from experiments.local import last_value, run_one, split_machine, until_signal
from train.metrics import NON_FINITE

# Name -> (optuna, seed) -> a sampler.
SAMPLER = {
  "tpe": lambda optuna, seed: optuna.samplers.TPESampler(seed=seed),
  "random": lambda optuna, seed: optuna.samplers.RandomSampler(seed=seed),
}
# Name -> (optuna, steps of a run, steps between evaluations) -> a pruner.
PRUNER = {
  None: lambda optuna, steps, every: optuna.pruners.NopPruner(),
  "median": lambda optuna, steps, every: optuna.pruners.MedianPruner(),  # Of five runs at least.
  "halving": lambda optuna, steps, every: optuna.pruners.SuccessiveHalvingPruner(min_resource=every),
  "hyperband": lambda optuna, steps, every: optuna.pruners.HyperbandPruner(
    min_resource=every, max_resource=steps),
}
STATES = {"done": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}


class Found(typing.NamedTuple):
  experiment: Experiment  # With the cells of the trials.
  runs: list[Run]
  outcomes: dict  # By workdir; None: it was stopped, and is to go on.
  refused: list[str]  # Proposals that are no config.
  left: int  # Trials that have not ended.


def check_search(experiment: Experiment, module) -> None:
  """Before anything is touched. Raises ValueError, also where the first proposal is one that train.main would
  refuse."""
  optuna = _optuna()
  if setting(module, "BASE") is None:
    raise ValueError(f"{module.__name__} has no BASE; e.g. BASE = \"configs/tiny.py\"")
  for name, table in (("SAMPLER", SAMPLER), ("PRUNER", PRUNER)):
    value = setting(module, name)
    if value not in table:
      near = nearest(str(value), [k for k in table if k]) or [k for k in table if k]
      raise ValueError(f"{module.__name__}.{name}={value!r}: nearest valid: {', '.join(map(repr, near))}")
  trials = setting(module, "TRIALS")
  if type(trials) is not int or trials < 1:
    raise ValueError(f"{module.__name__}.TRIALS={trials!r} must be a number from 1; nearest valid: 20")
  if len(experiment.seeds) > 1:
    raise ValueError(f"{module.__name__}.SEEDS={experiment.seeds}: a search runs each cell once; nearest "
                     f"valid: ({experiment.seeds[0]},), and then runs() of the best, with several seeds")
  trial = optuna.create_study(sampler=SAMPLER["random"](optuna, 0)).ask()
  make_cell(module.BASE, module.suggest(trial), metric=experiment.metric)


def search(experiment: Experiment, module, folder, jobs: int, board, count) -> Found:
  """Runs the trials that are missing, `jobs` at a time. SIGTERM and Ctrl-C stop it: the runs save first.

  Args:
    board: told what begins and ends (experiments.local.Board).
    count: an Experiment -> what sweep.json says of each cell (experiments.estimate.count).

  Raises:
    ValueError: as check_search does; the folder is in use, or of another search.
  """
  check_search(experiment, module)
  folder.mkdir(parents=True, exist_ok=True)
  with _locked(folder):
    state = _Search(experiment, module, folder, count)
    places, stop = queue.SimpleQueue(), threading.Event()
    for place in split_machine(jobs):
      places.put(place)

    def work():
      place = places.get()
      while not stop.is_set() and (trial := state.next()) is not None:
        state.run(trial, place, stop, board)

    with until_signal(stop), concurrent.futures.ThreadPoolExecutor(jobs) as pool:
      waiting = [pool.submit(work) for _ in range(jobs)]
      while concurrent.futures.wait(waiting, timeout=0.25).not_done:  # The main thread takes the signals.
        if any(future.done() and future.exception() for future in waiting):
          stop.set()
      for future in waiting:
        future.result()
    return state.found()


class _Search:
  """What the threads share."""

  def __init__(self, experiment, module, folder, count):
    self._optuna, self._count = _optuna(), count
    self.module, self.folder, self._lock = module, folder, threading.Lock()
    self.experiment = dataclasses.replace(experiment, cells=[])
    self._study = self._open()
    self._trials = setting(module, "TRIALS")
    self._refused, self._busy = [], {}  # Cell's id -> what is held while it runs.
    trials = self._study.get_trials(deepcopy=False)
    self._under_way = [t for t in trials if not t.state.is_finished()]
    for trial in trials:  # In their order, so that sweep.json says the same.
      if trial.state.is_finished():
        self._propose(self._optuna.trial.Trial(self._study, trial._trial_id))

  def _open(self):
    optuna, direction = self._optuna, "maximize" if self.experiment.higher_is_better else "minimize"
    backend = optuna.storages.journal.JournalFileBackend(str(self.folder / "trials.journal"))
    cfg = make_cell(self.module.BASE, {}).resolved
    every = min(cfg.eval.every or cfg.steps, cfg.steps)
    study = optuna.create_study(
      storage=optuna.storages.JournalStorage(backend), study_name=self.experiment.module, direction=direction,
      pruner=PRUNER[setting(self.module, "PRUNER")](optuna, cfg.steps, every), load_if_exists=True)
    metric = study.user_attrs.get("metric", self.experiment.metric)
    if metric != self.experiment.metric or study.direction.name.lower() != direction:
      there, here = f"{study.direction.name.lower()} {metric}", f"{direction} {self.experiment.metric}"
      raise ValueError(f"{self.folder} holds a search that is to {there}, this one is to {here}: give "
                       "another --out")
    study.set_user_attr("metric", metric)
    return study

  def next(self):
    """The next trial; first those that a killed search left under way. None: there are enough."""
    with self._lock:
      if self._under_way:
        return self._optuna.trial.Trial(self._study, self._under_way.pop(0)._trial_id)
      enough = len(self._study.get_trials(deepcopy=False)) >= self._trials
      return None if enough else self._study.ask()

  def _propose(self, trial) -> Run | None:
    """The run of a trial; the same each time, for what a trial suggested is kept. None: it is no config."""
    try:
      cell = make_cell(self.module.BASE, self.module.suggest(trial),
                       metric=self.experiment.metric)
    except ValueError as e:
      self._refused.append(f"trial {trial.number}: {e}")
      return None
    cells = self.experiment.cells
    if cell.id not in {c.id for c in cells}:
      cells = [*cells, cell]
      self.experiment = dataclasses.replace(self.experiment, cells=cells, baseline=cells[0].id)
    return Run(cell, self.experiment.seeds[0], self.folder / cell.id / f"seed={self.experiment.seeds[0]}")

  def run(self, trial, place, stop, board):
    with self._lock:
      self._study.sampler = SAMPLER[setting(self.module, "SAMPLER")](self._optuna, trial.number)
      run = self._propose(trial)
      if run is None:
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        return
      write_json(self.folder / "sweep.json", describe(self.experiment, self._count(self.experiment)))
      alone = self._busy.setdefault(run.cell.id, threading.Lock())
    with alone:  # Two trials may have the same settings.
      outcome = read_outcome(run.workdir)
      if outcome is None and not stop.is_set():
        board.begin(run)
        outcome = run_one(run, place, stop=stop, prune=self._watch(trial, run))
        board.end(run, outcome)
    if outcome is not None:
      self._tell(trial, run, outcome)

  def _tell(self, trial, run, outcome):
    value, states = last_value(run.workdir, self.experiment.metric), self._optuna.trial.TrialState
    if outcome.status != "done":
      return self._study.tell(trial, state=states[STATES[outcome.status]])
    if value is None:
      self._refused.append(f"trial {trial.number}: {run.workdir} has no {self.experiment.metric}")
      return self._study.tell(trial, state=states.FAIL)
    worst = -math.inf if self.experiment.higher_is_better else math.inf
    self._study.tell(trial, worst if math.isnan(value) else value)

  def _watch(self, trial, run):
    """Tells the pruner what the run's file says, and asks it."""
    if setting(self.module, "PRUNER") is None:
      return None
    path, read = run.workdir / "metrics.jsonl", 0
    told = set(self._study.get_trials(deepcopy=False)[trial.number].intermediate_values)

    def prune():
      nonlocal read
      if not path.exists() or path.stat().st_size <= read:
        return False
      with open(path, "rb") as file:
        file.seek(read)
        text = file.read()
      whole = text[:text.rfind(b"\n") + 1]
      read += len(whole)
      wanted = False
      for line in map(json.loads, whole.splitlines()):
        if self.experiment.metric in line and line["step"] not in told:
          value = NON_FINITE.get(str(line[self.experiment.metric]), line[self.experiment.metric])
          with self._lock:
            trial.report(value, line["step"])
            wanted = trial.should_prune() and line["step"] < run.cell.resolved.steps
      return wanted

    return prune

  def found(self) -> Found:
    runs = find_runs(self.experiment, self.folder)
    ended = sum(trial.state.is_finished() for trial in self._study.get_trials(deepcopy=False))
    return Found(self.experiment, runs, {run.workdir: read_outcome(run.workdir) for run in runs},
                 self._refused, max(self._trials - ended, 0))


def describe_best(found: Found) -> str:
  """"best of 20: lr=0.003: eval/val/loss 2.1234 (median 2.9)"."""
  metric, done = found.experiment.metric, []
  for run in found.runs:
    outcome, value = found.outcomes[run.workdir], last_value(run.workdir, metric)
    if outcome is not None and outcome.status == "done" and value is not None and not math.isnan(value):
      done.append((value, run.cell.name))
  if not done:
    return "no run is done"
  best, name = (max if found.experiment.higher_is_better else min)(done)
  median = statistics.median(value for value, _ in done)
  return f"best of {len(done)} that are done: {name}: {metric} {best:.6g} (median {median:.6g})"


@contextlib.contextmanager
def _locked(folder):
  with open(folder / "search.lock", "a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f"{folder} is in use by another search") from None
    yield


def _optuna():
  try:
    import optuna
  except ImportError:
    raise ValueError('a search needs optuna: pip install -e ".[sweep]"') from None
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  return optuna

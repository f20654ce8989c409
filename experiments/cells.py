"""What an experiment is: a module that asks a question, and the runs that answer it.

experiments/NAME.py has a docstring, the question, and
  BASE = "configs/tiny.py"     the config that every cell starts from
  def runs():                  yields each cell: {"model.qk_norm": "rmsnorm"}, or ("a name", {...})
and, if the defaults do not do:
  METRIC = "eval/val/loss"     a key of metrics.jsonl; its last value is what is compared
  HIGHER_IS_BETTER = False
  SEEDS = (0,)                 each cell is run with each: cells are compared over the same seeds
  BASELINE = "a name"          the cell that the others are compared with; the first
  BUDGET = None                chip-hours that the sweep may cost
A key "config" in a cell takes the place of BASE. In place of runs(), suggest(trial) makes a search of it
(experiments.search).
"""
import ast
import dataclasses
import hashlib
import importlib
import inspect
import json
import pathlib
import re
import traceback
import typing

from data.flags import ROOT, WORDS, as_json, nearest, resolve
from train.config import TrainConfig
from train.main import check_run

SETTINGS = {"BASE": None, "METRIC": "eval/val/loss", "HIGHER_IS_BETTER": False, "SEEDS": (0,),
            "BASELINE": None, "BUDGET": None, "TRIALS": 20, "SAMPLER": "tpe", "PRUNER": None}
METRICS = (  # The usual.
  "eval/val/loss", "eval/val/bpb", "loss", "grad_norm", "tokens_per_s", "step_ms", "mfu")
NAME_LENGTH = 80  # Of a folder, before its hash.


class Cell(typing.NamedTuple):
  name: str
  id: str  # The name and a hash of the settings that are not the defaults: a field that is new changes none.
  config: str  # FILE.py[:ARG]
  overrides: dict[str, object]
  resolved: TrainConfig  # Validated.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
  module: str
  question: str
  metric: str
  higher_is_better: bool
  seeds: tuple[int, ...]
  budget: float | None  # Chip-hours.
  baseline: str | None  # A cell's id; None where there is no cell.
  cells: list[Cell]  # Empty where it is a search.


class Run(typing.NamedTuple):
  """A cell with a seed, in a folder of its own."""
  cell: Cell
  seed: int
  workdir: pathlib.Path

  @property
  def command(self) -> list[str]:
    """What follows `python -m train.main`."""
    return [f"--config={self.cell.config}", *(f"--config.{o}" for o in as_flags(self.cell.overrides)),
            f"--config.seed={self.seed}", f"--workdir={self.workdir}"]


def read_experiment(name: str) -> tuple[Experiment, object]:
  """(the experiment of "experiments.x" or "experiments/x.py", its module), every cell checked as train.main
  checks a command line.

  Raises:
    ValueError: no such module, a setting it does not know, a cell that train.main would refuse.
  """
  module = _import(name)
  settings = {key: setting(module, key) for key in SETTINGS}
  _check_settings(module, settings)
  cells = []
  for item in _call(module.runs) if hasattr(module, "runs") else ():
    name, overrides = item if isinstance(item, tuple) and len(item) == 2 else (None, item)
    if not isinstance(overrides, dict) or not isinstance(name, str | None):
      raise ValueError(f"{module.__name__}.runs() yields {item!r}; a cell is a dict of settings, or a name "
                       "and a dict")
    cells.append(make_cell(settings["BASE"], overrides, name, settings["METRIC"]))
  _check_cells(module, cells)
  return Experiment(
    module=module.__name__, question=inspect.cleandoc(module.__doc__), metric=settings["METRIC"],
    higher_is_better=settings["HIGHER_IS_BETTER"], seeds=tuple(settings["SEEDS"]), budget=settings["BUDGET"],
    baseline=_find_baseline(settings["BASELINE"], cells), cells=cells), module


def setting(module, key: str):
  """A key of SETTINGS, as an experiment's module has it."""
  return getattr(module, key, SETTINGS[key])


def make_cell(base: str | None, overrides: dict, name: str | None = None, metric: str = "") -> Cell:
  """
  Raises:
    ValueError: what `python -m train.main` with these settings would say, and of which cell.
  """
  overrides = dict(overrides)
  config = overrides.pop("config", base)
  name = name or label(overrides if overrides or config == base else {"config": config})
  if config is None:
    raise ValueError(f"cell {name!r} has no config: BASE = \"configs/...py\", or a key \"config\"")
  try:
    if "seed" in overrides:
      raise ValueError(f"seed={overrides['seed']} is set by SEEDS; nearest valid: init_seed, of the first "
                       "weights alone")
    resolved, chosen = resolve(config, as_flags(overrides), checks=(_check_once,))
    if metric.startswith("eval/") and not resolved.data.val_fraction:
      raise ValueError(f"METRIC={metric!r} needs documents to evaluate on; nearest valid: "
                       "data.val_fraction=0.1")
  except ValueError as e:
    raise ValueError(f"cell {name!r}: {e}") from None
  clean = re.sub(r"[^\w=,.+-]+", "_", name)[:NAME_LENGTH]
  digest = hashlib.sha256("\n".join(f"{k} = {v!r}" for k, v in sorted(chosen.items())).encode()).hexdigest()
  return Cell(name, f"{clean}-{digest[:6]}", config, overrides, resolved)


def _check_once(cfg, seen={}):  # noqa: B006 (It is the memory.)
  """train.main's look at what only the code knows, once for cells that differ in what it does not read."""
  key = repr((cfg.model, cfg.log, dataclasses.replace(cfg.optim, lr=1.0)))
  if cfg.model.vocab_size is None or key not in seen:
    check_run(cfg)
    seen[key] = True


def find_runs(experiment: Experiment, folder) -> list[Run]:
  """All runs, the first seed of every cell before the second of any."""
  return [Run(cell, seed, pathlib.Path(folder) / cell.id / f"seed={seed}")
          for seed in experiment.seeds for cell in experiment.cells]


def check_unchanged(runs: list[Run]) -> None:
  """What is there was made with the settings that these runs have.

  Raises:
    ValueError: a default or a derived value has changed since.
  """
  from train.checkpoint import ABSENT, changed_settings
  for run in runs:
    path = run.workdir / "config.json"
    if not path.exists():
      continue
    there, here = json.loads(path.read_text())["config"], as_json(run.cell.resolved)
    changed = [f"{name}={new} ({old} there)" for name, old, new in changed_settings(there, here, ["seed"])
               if ABSENT not in (old, new)]
    if changed:
      raise ValueError(f"{run.workdir} was made with other settings than cell {run.cell.name!r} has now: "
                       f"{', '.join(changed[:3])}; give another --out, or remove it")


def label(overrides: dict) -> str:
  """"d_model=64,lr=0.001"; "base" for none."""
  last = [key.rpartition(".")[2] for key in overrides]
  short = lambda key: key if last.count(key.rpartition(".")[2]) > 1 else key.rpartition(".")[2]
  text = lambda v: f"{v:g}" if isinstance(v, float) else pathlib.Path(v).name if "/" in str(v) else str(v)
  return ",".join(f"{short(key)}={text(value)}" for key, value in overrides.items()) or "base"


def as_flags(overrides: dict) -> list[str]:
  """"a.b=v" strings that data.flags reads back as these values."""
  return [f"{key}={_spell(value)}" for key, value in overrides.items()]


def _spell(value):
  if not isinstance(value, str):
    return repr(value)
  try:
    ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return repr(value) if value.lower() in WORDS else value
  return repr(value)


def _import(name):
  name = name.removesuffix(".py").replace("/", ".")
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as e:
    if e.name is None or not (name + ".").startswith(e.name + "."):
      raise ValueError(f"{name} cannot be imported: {e}") from e
  except Exception as e:  # Anything may come out of the user's file: say what and where.
    raise ValueError(f"{name}{_where(e)} raised {type(e).__name__}: {e}") from e
  near = nearest(name, shipped())
  raise ValueError(f"no experiment {name}; " + (f"did you mean {' or '.join(near)}?" if near else
                                                f"found: {', '.join(shipped())}"))


def _call(runs):
  try:
    return list(runs())
  except Exception as e:  # As above.
    raise ValueError(f"{runs.__module__}.runs(){_where(e)} raised {type(e).__name__}: {e}") from e


def _where(error):
  """" (FILE:LINE)" of the last line that was run, or read."""
  if isinstance(error, SyntaxError):
    return f" ({error.filename}:{error.lineno})"
  last = traceback.extract_tb(error.__traceback__)[-1]
  return f" ({last.filename}:{last.lineno})"


def shipped() -> list[str]:
  """The modules of this folder that are experiments."""
  return sorted(f"experiments.{p.stem}" for p in (ROOT / "experiments").glob("*.py")
                if re.search(r"^def (runs|suggest)\(", p.read_text(), re.MULTILINE))


def _check_settings(module, settings):
  where = module.__name__
  if not (module.__doc__ or "").strip():
    raise ValueError(f"{where} has no docstring: it is the question that the experiment asks")
  if hasattr(module, "runs") == hasattr(module, "suggest"):
    raise ValueError(f"{where} must have runs() or suggest(trial), one of them")
  for key in vars(module):
    if key.isupper() and key not in SETTINGS and (near := nearest(key, SETTINGS)):
      raise ValueError(f"{where}.{key} is read by nobody; did you mean {' or '.join(near)}? (A name of your "
                       f"own begins with _: _{key})")
  seeds, budget, metric = settings["SEEDS"], settings["BUDGET"], settings["METRIC"]
  if metric not in METRICS and (near := nearest(str(metric), METRICS)):
    raise ValueError(f"{where}.METRIC={metric!r}: did you mean {' or '.join(map(repr, near))}?")
  whole = isinstance(seeds, tuple | list | range) and all(type(s) is int and s >= 0 for s in seeds)
  if not whole or not seeds or len(set(seeds)) < len(seeds):
    raise ValueError(f"{where}.SEEDS={seeds!r} must be different numbers from 0; nearest valid: (0, 1, 2)")
  if not (budget is None or isinstance(budget, int | float) and budget > 0):
    raise ValueError(f"{where}.BUDGET={budget!r} must be a number of chip-hours above 0; nearest valid: None")


def _check_cells(module, cells):
  if hasattr(module, "runs") and not cells:
    raise ValueError(f"{module.__name__}.runs() yields no cell")
  for what in ("name", "id"):
    seen = {}
    for cell in cells:
      key = cell.id.rpartition("-")[2] if what == "id" else cell.name
      if key in seen:
        both = " and ".join(f"{c.name!r} {as_flags(c.overrides)}" for c in (seen[key], cell))
        raise ValueError(f"cells {both} have the same " + ("settings" if what == "id" else "name"))
      seen[key] = cell


def _find_baseline(name, cells):
  if name is None or not cells:
    return cells[0].id if cells else None
  found = [cell.id for cell in cells if name in (cell.name, cell.id)]
  if not found:
    near = nearest(name, [cell.name for cell in cells]) or [cells[0].name]
    raise ValueError(f"BASELINE={name!r} is no cell; nearest valid: {' or '.join(map(repr, near))}")
  return found[0]


# What a sweep says of itself, and a run of its end.

def describe(experiment: Experiment, figures: dict[str, dict]) -> dict:
  """What sweep.json holds: all that a report needs but the runs' own files.

  Args:
    figures: cell's id -> {"flops", "tokens"} of one run.
  """
  cells = [{"id": c.id, "name": c.name, "config": c.config, "overrides": c.overrides, **figures[c.id]}
           for c in experiment.cells]
  return {"experiment": experiment.module, "question": experiment.question, "metric": experiment.metric,
          "higher_is_better": experiment.higher_is_better, "baseline": experiment.baseline,
          "seeds": list(experiment.seeds), "cells": cells}


class Outcome(typing.NamedTuple):
  status: str  # done | failed | pruned
  exit_code: int
  seconds: float  # From its (last) start to its end.
  error: str | None = None


def read_outcome(workdir) -> Outcome | None:
  """None: it has not ended, or was not begun."""
  path = pathlib.Path(workdir) / "outcome.json"
  try:
    return Outcome(**json.loads(path.read_text()))
  except FileNotFoundError:
    return None
  except (ValueError, TypeError):  # Written all or nothing: not by us.
    raise ValueError(f"{path} is damaged; remove it to run this again") from None

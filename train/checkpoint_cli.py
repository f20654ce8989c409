"""Looking at checkpoints: python -m train.checkpoint ls|show|verify|diff. Needs no accelerator."""
import argparse
import datetime
import json
import math
import pathlib
import sys
import time

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from model.hub.orbax import (
  META,
  CheckpointError,
  find_checkpoints,
  find_damage,
  find_steps,
  is_step,
  read_array,
  read_meta,
  read_tree,
)
from train.checkpoint import diff_configs

EPILOG = """\
PATH is a run's folder, its checkpoints folder, or one step (runs/x/checkpoints/500).

examples:
  python -m train.checkpoint ls runs/x                   what is there, how large, is it intact
  python -m train.checkpoint show runs/x                 the newest step: arrays, settings, metrics
  python -m train.checkpoint verify runs/x               reads every byte and names each bad file
  python -m train.checkpoint diff runs/x runs/y          settings and arrays of two runs
  python -m train.checkpoint diff runs/x/checkpoints/{500,1000}

exit codes: 0 all is well (diff: identical), 1 damage (diff: a difference), 2 no such path
"""


OTHERS = {".saving": "not finished", ".deleting": "half deleted", ".damaged": "no, set aside"}


def main(argv=None):
  args = _parse(argv)
  jax.config.update("jax_platforms", "cpu")  # The run itself may hold the accelerator.
  console = Console(width=None if sys.stdout.isatty() else 160)
  try:
    sys.exit(args.command(console, *args.path))
  except (FileNotFoundError, ValueError) as e:
    sys.stderr.write(f"train.checkpoint: {e}\n")
    sys.exit(2)
  except CheckpointError as e:
    sys.stderr.write(f"train.checkpoint: {e}\n")
    sys.exit(1)


def _parse(argv):
  layout = {"epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
  parser = argparse.ArgumentParser(prog="python -m train.checkpoint", **layout,
                                   description="Look at a run's checkpoints, also while it runs.")
  commands = parser.add_subparsers(metavar="ls|show|verify|diff", required=True)
  for command, paths, about in (
      (ls, 1, "list the steps: age, size, whether every byte is right, metrics"),
      (show, 1, "names, shapes, dtypes, shardings of the newest step; what the run said of itself"),
      (verify, 1, "check every byte of every step against its manifest"),
      (diff, 2, "compare settings and arrays of two steps (the newest of each PATH)")):
    sub = commands.add_parser(command.__name__, help=about, description=about, **layout)
    sub.add_argument("path", nargs=paths, metavar="PATH")
    sub.set_defaults(command=command)
  return parser.parse_args(argv)


def ls(console, path) -> int:
  """One row per step, and what lies beside them: saves in progress, damaged ones set aside."""
  steps = _find(path)
  root = steps[0].parent if steps else find_checkpoints(path)
  best = _find_best(steps)
  table = Table("step", "saved", "size", "intact", "metrics", title=escape(str(root)),
                title_justify="left")
  for step in steps:
    damage, meta = find_damage(step), _read_meta(step)
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in meta.get("metrics", {}).items())
    table.add_row(step.name, _age(meta), _size(step),
                  f"[red]no: {escape(damage[0])}" if damage else "[green]yes",
                  escape(metrics) + (" [green]best" if step == best else ""))
  if not is_step(path):
    for kind, about in OTHERS.items():
      for other in sorted(root.glob("*" + kind)):
        table.add_row(other.name, "", _size(other), "[yellow]" + about, "")
  console.print(table)
  return 0


def show(console, path) -> int:
  """Reads no array."""
  step = _newest(path)
  tree = read_tree(step)
  table = Table("array", "shape", "dtype", "sharding", "values", title=escape(str(step)),
                title_justify="left")
  for name, leaf in tree.items():
    spec = getattr(leaf.sharding, "partition_spec", ())
    table.add_row(escape(name), "x".join(map(str, leaf.shape)) or "scalar", str(leaf.dtype),
                  escape(", ".join(str(axes) for axes in spec)) or "replicated",
                  f"{math.prod(leaf.shape):,}")
  console.print(table)
  for part in dict.fromkeys(name.split("/")[0] for name in tree):
    leaves = [leaf for name, leaf in tree.items() if name.split("/")[0] == part]
    n_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    console.print(f"{part}: {sum(math.prod(leaf.shape) for leaf in leaves):,} values, "
                  f"{n_bytes / 1e6:,.2f} MB")
  meta = read_meta(step)
  meta["time"] = datetime.datetime.fromtimestamp(meta["time"]).isoformat(" ", "seconds")
  meta["config"] = f"{len(diff_configs({}, meta.get('config', {})))} settings, in {step / META}"
  for name, value in meta.items():
    console.print(f"{name}: {value if isinstance(value, str) else json.dumps(value)}",
                  highlight=False, markup=False, soft_wrap=True)
  return 0


def verify(console, path) -> int:
  """OK or the bad files, for each step."""
  bad = 0
  for step in _find(path):
    damage = find_damage(step)
    bad += bool(damage)
    verdict = "[red]DAMAGED" if damage else "[green]OK"
    console.print(f"{escape(str(step))}: {verdict}", highlight=False, soft_wrap=True)
    for line in damage:
      console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
  return 1 if bad else 0


def diff(console, path_a, path_b) -> int:
  """Settings that differ, then arrays that do."""
  a, b = _newest(path_a), _newest(path_b)
  console.print(f"A: {a}\nB: {b}", highlight=False, markup=False, soft_wrap=True)
  changes = diff_configs(read_meta(a).get("config", {}), read_meta(b).get("config", {}))
  if changes:
    table = Table("setting", "A", "B")
    for leaf, old, new in changes:
      table.add_row(*(escape(str(v)) for v in (leaf, old, new)))
    console.print(table)
  else:
    console.print("settings: identical")
  trees = read_tree(a), read_tree(b)
  names = list(dict.fromkeys([*trees[0], *trees[1]]))
  table = Table("array", "max |A - B|", "|A - B| / |A|")
  for name in names:
    if difference := _compare(name, (a, b), trees):
      table.add_row(escape(name), *difference)
  if table.row_count:
    console.print(table)
  console.print(f"arrays: {len(names) - table.row_count} of {len(names)} identical to the bit")
  return 1 if changes or table.row_count else 0


def _compare(name, steps, trees):
  """None if the array has the same bits in both, else two cells. Reads this one array only."""
  kind = lambda leaf: f"{leaf.dtype}{list(leaf.shape)}" if leaf else "absent"
  a, b = (kind(tree.get(name)) for tree in trees)
  if a != b:
    return escape(f"{a} against {b}"), ""
  x, y = (read_array(step, name) for step in steps)
  if x.tobytes() == y.tobytes():
    return None
  with np.errstate(invalid="ignore"):  # A NaN gives NaN, which is the answer.
    x, y = x.astype(np.float64), y.astype(np.float64)
    size, difference = np.linalg.norm(x), np.linalg.norm(x - y)
    return f"{np.abs(x - y).max():.3e}", f"{difference / size:.3e}" if size else "inf"


def _find(path):
  """The step folders that PATH means, oldest first."""
  path = pathlib.Path(path)
  if is_step(path):
    return [path.absolute()]
  root = find_checkpoints(path).absolute()
  return [root / str(step) for step in find_steps(root)]


def _newest(path):
  if not (steps := _find(path)):
    raise FileNotFoundError(f"{path} has no finished checkpoint yet")
  if damage := find_damage(steps[-1]):
    raise CheckpointError(f"{steps[-1]} is damaged: {damage[0]}; name another step")
  return steps[-1]


def _find_best(steps):
  """The step whose metric, as named by the run's own checkpoint.best, is lowest."""
  values = {}
  for step in steps:
    meta = _read_meta(step)
    name = meta.get("config", {}).get("checkpoint", {}).get("best")
    if math.isfinite(value := meta.get("metrics", {}).get(name, math.nan)):
      values[step] = value
  return min(values, key=values.get, default=None)


def _read_meta(step):
  """{} where it is damaged: the column beside it says so."""
  try:
    return read_meta(step)
  except (OSError, ValueError):
    return {}


def _age(meta):
  if "time" not in meta:
    return "?"
  return f"{datetime.timedelta(seconds=round(max(0, time.time() - meta['time'])))} ago"


def _size(folder):
  return f"{sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) / 1e6:,.2f} MB"

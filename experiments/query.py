"""python -m experiments.query ['CONDITION'] [--metric=eval/val/loss] [--runs=runs] [--columns=a,b] [--csv]

A table of all runs under a folder, of sweeps or not: of every folder with a config.json and a metrics.jsonl,
also while it trains. The best is first. The condition is an SQL expression (DuckDB's); it reads nothing but
the table, and writes nothing.
"""
import argparse
import csv
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import sys
import typing

from data.flags import flatten, nearest
from train.metrics import NON_FINITE, read_metrics

EPILOG = """columns:
  every setting of a run under its name (optim.lr, data.sources[0].kind), and under the last part of it where
  no other setting ends so (lr, d_model); and besides these
  run, hash, sha, dirty, data   its folder; the hashes of its config, code and data
  seed, steps, last_step        the last is of the last line of metrics.jsonl
  status                        done, failed, pruned; unfinished: stopped, or still running
  eval/val/loss                 the metric, the last in the file; in a condition between double quotes
examples:
  python -m experiments.query                                               all runs, best first
  python -m experiments.query 'lr<1e-3 and d_model==256'                    shows what differs between them
  python -m experiments.query "optim.name='muon' and not dirty" --columns=run,sha,lr
  python -m experiments.query '"eval/val/loss" < 3 and window is null' --csv > runs.csv
  python -m experiments.query "run like 'sweeps/qk_norm/%' and status='failed'"
"""
PART = r"[A-Za-z_]\w*(?:\[\d+\])?"
TOKEN = re.compile(rf"""'(?:[^']|'')*'|"(?:[^"]|"")*"|{PART}(?:\.{PART})*""")  # Text, or a name.
FEW = ("run", "last_step", "status")  # Shown unless --columns says what.
LEAST_WIDTH = 60


class Table(typing.NamedTuple):
  columns: list[str]  # Those of the folder, the metric, then every setting by its whole name.
  short: dict[str, str]  # The last part of a setting's name -> the setting, where that is unique.
  rows: list[dict]  # One a run.


def read_table(root, metric: str) -> Table:
  """Every run below `root`. Whatever is no run, or not yet one, is left out."""
  root, rows, settings = pathlib.Path(root), [], {}
  for folder in _find_folders(root):
    try:
      record = json.loads((folder / "config.json").read_text())
      leaves = {name: json.dumps(v) if isinstance(v, list) else v
                for name, v in flatten(record["config"]).items()}
      last_step, value = _read_end((folder / "metrics.jsonl").read_bytes(), metric)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
      continue
    git = record.get("git") or {}
    settings |= dict.fromkeys(leaves)
    rows.append({
      **leaves, "run": str(folder.relative_to(root)), metric: value, "last_step": last_step,
      "status": _status(folder, last_step, leaves.get("steps")), "hash": record.get("hash"),
      "data": record.get("data"), "sha": git.get("sha"), "dirty": git.get("dirty")})
  own = ["run", metric, "last_step", "status", "hash", "data", "sha", "dirty"]
  lasts = [name.rpartition(".")[2] for name in settings]
  short = {last: name for last, name in zip(lasts, settings)
           if lasts.count(last) == 1 and last not in own and last not in settings}
  return Table([*own, *settings], short, rows)


def _find_folders(root):
  for folder, below, files in os.walk(root):
    if {"config.json", "metrics.jsonl"} <= set(files):
      below.clear()  # Checkpoints are many files.
      yield pathlib.Path(folder)
    below.sort()


def _read_end(data: bytes, metric):
  """(last step, last value of the metric), None where there is none. A line without its end is not read."""
  last_step, key = None, json.dumps(metric).encode()
  for line in reversed(data[:data.rfind(b"\n") + 1].splitlines()):
    if last_step is None or key in line:
      values = json.loads(line)
      last_step = values["step"] if last_step is None else last_step
      value = NON_FINITE.get(str(values.get(metric)), values.get(metric))
      if isinstance(value, int | float):
        return last_step, float(value)
  return last_step, None


def _status(folder, last_step, steps):
  path = folder / "outcome.json"
  if path.exists():
    return json.loads(path.read_text())["status"]
  return "done" if last_step is not None and steps is not None and last_step >= steps else "unfinished"


def select(table: Table, condition: str | None, metric: str, higher_is_better: bool = False) -> list[dict]:
  """The rows that meet the condition, best first; NaN and rows without the metric are last.

  Raises:
    ValueError: an unknown column (with the nearest), or what is no condition.
  """
  import duckdb
  db = _open(table)
  where = _resolve(db, table, condition) if condition else "true"
  name, order = _quote(metric), "DESC" if higher_is_better else "ASC"
  try:
    found = db.execute(f"SELECT i FROM runs WHERE ({where}\n) ORDER BY {name} IS NULL, isnan({name}), "
                       f"{name} {order}, run").fetchall()
  except duckdb.Error as e:
    raise ValueError(f"condition {condition!r}: {_first_line(e)}") from None
  return [table.rows[i] for i, in found]


def _open(table):
  """A database in memory of the one table, locked: no files, no other databases, no change of that."""
  import duckdb
  import pyarrow as pa
  db = duckdb.connect(":memory:", config={"autoinstall_known_extensions": "false",
                                          "autoload_known_extensions": "false"})
  values = {"i": pa.array(range(len(table.rows)), pa.int64())}
  values |= {name: _column([row.get(name) for row in table.rows]) for name in table.columns}
  short = "".join(f", {_quote(full)} AS {_quote(last)}" for last, full in table.short.items())
  db.register("given", pa.table(values))
  db.execute(f"CREATE TABLE runs AS SELECT *{short} FROM given")
  db.unregister("given")
  db.execute("SET enable_external_access=false")
  db.execute("SET python_enable_replacements=false")
  db.execute("SET lock_configuration=true")
  return db


def _column(values):
  import pyarrow as pa
  kinds = {type(v) for v in values if v is not None}
  for kind, arrow in (({bool}, pa.bool_()), ({int}, pa.int64()), ({int, float}, pa.float64())):
    if kinds and kinds <= kind:
      return pa.array([v if v is None or arrow != pa.float64() else float(v) for v in values], arrow)
  return pa.array([v if v is None or isinstance(v, str) else json.dumps(v) for v in values], pa.string())


def _resolve(db, table, condition) -> str:
  """The condition with its columns quoted, once it is sure to be an expression over known columns."""
  known = {name.lower(): name for name in (*table.columns, *table.short)}

  def quote(found):
    name = known.get(found[0].strip('"').lower())
    if name is None or condition[found.end():].lstrip().startswith("("):
      return found[0]
    full = table.short.get(name, name)  # A column without values has no type.
    return "NULL" if all(row.get(full) is None for row in table.rows) else _quote(name)

  text = TOKEN.sub(quote, condition)
  plain, parsed = (_parse(db, where) for where in ("true", text))
  if parsed.get("error"):
    raise ValueError(f"condition {condition!r}: {parsed['error_message']}")
  alone = [{**s["node"], "where_clause": None} for s in parsed["statements"]]
  nodes = list(_walk(parsed))
  if alone != [{**plain["statements"][0]["node"], "where_clause": None}] or any(
      node.get("class") == "SUBQUERY" for node in nodes):
    raise ValueError(f"condition {condition!r}: must be one expression over a run's columns, like lr<1e-3")
  for node in nodes:
    name = ".".join(node["column_names"]) if node.get("class") == "COLUMN_REF" else "run"
    if name.lower() not in known:
      raise ValueError(_unknown(name, known.values()))
  return text


def _parse(db, where):
  query = f"SELECT * FROM runs WHERE ({where}\n)"
  return json.loads(db.execute("SELECT json_serialize_sql(?)", [query]).fetchone()[0])


def _walk(tree):
  if isinstance(tree, dict):
    yield tree
  for below in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
    yield from _walk(below)


def _unknown(name, known):
  near = [k for k in known if k.endswith("." + name)] or nearest(name, known)
  said = f"did you mean {' or '.join(near)}?" if near else "--help says which there are"
  return f"unknown column {name}; {said}"


def _quote(name):
  return '"' + name.replace('"', '""') + '"'


def _first_line(error):
  return str(error).splitlines()[0]


# The table.

def choose_columns(table: Table, rows: list[dict], condition: str | None, metric: str) -> list[str]:
  """The few, what the condition names, and the settings that differ between these rows."""
  words = {w.strip('"').lower() for w in TOKEN.findall(condition or "") if not w.startswith("'")}
  names = {full: last for last, full in table.short.items()}
  asked = [n for n in table.columns if {n.lower(), names.get(n, n).lower()} & words]
  few = [FEW[0], metric, *FEW[1:]]
  differ = [n for n in table.columns if n not in few and n != "hash"
            and len({json.dumps(row.get(n)) for row in rows}) > 1]
  return list(dict.fromkeys(names.get(n, n) for n in (*few, *asked, *differ)))


def describe(table: Table, rows: list[dict], columns: list[str], width: float) -> str:
  """As many of the columns as are within `width` characters; those that are not are named below."""
  shown = {c: [_text(row.get(table.short.get(c, c))) for row in rows] for c in columns}
  widths = [max(map(len, (c, *texts))) for c, texts in shown.items()]
  ends = list(itertools.accumulate(w + 2 for w in widths))
  n = max(1, sum(end - 2 <= width for end in ends))
  lines = ["  ".join(c.ljust(w) for c, w in zip(columns[:n], widths)).rstrip()]
  for row in zip(*list(shown.values())[:n]):
    lines.append("  ".join(text.ljust(w) for text, w in zip(row, widths)).rstrip())
  lines.append(f"{len(rows)} of {len(table.rows)} runs")
  if columns[n:]:
    lines[-1] += f"; they differ in these too (--columns, --csv): {', '.join(columns[n:])}"
  return "\n".join(lines)


def _text(value):
  if value is None or isinstance(value, float):
    return "" if value is None else f"{value:.6g}"
  if re.fullmatch(r"(sha256:)?[0-9a-f]{40,64}", str(value)):
    return value.removeprefix("sha256:")[:10]
  return str(value)


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog="experiments.query", description=__doc__, epilog=EPILOG,
                                   allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("condition", nargs="?", help="which runs; all unless given")
  parser.add_argument("--metric", default="eval/val/loss", help="of metrics.jsonl; default: %(default)s")
  parser.add_argument("--higher_is_better", action="store_true", help="more of the metric is better")
  parser.add_argument("--runs", default="runs", help="the folder; default: %(default)s")
  parser.add_argument("--columns", help="which to show, with commas between")
  parser.add_argument("--csv", action="store_true", help="comma-separated, to the last digit")
  args = parser.parse_args(argv)
  try:
    table = _read(args)
    rows = select(table, args.condition, args.metric, args.higher_is_better)
    columns = choose_columns(table, rows, args.condition, args.metric)
    if args.columns:
      columns = args.columns.split(",")
    known = [*table.columns, *table.short]
    if wrong := [c for c in columns if c not in known]:
      raise ValueError("--columns: " + _unknown(wrong[0], known))
  except ImportError as e:
    print(f'experiments.query: error: needs {e.name}: pip install -e ".[sweep]"', file=sys.stderr)
    return 2
  except ValueError as e:
    print(f"experiments.query: error: {e}", file=sys.stderr)
    return 2
  if args.csv:
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(columns)
    out.writerows([row.get(table.short.get(c, c)) for c in columns] for row in rows)
  else:
    width = max(LEAST_WIDTH, shutil.get_terminal_size((120, 24)).columns)
    print(describe(table, rows, columns, math.inf if args.columns else width))
  return 0


def _read(args) -> Table:
  if not pathlib.Path(args.runs).is_dir():
    raise ValueError(f"--runs={args.runs}: no such folder")
  table = read_table(args.runs, args.metric)
  if not table.rows:
    raise ValueError(f"--runs={args.runs}: no run in it: no folder with config.json and metrics.jsonl")
  if all(row[args.metric] is None for row in table.rows):
    files = [pathlib.Path(args.runs) / row["run"] / "metrics.jsonl" for row in table.rows]
    metrics = {key for file in files for line in read_metrics(file) for key in line}
    near = nearest(args.metric, metrics)
    raise ValueError(f"--metric={args.metric}: no run has it yet; " + (
      f"did you mean {' or '.join(near)}?" if near else f"they have {', '.join(sorted(metrics))}"))
  return table


if __name__ == "__main__":
  sys.exit(main())

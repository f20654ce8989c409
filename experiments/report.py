"""Is the difference real? A sweep's verdicts, on the terminal and as a page, from its raw files alone.

Each cell is compared with the baseline over the seeds that both have run: the difference of the metric's
last value, its 95 % interval, and better, worse or within noise, at 5 % over all cells together (Holm). How
the noise is judged: python -m pydoc experiments.verdicts.
"""
import argparse
import collections
import dataclasses
import json
import math
import pathlib
import re
import statistics
import sys

from data.flags import flatten, nearest
from experiments.verdicts import Comparison, Judgement, judge
from train.metrics import NON_FINITE

EPILOG = """examples:
  python -m experiments.report experiments.qk_norm                         runs/sweeps/qk_norm/report.html
  python -m experiments.report runs/sweeps/qk_norm --baseline='lr=0.001'   against another cell
  python -m experiments.report experiments.qk_norm --metric=eval/val/bpb

Two seeds are needed for a verdict, three or more are better (SEEDS in the experiment). Exit codes: 0 a
report, 2 a mistake."""
MOST_LINES = 1000  # Of a metrics.jsonl: a curve does not need more.
STYLE = {  # Of what a cell can be, the most telling first.
  "better": "bold green", "worse": "bold red", "diverged": "bold red", "within noise": "dim", "failed": "red",
  "pruned": "dim", "unfinished": "yellow", "no verdict": "yellow", "baseline": "bold",
}


@dataclasses.dataclass(slots=True)
class Ran:
  """A run of a cell: one seed, one folder.

  Attributes:
    status: done, failed, diverged (losses that are no numbers), pruned, unfinished, missing.
    value: the metric's last value where it is done; not a number otherwise.
    curves: the training loss, and the metric where it is another: (steps, values), as they were logged.
    record: config.json; {} where there is none.
  """
  seed: int
  folder: pathlib.Path
  status: str = "missing"
  value: float = math.nan
  error: str | None = None
  seconds: float | None = None
  curves: dict[str, tuple[list, list]] = dataclasses.field(default_factory=dict)
  record: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class Row:
  """A cell: what sweep.json says of it, its runs in the order of the seeds, and its verdict.

  Attributes:
    kind: a key of STYLE.
    said: the verdict in words, with what is missing.
    settings: those of the config that differ from the baseline's.
  """
  id: str
  name: str
  overrides: dict
  flops: float | None
  tokens: float | None
  runs: list[Ran]
  comparison: Comparison = dataclasses.field(default_factory=Comparison)
  kind: str = "no verdict"
  said: str = ""
  settings: dict = dataclasses.field(default_factory=dict)

  @property
  def n_done(self) -> int:
    return sum(run.status == "done" for run in self.runs)

  @property
  def seconds(self) -> float | None:
    """Of a run, the mean over those that are done."""
    times = [run.seconds for run in self.runs if run.status == "done" and run.seconds is not None]
    return sum(times) / len(times) if times else None


@dataclasses.dataclass(slots=True)
class Report:
  folder: pathlib.Path
  experiment: str
  question: str
  metric: str
  higher_is_better: bool
  seeds: list[int]
  baseline: int  # Its place in rows.
  rows: list[Row]
  judgement: Judgement
  warnings: list[str]  # Of the seeds and the noise,
  mixtures: list[str]  # and of runs that were made with different code, versions or data.

  @property
  def headline(self) -> tuple[str, str]:
    """(the first sentence of the question, what follows)"""
    first, _, rest = self.question.strip().partition("\n\n")
    first = " ".join(first.split())
    sentence = re.match(r".+?[.?!](?=\s|$)|.*", first).group()
    after = first[len(sentence):].strip()
    return sentence, "\n\n".join(part for part in (after, rest) if part)

  @property
  def count(self) -> collections.Counter:
    return collections.Counter(row.kind for row in self.rows)

  @property
  def decimals(self) -> int:
    """Of the metric: two digits of the usual interval."""
    halves = [row.comparison.high - row.comparison.difference for row in self.rows
              if row.comparison.high is not None and not row.comparison.same]
    scale = statistics.median(halves) if halves else max((abs(v) for v in self.values), default=0) / 1000
    return min(max(1 - math.floor(math.log10(scale)), 0), 8) if scale > 0 else 4

  @property
  def values(self) -> list[float]:
    return [run.value for row in self.rows for run in row.runs if math.isfinite(run.value)]


def read_sweep(folder, *, baseline: str | None = None, metric: str | None = None,
               higher_is_better: bool | None = None) -> Report:
  """
  Args:
    folder: with sweep.json.
    baseline: a cell's name or id; the sweep's own unless given. So for metric and higher_is_better.

  Raises:
    ValueError: no sweep, no such cell, a metric that no run has, a damaged file.
  """
  folder = pathlib.Path(folder)
  if not (folder / "sweep.json").is_file():
    raise ValueError(f"{folder} is not a sweep: it has no sweep.json (python -m experiments.sweep makes one)")
  sweep = _read_json(folder / "sweep.json")
  if not sweep["cells"]:
    raise ValueError(f"{folder}/sweep.json has no cell yet")
  metric = metric or sweep["metric"]
  higher = sweep["higher_is_better"] if higher_is_better is None else higher_is_better
  known = set()
  rows = []
  for cell in sweep["cells"]:
    folders = {seed: folder / cell["id"] / f"seed={seed}" for seed in sweep["seeds"]}
    runs = [_read_run(path, seed, metric, known) for seed, path in folders.items()]
    rows.append(Row(cell["id"], _printable(cell["name"]), cell["overrides"], cell.get("flops"),
                    cell.get("tokens"), runs))
  if known and metric not in known:
    near = ", ".join(nearest(metric, known) or sorted(known)[:6])
    raise ValueError(f"metric {metric!r} is in no metrics.jsonl of {folder}; nearest valid: {near}")
  i = _find_baseline(rows, baseline or sweep["baseline"])
  judgement = judge([[run.value for run in row.runs] for row in rows], i, higher_is_better=higher)
  for row, comparison in zip(rows, judgement.comparisons):
    row.comparison = comparison
    row.kind, row.said = _describe(row, judgement, row is rows[i])
  _compare_settings(rows, i)
  warnings = ([judgement.reason] if judgement.reason else []) + judgement.warnings
  return Report(folder, sweep["experiment"], sweep["question"], metric, higher, sweep["seeds"], i, rows,
                judgement, warnings, _find_mixtures(rows))


def _read_run(folder, seed, metric, known):
  """`known` gathers the keys of metrics.jsonl."""
  run = Ran(seed, folder)
  if not folder.is_dir():
    return run
  run.status = "unfinished"
  outcome = _read_json(folder / "outcome.json") if (folder / "outcome.json").exists() else None
  lines = _read_lines(folder / "metrics.jsonl", metric) if (folder / "metrics.jsonl").exists() else []
  run.record = _read_json(folder / "config.json") if (folder / "config.json").exists() else {}
  known.update(*lines)
  for key in dict.fromkeys(("loss", metric)):
    pairs = [(line["step"], float(line[key])) for line in lines if isinstance(line.get(key), int | float)]
    if pairs:
      run.curves[key] = tuple(map(list, zip(*pairs)))
  if outcome is None:
    return run
  run.status, run.seconds = outcome["status"], outcome.get("seconds")
  run.error = _printable(outcome.get("error"))
  last = run.curves[metric][1][-1] if metric in run.curves else math.nan
  steps = [line for line in lines if "loss" in line]
  lost = steps and (steps[-1].get("skipped") or not math.isfinite(steps[-1]["loss"]))
  if run.status == "done" and metric not in run.curves:
    run.status, run.error = "failed", f"it has ended without {metric}"
  elif run.status == "done" and not math.isfinite(last):
    run.status, run.error = "diverged", f"{metric} is {last}"
  elif run.status == "done":
    run.value = last
  elif run.status == "failed" and lost:
    run.status = "diverged"
  return run


def _read_lines(path, metric):
  """The lines of metrics.jsonl; of a long file MOST_LINES that are spread over it, and the metric's last.

  Raises:
    ValueError: a line that is not a JSON object with a step.
  """
  lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
  key, places = json.dumps(metric).encode(), range(len(lines))
  with_metric = [i for i in places if key in lines[i]]
  spread = lambda places: places[::max(len(places) // MOST_LINES, 1)]
  chosen = sorted({*spread(places), *spread(with_metric), *with_metric[-1:], *places[-3:]})
  values = []
  for i in chosen:
    try:
      line = json.loads(lines[i])
      values.append({"step": line["step"],
                     **{k: NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in line.items()}})
    except (ValueError, KeyError, TypeError, AttributeError):
      raise ValueError(f"{path}:{i + 1} is not a line of metrics: {lines[i][:80]!r}") from None
  return values


def _printable(text):
  """A run's words may hold what steers a terminal."""
  return text and "".join(c for c in text if c.isprintable() or c.isspace())


def _read_json(path):
  try:
    return json.loads(path.read_text())
  except ValueError:
    raise ValueError(f"{path} is damaged: it is not JSON") from None


def _find_baseline(rows, name):
  if name is None:
    return 0
  for i, row in enumerate(rows):
    if name in (row.name, row.id):
      return i
  near = nearest(str(name), [row.name for row in rows]) or [row.name for row in rows[:3]]
  raise ValueError(f"--baseline={name} is no cell; nearest valid: {' or '.join(map(repr, near))}")


def _describe(row, judgement, is_baseline):
  """(kind, the words)"""
  found = collections.Counter(run.status for run in row.runs)
  n, verdict = len(row.runs), row.comparison.verdict
  if verdict and (row.comparison.mean is not None or not is_baseline):
    return verdict, (verdict + " (the same numbers)" * row.comparison.same
                     + " (noisy)" * (row.comparison.noisy and not judgement.noise.noisy_A[0]))
  if is_baseline and found["done"] == n:
    return "baseline", "baseline"
  if is_baseline:
    worst = next(s for s in ("diverged", "failed", "pruned", "unfinished", "missing") if found[s])
    return "baseline", f"baseline, {worst} in {found[worst]} of {n} seeds"
  if found["diverged"]:
    return "diverged", f"diverged in {found['diverged']} of {n} seeds"
  if found["failed"]:
    return "failed", f"failed in {found['failed']} of {n} seeds"
  if found["pruned"]:
    return "pruned", "pruned"
  if found["missing"] == n:
    return "unfinished", "not started"
  if found["done"] < n:
    return "unfinished", f"{found['done']} of {n} seeds done"
  return "no verdict", "no verdict"


def _compare_settings(rows, i):
  """Fills in the settings of each cell that differ from the baseline's, as its runs recorded them."""
  leaves = [flatten(next((run.record["config"] for run in row.runs if run.record), {})) for row in rows]
  for row, mine in zip(rows, leaves):
    different = {key: value for key, value in mine.items()
                 if key != "seed" and key in leaves[i] and value != leaves[i][key] or key not in leaves[i]}
    row.settings = different if mine and leaves[i] else row.overrides
  changed = {key for row in rows for key in row.settings}
  rows[i].settings = {key: leaves[i][key] for key in sorted(changed) if key in leaves[i]}


def _find_mixtures(rows):
  """What should be one for all runs and is not."""
  records = [run.record for row in rows for run in row.runs if run.record]
  warnings = []
  states = [r.get("git") or {} for r in records]
  for what, values in (("states of the code", {(s.get("sha"), s.get("diff")) for s in states}),
                       ("sets of versions", {json.dumps(r.get("versions"), sort_keys=True) for r in records}),
                       ("sets of data", {r.get("data") for r in records})):
    if len(values) > 1:
      warnings.append(f"the runs were made with {len(values)} different {what}: see where they are from")
  return warnings


# The terminal.

def print_report(report: Report, console) -> None:
  """Prints the table to a rich Console."""
  from rich.markup import escape
  from rich.table import Table
  d, better = report.decimals, "more" if report.higher_is_better else "less"
  console.print(f"[bold]{escape(report.headline[0])}[/]")
  console.print(escape(f"{report.experiment}: {report.metric}, {better} is better; {len(report.rows)} cells, "
                       f"{len(report.seeds)} seeds; baseline {report.rows[report.baseline].name}\n"))
  table = Table(box=None, pad_edge=False, header_style="bold")
  for title in ("cell", "n", "mean", "difference, 95 % interval", "verdict", "tokens", "FLOP", "time"):
    table.add_column(title, justify="left" if title in ("cell", "verdict") else "right",
                     no_wrap=title != "cell")
  for row in ordered(report):
    verdict, c = f"[{STYLE[row.kind]}]{escape(row.said)}[/]", row.comparison
    table.add_row(escape(row.name), str(row.n_done), metric_text(row, d), difference_text(c, d), verdict,
                  amount(row.tokens), amount(row.flops), duration(row.seconds))
  console.print(table)
  console.print()
  for line in summary(report):
    console.print(escape(line))
  for row in report.rows:
    for run in row.runs:
      if run.status in ("failed", "diverged"):
        text = f"{row.name} seed {run.seed}: {run.error or 'no message'} ({run.folder}/output.log)"
        console.print(f"[red]{run.status}[/]: {escape(text)}")
  for warning in report.warnings + report.mixtures:
    console.print(f"[yellow]note:[/] {escape(warning)}")


def ordered(report: Report) -> list[Row]:
  """The baseline, then the best first, then the cells that cannot be compared."""
  sign = -1 if report.higher_is_better else 1
  key = lambda i: (i != report.baseline, (c := report.rows[i].comparison).difference is None,
                   sign * (c.difference or 0), i)
  return [report.rows[i] for i in sorted(range(len(report.rows)), key=key)]


def summary(report: Report) -> list[str]:
  """What was found, and how small a difference could have been."""
  d, judged, count = report.decimals, report.judgement, report.count
  kinds = [f"{count[kind]} {kind}" for kind in STYLE if count[kind] and kind != "baseline"]
  lines = [", ".join(kinds) or "there is only the baseline"]
  if judged.band is not None:
    lines.append(f"noise band: a difference within ±{judged.band:.{d}f} is noise here; a true one of "
                 f"{judged.found:.{d}f} is found four times in five")
  return lines


def metric_text(row: Row, d: int) -> str:
  """In brackets: the mean of runs that are not compared."""
  c, values = row.comparison, [run.value for run in row.runs if run.status == "done"]
  if c.mean is None:
    return f"({sum(values) / len(values):.{d}f})" if values else ""
  return f"{c.mean:.{d}f}" + (f" ± {c.half:.{d}f}" if c.half is not None else "")


def difference_text(c: Comparison, d: int) -> str:
  if c.difference is None:
    return ""
  return f"{c.difference:+.{d}f}" + (f"  {c.low:+.{d}f} to {c.high:+.{d}f}" if c.low is not None else "")


def plural(n: int, noun: str) -> str:
  return f"{n} {noun}" + "s" * (n != 1)


def amount(number: float | None) -> str:
  """20480 -> "20.5k"."""
  if number is None:
    return ""
  for unit in ("", "k", "M", "G", "T", "P"):
    if number < 999.5:
      return f"{number:.3g}{unit}"
    number /= 1000
  return f"{number * 1e18:.2e}"


def duration(seconds: float | None) -> str:
  if seconds is None:
    return ""
  for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
    if seconds >= 2 * size:
      return f"{seconds / size:.1f} {unit}"
  return f"{seconds:.1f} s"


# The command.

def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__, epilog=EPILOG,
                                   allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("sweep", help="experiments.NAME, or the folder of a sweep")
  parser.add_argument("--baseline", metavar="CELL", help="a name or an id; default: what the sweep says")
  parser.add_argument("--metric", metavar="KEY", help="of metrics.jsonl; default: what the sweep says")
  parser.add_argument("--higher_is_better", action="store_true", default=None, help="of --metric")
  parser.add_argument("--out", type=pathlib.Path, metavar="FILE.html", help="default: DIR/report.html")
  args = parser.parse_args(argv)
  folder = pathlib.Path(args.sweep)
  if not folder.is_dir() and args.sweep.startswith(("experiments.", "experiments/")):
    folder = pathlib.Path("runs/sweeps") / args.sweep.removesuffix(".py").replace("/", ".").rpartition(".")[2]
  out = args.out or folder / "report.html"
  try:
    report = read_sweep(folder, baseline=args.baseline, metric=args.metric,
                        higher_is_better=args.higher_is_better)
    if not out.parent.is_dir():
      raise ValueError(f"--out={out}: there is no folder {out.parent}")
  except ValueError as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  from rich.console import Console

  from data.files import replacing
  from experiments.page import build_page
  console = Console(highlight=False, soft_wrap=not sys.stdout.isatty(),
                    width=None if sys.stdout.isatty() else 160)
  print_report(report, console)
  with replacing(out) as part:
    part.write_text(build_page(report, at=out.parent))
  console.print(f"\n{out}", markup=False)
  return 0


if __name__ == "__main__":
  sys.exit(main())

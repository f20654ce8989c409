"""How does the loss fall with parameters and tokens, and is a larger model than those where the law says?

  python -m experiments.sweep experiments.scaling              the grid: minutes on a GPU, hours on a CPU
  python -m experiments.scaling [--out=runs/sweeps/scaling]    the law: a table, fit.json, scaling.png
  python -m experiments.plan --budget=1e14 --fit=runs/sweeps/scaling/fit.json

Sizes are by the dial of configs/dense.py; each budget C = 6 N D is spent by several. No text is read twice.
N counts the parameters that multiply a token, the head with them, not the embedding that is looked up: 6 N
is then what a token costs, which matters at these sizes. Each length has a schedule of its own, down to 0,
and all have the same batch.

The second command fits on all sizes but the largest, which is what it predicts. On an H100 (16 runs, 3
minutes): 1.737 predicted for s7, 1.746 measured, 0.5 % off; the 15 runs fitted lie 1.3 % from their law
(rms). It does not reach far: s8, run after that, is 1.8 % off at 7.7M tokens and 2.4 % at 12.8M. Three
designs before this one missed: on Python's library alone, with runs of a few hundred steps or of less than
four tokens a parameter, no law of this form fits better than 2 % (experiments/LOG.md).
"""
import argparse
import contextlib
import io
import json
import math
import operator
import pathlib
import sys
import typing

import numpy as np

from data.flags import from_json, read_config
from experiments.cells import read_outcome
from experiments.law import LEVEL, Fit, fit_law, isoflop, write_fit
from experiments.plan import short
from train.config import TrainConfig
from train.metrics import read_metrics
from train.plot import STYLE
from train.roofline import matrix_parameters

BASE = "configs/dense.py:s3"
ROWS = 16  # A step, of every cell: with more of them for larger budgets, the law fits to 10 % only.
# What Assay itself needs, beside Python's library: 30M tokens, of which a run reads 1.5M to 12M.
PACKAGES = ("jax", "scipy", "matplotlib", "fontTools", "numpy", "orbax", "flax", "optax")
MORE_TEXT = (*(f"{{site}}/{name}/**/*.py" for name in PACKAGES), "!{site}/**/test*/**",
             "!{site}/**/*_test.py")
# The exponent of configs/dense.py. Of s3 on 0.3M tokens Muon makes 3.209 at a rate of 0.01, 3.367 at 0.03.
RATE = lambda flops: float(f"{0.26 * flops**-0.125:.3g}")
# FLOP -> the dials that spend it. s1 is left out: a single layer cannot look back at what followed before.
GRID = {4e11: (2,), 8e11: (2,), 1.6e12: (2, 3), 3.2e12: (3, 4), 6.4e12: (3, 4, 5), 1.28e13: (4, 5, 6),
        2.56e13: (5, 6), 5.12e13: (6, 7)}


def runs():
  for flops, dials in reversed(GRID.items()):  # The longest first: none is left alone at the end.
    for dial in reversed(dials):
      yield f"s{dial},C={flops:.1e}", cell(f"configs/dense.py:s{dial}", flops)


def cell(config: str, flops: float) -> dict:
  """Overrides by which the model of `config` spends this budget."""
  with contextlib.redirect_stderr(io.StringIO()):  # The dial's rules.
    c = read_config(config)
  c.model.vocab_size = c.data.tokenizer.vocab_size
  steps = round(flops / 6 / matrix_parameters(c.model.validate()) / ROWS / c.seq_len)
  return {"config": config, "steps": steps, "batch_size": ROWS, "optim.warmup_steps": steps // 10,
          "optim.name": "muon", "optim.lr": RATE(flops), "optim.final_lr_fraction": 0.0, "eval.rows": 512,
          "data.sources[0].path": ",".join((c.data.sources[0].path, *MORE_TEXT)),
          "data.sources[0].max_epochs": 1.0}


# What came of it.

class Point(typing.NamedTuple):
  """A run."""
  name: str
  n: int  # Parameters that multiply.
  d: int  # Tokens trained on.
  loss: float
  total: int  # Parameters, the embedding too.

  @property
  def flops(self) -> float:
    return 6 * self.n * self.d


def read_points(folder) -> tuple[list[Point], list[str]]:
  """(the runs of a sweep that are done, largest last; the others, and why).

  Raises:
    ValueError: no sweep, a metric that is no loss in nats a token, a damaged file.
  """
  folder = pathlib.Path(folder)
  try:
    sweep = json.loads((folder / "sweep.json").read_text())
  except FileNotFoundError:
    raise ValueError(f"--out={folder} is no sweep: it has no sweep.json; python -m experiments.sweep "
                     "experiments.scaling makes one") from None
  if not sweep["metric"].endswith("/loss"):
    raise ValueError(f"{folder} is about {sweep['metric']}; a law is fitted to a loss, such as eval/val/loss")
  points, missing = [], []
  for cell in sweep["cells"]:
    for seed in sweep["seeds"]:
      workdir = folder / cell["id"] / f"seed={seed}"
      outcome = read_outcome(workdir)
      if outcome is None or outcome.status != "done":
        missing.append(f"{cell['name']} seed {seed}: {outcome.status if outcome else 'not finished'}")
      else:
        points.append(_read_point(cell["name"], workdir, sweep["metric"]))
  return sorted(points, key=lambda p: (p.n, p.d)), missing


def _read_point(name, workdir, metric):
  cfg = from_json(TrainConfig, json.loads((workdir / "config.json").read_text())["config"])
  lines = read_metrics(workdir / "metrics.jsonl")
  last = lambda key: next(line[key] for line in reversed(lines) if key in line)
  n = matrix_parameters(cfg.model)
  looked_up = cfg.model.padded_vocab_size * cfg.model.d_model
  return Point(name, n, last("tokens"), last(metric), n + (looked_up if cfg.model.head != "tied" else 0))


def split(points: list[Point]) -> tuple[list[Point], list[Point]]:
  """(those to fit, those of the largest size)."""
  largest = max(p.n for p in points)
  return [p for p in points if p.n < largest], [p for p in points if p.n == largest]


def fit_points(points: list[Point], source: str = "") -> Fit:
  """Raises ValueError: too few runs, sizes or numbers of tokens."""
  return fit_law([(p.n, p.d, p.loss) for p in points], source=source)


def describe(fit: Fit, fitted: list[Point], held: list[Point]) -> str:
  wide = max(len(p.name) for p in (*fitted, *held))
  lines = [f"{'':{wide}}{'N':>9}{'all':>9}{'D':>9}{'D/N':>8}{'FLOP':>10}{'loss':>9}{'by the law':>12}"
           f"{'error':>9}", *(_line(wide, p, float(fit.law.loss(p.n, p.d))) for p in fitted)]
  lines += ["", f"held out, {held[0].n / max(p.n for p in fitted):.3g} times the largest size fitted and "
            f"{max(p.flops for p in held) / max(p.flops for p in fitted):.3g} times the largest budget:"]
  for p in held:
    loss, low, high = fit.predict(p.n, p.d)
    lines.append(f"{_line(wide, p, loss)}   {LEVEL:.0%} interval {low:.4f} to {high:.4f}")
  lines += ["", f"L = E + A / N^alpha + B / D^beta, of {len(fitted)} runs of {len({p.n for p in fitted})} "
            f"sizes, which lie {np.sqrt((fit.residuals**2).mean()):.2%} from it (rms), the furthest "
            f"{np.abs(fit.residuals).max():.2%}; {LEVEL:.0%} intervals of {len(fit.laws)} resamplings:"]
  for name in ("E", "A", "B", "alpha", "beta", "exponent"):
    low, high = fit.interval(operator.attrgetter(name))
    best, low, high = (0.0 if v < 1e-9 else v for v in (getattr(fit.law, name), low, high))
    lines.append(f"  {name:8} {best:10.4g}   {low:.4g} to {high:.4g}")
  lines += ["", "The best size grows as C^exponent, C = 6 N D (attention is not counted).",
            _describe_parabolas(fit),
            "N: parameters that multiply a token; all: with the embedding. Intervals are of which runs",
            "there are, not of the law's form: what is far from the runs is a guess."]
  return "\n".join(lines)


def _line(wide, p, loss):
  return (f"{p.name:{wide}}{short(p.n):>9}{short(p.total):>9}{short(p.d):>9}{p.d / p.n:8.3g}{p.flops:10.2g}"
          f"{p.loss:9.4f}{loss:12.4f}{loss / p.loss - 1:+9.2%}")


def _describe_parabolas(fit):
  found, exponent = isoflop(fit.rows)
  if not found:
    return "No budget has sizes on both sides of its best one."
  lines = []
  for p in found:
    n, d = fit.law.optimum(p.flops)
    lines.append(f"  {p.flops:.2g} FLOP: {short(p.n)}, loss {p.least:.3f}; by the law {short(n)}, "
                 f"{fit.law.loss(n, d):.3f}")
  growth = "" if math.isnan(exponent) else f", exponent {exponent:.3f}"
  return "\n".join([f"By a parabola through each budget's runs{growth}:", *lines])


# The picture.

def plot(fit: Fit, fitted: list[Point], held: list[Point], path):
  """Two views as a PNG: loss by tokens, a curve a size; loss by size, a curve a budget."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  from matplotlib import ticker
  points, shade = [*fitted, *held], matplotlib.colormaps["viridis"]
  with plt.rc_context(STYLE):
    figure, (by_tokens, by_size) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    sizes = sorted({p.n for p in points})
    for i, n in enumerate(sizes):
      name = next(p.name for p in points if p.n == n).partition(",")[0]
      _draw(by_tokens, [p for p in points if p.n == n], lambda p: p.d, lambda d, n=n: fit.law.loss(n, d),
            (min(p.d for p in points) / 1.3, max(p.d for p in points) * 1.3), shade(0.9 * i / len(sizes)),
            f"{name}: {short(n)}" + ", held out" * (n == held[0].n), n == held[0].n)
    budgets = sorted({float(f"{p.flops:.1g}") for p in points})
    for i, flops in enumerate(budgets):
      mine = [p for p in points if float(f"{p.flops:.1g}") == flops]
      spent = float(np.exp(np.mean([math.log(p.flops) for p in mine])))
      sizes = *(p.n for p in mine), fit.law.optimum(spent)[0]
      _draw(by_size, mine, lambda p: p.n, lambda n, c=spent: fit.law.loss(n, c / 6 / n),
            (min(sizes) / 1.8, max(sizes) * 1.8), shade(0.9 * i / len(budgets)),
            f"{spent:.2g} FLOP", mine[0].n == held[0].n)
    best = [fit.law.optimum(c) for c in np.geomspace(budgets[0], budgets[-1], 30)]
    by_size.plot([n for n, _ in best], [fit.law.loss(n, d) for n, d in best], color="#888888", linestyle=":",
                 linewidth=1.6, label="best size")
    for axes, title, unit in ((by_tokens, "Loss by tokens", "tokens"),
                              (by_size, "Loss by size, at equal FLOP", "parameters that multiply")):
      axes.set_title(title)
      axes.set_xscale("log")
      axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      axes.xaxis.set_major_formatter(lambda value, _: short(value))
      axes.xaxis.set_minor_formatter(ticker.NullFormatter())
      axes.set_xlabel(unit)
      axes.set_ylabel("loss (nats per token)")
      axes.margins(y=0.08)
      axes.legend(fontsize=8.5)
    figure.savefig(path)
    plt.close(figure)


def _draw(axes, points, at, curve, span, colour, label, held):
  x = np.geomspace(*span, 200)
  axes.plot(x, curve(x), color=colour, linewidth=1.5, linestyle="--" if held else "-", alpha=0.85)
  axes.plot([at(p) for p in points], [p.loss for p in points], color=colour, linestyle="", label=label,
            marker="*" if held else "o", markersize=13 if held else 6, markeredgecolor="white",
            markeredgewidth=0.7, zorder=3)


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog="experiments.scaling", description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=pathlib.Path, metavar="DIR", default=pathlib.Path("runs/sweeps/scaling"),
                      help="the sweep's folder, of any experiment of sizes and tokens; default: %(default)s")
  args = parser.parse_args(argv)
  try:
    points, missing = read_points(args.out)
    for line in missing:
      print(f"WARNING: left out: {line}", file=sys.stderr)
    if not points:
      raise ValueError(f"--out={args.out}: no run is done yet; python -m experiments.sweep goes on")
    fitted, held = split(points)
    fit = fit_points(fitted, f"{len(fitted)} runs of {args.out.resolve().name}")
  except ValueError as e:
    print(f"experiments.scaling: error: {e}", file=sys.stderr)
    return 2
  print(describe(fit, fitted, held))
  write_fit(args.out / "fit.json", fit)
  plot(fit, fitted, held, args.out / "scaling.png")
  budget = 10 * max(p.flops for p in points)
  print(f"\n{args.out / 'fit.json'}, {args.out / 'scaling.png'}\n\n"
        f"    python -m experiments.plan --budget={budget:.0e} --fit={args.out / 'fit.json'}")
  return 0


if __name__ == "__main__":
  sys.exit(main())

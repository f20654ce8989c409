"""The picture of a run, or of several in one: python -m train.plot RUN [RUN2 ...] [--out=FILE.png]"""
import argparse
import pathlib
import sys

import numpy as np

from train.metrics import read_metrics

COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#9f3a8c", "#b7791f", "#4a5568")
STYLE = {
  "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
  "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.grid": True,
  "axes.labelcolor": "#444444", "xtick.color": "#555555", "ytick.color": "#555555", "grid.color": "#e8e8e8",
  "axes.axisbelow": True, "axes.xmargin": 0.01, "legend.frameon": False, "savefig.dpi": 130,
}


def plot_run(metrics_path, out_path, title: str | None = None):
  """Draws one metrics.jsonl into a PNG; the title is the name of its folder unless given.

  Raises:
    ValueError: no steps, or a line that is not metrics.
  """
  path = pathlib.Path(metrics_path)
  plot_runs({title or path.resolve().parent.name: path}, out_path)


def plot_runs(runs: dict[str, pathlib.Path], out_path):
  """Draws several metrics.jsonl, by name, into one PNG: loss, evaluations, learning rate and norm, speed.

  Raises:
    ValueError: a run without steps, or with a line that is not metrics.
  """
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  with plt.rc_context(STYLE):
    figure, ((loss, evals), (norm, speed)) = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
    rates, seen = norm.twinx(), []
    for i, (name, path) in enumerate(runs.items()):
      lines = read_metrics(path)
      if not any("loss" in line for line in lines):
        raise ValueError(f"{path}: no step has been logged yet")
      alone, colour = len(runs) == 1, COLOURS[i % len(COLOURS)]
      seen.append(_draw_loss(loss, lines, name, colour))
      _draw_evals(evals, lines, name, colour, alone)
      _draw_norm(norm, rates, lines, colour, COLOURS[1] if alone else colour)
      _draw_speed(speed, lines, colour)
    _label(loss, evals, norm, rates, speed)
    _limit(loss, np.concatenate(seen))
    figure.suptitle(" · ".join(runs), fontsize=14, fontweight="bold", x=0.01, ha="left")
    figure.savefig(out_path)
    plt.close(figure)


def _draw_loss(axes, lines, name, colour):
  """-> the smoothed losses that must be seen: the first steps and the spikes would flatten the rest."""
  steps, values = _series(lines, "loss")
  smooth = _smooth(values)
  axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
  axes.plot(steps, smooth, color=colour, linewidth=1.8, label=name)
  for key in sorted({k for line in lines for k in line if k.startswith("eval/") and k.endswith("/loss")}):
    axes.plot(*_series(lines, key), color=colour, linestyle="", marker="o", markersize=4,
              markerfacecolor="white", label=f"{name}, {key.split('/')[1]}")
  return smooth[np.isfinite(smooth)][len(smooth) // 50:]


def _draw_evals(axes, lines, name, colour, alone):
  """Bits per byte where there are any, else the loss; one curve a validation set."""
  names = sorted({k for line in lines for k in line if k.startswith("eval/")})
  unit = "bpb" if any(k.endswith("/bpb") for k in names) else "loss"
  axes.set_ylabel("bits per byte" if unit == "bpb" else "loss (nats per token)")
  for i, key in enumerate(k for k in names if k.endswith("/" + unit)):
    steps, values = _series(lines, key)
    label = key.split("/")[1] if alone else f"{name} {key.split('/')[1]}"
    shade = COLOURS[i % len(COLOURS)] if alone else colour
    axes.plot(steps, values, color=shade, marker="o", markersize=4.5, linewidth=1.4, label=label,
              linestyle=("-", "--", ":", "-.")[0 if alone else i % 4])
    axes.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), textcoords="offset points", xytext=(0, 8),
                  ha="right", color=shade, fontweight="bold")
  if not names:
    axes.text(0.5, 0.5, "no evaluation yet", transform=axes.transAxes, ha="center", color="#999999")


def _draw_norm(axes, rates, lines, colour, rate_colour):
  steps, values = _series(lines, "grad_norm")
  axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
  axes.plot(steps, _smooth(values), color=colour, linewidth=1.6)
  positive = values[np.isfinite(values) & (values > 0)]
  if len(positive) and positive.max() > 20 * np.median(positive):
    axes.set_yscale("log")
  rates.plot(*_series(lines, "lr"), color=rate_colour, linewidth=1.4, linestyle="--")


def _draw_speed(axes, lines, colour):
  steps, values = _series(lines, "tokens_per_s")
  axes.plot(steps, values / 1000, color=colour, alpha=0.25, linewidth=0.8)
  axes.plot(steps, _smooth(values) / 1000, color=colour, linewidth=1.6)


def _label(loss, evals, norm, rates, speed):
  for axes, title, unit in ((loss, "Training loss", "nats per token"), (evals, "Evaluation", None),
                            (norm, "Gradient norm (solid) and learning rate (dashed)", "global norm"),
                            (speed, "Speed", "thousand tokens per second")):
    axes.set_title(title)
    axes.set_xlabel("step")
    if unit:
      axes.set_ylabel(unit)
  evals.margins(x=0.04, y=0.15)
  rates.set_ylabel("learning rate")
  for axes in (rates, speed):
    axes.set_ylim(bottom=0)
  rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
  rates.grid(False)
  rates.spines["right"].set_visible(True)
  for axes in (loss, evals):
    if axes.get_legend_handles_labels()[0]:
      axes.legend()


def _limit(axes, seen):
  if len(seen) > 20:
    room = 0.15 * (seen.max() - seen.min()) + 1e-6
    axes.set_ylim(seen.min() - room, seen.max() + room)


def _series(lines, key):
  """(steps, values) of the lines that have `key`; unknown values (None) are left out."""
  pairs = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
  return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], float)


def _smooth(values):
  """The median of up to a fiftieth of the run around each step, narrower at the ends; NaN stays NaN."""
  half, n = min(max(len(values) // 100, 1), 50), len(values)
  widths = [min(half, i, n - 1 - i) for i in range(n)]
  return np.array([np.nanmedian(values[i - w:i + w + 1]) if np.isfinite(values[i]) else np.nan
                   for i, w in enumerate(widths)])


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog="python -m train.plot", description="Draws runs into a PNG.")
  parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder with metrics.jsonl")
  parser.add_argument("--out", help="the PNG; RUN/plot.png unless given (plot.png here for several runs)")
  args = parser.parse_args(argv)
  folders = [pathlib.Path(run) for run in args.runs]
  out = pathlib.Path(args.out or (folders[0] / "plot.png" if len(folders) == 1 else "plot.png"))
  try:
    for folder in folders:
      if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} is not a run: it has no metrics.jsonl")
    plot_runs({_name(f, folders): f / "metrics.jsonl" for f in folders}, out)
  except ValueError as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  print(out)
  return 0


def _name(folder, folders):
  """The folder's own name, or its path where two runs share it."""
  names = [f.resolve().name for f in folders]
  return folder.resolve().name if names.count(folder.resolve().name) == 1 else str(folder)


if __name__ == "__main__":
  sys.exit(main())

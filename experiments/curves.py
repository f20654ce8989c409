"""Curves of a report as SVG that stretches with the page: a mean over seeds with a band for each cell."""
import html
import math

import numpy as np

from experiments.report import plural

POINTS = 80  # Of a curve; a longer one is averaged over as many stretches of steps.
SLOTS = 6  # Colours and dashes that page.css has for curves; the first is the baseline's.
W, H = 2000, 1000  # Units of a plot.


def choose(rows) -> list[int]:
  """Places of the cells whose curves stand out at first: the baseline, the best, the worst."""
  curved = [i for i, row in enumerate(rows) if any(run.curves for run in row.runs)]
  if len(curved) <= SLOTS:
    return curved
  compared = [i for i in curved[1:] if rows[i].comparison.difference is not None]
  return [curved[0], *compared[:2], *compared[2:][-1:]]


def draw_curves(report, rows, shown) -> str:
  """The section; empty where nothing was logged."""
  keys = [key for key in dict.fromkeys(("loss", report.metric))
          if any(key in run.curves for row in rows for run in row.runs)]
  if not keys:
    return ""
  figures = "\n".join(_figure(key, rows, shown) for key in keys)
  legend = "\n".join(f'<li class="s{slot}" data-i="{i}">{_swatch()}{html.escape(rows[i].name)}</li>'
                     for slot, i in enumerate(shown))
  others = plural(len(rows) - len(shown), "other cell")
  hint = "" if len(shown) == len(rows) else (f" {others} faint: press a cell's name in a table to bring its "
                                             "curve forward.")
  return f"""<section id="curves">
<h2>Curves</h2>
<p class="legend">Mean over seeds; the band is from the least to the largest seed.{hint}</p>
<ul class="keys">
{legend}
</ul>
<div class="figures">
{figures}
</div>
</section>"""


def _swatch():
  return '<svg viewBox="0 0 24 8" aria-hidden="true"><path d="M0 4H24"/></svg>'


def _figure(key, rows, shown):
  curves = _average([[run.curves.get(key) for run in row.runs] for row in rows])
  last = max((x[-1] for x, *_ in curves if len(x)), default=1) or 1
  first = 0.1 * last  # The first steps would flatten the rest.
  first = first if max((x >= first).sum() for x, *_ in curves) > 2 else 0
  late = np.concatenate([mean[x >= first] for x, mean, *_ in curves])
  late = late[np.isfinite(late)]
  if not len(late):
    return ""
  lower, upper = late.min(), np.quantile(late, 0.98)
  room = 0.06 * (upper - lower) or 0.5
  lower, upper = lower - room, upper + room
  height = upper - lower
  to_y = lambda y: H * (upper - np.clip(y, lower - height, upper + height)) / height
  groups = []
  for i, (x, mean, least, most) in enumerate(curves):
    if len(x):
      xs = W * x / last
      band = _path(np.append(xs, xs[::-1]), to_y(np.append(least, most[::-1]))) + "Z"
      slot = f" on s{shown.index(i)}" if i in shown else ""
      dot = _dots(xs, to_y(mean)) if len(x) <= 12 else ""
      groups.append(f'<g class="curve{slot}" data-i="{i}"><title>{html.escape(rows[i].name)}</title>'
                    f'<path class="band" d="{band}"/>'
                    f'<path class="mean" d="{_path(xs, to_y(mean))}{dot}"/></g>')
  y_ticks = "".join(f'<span style="top:{100 * (upper - t) / height:.2f}%">{t:g}</span>'
                    for t in ticks(lower, upper, 6))
  x_ticks = "".join(f'<span style="left:{100 * t / last:.2f}%">{t:g}</span>' for t in ticks(0, last, 5))
  lines = "".join(f"M0 {H * (upper - t) / height:.0f}H{W}" for t in ticks(lower, upper, 6))
  title = "training loss" if key == "loss" else key
  return f"""<figure>
<figcaption>{html.escape(title)}</figcaption>
<div class="axes"><div class="y">{y_ticks}</div>
<svg viewBox="0 0 {W} {H}" preserveAspectRatio="none" role="img"
  aria-label="{html.escape(title)} of {len(rows)} cells by step">
<path class="grid" d="{lines}"/>
{chr(10).join(groups)}
</svg>
<div class="x">{x_ticks}<em>step</em></div></div>
</figure>"""


def _path(xs, ys):
  """An SVG path; a value that is no number makes a gap."""
  words, pen = [], "M"
  for x, y in zip(xs.tolist(), ys.tolist()):
    if math.isfinite(y):
      words.append(f"{pen}{x:.0f} {y:.0f}")
      pen = "L"
    else:
      pen = "M"
  return "".join(words)


def _dots(xs, ys):
  """Round ends of lines of no length: points that keep their shape when the plot is stretched."""
  return "".join(f"M{x:.0f} {y:.0f}h0" for x, y in zip(xs.tolist(), ys.tolist()) if math.isfinite(y))


def _average(cells):
  """[cells][seeds] of (steps, values) or None -> for each cell (steps, mean, least, most) over its seeds."""
  all_steps = sorted({step for runs in cells for run in runs if run for step in run[0]})
  out = []
  if len(all_steps) > POINTS:
    edges = np.linspace(all_steps[0], all_steps[-1], POINTS + 1)[1:-1]
    place, xs = (lambda steps: np.searchsorted(edges, steps)), None
  else:
    xs = np.array(all_steps, float)
    place = lambda steps: np.searchsorted(xs, steps)
  size = POINTS if xs is None else len(xs)
  if xs is None:
    every = np.array(all_steps, float)
    where = place(every)
    with np.errstate(invalid="ignore"):
      xs = np.bincount(where, every, size) / np.bincount(where, minlength=size)
  for runs in cells:
    table = []
    for run in runs:
      if run:
        where = place(np.array(run[0], float))
        with np.errstate(invalid="ignore", divide="ignore"):
          table.append(np.bincount(where, np.array(run[1], float), size) / np.bincount(where, minlength=size))
    if not table:
      out.append((np.zeros(0),) * 4)
      continue
    table = np.array(table)
    seen = np.isfinite(table).any(0) & np.isfinite(xs)
    table = np.where(np.isfinite(table), table, np.nan)[:, seen]
    out.append((xs[seen], np.nanmean(table, 0), np.nanmin(table, 0), np.nanmax(table, 0)))
  return out


def ticks(lower, upper, most):
  """Round numbers between the two."""
  step = 10 ** math.floor(math.log10((upper - lower) / most))
  step *= next(k for k in (1, 2, 5, 10) if (upper - lower) / (k * step) <= most)
  first = math.ceil(lower / step)
  return [float(f"{k * step:.10g}") for k in range(first, math.floor(upper / step) + 1)]

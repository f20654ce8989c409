"""The page of a report: one HTML file that asks the network for nothing.

`build_page(report, times=False)` leaves out all that differs between two sweeps with the same numbers:
seconds, dates, folders, the state of git.
"""
import base64
import collections
import datetime
import hashlib
import html
import math
import os
import pathlib
import textwrap
import urllib.parse

import numpy as np

from experiments.curves import choose, draw_curves, ticks
from experiments.report import STYLE, Report, amount, duration, metric_text, ordered, plural
from experiments.verdicts import LEVEL

HERE = pathlib.Path(__file__).parent
MOST_SETTINGS = 8  # Columns of the table of settings; more are listed instead.
MARK = {"better": "●", "worse": "◆", "diverged": "✕", "failed": "✕", "within noise": "○", "baseline": "■"}


def build_page(report: Report, *, at=None, times: bool = True) -> str:
  """
  Args:
    at: the folder that the page will lie in, for its links; the sweep's unless given.
  """
  at = pathlib.Path(at or report.folder)
  rows = ordered(report)
  shown = choose(rows)
  script, style = ((HERE / name).read_text() for name in ("page.js", "page.css"))
  # No string of a run can become a program: only this very script may run, and nothing may be fetched.
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
  parts = [_header(report), _verdict(report, times), _failures(rows, at), _forest(report, rows),
           draw_curves(report, rows, shown), _figures(report, rows, at, times), _settings(report, rows),
           _origin(report, times)]
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{_e(_title(report))}</title>
<style>
{style}</style>
</head>
<body>
{chr(10).join(part for part in parts if part)}
<script>{script}</script>
</body>
</html>
"""


def _e(text) -> str:
  return html.escape(str(text))


def _name(row):
  """Breaks after a comma rather than in a word."""
  return _e(row.name).replace(",", ",<wbr>")


def _title(report):
  return f"{report.experiment.rpartition('.')[2]}: {report.headline[0]}"


def _header(report):
  first, rest = report.headline
  better = "more" if report.higher_is_better else "less"
  paragraphs = "".join(f'<pre class="lead">{_e(textwrap.dedent(p))}</pre>\n' if _is_code(p) else
                       f'<p class="lead">{_e(p.strip())}</p>\n' for p in rest.split("\n\n") if p.strip())
  return f"""<header>
<p class="kicker">{_e(report.experiment)}</p>
<h1>{_e(first)}</h1>
{paragraphs}<p class="facts">
<span>{plural(len(report.rows), "cell")} &times; {plural(len(report.seeds), "seed")}</span>
<span><b>{_e(report.metric)}</b>, {better} is better</span>
<span>baseline <b>{_e(report.rows[report.baseline].name)}</b></span></p>
</header>"""


def _is_code(paragraph):
  return all(line.startswith((" ", "python ")) for line in paragraph.splitlines())


def _verdict(report, times):
  d, judged, runs = report.decimals, report.judgement, [run for row in report.rows for run in row.runs]
  tiles = [(report.count[kind], kind) for kind in STYLE if kind != "baseline" and report.count[kind]]
  counts = "\n".join(f'<li class="{_css(kind)}"><b>{n}</b> {kind}</li>' for n, kind in tiles)
  flops = [row.flops * row.n_done for row in report.rows if row.flops is not None]
  spent = [run.seconds for run in runs if run.seconds is not None]
  facts = [("runs done", f"{sum(run.status == 'done' for run in runs)} of {len(runs)}")]
  if judged.band is not None:
    facts = [("noise band", f"&plusmn;{judged.band:.{d}f}"), ("found four times in five",
                                                              f"{judged.found:.{d}f}"), *facts]
  facts += [("FLOP", amount(sum(flops)))] if flops else []
  facts += [("time of all runs", duration(sum(spent)))] if times and spent else []
  cells = "\n".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
  notes = "".join(f"<li>{_e(text)}</li>\n" for text in report.warnings + report.mixtures * times)
  said = "" if judged.band is None else (
    f"<p>A difference inside the noise band is what chance makes of {plural(len(judged.seeds), 'seed')}; "
    f"a true one of {judged.found:.{d}f} would be found four times in five.</p>\n")
  return f"""<section aria-label="Verdicts">
<ul class="counts">
{counts}
</ul>
<dl class="tiles">
{cells}
</dl>
{said}{f'<ul class="notes">{chr(10)}{notes}</ul>' if notes else ""}</section>"""


def _css(kind):
  return {"within noise": "noise", "pruned": "noise", "no verdict": "unfinished",
          "diverged": "worse"}.get(kind, kind)


def _chip(row):
  mark = MARK.get(row.kind, "–")
  return f'<span class="chip {_css(row.kind)}"><i aria-hidden="true">{mark}</i>{_e(row.said)}</span>'


def _failures(rows, at):
  items = []
  for row in rows:
    for run in row.runs:
      if run.status in ("failed", "diverged"):
        log = _link(run, at, "output.log", "its output")
        items.append(f"<li><b>{_e(row.name)}</b>, seed {run.seed}, {run.status}: "
                     f"<code>{_e(run.error or 'no message')}</code> {log}</li>")
  if not items:
    return ""
  body = f'<ul class="failures">\n{chr(10).join(items)}\n</ul>'
  if len(items) > 5:
    body = f"<details><summary>{len(items)} runs</summary>\n{body}\n</details>"
  return f'<section>\n<h2>What did not end well</h2>\n{body}\n</section>'


def _link(run, at, file, text):
  """Nothing where there is no such file."""
  if not (run.folder / file).exists():
    return _e(text) if file == "report.md" else ""
  path = pathlib.PurePath(os.path.relpath(run.folder / file, at)).as_posix()
  return f'<a href="{_e(urllib.parse.quote(path))}">{_e(text)}</a>'


# Differences.

def _forest(report, rows):
  compared = [row for row in rows if row.comparison.difference is not None]
  if not compared:
    return ""
  scale, d, band = _scale(report, compared), report.decimals, report.judgement.band
  place = lambda value: f"{100 * min(max(scale(value), 0), 1):.2f}%"
  shade = "" if band is None else (f'<i class="band" style="left:{place(-band)};width:'
                                   f'{100 * (min(scale(band), 1) - max(scale(-band), 0)):.2f}%"></i>')
  zero = f'<i class="zero" style="left:{place(0)}"></i>'
  body = []
  for i, row in enumerate(rows):
    c = row.comparison
    track = f'<div class="track">{shade}{zero}{_interval(row, scale)}</div>' if c.difference is not None or (
      row.kind == "baseline") else ""
    number = f"{c.difference:+.{d}f}" if c.difference is not None else ""
    between = f"{c.low:+.{d}f} to {c.high:+.{d}f}" if c.low is not None else ""
    if row.kind == "baseline" and c.mean is not None:
      number = f"{c.mean:.{d}f}"
    body.append(f"""<tr data-kind="{_css(row.kind)}" data-i="{i}">
<th scope="row"><button type="button" class="name"><span>{_name(row)}</span></button></th>
<td class="plot">{track}</td>
<td class="num" data-v="{'' if c.difference is None else c.difference}">{_minus(number)}</td>
<td class="num wide">{_minus(between)}</td>
<td>{_chip(row)}</td>
</tr>""")
  ticks = "".join(f'<span style="left:{100 * scale(t):.2f}%">{_minus(f"{t:+g}" if t else "0")}</span>'
                  for t in scale.ticks)
  kinds = collections.Counter(_css(row.kind) for row in rows if row.kind != "baseline")
  names = {"noise": "within noise"}
  buttons = "".join(f'<button type="button" data-kind="{kind}" aria-pressed="false">'
                    f"{names.get(kind, kind)} {n}</button>" for kind, n in kinds.items() if len(kinds) > 1)
  noisy = " A noisy cell scatters more than the others and is judged by its own runs alone." * any(
    row.said.endswith("(noisy)") for row in rows)
  better, order = ("right", "descending") if report.higher_is_better else ("left", "ascending")
  return f"""<section id="differences">
<h2>Difference to the baseline</h2>
<p class="legend">{_e(report.metric)}, mean over seeds of cell &minus; baseline; better is to the {better}.
Thick: {1 - LEVEL:.0%} interval of that cell. Thin: {1 - LEVEL:.0%} for all cells at once. Shaded: the noise
band. Verdicts are by Holm's correction at {LEVEL:.0%} over all cells.{noisy}</p>
<div class="controls" hidden>
<label>Find <input type="search" id="find" placeholder="a name" autocomplete="off"></label>
<span class="kinds" role="group" aria-label="Verdicts to show">{buttons}</span>
</div>
<table class="forest{' many' if len(rows) > 40 else ''}" data-fold>
<thead><tr><th scope="col" aria-sort="none"><button type="button" class="sort">cell</button></th>
<th scope="col" class="plot"><div class="axis">{ticks}</div><span class="hidden">interval</span></th>
<th scope="col" class="num" aria-sort="{order}"><button type="button" class="sort">difference</button></th>
<th scope="col" class="num wide">{1 - LEVEL:.0%} interval</th>
<th scope="col" aria-sort="none"><button type="button" class="sort">verdict</button></th></tr></thead>
<tbody>
{chr(10).join(body)}
</tbody>
</table>
</section>"""


class _scale:
  """value -> 0 to 1 across the plot; what lies far out of the others' reach is drawn at the edge."""

  def __init__(self, report, rows):
    differences = np.array([row.comparison.difference for row in rows])
    band = report.judgement.band or 0.0
    reach = max(4 * band, 4 * float(np.quantile(np.abs(differences), 0.8)))
    near = differences[np.abs(differences) <= reach] if reach else differences
    lower, upper = min(near.min(initial=0), 0) - 1.2 * band, max(near.max(initial=0), 0) + 1.2 * band
    room = 0.04 * (upper - lower) or 1.0
    self.lower, self.upper = lower - room, upper + room
    self.ticks = ticks(self.lower, self.upper, 4)

  def __call__(self, value):
    return (value - self.lower) / (self.upper - self.lower)


def _interval(row, scale):
  c, parts, kind = row.comparison, [], _css(row.kind)
  if c.difference is None:
    return f'<b class="mark baseline" style="left:{100 * scale(0):.2f}%">{MARK["baseline"]}</b>'
  for name, low, high in (("all", c.low_all, c.high_all), ("one", c.low, c.high)):
    if low is not None:
      left, right = min(max(scale(low), 0), 1), min(max(scale(high), 0), 1)
      parts.append(f'<i class="{name} {kind}" style="left:{100 * left:.2f}%;'
                   f'width:{100 * (right - left):.2f}%"></i>')
  at = scale(c.difference)
  mark = "◀" if at < 0 else "▶" if at > 1 else MARK.get(row.kind, "○")
  parts.append(f'<b class="mark {kind}" style="left:{100 * min(max(at, 0), 1):.2f}%">{mark}</b>')
  return "".join(parts)


def _minus(text):
  return text.replace("-", "−")


# Tables.

def _figures(report, rows, at, times):
  d, body = report.decimals, []
  p = lambda value: "" if value is None else f"{value:.2g}" if value >= 1e-4 else "<0.0001"
  v = lambda value: "" if value is None else repr(value)
  for i, row in enumerate(rows):
    c = row.comparison
    number = lambda run: f"{run.value:.{d}f}" if math.isfinite(run.value) else run.status
    seeds = " ".join(_link(run, at, "report.md", number(run)) for run in row.runs)
    time = f'<td class="num" data-v="{v(row.seconds)}">{duration(row.seconds)}</td>\n' if times else ""
    body.append(f"""<tr data-kind="{_css(row.kind)}" data-i="{i}">
<th scope="row"><button type="button" class="name"><span>{_name(row)}</span></button></th>
<td class="num" data-v="{v(c.mean)}">{metric_text(row, d)}</td>
<td class="seeds">{seeds}</td>
<td class="num" data-v="{v(c.p)}">{_e(p(c.p))}</td>
<td class="num" data-v="{v(c.p_adjusted)}">{_e(p(c.p_adjusted))}</td>
<td class="num" data-v="{v(row.tokens)}">{amount(row.tokens)}</td>
<td class="num" data-v="{v(row.flops)}">{amount(row.flops)}</td>
{time}</tr>""")
  titles = [("cell", ""), ("mean ± 95 %", "num"), ("seeds " + ", ".join(map(str, report.seeds)), "seeds"),
            ("p", "num"), ("p, Holm", "num"), ("tokens", "num"), ("FLOP", "num"), *[("time", "num")] * times]
  heads = "\n".join(f'<th scope="col" class="{css}">{_e(title)}</th>' if css == "seeds" else
                    f'<th scope="col" class="{css}" aria-sort="none">'
                    f'<button type="button" class="sort">{_e(title)}</button></th>' for title, css in titles)
  return f"""<section id="figures">
<h2>Figures</h2>
<p class="legend">The last {_e(report.metric)} of each run; the interval of the mean is of the cell alone,
the seeds' own effect included, so it is wider than that of the difference. A run's number leads to its report
with samples. Tokens, FLOP{" and time" if times else ""} are of one run.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Figures of each cell">
<table class="grid" data-fold>
<thead><tr>{heads}</tr></thead>
<tbody>
{chr(10).join(body)}
</tbody>
</table>
</div>
</section>"""


def _settings(report, rows):
  """What differs in the config: a table of few settings, a list of many."""
  keys = sorted({key for row in rows for key in row.settings})
  if not keys:
    return ""
  base = report.rows[report.baseline]
  text = lambda value: value if isinstance(value, str) else repr(value)
  if len(keys) <= MOST_SETTINGS:
    heads = "".join(f'<th scope="col">{_e(key)}</th>' for key in keys)
    body = "\n".join(
      f'<tr data-kind="{_css(row.kind)}" data-i="{i}"><th scope="row">{_name(row)}</th>'
      + "".join(f'<td class="changed">{_e(text(row.settings[key]))}</td>'
                if key in row.settings and row is not base else
                f"<td>{_e(text(base.settings.get(key, '')))}</td>" for key in keys)
      + "</tr>" for i, row in enumerate(rows))
  else:
    heads = '<th scope="col">differs from the baseline in</th>'
    body = "\n".join(
      f'<tr data-kind="{_css(row.kind)}" data-i="{i}"><th scope="row">{_name(row)}</th><td>'
      + ("" if row is base else "<br>".join(f"{_e(key)} <b>{_e(text(value))}</b>"
                                             for key, value in sorted(row.settings.items()))) + "</td></tr>"
      for i, row in enumerate(rows))
  return f"""<section id="settings">
<h2>What differs</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Settings that differ">
<table class="grid" data-fold>
<thead><tr><th scope="col">cell</th>{heads}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
</section>"""


def _origin(report, times):
  """Where the numbers are from."""
  records = [run.record for row in report.rows for run in row.runs if run.record]
  facts = collections.defaultdict(collections.Counter)
  for record in records:
    git = record.get("git") or {}
    if times and git.get("sha"):
      changes = f" with changes, git.diff {git['diff'][:12]}" if git.get("diff") else ""
      facts["commit"][git["sha"] + changes] += 1
    if record.get("data"):
      facts["data"][record["data"]] += 1
    versions = sorted((record.get("versions") or {}).items())
    facts["versions"][", ".join(f"{name} {version}" for name, version in versions if version)] += 1
  items = [(name, "<br>".join(f"<code>{_e(value)}</code>" + (f" ({n} runs)" if len(values) > 1 else "")
                              for value, n in sorted(values.items()))) for name, values in facts.items()]
  if times:
    items.append(("folder", f"<code>{_e(report.folder)}</code>"))
    items.append(("page made", f"{datetime.datetime.now():%Y-%m-%d %H:%M}"))
  noise, compared = report.judgement.noise, [row for row in report.rows if row.comparison.p is not None]
  if noise is not None:
    shared = "all cells share one variance" if math.isinf(noise.prior_df) else (
      f"the other cells add {noise.prior_df:.3g} degrees of freedom to a cell's own")
    alone = [row.name for row in report.rows if row.comparison.noisy]
    rest = f" and {len(alone) - 8} more" if len(alone) > 8 else ""
    wild = "" if not alone else (" Judged by their own pairs of runs alone, for they or the baseline scatter "
                                 f"more: {_e(', '.join(alone[:8]))}{rest}.")
    deviation = np.median(noise.variance_A) ** 0.5
    items.append(("noise", f"standard deviation of a run {deviation:.3g}, the seeds' own effect taken out; "
                  f"{noise.df:.3g} degrees of freedom; {shared}.{wild}"))
  rows = "\n".join(f"<div><dt>{_e(name)}</dt><dd>{value}</dd></div>" for name, value in items)
  return f"""<section id="origin">
<h2>Where this is from</h2>
<dl class="origin">
{rows}
</dl>
<p class="legend">Rebuilt from the raw files by <code>python -m experiments.report</code>. Runs of one seed
read the same rows, so cells are compared seed by seed; the noise left is pooled over cells (moderated t,
Smyth 2004); {plural(len(compared), "comparison")} corrected by Holm's method.</p>
</section>"""

"""A sweep's report: its numbers are those of the verdicts, on the terminal and in the page; the page is the
same bytes again, runs nothing that a run wrote, and reads well in a browser, on a phone too."""
import html.parser
import io
import json
import os
import pathlib
import re
import shutil
import time

import numpy as np
import pytest
from rich.console import Console

from experiments.page import build_page
from experiments.report import amount, duration, main, print_report, read_sweep
from experiments.verdicts import judge
from tests.made_sweep import make_sweep

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUESTION = "Does any of this help a small model?\n\nOr is it noise, as so much is? What is true is planted."
EVIL = """"><script>alert(1)</script><img src=x onerror=alert(2)>'&lt;[red]"""


class Page(html.parser.HTMLParser):
  """The text of each table's cells, the links, the names of elements, what would run."""

  def __init__(self, text):
    super().__init__()
    self.tables, self.links, self.tags, self.handlers, self.inside = [], [], [], [], None
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.handlers += [name for name, _ in attributes if name.startswith("on")]
    self.links += [value for name, value in attributes if name in ("href", "src")]
    if tag == "table":
      self.tables.append([])
    elif tag == "tr":
      self.tables[-1].append([])
    elif tag in ("td", "th"):
      self.tables[-1][-1].append("")
      self.inside = tag

  def handle_endtag(self, tag):
    self.inside = None if tag == self.inside else self.inside

  def handle_data(self, data):
    if self.inside:
      self.tables[-1][-1][-1] += data


def terminal(report):
  console = Console(file=io.StringIO(), width=200)
  print_report(report, console)
  return console.file.getvalue()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
  """Cell 1 better, 2 worse; a failure, a divergence, a run that has not ended."""
  folder = tmp_path_factory.mktemp("sweep")
  table = make_sweep(folder, 9, (0, 1, 2, 3), difference={1: -0.08, 2: 0.1},
                     status={(6, 1): "failed", (7, 0): "diverged", (7, 3): "diverged", (8, 2): "unfinished"})
  return folder, table


def test_the_numbers_are_those_of_the_verdicts_everywhere(sweep):
  folder, table = sweep
  report, judged = read_sweep(folder), judge(table)
  assert report.judgement.comparisons == judged.comparisons and report.judgement.band == judged.band
  page, said = Page(build_page(report)), terminal(report)
  forest, figures, settings = page.tables
  d = report.decimals
  for row, c in zip(report.rows[:6], judged.comparisons):
    mine, = (cells for cells in forest if cells[0] == row.name)
    numbers, = (cells for cells in figures if cells[0] == row.name)
    line, = (line for line in said.splitlines() if line.startswith(row.name + " "))
    mean = f"{c.mean:.{d}f} ± {c.half:.{d}f}"
    assert numbers[1] == mean and mean in line and c.verdict in mine[4] and c.verdict in line
    assert numbers[2].split() == [f"{v:.{d}f}" for v in table[report.rows.index(row)]]
    if c.verdict != "baseline":
      assert mine[2] == f"{c.difference:+.{d}f}".replace("-", "−") and f"{c.difference:+.{d}f}" in line
      assert mine[3] == f"{c.low:+.{d}f} to {c.high:+.{d}f}".replace("-", "−")
  assert [judged.comparisons[i].verdict for i in (1, 2)] == ["better", "worse"]
  assert f"±{judged.band:.{d}f} is noise here; a true one of {judged.found:.{d}f}" in said
  assert len(settings) == len(report.rows) + 1
  assert 0.01 < judged.band < 0.05 and d == 3


def test_what_did_not_end_well_is_said_and_judged_by_nobody(sweep):
  folder, table = sweep
  report = read_sweep(folder)
  said, page = terminal(report), build_page(report)
  words = {6: "failed in 1 of 4 seeds", 7: "diverged in 2 of 4 seeds", 8: "3 of 4 seeds done"}
  assert {i: report.rows[i].said for i in words} == words
  assert all(text in said and text in page for text in words.values())
  assert f"failed: {report.rows[6].name} seed 1: failed: it ended early" in said
  assert str(folder / "cell-006" / "seed=1" / "output.log") in said
  assert 'href="cell-006/seed%3D1/output.log"' in page and "What did not end well" in page
  whole = judge(table[:6])
  assert [row.comparison for row in report.rows[:6]] == whole.comparisons
  line, = (line for line in said.splitlines() if line.startswith(report.rows[8].name + " "))
  assert line.split()[1:3] == ["3", f"({np.nanmean(table[8]):.{report.decimals}f})"]
  pruned = folder / "cell-008" / "seed=2" / "outcome.json"
  pruned.write_text(json.dumps({"status": "pruned", "exit_code": 143, "seconds": 1.0, "error": None}))
  assert read_sweep(folder).rows[8].said == "pruned"
  pruned.unlink()


def test_a_run_that_ended_well_without_a_number_has_not(tmp_path):
  make_sweep(tmp_path, 4)
  for cell, value in (("cell-001", None), ("cell-002", "NaN")):
    path = tmp_path / cell / "seed=1" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line | ({"eval/val/loss": value} if "eval/val/loss" in line else {}) for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  rows = read_sweep(tmp_path).rows
  assert [row.kind for row in rows[1:3]] == ["failed", "diverged"] and rows[3].comparison.verdict
  assert rows[1].runs[1].error == "it has ended without eval/val/loss"
  assert rows[2].runs[1].error == "eval/val/loss is nan"


def test_links_lead_to_files_from_wherever_the_page_is(sweep, tmp_path):
  folder, _ = sweep
  for at in (folder, tmp_path):
    links = [link for link in Page(build_page(read_sweep(folder), at=at)).links if link != "data:,"]
    assert len(links) > 25
    for link in links:
      assert not re.match(r"\w+:|/", link)
      assert (at / html.unescape(link).replace("%3D", "=")).is_file(), link


def test_the_page_is_the_same_bytes_but_for_times(tmp_path):
  pages = []
  for name, seconds, sha in (("one", 20.0, "a" * 40), ("two", 31.5, "b" * 40)):
    (tmp_path / name).mkdir()
    make_sweep(tmp_path / name, 5, status={(3, 0): "failed"}, seconds=seconds, sha=sha)
    report = read_sweep(tmp_path / name)
    pages.append((build_page(report, times=False), build_page(report)))
  assert pages[0][0] == pages[1][0] and pages[0][1] != pages[1][1]
  assert pages[0][0] == build_page(read_sweep(tmp_path / "one"), times=False)
  assert "a" * 40 in pages[0][1] and "a" * 40 not in pages[0][0] and str(tmp_path) not in pages[0][0]


def test_the_order_of_runs_and_cells_in_time_is_not_seen(tmp_path):
  """Files written in another order, half-done runs gone on with: the same report."""
  one, two = tmp_path / "one", tmp_path / "two"
  one.mkdir()
  make_sweep(one, 6)
  two.mkdir()
  for path in sorted(one.rglob("*"), reverse=True):
    if path.is_file():
      (two / path.relative_to(one)).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(path, two / path.relative_to(one))
  assert build_page(read_sweep(one), times=False) == build_page(read_sweep(two), times=False)


def test_strings_of_a_run_are_text(tmp_path):
  make_sweep(tmp_path, 4, names={1: EVIL, 2: "[bold]x[/bold]"}, errors={3: EVIL + "\x1b[2J\x07"},
             status={(3, 0): "failed"}, question=f"Is {EVIL} safe? {EVIL}\n\n{EVIL}\n\n  python -m {EVIL}")
  sweep = json.loads((tmp_path / "sweep.json").read_text())
  sweep["experiment"] = f"experiments.{EVIL}"
  sweep["cells"][1]["overrides"] = {f"model.{EVIL}": EVIL}
  (tmp_path / "sweep.json").write_text(json.dumps(sweep))
  for path in tmp_path.rglob("config.json"):
    record = json.loads(path.read_text())
    record["config"][EVIL] = EVIL + str(path.parts[-3])
    path.write_text(json.dumps(record | {"data": EVIL, "versions": {EVIL: EVIL}, "git": {"sha": EVIL}}))
  report = read_sweep(tmp_path)
  text = build_page(report)
  page = Page(text)
  assert page.tags.count("script") == 1 and "img" not in page.tags and not page.handlers
  assert "<script>alert" not in text and text.count("&lt;script&gt;alert(1)") > 10
  policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text).group(1)
  assert policy.startswith("default-src 'none'") and "unsafe-inline'; script-src 'sha256-" in policy
  said = terminal(report)
  assert "\x1b" not in said and "\x07" not in said and "[bold]x[/bold]" in said and "alert(2)" in said


def test_two_hundred_cells_take_seconds(tmp_path):
  make_sweep(tmp_path, 200, difference={9: 0.1}, steps=30)
  begin = time.process_time()
  text = build_page(read_sweep(tmp_path))
  assert time.process_time() - begin < 3
  assert len(text) < 1_000_000 and text.count('<g class="curve') == 400


def test_without_enough_seeds_or_runs_there_is_a_report_that_says_so(tmp_path):
  (tmp_path / "one").mkdir()
  make_sweep(tmp_path / "one", 3, (5,))
  report = read_sweep(tmp_path / "one")
  said = terminal(report)
  assert "no verdict: a verdict needs 2 seeds or more, and there is 1" in said
  assert {row.said for row in report.rows[1:]} == {"no verdict"} and build_page(report)
  (tmp_path / "none").mkdir()
  make_sweep(tmp_path / "none", 3, status={(a, s): "missing" for a in range(3) for s in range(3)})
  report = read_sweep(tmp_path / "none")
  assert {row.said for row in report.rows} == {"not started", "baseline, missing in 3 of 3 seeds"}
  assert "no verdict: the baseline has no finished run" in terminal(report) and build_page(report)
  (tmp_path / "alone").mkdir()
  make_sweep(tmp_path / "alone", 1)
  assert "there is only the baseline" in terminal(read_sweep(tmp_path / "alone"))
  assert build_page(read_sweep(tmp_path / "alone"))


def test_another_baseline_and_metric_of_the_same_runs(sweep):
  folder, table = sweep
  report = read_sweep(folder, baseline="cell-002", higher_is_better=True)
  assert report.judgement.comparisons == judge(table, 2, higher_is_better=True).comparisons
  loss = read_sweep(folder, metric="loss")
  ends = [json.loads(line)["loss"] for line in (folder / "cell-000" / "seed=0" / "metrics.jsonl").read_text()
          .splitlines() if '"loss"' in line]
  assert loss.rows[0].runs[0].value == ends[-1]


def test_a_long_run_is_read_in_part_and_ends_where_it_ends(tmp_path):
  table = make_sweep(tmp_path, 2, (0, 1), steps=5000)
  report = read_sweep(tmp_path)
  np.testing.assert_array_equal([[run.value for run in row.runs] for row in report.rows], table)
  steps, losses = report.rows[0].runs[0].curves["loss"]
  assert steps[0] == 1 and steps[-1] == 5000 and len(steps) <= 1100


def test_runs_of_two_commits_or_on_other_data_are_pointed_out(tmp_path):
  make_sweep(tmp_path, 3)
  assert not read_sweep(tmp_path).mixtures
  path = tmp_path / "cell-001" / "seed=0" / "config.json"
  record = json.loads(path.read_text())
  path.write_text(json.dumps(record | {"git": {"sha": "f" * 40}, "data": "sha256:other"}))
  warnings = "\n".join(read_sweep(tmp_path).mixtures)
  assert warnings.splitlines()[0] in terminal(read_sweep(tmp_path))
  assert "2 different states of the code" in warnings and "2 different sets of data" in warnings


def test_the_command(sweep, tmp_path, capsys, monkeypatch):
  folder, _ = sweep
  monkeypatch.chdir(tmp_path)
  shutil.copytree(folder, "runs/sweeps/made_up")
  assert main(["experiments.made_up"]) == 0 and pathlib.Path("runs/sweeps/made_up/report.html").is_file()
  assert "1 better, 1 worse, 1 diverged, 3 within noise, 1 failed, 1 unfinished" in capsys.readouterr().out
  assert main([str(folder), f"--out={tmp_path}/x.html"]) == 0 and (tmp_path / "x.html").is_file()
  mistakes = {("nowhere",): "nowhere is not a sweep: it has no sweep.json",
              (str(folder), "--baseline=qk_norm=rmsnrm"): "is no cell; nearest valid: 'qk_norm=rmsnorm'",
              (str(folder), "--metric=eval/val/los"): "is in no metrics.jsonl of",
              (str(folder), "--out=no/x.html"): "--out=no/x.html: there is no folder no"}
  for argv, message in mistakes.items():
    assert main(list(argv)) == 2 and message in capsys.readouterr().err
  (tmp_path / "runs/sweeps/made_up/cell-000/seed=0/metrics.jsonl").write_text("{}\nnot json\n")
  assert main(["experiments.made_up"]) == 2 and "metrics.jsonl:1 is not a line" in capsys.readouterr().err


def test_amounts_and_durations():
  assert [amount(n) for n in (None, 0, 999, 1000, 20480, 1.234e9, 5.6e16)] == [
    "", "0", "999", "1k", "20.5k", "1.23G", "56P"]
  assert [duration(s) for s in (None, 3.14, 200, 8000, 260000)] == [
    "", "3.1 s", "3.3 min", "2.2 h", "3.0 days"]


@pytest.mark.slow
@pytest.mark.parametrize("n_cells", [12, 200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(n_cells, scheme, tmp_path):
  """Headless Chromium; SHOTS=DIR keeps the pictures."""
  api = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
  if CHROMIUM is None:
    pytest.skip("needs chromium")
  make_sweep(tmp_path, n_cells, difference={1: -0.08, 2: 0.1, 5: 1.0, 9: -0.06}, question=QUESTION,
             names={3: EVIL, 4: "x" * 150}, errors={7: EVIL}, status={(7, 0): "failed", (8, 1): "diverged"})
  main([str(tmp_path)])
  with api.sync_playwright() as p:
    browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    for name, width in (("phone", 390), ("tablet", 720), ("desktop", 1280)):
      said, asked = [], []
      page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
      page.on("console", lambda message: said.append(message.text))
      page.on("pageerror", lambda error: said.append(str(error)))
      page.on("dialog", lambda dialog: said.append(dialog.message))
      page.on("request", lambda request: asked.append(request.url))
      page.goto(f"file://{tmp_path}/report.html")
      _use(page, n_cells)
      assert page.evaluate("document.documentElement.scrollWidth") == width
      assert not said and len(asked) == 1
      assert not _faint_texts(page)
      if "SHOTS" in os.environ:
        page.reload()
        page.screenshot(path=f"{os.environ['SHOTS']}/{n_cells}-{name}-{scheme}.png", full_page=True)
      page.close()
    browser.close()


def _use(page, n_cells):
  """Filters, sorts, unfolds, and brings a curve forward."""
  rows = page.locator(".forest tbody tr[data-i]:visible")
  assert rows.count() == (n_cells if n_cells == 12 else 31)
  if n_cells > 40:
    page.get_by_text(f"show the {n_cells - 31} in between").first.click()
    assert rows.count() == n_cells
  better = page.locator(".kinds button[data-kind=better]")
  better.click()
  assert set(rows.evaluate_all("rows => rows.map(row => row.dataset.kind)")) == {"baseline", "better"}
  better.click()
  page.locator("#find").fill("RMSNORM")
  assert 0 < rows.count() < n_cells
  assert all("rmsnorm" in text for text in rows.locator("th").all_inner_texts())
  page.locator("#find").fill("")
  head = page.locator("#figures .sort").nth(1)
  values = "rows => rows.map(row => row.children[1].dataset.v).filter(v => v !== '').map(Number)"
  for direction in (1, -1):
    head.click()
    means = np.array(page.locator("#figures tbody tr[data-i]").evaluate_all(values))
    assert (np.diff(means) * direction >= 0).all() and len(means) == n_cells - 2
  before, name = page.locator(".keys li").count(), page.locator(".forest tr[data-i='6'] .name")
  name.click()
  assert page.locator(".keys li").count() == before + 1 and name.get_attribute("aria-pressed") == "true"
  band = page.locator("g.curve.on[data-i='6'] .band").first
  assert band.evaluate("e => getComputedStyle(e).display") != "none"
  name.click()
  assert page.locator(".keys li").count() == before


def _faint_texts(page):
  """Visible texts whose contrast with the page is below 4.5 (WCAG AA)."""
  return page.evaluate("""() => {
    const light = text => {
      const c = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(
        v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
      return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2];
    };
    const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$|transparent/.test(c)) return c; } };
    const found = new Set();
    for (const e of document.querySelectorAll("body *:not(script)")) {
      const text = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
      if (!text || e.closest("svg")) continue;
      const a = light(getComputedStyle(e).color), b = light(ground(e));
      if ((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5) found.add(e.tagName + "." + e.className);
    }
    return [...found];
  }""")

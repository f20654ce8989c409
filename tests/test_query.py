"""A query finds what plain Python finds, in whatever state the runs are, and can do nothing else."""
import csv
import io
import json
import math
import operator
import random

import pytest

pytest.importorskip("duckdb", reason="experiments.query is made of it")

from experiments.query import main, read_table, select

LOSS = "eval/val/loss"
CONFIG = {
  "steps": 40, "seed": 0,
  "model": {"d_model": 256, "window": None, "out_of_use": None, "layer_pattern": ["local", "global"]},
  "optim": {"lr": 1e-3, "name": "adamw"},
  "data": {"sources": [{"kind": "text", "weight": 1.0}], "tokenizer": {"kind": "gguf"}},
}


def make_run(folder, lines, *, outcome=None, tail="", **changes):
  """`changes` by "section.name"; `tail` is what a kill left of the last line."""
  folder.mkdir(parents=True)
  config = json.loads(json.dumps(CONFIG))
  for name, value in changes.items():
    section, _, field = name.rpartition(".")
    (config[section] if section else config)[field] = value
  record = {"config": config, "hash": "sha256:" + "a1" * 32, "git": {"sha": "b2" * 20, "dirty": True},
            "data": "c3" * 32}
  (folder / "config.json").write_text(json.dumps(record))
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
  if outcome:
    (folder / "outcome.json").write_text(json.dumps({"status": outcome}))


def ask(capsys, root, *args):
  """(rows of the CSV, exit code, stderr)"""
  code = main([*args, f"--runs={root}", "--csv"])
  out, err = capsys.readouterr()
  return list(csv.DictReader(io.StringIO(out))), code, err


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
  """60 runs with random settings and losses, and what was drawn."""
  root, rng, drawn = tmp_path_factory.mktemp("runs"), random.Random(0), {}
  for i in range(60):
    values = {"optim.lr": rng.choice([1, 1e-2, 1e-3, 3e-4]), "model.d_model": rng.choice([64, 256, 512]),
              "model.window": rng.choice([None, 32, 128]), "optim.name": rng.choice(["adamw", "muon"]),
              "seed": rng.randrange(3)}
    losses = [round(rng.uniform(2, 5), 3) for _ in range(3)]
    make_run(root / f"sweep{i % 4}" / f"{i:02}", [
      line for n, loss in enumerate(losses) for line in ({"step": 20 * n + 1, "loss": 9.0},
                                                         {"step": 20 * n + 1, LOSS: loss})], **values)
    drawn[f"sweep{i % 4}/{i:02}"] = {**values, LOSS: losses[-1]}
  return root, drawn


CONDITIONS = {
  "lr<1e-3 and d_model==256": lambda r: r["optim.lr"] < 1e-3 and r["model.d_model"] == 256,
  "optim.lr >= 0.001 OR model.d_model IN (64, 512)":
    lambda r: r["optim.lr"] >= 1e-3 or r["model.d_model"] in (64, 512),
  "window is null and name = 'muon'": lambda r: r["model.window"] is None and r["optim.name"] == "muon",
  "window*2 > 100": lambda r: (r["model.window"] or 0) * 2 > 100,
  "seed between 1 and 2 and run like 'sweep1/%'": lambda r: r["seed"] in (1, 2) and r["run"][:7] == "sweep1/",
  f'"{LOSS}" < 3': lambda r: r[LOSS] < 3,
  "data.sources[0].kind = 'text' and LR=1": lambda r: r["optim.lr"] == 1,
  "out_of_use > 3 or out_of_use = 'x' or seed = 1": lambda r: r["seed"] == 1,  # None in all runs.
  "name = 'lr'": lambda r: False,  # Text is not a column.
  "layer_pattern like '%local%' and dirty and data like 'c3%' and log(lr) < -2.5":
    lambda r: math.log10(r["optim.lr"]) < -2.5,
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_rows_and_their_order_are_those_of_python(condition, grid):
  root, drawn = grid
  wanted = [{**values, "run": run} for run, values in drawn.items()]
  wanted = sorted(filter(CONDITIONS[condition], wanted), key=lambda r: (r[LOSS], r["run"]))
  for higher in (False, True):
    found = select(read_table(root, LOSS), condition, LOSS, higher)
    get = operator.itemgetter("run", LOSS, "optim.lr", "model.window")
    if higher:
      wanted.sort(key=lambda r: (-r[LOSS], r["run"]))
    assert list(map(get, found)) == list(map(get, wanted))


def test_runs_in_every_state(tmp_path, capsys):
  steps = [{"step": 1, "loss": 3.0}, {"step": 1, LOSS: 2.5}, {"step": 40, "loss": 1.0}]
  make_run(tmp_path / "whole", steps)
  make_run(tmp_path / "cut", steps[:2], tail='{"step": 2, "eval/val/loss": 0.1')
  make_run(tmp_path / "none", [{"step": 7, "loss": 3.0}], outcome="failed")
  make_run(tmp_path / "new", [])
  make_run(tmp_path / "nan", [{"step": 40, LOSS: "NaN"}], outcome="done")
  make_run(tmp_path / "infinite", [{"step": 40, LOSS: "Infinity"}], outcome="pruned")
  make_run(tmp_path / "half", steps)
  (tmp_path / "half" / "config.json").write_text('{"config": {"st')  # No run, like the next two.
  make_run(tmp_path / "other", steps)
  (tmp_path / "other" / "config.json").write_text('["a list"]')
  (tmp_path / "empty").mkdir()
  rows, code, _ = ask(capsys, tmp_path, "--columns=run,status,last_step,eval/val/loss,d_model,hash")
  assert code == 0 and [list(r.values())[:4] for r in rows] == [
    ["cut", "unfinished", "1", "2.5"], ["whole", "done", "40", "2.5"], ["infinite", "pruned", "40", "inf"],
    ["nan", "done", "40", "nan"], ["new", "unfinished", "", ""], ["none", "failed", "7", ""]]
  assert rows[0]["d_model"] == "256" and rows[0]["hash"] == "sha256:" + "a1" * 32
  rows, _, _ = ask(capsys, tmp_path, "--higher_is_better")
  assert [r["run"] for r in rows] == ["infinite", "cut", "whole", "nan", "new", "none"]


def test_what_differs_is_shown_as_far_as_there_is_room(grid, capsys, monkeypatch):
  root, _ = grid
  monkeypatch.setenv("COLUMNS", "72")
  assert main(["optim.lr<1e-3", f"--runs={root}"]) == 0
  first, *rows, last = capsys.readouterr().out.splitlines()
  assert first.split() == ["run", LOSS, "last_step", "status", "lr", "seed", "d_model"]
  assert len(rows) == int(last.split()[0]) and " of 60 runs; " in last
  assert last.endswith("(--columns, --csv): window, name")
  assert max(map(len, rows)) <= 72


REFUSED = {
  "lrr < 1": "unknown column lrr; did you mean lr?",
  "optimm.lr < 1": "unknown column optimm.lr; did you mean optim.lr?",
  "kind = 'text'": "unknown column kind; did you mean data.sources[0].kind or data.tokenizer.kind?",
  "lr <": "syntax error",
  "name < 3": "Cannot compare values",
  "count(*) > 1": "aggregates",
  "lr<1; drop table runs": "syntax error",
  "lr<1); drop table runs; select (1": "Only SELECT",
  "lr<1) order by (seed": "one expression",
  "lr<1) union select * from runs where (true": "one expression",
  "lr in (select 1)": "one expression",
  "lr < (select count(*) from read_csv('FILE'))": "one expression",
  "exists(from 'FILE')": "one expression",
  "(select content from read_text('FILE')) like 's%'": "one expression",
  "lr<1); copy runs to 'OUT'; select (1": "Only SELECT",
  "lr<1); attach 'OUT'; select (1": "Only SELECT",
}


@pytest.mark.parametrize("condition", REFUSED)
def test_a_condition_that_is_none_is_refused(condition, grid, tmp_path, capsys):
  secret, out = tmp_path / "secret.csv", tmp_path / "out"
  secret.write_text("secret\n")
  text = condition.replace("FILE", str(secret)).replace("OUT", str(out))
  _, code, err = ask(capsys, grid[0], text)
  assert code == 2 and REFUSED[condition] in err and "secret\n" not in err and not out.exists()
  assert err.count("\n") == 1 and err.startswith("experiments.query: error: ")


def test_the_database_itself_reads_and_writes_no_file(grid, tmp_path):
  """Should a condition come past the check."""
  import duckdb

  from experiments.query import _open
  (tmp_path / "x.csv").write_text("a\n1\n")
  db = _open(read_table(grid[0], LOSS))
  for query in (f"from '{tmp_path}/x.csv'", f"from read_text('{tmp_path}/x.csv')",
                f"copy runs to '{tmp_path}/y'", f"attach '{tmp_path}/z'", "install httpfs", "load httpfs",
                "set enable_external_access=true", "set lock_configuration=false"):
    with pytest.raises(duckdb.Error):
      db.execute(query)
  assert [p.name for p in tmp_path.iterdir()] == ["x.csv"]


def test_mistakes_outside_the_condition(grid, tmp_path, capsys):
  root, _ = grid
  assert ask(capsys, tmp_path / "nowhere")[1:] == (
    2, f"experiments.query: error: --runs={tmp_path / 'nowhere'}: no such folder\n")
  assert "no run in it" in ask(capsys, tmp_path)[2]
  assert "did you mean eval/val/loss?" in ask(capsys, root, "--metric=eval/val/los")[2]
  assert "--columns: unknown column d_modl; did you mean d_model?" in ask(capsys, root, "--columns=d_modl")[2]

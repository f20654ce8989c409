"""The picture of a run is a PNG for whatever metrics.jsonl holds, and says so where it holds nothing."""
import json
import math

import pytest

from train.plot import main, plot_run


def make_run(folder, lines):
  folder.mkdir()
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def steps(n):
  for step in range(1, n + 1):
    loss = "NaN" if step == 7 else 2 + math.exp(-step / 20)
    norm = 40.0 if step == 9 else 0.5
    yield {"step": step, "loss": loss, "grad_norm": norm, "lr": 1e-3, "tokens_per_s": 1e4, "mfu": None}
    if step % 25 == 0:
      yield {"step": step, "eval/val/loss": 2.1, "eval/val/bpb": 1.1, "eval/code/loss": 2.0}


@pytest.mark.parametrize("n", [1, 6, 30, 120])
def test_a_run_becomes_a_picture(n, tmp_path):
  run = make_run(tmp_path / "run", steps(n))
  plot_run(run / "metrics.jsonl", tmp_path / "out.png")
  assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
  assert (tmp_path / "out.png").stat().st_size > 20_000


def test_the_command_draws_one_or_several_and_names_what_is_no_run(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  one, two = make_run(tmp_path / "one", steps(30)), make_run(tmp_path / "two", steps(40))
  assert main([str(one)]) == 0 and (one / "plot.png").exists()
  assert main([str(one), str(two)]) == 0 and (tmp_path / "plot.png").exists()
  assert capsys.readouterr().out.split() == [str(one / "plot.png"), "plot.png"]
  assert main([str(one), "nowhere"]) == 2
  assert "nowhere is not a run: it has no metrics.jsonl" in capsys.readouterr().err
  empty = make_run(tmp_path / "empty", [])
  assert main([str(empty)]) == 2 and "no step has been logged yet" in capsys.readouterr().err

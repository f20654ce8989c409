"""Training that begins with the weights of another run."""
import pytest

from train import main
from train.metrics import read_metrics


def command(tmp_path, name, *more):
  return main.main([
      "--config=configs/tiny.py", f"--workdir={tmp_path / name}", "--config.steps=8", "--config.eval.every=4",
      "--config.optim.warmup_steps=2", f"--config.data.cache_path={tmp_path / 'cache'}", *more])


def losses(path):
  return {line["step"]: line["eval/val/loss"] for line in read_metrics(path / "metrics.jsonl")
          if "eval/val/loss" in line}


def test_the_weights_of_another_run_are_where_training_begins(tmp_path, capsys):
  """On another mesh, with a fresh optimizer; and what does not fit is refused before there is a workdir."""
  assert command(tmp_path, "first") == 0
  second = f"--config.init_from={tmp_path / 'first'}"
  assert command(tmp_path, "second", second, "--config.mesh.tensor=2", "--config.model.dropout=0.1") == 0
  assert "other settings: model.dropout=0.1 (there 0.0)" in capsys.readouterr().out
  first, then = losses(tmp_path / "first"), losses(tmp_path / "second")
  assert then[0] == pytest.approx(first[8], abs=1e-4) and then[8] < then[0] < first[0] - 0.5
  wider = [f"--config.init_from={tmp_path / 'first'}", "--config.model.d_model=128"]
  assert command(tmp_path, "third", *wider) == 2
  assert "ffn/w_up is float32[2, 64, 256] there, float32[2, 128, 384] here" in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path, capsys):
  assert command(tmp_path, "run", "--config.init_from=/nowhere/x") == 2
  assert "init_from=/nowhere/x: --run=/nowhere/x is no run" in capsys.readouterr().err

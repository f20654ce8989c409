"""What a finished run shows, from its own files."""
import pytest

from configs.tiny import get_config
from tests.test_loop import run
from train.host import Stopwatch
from train.loop import prepare_run
from train.metrics import read_metrics
from train.report import _text_read, write_report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  cfg = get_config()
  cfg.steps, cfg.data.cache_path = 6, str(tmp_path_factory.mktemp("cache"))
  cfg.optim.warmup_steps = 1
  cfg.report.baselines, cfg.report.prompts, cfg.report.n_tokens = ("gzip", "ngram5"), ("The ",), 8
  cfg.validate(8)
  workdir = tmp_path_factory.mktemp("run")
  assert run(cfg, workdir) == 0
  return cfg, workdir, prepare_run(cfg, Stopwatch())


def test_the_report(finished, capsys):
  cfg, workdir, prepared = finished
  write_report(cfg, workdir, prepared, "python -m train.main --config=configs/tiny.py")
  text = (workdir / "report.md").read_text()
  for part in ("this model after 6 steps", "gzip -9", "order-5", "```\nThe ", "infer.generate",
               "--allow_change=steps"):
    assert part in text
  assert text in capsys.readouterr().out
  assert (workdir / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_baseline_reads_what_the_model_read(finished):
  """As many trained tokens as the run reports, decoded."""
  cfg, workdir, prepared = finished
  text = _text_read(cfg, prepared).decode()
  tokens = [line["tokens"] for line in read_metrics(workdir / "metrics.jsonl") if "tokens" in line][-1]
  assert 0.9 < len(prepared.prepared.tokenizer.encode(text)) / tokens < 1.1

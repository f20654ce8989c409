import pathlib
import subprocess
import sys

import pytest

from data import inspect
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.pipeline import Rows
from data.prepare import prepare

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = '''
from configs import tiny
from data.config import SourceConfig

def get_config():
  c = tiny.get_config()
  c.data.sources = [SourceConfig(name="most", kind="synthetic", documents=300, weight=0.7),
                    SourceConfig(name="rest", kind="synthetic", documents=100, weight=0.3)]
  c.data.weights_from_step = ((30, (0.5, 0.5)),)
  c.data.cache_path = {cache!r}
  return c
'''


def test_shares_over_ten_thousand_rows(tmp_path):
  cfg = DataConfig(sources=[SourceConfig(name=n, kind="synthetic", documents=d, weight=w)
                            for n, d, w in (("a", 200, 0.6), ("b", 100, 0.3), ("c", 50, 0.1))],
                   tokenizer=TokenizerConfig(vocab_size=400), cache_path=str(tmp_path))
  rows = Rows(prepare(cfg, log=lambda line: None), cfg, seq_len=64, batch_size=10)
  for s, weight in zip(inspect.summarise(rows, 1000), (0.6, 0.3, 0.1)):
    assert s["target"] == pytest.approx(weight)
    assert abs(s["rows"] - weight) < 0.005 and abs(s["tokens"] - weight) < 0.005
    assert s["documents"] == s["of"] and s["epochs"] > 1 and 0.97 < s["packing"] <= 1


def run(*flags, cwd=ROOT):
  return subprocess.run([sys.executable, "-m", "data.inspect", *flags], cwd=cwd, capture_output=True, text=True)


def test_the_command(tmp_path):
  path = tmp_path / "two.py"
  path.write_text(CONFIG.format(cache=str(tmp_path / "cache")))
  table = run(f"--config={path}", "--steps=40").stdout
  for word in ("most", "rest", "65.00%", "35.00%", "40 steps of 8 rows of 64", "from step 30: most 50.00%"):
    assert word in table
  step = run(f"--config={path}", "--step=3").stdout
  assert step.count("step 3 slot ") == 8 and "synthetic synthetic" not in step
  assert "most synthetic#" in step and "[0:" in step and ("A story of" in step or "def " in step)
  refused = run(f"--config={path}", "--steps=0")
  assert refused.returncode == 2 and "--steps=0 must be at least 1" in refused.stderr

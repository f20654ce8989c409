import pytest

from data import inspect
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.pipeline import Rows
from data.prepare import prepare

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


def test_the_command(tmp_path, capsys):
  path = tmp_path / "two.py"
  path.write_text(CONFIG.format(cache=str(tmp_path / "cache")))

  def run(*flags):
    assert inspect.main([f"--config={path}", *flags]) == 0
    return capsys.readouterr().out

  table = run("--steps=40")
  for word in (
    "most",
    "rest",
    "65.00%",
    "35.00%",
    "40 steps of 8 rows of 64",
    "from step 30: most 50.00%",
  ):
    assert word in table
  step = run("--step=3")
  assert step.count("step 3 slot ") == 8
  assert "most synthetic#" in step and "[0:" in step and ("A story of" in step or "def " in step)
  assert inspect.main([f"--config={path}", "--steps=0"]) == 2
  assert "--steps=0 must be at least 1" in capsys.readouterr().err

"""The base of the ablations that ship: 1.1M parameters on Python's own library, a minute on one core.

python -m train.main --config=configs/small.py
Cost: 300 steps of 512 tokens. Expected: 4.4 nats a token on held-out files, 0.1 more or less by the seed.
What matters is how two such runs differ:
python -m experiments.sweep experiments.qk_norm
"""
from configs.quickstart import STDLIB
from data.config import DataConfig, SourceConfig, TokenizerConfig
from train.config import TrainConfig


def get_config(arg: str = "") -> TrainConfig:
  if arg:
    raise ValueError(f"arg={arg!r}: this config takes none; nearest valid: configs/small.py")
  c = TrainConfig(steps=300, batch_size=8, seq_len=64)
  c.data = DataConfig(sources=[SourceConfig(name="python", path=STDLIB)], val_fraction=0.04,
                      tokenizer=TokenizerConfig(vocab_size=1024))
  m = c.model
  m.n_layers, m.d_model, m.n_heads, m.precision = 4, 128, 4, "fp32"
  c.optim.lr, c.optim.warmup_steps = 3e-3, 20
  c.eval.every, c.eval.rows, c.checkpoint.every = 100, 128, 150
  return c

"""The smallest useful run: 0.2M parameters on made-up text, half a minute on a laptop. Tests are built on it.

python -m train.main --config=configs/tiny.py
Expected: the loss falls below 3.0 within 40 steps.
"""
from data.config import DataConfig, SourceConfig, TokenizerConfig
from train.config import TrainConfig


def get_config(arg: str = "") -> TrainConfig:
  if arg:
    raise ValueError(f"arg={arg!r}: this config takes none; nearest valid: configs/tiny.py")
  c = TrainConfig(steps=40, batch_size=8, seq_len=64)
  c.data = DataConfig(sources=[SourceConfig(name="synthetic", kind="synthetic", documents=400)],
                      tokenizer=TokenizerConfig(vocab_size=384), val_fraction=0.1)
  c.model.n_layers, c.model.d_model, c.model.n_heads, c.model.n_kv_heads = 2, 64, 4, 2
  c.model.precision = "fp32"
  c.optim.lr, c.optim.warmup_steps = 3e-3, 4
  c.eval.every, c.eval.rows, c.checkpoint.every = 20, 16, 20
  return c

"""The first hour: a small model of Python's own library, from the text on this machine to a sample,
on a laptop's CPU.

python -m train.main --config=configs/quickstart.py
No network, account or data is needed. Cost: about 5 minutes on two cores. Expected: fewer bits per byte than
gzip -9 needs for the same held-out files. Tests and tables of encodings are left out: they are data more than
they are code.

python -m train.main --config=configs/quickstart.py:DIR goes on with the model of DIR, a run's folder or what
`python -m model.hub import` made, on the same text: 40 steps of AdamW. Expected: the loss begins where the
model is, and falls.
"""
from data.config import DataConfig, SourceConfig, TokenizerConfig
from train.config import TrainConfig

STDLIB = ("{stdlib}/**/*.py,{stdlib}/**/*.txt,{stdlib}/**/*.rst,"
          "!{stdlib}/**/test*/**,!{stdlib}/**/*_test/**,!{stdlib}/encodings/*")


def get_config(arg: str = "") -> TrainConfig:
  if arg:
    return continued(arg)
  c = TrainConfig(steps=300, batch_size=16, seq_len=256)
  c.data = DataConfig(sources=[SourceConfig(name="python", path=STDLIB)], val_fraction=0.04,
                      tokenizer=TokenizerConfig(vocab_size=4096))
  m = c.model
  m.n_layers, m.d_model, m.n_heads, m.precision, m.qk_norm = 4, 192, 3, "fp32", "rmsnorm"
  c.optim.name, c.optim.lr, c.optim.schedule, c.optim.warmup_steps = "muon", 5e-3, "wsd", 20
  c.optim.decay_fraction, c.optim.final_lr_fraction = 0.4, 0.0
  c.eval.every, c.eval.rows, c.checkpoint.every = 100, None, 100
  c.report.baselines = ("gzip", "ngram5")
  c.report.temperature = 0.5
  c.report.prompts = ("def read_lines(path):\n", "class Stack:\n    \"\"\"A ", "The following ")
  return c


def continued(path: str) -> TrainConfig:
  from train.initial import read_initial  # Here, as it imports jax.
  try:
    model, tokenizer = read_initial(path)
  except ValueError as e:
    raise ValueError(f"arg={path!r} is to be a folder that --model of infer.generate takes: {e}") from None
  c = TrainConfig(steps=40, batch_size=8, seq_len=256, init_from=path, model=model)
  c.data = DataConfig(sources=[SourceConfig(name="python", path=STDLIB)], val_fraction=0.01,
                      tokenizer=tokenizer)
  c.optim.lr, c.optim.warmup_steps = 5e-5, 10
  c.eval.every, c.eval.rows, c.checkpoint.every = 40, 16, 40
  return c

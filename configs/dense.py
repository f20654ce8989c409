"""Dense models by one dial, the number of layers; everything else follows from it, and is printed with its
rule:

python -m train.main --config=configs/dense.py:d12 --config.data.sources[0].path=/data/*.jsonl.zst
python -m train.main --config=configs/dense.py:s3
Expected: d12 (the default; 85M parameters in its blocks) is not trained here. s3 takes 3 minutes of a
CPU's core, and ends at 2.75 nats a token.

dN is a ladder for accelerators: d1, d2, ... up to d128; d24 has 0.7B parameters in its blocks, d32 1.6B.
sN is the same ladder a quarter as wide, for a laptop's CPU and Python's own library as text (5.4M tokens):
s2 to s7 have 25 thousand to 1.1 million parameters in their blocks and read that text up to four times.
An override (--config.optim.lr=1e-3) changes its own setting and no other.

  model.d_model       64 a layer (s: 16), up to a multiple of the head
  model.head_dim      64, and 128 from d16, which fills a TPU's lanes (s: 16)
  model.n_heads       d_model / head_dim
  model.d_ff          8/3 d_model, up to a multiple of 128 (s: 16): SwiGLU with the parameters of 4 d_model
  steps               20 tokens for each parameter of the blocks (Chinchilla, arXiv:2203.15556)
  batch_size          0.292 C^0.3271 tokens (DeepSeek LLM, arXiv:2401.02954), to a power of two
  optim.lr            0.3118 C^-0.125 (DeepSeek LLM); in both, C = 6 * parameters of the blocks * tokens
  optim.warmup_steps  one token for each parameter of the blocks (arXiv:2406.19146)

DeepSeek's two laws were fitted to 10^17 FLOPs and more, which is d8. Below, they are an extrapolation.
"""
import dataclasses
import functools
import math
import re
import sys

from configs.quickstart import STDLIB
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.flags import leaves
from model.config import ModelConfig
from train.config import OptimConfig, TrainConfig

RULES = dict(re.findall(r"^  ([\w.]+)  +(\S.*)$", __doc__, re.M))
DEEPEST = 128


@dataclasses.dataclass(frozen=True)
class Ladder:
  width: int  # Of the model, a layer.
  head: int
  wide_head: int  # From 16 layers.
  multiple: int  # Of the hidden width of the feed-forward.
  seq_len: int
  precision: str
  remat: str
  data: DataConfig


def corpus(source, vocab_size, val_fraction) -> DataConfig:
  return DataConfig(sources=[source], tokenizer=TokenizerConfig(vocab_size=vocab_size),
                    val_fraction=val_fraction)


LADDERS = {
  "d": Ladder(64, 64, 128, 128, 2048, "bf16", "full", corpus(
    SourceConfig(name="text", kind="jsonl", path="/data/text/*.jsonl.zst"), 32_768, 0.001)),
  "s": Ladder(16, 16, 16, 16, 128, "fp32", "none", corpus(
    SourceConfig(name="python", path=STDLIB), 512, 0.04)),
}


def read_dial(arg: str) -> tuple[str, int]:
  """"d12" -> ("d", 12).

  Raises:
    ValueError: with the nearest dials.
  """
  letter, digits = arg[:1], "".join(c for c in arg if c.isdecimal())
  if re.fullmatch(f"[{''.join(LADDERS)}][1-9][0-9]*", arg) and int(digits) <= DEEPEST:
    return letter, int(digits)
  near = min(max(int(digits or 12), 1), DEEPEST)
  letters = letter if letter in LADDERS else LADDERS
  raise ValueError(f"arg={arg!r} is no dial: a letter ({' or '.join(LADDERS)}) and 1 to {DEEPEST} layers; "
                   f"nearest valid: {', '.join(f'configs/dense.py:{one}{near}' for one in letters)}")


def get_config(arg: str = "") -> TrainConfig:
  letter, depth = read_dial(arg or "d12")
  ladder = LADDERS[letter]
  up = lambda n, step: -(-n // step) * step
  head = ladder.wide_head if depth >= 16 else ladder.head
  width = up(ladder.width * depth, head)
  model = ModelConfig(n_layers=depth, d_model=width, n_heads=width // head, head_dim=head,
                      d_ff=up(-(-8 * width // 3), ladder.multiple), qk_norm="rmsnorm",
                      precision=ladder.precision, remat=ladder.remat)
  n = depth * (4 * width**2 + 3 * width * model.d_ff)
  flops = 6 * n * 20 * n
  batch = 2 ** max(round(math.log2(0.292 * flops**0.3271 / ladder.seq_len)), 0)
  step = batch * ladder.seq_len  # Tokens.
  c = TrainConfig(
    steps=max(round(20 * n / step), 2), batch_size=batch, seq_len=ladder.seq_len, model=model,
    optim=OptimConfig(lr=float(f"{0.3118 * flops**-0.125:.3g}"), warmup_steps=round(n / step)),
    data=dataclasses.replace(ladder.data))
  if letter == "s":
    c.eval.every, c.eval.rows, c.checkpoint.every = None, None, None
  explain(arg or "d12", n, c)
  return c


def explain(arg, n, c):
  from configs.dense import say  # Of the process: a config file is read anew each time.
  say("\n".join([
    f"configs/dense.py:{arg}: {n:,} parameters in the blocks, {c.steps * c.batch_size * c.seq_len:,} tokens",
    *(f"  {name:18} {leaves(c)[name]!s:>8}  {rule}" for name, rule in RULES.items())]))


@functools.cache
def say(text):
  """On stderr, once a process."""
  print(text, file=sys.stderr)

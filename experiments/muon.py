"""Is Muon better than AdamW at equal tokens?

Each at three rates: the best of one is to be compared with the best of the other. Muon's updates have Adam's
size here (arXiv:2502.16982), so that the rates are of one kind.
"""
import itertools

BASE = "configs/small.py"
BASELINE = "name=adamw,lr=0.003"
SEEDS = range(2)


def runs():
  for name, lr in itertools.product(("adamw", "muon"), (1.5e-3, 3e-3, 6e-3)):
    yield {"optim.name": name, "optim.lr": lr}

"""Does anything depend on when a sweep is killed? Twelve small models, for tests/test_sweep_real.py."""
import itertools

BASE = "configs/tiny.py"
SEEDS = (0, 1)


def runs():
  for width, lr in itertools.product((32, 64, 96), (1e-3, 3e-3, 6e-3, 1e-2)):
    yield {"model.d_model": width, "optim.lr": lr, "steps": 60, "checkpoint.every": 15}

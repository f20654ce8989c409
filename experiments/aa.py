"""Does the report call noise noise? Twenty cells that differ in their first weights alone, so that no
difference between them is true: at most one may be called better or worse.

    python -m experiments.sweep experiments.aa --jobs=2     80 runs of seconds each
    python -m experiments.report experiments.aa
"""
BASE = "configs/tiny.py"
SEEDS = (0, 1, 2, 3)


def runs():
  for i in range(20):
    yield f"weights {i}", {"init_seed": i, "steps": 12, "eval.every": 12, "checkpoint.every": 12}

"""Does muP keep the learning rate that suits, over the width?

Two layers at three widths and four rates, under the standard parametrization and under muP from the smallest
width, at which both are one model. The rate suits where the loss is lowest: under muP that should be one rate
for all widths, otherwise a lower one for a wider model (arXiv:2203.03466, figure 1).
"""
import itertools

BASE = "configs/small.py"
WIDTHS, RATES = (32, 96, 256), (1e-3, 4e-3, 1.6e-2, 6.4e-2)
SHORT = {"model.n_layers": 2, "steps": 100, "optim.warmup_steps": 10, "eval.every": None,
         "checkpoint.every": None}


def runs():
  for parametrization, width, lr in itertools.product(("standard", "mup"), WIDTHS, RATES):
    if parametrization == "mup" and width == WIDTHS[0]:
      continue  # The standard one.
    mup = {"model.parametrization": "mup", "model.mup_base_width": WIDTHS[0]}
    yield f"{parametrization},width={width},lr={lr:g}", {
      **SHORT, "model.d_model": width, "model.n_heads": width // 32, "model.d_ff": 4 * width, "optim.lr": lr,
      **(mup if parametrization == "mup" else {})}

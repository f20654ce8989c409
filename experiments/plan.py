"""python -m experiments.plan --budget=1e21 | --chip=v5e --n=256 --hours=24 [--fit=chinchilla]

On how large a model and how many tokens a budget of FLOP is best spent, what loss that will reach, what other
sizes would lose, how long it takes. By a scaling law: modelled, nothing is run. A token costs 6 FLOP a
parameter that multiplies it; attention between tokens is not counted.
"""
import argparse
import contextlib
import io
import math
import sys

import numpy as np
from scipy.optimize import minimize_scalar

from data.flags import ROOT, nearest, read_config
from experiments.law import LEVEL, Fit, Law, read_fit
from train.chips import CHIP, get_chip
from train.roofline import matrix_parameters

EPILOG = """examples:
  python -m experiments.plan --budget=1e21
  python -m experiments.plan --chip=v5e --n=256 --hours=24 --price_per_chip_hour=1.2
  python -m experiments.plan --budget=1e21 --unique_tokens=2e10          there is no more text than that
  python -m experiments.plan --budget=1e13 --fit=runs/sweeps/scaling/fit.json     a law of your own

fits:
"""
# name -> a function that gives a Fit.
PUBLISHED = {
  "chinchilla": lambda: read_fit(ROOT / "experiments/fits/chinchilla.json"),
  "hoffmann": lambda: Fit(
    "chinchilla", Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28), np.empty((0, 3)),
    source="Hoffmann et al. (arXiv:2203.15556), approach 3 as printed, which does not fit their runs "
           "(arXiv:2404.10102)"),
}
# Tokens a parameter: an optimum beyond these is of constants that are wrong, or far from all that was fitted.
PLAUSIBLE = 0.1, 1e4
LADDERS = {"d": 128, "s": 16}  # Dials of configs/dense.py, and their last.
MFU = 0.4


def get_fit(name: str) -> Fit:
  """Raises ValueError: neither a published fit nor a file of one."""
  if name in PUBLISHED:
    return PUBLISHED[name]()
  if not name.endswith(".json"):
    near = nearest(name, PUBLISHED)
    known = f"known: {', '.join(PUBLISHED)}, or a fit.json of experiments.scaling"
    raise ValueError(f"--fit={name}: " + (f"did you mean {near[0]}?" if near else known))
  return read_fit(name)


def check_optimum(name: str, law: Law, flops: float):
  """Raises ValueError where nothing that was ever trained looks like this law's best model."""
  n, d = law.optimum(flops)
  if not PLAUSIBLE[0] <= d / n <= PLAUSIBLE[1]:
    raise ValueError(
      f"--fit={name}: its best model for {flops:.3g} FLOP has {n:.2g} parameters and {d:.2g} tokens, as none "
      f"that was ever trained: alpha={law.alpha:.3g}, beta={law.beta:.3g}. Of text they are like 0.34 and "
      "0.28 (Hoffmann et al.) or 0.35 and 0.37 (their refit); the 0.07 and 0.21 often quoted are wrong")


# The report.

def describe(name: str, fit: Fit, flops: float, unique: float | None = None) -> str:
  n, d = fit.law.optimum(flops)
  least = float(fit.law.loss(n, d))
  lines = [f"{flops:.3g} FLOP by {name} ({fit.source}): modelled, nothing was run" if fit.source else
           f"{flops:.3g} FLOP by {name}: modelled, nothing was run", "",
           f"{'':16}{'parameters':>11}{'tokens':>9}{'a parameter':>13}{'loss':>9}{'of the least':>14}"]
  sizes = [("half the size", n / 2), ("best", n), ("twice the size", 2 * n)]
  if (dial := find_dial(n)) is not None:
    sizes.append(dial)
  for label, size in sizes:
    tokens = flops / 6 / size
    loss = float(fit.law.loss(size, tokens))
    lines.append(f"{label:16}{short(size):>11}{short(tokens):>9}{tokens / size:13.3g}{loss:9.4f}"
                 f"{loss - least:+14.4f}")
  lines += ["", *_describe_certainty(fit, flops, n, d)]
  if unique is not None:
    lines += ["", *_describe_repeats(fit.law, flops, n, d, unique)]
  if dial is not None:
    lines += ["", f"{dial[0]}: configs/dense.py:{dial[0]}, the nearest dial; --config.steps sets the tokens"]
  return "\n".join(lines)


def _describe_certainty(fit, flops, n, d):
  law = fit.law
  growth = f"N grows as C^{law.exponent:.3f}, D as C^{1 - law.exponent:.3f}"
  if not fit.laws:
    return [growth, "no intervals: of this law only the constants are known"]
  low, high = fit.interval(lambda law: law.exponent)
  sizes = fit.interval(lambda law: law.optimum(flops)[0])
  _, *losses = fit.predict(n, d)
  spent = 6 * fit.rows[:, 0] * fit.rows[:, 1]
  least, most = spent.min(), spent.max()
  where = "within the span" if least <= flops <= most else (
    f"extrapolated to {flops / most:.3g} times the largest" if flops > most else
    f"extrapolated to 1/{least / flops:.3g} of the least")
  return [f"{growth}; {LEVEL:.0%} intervals: exponent of N {low:.3f} to {high:.3f}, best size "
          f"{short(sizes[0])} to {short(sizes[1])},",
          f"loss of one such run {losses[0]:.4f} to {losses[1]:.4f}; {where} of the budgets that were fitted "
          f"({least:.2g} to {most:.2g} FLOP)"]


def _describe_repeats(law, flops, n, d, unique):
  at = lambda log_n: law.repeated_loss(math.exp(log_n), flops / 6 / math.exp(log_n), unique)
  best = minimize_scalar(at, bounds=(math.log(n) - 7, math.log(n) + 7), method="bounded").x
  m = math.exp(best)
  tell = lambda size: (f"{short(size)}, {flops / 6 / size / unique:.3g} epochs, "
                       f"loss {law.repeated_loss(size, flops / 6 / size, unique):.4f}")
  return [f"of {short(unique)} different tokens (arXiv:2305.16264): {tell(n)}; best then: {tell(m)}"]


def find_dial(n: float) -> tuple[str, int] | None:
  """(name, parameters that multiply) of the dial of configs/dense.py whose size is nearest."""
  for letter, last in LADDERS.items():
    low, high = 1, last
    while low < high:  # The first that is as large.
      middle = (low + high) // 2
      low, high = (low, middle) if count(f"{letter}{middle}") >= n else (middle + 1, high)
    around = [(f"{letter}{k}", count(f"{letter}{k}")) for k in (low - 1, low) if k >= 1]
    name, size = min(around, key=lambda dial: abs(math.log(dial[1] / n)))
    if 0.5 <= size / n <= 2:
      return name, size
  return None


def count(dial: str) -> int:
  with contextlib.redirect_stderr(io.StringIO()):  # Its rules.
    config = read_config(f"{ROOT}/configs/dense.py:{dial}")
  config.model.vocab_size = config.data.tokenizer.vocab_size
  return matrix_parameters(config.model.validate())


def describe_time(flops: float, chip_name: str, n: int, mfu: float, price: float | None) -> str:
  """Raises ValueError: no such chip."""
  chip = get_chip(chip_name)
  hours = flops / (n * chip.flops["bfloat16"] * mfu) / 3600
  chip_hours = hours * n / chip.per_chip
  cost = "" if price is None else f", {chip_hours * price:,.0f} at {price:g} a chip-hour"
  return (f"{n} x {chip_name} at {mfu:.0%} of {chip.flops['bfloat16'] / 1e12:.4g} TFLOP/s (assumed): "
          f"{hours:,.1f} hours, {chip_hours:,.0f} chip-hours{cost}")


def short(number: float) -> str:
  """2.9e9 -> "2.9B"."""
  for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if number >= 0.9995 * size:
      return f"{number / size:.3g}{letter}"
  return f"{number:.3g}"


def parse(argv=None):
  parser = argparse.ArgumentParser(prog="experiments.plan", description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--budget", type=float, metavar="FLOP", help="or chips and hours, below")
  parser.add_argument("--fit", default="chinchilla", help="a name below, or a fit.json; default: %(default)s")
  parser.add_argument("--chip", help=f"one of {', '.join(CHIP)}: python -m train.chips")
  parser.add_argument("--n", type=int, help="devices of --chip")
  parser.add_argument("--hours", type=float, help="in place of --budget: as long as the chips are there")
  parser.add_argument("--mfu", type=float, help=f"share of the chip's bfloat16 peak; default: {MFU}")
  parser.add_argument("--price_per_chip_hour", type=float, help="in any currency")
  parser.add_argument("--unique_tokens", type=float, metavar="TOKENS", help="how much text there is")
  laws = {name: make() for name, make in PUBLISHED.items()}
  constants = lambda law: (f"E {law.E:.4g}, A {law.A:.4g}, B {law.B:.5g}, alpha {law.alpha:.3g}, "
                           f"beta {law.beta:.3g}")
  parser.epilog = EPILOG + "\n".join(f"  {name:10}  {constants(fit.law)}\n{'':14}{fit.source}"
                                     for name, fit in laws.items())
  return parser.parse_args(argv)


def check(args):
  """Raises ValueError: settings that contradict each other, or that are out of range."""
  if (args.chip is None) != (args.n is None):
    raise ValueError("--chip and --n go together, e.g. --chip=v5e --n=256")
  if (args.budget is None) == (args.hours is None):
    raise ValueError("give --budget=FLOP, e.g. --budget=1e21, or --hours with --chip and --n; not both")
  for name in ("hours", "mfu", "price_per_chip_hour"):
    value = getattr(args, name)
    if value is not None and args.chip is None:
      raise ValueError(f"--{name}={value:g} is of chips: it needs --chip and --n, e.g. --chip=v5e --n=256")
  for name in ("budget", "hours", "n", "mfu", "price_per_chip_hour", "unique_tokens"):
    value = getattr(args, name)
    if value is not None and not 0 < value < math.inf:
      raise ValueError(f"--{name}={value:g} must be a number above 0")
  if args.mfu is not None and args.mfu > 1:
    raise ValueError(f"--mfu={args.mfu:g} is a share of the peak, at most 1; nearest valid: "
                     f"{args.mfu / 100 if args.mfu > 1.5 else 1:g}")


def main(argv=None) -> int:
  args = parse(argv)
  try:
    check(args)
    fit, mfu, flops = get_fit(args.fit), args.mfu or MFU, args.budget
    if flops is None:
      flops = args.hours * 3600 * args.n * get_chip(args.chip).flops["bfloat16"] * mfu
    check_optimum(args.fit, fit.law, flops)
    lines = [describe(args.fit, fit, flops, args.unique_tokens)]
    if args.chip is not None:
      lines.append(describe_time(flops, args.chip, args.n, mfu, args.price_per_chip_hour))
  except ValueError as e:
    print(f"experiments.plan: error: {e}", file=sys.stderr)
    return 2
  print("\n".join(lines))
  return 0


if __name__ == "__main__":
  sys.exit(main())

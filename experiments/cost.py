"""python -m experiments.cost train|serve --config=X --chip=v5e --n=8: what it costs, in money and in energy

Modelled, nothing is run; what was measured is given by --mfu, or by tokens a second. Money is in any
currency. A month has 720 hours. Chips' watts are not in the table of chips: --watts says them, with what else
the rented machine draws; --pue is the data centre's factor on it.
"""
import argparse
import math
import sys
import typing

import jax.numpy as jnp

from data.flags import load
from model.count import cache_bytes, count_parameters, decode_bytes_per_token, flops_per_token, looked_up
from model.sharding import abstract_mesh
from model.transformer import abstract_params
from train.chips import CHIP, GIB, get_chip
from train.dry_run import fits, look_ahead
from train.main import check_run
from train.roofline import EFFICIENCY, matrix_parameters

EPILOG = """examples:
  python -m experiments.cost train --config=configs/dense_8b.py --chip=v5p --n=64 --config.mesh.fsdp=64 \\
      --price_per_chip_hour=4.2 --watts=500
  python -m experiments.cost serve --config=configs/dense_8b.py --chip=v5e --n=4 --price_per_chip_hour=1.2 \\
      --prompt=2000 --output=300 --api_input=0.2 --api_output=0.6
  python -m experiments.cost serve ... --output_tokens_per_s=2400        measured, of all devices together
"""
MONTH_HOURS = 720
BATCH = 64  # Requests decoded together, where memory allows.


class Bill(typing.NamedTuple):
  """Of so many chips for so long."""
  chip_hours: float
  price: float | None
  kwh: float | None

  def __str__(self):
    said = [f"{number(self.chip_hours)} chip-hours"]
    said += [] if self.price is None else [f"{number(self.price)} in money"]
    said += [] if self.kwh is None else [f"{number(self.kwh)} kWh"]
    return ", ".join(said)


def number(value: float) -> str:
  """"93,693", "0.2694"."""
  return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def bill(chip_hours: float, price: float | None, watts: float | None, pue: float) -> Bill:
  """`price` of a chip for an hour; kWh = chip-hours x watts x PUE / 1000."""
  return Bill(chip_hours, None if price is None else chip_hours * price,
              None if watts is None else chip_hours * watts * pue / 1e3)


def break_even(monthly: float, per_request: float) -> float:
  """Requests a month from which one's own machines cost less than an API."""
  return monthly / per_request


# Training.

def describe_train(cfg, args) -> str:
  chip, outlook = get_chip(args.chip), look_ahead(cfg.validate(args.n), get_chip(args.chip), args.n)
  flops, mfu = outlook.step.model_flops * cfg.steps, args.mfu or outlook.step.mfu
  hours = flops / (args.n * chip.flops["bfloat16"] * mfu) / 3600
  tokens = cfg.steps * cfg.batch_size * cfg.seq_len
  memory, room = outlook.memory.peak / GIB, chip.hbm_bytes / GIB
  return "\n".join([
    f"training {args.config} on {args.n} x {args.chip}: modelled, nothing was run",
    f"{flops:.3g} FLOP: {tokens:.3g} tokens of {flops / tokens:.3g} (attention counted, remat not)",
    f"{number(hours)} hours at {mfu:.1%} of the peak ({'given' if args.mfu else 'modelled'})",
    f"{bill(hours * args.n / chip.per_chip, args.price_per_chip_hour, args.watts, args.pue)}",
    f"memory {memory:.2f} of {room:.2f} GiB a device" + (
      "" if fits(outlook.memory, chip) else ": does NOT fit; train.main --dry_run says what helps")])


# Serving.

class Service(typing.NamedTuple):
  """Of all devices together."""
  weights: float  # Bytes.
  request: float  # Bytes of the keys and values of one.
  batch: int
  input_rate: float  # Tokens/s while it reads,
  output_rate: float  # and while it writes.


def serve(cfg, chip, n: int, prompt: int, output: int, batch: int | None) -> Service:
  """The rates are those of the roofline at train.roofline's efficiency, evenly split over n devices, without
  what passes between them.

  Raises:
    ValueError: the weights, or `batch` requests, do not fit.
  """
  m, width = cfg.model, jnp.dtype(cfg.model.compute_dtype).itemsize
  total = sum(count_parameters(abstract_params(m, abstract_mesh(fsdp=1))[1]).values())
  weights, request, room = total * width, cache_bytes(m, prompt + output), n * chip.hbm_bytes
  most = int((room - weights) // request)
  if most < (batch or 1):
    need = math.ceil((weights + (batch or 1) * request) / chip.hbm_bytes)
    raise ValueError(f"--n={n}: weights of {weights / GIB:.3g} GiB and {batch or 1} requests of "
                     f"{request / GIB:.3g} GiB are more than {room / GIB:.4g} GiB; nearest valid: --n={need}")
  batch = batch or min(BATCH, most)
  peak, bandwidth = (n * EFFICIENCY * rate for rate in (chip.flops["bfloat16"], chip.hbm_bandwidth))
  active = matrix_parameters(m)
  read = peak / (flops_per_token(m, prompt, active + looked_up(m)) / 3)
  n_bytes = decode_bytes_per_token(m, total, batch, prompt + output // 2)
  return Service(weights, request, batch, read, min(bandwidth / n_bytes, peak / (2 * active)))


def describe_serve(cfg, args) -> str:
  chip = get_chip(args.chip)
  found = serve(cfg.validate(), chip, args.n, args.prompt, args.output, args.batch)
  rates = {"input": args.input_tokens_per_s or found.input_rate,
           "output": args.output_tokens_per_s or found.output_rate}
  chips = args.n / chip.per_chip
  seconds = args.prompt / rates["input"] + args.output / rates["output"]
  per = lambda s: bill(chips * s / 3600, args.price_per_chip_hour, args.watts, args.pue)
  lines = [f"serving {args.config} on {args.n} x {args.chip}, requests of {args.prompt} tokens in and "
           f"{args.output} out: modelled, nothing was run",
           f"memory: weights {found.weights / GIB:.3g} GiB, a request {found.request / 2**20:.4g} MiB of "
           f"keys and values; {found.batch} at a time"]
  for kind, rate in rates.items():
    source = "given" if getattr(args, f"{kind}_tokens_per_s") else "modelled, at most"
    lines.append(f"{kind}: {rate:,.0f} tokens/s, {rate / chips:,.0f} a chip ({source}); 1M tokens: "
                 f"{per(1e6 / rate)}")
  lines.append(f"a request: {1e3 * seconds:.4g} ms of the machine; 1,000: {per(1000 * seconds)}")
  most = MONTH_HOURS * 3600 / seconds
  lines.append(f"a month: {per(MONTH_HOURS * 3600)}, for up to {most:,.0f} requests")
  if (api := api_price(args)) is not None:
    requests = break_even(per(MONTH_HOURS * 3600).price, api)
    lines.append(f"an API at {api:.4g} a request costs as much at {requests:,.0f} requests a month"
                 + ("" if requests <= most else f", more than this machine answers: the API is cheaper by "
                    f"{requests / most:.3g} times at its best"))
  return "\n".join(lines)


def api_price(args) -> float | None:
  """Of a request. Raises ValueError: half a price."""
  halves = args.api_input, args.api_output
  if args.api_price_per_request is not None or halves != (None, None):
    if args.price_per_chip_hour is None:
      raise ValueError("an API's price is compared with that of chips: give --price_per_chip_hour")
    if (args.api_price_per_request is None) == (halves == (None, None)) or halves.count(None) == 1:
      raise ValueError("give --api_price_per_request, or --api_input and --api_output, of 1M tokens")
  if args.api_price_per_request is not None:
    return args.api_price_per_request
  return None if halves == (None, None) else (args.prompt * halves[0] + args.output * halves[1]) / 1e6


# The command line.

def parse(argv):
  parser = argparse.ArgumentParser(prog="experiments.cost", description=__doc__, epilog=EPILOG,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=("train", "serve"))
  parser.add_argument("--chip", help=f"one of {', '.join(CHIP)}: python -m train.chips")
  parser.add_argument("--n", type=int, help="devices; of serve: that hold one copy of the weights")
  parser.add_argument("--price_per_chip_hour", type=float)
  parser.add_argument("--watts", type=float, help="that a chip draws, its share of the host with it")
  parser.add_argument("--pue", type=float, default=1.1, help="default: %(default)s, assumed")
  parser.add_argument("--mfu", type=float, help="train: share of the bfloat16 peak; default: modelled")
  for name, tokens, what in (("prompt", 1000, "in a request"), ("output", 200, "out of it")):
    parser.add_argument(f"--{name}", type=int, default=tokens,
                        help=f"serve: tokens {what}; default: {tokens}")
  parser.add_argument("--batch", type=int, help=f"serve: requests at a time; default: {BATCH}, or what fits")
  for kind in ("input", "output"):
    parser.add_argument(f"--{kind}_tokens_per_s", type=float, help="serve: of all devices; default: modelled")
    parser.add_argument(f"--api_{kind}", type=float, help=f"serve: an API's price of 1M {kind} tokens")
  parser.add_argument("--api_price_per_request", type=float, help="serve: in place of the two")
  return load(parser, argv, checks=(check_run,), elsewhere=True)


def main(argv=None) -> int:
  cfg, args = parse(argv)
  try:
    if args.chip is None or args.n is None:
      raise ValueError("--chip and --n say on what; e.g. --chip=v5e --n=8")
    for name, value in vars(args).items():
      if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < math.inf:
        raise ValueError(f"--{name}={value:g} must be a number above 0")
    if (args.mfu or 0) > 1 or args.pue < 1:
      raise ValueError(f"--mfu={args.mfu} is a share of the peak, --pue={args.pue:g} a factor of at least 1")
    print({"train": describe_train, "serve": describe_serve}[args.what](cfg, args))
    if args.watts is None:
      print("energy: not known without --watts")
  except ValueError as e:
    print(f"experiments.cost: error: {e}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())

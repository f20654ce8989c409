"""python -m experiments.coordinates --config=configs/tiny.py [--config.model.parametrization=mup ...]

The coordinate check (Yang et al., arXiv:2203.03466, appendix D.1): how much a few steps change what the model
computes, at several widths. Where that is the same at all widths, so are the learning rates that suit them;
where it grows with the width, a rate that suits a small model is too high for a large one.

Every width is the model of the config with more heads of the same size and wider feed-forwards, in float32,
trained for a few steps at the config's optim.lr, without a warm-up, on the first rows of its data. Printed:
the root of the mean square of the change of each kind of activation, and the slope of its logarithm over that
of the width. Exit codes: 0 all slopes are within --limit of 0, 1 some are not, 2 a mistake in the settings.
"""
import argparse
import copy
import dataclasses
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data.flags import load
from data.pipeline import Rows
from data.prepare import prepare
from infer.compile_cache import CompileCache
from model.attention import GQAttention
from model.config import ModelConfig
from model.sharding import make_mesh
from model.transformer import check_names, layer_place
from train.config import TrainConfig
from train.feed import Feed
from train.optim import check_optimizer
from train.plot import COLOURS, STYLE
from train.step import init_state, make_train_step

EPILOG = """examples:
  python -m experiments.coordinates --config=configs/tiny.py --config.optim.lr=2e-3       grows with the width
  python -m experiments.coordinates --config=configs/tiny.py --config.optim.lr=2e-3 --seeds=4 \\
      --config.model.parametrization=mup --config.model.mup_base_width=64                 flat
  python -m experiments.coordinates --config=configs/moe_tiny.py --widths=64,128 --seeds=1 --out=moe.png"""
# Compiled once and run a few times: without LLVM's passes it is ready twice as soon.
QUICK = dict(compiler_options={"xla_backend_optimization_level": 0})
KINDS = ("embedding", "attention logits", "attention", "feed-forward", "residual", "logits")


def parse(argv=None):
  parser = argparse.ArgumentParser(prog="experiments.coordinates", description=__doc__, epilog=EPILOG,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--widths", default="64,128,256,512", metavar="W,W,...",
                      help="of d_model; default: %(default)s")
  parser.add_argument("--steps", type=int, default=5, metavar="N", help="default: %(default)s")
  parser.add_argument("--seeds", type=int, default=3, metavar="N",
                      help="other first weights, on the same rows; default: %(default)s")
  parser.add_argument("--limit", type=float, default=0.1, help="of a slope, up or down; default: %(default)s")
  parser.add_argument("--out", type=pathlib.Path, metavar="FILE.png", help="a picture; default: none")
  return load(parser, argv, checks=(lambda cfg: check_names(cfg.model),))


def widen(model: ModelConfig, width: int) -> ModelConfig:
  """A validated model at another width, in float32: more heads of the same size, or fewer.

  Raises:
    ValueError: the width makes no whole number of heads, with the nearest that does.
  """
  heads = math.gcd(model.n_heads, model.n_kv_heads)
  step = model.d_model // math.gcd(model.d_model, heads)
  if width % step or not width:
    low = width // step * step
    raise ValueError(f"--widths={width} is not a multiple of {step}, by which model.d_model={model.d_model} "
                     f"has whole heads; nearest valid: {', '.join(str(w) for w in (low, low + step) if w)}")
  scaled = lambda n: None if n is None else n * width // model.d_model
  sizes = {name: scaled(getattr(model, name)) for name in ("n_heads", "n_kv_heads", "d_ff", "d_expert")}
  return dataclasses.replace(model, d_model=width, **sizes, precision="fp32", param_dtype="float32",
                             compute_dtype="float32").validate()


def at_width(cfg: TrainConfig, width: int, seed: int, steps: int) -> TrainConfig:
  cfg = copy.deepcopy(cfg)
  cfg.model, cfg.init_seed = widen(cfg.model, width), seed
  cfg.optim.schedule, cfg.optim.warmup_steps = "constant", 0
  cfg.steps = steps
  return cfg


def activations(graphdef, params, batch) -> dict:
  """kind -> what the model computes, of all layers on top of each other: the forward pass without a scan."""
  model, found = nnx.merge(graphdef, params), {kind: [] for kind in KINDS}
  cfg = model.cfg
  tokens, pos, segment = model._split(*(batch[name] for name in ("tokens", "positions", "segments")))

  def seen(kind, layer):
    def call(x_BTD, *rest):
      if isinstance(layer, GQAttention):
        q_BTNH, k_BTKH, _ = layer.project(x_BTD, pos)
        k_BSKH = jax.sharding.reshard(k_BTKH, cfg.rules("batch", None, None, None))
        k_BSNH = jnp.repeat(k_BSKH, cfg.n_heads // cfg.n_kv_heads, axis=2,
                            out_sharding=cfg.rules("batch", None, "heads", None))
        found["attention logits"].append(cfg.scale * jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH))
      out, more = layer(x_BTD, *rest)
      found[kind].append(out)
      return out, more
    return call

  x_BTD = model._embed(tokens, pos)
  found["embedding"].append(x_BTD)
  for n in range(cfg.n_layers):
    name, i, pick = layer_place(cfg, n)
    block_def, state = nnx.split(getattr(model, name)[i])
    block = nnx.merge(block_def, jax.tree.map(pick, state))
    block.attention, block.ffn = seen("attention", block.attention), seen("feed-forward", block.ffn)
    x_BTD = block(x_BTD, pos, segment)[0]
  found["residual"].append(x_BTD)
  found["logits"].append(model.logits(model._final(x_BTD)))
  return {kind: jnp.stack(arrays) for kind, arrays in found.items() if arrays}


def measure(cfgs: list[TrainConfig], mesh, batches) -> dict[str, list[float]]:
  """kind -> the RMS change in the first batch's activations by one step on each batch, for each of the
  configs, which differ in their init_seed only."""
  changes, step = {}, None
  with jax.set_mesh(mesh):
    for cfg in cfgs:
      graphdef, state = init_state(cfg, mesh)
      if step is None:
        step = jax.jit(make_train_step(cfg, graphdef, state.params), donate_argnums=0, **QUICK)
        look = jax.jit(lambda params, batch, graphdef=graphdef: activations(graphdef, params, batch), **QUICK)
      before = look(state.params, batches[0])
      for batch in batches:
        state, _ = step(state, batch)
      after = look(state.params, batches[0])
      for kind in before:
        difference = np.asarray(after[kind], np.float64) - np.asarray(before[kind], np.float64)
        changes.setdefault(kind, []).append(float(np.sqrt(np.mean(difference**2))))
  return {kind: changes[kind] for kind in KINDS if kind in changes}


def slopes(changes: dict[int, dict[str, list[float]]]) -> dict[str, float]:
  """width -> kind -> a change a seed, as kind -> the slope of the line of least squares through the means of
  the logarithms."""
  widths = np.log(list(changes))
  means = {kind: [np.mean(np.log(changes[w][kind])) for w in changes] for kind in changes[min(changes)]}
  return {kind: float(np.polyfit(widths, mean, 1)[0]) for kind, mean in means.items()}


def describe(cfg, changes, found, limit) -> list[str]:
  head = f"{'change, RMS':18}" + "".join(f"{width:>10}" for width in changes) + f"{'slope':>9}"
  lines = [f"{cfg.model.parametrization}: {cfg.optim.name} at lr {cfg.optim.lr:g}, mean of "
           f"{len(next(iter(changes[min(changes)].values())))} seeds at each width", head]
  for kind, slope in found.items():
    means = [math.exp(np.mean(np.log(by_kind[kind]))) for by_kind in changes.values()]
    lines.append(f"{kind:18}" + "".join(f"{mean:10.2e}" for mean in means) + f"{slope:+9.2f}"
                 + ("" if abs(slope) <= limit else f"  beyond {limit:g}"))
  return lines


def draw(cfg, changes, found, path):
  """One line a kind, over the width, both logarithmic; every seed a dot."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  with plt.rc_context(STYLE):
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for (kind, slope), colour in zip(found.items(), COLOURS):
      values = np.array([by_kind[kind] for by_kind in changes.values()])
      axes.plot(list(changes), np.exp(np.log(values).mean(1)), color=colour, label=f"{kind} {slope:+.2f}")
      axes.plot(list(changes), values, color=colour, linestyle="", marker="o", markersize=3, alpha=0.4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(changes), [str(width) for width in changes])
    axes.set_xlabel("d_model")
    axes.set_ylabel("change, RMS")
    axes.set_title(f"{cfg.model.parametrization}: slopes of changes over the width")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)
    plt.close(figure)


def read_batches(cfg, mesh, steps) -> list[dict]:
  rows = Rows(prepare(cfg.data), cfg.data, seq_len=cfg.seq_len, batch_size=cfg.batch_size, seed=cfg.seed)
  feed = Feed(cfg, mesh)
  return [feed.put({name: np.stack([rows.row(step, slot)[name] for slot in feed.slots])
                    for name in feed.abstract}) for step in range(steps)]


def main(argv=None) -> int:
  cfg, args = parse(argv)
  try:
    for name, least in (("steps", 1), ("seeds", 1)):
      if getattr(args, name) < least:
        raise ValueError(f"--{name}={getattr(args, name)} must be at least {least}; nearest valid: {least}")
    try:
      widths = sorted({int(word) for word in args.widths.split(",")})
    except ValueError:
      raise ValueError(f"--widths={args.widths} is to be numbers, such as 64,128,256") from None
    if len(widths) < 2:
      raise ValueError(f"--widths={args.widths} has no slope; nearest valid: {widths[0]},{2 * widths[0]}")
    runs = {width: [at_width(cfg, width, seed, args.steps) for seed in range(args.seeds)] for width in widths}
    for one, *_ in runs.values():
      one.validate(jax.device_count())
      check_optimizer(one)
    mesh = make_mesh(**dataclasses.asdict(cfg.mesh))
    batches = read_batches(cfg, mesh, args.steps)
  except ValueError as e:
    print(f"experiments.coordinates: error: {e}", file=sys.stderr)
    return 2
  CompileCache()  # Of several seeds, all but the first find their programs there.
  changes = {}
  for width, cfgs in runs.items():
    print(f"d_model={width}", file=sys.stderr)
    changes[width] = measure(cfgs, mesh, batches)
  found = slopes(changes)
  print(*describe(cfg, changes, found, args.limit), sep="\n")
  if args.out:
    draw(cfg, changes, found, args.out)
    print(args.out)
  return 0 if all(abs(slope) <= args.limit for slope in found.values()) else 1


if __name__ == "__main__":
  sys.exit(main())

"""python -m train.trial --config=X [--share=0.05]: the first steps of a run, before the whole is paid for.

Trains the first share of the steps with the settings of the whole run, in a folder that is then removed, and
checks
  memory      of a step, as measured, against the plan (train.memory) and what the device has
  gradients   of each parameter, and each layer of it: finite, and not zero
  loss        below the entropy of the single tokens of the data, which needs no model
  checkpoint  what is saved and restored is the same to the bit
  data        the prepared files have the hashes and counts of their manifest; there is text to evaluate on
Says how long the whole run takes by these steps. Exit codes: 0 all hold, 1 one does not, 2 a mistake in the
settings.
"""
import argparse
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np

from data.flags import as_json, load
from data.pipeline import make_batches
from data.prepare import prepare
from train.checkpoint import Checkpointer
from train.chips import find_chip
from train.dry_run import time_text
from train.evaluate import Evaluation
from train.feed import Feed
from train.host import Stopwatch, is_cpu_host, keep_memory, process_age, start_distributed
from train.loop import prepare_run, step_bytes
from train.main import check_run
from train.memory import estimate_memory
from train.optim import path_name
from train.step import abstract_state, init_state, make_eval_step, make_gradient, make_train_step
from train.together import Apart

LEAST_STEPS = 20  # Whatever the share.
WARM = 3  # Steps that are not timed.
LAST = 5  # Steps whose median is the loss.
MOST_TOKENS = 500_000  # Of which the entropy is taken.
# How much more than planned is right. The plan is of XLA:TPU; a CPU takes 1.4 to 2.2 times as much, of four
# of configs/. GPUs and TPUs: not tried.
MARGIN = {"tpu": 0.1, "gpu": 0.25, "cpu": 1.5}


class Check(typing.NamedTuple):
  name: str
  ok: bool
  text: str  # With figures.


class Times(typing.NamedTuple):
  """In seconds."""
  start: float  # From the command to the first step.
  step: float
  evaluation: float
  saving: float  # That training waits for.


def check_memory(measured: float, planned: float, available: float, platform: str) -> Check:
  """Bytes a device."""
  gib = 2**30
  text = f"{measured / gib:.3f} GiB a device, planned {planned / gib:.3f}, there are {available / gib:.2f}"
  if measured > available or planned > available:
    return Check("memory", False, text + ": it does not fit; python -m train.main --dry_run says what would")
  limit = 1 + MARGIN[platform]
  return Check("memory", measured <= limit * planned,
               text + f": x {measured / planned:.2f}, at most x {limit:.2f}")


def check_gradients(norms: dict) -> Check:
  """`norms`: name -> the norm of the gradient, of each layer where there are layers."""
  wrong = []
  for name, norm in norms.items():
    for layer, value in enumerate([norm] if norm.ndim == 0 else norm):
      if not (math.isfinite(value) and value > 0):
        where = name if norm.ndim == 0 else f"{name}, layer {layer}"
        wrong.append(f"{where}: {'zero' if value == 0 else 'not finite'}")
  if wrong:
    more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return Check("gradients", False, "; ".join(wrong[:3]) + more)
  smallest = min(norms, key=lambda name: norms[name].min())
  return Check("gradients", True, f"of all {len(norms)} parameters; the smallest "
                                  f"{norms[smallest].min():.2g}, of {smallest}")


def check_loss(losses: list[float], entropy: float) -> Check:
  """Both in nats a token."""
  last = statistics.median(losses[-LAST:])
  text = f"{losses[0]:.3f} to {last:.3f} in {len(losses)} steps; the tokens by themselves {entropy:.3f}"
  return Check("loss", math.isfinite(last) and last < entropy, text)


def check_checkpoint(before: dict, after: dict) -> Check:
  """Name -> the arrays of this process's shards, of both."""
  same = lambda a, b: a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
  wrong = [name for name in before if len(before[name]) != len(after[name])
           or not all(map(same, before[name], after[name]))]
  if wrong:
    return Check("checkpoint", False, f"{len(wrong)} of {len(before)} arrays differ, e.g. {wrong[0]}")
  size = sum(np.sum([a.nbytes for a in arrays]) for arrays in before.values())
  return Check("checkpoint", True, f"{len(before)} arrays, {size / 1e6:.1f} MB, equal to the bit")


def check_data(prepared, evaluates: bool) -> Check:
  """`evaluates`: there must be text to evaluate on."""
  for source in prepared.sources:
    try:
      source.verify()
    except (ValueError, OSError) as e:
      return Check("data", False, f"{source.name}: {e}")
    for split in ("train", "val"):
      lengths = source.lengths(split)
      for what, found in (("documents", len(lengths)), ("tokens", int(lengths.sum()))):
        if found != source.count(split, what):
          return Check("data", False, f"{source.name}: {source.count(split, what)} {what} of {split} by "
                                      f"{source.folder}/manifest.json, {found} in the files")
  train, val = (prepared.count(split, "tokens") for split in ("train", "val"))
  text = f"{train:,} tokens to train on, {val:,} to evaluate; content {prepared.content_hash[:12]}"
  if not train or evaluates and not val:
    return Check("data", False, text + "; nearest valid: a larger data.val_fraction, or 0")
  return Check("data", True, text)


def unigram_entropy(rows, steps: int) -> float:
  """Nats a token, of the tokens that the first `steps` steps predict, up to MOST_TOKENS."""
  counts, seen = np.zeros(0, np.int64), 0
  for step, slot in ((step, slot) for step in range(steps) for slot in range(rows.batch_size)):
    row = rows.row(step, slot)
    found = np.bincount(row["targets"][row["weights"] > 0])
    counts = np.pad(counts, (0, max(len(found) - len(counts), 0)))
    counts[:len(found)] += found
    seen += found.sum()
    if seen > MOST_TOKENS:
      break
  shares = counts[counts > 0] / seen
  return float(-(shares * np.log(shares)).sum())


def estimate(cfg, times: Times) -> float:
  """Seconds of the whole run, without what is made after it (report.md)."""
  due = lambda every: (cfg.steps - 1) // every if every else 0
  evaluations = 2 + due(cfg.eval.every) if times.evaluation else 0  # The first and the last step are.
  saves = 2 + due(cfg.checkpoint.every)
  return times.start + cfg.steps * times.step + evaluations * times.evaluation + saves * times.saving


# The trial itself.

def trial(cfg, workdir, steps: int, clock) -> tuple[list[Check], Times | None]:
  """
  Returns:
    The checks, and the times; None where a check failed before there were any.

  Raises:
    ValueError: the user's mistake: the settings against the devices.
  """
  try:
    prepared = prepare(cfg.data, log=lambda *_: None)
    data = check_data(prepared, bool(cfg.data.val_fraction))
  except (ValueError, OSError, RuntimeError) as e:
    data = Check("data", False, str(e))
  if not data.ok:
    return [data], None
  run = prepare_run(cfg, clock)
  with jax.set_mesh(run.mesh):
    checks, times = _train(cfg, pathlib.Path(workdir), run, steps, clock)
  return [*checks, data], times


def _train(cfg, workdir, run, steps, clock):
  feed = Feed(cfg, run.mesh)
  graphdef, abstract = abstract_state(cfg, run.mesh)
  with clock.within("compiling"):
    jitted = jax.jit(make_train_step(cfg, graphdef, abstract.params), donate_argnums=0)
    step_fn = jitted.lower(abstract, feed.abstract).compile()
  memory = _memory(cfg, run, abstract, step_fn)
  if not memory.ok:
    return [memory], None
  state, losses, seconds = init_state(cfg, run.mesh)[1], [], []
  start = process_age()
  batches = feed.batches(make_batches(run.rows, start_step=0, slots=feed.slots, prefetch=cfg.data.prefetch),
                         clock)
  for _ in range(steps):
    begin = time.perf_counter()
    batch = next(batches)
    state, metrics = step_fn(state, batch)
    losses.append(float(metrics["loss"]))
    seconds.append(time.perf_counter() - begin)
  evaluation_s = _evaluate(cfg, run, feed, graphdef, abstract, state, clock)
  gradients = check_gradients(jax.device_get(make_gradient_norms(cfg, graphdef)(state.params, batch)))
  checkpoint, saving_s = _round_trip(cfg, workdir, abstract, state, steps, clock)
  times = Times(start, statistics.median(seconds[min(WARM, steps - 1):]), evaluation_s, saving_s)
  return [memory, gradients, check_loss(losses, unigram_entropy(run.rows, steps)), checkpoint], times


def _memory(cfg, run, abstract, step_fn) -> Check:
  device, n = jax.local_devices()[0], jax.device_count()
  chip, available = find_chip(device.device_kind), None
  if device.platform == "cpu":
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
  elif stats := device.memory_stats():
    available = stats.get("bytes_limit")
  available = available or (chip.hbm_bytes if chip else math.inf)
  planned = estimate_memory(cfg, n, abstract, on=device.platform).peak
  return check_memory(step_bytes(step_fn), planned, available, device.platform)


def _evaluate(cfg, run, feed, graphdef, abstract, state, clock) -> float:
  """Seconds of an evaluation, compiling left out; 0 where there is none."""
  evaluation = Evaluation(cfg, run.prepared, feed, clock)
  if evaluation.rows is None:
    return 0.0
  eval_fn = jax.jit(make_eval_step(cfg, graphdef)).lower(
    abstract.ema or abstract.params, feed.abstract | {"bytes": feed.abstract_bytes}).compile()
  evaluation(0, state, eval_fn, lambda step, values: None, types.SimpleNamespace(received=None))
  return evaluation.seconds


def make_gradient_norms(cfg, graphdef):
  """(params, batch) -> name -> norm of its gradient, [layers] where there are layers."""
  gradient = make_gradient(cfg, graphdef)

  def norms(params, batch):
    found = {}
    for path, g in jax.tree_util.tree_flatten_with_path(gradient(params, batch))[0]:
      name = path_name(path)
      axes = tuple(range(1 if name.startswith("blocks/") else 0, g.ndim))  # The first is the layer.
      if not name.endswith("/balance_bias"):  # Moved by train.balance.
        found[name] = jax.sharding.reshard(jnp.sqrt(jnp.square(g).sum(axes)), jax.P())
    return found

  return jax.jit(norms)


def _round_trip(cfg, workdir, abstract, state, step, clock) -> tuple[Check, float]:
  """The check, and the seconds that training would wait for the save."""
  def shards(state):
    return {path_name(path): [np.asarray(shard.data) for shard in a.addressable_shards]
            for path, a in jax.tree_util.tree_flatten_with_path(state)[0]}

  before = shards(state)
  begin = time.perf_counter()
  checkpoints = Checkpointer(workdir / "checkpoints", cfg.checkpoint, clock)
  checkpoints.save(step, state, {"config": as_json(cfg)})
  seconds = time.perf_counter() - begin
  checkpoints.wait()
  del state  # There may be no room for two.
  after = shards(Checkpointer(workdir / "checkpoints", cfg.checkpoint, clock).restore(abstract).state)
  return check_checkpoint(before, after), seconds


def describe(checks: list[Check], times: Times | None, cfg) -> str:
  lines = [f"{'ok' if check.ok else 'FAILED':7}{check.name:11} {check.text}" for check in checks]
  missing = [name for name in ("memory", "gradients", "loss", "checkpoint", "data")
             if name not in {check.name for check in checks}]
  lines += [f"{'-':7}{name:11} not looked at, for what failed" for name in missing]
  if times:
    total = time_text(estimate(cfg, times))
    lines.append(f"the whole run: {total} by these steps: start {times.start:.3g} s, {cfg.steps:,} steps of "
                 f"{times.step:.3g} s, an evaluation {times.evaluation:.3g} s, a save {times.saving:.3g} s")
  return "\n".join(lines)


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog="train.trial", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--share", type=float, default=0.05,
                      help=f"of the steps, at least {LEAST_STEPS} of them; default: %(default)s")
  parser.add_argument("--workdir", help="where all hosts write a checkpoint; default: a temporary one")
  cfg, args = load(parser, argv, checks=(check_run,))
  if not 0 < args.share <= 1:
    print(f"train.trial: error: --share={args.share} must be in (0, 1]; nearest valid: 0.05", file=sys.stderr)
    return 2
  clock = Stopwatch("imports", process_age())
  steps = min(cfg.steps, max(LEAST_STEPS, math.ceil(args.share * cfg.steps)))
  try:
    if is_cpu_host():
      keep_memory()
    start_distributed(cfg.stall_s)
    with tempfile.TemporaryDirectory(prefix="trial-", dir=args.workdir) as folder:
      checks, times = trial(cfg, folder, steps, clock)
  except (ValueError, PermissionError) as e:
    print(f"train.trial: error: {e}", file=sys.stderr)
    return 2
  except Apart as e:
    print(f"train.trial: failed: {e}", file=sys.stderr)
    return 1
  print(describe(checks, times, cfg))
  return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
  sys.exit(main())

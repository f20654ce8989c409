"""python -m train.plan --config=X --chip=v5p --n=64 [--slices=2] [--compile=3] [--top=5]

Which mesh, remat and number of micro-batches make the run fastest on these devices: every mesh that divides
them is tried against the arithmetic of train/roofline.py and train/memory.py. Nothing runs: times are
modelled. --compile asks the TPU compiler about the best (needs libtpu, minutes each).
Exit codes: 0 a plan, 1 nothing fits, 2 a mistake in the settings.
"""
import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import subprocess
import sys

from data.flags import load
from model.config import PRECISION
from model.sharding import MESH_AXES
from train.chips import CHIP, GIB, get_chip, torus
from train.config import MeshConfig
from train.memory import estimate_memory
from train.roofline import WEIGHT_AXES, estimate_step

EPILOG = """examples:
  python -m train.plan --config=configs/dense_8b.py --chip=v5p --n=64
  python -m train.plan --config=configs/dense_8b.py --chip=v5e --n=512 --slices=2   the slow axis?
  python -m train.plan --config=configs/dense_8b.py --chip=v6e --n=64 --precision=bf16,pure_bf16
"""
MOST_MICROBATCHES = 16
REMATS = ("none", "dots", "outputs", "full")  # From most memory to least.
MICROBATCHES = (1, 2, 4, 8)  # Of a pipeline, times its stages.
SPLIT_RESIDUAL = ("seq", "tensor")  # Norms and sums split over "tensor" too: less memory.
# The config's own choice is not asked, and need not fit the number of devices.
RESET = (*(f"mesh.{axis}={-1 if axis == 'fsdp' else 1}" for axis in MESH_AXES), "mesh.slices=1",
         "mesh.slice_axis=data", "accum_steps=1")
SAME = 0.002  # Relative: steps that are so alike go by what they send, then by what they hold.


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
  overrides: tuple[str, ...]  # "a.b=v", what to set besides the config as it is given.
  cfg: object  # With them set.
  step: object  # train.roofline.Estimate
  peak: float  # Bytes of memory of one device.

  @property
  def sizes(self) -> dict[str, int]:
    return {axis: getattr(self.cfg.mesh, axis) for axis in MESH_AXES}

  @property
  def settings(self) -> str:
    cfg = self.cfg
    words = [" ".join(f"{a}={s}" for a, s in self.sizes.items() if s > 1) or "one device"]
    if "tensor" in cfg.model.rules.residual and cfg.mesh.tensor > 1:
      words.append("residual over tensor")
    words.append(f"remat {cfg.model.remat}")
    micro = cfg.model.pipeline_microbatches if cfg.mesh.stage > 1 else cfg.accum_steps
    return ", ".join(words + [f"{micro} micro-batches"] * (micro > 1))


@dataclasses.dataclass(slots=True)
class Search:
  """What was found.

  Attributes:
    best: the fastest plan of each mesh that fits, fastest first; of the slower meshes not all.
    too_large: the fastest plan of each mesh that was looked at and does not fit, fastest first.
    tried, divided: meshes with their settings; those that divide what they split.
  """
  best: list
  too_large: list
  tried: int
  divided: int


def search(cfg, chip, n: int, *, slices: int = 1, precisions=(None,), overlapped=WEIGHT_AXES,
           enough: int = 10) -> Search:
  """
  Args:
    cfg: a TrainConfig, validated for no particular number of devices.
    precisions: to choose from; None: the config's own.
    overlapped: as of `estimate_step`.
    enough: meshes that fit, after which slower ones are looked at only for the axes that none of them has.

  Raises:
    ValueError: the chip comes in no slice of n / slices.
  """
  if n % slices:
    raise ValueError(f"--n={n} is not a multiple of --slices={slices}; nearest valid --n: "
                     f"{', '.join(str(m) for m in (n // slices * slices, (n // slices + 1) * slices) if m)}")
  torus(chip, n // slices)
  estimate = functools.partial(estimate_step, chip=chip, n=n, overlapped=overlapped)
  groups, tried = [], 0
  for overrides, base in _bases(cfg, n, slices, precisions):
    tried += 1
    with contextlib.suppress(ValueError):
      base.validate_mesh(n)
      groups.append((estimate(base).step_s, len(groups), overrides, base))
  best, too_large, wanted = {}, {}, {a for a in MESH_AXES if a != "expert" or cfg.model.ffn == "moe"}
  for lower, _, overrides, base in sorted(groups):  # Nothing of a group is faster than its base.
    key = (*(getattr(base.mesh, axis) for axis in MESH_AXES), base.mesh.slice_axis)
    times = sorted(plan.step.step_s for plan in best.values())
    if len(times) >= enough and lower > times[enough - 1]:
      wanted -= {a for plan in best.values() for a, size in plan.sizes.items() if size > 1}
      if not any(getattr(base.mesh, axis) > 1 for axis in wanted):
        continue
    if key in best and best[key].step.step_s <= lower:
      continue
    plan, fits = _fastest(overrides, base, chip, n, estimate)
    known = best if fits else too_large
    known[key] = min(known.get(key, plan), plan, key=lambda plan: plan.step.step_s)
  too_large = [plan for key, plan in too_large.items() if key not in best]
  return Search(_ranked(best.values()), _ranked(too_large), tried, len(groups))


def _fastest(overrides, base, chip, n, estimate):
  """(the fastest plan of a mesh that fits, True), or (the one that lacks least, False)."""
  most = MOST_MICROBATCHES if base.mesh.stage == 1 else 1  # A pipeline's micro-batches do the same.
  accums, plans = [k for k in range(1, most + 1) if base.batch_size % k == 0], []
  for accum, remat in itertools.product(accums, REMATS):
    changed = dataclasses.replace(base, accum_steps=accum, model=dataclasses.replace(base.model, remat=remat))
    with contextlib.suppress(ValueError):
      changed.validate_mesh(n)
      plans.append((estimate(changed).step_s, accum, REMATS.index(remat), changed))
  plan = lambda changed: Plan(
      (*overrides, f"model.remat={changed.model.remat}", f"accum_steps={changed.accum_steps}"), changed,
      estimate(changed), estimate_memory(changed, n).peak)
  smallest = plan(max(plans, key=lambda item: item[1:3])[3])
  if smallest.peak > chip.hbm_bytes:
    return smallest, False
  refused = []  # What holds as much as one of these, or more, does not fit either.
  for _, accum, remat, changed in sorted(plans, key=lambda item: item[:3]):
    if not any(accum <= a and remat <= r for a, r in refused):
      found = plan(changed)
      if found.peak <= chip.hbm_bytes:
        return found, True
      refused.append((accum, remat))
  return smallest, True


def _ranked(plans):
  """Fastest first. Of steps that are equally long within what is modelled, those first that send less, to two
  digits, and then those that hold less."""
  sent = lambda plan: float(f"{sum(plan.step.wire_s.values()):.2g}")
  ranked, rest = [], sorted(plans, key=lambda plan: plan.step.step_s)
  while rest:
    limit = rest[0].step.step_s * (1 + SAME)
    alike = [plan for plan in rest if plan.step.step_s <= limit]
    ranked += sorted(alike, key=lambda plan: (sent(plan), plan.peak))
    rest = rest[len(alike):]
  return ranked


def _bases(cfg, n, slices, precisions):
  """(overrides, config) of every mesh, which axis is slow, and precision: without remat, in one piece."""
  for sizes, precision in itertools.product(_meshes(cfg, n), precisions):
    slow_axes = [a for a in ("data", "fsdp", "stage") if sizes[a] % slices == 0] if slices > 1 else ["data"]
    residuals = {cfg.model.rules.residual} | ({SPLIT_RESIDUAL} if sizes["tensor"] > 1 else set())
    micros = [k * sizes["stage"] for k in MICROBATCHES] if sizes["stage"] > 1 else [None]
    for axis, residual, micro in itertools.product(slow_axes, sorted(residuals), micros):
      overrides = [f"mesh.{a}={s}" for a, s in sizes.items()]
      overrides += [f"mesh.slices={slices}", f"mesh.slice_axis={axis}"] if slices > 1 else []
      changes = {"remat": "none", "pipeline_microbatches": micro}
      if residual != cfg.model.rules.residual:
        overrides.append(f"model.rules.residual={residual!r}")
        changes["rules"] = dataclasses.replace(cfg.model.rules, residual=residual)
      if micro:
        overrides.append(f"model.pipeline_microbatches={micro}")
      if precision is not None:
        overrides.append(f"model.precision={precision}")
        changes |= dict(zip(("param_dtype", "compute_dtype"), PRECISION[precision]), precision=precision)
      yield tuple(overrides), dataclasses.replace(
          cfg, accum_steps=1, model=dataclasses.replace(cfg.model, **changes),
          mesh=MeshConfig(**sizes, slices=slices, slice_axis=axis))


def _meshes(cfg, n):
  """Every way to make n of the axes; experts have an axis where there are any."""
  divisors = [d for d in range(1, n + 1) if n % d == 0]
  axes = [a for a in MESH_AXES if a != "expert" or cfg.model.ffn == "moe"]

  def split(axes, left):
    if not axes:
      if left == 1:
        yield {}
      return
    for d in divisors:
      if left % d == 0:
        for rest in split(axes[1:], left // d):
          yield {axes[0]: d} | rest

  for sizes in split(axes, n):
    yield {a: sizes.get(a, 1) for a in MESH_AXES}


# The report.

def describe(name, found: Search, chip_name: str, chip, n: int, slices: int, top: int) -> str:
  shape = "x".join(map(str, torus(chip, n // slices))) or f"hosts of {chip.domain}"
  lines = [f"{name} on {n} x {chip_name} ({f'{slices} slices of ' * (slices > 1)}{shape}): modelled, nothing "
           "was compiled or run",
           f"{found.tried} meshes tried, {found.divided} divide what they split; with each remat, in up to "
           f"{MOST_MICROBATCHES} micro-batches"]
  if found.best:
    lines.append(f"{'':3} {'step':>8} {'tokens/s/device':>15} {'MFU':>6} {'GiB':>6}  settings; what costs "
                 "most beside the products")
  for rank, plan in enumerate(found.best[:top], 1):
    step = plan.step
    lines.append(f"{rank:3} {step.step_s:6.2f} s {step.tokens_per_s / n:15,.0f} {step.mfu:6.1%} "
                 f"{plan.peak / GIB:6.1f}  {plan.settings}{_slow(plan)}; {_costs(step)}")
  lines += ["", *_losers(found, chip)]
  if found.best:
    lines += ["", "The first, to paste:", "  " + _flags(found.best[0])]
  return "\n".join(lines)


def _slow(plan):
  return f", {plan.cfg.mesh.slice_axis} over the slow network" if plan.cfg.mesh.slices > 1 else ""


def _costs(step):
  shares = {term: s / step.step_s for term, s in step.seconds.items() if term != "products"}
  return ", ".join(f"{term} {share:.0%}" for term, share in sorted(shares.items(), key=lambda i: -i[1])[:2])


def _losers(found, chip):
  """Why not the others: by how much they do not fit, or what takes them longer."""
  lines, lacks = [], lambda plan: f"{(plan.peak - chip.hbm_bytes) / GIB:.1f} GiB"
  if not found.best and not found.too_large:
    return ["Nothing fits: no mesh divides the model and the batch"]
  if not found.best:
    plan = min(found.too_large, key=lambda plan: plan.peak)
    return [f"Nothing fits {chip.hbm_bytes / GIB:.2f} GiB. The smallest, {plan.settings}, lacks "
            f"{lacks(plan)}: take more devices, or a smaller batch_size"]
  first = found.best[0]
  if larger := [plan for plan in found.too_large if plan.step.step_s < found.best[-1].step.step_s]:
    lines.append(f"does not fit {chip.hbm_bytes / GIB:.2f} GiB: {larger[0].settings} lacks {lacks(larger[0])}"
                 + f", and {len(larger) - 1} more" * (len(larger) > 1))
  for axis in MESH_AXES:
    has_axis = [plan for plan in found.best if plan.sizes[axis] > 1]
    if first.sizes[axis] == 1 and has_axis:
      lines.append(f"with {axis}: {has_axis[0].settings}: {_why(has_axis[0], first)}")
  if first.cfg.mesh.slices > 1:
    by_axis = {}
    for plan in found.best:
      by_axis.setdefault(plan.cfg.mesh.slice_axis, plan)
    lines.append("over the slow network: " + "; ".join(
        f"{axis} {plan.step.step_s:.2f} s, {plan.step.wire_s.get(axis, 0.0):.2f} s of wire, hidden or not"
        for axis, plan in by_axis.items()))
  return lines


def _why(plan, first):
  """What takes a plan longer than the first."""
  slower = plan.step.step_s / first.step.step_s - 1
  if slower <= SAME:
    return "as fast, but sends more"
  more = {term: s - first.step.seconds.get(term, 0.0) for term, s in plan.step.seconds.items()}
  term = max(more, key=more.get)
  return f"{slower:.1%} slower, most by {term} (+{more[term]:.2f} s)"


def _flags(plan):
  """Axes of size 1 are the default, but of fsdp."""
  default = {f"mesh.{axis}=1" for axis in MESH_AXES if axis != "fsdp"}
  split = (text.partition("=") for text in plan.overrides if text not in default)
  return " ".join(f'--config.{name}="{value}"' if "(" in value else f"--config.{name}={value}"
                  for name, _, value in split)


# The compiler's word on the best.

def compile_best(args, found, chip) -> list[str]:
  """Each of the best through `python -m train.rehearse`, in a process of its own."""
  shape, k = "x".join(map(str, torus(chip, args.n // args.slices))), args.compile
  topology = f"{'tpu7x' if args.chip == 'v7x' else args.chip}:{shape}"
  lines = [f"The first {k}, compiled by XLA:TPU for {topology}, never run:"]
  for rank, plan in enumerate(found.best[:k], 1):
    command = [sys.executable, "-m", "train.rehearse", f"--config={args.config}", "--json",
               f"--topology={topology}", *(f"--config.{o}" for o in (*args.overrides, *plan.overrides))]
    ran = subprocess.run(command, capture_output=True, text=True)
    try:
      report = json.loads(ran.stdout)["reports"][0]
    except (ValueError, KeyError, IndexError):
      last = (ran.stderr.strip().splitlines() or [f"exit {ran.returncode}"])[-1]
      lines.append(f"{rank:3} {plan.settings}: {last}")
      continue
    lines.append(f"{rank:3} {plan.settings}: {_compare(plan, report)}")
  return lines


def _compare(plan, report):
  if not report["fits"]:
    return f"does not fit; modelled {plan.peak / GIB:.1f} GiB"
  return (f"{report['memory']['peak_memory'] / GIB:.1f} GiB (modelled {plan.peak / GIB:.1f}), step "
          f"{report['step_s']:.3f} s by the compiler's cycles (modelled {plan.step.step_s:.3f})")


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog="train.plan", description=__doc__, epilog=EPILOG,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--chip", help=f"one of {', '.join(CHIP)}: python -m train.chips")
  parser.add_argument("--n", type=int, help="devices, of all slices together")
  parser.add_argument("--slices", type=int, default=1, help="groups of devices, a slow network between")
  parser.add_argument("--precision", help=f"some of {','.join(PRECISION)}; default: the config's")
  parser.add_argument("--top", type=int, default=5, help="meshes to show")
  parser.add_argument("--compile", type=int, default=0, metavar="K",
                      help="ask the TPU compiler about the best K")
  argv = sys.argv[1:] if argv is None else argv
  cfg, args = load(parser, [*(f"--config.{text}" for text in RESET), *argv])
  try:
    if args.chip is None or args.n is None:
      raise ValueError("--chip and --n say for which devices; e.g. --chip=v5p --n=64")
    for name in ("n", "slices", "top"):
      if getattr(args, name) < 1:
        raise ValueError(f"--{name}={getattr(args, name)} must be at least 1; nearest valid: 1")
    precisions = (None,) if args.precision is None else tuple(args.precision.split(","))
    if unknown := [p for p in precisions if p is not None and p not in PRECISION]:
      raise ValueError(f"--precision={unknown[0]}: known: {', '.join(PRECISION)}")
    chip = get_chip(args.chip)
    if args.compile and chip.dims == 0:
      raise ValueError(f"--compile={args.compile} is for TPUs, not --chip={args.chip}; nearest valid: 0")
    found = search(cfg, chip, args.n, slices=args.slices, precisions=precisions)
  except ValueError as e:
    print(f"train.plan: error: {e}", file=sys.stderr)
    return 2
  print(describe(args.config, found, args.chip, chip, args.n, args.slices, args.top))
  if args.compile and found.best:
    print("", *compile_best(args, found, chip), sep="\n")
  return 0 if found.best else 1


if __name__ == "__main__":
  sys.exit(main())

"""python -m train.main --config=X --dry_run --chip=v5e --n=256 [--price_per_chip_hour=1.2]

Whether the run fits, how fast it will be and what it costs, by arithmetic: nothing is compiled, no device and
no TPU library is touched. Where it does not fit: three changes that make it fit, the fastest first.
"""
import collections
import copy
import itertools
import math
import os
import typing

from data.flags import nearest, override
from model.config import PRECISION
from model.sharding import MESH_AXES, mesh_shape
from train.chips import CHIP, GIB, Chip, find_chip, get_chip, measure_copy
from train.memory import Memory, estimate_memory
from train.metrics import MFU_CONVENTION
from train.roofline import Estimate, estimate_step

DISK_BANDWIDTH = 1e9  # Bytes/s that one host writes: assumed.
CHIPS_PER_HOST = 4  # Of TPUs.
MARGIN = 0.1  # What the model of the memory may be wrong by: tests/test_memory.py.
N_FIXES = 3


class Outlook(typing.NamedTuple):
  memory: Memory
  step: Estimate


class Fix(typing.NamedTuple):
  """Settings that make the run fit."""
  overrides: tuple[str, ...]  # "a.b=v".
  outlook: Outlook


def look_ahead(cfg, chip: Chip, n: int) -> Outlook:
  return Outlook(estimate_memory(cfg, n, on=chip.platform), estimate_step(cfg, chip, n))


def fits(memory: Memory, chip: Chip) -> bool:
  return memory.peak <= chip.hbm_bytes


def describe(cfg, chip_name: str | None, n: int | None, price: float | None = None, source: str = "") -> str:
  """The report.

  Args:
    cfg: a TrainConfig; it is validated for n devices here.
    n: None: as many as the mesh says.
    price: of a chip for an hour, in any currency.

  Raises:
    ValueError: an unknown chip, a number of devices that the chip or the mesh does not have.
  """
  if chip_name not in CHIP:
    near = nearest(str(chip_name), CHIP)
    said = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(CHIP)}"
    raise ValueError("--dry_run needs --chip, one of " + ", ".join(CHIP) if chip_name is None else
                     f"--chip={chip_name}: unknown; {said}")
  if n is None:
    sizes = [getattr(cfg.mesh, axis) for axis in MESH_AXES]
    if -1 in sizes:
      raise ValueError(f"--dry_run needs --n, as mesh.{MESH_AXES[sizes.index(-1)]}=-1 takes what is there")
    n = math.prod(sizes)
  cfg.validate(n)
  chip = get_chip(chip_name)
  outlook = look_ahead(cfg, chip, n)
  parts = [_describe_setting(cfg, chip_name, n, source), _describe_memory(outlook.memory, chip),
           _describe_step(outlook.step, n), _describe_run(cfg, outlook, chip, n, price)]
  if not fits(outlook.memory, chip):
    parts.insert(2, _describe_fixes(find_fixes(cfg, chip, n), chip))
  return "\n\n".join(parts)


def _describe_setting(cfg, chip_name, n, source):
  sizes = dict(zip(MESH_AXES, mesh_shape({a: getattr(cfg.mesh, a) for a in MESH_AXES}, n)))
  mesh = " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"
  slices = f", {cfg.mesh.slices} slices along {cfg.mesh.slice_axis}" if cfg.mesh.slices > 1 else ""
  m = cfg.model
  return (f"dry run{source and ' of ' + source} on {n} x {chip_name}: modelled, nothing was compiled or run\n"
          f"mesh {mesh}{slices}; {cfg.batch_size} rows of {cfg.seq_len} tokens a step"
          + (f", in {cfg.accum_steps} micro-batches" if cfg.accum_steps > 1 else "")
          + f"; remat {m.remat}; parameters {m.param_dtype}, compute {m.compute_dtype}")


def _describe_memory(memory, chip):
  rows = [*memory.terms.items(), ("total", memory.peak), ("HBM", chip.hbm_bytes)]
  table = "\n".join(f"  {name:<28} {size / GIB:9.3f}" for name, size in rows)
  sure = abs(memory.peak / chip.hbm_bytes - 1) > MARGIN
  verdict = "yes" if fits(memory, chip) else "no"
  doubt = "" if sure else (f" (within the {MARGIN:.0%} by which this may be wrong: "
                           "python -m train.rehearse asks the compiler)")
  like = "" if chip.platform == "tpu" else ", as XLA:TPU would hold it"
  return (f"memory of one device at its fullest ({memory.moment}), GiB{like}\n{table}\n"
          f"fits: {verdict}{doubt}")


def _describe_step(step, n):
  wire = collections.Counter()
  for (axis, _), size in step.wire_bytes.items():
    wire[axis] += size
  lines = [f"one step of one device: {_number(step.hardware_flops)}FLOP, {_number(step.hbm_bytes)}B of HBM"
           + "".join(f", {_number(size)}B over {axis}" for axis, size in wire.items() if size),
           f"step time {time_text(step.step_s)}: " + ", ".join(
             f"{term} {seconds / step.step_s:.0%}" for term, seconds in
             sorted(step.seconds.items(), key=lambda item: -item[1]) if seconds > 0.005 * step.step_s),
           f"{_number(step.tokens_per_s)}tokens/s, {_number(step.tokens_per_s / n)}tokens/s a device; "
           f"MFU {step.mfu:.1%}", f"  ({MFU_CONVENTION})"]
  return "\n".join(lines)


def _describe_run(cfg, outlook, chip, n, price):
  hours = cfg.steps * outlook.step.step_s / 3600
  chip_hours = hours * n / chip.per_chip
  cost = "" if price is None else f", {chip_hours * price:,.0f} at {price:g} a chip-hour"
  hosts = max(1, math.ceil(n / chip.per_chip / (chip.domain if chip.dims == 0 else CHIPS_PER_HOST)))
  size = outlook.memory.checkpoint
  return (f"{cfg.steps:,} steps: {time_text(hours * 3600)}, {chip_hours:,.0f} chip-hours{cost}\n"
          f"checkpoint {size / GIB:,.2f} GiB, {time_text(size / hosts / DISK_BANDWIDTH)} to write by {hosts} "
          f"host{'s' * (hosts > 1)} at {DISK_BANDWIDTH / 1e9:g} GB/s each (assumed)\n"
          f"decode: a row of {cfg.seq_len} tokens holds {outlook.memory.cache / GIB:.3f} GiB of keys, values")


def _describe_fixes(fixes, chip):
  if not fixes:
    return "Nothing that was tried makes it fit, not even the smallest batch: take more devices."
  lines = [f"What makes it fit, fastest first (HBM {chip.hbm_bytes / GIB:.2f} GiB):"]
  for i, fix in enumerate(fixes, 1):
    flags = " ".join(_flag(text) for text in fix.overrides)
    size, seconds = fix.outlook.memory.peak / GIB, time_text(fix.outlook.step.step_s)
    lines.append(f"  {i}. {size:.2f} GiB, {seconds} a step: {flags}")
  return "\n".join(lines)


def _flag(text):
  name, _, value = text.partition("=")
  return f'--config.{name}="{value}"' if set(value) & set("(' ") else f"--config.{name}={value}"


# Of a run that is about to start.

class Forecast:
  """What a run is expected to need, said at its start, and at its end beside what was measured."""

  def __init__(self, cfg, devices, flops: float | None):
    """
    Args:
      devices: jax.devices().
      flops: the peak of all of them together; None: unknown.
    """
    self._cfg, self._n, self._kind = cfg, len(devices), devices[0].device_kind
    self._chip, self._outlook = find_chip(self._kind), None
    if devices[0].platform == "cpu":
      self._chip = _share_of_cpu(flops / self._n, len({d.process_index for d in devices}) / self._n)

  def describe(self, state) -> str:
    """`state` is of abstract_state."""
    if self._chip is None:
      return f"expected: unknown, as {self._kind!r} is not in train.chips.CHIP"
    try:
      memory = estimate_memory(self._cfg, self._n, state, on=self._chip.platform)
      step = estimate_step(self._cfg, self._chip, self._n)
    except ValueError as e:  # Such a number of these devices is not in the table: the run goes on.
      return f"expected: unknown, as {e}"
    self._outlook = Outlook(memory, step)
    return (f"expected of {self._n} x {self._kind} (modelled): {memory.peak / GIB:.2f} GiB a device at most, "
            f"{time_text(step.step_s)} a step, {_number(step.tokens_per_s)}tokens/s, MFU {step.mfu:.1%}, "
            f"{time_text(step.step_s * self._cfg.steps)} in all")

  def compare(self, lines: list[dict], compiled: float, measured: str) -> str:
    """
    Args:
      lines: of train.metrics.read_metrics.
      compiled: bytes a device by the compiler.
      measured: the peak, in words.
    """
    times = sorted(line["step_ms"] for line in lines if "step_ms" in line)
    real = times[len(times) // 2] / 1e3 if times else math.nan
    found = (f"measured: step {time_text(real)}; memory {measured}, by the compiler {compiled / GIB:.2f} GiB "
             "a device")
    if self._outlook is None:
      return found
    memory, step = self._outlook
    return (f"{found}; expected: step {time_text(step.step_s)} (x {real / step.step_s:.2f}), memory "
            f"{memory.peak / GIB:.2f} GiB a device")


def _share_of_cpu(flops, share) -> Chip:
  """One of the devices that this machine pretends to be."""
  bandwidth = share * measure_copy(0.1, 2**26)
  memory = share * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return Chip(
    kinds=("cpu",), flops={"float32": flops, "bfloat16": flops}, hbm_bytes=memory, hbm_bandwidth=bandwidth,
    link_bandwidth=bandwidth / 2, dims=0, domain=2**20, dcn_bandwidth=bandwidth / 2, mxu=1, source="measured")


# What makes it fit.

def find_fixes(cfg, chip: Chip, n: int) -> list[Fix]:
  """Of the changes that make the run fit the N_FIXES fastest, of each kind one: single ones and pairs;
  where these are too few, three together, others of the same kinds, a smaller batch."""
  kinds = {kind: changes for kind, changes in _changes(cfg, n).items() if changes}
  singles = [(kind, change) for kind, changes in kinds.items() for change in changes]
  strongest = [changes[-1] for kind, changes in kinds.items() if kind in ("remat", "rules")]
  best, others = {}, []  # Kinds of changes -> the fastest fix.
  for size in (1, 2, 3):
    if size == 3 and len(best) + len(others) >= N_FIXES:
      break
    for combination in itertools.combinations(singles, size):
      names = frozenset(kind for kind, _ in combination)
      overrides = {text for _, texts in combination for text in texts}
      less = any(set(fix.overrides) <= overrides for fix in (*best.values(), *others))
      if len(names) < size or less:
        continue
      if fix := _try(cfg, chip, n, [text for _, texts in combination for text in texts]):
        best[names], *slower = sorted((*filter(None, [best.get(names)]), fix), key=_speed, reverse=True)
        others += slower
  fixes = sorted(best.values(), key=_speed, reverse=True) + sorted(others, key=_speed, reverse=True)
  fixes = sorted(fixes[:N_FIXES], key=_speed, reverse=True)
  batch = cfg.batch_size
  while len(fixes) < N_FIXES and batch > 1:
    batch //= 2
    for more in ((), *strongest):
      if fix := _try(cfg, chip, n, [*more, f"batch_size={batch}"]):
        return [*fixes, fix]
  return fixes


def _speed(fix):
  return fix.outlook.step.tokens_per_s


def _try(cfg, chip, n, overrides):
  """The fix, or None if it is none."""
  changed = copy.deepcopy(cfg)
  try:
    outlook = look_ahead(override(changed, overrides).validate(n), chip, n)
  except ValueError:  # The mesh does not divide something.
    return None
  return Fix(tuple(overrides), outlook) if fits(outlook.memory, chip) else None


def _changes(cfg, n) -> dict[str, list[tuple[str, ...]]]:
  """Kind -> changes of one thing, each a tuple of overrides."""
  m, default = cfg.model, type(cfg.model)()
  sizes = dict(zip(MESH_AXES, mesh_shape({a: getattr(cfg.mesh, a) for a in MESH_AXES}, n)))
  order = ("none", "dots", "outputs", "full")
  more = order[order.index(m.remat) + 1:] if m.remat in order else ()
  rules = tuple(f"model.rules.{name}={getattr(default.rules, name)!r}"
                for name in ("moment", "gradient", "embed")
                if not getattr(m.rules, name) and sizes["fsdp"] > 1)
  kinds = {
    "remat": [(f"model.remat={name}",) for name in more],
    "rules": [rules[:i] for i in range(1, len(rules) + 1)],
    "accum": [(f"accum_steps={cfg.accum_steps * k}",) for k in (2, 4, 8, 16, 32)],
    "chunk": [(f"loss_chunk={cfg.loss_chunk // k}",) for k in (2, 4) if cfg.loss_chunk // k >= 256],
    "residual": [("model.rules.residual=('seq', 'tensor')",)] * (
      sizes["tensor"] > 1 and m.rules.residual == ("seq",)),
    "mesh": [],
  }
  if sizes["data"] > 1 and cfg.mesh.slices == 1:
    kinds["mesh"].append(("mesh.data=1", f"mesh.fsdp={sizes['fsdp'] * sizes['data']}"))
  for axis, k in itertools.product(("tensor", "seq"), (2, 4, 8)):
    if sizes["fsdp"] % k == 0:
      more = ("model.context=ulysses",) if axis == "seq" and m.context == "gather" else ()
      kinds["mesh"].append((f"mesh.fsdp={sizes['fsdp'] // k}", f"mesh.{axis}={sizes[axis] * k}", *more))
  if m.param_dtype == "float32" and PRECISION["pure_bf16"] != (m.param_dtype, m.compute_dtype):
    kinds["precision"] = [("model.param_dtype=bfloat16",)]
  return kinds


def _number(value):
  for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if value >= size:
      return f"{value / size:.3g} {letter}"
  return f"{value:.3g} "


def time_text(s) -> str:
  """"3.5 min", "12.3 s", "41 ms"."""
  for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
    if s >= 2 * size:
      return f"{s / size:.1f} {unit}"
  return f"{s:.3g} s" if s >= 1 else f"{1e3 * s:.3g} ms"

"""What a compiled program for a TPU costs, read from its schedule: time on the core, waits for the wire.

A model, not a measurement: the core takes the cycles that the compiler itself estimates for each operation,
one after the other; the wire carries one collective after the other at a given bandwidth; an asynchronous
collective runs beside the core between its start and its end, any other one holds the core up.
"""
import dataclasses
import math
import re
import typing

import numpy as np

from train.hlo import KINDS, Collective, Op, Program, product_flops, read_collective, read_shapes

# Of splash attention's kernels the products of [T, H] with [H, T] that each makes of a pair of blocks.
KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
ENDS = (*(f"{kind}-done" for kind in KINDS), "async-done")

@dataclasses.dataclass(slots=True)
class Transfer:
  """A collective, all its runs in a step together, or what several have in common."""
  kind: str
  axes: tuple[str, ...]
  asynchronous: bool
  source: str
  what: str  # The array.
  times: int = 0
  wire_bytes: float = 0.0  # That each device sends.
  wire_s: float = 0.0
  exposed_s: float = 0.0  # That the core waits.
  overlap_s: float = 0.0  # Time on the core between the start and the end.


@dataclasses.dataclass(slots=True)
class Timeline:
  """Of one step on one device.

  Attributes:
    cycles: on the core, as the compiler estimates them; without Pallas kernels, of which it knows nothing.
    flops: of the products; of `kernels` too where KERNEL_PRODUCTS knows them.
    kernels: (operation, runs) of Pallas kernels.
    endless: (source, what) of loops whose end is not a number, which are counted once.
    ops: (operation, runs) of all others but loops, whose insides are there instead.
  """
  cycles: float = 0.0
  exposed_s: float = 0.0
  flops: float = 0.0
  kernel_flops: float = 0.0
  transfers: list[Transfer] = dataclasses.field(default_factory=list)
  kernels: list = dataclasses.field(default_factory=list)
  endless: list = dataclasses.field(default_factory=list)
  ops: list = dataclasses.field(default_factory=list)


class Wire(typing.NamedTuple):
  """How fast collectives are."""
  mesh_shape: dict[str, int]
  ring_bytes_per_s: float  # Both directions of one ring of links.
  slices: int = 1
  slice_axis: str = "data"  # That goes over the network between the slices, they varying slowest,
  slow_bytes_per_s: float = 1.0  # and its bandwidth for one device.

  def seconds(self, c: Collective) -> float:
    """Of `rings` in parallel where the compiler says that it uses so many (a torus has one a dimension)."""
    if c.op.kind == "send":
      return c.wire_bytes / self.slow_bytes_per_s
    rings = re.search(r"StrategyND\{colors:(\d+)", c.op.rest)
    return c.wire_bytes / self.ring_bytes_per_s / (int(rings[1]) if rings else 1)


  def read_between_slices(self, ops: dict[str, Op], op: Op) -> Collective | None:
    """What a `send` to the network between slices is a part of. What it gives is in the `recv` of the same
    name; who takes part is not said, but is the same device of each slice."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.rest)
    if op.kind != "send" or found is None:
      return None
    arrived = next((other for other in ops.values()
                    if other.kind == "recv" and rendezvous(other) == rendezvous(op)), op)
    shape = [n for axis, size in self.mesh_shape.items()
             for n in ((self.slices, size // self.slices) if axis == self.slice_axis else (size,))]
    ids = np.arange(math.prod(shape)).reshape(shape)
    groups = np.moveaxis(ids, list(self.mesh_shape).index(self.slice_axis), -1).reshape(-1, self.slices)
    kind = found[1].lower().replace("_", "-")
    return Collective(kind, arrived.shapes[:1], groups, rendezvous(op), op)


def rendezvous(op: Op) -> str:
  """The name by which the two sides of a transfer between slices find each other; "" is none."""
  return (re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', op.rest) or ["", ""])[1]


def read_timeline(program: Program, wire: Wire, clock_hz: float, *, visible: float = 0.5) -> Timeline:
  """Args:
    visible: the share of the pairs of a query and a key that attention kernels compute; causal: half.
  """
  timeline = Timeline()
  walk = _Walk(program, wire, clock_hz, timeline, visible)
  timeline.cycles, timeline.exposed_s = walk.run(program.entry, 1)
  return timeline


class _Walk:

  def __init__(self, program, wire, clock_hz, timeline, visible):
    self.program, self.wire, self.clock_hz, self.timeline = program, wire, clock_hz, timeline
    self.visible = visible
    self.inner = {}  # Computation -> the collectives in it and below,
    self.flops = {}  # and the FLOPs of its products.

  def run(self, computation, times):
    """(cycles, seconds of waiting) of one run of a computation that runs `times` times a step."""
    cycles = waited = 0.0
    wire_free = {}  # Of links, and of the network between slices: when they are.
    pending = {}  # Name of a start, or its channel -> (transfer, end, cycles at the start).
    now = lambda: cycles / self.clock_hz + waited

    ops = self.program.computations[computation]
    for op in ops.values():
      if op.kind == "while":
        n = self.program.trips(computation, op)
        if n is None:
          self.timeline.endless.append((self.program.source(op), op.op_name))
        for inner in op.called("condition", "body"):
          more, wait = self.run(inner, times * (n or 1))
          cycles, waited = cycles + more * (n or 1), waited + wait * (n or 1)
        continue
      if op.kind == "conditional":  # The longest branch.
        branches = op.called("true_computation", "false_computation") + re.findall(
            r"%([\w.\-]+)", (re.search(r"branch_computations=\{([^}]*)\}", op.rest) or ["", ""])[1])
        more, wait = max(self.run(name, times) for name in branches)
        cycles, waited = cycles + more, waited + wait
        continue
      if op.kind == "call":
        more, wait = self.run(op.called("to_apply")[0], times)
        cycles, waited = cycles + more, waited + wait
        continue
      role, key, found = self.role(ops, op)
      if role == "end" and key in pending:
        transfer, end, before = pending.pop(key)
        wait = max(0.0, end - now())
        waited += wait
        transfer.exposed_s += wait * times
        transfer.overlap_s += (cycles - before) / self.clock_hz * times
      elif role in ("start", "whole"):
        transfer, seconds = self.transfer(ops, found, role == "start", times)
        wire = op.kind == "send"
        end = wire_free[wire] = max(now(), wire_free.get(wire, 0.0)) + seconds
        if role == "start":
          pending[key] = transfer, end, cycles
        else:
          transfer.exposed_s += (end - now()) * times
          waited += end - now()
      if role is None:
        cycles += self.cycles(ops, op, times)
    return cycles, waited

  def role(self, ops: dict[str, Op], op: Op):
    """(what an operation is to collectives, by what its start and end find each other, those that it has):
    "start", "end", "whole" (synchronous), or None: compute, perhaps with a collective under way in it."""
    if op.kind in ENDS:
      return "end", next(iter(op.operands), None), []
    if op.kind == "recv-done" and op.operands[0] in ops:
      return "end", rendezvous(ops[op.operands[0]]), []
    between = self.wire.read_between_slices(ops, op)
    if between is not None:
      return "start", between.name, [between]
    one = read_collective(op)
    if one is not None:
      return ("start" if op.kind.endswith("-start") else "whole"), op.name, [one]
    if op.kind not in ("fusion", "async-start"):
      return None, None, []
    found = [c for name in op.called("calls") for c in self.within(name)]
    if not found or any(name.startswith("async_collective_fusion") for name in op.called("calls")):
      return None, None, []
    if op.kind == "async-start":
      return "start", op.name, found
    # XLA:TPU cuts a collective in steps, which it lets run inside other fusions; its channel stays the same.
    key = re.search(r"channel_id=\d+", found[0].op.rest)
    key = key[0] if key else op.name
    for word, role in (("start", "start"), ("done", "end")):
      if op.name.startswith(f"async-collective-{word}"):
        return role, key, found
    return "whole", key, found

  def within(self, computation):
    if computation not in self.inner:
      ops = self.program.computations[computation].values()
      self.inner[computation] = [c for c in map(read_collective, ops) if c is not None] + [
          c for op in ops if op.kind in ("fusion", "async-start") for name in op.called("calls")
          for c in self.within(name)]
    return self.inner[computation]

  def transfer(self, ops, found, asynchronous, times):
    seconds = sum(map(self.wire.seconds, found))
    first = found[0]
    made_by = [ops[name] for name in first.op.operands if name in ops]  # Where the compiler forgot the line.
    source = next(filter(None, map(self.program.source, [first.op, *made_by])), "")
    transfer = Transfer(
        first.kind, first.axes(self.wire.mesh_shape), asynchronous, source,
        " ".join(str(a) for a in first.arrays[:2]), times, sum(c.wire_bytes for c in found) * times,
        seconds * times)
    self.timeline.transfers.append(transfer)
    return transfer, seconds

  def cycles(self, ops, op, times):
    self.timeline.ops.append((op, times))
    if '"tpu_custom_call"' in op.rest:
      self.timeline.kernels.append((op, times))
      flops = self.visible * kernel_flops(op) * times
      self.timeline.kernel_flops += flops
      self.timeline.flops += flops
    self.timeline.flops += (self.products(op) + product_flops(ops, op)) * times
    return op.cycles or 0

  def products(self, op):
    """FLOPs of an operation with what is fused into it."""
    total = 0
    for name in op.called("calls"):
      if name not in self.flops:
        ops = self.program.computations[name]
        self.flops[name] = sum(product_flops(ops, inner) + self.products(inner) for inner in ops.values())
      total += self.flops[name]
    return total


def kernel_flops(op: Op) -> float:
  """Of one of splash attention's kernels over all pairs; 0 of others, which are not known."""
  n = next((n for name, n in KERNEL_PRODUCTS.items() if op.name.startswith(name)), 0)
  heads = [a.dims for a in read_shapes(op.rest.partition("operand_layout_constraints=")[2].partition("}}")[0])
           if a.dtype not in ("s8", "s32", "u8")]
  if not n or not heads:
    return 0.0
  *batch, T, H = heads[0]  # [..., N, T, H]
  return 2.0 * n * math.prod(batch) * T * T * H

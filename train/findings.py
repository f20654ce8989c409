"""What in a compiled program costs more than it must: (what, how much, where), worst first within a kind."""
import typing

from train.hlo import Program, product_flops
from train.schedule import Timeline

MIB, GIB = 2**20, 2**30
LARGE = 64 * MIB  # Bytes in one run from which a copy or a padded array is worth a line.
REMAT = "Involuntary full rematerialization"


class Finding(typing.NamedTuple):
  kind: str
  text: str
  source: str


def find(program: Program, timeline: Timeline, stderr: str, *, compute_dtype: str) -> list[Finding]:
  """Args:
    stderr: what the compiler said.
    compute_dtype: of the config: products of float32 are noted where it is another.
  """
  found = [Finding("rematerialised", line.strip()[:300], "") for line in stderr.splitlines() if REMAT in line]
  return (found + (_float32_products(program, timeline) if compute_dtype != "float32" else [])
          + _copies(program, timeline) + _padding(program, timeline) + _transfers(timeline) + [
              Finding("endless loop", f"{what}: its trips are not a number, counted once", source)
              for source, what in timeline.endless])


def _float32_products(program, timeline):
  """Both factors in float32, of at least a thousandth of all FLOPs."""
  found = []
  for op, times in timeline.ops:
    for name in set(op.called("calls")):
      inside = program.computations[name]
      for inner in inside.values():
        if inner.kind in ("dot", "convolution"):
          factors = [inside[operand].shapes[0] for operand in inner.operands]
          share = product_flops(inside, inner) * times / max(timeline.flops, 1)
          if all(f.dtype == "f32" for f in factors) and share >= 1e-3:
            found.append((share, Finding(
                "float32 product", f"{' x '.join(map(str, factors))}: {share:.1%} of the FLOPs",
                program.source(inner))))
  return [f for _, f in sorted(found, key=lambda pair: -pair[0])]


def _copies(program, timeline):
  found = []
  for op, times in timeline.ops:
    size = sum(a.padded_bytes for a in op.shapes if a.space == 0)
    if op.kind in ("copy", "transpose") and size >= LARGE:
      text = f"{op.shapes[0]} x {times}: {size * times / GIB:.2f} GiB written a step"
      found.append((size * times, Finding("layout copy", text, program.source(op))))
  return [f for _, f in sorted(found, key=lambda pair: -pair[0])]


def _padding(program, timeline):
  found = {}
  for op, _ in timeline.ops:
    for a in op.shapes if op.kind not in ("bitcast", "get-tuple-element", "tuple", "parameter") else ():
      waste = a.padded_bytes - a.bytes
      if a.space == 0 and waste >= LARGE:
        found[str(a)] = waste, Finding("padding", f"{a} takes {a.padded_bytes / MIB:.0f} MiB, "
                                       f"{a.padded_bytes / a.bytes:.1f} x its own", program.source(op))
  return [f for _, f in sorted(found.values(), key=lambda pair: -pair[0])]


def _transfers(timeline):
  found = []
  for t in timeline.transfers:
    each = t.wire_bytes / t.times
    if t.kind == "all-gather" and t.times == 1 and each >= LARGE:
      found.append((each, Finding("gathered whole", f"{t.what} once a step, outside the layers: "
                                  f"{each / GIB:.2f} GiB on the wire", t.source)))
    if t.kind == "all-reduce" and each >= LARGE:
      found.append((t.wire_bytes, Finding(
          "all-reduce", f"{t.what} x {t.times}: whole on every device; a reduce-scatter sends half of its "
          f"{t.wire_bytes / GIB:.2f} GiB", t.source)))
  return [f for _, f in sorted(found, key=lambda pair: -pair[0])]

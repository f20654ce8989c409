"""What holds memory when a compiled program needs most of it: the live arrays, and the lines that made them.

Read from the schedule as XLA prints it, which does not say where arrays lie: packing and the scratch of
kernels are missing, so the sum is near the compiler's own peak, not equal to it.
"""
import dataclasses
import re

from train.hlo import Op, Program, Shape

PASSED_ON = ("bitcast", "tuple", "get-tuple-element", "optimization-barrier", "dynamic-update-slice")


@dataclasses.dataclass(frozen=True, slots=True)
class Buffer:
  """One array in HBM, in bytes as it lies there (padding included)."""
  bytes: float
  shape: str
  source: str
  op_name: str
  op: str


def live_at_peak(program: Program) -> list[Buffer]:
  """The arrays that live when most bytes do, largest first; arguments are among them."""
  entry = program.computations[program.entry]
  given = [_buffer(program, op, shape) for op in entry.values() if op.kind == "parameter"
           for shape in op.shapes if shape.space == 0]
  _, live = _peak(program, program.entry)
  return sorted([*given, *live], key=lambda b: -b.bytes)


def _peak(program, computation):
  """(bytes, the buffers made in a computation, and below it, that live at its peak); its parameters are not
  its own."""
  ops = list(program.computations[computation].values())
  values, buffers = {}, []  # Name -> per array of the result the number of its buffer, None: not ours.
  made, last = [], []
  for at, op in enumerate(ops):
    operands = [leaf for name in op.operands if name in values for leaf in values[name]]
    values[op.name] = []
    for shape, same in zip(op.shapes, _aliases(op, values)):
      if same is not None or shape.space != 0 or op.kind in ("parameter", "constant"):
        values[op.name].append(same[0] if same is not None else None)
        continue
      values[op.name].append(len(buffers))
      buffers.append(_buffer(program, op, shape))
      made.append(at)
      last.append(at)
    for number in operands:
      if number is not None:
        last[number] = at
        if not buffers[number].source and op.kind not in PASSED_ON:  # Then who reads it says more.
          buffers[number] = dataclasses.replace(buffers[number], source=program.source(op))
  root = next(op for op in ops if op.root)
  kept = {n for n in values[root.name] if n is not None}
  ours = [(made[n], last[n], b) for n, b in enumerate(buffers) if n not in kept]  # Others: the caller's.
  best = 0.0, []
  changes = [0.0] * (len(ops) + 1)
  for first, end, b in ours:
    changes[first] += b.bytes
    changes[end + 1] -= b.bytes
  now = 0.0
  for at, op in enumerate(ops):
    now += changes[at]
    inner = [_peak(program, name) for name in op.called("body", "to_apply")] if op.kind in (
        "while", "call") else []
    more, below = max(inner, key=lambda found: found[0], default=(0.0, []))
    if now + more > best[0]:
      best = now + more, [b for first, end, b in ours if first <= at <= end] + below
  return best


def _aliases(op: Op, values):
  """Per array of the result a 1-tuple of the buffer that it shares; None: it is a new one."""
  leaves = [values.get(name, [None]) for name in op.operands]
  flat, n = [leaf for value in leaves for leaf in value], len(op.shapes)
  if op.kind == "get-tuple-element":
    index = int(re.search(r"index=(\d+)", op.rest)[1])
    return [(flat[index],)] if index < len(flat) else [None] * n
  if op.kind in ("while", "tuple", "optimization-barrier") and len(flat) == n:
    return [(leaf,) for leaf in flat]
  if op.kind in PASSED_ON:
    return [(flat[0],)] * n if flat else [None] * n
  found = [None] * n
  for listed in re.findall(r'"indices":\[([^\]]*)\]', op.rest):
    same = [int(i) for i in re.findall(r"\d+", listed)]
    for out in (i - len(flat) for i in same if i >= len(flat)):
      if same[0] < len(flat) and out < n:
        found[out] = (flat[same[0]],)
  for out, operand in re.findall(r"\{(\d*)\}: \((\d+), \{\}", op.rest.partition("calls=")[0]):
    found[int(out or 0)] = (leaves[int(operand)][0],)
  return found


def _buffer(program, op: Op, shape: Shape):
  return Buffer(shape.padded_bytes, str(shape), program.source(op), op.op_name, op.name)

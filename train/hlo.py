"""Reads the text of a program that XLA has compiled: computations, loops and their trips, products,
collectives, lines of source.

For a TPU the text is the schedule: the operations of a computation stand in the order in which they run.
"""
import dataclasses
import functools
import math
import pathlib
import re
import typing

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
         "collective-permute", "collective-broadcast")
BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}  # Others end in their bits.
SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
SAME = ("bitcast", "copy", "convert", "reshape")  # A number stays what it is.


class Shape(typing.NamedTuple):
  """One array of a result, on one device."""
  dtype: str
  dims: tuple[int, ...]
  order: tuple[int, ...]  # Its dims from minor to major.
  tile: tuple[int, ...]  # Of the minor dims, which are filled up to its multiples.
  space: int  # 0: HBM, 1: the core's own memory.

  @property
  def bytes(self) -> float:
    return math.prod(self.dims) * self.bits / 8

  @property
  def padded_bytes(self) -> float:
    order = self.order or tuple(range(len(self.dims)))[::-1]
    sizes = [self.dims[i] for i in order] + [1] * (len(self.tile) - len(order))
    for i, step in enumerate(reversed(self.tile)):
      sizes[i] = -(-sizes[i] // step) * step
    return math.prod(sizes) * self.bits / 8

  @property
  def bits(self) -> int:
    if self.dtype in BITS:
      return BITS[self.dtype]
    return int((re.match(r"[a-z]+(\d+)", self.dtype) or [0, 0])[1])

  def __str__(self):
    return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def read_shapes(text: str) -> tuple[Shape, ...]:
  """The arrays of a type: of a tuple all, in order."""
  found = []
  for dtype, dims, order, layout in SHAPE.findall(text):
    numbers = lambda s: tuple(int(n.lstrip("<=")) for n in s.split(",") if n)
    tile = re.match(r"T\(([\d,]*)\)", layout)
    space = re.search(r"S\((\d+)\)", layout)
    found.append(Shape(dtype, numbers(dims), numbers(order), numbers(tile[1]) if tile else (),
                       int(space[1]) if space else 0))
  return tuple(found)


@dataclasses.dataclass(slots=True)
class Op:
  name: str
  kind: str
  type: str
  inside: str  # The parentheses.
  rest: str  # Attributes, metadata, the compiler's notes.
  root: bool

  @property
  def shapes(self) -> tuple[Shape, ...]:
    return read_shapes(self.type)

  @property
  def operands(self) -> list[str]:
    return re.findall(r"%([\w.\-]+)", self.inside)

  @property
  def op_name(self) -> str:
    return (re.search(r'op_name="([^"]*)"', self.rest) or ["", ""])[1]

  @property
  def cycles(self) -> int | None:
    """As the compiler estimates them; None where it has no model, which it writes as -1 or 2^64 - 1."""
    found = re.search(r'"estimated_cycles":"(-?\d+)"', self.rest)
    return int(found[1]) if found and 0 <= int(found[1]) < 2**62 else None

  def called(self, *names) -> list[str]:
    """The computations that these attributes (calls, body, ...) name."""
    return [m for name in names for m in re.findall(rf"\b{name}=%?([\w.\-]+)", self.rest)]


class Program:
  """A compiled module.

  Attributes:
    computations: name -> its operations by name, in order.
    entry: the name of the one that runs first.
  """

  def __init__(self, text: str):
    self.computations, self.entry, self._tables = {}, None, {}
    ops = table = None
    for line in _joined(text):
      if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
        ops = self.computations[head[2]] = {}
        self.entry = head[2] if head[1] else self.entry
      elif _END.fullmatch(line):
        ops = None
      elif ops is not None:
        if op := read_op(line):
          ops[op.name] = op
      elif re.fullmatch(r"[A-Z]\w+", line):
        table = self._tables[line] = {}
      elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
        table[int(row[1])] = row[2]

  def source(self, op: Op) -> str:
    """"model/layers.py:52", the innermost line of ours that made it; of others where there is none."""
    if written := re.search(r'source_file="([^"]*)" source_line=(\d+)', op.rest):
      return f"{_short(written[1])}:{written[2]}"
    frame = re.search(r"stack_frame_id=(\d+)", op.rest)
    lines = self._lines(int(frame[1])) if frame else []
    return next((line for line in lines if not line.startswith("/")), lines[0] if lines else "")

  def _lines(self, frame):
    number = lambda key, text: int(re.search(rf"{key}=(\d+)", text)[1])
    lines = []
    while row := self._tables.get("StackFrames", {}).get(frame):
      place = self._tables["FileLocations"][number("file_location_id", row)]
      file = self._tables["FileNames"][number("file_name_id", place)].strip('"')
      lines.append(f"{_short(file)}:{number('line', place)}")
      frame = number("parent_frame_id", row) - 1  # Stored plus one; 0 is none.
    return lines

  def trips(self, computation: str, loop: Op) -> int | None:
    """How often a while runs: what the compiler notes, else the number that its condition compares with (at
    most so often, where the condition has more to say). None: not a number."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
      return int(known[1])
    outer, before = self.computations[computation], loop.operands[:1]
    start = outer.get(before[0]) if before else None
    elements = start.operands if start is not None and start.kind == "tuple" else []
    numbers = [number(self.computations[computation], name, {}) for name in elements]
    return self._limit(loop.called("condition")[0], {0: numbers})

  def _limit(self, computation, given):
    """The trips that the comparison in a condition allows, its counter starting where `given` says."""
    ops, found = self.computations[computation], None
    for op in ops.values():
      if op.kind == "fusion":
        inner = {i: number(ops, name, given) for i, name in enumerate(op.operands)}
        found = found or self._limit(op.called("calls")[0], inner)
      direction = re.search(r"direction=(\w+)", op.rest)
      if op.kind != "compare" or direction[1] not in ("LT", "LE", "GT", "GE"):
        continue
      low, high = (number(ops, name, given) for name in op.operands)
      if direction[1] in ("GT", "GE"):
        low, high = high, low
      if high is not None:
        found = high - (low or 0) + (direction[1] in ("LE", "GE"))
    return found


_END = re.compile(r'}(, execution_thread="\w+")?')  # Of a computation; some run on the sparse cores.


def _joined(text):
  """Lines; what a Pallas kernel says about itself goes over several."""
  whole, inside = "", False
  for line in text.splitlines():
    ends = _END.fullmatch(line)
    if inside and not line.startswith("  ") and not ends:
      whole += line
      continue
    if whole:
      yield whole
    whole, inside = line, line.endswith("{") and not line.startswith(" ") or inside and not ends
  yield whole


def read_op(line: str) -> Op | None:
  head = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
  if not head:
    return None
  text = line[head.end():]
  end = _closing(text, 0) if text[0] == "(" else text.index(" ")
  type_, text = text[:end], text[end:].lstrip()
  opened = text.index("(")
  closed = _closing(text, opened)
  return Op(head[2], text[:opened], type_, text[opened + 1:closed - 1], text[closed:], bool(head[1]))


def number(ops, name, given):
  """The integer that an operation is known to be. given: number of a parameter -> its value, or those of its
  elements."""
  op = ops[name]
  while op.kind in SAME and op.operands:
    op = ops[op.operands[0]]
  if op.kind == "constant" and re.fullmatch(r"-?\d+", op.inside):
    return int(op.inside)
  if op.kind == "parameter":
    value = given.get(int(op.inside))
    return value if isinstance(value, int) else None
  if op.kind == "get-tuple-element" and ops[op.operands[0]].kind == "parameter":
    values = given.get(int(ops[op.operands[0]].inside))
    index = int(re.search(r"index=(\d+)", op.rest)[1])
    return values[index] if isinstance(values, list) and index < len(values) else None
  return None


def _closing(text, start):
  """Just behind the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i + 1
  raise ValueError(f"no closing parenthesis in {text[start:start + 80]!r}")


def _short(file):
  path = pathlib.Path(file)
  return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) and ".venv" not in path.parts else file


def product_flops(ops: dict[str, Op], op: Op) -> int:
  """Of a dot or a convolution (which is what a TPU's products are); 0 of anything else."""
  if op.kind == "dot":
    left = ops[op.operands[0]].shapes[0].dims
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)[1]
    return 2 * math.prod(op.shapes[0].dims) * math.prod(left[int(i)] for i in summed.split(",") if i)
  if op.kind != "convolution":
    return 0
  left, right = (ops[name].shapes[0].dims for name in op.operands)
  names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
  size = lambda dims, labels, letter: dims[labels.index(letter)]
  total = 2 * size(op.shapes[0].dims, names[3], "b") * size(right, names[2], "i") * size(right, names[2], "o")
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", op.rest) or ["", ""])[1]))
  for i in range(len(names[1]) - 2):  # Of each spatial dim the pairs of a place and a tap that meet data.
    pick = lambda key, default: window[key].split("x")[i] if key in window else default
    taps, stride = int(pick("size", "1")), int(pick("stride", "1"))
    grown, spread = int(pick("lhs_dilate", "1")), int(pick("rhs_dilate", "1"))
    low, n = int(pick("pad", "0_0").split("_")[0]), size(left, names[1], str(i))
    place = (np.arange(size(op.shapes[0].dims, names[3], str(i)))[:, None] * stride
             + np.arange(taps)[None] * spread - low)
    total *= int(((place >= 0) & (place < (n - 1) * grown + 1) & (place % grown == 0)).sum())
  return total


# Collectives.

@dataclasses.dataclass(frozen=True, slots=True)
class Collective:
  """One operation that moves data between devices.

  Attributes:
    arrays: what comes out of it, on one device.
    groups: [groups, devices of one], or [pairs, 2] from whom to whom.
  """
  kind: str
  arrays: tuple[Shape, ...]
  groups: np.ndarray
  name: str  # As JAX called it.
  op: Op

  @property
  def shapes(self) -> tuple[tuple[int, ...], ...]:
    return tuple(a.dims for a in self.arrays)

  @property
  def largest(self) -> int:
    return max(math.prod(dims) for dims in self.shapes)

  @property
  def in_loop(self) -> bool:
    return "while/body" in self.name

  @property
  def wire_bytes(self) -> float:
    """That each device sends, of a ring: all-gather and reduce-scatter (n - 1) / n of the whole, all-reduce
    both."""
    n, out = self.groups.shape[1], sum(a.bytes for a in self.arrays)
    whole = {"reduce-scatter": out * n, "all-reduce": 2 * out}.get(self.kind, out)
    return out if self.kind.startswith("collective") else whole * (n - 1) / n

  def axes(self, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the devices of a group differ; ("?",) where the ids are not places in
    it."""
    if self.groups.max() >= math.prod(mesh_shape.values()):
      return ("?",)
    places = np.stack(np.unravel_index(self.groups, tuple(mesh_shape.values())), axis=-1)
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(axis for axis, d in zip(mesh_shape, differ) if d)


def collectives(text: str) -> list[Collective]:
  """Those of a compiled module between two or more devices."""
  found = [read_collective(op) for ops in Program(text).computations.values() for op in ops.values()]
  return [c for c in found if c is not None]


def read_collective(op: Op) -> Collective | None:
  """None: it is none, its end, or among one device alone, which no wire sees."""
  kind = op.kind.removesuffix("-start")
  if kind not in KINDS:
    return None
  groups = read_groups(op.rest)
  if groups is None or groups.shape[1] == 1:
    return None
  arrays = read_shapes(op.type)
  if op.kind.endswith("-start") and kind != "all-reduce":  # (operands, results, ...).
    arrays = [a for a in arrays if a.dtype != "u32" or a.dims]
    arrays = tuple(arrays[len(arrays) // 2:])
  return Collective(kind, arrays, groups, op.op_name, op)


@functools.cache
def read_groups(text: str) -> np.ndarray | None:
  """Who speaks with whom, in any of XLA's notations."""
  if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
    return np.array([[int(n) for n in re.findall(r"\d+", pair)] for pair in pairs[1].split("},")])
  if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
    rows = [[int(n) for n in re.findall(r"\d+", row)] for row in listed[1].split("},")]
    return np.array(rows)
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
    dims = [int(n) for n in iota[3].split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    ids = ids.transpose([int(n) for n in iota[4].split(",")]) if iota[4] else ids
    return ids.reshape(int(iota[1]), int(iota[2]))
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text):
    sizes = {axis: int(n) for axis, n in re.findall(r"('\w+')=(\d+)", named[1])}
    over = re.findall(r"'\w+'", named[3])
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    ids = np.moveaxis(ids, [list(sizes).index(a) for a in over], range(-len(over), 0))
    return ids.reshape(-1, math.prod(sizes[a] for a in over))
  return None

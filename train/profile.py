"""Where the time of a step goes: a trace of the profiler, and the table of its largest operations.

python -m train.profile DIR
prints the table of the newest trace under DIR. The trace itself opens in Perfetto or XProf.
"""
import argparse
import bisect
import collections
import contextlib
import dataclasses
import math
import pathlib
import re
import sys

import jax

PROGRAM = "program.hlo.txt"  # Beside the trace: a CPU's trace names operations, but not their source.
CONTROL = ("while", "call", "conditional", "async-start", "async-done")  # They last as long as what they run.
# The first that is found in an operation's HLO names its kind.
KIND = (
  ("collective", r"all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"),
  ("matmul", r"\bdot\b|convolution|custom-call"),
  ("gather/scatter", r"gather|scatter"),
  ("slice/stack", r"dynamic-update-slice|dynamic-slice|dynamic_update_slice"),
  ("copy/transpose", r"copy|transpose|bitcast|concatenate"),
  ("reduce", r"reduce|ynn_fusion"),
)


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table: all operations that come from one line of model code."""
  kind: str
  source: str
  ms: float
  count: int


@contextlib.contextmanager
def trace(directory, program=None):
  """Traces what runs inside; the caller waits for the device before it leaves.

  Args:
    program: the compiled step, whose text tells which operation comes from which line of code.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  if program is not None:
    (directory / PROGRAM).write_text(program.as_text())
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # Python's own calls would be most of the file.
  with jax.profiler.trace(str(directory), profiler_options=options):
    yield


class StepTrace:
  """Traces some steps of a run, from the third on, and writes what took their time beside the trace."""

  def __init__(self, directory, program, step: int, steps: int, n: int):
    """Args:
      program: the compiled step.
      step, steps: where the run stands, and where it ends.
      n: steps to trace; fewer if the run ends before.
    """
    self._directory, self._program = pathlib.Path(directory), program
    self._last = min(step + 2 + n, steps)
    self._first = max(min(step + 2, self._last - 1), step)  # The trace begins after this step is done.
    self._open = contextlib.ExitStack()
    if step + 1 >= steps:
      raise ValueError(f"--profile: the run is at step {step} of {steps}: too few are left to trace; "
                       "give another --workdir or more steps")

  def after(self, step: int, state) -> str | None:
    """Call it after each step. Returns the table once the last one is traced."""
    if step == self._first:
      jax.block_until_ready(state)
      self._open.enter_context(trace(self._directory, self._program))
    if step != self._last:
      return None
    jax.block_until_ready(state)
    self._open.close()
    table = top_operations(self._directory)
    (self._directory / "top_operations.txt").write_text(table)
    return f"{table}\nprofile: {self._directory}"


def top_operations(directory, limit: int = 30) -> str:
  """The operations that took longest in the newest trace under `directory`, as a text table.

  A time is from an operation's start to its end, summed over its runs and over the devices traced; operations
  that overlap count fully, so the shares are of the sum, not of the clock.

  Raises:
    ValueError: no trace there, or one without operations.
  """
  rows = read_operations(directory)
  total = sum(r.ms for r in rows)
  by_kind = collections.Counter()
  for row in rows:
    by_kind[row.kind] += row.ms
  lines = [f"{total:.1f} ms in {sum(r.count for r in rows)} operations", "",
           f"{'kind':<16}{'ms':>12}{'share':>8}"]
  lines += [f"{kind:<16}{ms:>12.1f}{ms / total:>8.1%}" for kind, ms in by_kind.most_common()]
  lines += ["", f"{'ms':>10}{'share':>8}{'count':>8}  {'kind':<16}source"]
  lines += [f"{r.ms:>10.1f}{r.ms / total:>8.1%}{r.count:>8}  {r.kind:<16}{r.source}" for r in rows[:limit]]
  if rows[limit:]:
    rest = sum(r.ms for r in rows[limit:])
    lines.append(f"{rest:>10.1f}{rest / total:>8.1%}{sum(r.count for r in rows[limit:]):>8}  "
                 f"{len(rows) - limit} more")
  return "\n".join(lines) + "\n"


def read_operations(directory) -> list[Row]:
  """The same as data, longest first."""
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise ValueError(f"{directory} is not a directory")
  files = sorted(directory.rglob("*.xplane.pb"), key=lambda f: f.stat().st_mtime)
  if not files:
    raise ValueError(f"no *.xplane.pb under {directory}: run with --profile first")
  programs = sorted(directory.rglob(PROGRAM), key=lambda f: f.stat().st_mtime)
  sources, readers = _read_program(programs[-1].read_text() if programs else "")
  ms, count = collections.Counter(), collections.Counter()
  for name, duration, stats in _events(jax.profiler.ProfileData.from_file(str(files[-1])), readers):
    hlo, source = sources.get(name, ("", ""))
    source = _readable(stats.get("tf_op") or source) or name
    key = stats.get("hlo_category") or _kind(name, hlo), source
    ms[key] += duration / 1e6
    count[key] += 1
  if not ms:
    raise ValueError(f"{files[-1]} has no operations in it: nothing ran while it was traced")
  return [Row(*key, total, count[key]) for key, total in ms.most_common()]


def _events(data, readers):
  """(operation, ns, stats) of each run of each operation. A TPU has a line of them; the operations
  of a CPU are spread over threads."""
  for plane in data.planes:
    started, starts, ends = [], collections.defaultdict(list), collections.defaultdict(list)
    for line in plane.lines:
      if plane.name.startswith("/device:") and not line.name.startswith(("XLA Ops", "Stream")):
        continue
      for event in line.events:
        stats = dict(event.stats)
        if event.name.startswith("end: "):
          ends[event.name[5:]].append(event.start_ns)
        elif "hlo_op" in stats or "hlo_category" in stats:
          name = str(stats.get("hlo_op", event.name))
          starts[name].append(event.start_ns)
          if not name.startswith(CONTROL):
            started.append((name, event.start_ns, event.duration_ns, stats))
    for times in (*starts.values(), *ends.values()):
      times.sort()
    for name, start, duration, stats in started:
      # A CPU operation that other threads work on returns at once. It is over when it says "end", which
      # may be late, or when one that reads its result starts.
      over = [_first_after(start, ends[name])]
      over += [_first_after(start, starts[reader]) for reader in readers.get(name, ())]
      waited = min(over) - start if over[0] < math.inf else 0
      yield name, max(duration, waited), stats


def _first_after(start, times):
  i = bisect.bisect_right(times, start)
  return times[i] if i < len(times) else math.inf


def _read_program(text):
  """(operation -> (its HLO, the op_name that JAX gave it), operation -> those that read its result).

  A fusion is shown as the product in it, if there is one: that is most of its work.
  """
  found, readers = {}, collections.defaultdict(list)
  products, inside = {}, None  # Computation -> the product in it.
  for line in text.splitlines():
    if match := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
      inside = match[1]
    elif match := re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (.*)", line):
      name, (hlo, _, metadata) = match[1], match[2].partition("metadata=")
      op_name = re.search(r'op_name="([^"]*)"', metadata)
      found[name] = hlo, op_name[1] if op_name else ""
      if re.search(r"\bdot\(", hlo):
        products[inside] = found[name]
      if (calls := re.search(r" fusion\(.*calls=%?([\w.-]+)", hlo)) and calls[1] in products:
        found[name] = products[calls[1]]
      for operand in re.findall(r"%([\w.-]+)", hlo.partition(" calls=")[0]):
        readers[operand].append(name)
  return found, readers


def _kind(name, hlo):
  text = hlo.partition("(")[0] if " dot(" in hlo else f"{name} {hlo.partition('(')[0]}"
  return next((kind for kind, pattern in KIND if re.search(pattern, text)), "elementwise")


def _readable(op_name):
  """jit(train_step)/transpose(jvp())/while/body/closed_call/BTD,DF->BTF/dot_general
  -> backward BTD,DF->BTF."""
  if not op_name:
    return ""
  backward = "transpose(jvp" in op_name
  parts = [p for p in op_name.split("/")
           if p not in ("while", "body", "closed_call", "checkpoint", "rematted_computation")
           and not re.fullmatch(r"(jit\(\w*\)|transpose\(jvp\(\w*\)\)|jvp\(\w*\)|vmap\(\w*\))", p)]
  text = "/".join(parts).removesuffix("/dot_general") or "loop"
  return f"backward {text}" if backward else text


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("directory", help="of a run or of its trace")
  parser.add_argument("--limit", type=int, default=30, help="lines of the table")
  args = parser.parse_args(argv)
  try:
    print(top_operations(args.directory, args.limit), end="")
  except ValueError as e:
    print(e, file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())

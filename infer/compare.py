"""Is the difference between two evaluations real? Item by item, on the items that both have.

  python -m infer.compare runs/a/eval runs/b/eval                    every task that both have
  python -m infer.compare a/eval/capitals.jsonl b/eval/capitals.jsonl
  python -m infer.compare runs/a/eval runs/b/eval --json             the same as numbers

Differences are B - A. Scores of 0 and 1 are compared by McNemar's exact test, and their interval is that of
Bonett and Price (2012): Wald's, with one item added to each kind of disagreement. Others, and those of items
in clusters, by flipping the signs of the differences of items (or clusters): every way up to 14 of them, else
20,000 drawn ones; their interval, and a second p beside it, are the paired t-test's. Bits per byte are those
of all texts together, so a long text weighs more.

Items that were not asked the same way in both are refused by name. "needed" is how many items like these
would show a true difference as large as this one four times in five at 5 %; "found" is the true difference
that these items would show as often. Each p is of its own test alone.
"""
import argparse
import collections
import dataclasses
import itertools
import json
import math
import pathlib
import sys

import numpy as np
from scipy import special

from infer.eval import RESULTS, read_lines

LEVEL, POWER = 0.05, 0.8
EXACT, DRAWS = 14, 20_000  # Sign flips: all ways of so many differences, or so many drawn ones.
ROUNDING = 1e-9  # Relative: sums of differences this close are the same one.


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
  """One metric of one task in A and B, over the items of both.

  Attributes:
    n: items; n_groups: what is independent among them: items, or clusters.
    difference: B - A; low, high: its interval, None where one group does not tell.
    p: by `test`; p_t: the paired t-test's, None where the test is McNemar's.
    needed: items for this difference to be found; found: the difference that n items find. None: not known.
  """
  task: str
  metric: str
  n: int
  n_groups: int
  a: float
  b: float
  difference: float
  low: float | None
  high: float | None
  interval: str
  p: float | None
  test: str
  p_t: float | None
  needed: int | None
  found: float | None


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser("python -m infer.compare", description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("a", metavar="A", help="the --out of an evaluation, or one TASK.jsonl of it")
  parser.add_argument("b", metavar="B")
  parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
  args = parser.parse_args(argv)
  try:
    comparisons, notes = compare(read_tasks(args.a), read_tasks(args.b))
  except ValueError as e:
    print(f"{parser.prog}: error: {e}", file=sys.stderr)
    return 2
  for note in notes:
    print(f"note: {note}", file=sys.stderr)
  if args.json:
    print(json.dumps([dataclasses.asdict(c) for c in comparisons], indent=1))
  else:
    print("\n".join(make_table(comparisons)))
  return 0


def read_tasks(path) -> dict[str, tuple[dict, list[dict]]]:
  """Task -> (header, lines) of an evaluation's folder, or of one file.

  Raises:
    ValueError: it is none.
  """
  path = pathlib.Path(path)
  files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
  if not files:
    raise ValueError(f"{path} has no TASK.jsonl beside its {RESULTS}: is it the --out of infer.eval?")
  found = [read_lines(file) for file in files]
  return {header["task"]: (header, lines) for header, lines in found}


def compare(a: dict, b: dict) -> tuple[list[Comparison], list[str]]:
  """(comparisons, what the reader should know) of two of `read_tasks`.

  Raises:
    ValueError: they share no task or no item, or did not ask the same.
  """
  if not a.keys() & b.keys():
    raise ValueError(f"they share no task: A has {', '.join(a)}; B has {', '.join(b)}")
  comparisons, notes = [], []
  for name in a:
    if name not in b:
      notes.append(f"task {name} is in A alone")
      continue
    (header_a, lines_a), (header_b, lines_b) = a[name], b[name]
    pairs = _pair(name, header_a, lines_a, header_b, lines_b)
    if (most := max(len(lines_a), len(lines_b))) > len(pairs):
      notes.append(f"task {name}: {len(pairs)} items are in both, of {most}")
    notes += [f"task {name}: {key}={header_a.get(key)} in A, {header_b.get(key)} in B"
              for key in ("compute_dtype", "window", "overlap") if header_a.get(key) != header_b.get(key)]
    comparisons += _compare_task(name, pairs)
  return comparisons, notes + [f"task {name} is in B alone" for name in b if name not in a]


def _pair(name, header_a, lines_a, header_b, lines_b):
  """[(line of A, line of B)] of the items that both have, in A's order."""
  for key in ("kind", "version", "chat"):
    if header_a.get(key) != header_b.get(key):
      raise ValueError(f"task {name} was not asked the same way: {key}={header_a.get(key)} in A, "
                       f"{header_b.get(key)} in B")
  of_b = {line["id"]: line for line in lines_b}
  pairs = [(line, of_b[line["id"]]) for line in lines_a if line["id"] in of_b]
  if not pairs:
    raise ValueError(f"task {name}: A and B have no item in common")
  if other := [(x["id"], x["prompt"], y["prompt"]) for x, y in pairs if x["prompt"] != y["prompt"]]:
    shown = ", ".join(f"{i!r} ({x} in A, {y} in B)" for i, x, y in other[:3])
    raise ValueError(f"task {name}: the prompt hashes of {len(other)} of {len(pairs)} items differ: {shown}"
                     + (", ..." if len(other) > 3 else ""))
  return pairs


def _compare_task(name, pairs):
  clusters = [x.get("cluster") for x, _ in pairs]
  if all("bytes" in line for pair in pairs for line in pair):
    weights = [x["bytes"] for x, _ in pairs]
    bits = [[-line["logprob"] / math.log(2) for line in column] for column in zip(*pairs)]
    yield compare_metric(name, "bits_per_byte", *bits, clusters, weights)
  for metric in pairs[0][0].get("scores", ()):
    scores = [[line["scores"][metric] for line in column] for column in zip(*pairs)]
    yield compare_metric(name, metric, *scores, clusters)


def compare_metric(task: str, metric: str, a, b, clusters=None, weights=None) -> Comparison:
  """
  Args:
    a, b: a number an item.
    clusters: of each item, or None where it is alone.
    weights: what the sums of a and b are divided by the sum of; None: each item is 1.
  """
  a, b, n = np.asarray(a, float), np.asarray(b, float), len(a)
  weights = np.ones(n) if weights is None else np.asarray(weights, float)
  total = weights.sum()
  difference = float((b - a).sum() / total)
  keys = [i if c is None else c for i, c in enumerate(clusters if clusters is not None else [None] * n)]
  groups = collections.defaultdict(lambda: [0.0, 0.0])
  for key, d, w in zip(keys, b - a, weights):
    groups[key][0] += d
    groups[key][1] += w
  d_G, w_G = np.array(list(groups.values())).T
  G = len(d_G)
  binary = n == G and bool(np.isin([a, b], (0, 1)).all() and (weights == 1).all())
  stderr = math.sqrt(G / (G - 1) * ((d_G - difference * w_G) ** 2).sum()) / total if G > 1 else None
  low = high = p = p_t = None
  interval, test = "none", "none: one item or cluster"
  if binary and n > 1:
    low, high = bonett_price(int((b > a).sum()), int((b < a).sum()), n)
    p, interval, test = mcnemar(int((b > a).sum()), int((b < a).sum())), "Bonett-Price", "McNemar, exact"
  elif G > 1:
    half = special.stdtrit(G - 1, 1 - LEVEL / 2) * stderr
    low, high, interval = difference - half, difference + half, "t"
    p, test = flip_signs(d_G)
    moved = stderr > ROUNDING * abs(difference)
    p_t = float(2 * special.stdtr(G - 1, -abs(difference) / stderr)) if moved else float(difference == 0)
  found, needed = plan(stderr, n, difference, binary) if stderr else (None, None)
  return Comparison(task, metric, n, G, float(a.sum() / total), float(b.sum() / total), difference, low, high,
                    interval, p, test, p_t, needed, found)


def plan(stderr: float, n: int, difference: float, binary: bool) -> tuple[float, int | None]:
  """(the true difference that n items find, how many items find this one), POWER of the time at LEVEL.

  By the normal approximation; an exact test of counts asks for one item more than that (the correction for
  continuity: n |difference| - 1 has to reach so many standard deviations).
  """
  reach = special.ndtri(1 - LEVEL / 2) + special.ndtri(POWER)
  found = reach * stderr + binary / n
  if not difference:
    return found, None
  each, size = reach * stderr * math.sqrt(n), abs(difference)
  root = (each + math.sqrt(each ** 2 + 4 * binary * size)) / (2 * size)
  return found, max(2, math.ceil(root ** 2))


def mcnemar(n_b: int, n_a: int) -> float:
  """p of the exact test (McNemar 1947, with the binomial): n_b items are right in B alone, n_a in A alone."""
  n = n_b + n_a
  return min(1.0, 2 * float(special.bdtr(min(n_b, n_a), n, 0.5))) if n else 1.0


def bonett_price(n_b: int, n_a: int, n: int) -> tuple[float, float]:
  """The interval of a difference of two proportions of the same n items."""
  p_b, p_a = (n_b + 1) / (n + 2), (n_a + 1) / (n + 2)
  half = special.ndtri(1 - LEVEL / 2) * math.sqrt((p_b + p_a - (p_b - p_a) ** 2) / (n + 2))
  return max(-1.0, p_b - p_a - half), min(1.0, p_b - p_a + half)


def flip_signs(d_G) -> tuple[float, str]:
  """(p, which test): how often the sum of the differences is as far from 0 when each one's sign is a coin's.

  Drawn ones are drawn alike every time, and the signs as they are count as one of them.
  """
  d_G = d_G[d_G != 0]
  reached = abs(d_G.sum()) - ROUNDING * np.abs(d_G).sum()
  if len(d_G) <= EXACT:
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(d_G))))
    return float((np.abs(signs @ d_G) >= reached).mean()), "sign flips, all"
  rng, n_far, left = np.random.default_rng(0), 0, DRAWS
  while left:
    rows = min(left, max(1, 4_000_000 // len(d_G)))
    flipped = np.unpackbits(rng.integers(0, 256, (rows, -(-len(d_G) // 8)), np.uint8), axis=1)[:, :len(d_G)]
    n_far += int((np.abs(d_G.sum() - 2 * (flipped @ d_G)) >= reached).sum())
    left -= rows
  return (n_far + 1) / (DRAWS + 1), f"sign flips, {DRAWS:,}"


def make_table(comparisons: list[Comparison]) -> list[str]:
  rows = [("task", "metric", "n", "A", "B", "B - A", "95 % interval", "p", "test", "needed", "found")]
  for c in comparisons:
    interval = "-" if c.low is None else f"{c.low:+.4f} to {c.high:+.4f} ({c.interval})"
    p = "-" if c.p is None else f"{c.p:.2g}"
    n = str(c.n) if c.n_groups == c.n else f"{c.n} in {c.n_groups}"
    test = c.test + ("" if c.p_t is None else f"; t-test {c.p_t:.2g}")
    rows.append((c.task, c.metric, n, f"{c.a:.4f}", f"{c.b:.4f}", f"{c.difference:+.4f}", interval, p, test,
                 "-" if c.needed is None else f"{c.needed:,}", "-" if c.found is None else f"{c.found:.4f}"))
  width = [max(map(len, column)) for column in zip(*rows)]
  lines = ["  ".join(x.ljust(w) for x, w in zip(row, width)).rstrip() for row in rows]
  for c in comparisons:
    lines.append(f"{c.task}, {c.metric}: {_say(c)}")
  return lines


def _say(c):
  if c.p is None:
    return "no test: one item or cluster alone does not tell"
  if c.p <= LEVEL:
    return f"B is {'higher' if c.difference > 0 else 'lower'}"
  if c.needed is None:
    return "the same" + (", item by item" if not c.found else "")
  return f"no difference shown; one of this size would need about {c.needed:,} items, and there are {c.n:,}"


if __name__ == "__main__":
  sys.exit(main())

"""Two evaluations beside each other: the tests against scipy's, the levels by simulation, what is refused."""
import json
import math

import numpy as np
import pytest
from scipy import stats

from infer.compare import bonett_price, compare, compare_metric, flip_signs, main, mcnemar, read_tasks

HEAD = {"task": "t", "version": 1, "kind": "choice", "chat": False, "window": 64}


def evaluation(scores, name="t", **changes):
  """As read_tasks has it, of a task whose items have these scores."""
  lines = [{"id": str(i), "prompt": f"hash{i}", "scores": {"acc": float(s)}} for i, s in enumerate(scores)]
  return {name: (HEAD | {"task": name} | changes, lines)}


def only(a, b):
  (found,), notes = compare(a, b)
  assert notes == []
  return found


# Against others.

@pytest.mark.parametrize("n_b, n_a", [(0, 0), (1, 0), (6, 0), (3, 4), (15, 4), (200, 150)])
def test_mcnemar_is_the_binomial_test(n_b, n_a):
  wanted = stats.binomtest(n_b, n_b + n_a).pvalue if n_b + n_a else 1.0
  assert mcnemar(n_b, n_a) == pytest.approx(wanted, rel=1e-9) == pytest.approx(mcnemar(n_a, n_b), rel=1e-9)


def test_paired_t_is_scipys():
  rng = np.random.default_rng(0)
  a = rng.normal(size=40)
  b = a + 0.2 + 0.5 * rng.normal(size=40)
  c, wanted = compare_metric("t", "m", a, b), stats.ttest_rel(b, a)
  assert c.p_t == pytest.approx(wanted.pvalue, rel=1e-9) and c.interval == "t"
  assert (c.low, c.high) == pytest.approx(tuple(wanted.confidence_interval(0.95)), rel=1e-9)
  assert (c.n, c.n_groups, c.difference) == (40, 40, pytest.approx((b - a).mean()))
  other = compare_metric("t", "m", b, a)
  assert (other.difference, other.low) == pytest.approx((-c.difference, -c.high)) and other.p_t == c.p_t


def test_sign_flips_are_scipys_permutation_test():
  rng = np.random.default_rng(1)
  mean = lambda x, axis: x.mean(axis=axis)
  for n in (3, 9, 13):
    d = rng.normal(0.4, 1, n)
    wanted = stats.permutation_test((d,), mean, permutation_type="samples", n_resamples=np.inf).pvalue
    p, test = flip_signs(d)
    assert p == pytest.approx(wanted, rel=1e-9) and test == "sign flips, all"
  d = rng.normal(0.2, 1, 100)
  p, test = flip_signs(d)
  assert p == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.01) and test == "sign flips, 20,000"
  assert flip_signs(d) == (p, test)
  assert flip_signs(np.full(60, 0.1))[0] == pytest.approx(1 / 20_001)  # Never 0: the drawn ones are a sample.
  assert flip_signs(np.array([0.1, 0.2, -0.3]))[0] == 1  # Rounding makes no difference of a sum that is 0.
  assert flip_signs(np.zeros(5))[0] == 1


def test_bonett_and_prices_interval():
  """Their formula, written out; and it covers, where Wald's (no disagreement: a point) does not."""
  low, high = bonett_price(4, 1, 30)
  p12, p21, n = 5 / 32, 2 / 32, 32
  half = 1.959963985 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / n)
  assert (low, high) == pytest.approx((p12 - p21 - half, p12 - p21 + half))
  rng = np.random.default_rng(2)
  for p_b, p_a, n in ((0.02, 0.02, 40), (0.1, 0.05, 40), (0.3, 0.1, 100), (0.0, 0.05, 200)):
    kinds = rng.multinomial(n, (p_b, p_a, 1 - p_b - p_a), size=2000)
    inside = np.mean([low <= p_b - p_a <= high for low, high in (bonett_price(b, a, n) for b, a, _ in kinds)])
    assert inside >= 0.94, (p_b, p_a, n, inside)


# Levels.

@pytest.mark.parametrize("kind", ["binary", "numbers", "clusters", "bytes"])
def test_equal_models_are_called_different_in_5_percent(monkeypatch, kind):
  """No true difference; items that go together are one, or the level would be far off."""
  monkeypatch.setattr("infer.compare.DRAWS", 400)
  rng, called, covered, rounds = np.random.default_rng(3), 0, 0, 400
  for _ in range(rounds):
    n, clusters, weights = 40, None, None
    if kind == "binary":
      a, b = rng.random((2, n)) < 0.6
    else:
      a, b = rng.normal(size=(2, n))
    if kind == "clusters":
      shared = np.repeat(rng.normal(size=10), 4)
      b, clusters = b + shared, [str(i) for i in np.repeat(np.arange(10), 4)]
    if kind == "bytes":
      weights = rng.integers(10, 200, n)
      a, b = (a + 3) * weights, (b + 3) * weights
    c = compare_metric("t", "m", a, b, clusters, weights)
    called += c.p <= 0.05
    covered += c.low <= 0 <= c.high
  error = 3 * math.sqrt(0.05 * 0.95 / rounds)
  assert called / rounds < 0.05 + error and covered / rounds > 0.95 - error
  assert called / rounds > (0.005 if kind == "binary" else 0.05 - error)  # McNemar's exact test is careful.


@pytest.mark.parametrize("kind", ["binary", "numbers"])
def test_as_many_items_as_are_needed_find_it_four_times_in_five(monkeypatch, kind):
  monkeypatch.setattr("infer.compare.DRAWS", 400)
  rng = np.random.default_rng(4)

  def draw(n):
    if kind == "numbers":
      a = rng.normal(size=n)
      return a, a + 0.1 + 0.5 * rng.normal(size=n)
    sort = rng.choice(3, n, p=(0.12, 0.06, 0.82))  # B alone, A alone, both.
    return np.where(sort == 0, 0, 1), np.where(sort == 1, 0, 1)

  c = compare_metric("t", "m", *draw(20_000))
  assert c.p < 0.05 and c.found < abs(c.difference) and 100 < c.needed < 1000
  found = np.mean([compare_metric("t", "m", *draw(c.needed)).p <= 0.05 for _ in range(200)])
  assert 0.7 < found < 0.9
  few = compare_metric("t", "m", *draw(c.needed))
  assert few.found == pytest.approx(abs(c.difference), rel=0.3)


# What is compared.

def test_one_item_does_not_tell():
  c = only(evaluation([1]), evaluation([0]))
  assert (c.difference, c.low, c.p, c.needed) == (-1, None, None, None)
  c = compare_metric("t", "m", [1.0, 2.0], [2.0, 3.0], ["a", "a"])
  assert (c.n, c.n_groups, c.difference, c.p) == (2, 1, 1, None)


def test_the_same_is_the_same():
  c = only(evaluation([1, 0, 1]), evaluation([1, 0, 1]))
  assert (c.difference, c.p, c.test, c.needed) == (0, 1, "McNemar, exact", None) and c.low < 0 < c.high
  c = only(evaluation([0.1, 0.5, 2.0]), evaluation([0.1, 0.5, 2.0]))
  assert (c.difference, c.p, c.p_t, c.low, c.high) == (0, 1, 1, 0, 0)
  c = only(evaluation([0.1, 0.5, 2.0]), evaluation([0.2, 0.6, 2.1]))  # Always by as much.
  assert c.p == 0.25 and c.p_t == 0


def test_items_are_paired_by_their_id():
  """Those that both have; in whatever order."""
  a, b = evaluation([1, 0, 1, 1, 0]), evaluation([1, 1, 1, 0, 0, 0, 0])
  a["t"][1].reverse()
  (c,), notes = compare(a, b)
  assert (c.n, c.a, c.b, c.p) == (5, 0.6, 0.6, 1) and notes == ["task t: 5 items are in both, of 7"]
  (c,), notes = compare(a | evaluation([1], "x"), b | evaluation([1], "y"))
  assert notes[1:] == ["task x is in A alone", "task y is in B alone"]
  assert compare(a, evaluation([1, 1, 1, 0, 0], window=32))[1] == ["task t: window=64 in A, 32 in B"]


def test_texts_are_compared_by_their_bytes():
  """Two tokenizers: bits per byte, not per token; the long text weighs more."""
  make = lambda nats, tokens: {"t": (HEAD | {"kind": "text"}, [
    {"id": str(i), "prompt": "h", "logprob": -x * math.log(2), "tokens": t, "bytes": w}
    for i, (x, t, w) in enumerate(zip(nats, tokens, (10, 1000, 20)))])}
  c = only(make((20, 1000, 30), (5, 400, 9)), make((30, 900, 31), (9, 700, 9)))
  assert c.metric == "bits_per_byte" and c.n == 3
  assert (c.a, c.b, c.difference) == pytest.approx((1050 / 1030, 961 / 1030, -89 / 1030))
  d, w = np.array([10, -100, 1.0]), np.array([10, 1000, 20.0])
  stderr = math.sqrt(1.5 * ((d - d.sum() / 1030 * w) ** 2).sum()) / 1030
  assert c.high - c.low == pytest.approx(2 * stats.t.ppf(0.975, 2) * stderr)


@pytest.mark.parametrize("changes, said", [
  ({"version": 2}, "task t was not asked the same way: version=1 in A, 2 in B"),
  ({"chat": True}, "chat=False in A, True in B"), ({"kind": "generate"}, "kind=choice in A, generate in B")])
def test_what_was_asked_otherwise_is_refused(changes, said):
  with pytest.raises(ValueError, match=said):
    compare(evaluation([1, 0]), evaluation([1, 0], **changes))


def test_other_prompts_are_refused_by_name():
  a, b = evaluation([1, 0, 1]), evaluation([1, 0, 1])
  b["t"][1][1]["prompt"] = "other"
  with pytest.raises(ValueError, match=r"hashes of 1 of 3 items differ: '1' \(hash1 in A, other in B\)$"):
    compare(a, b)
  with pytest.raises(ValueError, match="they share no task: A has t; B has u"):
    compare(a, evaluation([1], "u"))
  b["t"][1][:] = [{"id": "z", "prompt": "h", "scores": {"acc": 1}}]
  with pytest.raises(ValueError, match="task t: A and B have no item in common"):
    compare(a, b)


# The command.

def write(folder, scores, **changes):
  folder.mkdir()
  for header, lines in evaluation(scores, **changes).values():
    text = "".join(json.dumps(line) + "\n" for line in [{"eval": header}, *lines])
    (folder / "t.jsonl").write_text(text)
  return str(folder)


def test_the_command(tmp_path, capsys):
  rng = np.random.default_rng(5)
  a = (rng.random(300) < 0.5) * 1.0
  b = np.where(rng.random(300) < 0.2, 1, a)
  A, B, C = (write(tmp_path / name, scores) for name, scores in zip("abc", (a, b, [1 - a[0], *a[1:]])))
  assert main([A, B]) == 0
  head, row, said = capsys.readouterr().out.splitlines()
  numbers = f"{a.mean():.4f}", f"{b.mean():.4f}", f"{b.mean() - a.mean():+.4f}"
  assert row.split()[:6] == ["t", "acc", "300", *numbers]
  assert "Bonett-Price" in row and "McNemar, exact" in row and said == "t, acc: B is higher"
  assert main([B, A]) == 0 and capsys.readouterr().out.splitlines()[-1] == "t, acc: B is lower"
  assert main([A, C, "--json"]) == 0
  (c,) = json.loads(capsys.readouterr().out)
  assert c["p"] == 1 and c["n"] == 300 and c["needed"] > 300
  assert main([A, f"{C}/t.jsonl"]) == 0
  assert capsys.readouterr().out.splitlines()[-1].startswith(
    "t, acc: no difference shown; one of this size would need about ")
  assert main([A, A]) == 0 and capsys.readouterr().out.splitlines()[-1] == "t, acc: the same, item by item"
  for wrong, said in ((tmp_path, "has no TASK.jsonl"),
                      (tmp_path / "none.jsonl", "is no file of python -m infer.eval"),
                      (write(tmp_path / "d", [1], chat=True), "chat=False in A, True in B")):
    assert main([A, str(wrong)]) == 2
    assert said in capsys.readouterr().err
  assert read_tasks(A).keys() == {"t"}

"""What a task file may say, what is asked, what comes of it; and it is the same however it is run."""
import dataclasses
import functools
import itertools
import json
import math
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest

from configs.tiny import get_config
from data.chat import Chat
from data.config import TokenizerConfig
from data.flags import as_json, write_config_json
from data.tokenizer import load_tokenizer, train_tokenizer
from infer import tasks
from infer.engine import Engine
from infer.eval import RESULTS, Lines, Reading, ask, evaluate, main, make_result, make_table, read_lines
from infer.load import keep_tokenizer
from infer.score import Score, Write, split_choices, window_scores
from infer.tasks import Item, Task, estimate, load_task, pick
from tests.fake_scorer import FakeEngine
from tests.test_chat import TEMPLATES, byte_level
from tests.test_generate import CORPUS, bytes_tokenizer
from tests.tiny import ROOT, make_params, mesh_of, model_config
from train.checkpoint import Checkpointer

WINDOW = 48
QUIET = lambda done, total, task: None


def write_task(path, head, items):
  path.write_text("".join(json.dumps(line) + "\n" for line in [head, *items]))
  return path


CHOICE = {"task": "capitals", "kind": "choice", "version": 1}
GENERATE = {"task": "sums", "kind": "generate", "version": 3, "max_tokens": 6, "stop": ["\n"],
            "normalise": "number"}
PARIS = {"id": "fr", "context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}


# Task files.

def test_a_task_file_is_read(tmp_path):
  task = load_task(write_task(tmp_path / "a.jsonl", CHOICE, [PARIS, {**PARIS, "id": 7, "cluster": 2}]))
  assert (task.name, task.kind, task.version) == ("capitals", "choice", 1)
  assert task.items[0] == Item(id="fr", context=PARIS["context"], choices=(" Paris", " Rome"), answer=0)
  assert (task.items[1].id, task.items[1].cluster) == ("7", "2")
  two = [{"context": "1+1=", "answers": ["2"]}] * 2
  nameless = load_task(write_task(tmp_path / "b.jsonl", GENERATE, two))
  assert [item.id for item in nameless.items] == ["0", "1"]
  assert (nameless.max_tokens, nameless.stop, nameless.normalise) == (6, ("\n",), "number")
  (tmp_path / "books").mkdir()
  for name in ("b", "a"):
    (tmp_path / "books" / f"{name}.txt").write_text(f"text {name}\u2028\n")
  books = load_task(tmp_path / "books")
  assert (books.name, [(i.id, i.text) for i in books.items]) == (
    "books", [("a", "text a\u2028\n"), ("b", "text b\u2028\n")])
  assert load_task(tmp_path / "books" / "a.txt").items == (Item(id="a", text="text a\u2028\n"),)


@pytest.mark.parametrize("lines, said", [
  ([{"task": "a", "kind": "chioce", "version": 1}], "line 1: the first line of a task is"),
  ([PARIS, PARIS], "line 1: the first line of a task is"),
  ([{"task": "a", "kind": "choice"}, PARIS], "line 1: version is missing"),
  ([{**CHOICE, "version": True}, PARIS], "version=True must be a whole number"),
  ([{**CHOICE, "version": 1.5}, PARIS], "version=1.5 must be a whole number"),
  ([{**CHOICE, "task": "../x"}, PARIS], "task='../x' must be letters"),
  ([{**CHOICE, "stop": ["a"]}, PARIS], "unknown field 'stop'"),
  ([{**GENERATE, "normalise": "lower"}, PARIS], "normalise='lower'; known: strip, words, number"),
  ([{**GENERATE, "max_tokens": 0}, PARIS], "max_tokens=0 must be at least 1"),
  ([{**GENERATE, "stop": [""]}, PARIS], "stop must be a list of at least 0 strings, none of them empty"),
  ([CHOICE], "no items after the first line"),
  ([CHOICE, PARIS, PARIS], "two items have the id 'fr'"),
  ([CHOICE, {**PARIS, "answr": 0}], "line 2: unknown field 'answr'; did you mean answer"),
  ([CHOICE, {**PARIS, "answer": 2}], "answer=2 must be an index of the 2 choices: 0 to 1"),
  ([CHOICE, {**PARIS, "answer": -1}], "answer=-1 must be an index"),
  ([CHOICE, {**PARIS, "answer": "0"}], "answer='0' must be a whole number"),
  ([CHOICE, {**PARIS, "choices": [" Paris"]}], "choices must be a list of at least 2 strings"),
  ([CHOICE, {**PARIS, "choices": [" Paris", ""]}], "none of them empty"),
  ([CHOICE, {**PARIS, "choices": [" Paris", 3]}], "choices must be a list"),
  ([CHOICE, {**PARIS, "context": "\ud800"}], "context holds half a surrogate pair at 0"),
  ([CHOICE, {**PARIS, "choices": ["a", "\udc00"]}], "choices holds half a surrogate pair"),
  ([CHOICE, [1]], "line 2: an item is an object"),
  ([{"task": "a", "kind": "text", "version": 1}, {"text": ""}], "text is empty"),
  ([GENERATE, {"context": "", "answers": []}], "answers must be a list of at least 1 strings"),
])
def test_a_mistake_in_a_task_file_is_named(tmp_path, lines, said):
  path = write_task(tmp_path / "a.jsonl", lines[0], lines[1:])
  with pytest.raises(ValueError) as e:
    load_task(path)
  assert str(path) in str(e.value) and said in str(e.value)


def test_a_line_that_is_no_json_is_named(tmp_path):
  path = tmp_path / "a.jsonl"
  for text in ("{", "[" * 100_000, ""):
    path.write_text(json.dumps(CHOICE) + "\n" + text + "\n")
    with pytest.raises(ValueError, match="line 2"):
      load_task(path)
  for name in ("none.jsonl", "a.csv", "none.txt"):
    with pytest.raises(ValueError, match=name):
      load_task(tmp_path / name)


@pytest.mark.parametrize("kind, text, wanted", [
  ("strip", " The cat.\n", "The cat."), ("words", "  The cat,\tan Animal! ", "cat animal"),
  ("words", "theater", "theater"), ("number", "so 3 + 4 = 1,007.50.", "1007.5"), ("number", "-12", "-12"),
  ("number", "100", "100"), ("number", "none", ""), ("number", "= .5", "0.5")])
def test_normalisation(kind, text, wanted):
  assert tasks.NORMALISE[kind](text) == wanted


def test_the_hash_is_of_what_is_asked_and_what_is_right():
  item = Item(id="a", context="c", choices=("x", "y"), answer=0)
  task = Task(name="t", kind="choice", version=1, items=(item,))
  asked = task.hash_item(item, False)
  assert task.hash_item(dataclasses.replace(item, id="b", cluster="q"), False) == asked
  other = [task.hash_item(item, True), task.hash_item(dataclasses.replace(item, answer=1), False),
           task.hash_item(dataclasses.replace(item, context="cx", choices=("", "y")), False)]
  generate = dataclasses.replace(task, kind="generate")
  for changes in ({}, {"stop": ("b",)}, {"max_tokens": 9}, {"normalise": "words"}):
    other.append(dataclasses.replace(generate, **changes).hash_item(item, False))
  assert len({asked, *other}) == 8


# Scores and their means.

def test_choices_that_tie_are_no_batchs_to_decide():
  assert pick([-3.0, -2.0, -2.0 + 1e-6], [1, 1, 1]) == (1, True)
  assert pick([-3.0, -2.0, -2.0 - 1e-6], [1, 1, 1]) == (1, True)
  assert pick([-3.0, -2.001, -2.0], [1, 1, 1]) == (2, False)
  assert pick([-3.0, -2.0], [4, 2]) == (0, False)


def test_the_length_of_a_choice_is_its_bytes():
  item = Item(id="a", context="c", choices=(" é東", " abc"), answer=0)
  task = Task(name="t", kind="choice", version=1, items=(item,))
  line = tasks.score_choice(task, item, [-5.5, -3.0])  # 5 bytes: -1.1 each; 3 bytes: -1.0.
  assert line["scores"] == {"acc": 0, "acc_bytes": 0} and line["picked"] == {"acc": 1, "acc_bytes": 1}
  line = tasks.score_choice(task, item, [-4.5, -3.0])
  assert line["scores"] == {"acc": 0, "acc_bytes": 1} and line["ties"] == []


def test_standard_errors():
  values = np.array([1, 0, 1, 1, 0, 1, 1, 1.0])
  e = estimate(values)
  assert (e.n, e.mean, e.how) == (8, 0.75, "items")
  assert e.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 7), rel=1e-12)
  x = np.random.default_rng(0).normal(size=50)
  assert estimate(x).stderr == pytest.approx(x.std(ddof=1) / math.sqrt(50), rel=1e-12)
  twice = estimate(np.repeat(x, 2), [str(i) for i in np.repeat(np.arange(50), 2)])  # Says no more than once.
  assert twice.stderr == pytest.approx(estimate(x).stderr, rel=1e-12) and twice.how == "clusters"
  assert estimate([1.0]).stderr is None and estimate([1.0, 0.0], ["a", "a"]).stderr is None
  mixed = estimate([1.0, 0.0, 1.0], [None, "a", "a"])
  assert mixed.stderr == pytest.approx(math.sqrt(2 * 2 * (1 / 3) ** 2) / 3, rel=1e-12)


def test_a_ratios_standard_error_is_that_of_repeated_samples():
  rng = np.random.default_rng(1)
  weight = rng.integers(20, 200, (2000, 60))
  value = weight * (1.5 + 0.3 * rng.normal(size=weight.shape))
  found = [estimate(v, None, w, "bytes") for v, w in zip(value, weight)]
  spread = np.std([e.mean for e in found])
  assert spread == pytest.approx(np.mean([e.stderr for e in found]), rel=0.05)
  assert found[0].how == "documents, by bytes"


# Tokens.

@functools.cache
def bpe():
  """Every byte, and some pieces with a space in front."""
  with tempfile.TemporaryDirectory() as folder:
    byte_level().save(f"{folder}/tokenizer.json")
    return load_tokenizer(f"{folder}/tokenizer.json")


@pytest.mark.parametrize("context", ["What is", "What is ", "What  ", "", " ", "in", "i"])
@pytest.mark.parametrize("bos", [True, False])
def test_what_is_read_is_the_context_and_the_choice(context, bos):
  """Whatever the border does to tokens: the text is the text, and choices are scored from one place on."""
  tokenizer = bpe()
  choices = (" a", " to be", "n", "\n\n", "a")
  ids, each = split_choices(tokenizer, context, choices, bos)
  marks = int(bos or ids == [tokenizer.bos_id])
  assert ids[:marks] == [tokenizer.bos_id] * marks and len(ids) > 0
  for choice, scored in zip(choices, each):
    assert scored and tokenizer.encode(context + choice) == ids[marks:] + scored
  whole = [tokenizer.encode(context + choice) for choice in choices]
  alone = tokenizer.encode(context)
  n = len(ids) - marks  # No further to the left than it must.
  assert n == len(alone) or any(w[:n + 1] != alone[:n + 1] for w in whole)
  if context in ("What  ", "i"):  # " a" and "in" are one token, whose beginning is the context's.
    assert n < len(alone)


def test_all_choices_are_scored_from_one_place_on():
  """The second one's first token begins within the context; the first one's does not."""
  tokenizer = bpe()
  ids, (first, second) = split_choices(tokenizer, "What  ", (" to be", "abc"), False)
  assert tokenizer.decode(ids) == "What " and tokenizer.decode(first) == "  to be"
  assert tokenizer.decode(second) == " abc" and tokenizer.decode(second[:1]) == " a"


@pytest.mark.parametrize("n", [1, 7, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("overlap", [1, 3, 8])
def test_windows_score_each_token_once(n, overlap):
  length, tokens = 8, list(range(100, 100 + n))
  windows, scored = window_scores(tokens, 1, length, overlap), []
  for i, w in enumerate(windows):
    assert 2 <= len(w.tokens) <= length + 1 and w.start >= (overlap if i else 1)
    assert w.tokens == [1, *tokens][len(scored) + 1 - w.start:][:len(w.tokens)]
    scored += w.tokens[w.start:]
  assert scored == tokens
  assert window_scores([], 1, length) == []


# Through a model.

@functools.cache
def model(mesh="one"):
  cfg = model_config(init="fan_in", vocab_size=bpe().vocab_size)
  return cfg, mesh_of(mesh), *make_params(cfg, mesh_of(mesh))


@functools.cache
def real_engine(slots, mesh="one"):
  cfg, mesh, _, params = model(mesh)
  return Engine(cfg, params, mesh, stop_ids=(bpe().eos_id,), slots=slots, max_length=WINDOW + 1,
                prefill_chunk=32)


def fake_engine(slots=8, mesh="one", piece=7):
  cfg, mesh, graphdef, params = model(mesh)
  return FakeEngine(cfg, graphdef, params, mesh, stop_ids=(bpe().eos_id,), slots=slots, piece=piece)


def reading(**changes):
  return Reading(bpe(), True, None, WINDOW, **changes)


@functools.cache
def made_tasks():
  """A task of each kind, with contexts that are shared, cut, empty; texts of one window and of several."""
  rng = np.random.default_rng(3)
  word = lambda: "".join(map(chr, rng.integers(97, 123, rng.integers(1, 6))))
  text = lambda n: " ".join(word() for _ in range(n))
  choices = [Item(id=f"q{i}", context="" if i == 3 else text(30 if i == 5 else 4), answer=i % 3,
                  choices=tuple(" " + text(int(rng.integers(1, 4))) for _ in range(3)),
                  cluster=str(i // 2)) for i in range(10)]
  return (
    Task(name="choose", kind="choice", version=1, items=tuple(choices)),
    Task(name="read", kind="text", version=1, items=tuple(
      Item(id=str(i), text=text(n)) for i, n in enumerate((1, 9, 30, 5)))),
    Task(name="say", kind="generate", version=2, max_tokens=5, stop=("e",), items=tuple(
      Item(id=str(i), context=text(n), answers=("x", "")) for i, n in enumerate((2, 30, 1, 3, 3)))),
  )


def run_all(engine, folder, how=None):
  how = how or reading()
  folder.mkdir()
  found = {}
  for task in made_tasks():
    prompts = {item.id: task.hash_item(item, False) for item in task.items}
    lines = Lines(folder / f"{task.name}.jsonl", {"task": task.name}, prompts)
    found[task.name] = evaluate(engine, how, task, ask(task, how), lines, QUIET)
    assert read_lines(lines.path) == ({"task": task.name}, found[task.name])
  return found


def check_same(got, wanted):
  """Every decision is; log-probabilities are within 1e-5 a token."""
  assert got.keys() == wanted.keys()
  for task in wanted:
    for x, y in zip(got[task], wanted[task], strict=True):
      assert x.keys() == y.keys()
      for key in x:
        if key in ("logprob", "logprobs"):
          np.testing.assert_allclose(x[key], y[key], atol=1e-5 * WINDOW, err_msg=f"{task} {x['id']}")
        else:
          assert x[key] == y[key], (task, x["id"], key)


@functools.cache
def wanted():
  """By the forward pass, an item at a time, from the definitions alone."""
  cfg, mesh, graphdef, params = model()
  forward = FakeEngine(cfg, graphdef, params, mesh)._forward
  tokenizer, found = bpe(), {}
  logprob = lambda ids, n: float(sum(forward([ids])[0][i - 1, ids[i]] for i in range(len(ids) - n, len(ids))))
  bos = [tokenizer.bos_id]
  for task in made_tasks():
    for item in task.items:
      context = bos + tokenizer.encode(item.context)
      if task.kind == "choice":
        ids = [tokenizer.encode(choice) for choice in item.choices]
        room = WINDOW + 1 - max(map(len, ids))
        kept = context if len(context) <= room else bos + context[len(context) - room + 1:]
        found[task.name, item.id] = [logprob(kept + each, len(each)) for each in ids]
      elif task.kind == "text":
        ids, total, done = tokenizer.encode(item.text), 0.0, 0
        while done < len(ids):
          n = min(WINDOW, len(ids) - done)
          before = (bos + ids)[:done + 1][-(WINDOW + 1 - n):]
          total, done = total + logprob(before + ids[done:done + n], n), done + n
        found[task.name, item.id] = total
      else:
        room, made = WINDOW - task.max_tokens, []
        ids = context if len(context) <= room else bos + context[len(context) - room + 1:]
        ends = lambda: "e" in tokenizer.decode(made) or made[-1:] == [tokenizer.eos_id]
        while len(made) < task.max_tokens and not ends():
          made.append(int(forward([ids + made])[0][len(ids + made) - 1].argmax()))
        found[task.name, item.id] = tokenizer.decode(made).partition("e")[0]
  return found


def check_wanted(found):
  for task in made_tasks():
    for item, line in zip(task.items, found[task.name], strict=True):
      expected = wanted()[task.name, item.id]
      if task.kind == "generate":  # Half a character at the end is dropped.
        assert line["text"].rstrip("\ufffd") == expected.rstrip("\ufffd"), item.id
        assert line["scores"]["exact_match"] == (line["text"].strip() in ("", "x"))
      else:
        got = line["logprobs" if task.kind == "choice" else "logprob"]
        np.testing.assert_allclose(got, expected, atol=2e-4, err_msg=item.id)
  assert ["cut" in line for line in found["choose"]] == [i == 5 for i in range(10)]
  assert sum(line["scores"]["acc"] for line in found["choose"]) not in (0, 10)


def test_scores_are_those_of_the_forward_pass(tmp_path):
  """Whatever order answers come in, and in what pieces."""
  found = run_all(fake_engine(), tmp_path / "a")
  check_wanted(found)
  for slots, piece in ((1, 1), (3, 100)):
    check_same(run_all(fake_engine(slots, piece=piece), tmp_path / str(slots)), found)


def test_more_overlap_is_more_context(tmp_path):
  """Each token is scored with at least as many before it, so the long text's is another number; the short
  ones' are not."""
  one, many = (run_all(fake_engine(), tmp_path / str(n), reading(overlap=n))["read"] for n in (1, 32))
  assert [x["tokens"] for x in one] == [x["tokens"] for x in many]
  assert [abs(x["logprob"] - y["logprob"]) > 1e-3 for x, y in zip(one, many)] == [False, False, True, False]


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary(tmp_path):
  """All logits 0: log2(V) bits a token, which is as many a byte where tokens are bytes."""
  cfg, mesh, graphdef, params = model()
  zero = jax.tree.map(lambda a: a * 0, params)
  tokenizer = bytes_tokenizer(["x"] * (cfg.vocab_size - 257))
  how = Reading(tokenizer, True, None, WINDOW)
  items = Item(id="a", text="naïve 東" * 30), Item(id="b", text="?")
  task = Task(name="read", kind="text", version=1, items=items)
  lines = Lines(tmp_path / "read.jsonl", {}, {})
  found = evaluate(FakeEngine(cfg, graphdef, zero, mesh), how, task, ask(task, how), lines, QUIET)
  assert [line["bytes"] for line in found] == [30 * 10, 1]
  means = tasks.summarise(found)
  assert means["bits_per_byte"].mean == pytest.approx(math.log2(cfg.vocab_size), rel=1e-6)
  assert means["perplexity"].mean == pytest.approx(cfg.vocab_size, rel=1e-5)


class Killed(Exception):
  pass


def test_a_killed_evaluation_goes_on(tmp_path):
  """Items that are done are kept, even where the kill left half a line; then all is as if nothing was."""
  whole = run_all(fake_engine(), tmp_path / "whole")["choose"]
  task, how = made_tasks()[0], reading()
  prompts = {item.id: task.hash_item(item, False) for item in task.items}
  open_lines = lambda: Lines(tmp_path / "choose.jsonl", {"task": "choose"}, prompts)

  def stop_at(n):
    def stop(done, total, name):
      if done == n:
        raise Killed
    return stop

  for n in (2, 4):
    with pytest.raises(Killed):
      evaluate(fake_engine(slots=3), how, task, ask(task, how), open_lines(), stop_at(n))
    with open(tmp_path / "choose.jsonl", "a") as f:
      f.write('{"id": "q9", "prom')
  assert len(read_lines(tmp_path / "choose.jsonl")[1]) == 4
  engine, calls = fake_engine(slots=3), []
  found = evaluate(engine, how, task, ask(task, how), open_lines(), lambda *call: calls.append(call))
  check_same({"choose": found}, {"choose": whole})
  assert len(engine.submitted) == 3 * 6 and calls[0] == (4, 10, "choose") and calls[-1] == (10, 10, "choose")
  assert [line["id"] for line in read_lines(tmp_path / "choose.jsonl")[1]] == [f"q{i}" for i in range(10)]
  engine = fake_engine()
  assert evaluate(engine, how, task, ask(task, how), open_lines(), QUIET) == found and not engine.submitted
  some = dataclasses.replace(task, items=task.items[2:4])  # Fewer items lose none of the others.
  assert evaluate(engine, how, some, ask(some, how), open_lines(), QUIET) == found[2:4]
  assert len(read_lines(tmp_path / "choose.jsonl")[1]) == 10


def test_what_is_of_something_else_is_not_gone_on_with(tmp_path):
  path, prompts = tmp_path / "t.jsonl", {"a": "hash"}
  lines = Lines(path, {"model": "m", "step": 1}, prompts)
  lines.add({"id": "a", "prompt": "hash"})
  assert Lines(path, {"model": "moved", "step": 1}, prompts).done.keys() == {"a"}
  with pytest.raises(ValueError, match=r"t.jsonl is of step=1, and this is step=2"):
    Lines(path, {"model": "m", "step": 2}, prompts)
  with pytest.raises(ValueError, match="item 'a' was another when it was evaluated"):
    Lines(path, {"model": "m", "step": 1}, {"a": "other"})
  path.write_text("half a line")
  with pytest.raises(ValueError, match="t.jsonl is no file of python -m infer.eval"):
    Lines(path, {"model": "m", "step": 1}, prompts)


def test_what_would_be_cut_is_refused_by_name():
  long, how = "x" * (WINDOW + 1), reading()
  choose = Task(name="t", kind="choice", version=1, items=(
    Item(id="ok", context=long, choices=("x" * WINDOW, "b"), answer=0),))
  (asked,) = ask(choose, how)
  assert asked.n_cut == WINDOW + 1 and [len(job.tokens) for job in asked.jobs] == [WINDOW + 1, 2]
  with pytest.raises(ValueError, match=f"task t, item 'q': a choice of {WINDOW + 1} tokens would be cut"):
    ask(dataclasses.replace(choose, items=(Item(id="q", context="a", choices=(" b", long), answer=0),)), how)
  write = Task(name="t", kind="generate", version=1, max_tokens=WINDOW, items=(Item(id="q", answers=("a",)),))
  with pytest.raises(ValueError, match=f"max_tokens={WINDOW} leaves no room for a context"):
    ask(write, how)
  talk = Reading(bpe(), True, Chat(bpe(), TEMPLATES["chatml"]), WINDOW)
  with pytest.raises(ValueError, match="item 'ok': the chat template makes .* tokens of it, and there"):
    ask(choose, talk)


def test_a_chat_template_asks_the_user():
  tokenizer = bpe()
  chat = Chat(tokenizer, TEMPLATES["chatml"])
  how = Reading(tokenizer, True, chat, 400)
  asked = chat.encode([{"role": "user", "content": "Hi <s>"}])
  choose = Task(name="t", kind="choice", version=1, items=(
    Item(id="a", context="Hi <s>", choices=(" in", "\n\nin a"), answer=0),))
  jobs = ask(choose, how)[0].jobs
  assert jobs == [Score(asked + tokenizer.encode(c), len(asked)) for c in ("in", "in a")]
  write = Task(name="t", kind="generate", version=1, items=(Item(id="a", context="Hi <s>", answers=("a",)),))
  (job,) = ask(write, how)[0].jobs
  assert isinstance(job, Write) and job.prompt == asked and job.sampling.temperature == 0


def test_no_number_is_no_score(tmp_path):
  cfg, mesh, graphdef, params = model()
  broken = jax.tree.map(lambda a: a * np.nan, params)
  with pytest.raises(FloatingPointError, match="task choose, item 'q"):
    run_all(FakeEngine(cfg, graphdef, broken, mesh), tmp_path / "a")


def test_the_table_says_what_there_is(tmp_path):
  found = run_all(fake_engine(), tmp_path / "a")
  about = {"task": "choose", "version": 1, "template": None}
  results = {"choose": make_result(about, found["choose"]),
             "read": make_result(about | {"task": "read"}, found["read"])}
  table = make_table(results)
  acc = results["choose"]["metrics"]["acc"]
  assert table[1].split()[:6] == ["choose", "1", "acc", "10", f"{acc['mean']:.4f}", f"{acc['stderr']:.4f}"]
  read = found["read"]
  nats, n = -sum(line["logprob"] for line in read), {k: sum(x[k] for x in read) for k in ("tokens", "bytes")}
  metrics = results["read"]["metrics"]
  assert metrics["bits_per_byte"]["mean"] == pytest.approx(nats / math.log(2) / n["bytes"])
  assert metrics["perplexity"]["mean"] == pytest.approx(math.exp(nats / n["tokens"]))
  assert metrics["perplexity"]["stderr"] > 0
  assert "clusters" in table[1] and results["choose"]["prompts"] in table[1] and table[1].endswith("none")
  assert [row.split()[2] for row in table[1:5]] == ["acc", "acc_bytes", "perplexity", "bits_per_byte"]
  assert table[5:] == ["choose: 1 of 10 contexts did not fit and were cut"]
  assert results["choose"]["prompts"] != make_result(about, found["choose"][::-1])["prompts"]


# The engine itself.

QUICK = (3, "one"), (8, "all")


@pytest.mark.parametrize("slots, mesh", [
  pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
  for case in itertools.product((1, 3, 8, 32), ("one", "data", "all"))])
def test_the_engine_decides_the_same_whatever_its_batch_and_mesh(tmp_path, slots, mesh):
  """1 device and 8: as the forward pass of one item at a time does."""
  found = run_all(real_engine(slots, mesh), tmp_path / "a")
  check_wanted(found)
  check_same(found, run_all(fake_engine(), tmp_path / "b"))


# The command, on a run on disk and on a model with a chat template.

@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
  path = tmp_path_factory.mktemp("runs") / "small"
  path.mkdir()
  cfg = get_config()
  cfg.data.tokenizer.vocab_size, cfg.model.init, cfg.seq_len = 320, "fan_in", 48
  cfg.validate(n_devices=8)
  train_tokenizer(CORPUS, TokenizerConfig(vocab_size=320), path.parent / "elsewhere.model")
  keep_tokenizer(path.parent / "elsewhere.model", "sentencepiece", path)
  write_config_json(path / "config.json", cfg, [])
  checkpoints = Checkpointer(path / "checkpoints", cfg.checkpoint)
  for step in (20, 40):
    params = make_params(cfg.model, mesh_of("one"), seed=step)[1]
    checkpoints.save(step, {"params": params}, {"config": as_json(cfg)})
  checkpoints.wait()
  return path


@pytest.fixture
def task_files(tmp_path):
  items = [{"context": "def f(x):\n  return", "choices": [" x", " x + 1", " the"], "answer": i % 3}
           for i in range(4)]
  write_task(tmp_path / "code.jsonl", {**CHOICE, "task": "code"}, items)
  write_task(tmp_path / "sums.jsonl", GENERATE, [{"context": f"{i} + 1 =", "answers": [str(i + 1)]}
                                                 for i in range(3)])
  (tmp_path / "fox.txt").write_text(CORPUS[0])
  return ",".join(str(tmp_path / name) for name in ("code.jsonl", "sums.jsonl", "fox.txt"))


def test_the_command(run_path, task_files, tmp_path, capsys):
  out = tmp_path / "out"
  command = [f"--run={run_path}", f"--out={out}"]
  assert main([*command, f"--tasks={task_files}"]) == 0
  shown = capsys.readouterr()
  assert [row.split()[::2][:2] for row in shown.out.splitlines()[1:6]] == [
    ["code", "acc"], ["code", "acc_bytes"], ["sums", "exact_match"], ["fox", "perplexity"],
    ["fox", "bits_per_byte"]]
  assert "step 40" in shown.err
  results = json.loads((out / RESULTS).read_text())
  assert results.keys() == {"code", "sums", "fox"}
  code = results["code"]
  said = {"n": 4, "version": 1, "chat": False, "template": None, "step": 40}
  assert code.items() >= said.items()
  assert code["metrics"]["acc"]["mean"] in (0.25, 0.5)
  assert len(code["prompts"]) == len(code["checkpoint"]) == 16
  assert results["sums"]["version"] == 3 and results["fox"]["metrics"]["bits_per_byte"]["stderr"] is None
  header, lines = read_lines(out / "code.jsonl")
  assert header["window"] == 48 and [line["id"] for line in lines] == ["0", "1", "2", "3"]
  # Once more: nothing is left to do, and no engine is made for it. Other weights are refused.
  assert main([*command, f"--tasks={task_files}"]) == 0
  again = capsys.readouterr()
  assert again.out == shown.out and "step 40" not in again.err
  assert main([*command, f"--tasks={task_files}", "--step=20"]) == 2
  assert "code.jsonl is of step=40, and this is step=20: give another --out" in capsys.readouterr().err
  assert main([*command[:1], f"--out={out}2", f"--tasks={task_files}", "--step=20", "--limit=2"]) == 0
  from infer import compare
  assert compare.main([str(out), f"{out}2"]) == 0
  shown = capsys.readouterr()
  assert "fox, bits_per_byte: no test" in shown.out and "task code: 2 items are in both, of 4" in shown.err


@pytest.mark.parametrize("flags, said", [
  (["--tasks=x.txt"], "give --run=DIR"), (["--run=a", "--model=b", "--tasks=x.txt"], "not both"),
  (["--run=a"], "give --tasks=FILE"), (["--run=a", "--tasks=none.jsonl"], "none.jsonl cannot be read"),
  (["--run=a", "--tsks=x"], "did you mean --tasks"),
  (["--run=a", "--tasks=T", "--slots=0"], "--slots=0 must be"),
  (["--run=a", "--tasks=T,T"], "two of them are called code"),
  (["--run=a", "--tasks=T", "--chat"], "--model=DIR"),
  (["--model=a", "--tasks=x.yaml", "--chat"], "--chat does not go with"),
  (["--run=a", "--tasks=none.yaml"], "none.yaml: no such file"),
  (["--run=none", "--tasks=T"], "is no run"),
  (["--run=RUN", "--tasks=T", "--overlap=49"], "--overlap=49 must be at most the window, 48"),
  (["--run=RUN", "--tasks=T", "--step=7"], "--step=7 was not saved; saved: 20, 40"),
  (["--run=RUN", "--tasks=T", "--weights=ema"], "--weights=ema"),
  (["--run=RUN", "--tasks=T", "--tensor=3"], "tensor"),
  (["--run=RUN", "--tasks=T", "--window=3"], "item '0': a choice of"),
])
def test_mistakes_are_told_and_exit_with_2(run_path, task_files, tmp_path, capsys, flags, said):
  code = task_files.split(",")[0]
  swap = lambda flag: flag.replace("=RUN", f"={run_path}").replace("=T", f"={code}").replace(",T", f",{code}")
  assert main([*map(swap, flags), f"--out={tmp_path / 'out'}"]) == 2
  assert said in capsys.readouterr().err


def test_cheap_mistakes_need_no_device():
  program = ("import sys; from infer.eval import main; code = main(['--run=x', '--tasks=none.txt']); "
             "sys.exit(code if 'jax' not in sys.modules else 9)")
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and "none.txt cannot be read" in done.stderr


def test_the_help_teaches_the_format(capsys):
  with pytest.raises(SystemExit):
    main(["--help"])
  shown = capsys.readouterr().out
  for word in ('{"task": "capitals", "kind": "choice", "version": 1}', "--overlap", "normalise", "cluster"):
    assert word in shown

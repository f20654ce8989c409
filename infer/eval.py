"""Evaluates a model on task files, through the engine that serves it.

  python -m infer.eval --run=runs/quickstart --tasks=held_out.txt          perplexity, bits per byte
  python -m infer.eval --model=smollm2 --tasks=capitals.jsonl,books/       multiple choice; a folder of texts
  python -m infer.eval --model=smollm2 --chat --tasks=sums.jsonl           through the model's chat template
  python -m infer.eval --model=smollm2 --tasks=piqa.yaml --limit=100       lm-eval's own tasks (extra [eval])
  python -m infer.compare runs/a/eval runs/b/eval                          is the difference real?

--out gets results.json, and TASK.jsonl with a line an item: its scores, what they were made of, and a hash
of what was asked. A command that was killed goes on where it was: items that are done are kept. Decisions are
the same whatever --slots or the devices, as --compute_dtype=float32 (the default) computes them;
log-probabilities but for rounding. Choices within 1e-4 nats of each other tie, and the first of them counts.

A context that does not fit is cut at its beginning (its line says by how many tokens); a choice never is.
Texts are read in windows. A YAML task of lm-eval may name code to run, beside it: use those that you trust.
Exit codes: 0 done; 2 a mistake, named before anything is evaluated; 1 a failure.
"""
import argparse
import collections
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
import time

from data.files import replacing
from infer import tasks
from infer.flags import parse_strictly

RESULTS = "results.json"
NO_HUB = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def main(argv: list[str] | None = None) -> int:
  parser = make_parser()
  try:
    args = _parse(parser, argv)
    loaded, yamls = _load_tasks(args)
  except ValueError as e:
    print(f"{parser.prog}: error: {e}", file=sys.stderr)
    return 2
  from jax.errors import JaxRuntimeError  # JAX and its devices, after the cheap mistakes.

  from model.hub.orbax import CheckpointError
  try:
    try:
      work = _prepare(args, loaded, yamls)
    except ValueError as e:
      print(f"{parser.prog}: error: {e}", file=sys.stderr)
      return 2
    results = _do(work)
  except (OSError, FloatingPointError, CheckpointError, JaxRuntimeError) as e:
    print(f"{parser.prog}: failed: {type(e).__name__}: {e}", file=sys.stderr)
    return 1
  print("\n".join(make_table(results)))
  return 0


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser("python -m infer.eval", description=__doc__, epilog=tasks.__doc__,
                                   allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument_group("what").add_argument
  add("--run", metavar="DIR", help="the run's folder (its --workdir), or the newest finished of DIR-*")
  add("--model", metavar="DIR", help="instead: an imported model's folder")
  add("--tasks", metavar="A,B", help="task files, texts, folders of texts, lm-eval's YAML files")
  add("--chat", action="store_true", help="with --model: a context is what the user says, in the model's "
      "chat template, and the assistant answers; white space before a choice is left out")
  add("--limit", type=int, metavar="N", help="only the first N items of each task")
  add("--out", metavar="DIR", help="(eval in the model's folder)")

  add = parser.add_argument_group("with which weights, and how").add_argument
  add("--weights", choices=("params", "ema"), help="(ema if the run keeps it)")
  add("--step", type=int, metavar="N", help="of this checkpoint (the newest good one)")
  add("--compute_dtype", choices=("float32", "bfloat16"), default="float32",
      help="(float32; in bfloat16 close decisions may depend on what else is in the batch)")
  add("--window", type=int, metavar="N", help="most tokens that the model reads at once (its training's)")
  add("--overlap", type=int, default=1, metavar="N", help="of a text: tokens that each window repeats (1, "
      "which is lm-eval's; more costs time, and gives tokens after a border more context)")
  add("--slots", type=int, default=16, metavar="N", help="requests that run together (%(default)s)")
  add("--tensor", type=int, default=1, metavar="N", help="devices that share each layer (%(default)s)")
  return parser


def _parse(parser, argv):
  args = parse_strictly(parser, argv)
  if args.run and args.chat:
    raise ValueError("--chat is about a chat template: it goes with --model=DIR")
  if not args.tasks:
    raise ValueError("give --tasks=FILE,... (--help says what a task file is)")
  for name in ("limit", "window", "overlap", "slots", "tensor"):
    if getattr(args, name) is not None and getattr(args, name) < 1:
      raise ValueError(f"--{name}={getattr(args, name)} must be at least 1")
  return args


def _load_tasks(args):
  """(tasks, paths of YAML files)."""
  paths = [pathlib.Path(path) for path in args.tasks.split(",") if path]
  yamls = [path for path in paths if path.suffix in (".yaml", ".yml")]
  loaded = [tasks.load_task(path) for path in paths if path not in yamls]
  for name, n in collections.Counter(task.name for task in loaded).items():
    if n > 1:
      raise ValueError(f"--tasks: two of them are called {name}, and their results would be one file")
  if yamls:
    if args.chat:
      raise ValueError("--chat does not go with lm-eval's tasks: they write their prompts as text, in which "
                       "no special token is one")
    for path in yamls:
      if not path.is_file():
        raise ValueError(f"{path}: no such file")
    from importlib.util import find_spec
    if find_spec("lm_eval") is None:
      raise ValueError(f"{yamls[0]} is a task of lm-eval, which is not installed: pip install -e '.[eval]'")
    for name in NO_HUB:  # Before anything imports it: local files only, unless someone says 0.
      os.environ.setdefault(name, "1")
  return [dataclasses.replace(task, items=task.items[:args.limit]) for task in loaded], yamls


# What is asked.

@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
  """How a model reads what a task says.

  Attributes:
    bos: texts begin with the beginning marker.
    chat: its data.chat.Chat, or None.
    window: most tokens that it reads at once. A request has one more at most, the last, which is only scored.
  """
  tokenizer: object
  bos: bool
  chat: object
  window: int
  overlap: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
  """An item as requests: of each choice, of the text's windows, or the one that writes."""
  item: tasks.Item
  jobs: list
  n_cut: int = 0  # Tokens of the context that are left out.


def ask(task: tasks.Task, reading: Reading) -> list[Asked]:
  """
  Raises:
    ValueError: a choice, or what is to be written, is longer than the window; a chat template's text is.
  """
  return [_ASK[task.kind](task, item, reading) for item in task.items]


def _ask_text(task, item, reading):
  from infer.score import window_scores
  tokens = reading.tokenizer.encode(item.text)
  if not tokens:
    raise ValueError(f"task {task.name}, item {item.id!r}: its text has no token")
  return Asked(item, window_scores(tokens, reading.tokenizer.bos_id, reading.window, reading.overlap))


def _ask_choice(task, item, reading):
  from infer.score import Score, split_choices
  if reading.chat is None:
    context, choices = split_choices(reading.tokenizer, item.context, item.choices, reading.bos)
  else:
    context = _say(task, item, reading)
    choices = [reading.tokenizer.encode_inner(choice.lstrip() or choice) for choice in item.choices]
  longest = max(map(len, choices))
  if longest > reading.window:
    raise ValueError(f"task {task.name}, item {item.id!r}: a choice of {longest} tokens would be cut: the "
                     f"window is {reading.window} (--window)")
  kept = _cut(task, item, reading, context, reading.window + 1 - longest)
  return Asked(item, [Score(kept + choice, len(kept)) for choice in choices], len(context) - len(kept))


def _ask_generate(task, item, reading):
  from infer.sampling import Sampling
  from infer.score import Write
  if task.max_tokens >= reading.window:
    raise ValueError(f"task {task.name}: max_tokens={task.max_tokens} leaves no room for a context in a "
                     f"window of {reading.window} (--window)")
  if reading.chat is None:
    context = reading.tokenizer.encode(item.context)
    context = [reading.tokenizer.bos_id] * (reading.bos or not context) + context
  else:
    context = _say(task, item, reading)
  kept = _cut(task, item, reading, context, reading.window - task.max_tokens)
  sampling = Sampling(max_tokens=task.max_tokens, temperature=0.0, stop=task.stop)
  return Asked(item, [Write(kept, sampling)], len(context) - len(kept))


_ASK = {"text": _ask_text, "choice": _ask_choice, "generate": _ask_generate}


def _say(task, item, reading):
  try:
    return reading.chat.encode([{"role": "user", "content": item.context}])
  except ValueError as e:
    raise ValueError(f"task {task.name}, item {item.id!r}: {e}") from None


def _cut(task, item, reading, context, room):
  """The end of the context; the beginning marker stays."""
  if len(context) <= room:
    return context
  if reading.chat is not None:
    raise ValueError(f"task {task.name}, item {item.id!r}: the chat template makes {len(context)} tokens of "
                     f"it, and there is room for {room} (--window)")
  n_marks = min(int(reading.bos), room - 1)
  return context[:n_marks] + context[len(context) - (room - n_marks):]


def longest_request(asked: list[Asked]) -> int:
  """Tokens, with those that are to be written."""
  from infer.score import Score
  return max(len(job.tokens) if isinstance(job, Score) else len(job.prompt) + job.sampling.max_tokens
             for one in asked for job in one.jobs)


# The work.

class Lines:
  """The items of one task that are done: a file of JSON lines which survives a kill. The first is its header.

  Attributes:
    done: id -> line.
  """

  def __init__(self, path, header: dict, prompts: dict[str, str]):
    """Args:
      header: what the answers depend on beside the items. "model" names it only.
      prompts: id -> hash of what is asked, of each item to be done. Lines of other items are kept too.

    Raises:
      ValueError: the file's answers are of something else.
    """
    self.path, self.header, self.done = pathlib.Path(path), header, {}
    if not self.path.exists():
      with replacing(self.path) as part:
        part.write_text(json.dumps({"eval": header}) + "\n")
      return
    there, lines = read_lines(self.path)
    if unlike := [k for k in {**header, **there} if k != "model" and header.get(k) != there.get(k)]:
      raise ValueError(f"{self.path} is of {unlike[0]}={there.get(unlike[0])}, and this is "
                       f"{unlike[0]}={header.get(unlike[0])}: give another --out, or move that file away")
    self.done = {line["id"]: line for line in lines}
    changed = [i for i, prompt in prompts.items() if i in self.done and self.done[i]["prompt"] != prompt]
    if changed:
      raise ValueError(f"{self.path}: item {changed[0]!r} was another when it was evaluated: give another "
                       "--out, or move that file away")
    self._write(self.done.values())  # Half a line, of a kill, goes.

  def add(self, line: dict) -> None:
    self.done[line["id"]] = line
    with open(self.path, "a", encoding="utf-8") as f:
      f.write(json.dumps(line) + "\n")

  def finish(self, ids) -> list[dict]:
    """The lines of these items, in this order, which is then also the file's."""
    rest = self.done.keys() - set(ids)
    self._write([self.done[i] for i in [*ids, *(i for i in self.done if i in rest)]])
    return [self.done[i] for i in ids]

  def _write(self, lines):
    with replacing(self.path) as part:
      part.write_text("".join(json.dumps(line) + "\n" for line in [{"eval": self.header}, *lines]))


def read_lines(path) -> tuple[dict, list[dict]]:
  """(header, items) of a TASK.jsonl; half a line at its end is none.

  Raises:
    ValueError: it is no such file.
  """
  try:
    whole = pathlib.Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    header, *lines = map(json.loads, whole)
    header = header["eval"]
    _ = {(line["id"], line["prompt"]) for line in lines}
    return header, lines
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise ValueError(f"{path} is no file of python -m infer.eval ({type(e).__name__}: {e})") from None


def evaluate(engine, reading: Reading, task: tasks.Task, asked: list[Asked], lines: Lines,
             progress) -> list[dict]:
  """Does the items that are not done, and returns the lines of all, in order.

  Raises:
    FloatingPointError: the model said something that is no number.
  """
  from infer.score import answer
  todo = [one for one in asked if one.item.id not in lines.done]
  n_done = len(asked) - len(todo)
  progress(n_done, len(asked), task.name)
  jobs = (((i, part), job) for i, one in enumerate(todo) for part, job in enumerate(one.jobs))
  found = collections.defaultdict(dict)
  for (i, part), answered in answer(engine, reading.tokenizer, jobs):
    found[i][part] = answered
    if len(found[i]) == len(todo[i].jobs):
      lines.add(_make_line(task, todo[i], [found[i][p] for p in range(len(todo[i].jobs))],
                           reading.chat is not None))
      del found[i]
      n_done += 1
      progress(n_done, len(asked), task.name)
  return lines.finish([one.item.id for one in asked])


def _make_line(task, one, answers, chat):
  item = one.item
  if task.kind == "generate":
    (written,) = answers
    scored = tasks.score_generate(task, item, written.text, len(written.tokens), written.finish)
  else:
    logprobs = [a.logprob for a in answers]
    if not all(map(math.isfinite, logprobs)):
      raise FloatingPointError(f"task {task.name}, item {item.id!r}: a log-probability is {logprobs}")
    if task.kind == "choice":
      scored = tasks.score_choice(task, item, logprobs)
    else:
      scored = tasks.score_text(task, item, math.fsum(logprobs), sum(a.n_tokens for a in answers))
  line = {"id": item.id, "prompt": task.hash_item(item, chat)}
  line |= {} if item.cluster is None else {"cluster": item.cluster}
  return line | scored | ({"cut": one.n_cut} if one.n_cut else {})


class Progress:
  """Items done, on stderr: at most two lines a second on a terminal, one a minute elsewhere."""

  def __init__(self):
    self._live, self._task = sys.stderr.isatty(), None

  def __call__(self, done: int, total: int, task: str) -> None:
    now = time.monotonic()
    if task != self._task:
      self._task, self._began, self._from, self._next = task, now, done, now + 1
      if done:
        print(f"{task}: {done} of {total} items were done before", file=sys.stderr)
    if now < self._next or done == self._from:
      return
    rate = (done - self._from) / (now - self._began)
    left = f"{(total - done) / rate:.0f} s left" if done < total else f"in {now - self._began:.0f} s"
    print(f"{task}: {done} of {total} items, {rate:.2g} a second, {left}", file=sys.stderr, flush=True,
          end="   \r" if self._live and done < total else "\n")
    self._next = now + (0.5 if self._live else 60)


# All of it, for one model.

@dataclasses.dataclass(frozen=True, slots=True)
class _Work:
  out: pathlib.Path
  reading: Reading
  engine: object  # None where every item was done before.
  tasks: list  # (task, its requests, its lines)
  header: dict
  yamls: object  # What lm-eval made of the YAML files; None: there are none.
  limit: int | None


def _prepare(args, loaded, yamls) -> _Work:
  """Everything that a mistake can be found in: nothing is evaluated yet."""
  from infer.generate import find_run
  from infer.load import find_ends, open_chat, open_run
  run = open_run(find_run(args.run)) if args.run else open_run(args.model, "--model")
  chat = open_chat(run) if args.chat else None
  if args.chat and chat is None:
    raise ValueError(f"--model={args.model} has no chat template: leave --chat out")
  bos = bool(args.run) or run.tokenizer.add_bos
  reading = Reading(run.tokenizer, bos, chat, _window(args, run), args.overlap)
  asked = [ask(task, reading) for task in loaded]
  header = {"model": str(run.path), **_find_weights(run, args), "tokenizer": run.tokenizer.sha256[:16],
            "compute_dtype": args.compute_dtype, "chat": chat is not None,
            "template": tasks.digest(chat.template) if chat else None, "window": reading.window,
            "overlap": reading.overlap}
  out = pathlib.Path(args.out or run.path / "eval")
  out.mkdir(parents=True, exist_ok=True)
  work = []
  for task, each in zip(loaded, asked):
    about = {"task": task.name, "version": task.version, "kind": task.kind, **header}
    prompts = {item.id: task.hash_item(item, args.chat) for item in task.items}
    work.append((task, each, Lines(out / f"{task.name}.jsonl", about, prompts)))
  found = None
  if yamls:
    from infer.lm_eval_adapter import load_tasks
    found = load_tasks(yamls)
    if same := {task.name for task in loaded} & found[1].keys():
      raise ValueError(f"--tasks: two of them are called {min(same)}, and their results would be one file")
  engine = None
  if yamls or any(one.item.id not in lines.done for _, each, lines in work for one in each):
    longest = max([longest_request(each) for each in asked] + [reading.window + 1] * bool(yamls))
    stop_ids = find_ends(run, chat) if args.model else (run.tokenizer.eos_id,)
    engine = _make_engine(run, args, header, stop_ids, longest)
  return _Work(out, reading, engine, work, header, found, args.limit)


def _do(work: _Work) -> dict:
  """Task -> its entry of results.json."""
  progress, results = Progress(), {}
  for task, asked, lines in work.tasks:
    done = evaluate(work.engine, work.reading, task, asked, lines, progress)
    results[task.name] = make_result(lines.header, done)
    write_results(work.out, results)
  if work.yamls is not None:
    from infer.lm_eval_adapter import EngineLM, run_tasks
    lm = EngineLM(work.engine, work.reading, progress)
    for about, done, own in run_tasks(work.yamls, lm, work.header, work.out, work.limit):
      lines = Lines(work.out / f"{about['task']}.jsonl", about, {})
      lines.done = {line["id"]: line for line in done}  # The task itself may have changed: none is left.
      results[about["task"]] = make_result(about, lines.finish(list(lines.done))) | {"lm_eval": own}
      write_results(work.out, results)
  print(f"{work.out / RESULTS}; a line an item in {', '.join(f'{name}.jsonl' for name in results)}",
        file=sys.stderr)
  return results


def _window(args, run) -> int:
  """Tokens: what was asked for, or the model was trained on, as far as it has positions. The last token of a
  request is only scored, but has a position."""
  most = run.model.max_length
  window = args.window or (run.seq_len if most is None else min(run.seq_len, most - 1))
  if most is not None and window >= most:
    raise ValueError(f"--window={window} is more than the model's positions less one, {most - 1}")
  if args.overlap > window:
    raise ValueError(f"--overlap={args.overlap} must be at most the window, {window}")
  return window


def _find_weights(run, args) -> dict:
  """Which weights they are: step, kind, and a hash of the checkpoint's manifest, which knows every byte."""
  from model.hub.orbax import MANIFEST, find_checkpoints, find_newest_good, find_steps
  root, step = find_checkpoints(run.path), args.step
  if step is None:
    newest, rejected = find_newest_good(root)
    for bad, reason in rejected:
      print(f"checkpoint {bad} is damaged and passed over: {reason}", file=sys.stderr)
    step = int(newest.name)
  elif step not in (steps := find_steps(root)):
    raise ValueError(f"--step={step} was not saved; saved: {', '.join(map(str, steps))}")
  manifest = (root / str(step) / MANIFEST).read_bytes()
  return {"step": step, "weights": args.weights or ("ema" if run.has_ema else "params"),
          "checkpoint": hashlib.sha256(manifest).hexdigest()[:16]}


def _make_engine(run, args, header, stop_ids, max_length):
  from infer.engine import Engine
  from infer.load import load_model
  cfg, params, mesh = load_model(run, compute_dtype=args.compute_dtype, weights=header["weights"],
                                 step=header["step"], tensor=args.tensor)
  return Engine(cfg, params, mesh, stop_ids=stop_ids, slots=args.slots, max_length=max_length)


# What is reported.

def make_result(about: dict, lines: list[dict]) -> dict:
  """The header, n, a hash of all prompts in order, each metric, and how many items were cut or tied."""
  metrics = {name: dataclasses.asdict(e) for name, e in tasks.summarise(lines).items()}
  return about | {"n": len(lines), "prompts": tasks.digest([line["prompt"] for line in lines]),
                  "metrics": metrics, "cut": sum("cut" in line for line in lines),
                  "ties": sum(bool(line.get("ties")) for line in lines)}


def write_results(out, results: dict) -> None:
  """Puts these tasks' entries into results.json; others there stay."""
  path = out / RESULTS
  there = json.loads(path.read_text()) if path.exists() else {}
  with replacing(path) as part:
    part.write_text(json.dumps(there | results, indent=1) + "\n")


def make_table(results: dict) -> list[str]:
  """One line a metric; columns are as wide as what is in them."""
  rows = [("task", "version", "metric", "n", "mean", "stderr", "of", "prompts", "template")]
  for name, result in results.items():
    for metric, e in result["metrics"].items():
      stderr = "-" if e["stderr"] is None else f"{e['stderr']:.4f}"
      rows.append((name, str(result["version"]), metric, str(e["n"]), f"{e['mean']:.4f}", stderr, e["how"],
                   result["prompts"], result["template"] or "none"))
  width = [max(map(len, column)) for column in zip(*rows)]
  number = (1, 3, 4, 5)
  lines = ["  ".join(c.rjust(w) if i in number else c.ljust(w) for i, (c, w) in enumerate(zip(row, width)))
           .rstrip() for row in rows]
  for name, result in results.items():
    for what, said in (("cut", "contexts did not fit and were cut"), ("ties", "choices tied with another")):
      if result[what]:
        lines.append(f"{name}: {result[what]} of {result['n']} {said}")
  return lines


if __name__ == "__main__":
  sys.exit(main())

"""Task files: what a model is asked, what is right, and what comes out of it.

A task is a JSONL file. Its first line says what the others are:

  {"task": "capitals", "kind": "choice", "version": 1}
  {"id": "fr", "context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}

  kind "choice"    which continuation is the likeliest after the context: acc, by the sum of
                   log-probabilities; acc_bytes, by that sum over the bytes of the choice (without the space
                   before it). The model reads context + choice as they stand. An item: context, choices,
                   answer (an index).
  kind "generate"  what it writes after the context, greedily: exact_match of one of the answers, after
                   "normalise". An item: context, answers (a list). First line, too: max_tokens (32), stop
                   (["\\n"]; [] for none), normalise ("strip").
  kind "text"      how well it knows a text: perplexity (of a token) and bits_per_byte. An item: text.

normalise: "strip" takes white space away at both ends; "words" also case, punctuation, the articles a, an and
the, and runs of white space; "number" keeps the last number (1,000.50 is 1000.5).

An item may have an id (else its number, from 0) and a "cluster": items that came from one source, such as the
questions about one passage, and standard errors are then of clusters. Nothing else may stand in a line.
A *.txt file is a task of kind text with one item; a folder of *.txt files, one with an item a file.
"""
import collections
import dataclasses
import decimal
import hashlib
import json
import math
import pathlib
import re
import string

from data.flags import nearest

TIE = 1e-4  # Nats. A choice this close to the best one ties with it: no batch, mesh or backend may decide.


def _words(text):
  text = "".join(c for c in text.lower() if c not in string.punctuation)
  return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _number(text):
  found = re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", text)
  return format(decimal.Decimal(found[-1].replace(",", "")).normalize(), "f") if found else ""


NORMALISE = {"strip": str.strip, "words": _words, "number": _number}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Item:
  """One line of a task; which fields it has, its task's kind says."""
  id: str
  cluster: str | None = None
  context: str = ""
  choices: tuple[str, ...] = ()
  answer: int | None = None
  answers: tuple[str, ...] = ()
  text: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
  name: str
  kind: str
  version: int
  items: tuple[Item, ...]
  max_tokens: int = 32
  stop: tuple[str, ...] = ("\n",)
  normalise: str = "strip"

  def hash_item(self, item: Item, chat: bool) -> str:
    """Equal where the same was asked and the same is right: 16 hex digits."""
    how = (self.max_tokens, self.stop, self.normalise) if self.kind == "generate" else ()
    return digest([self.kind, chat, how, item.context, item.choices, item.answer, item.answers, item.text])


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
  """A mean over items.

  Attributes:
    stderr: None where one item or cluster does not tell.
    how: "items", "clusters" or "documents weighted by ...": what the standard error takes as independent.
  """
  n: int
  mean: float
  stderr: float | None
  how: str


def digest(value) -> str:
  return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()[:16]


# Reading.

def load_task(path) -> Task:
  """Reads a task file, a text, or a folder of texts.

  Raises:
    ValueError: it is none; the file, the line and the field are named.
  """
  path = pathlib.Path(path)
  try:
    if path.is_dir():
      texts = {p.stem: p.read_text(encoding="utf-8") for p in sorted(path.glob("*.txt"))}
      if not texts:
        raise ValueError(f"{path}: a folder without *.txt")
      return _text_task(path.name, texts)
    if path.suffix == ".txt":
      return _text_task(path.stem, {path.stem: path.read_text(encoding="utf-8")})
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # JSON holds other line ends.
  except (OSError, UnicodeDecodeError) as e:
    raise ValueError(f"{path} cannot be read: {e}") from None
  if path.suffix != ".jsonl":
    raise ValueError(f"{path}: a task is a .jsonl, a .txt, a folder of .txt, or lm-eval's .yaml")
  head, items = None, []
  for i, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      if head is None:
        head = _read_head(record)
      else:
        items.append(_read_item(record, head["kind"], len(items)))
    except (ValueError, RecursionError) as e:
      raise ValueError(f"{path}, line {i}: {e}") from None
  if not items:
    raise ValueError(f"{path}: no items after the first line")
  twice = [i for i, n in collections.Counter(item.id for item in items).items() if n > 1]
  if twice:
    raise ValueError(f"{path}: two items have the id {twice[0]!r}")
  return Task(items=tuple(items), **head)


def _text_task(name, texts):
  for key, text in texts.items():
    if not text:
      raise ValueError(f"{key}.txt is empty")
  return Task(name=name, kind="text", version=1, items=tuple(Item(id=k, text=t) for k, t in texts.items()))


HEAD = {"task": str, "kind": str, "version": int}
HEAD_OF = {"choice": {}, "text": {}, "generate": {"max_tokens": int, "stop": list, "normalise": str}}
ITEM_OF = {"choice": {"context": str, "choices": list, "answer": int}, "text": {"text": str},
           "generate": {"context": str, "answers": list}}


def _read_head(record):
  kind = record.get("kind") if isinstance(record, dict) else None
  if not isinstance(kind, str) or kind not in ITEM_OF:
    raise ValueError('the first line of a task is {"task": NAME, "kind": KIND, "version": 1, ...} with a '
                     f"kind of {', '.join(ITEM_OF)}, got {str(record)[:80]}")
  _check_fields(record, HEAD, HEAD_OF[kind])
  if not re.fullmatch(r"[\w.-]{1,100}", record["task"]):
    raise ValueError(f"task={record['task']!r} must be letters, digits, and _ . - (its file has that name)")
  if record.get("normalise", "strip") not in NORMALISE:
    raise ValueError(f"normalise={record['normalise']!r}; known: {', '.join(NORMALISE)}")
  if not 1 <= record.get("max_tokens", 1) <= 1 << 20:
    raise ValueError(f"max_tokens={record['max_tokens']} must be at least 1 and at most {1 << 20}")
  head = {("name" if k == "task" else k): v for k, v in record.items()}
  return head | ({"stop": _texts(record, "stop", least=0)} if "stop" in record else {})


def _read_item(record, kind, index):
  if not isinstance(record, dict):
    raise ValueError(f"an item is an object, got {str(record)[:80]}")
  _check_fields(record, ITEM_OF[kind], {"id": (str, int), "cluster": (str, int)})
  values = {k: str(v) if k in ("id", "cluster") else v for k, v in record.items()}
  for name, least in (("choices", 2), ("answers", 1)):
    if name in values:
      values[name] = _texts(record, name, least)
  if kind == "choice" and not 0 <= record["answer"] < len(record["choices"]):
    raise ValueError(f"answer={record['answer']} must be an index of the {len(record['choices'])} choices: 0 "
                     f"to {len(record['choices']) - 1}")
  if kind == "text" and not record["text"]:
    raise ValueError("text is empty")
  return Item(**{"id": str(index)} | values)


def _check_fields(record, needed, more):
  known = needed | more
  for name, value in record.items():
    if name not in known:
      near = nearest(name, known)
      raise ValueError(f"unknown field {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else
                                                    f"; known: {', '.join(known)}"))
    if not isinstance(value, known[name]) or isinstance(value, bool):
      raise ValueError(f"{name}={repr(value)[:80]} must be a {_NAMES[known[name]]}")
    if isinstance(value, str):
      _check_text(name, value)
  if missing := [name for name in needed if name not in record]:
    raise ValueError(f"{missing[0]} is missing; needed: {', '.join(needed)}")


_NAMES = {str: "string", int: "whole number", list: "list", (str, int): "string or a whole number"}


def _texts(record, name, least):
  values = record[name]
  if not all(isinstance(v, str) for v in values) or name != "answers" and "" in values or len(values) < least:
    raise ValueError(f"{name} must be a list of at least {least} strings"
                     + ("" if name == "answers" else ", none of them empty"))
  for value in values:
    _check_text(name, value)
  return tuple(values)


def _check_text(name, value):
  try:
    value.encode()
  except UnicodeEncodeError as e:
    raise ValueError(f"{name} holds half a surrogate pair at {e.start}") from None


# Scoring: what the model made of an item -> its line.

def score_choice(task: Task, item: Item, logprobs) -> dict:
  """Args:
    logprobs: of each choice, the sum over its tokens in nats.
  """
  n_bytes = [max(1, len(choice.lstrip().encode())) for choice in item.choices]
  picked = {"acc": pick(logprobs, [1] * len(logprobs)), "acc_bytes": pick(logprobs, n_bytes)}
  return {"scores": {name: int(i == item.answer) for name, (i, _) in picked.items()},
          "picked": {name: i for name, (i, _) in picked.items()},
          "ties": [name for name, (_, tied) in picked.items() if tied],
          "logprobs": list(logprobs)}


def pick(logprobs, n_bytes) -> tuple[int, bool]:
  """(the first choice within TIE nats of the best per byte, whether another ties with it)."""
  best = max(logprob / n for logprob, n in zip(logprobs, n_bytes))
  within = [i for i, (logprob, n) in enumerate(zip(logprobs, n_bytes)) if (best - logprob / n) * n <= TIE]
  return within[0], len(within) > 1


def score_generate(task: Task, item: Item, text: str, n_tokens: int, finish: str) -> dict:
  normalise = NORMALISE[task.normalise]
  right = normalise(text) in {normalise(answer) for answer in item.answers}
  return {"scores": {"exact_match": int(right)}, "text": text, "tokens": n_tokens, "finish": finish}


def score_text(task: Task, item: Item, logprob: float, n_tokens: int) -> dict:
  return {"logprob": logprob, "tokens": n_tokens, "bytes": len(item.text.encode())}


# Means and their standard errors.

def summarise(lines: list[dict]) -> dict[str, Estimate]:
  """Metric -> its mean over the items whose lines these are (at least one)."""
  clusters, column = [line.get("cluster") for line in lines], lambda name: [line[name] for line in lines]
  found = {}
  if "tokens" in lines[0] and "logprob" in lines[0]:
    per_token = estimate([-x for x in column("logprob")], clusters, column("tokens"), "tokens")
    perplexity = math.exp(min(per_token.mean, 700.0))
    stderr = None if per_token.stderr is None else perplexity * per_token.stderr  # To first order.
    found["perplexity"] = dataclasses.replace(per_token, mean=perplexity, stderr=stderr)
  if "bytes" in lines[0]:
    bits = [-x / math.log(2) for x in column("logprob")]
    found["bits_per_byte"] = estimate(bits, clusters, column("bytes"), "bytes")
  for name in lines[0].get("scores", ()):
    found[name] = estimate([line["scores"][name] for line in lines], clusters)
  return found


def estimate(values, clusters=None, weights=None, unit="") -> Estimate:
  """The mean of `values`, or the sum of them over that of `weights`, with its standard error.

  Items of one cluster count together (Miller 2024, arXiv:2411.00640, with the G / (G - 1) of G clusters);
  each item alone is a cluster where none is named: for a mean, the sample's standard deviation over sqrt(n),
  which of zeros and ones is the binomial sqrt(p (1 - p) / (n - 1)). Of a ratio it is to first order.
  """
  n = len(values)
  weights = [1.0] * n if weights is None else weights
  total = math.fsum(weights)
  mean = math.fsum(values) / total
  clusters = [None] * n if clusters is None else clusters
  groups = collections.defaultdict(float)
  for i, (value, cluster, weight) in enumerate(zip(values, clusters, weights)):
    groups[i if cluster is None else cluster] += value - mean * weight
  how = "clusters" if any(c is not None for c in clusters) else f"documents, by {unit}" if unit else "items"
  G = len(groups)
  stderr = None
  if G > 1:
    stderr = math.sqrt(G / (G - 1) * math.fsum(g * g for g in groups.values())) / total
  return Estimate(n, mean, stderr, how)

"""An engine in plain Python that says what it is told: the server's tests take milliseconds.

  python -m tests.fake_engine --port=N [--delay=S] [--fault=...]     serves it, for what needs a process
"""
import argparse
import collections
import dataclasses
import sys
import time
import types

from data.tokenizer import Special, Tokenizer

END = 258
SPECIALS = {"<s>": Special(256), "<|im_start|>": Special(257), "<|im_end|>": Special(END)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """infer.sampling.Sampling, as the engine's interface has it."""
  max_tokens: int = 128
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  repetition_penalty: float | None = None
  stop: tuple[str, ...] = ()
  seed: int = 0
  logprobs: int | None = None
  prompt_logprobs: int | None = None
  logit_bias: tuple[tuple[int, float], ...] = ()
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  min_tokens: int = 0
  stop_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
  prompt: list[int]
  sampling: Sampling
  grammar: object = None
  user: str = ""
  beams: dict | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
  request: int
  texts: list
  finish: str


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
  request: int
  id: int
  logprob: float
  top: tuple[tuple[int, float], ...]
  finish: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Scored:
  request: int
  start: int
  logprobs: list[float]
  top: list[tuple[tuple[int, float], ...]]
  finish: str | None


def bytes_tokenizer() -> Tokenizer:
  """An id a byte, then the special ones."""
  table = [bytes([b]) for b in range(256)] + [b""] * len(SPECIALS)
  return Tokenizer(encode_batch=lambda texts: [list(t.encode()) for t in texts], token_bytes=table, sha256="",
                   bos_id=256, eos_id=END, pad_id=END, specials=SPECIALS)


class FakeEngine:
  """A token a step and running request: the prompt's bytes again, one later for each unit of the seed, and
  then the end; a request under a grammar says what that wants.

  Attributes:
    delay: seconds a step takes.
    fault: raised by the next step, if it is an exception; a function is called.
    requests: all that were submitted.
    n_unrun: programs that never ran.
  """

  def __init__(self, slots: int = 4, pages: int = 1000, delay: float = 0.0):
    self.slots, self.pages, self.delay, self.fault = slots, pages, delay, None
    self.requests, self.counters = [], collections.Counter()
    self._running, self._waiting, self._ids = {}, collections.OrderedDict(), 0
    self.n_unrun = 0

  def submit(self, request: Request) -> int:
    if len(request.prompt) > self.pages:
      raise ValueError(f"{len(request.prompt)} tokens are more than there are pages: {self.pages}")
    self.requests.append(request)
    self._ids += 1
    self._waiting[self._ids] = request
    self.counters["prompt_tokens"] += len(request.prompt)
    return self._ids

  def cancel(self, request: int) -> None:
    self._running.pop(request, None)
    self._waiting.pop(request, None)

  def is_waiting(self, request: int) -> bool:
    return request in self._waiting

  @property
  def has_work(self) -> bool:
    return bool(self._running or self._waiting)

  def run_first(self) -> bool:
    self.n_unrun -= self.n_unrun > 0
    return self.n_unrun > 0

  def gauges(self) -> dict[str, float]:
    return {"running": len(self._running), "waiting": len(self._waiting),
            "pages_used": sum(len(r.prompt) for r, _ in self._running.values()), "pages_total": self.pages}

  def step(self) -> list[Token | Scored]:
    time.sleep(self.delay)
    if isinstance(self.fault, BaseException):
      raise self.fault
    if self.fault is not None:
      self.fault()
    self.counters["steps"] += 1
    events = []
    for id in list(self._waiting)[:self.slots - len(self._running)]:
      request = self._waiting.pop(id)
      self._running[id] = request, self._script(request)
      if request.sampling.prompt_logprobs is not None:
        events.append(self._score(id, request))
    for id, (request, script) in list(self._running.items()):
      if request.beams is not None:
        del self._running[id]
        events.append(self._search(id, request))
        continue
      if request.sampling.max_tokens == 0:
        del self._running[id]
        continue
      token, n = next(script)
      finish = "stop" if token == END else "length" if n == request.sampling.max_tokens else None
      top = self._top(token, request.sampling.logprobs)
      events.append(Token(id, token, -0.5 * n, top, finish))
      self.counters["generated_tokens"] += 1
      if finish:
        del self._running[id]
    return events

  def _script(self, request):
    shift = request.sampling.seed % 7
    text = request.grammar.text.encode() if request.grammar else bytes(
      (b + shift) % 256 for b in request.prompt if b < 256)
    for n, token in enumerate(text, 1):
      yield token, n
    yield END, len(text) + 1

  def _search(self, id, request):
    """Text i is the prompt's bytes, i later; the best of them ends, the others are cut before that."""
    texts = []
    for shift in range(request.beams["n"]):
      shifted = dataclasses.replace(request.sampling, seed=shift)
      tokens = [t for t, _ in self._script(dataclasses.replace(request, sampling=shifted))]
      tokens = tokens[:len(tokens) - bool(shift)]
      logprobs = [-0.5 * n for n in range(1, len(tokens) + 1)]
      texts.append(types.SimpleNamespace(tokens=tokens, logprobs=logprobs,
                                         finish="length" if shift else "stop"))
    return Found(id, texts, "stop")

  def _score(self, id, request):
    rest = request.prompt[1:]
    n_top = request.sampling.prompt_logprobs
    return Scored(id, 1, [-0.25 * i for i in range(1, len(rest) + 1)],
                  [self._top(t, n_top) for t in rest], None if request.sampling.max_tokens else "length")

  def _top(self, token, n):
    return tuple(((token + i) % 256, -1.0 - i) for i in range(n or 0))


@dataclasses.dataclass
class FakeGrammar:
  text: str
  error: str | None = None


class FakeGrammars:
  """As infer.grammar.GrammarCompiler: knows what a text must be, and one that is right."""

  def compile(self, kind, text):
    if "bad" in text:
      raise ValueError(f"{kind} at character {text.index('bad')}: bad")
    right = {"json": '{"a": 1}', "json_schema": '{"name": "x"}', "regex": "aab", "lark": text}
    return FakeGrammar(right[kind], "too hard" if "hard" in text else None)


class FakeChat:
  """As data.chat.Chat: the last message is what is said."""
  end_ids = (END,)

  def __init__(self, tokenizer):
    self.tokenizer = tokenizer

  def encode(self, messages, tools=None):
    if messages[-1]["content"] == "refuse me":
      raise ValueError("chat template: no")
    return [256, *self.tokenizer.encode(messages[-1]["content"])]


@dataclasses.dataclass
class FakeCall:
  name: str
  arguments: str


class FakeCalls:
  """As infer.tools.CallReader: "CALL name {json};" is a call."""

  def __init__(self, names):
    self.calls, self._names, self._held = [], names, ""

  def push(self, text, token=None):
    self._held += text
    while "CALL" in self._held and ";" in self._held.partition("CALL")[2]:
      call, _, self._held = self._held.partition("CALL")[2].partition(";")
      self.calls.append(FakeCall(*call.split(maxsplit=1)))
      assert self.calls[-1].name in self._names
    if any(self._held.startswith("CALL"[:n]) for n in range(1, 5)):
      return ""
    text, self._held = self._held, ""
    return text

  def finish(self):
    return self._held


def force_call(functions):
  """The call of the first."""
  if functions[0]["name"] == "never":
    raise ValueError("it cannot be forced")
  return list(b"CALL"), "CALL", f" {functions[0]['name']} {{}};"


def make_served(**changes):
  from infer.app import Served
  tokenizer = bytes_tokenizer()
  make = lambda prompt, settings, grammar, user, beams=None: Request(
    prompt=prompt, sampling=Sampling(**settings), grammar=grammar, user=user, beams=beams)
  given = dict(name="fake", tokenizer=tokenizer, max_length=200, make_request=make, chat=FakeChat(tokenizer),
               grammars=FakeGrammars(), tools=FakeCalls, force_call=force_call)
  return Served(**given | changes)


def main():
  from infer.listen import Options, bind
  from infer.serving import HttpServer
  parser = argparse.ArgumentParser()
  parser.add_argument("--delay", type=float, default=0.0)
  parser.add_argument("--stuck_s", type=float, default=60.0)
  parser.add_argument("--drain_s", type=float, default=30.0)
  parser.add_argument("--fault_after", type=int, help="steps")
  parser.add_argument("--hang_after", type=int, help="steps")
  args = parser.parse_args()
  engine = FakeEngine(delay=args.delay, pages=10**6)

  def fault():
    if engine.counters["steps"] == args.fault_after:
      raise RuntimeError("planted")
    while engine.counters["steps"] == args.hang_after:
      time.sleep(3600)

  engine.fault = fault
  server = HttpServer(make_served(max_length=100000), engine, Options(
    port=0, stuck_s=args.stuck_s, drain_s=args.drain_s), bind("127.0.0.1", 0))
  print(server.port, flush=True)
  return server.run_until_end()


if __name__ == "__main__":
  sys.exit(main())

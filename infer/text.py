"""Text -> text: tokens become characters as soon as those are whole, and stop strings end a text."""
import collections.abc
import dataclasses

from data.tokenizer import Tokenizer
from infer.sampling import Sampling


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
  request: int  # Index into the prompts.
  text: str  # What the token made certain; may be empty.
  token: int
  logprob: float
  finish: str | None  # On the last piece of a request: "stop" (an end token or a stop string) or "length".


@dataclasses.dataclass(slots=True)
class Completion:
  text: str = ""
  tokens: list[int] = dataclasses.field(default_factory=list)  # The one that ended the text included.
  logprobs: list[float] = dataclasses.field(default_factory=list)
  finish: str | None = None


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
  """As documents begin in training: with the beginning marker, which also makes an empty prompt one token."""
  return [tokenizer.bos_id, *tokenizer.encode(text)]


def stream(engine, tokenizer: Tokenizer, prompts: list[str | list[int]],
           settings: Sampling | list[Sampling]) -> collections.abc.Iterator[Piece]:
  """Yields a Piece a token. The joined text of a request holds no half character and no stop string.

  Args:
    engine: an infer.engine.Engine, which nobody else uses meanwhile.
    prompts: texts, or ids where more than a text is meant, as of a chat template.

  Raises:
    ValueError: as infer.engine.Engine.generate's.
  """
  ids = [encode_prompt(tokenizer, p) if isinstance(p, str) else p for p in prompts]
  each = [settings] * len(prompts) if isinstance(settings, Sampling) else settings
  cancelled = set()
  tokens = engine.generate(ids, each, cancelled=cancelled)
  readers = [Reader(tokenizer, prompt, s.stop) for prompt, s in zip(ids, each)]

  def read():
    for token in tokens:
      reader = readers[token.request]
      text, finish = reader.push(token.id), token.finish
      if reader.stopped:
        cancelled.add(token.request)
        finish = "stop"
      elif finish is not None:
        text += reader.finish()
      yield Piece(token.request, text, token.id, token.logprob, finish)

  return read()


def complete(engine, tokenizer: Tokenizer, prompts: list[str | list[int]],
             settings: Sampling | list[Sampling]) -> list[Completion]:
  """What follows each prompt."""
  done = dict(iter_completions(engine, tokenizer, prompts, settings))
  return [done[i] for i in range(len(prompts))]


def iter_completions(engine, tokenizer: Tokenizer, prompts: list[str | list[int]],
                     settings: Sampling | list[Sampling]) -> collections.abc.Iterator[tuple[int, Completion]]:
  """Yields (request, Completion) of each text as it ends."""
  growing = [Completion() for _ in prompts]
  for piece in stream(engine, tokenizer, prompts, settings):
    completion = growing[piece.request]
    completion.text += piece.text
    completion.tokens.append(piece.token)
    completion.logprobs.append(piece.logprob)
    if piece.finish is not None:
      completion.finish = piece.finish
      yield piece.request, completion


class Reader:
  """The text of one request, token by token, up to the stop string that is complete first.

  Attributes:
    stopped: a stop string was found; nothing may be pushed any more.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: tuple[str, ...]):
    self._stream, self._stop = tokenizer.stream(), stop
    for token in prompt:  # So that the text goes on inside its line, even inside a character.
      self._stream.push(token)
    self._held = ""  # May be the beginning of a stop string.
    self.stopped = False

  def push(self, token: int) -> str:
    """The text that is certain now and was not before."""
    text = self._held + self._stream.push(token)
    found = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
    if found:
      self.stopped, self._held = True, ""
      return text[:min(found)[1]]
    n_held = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    self._held = text[len(text) - n_held:]
    return text[:len(text) - n_held]

  def finish(self) -> str:
    """The text still held back. The bytes of a character that never became whole are dropped."""
    return self._held

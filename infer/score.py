"""Token ids -> log-likelihoods and texts, through the engine, many at a time.

Whatever the engine does with them together, each answer is of its own request alone.
"""
import collections.abc
import dataclasses
import math

from data.tokenizer import Tokenizer
from infer.sampling import Sampling
from infer.text import Reader

AHEAD = 256  # Requests that the engine holds: more than any batch, and few enough to lose in a kill.


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
  """Asks how likely tokens[start:] are after tokens[:start]; start is at least 1."""
  tokens: list[int]
  start: int


@dataclasses.dataclass(frozen=True, slots=True)
class Likelihood:
  logprob: float  # Nats, of all scored tokens together.
  greedy: bool  # Each of them is the likeliest there.
  n_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Write:
  """Asks for a text that goes on from the prompt, up to the stop strings of `sampling`."""
  prompt: list[int]
  sampling: Sampling


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
  text: str
  tokens: list[int]  # The one that ended it, and all of a stop string's, included.
  finish: str  # "stop" or "length".


def answer(engine, tokenizer: Tokenizer, jobs: collections.abc.Iterable) -> collections.abc.Iterator:
  """Yields (key, Likelihood or Written) of each (key, Score or Write), as they end.

  Requests are submitted in order, so those that begin alike should be neighbours: the engine reads what they
  share once.

  Args:
    engine: an infer.engine.Engine, which nobody else uses meanwhile.

  Raises:
    ValueError: as Engine.submit's.
  """
  from infer.engine import Request
  jobs, running = iter(jobs), {}  # Request -> (key, job, what is known so far).
  job = next(jobs, None)
  while job is not None or running:
    while job is not None and len(running) < AHEAD:
      key, asked = job
      if isinstance(asked, Score):
        sampling = Sampling(max_tokens=0, temperature=0.0, prompt_logprobs=1)
        request = Request(prompt=asked.tokens, sampling=sampling, score_from=asked.start)
        known = _Scoring(asked)
      else:
        request = Request(prompt=asked.prompt, sampling=asked.sampling)
        known = _Writing(Reader(tokenizer, asked.prompt, asked.sampling.stop))
      running[engine.submit(request)] = key, known
      job = next(jobs, None)
    for event in engine.step():
      if event.request not in running:  # What had been made before it was cancelled.
        continue
      key, known = running[event.request]
      if (found := known.push(event)) is not None:
        if event.finish is None:
          engine.cancel(event.request)
        del running[event.request]
        yield key, found


class _Scoring:
  def __init__(self, asked):
    self._asked, self._known = asked, {}  # Position -> (log-probability, whether it is the likeliest there).

  def push(self, event):
    tokens, start = self._asked.tokens, self._asked.start
    for at, (logprob, top) in enumerate(zip(event.logprobs, event.top, strict=True), event.start):
      self._known[at] = logprob, top[0][0] == tokens[at]  # Once more, where it was preempted.
    if event.finish is None:
      return None
    missing = [at for at in range(start, len(tokens)) if at not in self._known]
    assert not missing, f"no log-probability of token {missing[0]} of {len(tokens)}"
    logprobs, greedy = zip(*(self._known[at] for at in range(start, len(tokens))))
    return Likelihood(math.fsum(logprobs), all(greedy), len(logprobs))


class _Writing:
  def __init__(self, reader):
    self._reader, self._text, self._tokens = reader, "", []

  def push(self, event):
    self._text += self._reader.push(event.id)
    self._tokens.append(event.id)
    if self._reader.stopped:
      return Written(self._text, self._tokens, "stop")
    if event.finish is None:
      return None
    return Written(self._text + self._reader.finish(), self._tokens, event.finish)


# Token ids of what a task asks.

def split_choices(tokenizer: Tokenizer, context: str, choices,
                  bos: bool) -> tuple[list[int], list[list[int]]]:
  """(ids of the context, ids of each choice after it): the ids of each context + choice, cut where the
  choices begin to differ from the context's own.

  A token may reach over the border (the space at a context's end, most often). It is then scored with the
  choice, and so is that piece of the context with every other choice: all are scored from one place on, and
  what is read is the text itself. (lm-eval cuts each by the number of its context's tokens.)

  Args:
    bos: whether texts begin with the beginning marker; without any context it is put there all the same.
  """
  alone, *wholes = tokenizer.encode_batch([context, *(context + choice for choice in choices)])
  n = min(_n_shared(alone, whole) for whole in wholes)
  n = min(n, min(map(len, wholes)) - 1)  # Something is scored.
  return [tokenizer.bos_id] * (bos or n == 0) + wholes[0][:n], [whole[n:] for whole in wholes]


def _n_shared(a, b):
  return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def window_scores(tokens: list[int], bos_id: int, length: int, overlap: int = 1) -> list[Score]:
  """Covers a text of any length, each token scored once, by windows that a model of `length` positions reads.

  The first follows the beginning marker; each later one repeats at least `overlap` tokens before those that
  it scores (the last as many as there is room for). These are lm-eval's windows of context_len `overlap`.

  Args:
    overlap: 1 .. length. 1 is the quickest; more gives tokens at a window's beginning more context.
  """
  first = min(length, len(tokens))
  scores, done = [Score([bos_id, *tokens[:first]], 1)] if tokens else [], first
  while done < len(tokens):
    end = min(len(tokens), done + length - overlap + 1)
    scores.append(Score(tokens[end - length - 1:end], length + 1 - (end - done)))
    done = end
  return scores

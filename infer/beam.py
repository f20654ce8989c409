"""Beam search, as Hugging Face's `num_beams` has it: which texts go on, and which are the best that ended.

Plain Python, over the likeliest tokens after each text. The engine makes those, and keeps the pages.
"""
import dataclasses

from infer.sampling import MOST_TOP, Sampling


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearch:
  """What one request asks for. A text's score is the sum of its log-probabilities, over its length to the
  power of `length_penalty`."""
  width: int  # Texts that go on together.
  n: int = 1  # So many of the best are told.
  length_penalty: float = 1.0  # Above 0 favours long texts.
  early_stopping: bool | str = False
  # True: when `width` texts have ended. False: when besides no text could be better were it to end now.
  # "never": when no text could become better, if it is told that the rest of it is certain.

  def validate(self, sampling: Sampling, stop_ids, slots: int) -> "BeamSearch":
    """Raises ValueError with the name, the value and what is valid.

    Args:
      stop_ids: that end every text.
      slots: of one way of the batch.
    """
    most = min(slots, MOST_TOP - len({*stop_ids, *sampling.stop_ids}))
    whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
    for name, holds, valid in (
        ("width", whole(self.width) and 1 <= self.width <= most,
         f"a whole number in [1, {most}]: there are {slots} slots, and {MOST_TOP} candidates with stop ids"),
        ("n", whole(self.n) and 1 <= self.n <= self.width, f"in [1, width={self.width}]"),
        ("length_penalty", -10 <= self.length_penalty <= 10, "in [-10, 10]"),
        ("early_stopping", isinstance(self.early_stopping, bool) or self.early_stopping == "never",
         'True, False or "never"')):
      if not holds:
        raise ValueError(f"{name}={str(getattr(self, name))[:100]} of a beam search must be {valid}")
    off, kept = Sampling(), ("max_tokens", "min_tokens", "stop_ids", "seed")
    for field in dataclasses.fields(Sampling):
      value = getattr(sampling, field.name)
      if field.name not in kept and value != getattr(off, field.name) and (field.name, value) not in (
          ("temperature", 0), ("logprobs", 0)):
        raise ValueError(f"{field.name}={str(value)[:100]} has no meaning in a beam search, which draws "
                         f"nothing; nearest valid: {getattr(off, field.name)}")
    return self


@dataclasses.dataclass(frozen=True, slots=True)
class Hypothesis:
  """A text of the search."""
  tokens: tuple[int, ...]  # The one that ended it included.
  logprobs: tuple[float, ...]
  score: float  # Of one that goes on: the sum of the log-probabilities.
  finish: str | None  # "stop" or "length"; None: it goes on.


class Search:
  """Usage: push what is likeliest after the prompt, then after each text that goes on, until it says None.

  Attributes:
    running: the texts that go on, the best first.
    ended: the best that ended, the best first.
  """

  def __init__(self, settings: BeamSearch, sampling: Sampling, stop_ids):
    self.running, self.ended = [Hypothesis((), (), 0.0, None)], []
    self._settings, self._sampling = settings, sampling
    self._stop_ids = {*stop_ids, *sampling.stop_ids}

  def push(self, tops: list[list[tuple[int, float]]]) -> list[tuple[int, int]] | None:
    """(which of the texts goes on, by which token) of each that goes on now; None: the search has ended.

    Args:
      tops: after each of `running`, the likeliest (token, log-probability), the likeliest first: as many as
        the width and the stop ids together.
    """
    width, n = self._settings.width, len(self.running[0].tokens) + 1
    candidates = [(text.score + logprob, i, token, logprob)
                  for i, (text, top) in enumerate(zip(self.running, tops, strict=True))
                  for token, logprob in top
                  if token not in self._stop_ids or n > self._sampling.min_tokens]
    candidates.sort(key=lambda candidate: -candidate[0])
    is_last, beams, running = n == self._sampling.max_tokens, [], []
    for rank, (total, i, token, logprob) in enumerate(candidates):
      finish = "stop" if token in self._stop_ids else "length" if is_last else None
      if len(beams) == width or finish and rank >= width:
        continue
      before = self.running[i]
      text = Hypothesis((*before.tokens, token), (*before.logprobs, logprob),
                        total / n ** self._settings.length_penalty if finish else total, finish)
      if finish:
        self.ended.append(text)
      else:
        running.append(text)
        beams.append((i, token))
    self.ended.sort(key=lambda text: -text.score)
    del self.ended[width:]
    self.running = running
    return None if is_last or not running or self._cannot_improve(n) else beams

  def _cannot_improve(self, n):
    settings = self._settings
    if len(self.ended) < settings.width:
      return False
    is_hopeful = settings.early_stopping == "never" and settings.length_penalty > 0
    best = self.running[0].score / (self._sampling.max_tokens if is_hopeful else n) ** settings.length_penalty
    return settings.early_stopping is True or best <= self.ended[-1].score

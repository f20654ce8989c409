"""What the engine made -> the answers of the OpenAI API: whole, or as chunks of a stream."""
import collections
import dataclasses
import json
import secrets
import time
import types

from infer.protocol import Ask
from infer.text import Reader

LEAST = -9999.0  # JSON has no -inf; OpenAI's.


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
  """One token with its log-probability, as clients see it."""
  id: int
  logprob: float | None  # None: the first of a prompt, which nothing comes before.
  top: tuple[tuple[int, float], ...]
  offset: int  # Characters of the text before it.


@dataclasses.dataclass(slots=True)
class Delta:
  """What became certain by one event of a text."""
  text: str = ""
  shown: list[Shown] = dataclasses.field(default_factory=list)
  calls: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # (name, arguments as JSON)
  finish: str | None = None  # On the last: "stop", "length" or "tool_calls".


class Choice:
  """One text of an answer, event by event.

  Attributes:
    whole: the Delta of everything so far.
    n_tokens: made so far.
    stopped: the text has ended by itself: the engine is to make no more of it.
  """

  def __init__(self, ask: Ask, tokenizer, prompt: list[int], echo: str = "", calls=None):
    """`echo`: the prompt's text, if it comes first; `calls`: an infer.tools.CallReader, if tools may be
    called."""
    self._ask, self._tokenizer, self._prompt, self._calls = ask, tokenizer, prompt, calls
    self._reader = Reader(tokenizer, prompt, ask.stop)
    self._echo, self._scored = echo, []
    self._raw = tokenizer.stream() if ask.logprobs is not None else None
    for token in prompt if self._raw else ():
      self._raw.push(token)
    self._waiting = collections.deque()  # Shown ones whose text is held back.
    self._n_raw = self._n_text = len(echo)  # Characters made, and let go.
    self._is_first = True
    self.whole, self.n_tokens, self.stopped = Delta(), 0, False

  def push_prompt(self, event) -> Delta:
    """Of a Scored: kept until the prompt is whole."""
    self._scored += zip(event.logprobs, event.top)
    if event.finish is None:
      return Delta()
    delta = self._begin()
    delta.finish = event.finish
    return self._keep(delta)

  def push(self, event) -> Delta:
    """Of a Token."""
    delta = self._begin() if self._is_first else Delta()
    self.n_tokens += 1
    text, finish = self._reader.push(event.id), event.finish
    if self._reader.stopped:
      self.stopped, finish = True, "stop"
    elif finish is not None:
      text += self._reader.finish()
    if self._raw and event.finish != "stop":  # The token that says the end is no part of the text.
      at = self._n_raw
      self._n_raw += len(self._raw.push(event.id))
      self._waiting.append(self._show(event.id, event.logprob, event.top, at))
    self._n_text += len(text)
    while self._waiting and (self._waiting[0].offset < self._n_text
                             or finish is not None and not self.stopped):
      delta.shown.append(self._waiting.popleft())
    if self._calls is not None:
      n_before = len(self._calls.calls)
      text = self._calls.push(text, event.id)
      if finish is not None:
        text += self._calls.finish()
      delta.calls = [(call.name, call.arguments) for call in self._calls.calls[n_before:]]
      if delta.calls and not self._ask.parallel_tool_calls:
        delta.calls, finish, self.stopped = delta.calls[:1], "stop", event.finish is None
    delta.text += text
    delta.finish = finish
    if finish == "stop" and (self.whole.calls or delta.calls):
      delta.finish = "tool_calls"
    return self._keep(delta)

  def _begin(self):
    """The prompt, if it is echoed."""
    self._is_first = False
    delta = Delta(self._echo)
    if self._ask.echo and self._ask.logprobs is not None:
      stream, at = self._tokenizer.stream(), 0
      for token, (logprob, top) in zip(self._prompt, [(None, ()), *self._scored]):
        delta.shown.append(self._show(token, logprob, top, at))
        at += len(stream.push(token))
    return delta

  def _show(self, token, logprob, top, offset):
    top = tuple((t, max(p, LEAST)) for t, p in top[:self._ask.logprobs])
    return Shown(token, None if logprob is None else max(logprob, LEAST), top, offset)

  def _keep(self, delta):
    self.whole.text += delta.text
    self.whole.shown += delta.shown
    self.whole.calls += delta.calls
    self.whole.finish = delta.finish
    return delta


def push_found(choices: list[Choice], found) -> None:
  """What a beam search found: a choice each."""
  for choice, text in zip(choices, found.texts):
    for i, (token, logprob) in enumerate(zip(text.tokens, text.logprobs), 1):
      finish = text.finish if i == len(text.tokens) else None
      choice.push(types.SimpleNamespace(id=token, logprob=logprob, top=(), finish=finish))


class Writer:
  """The JSON of one answer."""

  def __init__(self, ask: Ask, model: str, tokenizer):
    self._ask, self._tokenizer = ask, tokenizer
    self._names = {special.id: name for name, special in tokenizer.specials.items()}
    self._head = {"id": ("chatcmpl-" if ask.is_chat else "cmpl-") + secrets.token_hex(12),
                  "created": int(time.time()), "model": model}
    self._begun, self._n_calls = set(), collections.Counter()

  def whole(self, choices: list[Choice], n_prompt: int) -> dict:
    kind, shape = ("chat.completion", self._message) if self._ask.is_chat else ("text_completion", self._text)
    made = [shape(i, choice.whole) for i, choice in enumerate(choices)]
    return {**self._head, "object": kind, "choices": made, "usage": usage(choices, n_prompt)}

  def chunk(self, index: int, delta: Delta) -> dict | None:
    """None where there is nothing to say yet."""
    if not (delta.text or delta.shown or delta.calls or delta.finish):
      return None
    usage_null = {"usage": None} if self._ask.include_usage else {}
    if not self._ask.is_chat:
      return {**self._head, "object": "text_completion", "choices": [self._text(index, delta)], **usage_null}
    said = {} if index in self._begun else {"role": "assistant", "content": ""}
    self._begun.add(index)
    said |= {"content": delta.text} if delta.text else {}
    if delta.calls:
      said["tool_calls"] = [{"index": self._n_calls[index] + i, **_call(*call)}
                            for i, call in enumerate(delta.calls)]
      self._n_calls[index] += len(delta.calls)
    choice = {"index": index, "delta": said, "logprobs": self._chat_logprobs(delta),
              "finish_reason": delta.finish}
    return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage_null}

  def last(self, choices: list[Choice], n_prompt: int) -> dict:
    """The chunk that tells the usage."""
    kind = "chat.completion.chunk" if self._ask.is_chat else "text_completion"
    return {**self._head, "object": kind, "choices": [], "usage": usage(choices, n_prompt)}

  def _message(self, index, delta):
    said = {"role": "assistant", "content": delta.text if delta.text or not delta.calls else None,
            "refusal": None}
    said |= {"tool_calls": [_call(*call) for call in delta.calls]} if delta.calls else {}
    return {"index": index, "message": said, "logprobs": self._chat_logprobs(delta),
            "finish_reason": delta.finish}

  def _text(self, index, delta):
    logprobs = None
    if self._ask.logprobs is not None:
      name = lambda token: self._spell(token)[0]
      logprobs = {
        "tokens": [name(s.id) for s in delta.shown],
        "token_logprobs": [s.logprob for s in delta.shown],
        "top_logprobs": [None if s.logprob is None else dict(reversed([(name(t), p) for t, p in s.top]))
                         for s in delta.shown],  # Of two that read the same, the likelier stays.
        "text_offset": [s.offset for s in delta.shown]}
    return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}

  def _chat_logprobs(self, delta):
    if self._ask.logprobs is None:
      return None
    entry = lambda token, logprob: dict(zip(("token", "bytes"), self._spell(token)), logprob=logprob)
    return {"content": [entry(s.id, s.logprob) | {"top_logprobs": [entry(*each) for each in s.top]}
                        for s in delta.shown], "refusal": None}

  def _spell(self, token):
    raw = self._tokenizer.token_bytes[token]
    return raw.decode(errors="replace") or self._names.get(token, ""), list(raw)


def usage(choices: list[Choice], n_prompt: int) -> dict:
  """Tokens; each prompt counts once, and the token that ended a text counts."""
  n_made = sum(choice.n_tokens for choice in choices)
  return {"prompt_tokens": n_prompt, "completion_tokens": n_made, "total_tokens": n_prompt + n_made}


def _call(name, arguments):
  return {"id": "call_" + secrets.token_hex(12), "type": "function",
          "function": {"name": name, "arguments": arguments}}


def event_bytes(value) -> bytes:
  """One server-sent event; a string goes as it is."""
  text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), allow_nan=False)
  return f"data: {text}\n\n".encode()

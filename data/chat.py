"""Conversations -> token ids, through the chat template that came with a model.

What a message says stays text: its special tokens are broken by a mark before the template sees them, and
only those that the template wrote whole become special ids.
"""
import collections.abc
import json
import pathlib
import re
import select
import subprocess
import sys
import threading
import time

from data.tokenizer import Tokenizer

SECONDS = 2.0  # Of a processor, for one rendering.
MAX_CHARS = 1 << 22
MARKS = range(0xF0000, 0xFFFFE)  # Private use: no text's.
ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


class Renderer:
  """Runs chat templates in a process of their own (data/chat_render.py), started when it is first needed, or
  with `start` while something else is done."""

  def __init__(self, seconds: float = SECONDS, max_chars: int = MAX_CHARS):
    self.seconds, self.max_chars = seconds, max_chars
    self._process, self._lock = None, threading.Lock()

  def render(self, template: str, values: list[dict]) -> list[str]:
    """The text for each dict of variables.

    Raises:
      ValueError: the template is broken, refuses the messages, or is over a limit.
    """
    request = {"template": template, "values": values, "seconds": self.seconds, "max_chars": self.max_chars}
    with self._lock:
      reply = self._ask((json.dumps(request) + "\n").encode())
    if "error" in reply:
      raise ValueError(f"chat template: {reply['error']}")
    return reply["texts"]

  def start(self) -> None:
    if self._process is None or self._process.poll() is not None:
      program = str(pathlib.Path(__file__).with_name("chat_render.py"))
      self._process = subprocess.Popen(  # -P: the modules beside the program do not hide Python's own.
          [sys.executable, "-P", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
          stderr=subprocess.DEVNULL, start_new_session=True)

  def _ask(self, request: bytes) -> dict:
    self.start()
    process, answer = self._process, bytearray()
    deadline = time.monotonic() + 20 + 10 * self.seconds  # A busy machine is no fault of the template.
    try:
      process.stdin.write(request)
      process.stdin.flush()
      while not answer.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        part = process.stdout.read1(1 << 20) if ready else b""
        if not part:
          raise BrokenPipeError
        answer += part
    except BaseException as e:  # Ctrl-C included: the next question must not read this one's answer.
      self.close()
      if isinstance(e, BrokenPipeError):
        return {"error": f"it was stopped: more than {self.seconds:g} s of a processor, or a crash"}
      raise
    return json.loads(answer)

  def close(self):
    if self._process is not None:
      self._process.kill()
      self._process.wait()
      self._process.stdin.close()
      self._process.stdout.close()
      self._process = None


RENDERER = Renderer()


def find_template(path) -> str | None:
  """The chat template in a model's folder, or None.

  Raises:
    ValueError: a file that should hold it cannot be read, or holds several and none is the default.
  """
  path = pathlib.Path(path)
  try:
    if (path / "chat_template.jinja").is_file():
      return (path / "chat_template.jinja").read_text(encoding="utf-8")
    for name, key in (("tokenizer_config.json", "chat_template"), ("chat_template.json", "chat_template"),
                      ("tokenizer_gguf.json", "tokenizer.chat_template")):
      if (path / name).is_file() and (
          found := json.loads((path / name).read_text(encoding="utf-8")).get(key)):
        return _choose(found, path / name)
  except (OSError, ValueError, AttributeError, TypeError, KeyError) as e:
    raise ValueError(f"the chat template of {path}: {e}") from None
  return None


def _choose(found, file) -> str:
  if isinstance(found, str):
    return found
  named = {each["name"]: each["template"] for each in found}
  if "default" not in named and len(named) != 1:
    raise ValueError(f"{file} names {sorted(named)}, none of them default")
  return named.get("default", next(iter(named.values())))


def check_messages(messages) -> None:
  """Raises ValueError, naming the message and the field."""
  if not isinstance(messages, collections.abc.Sequence) or isinstance(messages, str) or not messages:
    raise ValueError("messages must be a list of at least one {\"role\": ..., \"content\": ...}")
  for i, message in enumerate(messages):
    if not isinstance(message, dict):
      raise ValueError(f"messages[{i}] must be an object of role and content, got {str(message)[:80]!r}")
    for field in ("role", "content"):
      if field not in message:
        raise ValueError(f"messages[{i}].{field} is missing")
      if not isinstance(message[field], str):
        raise ValueError(f"messages[{i}].{field} must be a string, got {type(message[field]).__name__}")
    known = {"role", "content", "tool_calls", "tool_call_id"}
    if extra := message.keys() - known:
      raise ValueError(f"messages[{i}].{min(map(str, extra))} is unknown; known: {', '.join(sorted(known))}")
    if not ROLE.fullmatch(message["role"]):
      raise ValueError(f"messages[{i}].role={message['role'][:40]!r} is no role; known to most templates: "
                       "system, user, assistant")
    try:
      message["content"].encode()
    except UnicodeEncodeError as e:
      raise ValueError(f"messages[{i}].content holds half a surrogate pair at {e.start}") from None


def _open_calls(message, name) -> dict:
  """The arguments of its calls as objects, which templates write down themselves."""
  if "tool_calls" not in message:
    return message
  calls = []
  for i, call in enumerate(message["tool_calls"]):
    try:
      arguments = json.loads(call["function"]["arguments"])
    except (TypeError, KeyError, ValueError, RecursionError) as e:
      raise ValueError(f"{name}.tool_calls[{i}].function.arguments is no JSON: {str(e)[:100]}") from None
    if not isinstance(arguments, dict):
      raise ValueError(f"{name}.tool_calls[{i}].function.arguments must be a JSON object")
    calls.append(call | {"function": call["function"] | {"arguments": arguments}})
  return message | {"tool_calls": calls}


def _edit(value, edit):
  """`value` with `edit` done to every string in it, names of fields included."""
  if isinstance(value, str):
    return edit(value)
  if isinstance(value, dict):
    return {edit(key): _edit(each, edit) for key, each in value.items()}
  return [_edit(each, edit) for each in value] if isinstance(value, list) else value


class Chat:
  """A tokenizer and its model's chat template.

  Attributes:
    end_ids: the token that the template ends an assistant's message with, where it is a special one.
  """

  def __init__(self, tokenizer: Tokenizer, template: str, renderer: Renderer = RENDERER):
    """Raises ValueError: the template is broken."""
    self.tokenizer, self.template, self._renderer = tokenizer, template, renderer
    # One character cannot be broken; none of the field's special tokens is one.
    longest_first = sorted((s for s in tokenizer.specials if len(s) > 1), key=len, reverse=True)
    self._special = "|".join(map(re.escape, longest_first)) or "(?!)"
    ends = {c for s in longest_first for c in (s[0], s[-1])}
    self._ends = "|".join(sorted(map(re.escape, ends))) or "(?!)"
    self.end_ids = self._find_end()

  def encode(self, messages: list[dict], add_generation_prompt: bool = True,
             tools: list[dict] | None = None) -> list[int]:
    """The ids of a conversation, and of the beginning of the answer to it.

    Args:
      messages: {"role": str, "content": str} each, in order; an assistant's may have "tool_calls", a tool's
        "tool_call_id", as OpenAI's API has them.
      tools: that the answer may call, as OpenAI's API has them.

    Raises:
      ValueError: a message is malformed, or the template refuses them or is over a limit.
    """
    check_messages(messages)
    messages = [_open_calls(m, f"messages[{i}]") for i, m in enumerate(messages)]
    taken = set(self.template).union(json.dumps([messages, tools], ensure_ascii=False))
    mark = next(chr(c) for c in MARKS if chr(c) not in taken)
    return self._to_ids(self._render(messages, mark, add_generation_prompt, tools), mark)

  def _render(self, messages, mark, add_generation_prompt, tools=None) -> str:
    """The text, with marks in it wherever a message could take part in a special token.

    Marked most (around every character that begins or ends a special token) no text can, whatever the
    template does with it. Where that hides from the template what it looks for, such as the end of a thought,
    only whole special tokens are broken, and the template must then write the same special tokens.
    """
    most = lambda text: re.sub(self._ends, rf"{mark}\g<0>{mark}", text)
    least = lambda text: re.sub(self._special, lambda m: m[0][0] + mark + m[0][1:], text)
    values = [{
      **self.tokenizer.names, "messages": [
        {key: m[key] if key == "role" else _edit(m[key], edit) for key in m} for m in messages],
      "add_generation_prompt": add_generation_prompt, "tools": _edit(tools, edit), "documents": None,
    } for edit in (most, least)]
    strong, weak = self._renderer.render(self.template, values)
    if strong.replace(mark, "") == weak.replace(mark, ""):
      return strong
    written = [[part for part in self._split(text) if isinstance(part, tuple)]
               for text in (strong, weak)]
    if written[0] != written[1]:
      raise ValueError("chat template: it makes special tokens of what the messages say; say it otherwise")
    return weak

  def _split(self, text) -> list:
    """Text pieces, and (special token,) where the template wrote one."""
    parts, at = [], 0
    for m in re.finditer(self._special, text):
      parts += [text[at:m.start()], (m[0],)]
      at = m.end()
    return [*parts, text[at:]]

  def _to_ids(self, text, mark) -> list[int]:
    parts, ids = self._split(text), []
    for i, part in enumerate(parts):
      if isinstance(part, tuple):
        ids.append(self.tokenizer.specials[part[0]].id)
        continue
      part = part.replace(mark, "")
      if i > 0 and self.tokenizer.specials[parts[i - 1][0]].rstrip:
        part = part.lstrip()
      if i + 1 < len(parts) and self.tokenizer.specials[parts[i + 1][0]].lstrip:
        part = part.rstrip()
      if part:
        ids += self.tokenizer.encode_inner(part) if i else self.tokenizer.encode(part)
    return ids

  def _find_end(self) -> tuple[int, ...]:
    question, answer = "a question", "an answer"  # Of words that no template holds back to back with an end.
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    mark = chr(MARKS[-1])
    text = self._render(messages, mark, False).replace(mark, "")
    behind = text[text.rfind(answer) + len(answer):] if answer in text else ""
    found = re.search(self._special, behind)
    return (self.tokenizer.specials[found[0]].id,) if found else ()

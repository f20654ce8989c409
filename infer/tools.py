"""Calls of tools in what a model writes, and the grammar of a call that it must write.

Families write calls in ways of their own; which one a model was trained on is read off the marks that its
chat template holds:
  hermes   <tool_call>, {"name": "f", "arguments": {...}} and </tool_call> in lines of their own, once a call.
           Qwen 2.5 and 3, Hermes 2 and 3.
  llama    the whole answer is {"name": "f", "parameters": {...}}, several with ";" between; or, behind
           <|python_tag|>, that or f.call(key="value"). Llama 3.1 to 3.3.
  mistral  [TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...], or for each call of newer ones
           [TOOL_CALLS]f[ARGS]{...}.
"""
import ast
import collections.abc
import dataclasses
import json
import re

OPENING = {"hermes": "<tool_call>", "llama": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}
CLOSING = {"hermes": "</tool_call>", "llama": ";", "mistral": ","}
MARKS = (*OPENING.values(), "</tool_call>", "[ARGS]", "[CALL_ID]")  # Special tokens of some tokenizers.
ENDS = ("}", "]")  # What the last character of a call is, or may be.
SHORT = 200  # Characters within which it shows whether something can be a call.
KEYS = ("name", "arguments", "parameters", "type", "id", "function")  # Of a call's object.
HEAD = re.compile(r"\s*([A-Za-z0-9_.-]+)\s*(?:\[CALL_ID\]\s*[A-Za-z0-9_-]*\s*)?(?:\[ARGS\])?\s*")
IN_JSON = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["{}\[\]]', re.DOTALL)  # A lone quote: a string that goes on.


def find_style(template: str | None) -> str | None:
  """How a model with this chat template writes calls; None: not at all, or in a way not known here."""
  if template is None:
    return None
  if "[TOOL_CALLS]" in template:
    return "mistral"
  if "<|python_tag|>" in template or ("<|start_header_id|>" in template and '"parameters"' in template):
    return "llama"
  other = ("<function=", "<arg_key>")  # Qwen 3 Coder and GLM write XML between the same marks.
  return "hermes" if "<tool_call>" in template and not any(mark in template for mark in other) else None


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
  name: str
  arguments: str  # A JSON object, as OpenAI's API hands it on.


class CallReader:
  """Parts a text, as it grows, into what is shown and calls.

  Usage:
    reader = CallReader("hermes", {"get_weather"}, tokenizer.specials)
    for token in tokens:
      show(reader.push(text_reader.push(token), token))
    show(reader.finish())
    reader.calls

  What only looks like a call (no JSON, a name that is no tool's, cut off) is shown as the text it is. White
  space beside a call is not shown.

  Attributes:
    calls: those that are whole, in order.
  """

  def __init__(self, style: str, names: collections.abc.Collection[str], specials: dict | None = None):
    """Args:
      style: of find_style.
      names: of the tools that there are.
      specials: data.tokenizer.Tokenizer's: a mark that is a special token comes as an id without a text.
    """
    self.calls: list[Call] = []
    self._style, self._names = style, frozenset(names)
    self._opening, self._closing = OPENING[style], CLOSING[style]
    self._marks = {special.id: name for name, special in (specials or {}).items() if name in MARKS}
    self._held = ""  # Not certain yet.
    self._fresh = True  # Nothing was shown so far: Llama's calls need no mark.
    self._behind = False  # A call has just ended.
    self._inside = 0  # Characters of a call that had not ended when it was last read.

  def push(self, text: str, token: int | None = None) -> str:
    """The text that is certain to be none of a call and was not before.

    Args:
      token: that the text came with.
    """
    added = text + self._marks.get(token, "")
    self._held += added
    if self._inside > SHORT and not any(end in added for end in ENDS):
      return ""  # A long call is not read again for each token of it.
    return self._read(final=False)

  def finish(self) -> str:
    """What is left at the end of the text."""
    shown = self._read(final=True) + self._written(self._held)
    self._held = ""
    return shown

  def _read(self, final: bool) -> str:
    shown, self._inside = "", 0
    while self._held:
      if self._behind and not self._skip(final):
        break
      n_shown, n_call, calls = self._next(final)
      if not n_shown and not n_call:
        break
      shown += self._written(self._held[:n_shown])
      self.calls += calls
      self._fresh, self._behind = self._fresh and not n_shown, bool(calls)
      self._held = self._held[n_shown + n_call:]
    return shown

  def _written(self, text):
    """Marks that are special tokens have no text."""
    for mark in self._marks.values():
      text = text.replace(mark, "")
    return text

  def _skip(self, final) -> bool:
    """Drops what stands behind a call; False where more of that may come."""
    self._held = self._held.lstrip()
    if self._held.startswith(self._closing):
      self._held = self._held[len(self._closing):].lstrip()
    elif self._closing.startswith(self._held) and not final:
      return False
    return bool(self._held)

  def _next(self, final):
    """-> (characters to show, characters of calls behind them, the calls); (0, 0, []): wait for more."""
    at, opening = self._held.find(self._opening), self._opening
    if self._style == "llama" and (self._fresh or self._behind) and self._held.lstrip().startswith("{"):
      at, opening = self._held.index("{"), ""
    if at < 0:  # All but what may begin a call, and the white space before that.
      partial = max((n for n in range(1, len(opening)) if self._held.endswith(opening[:n])), default=0)
      return len(self._held[:len(self._held) - partial].rstrip()), 0, []
    before = len(self._held[:at].rstrip())
    if before:
      return before, 0, []
    start = at + len(opening)
    try:
      end, values = PARSE[self._style](self._held[start:], final)
      calls = [to_call(value, self._names) for value in values]
    except (ValueError, RecursionError):
      return start if opening else start + 1, 0, []
    self._inside = 0 if end else len(self._held) - start
    return (0, start + end, calls) if end else (0, 0, [])


# What stands behind the opening -> (characters of it, the calls' values); 0 where it is not whole yet.
# Raises ValueError: it is no call.

def parse_hermes(text: str, final: bool):
  at = len(text) - len(text.lstrip())
  if at == len(text):
    return 0, []
  if text[at] != "{":
    raise ValueError("no object")
  return _parse_json(text, at)


def parse_llama(text: str, final: bool):
  at = len(text) - len(text.lstrip())
  if text[at:].startswith("{"):
    key = re.match(r'\{\s*"([^"]*)"', text[at:])
    if key and key[1] not in KEYS:
      raise ValueError("an answer in JSON")
    return _parse_json(text, at)
  return (len(text), [_parse_python(text.strip())]) if final else (0, [])


def parse_mistral(text: str, final: bool):
  if text.lstrip()[:1] == "[":
    end, values = _parse_json(text, text.index("["))
    if values == [[]]:
      raise ValueError("no call")
    return end, values[0] if values else []
  at = text.find("{")
  if at < 0:
    if re.fullmatch(r"[\sA-Za-z0-9_.\[\]-]*", text) is None:
      raise ValueError("no name")
    return 0, []
  head = HEAD.fullmatch(text[:at])
  if head is None:
    raise ValueError("no name")
  end, values = _parse_json(text, at)
  return end, [{"name": head[1], "arguments": value} for value in values]


PARSE = {"hermes": parse_hermes, "llama": parse_llama, "mistral": parse_mistral}


def _parse_json(text, at):
  """-> (where the object or list that begins there ends, [it]); (0, []) where it goes on."""
  depth = 0
  for part in IN_JSON.finditer(text, at):
    if part[0] == '"':
      return 0, []
    depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(part[0], 0)
    if depth == 0:
      return part.end(), [_load(text[at:part.end()])]
  return 0, []


def _parse_python(text):
  """f.call(key="value", ...) of constants."""
  try:
    call = ast.parse(text, mode="eval").body
    plain = isinstance(call, ast.Call) and not call.args and all(keyword.arg for keyword in call.keywords)
    if not plain or call.func.attr != "call":
      raise ValueError("no call")
    return {"name": call.func.value.id,
            "arguments": {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}}
  except (SyntaxError, AttributeError, MemoryError) as e:
    raise ValueError(f"no call: {e}") from None


def _load(text):
  """Line ends within strings are taken: models write them."""
  return json.loads(text, parse_constant=_refuse, strict=False)


def _refuse(name):
  raise ValueError(f"{name} is no number")


def to_call(value, names: collections.abc.Collection[str]) -> Call:
  """Raises ValueError: it is no call of one of the tools."""
  if isinstance(value, dict) and isinstance(value.get("function"), dict):
    value = value["function"]
  name = value.get("name") if isinstance(value, dict) else None
  if not isinstance(name, str) or name not in names:
    raise ValueError("no name of a tool")
  given = [value[key] for key in ("arguments", "parameters") if key in value]
  arguments = given[0] if given else {}
  if isinstance(arguments, str):
    arguments = _load(arguments)
  if not isinstance(arguments, dict):
    raise ValueError("arguments are no object")
  try:
    return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
  except TypeError as e:  # Python's sets and bytes.
    raise ValueError(str(e)) from None


# A call that must be.

def force_call(style: str, tools: list[dict], template: str = "") -> tuple[str, str]:
  """How the model's turn begins, and the grammar (kind "lark") of what it then writes: one call.

  Args:
    tools: {"name": str, "parameters": a JSON schema} each; one of them is called.
    template: the chat template: it tells Mistral's two forms apart.

  Returns:
    (opening, grammar). The opening belongs to the prompt and to what CallReader reads: each of its MARKS as
    the special token where the tokenizer has it.

  Raises:
    ValueError: no tool, or the form cannot be forced.
  """
  if not tools:
    raise ValueError("tool_choice: there is no tool to call")
  compact = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
  schema = lambda tool, place: _moved(tool.get("parameters") or {"type": "object"}, place)
  if style == "mistral" and "[ARGS]" in template:
    if len(tools) > 1:
      raise ValueError("tool_choice: this model's calls can only be forced for one tool; name it")
    spec = {**schema(tools[0], "#"), "x-guidance": compact}
    return f"[TOOL_CALLS]{tools[0]['name']}[ARGS]", f"start: call\ncall: %json {json.dumps(spec)}"
  key = "parameters" if style == "llama" else "arguments"
  each = [{"type": "object", "additionalProperties": False, "required": ["name", key], "properties": {
      "name": {"const": tool["name"]}, key: schema(tool, f"#/anyOf/{i}/properties/{key}")}}
          for i, tool in enumerate(tools)]
  call = f"call: %json {json.dumps({'anyOf': each, 'x-guidance': compact})}"
  opening, rule = {"hermes": ("<tool_call>\n", 'call "\\n</tool_call>"'), "llama": ("", "call"),
                   "mistral": ("[TOOL_CALLS]", '" "? "[" call "]"')}[style]
  return opening, f"start: {rule}\n{call}"


def _moved(schema, place: str):
  """The schema with its references to itself, for a place within another."""
  if isinstance(schema, list):
    return [_moved(each, place) for each in schema]
  if not isinstance(schema, dict):
    return schema
  moved = {}
  for key, value in schema.items():
    if key == "$ref" and isinstance(value, str) and value.startswith("#"):
      moved[key] = place + value[1:]
    else:
      moved[key] = value if key in ("const", "enum", "default", "examples") else _moved(value, place)
  return moved

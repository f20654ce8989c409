"""What a request of the OpenAI API may hold: one table that is checked and that /openapi.json shows.

The schemas are the part of JSON Schema that the tables need; `check` refuses what does not hold, by name.
"""
import math
import re

from data.flags import nearest

TYPES = {"boolean": bool, "integer": int, "number": (int, float), "string": str, "array": list,
         "object": dict, "null": type(None)}
MAX_SEED = 2**32 - 1
MAX_N = 8
MAX_PROMPTS = 64
MAX_TOP = 20
MAX_BIAS = 300


class Refusal(ValueError):
  """What the server answers instead, in OpenAI's shape.

  Attributes:
    param: the field, or None.
    status: of HTTP.
    code: short and fixed, for programs.
    retry_after: seconds, or None.
  """

  def __init__(self, message: str, param: str | None = None, *, status: int = 400,
               code: str = "invalid_value", retry_after: int | None = None):
    super().__init__(message)
    self.param, self.status, self.code, self.retry_after = param, status, code, retry_after

  def as_json(self) -> dict:
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
             429: "rate_limit_error"}
    kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
    return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _optional(kind, doc, **bounds):
  return {"type": [kind, "null"], **bounds, "description": doc}


def _text(doc, longest=1 << 16):
  return _optional("string", doc, minLength=1, maxLength=longest)


def _number(doc, low, high):
  return _optional("number", doc, minimum=low, maximum=high)


def _whole(doc, low, high):
  return _optional("integer", doc, minimum=low, maximum=high)


def _flag(doc):
  return _optional("boolean", doc)


def _object(doc, properties, required=()):
  return {"type": "object", "properties": properties, "required": list(required),
          "additionalProperties": False, "description": doc}


STOP = {"type": "string", "minLength": 1, "maxLength": 256}
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1}
SHARED = {
  "model": _text("the one that /v1/models names; may be left out", 256),
  "max_tokens": _whole("most new tokens", 0, 2**31 - 1),
  "temperature": {"anyOf": [{"type": ["number", "null"], "minimum": 1e-4, "maximum": 2},
                            {"type": "number", "minimum": 0, "maximum": 0}],
                  "description": "1; 0 is greedy"},
  "top_p": _optional("number", "only the likeliest that hold this mass", exclusiveMinimum=0, maximum=1),
  "top_k": _whole("only the k likeliest", 1, 2**31 - 1),
  "min_p": _number("only those at least this share as likely as the likeliest", 0, 1),
  "repetition_penalty": _number("of tokens of the prompt and the text; above 1 discourages", 0.01, 100),
  "presence_penalty": _number("taken from the logit of every token that was made", -2, 2),
  "frequency_penalty": _number("taken from it once for each time", -2, 2),
  "logit_bias": {"type": ["object", "null"], "maxProperties": MAX_BIAS,
                 "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
                 "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                 "description": "token id -> added to its logit"},
  "n": _whole("samples a prompt, by seeds seed, seed + 1, ...", 1, MAX_N),
  "use_beam_search": _flag("the n likeliest texts that a beam search finds, n wide, in place of samples"),
  "length_penalty": _number("goes with use_beam_search: 1; above 0 favours long texts", -10, 10),
  "early_stopping": {"enum": [True, False, "never", None],
                     "description": "goes with use_beam_search: false; as Hugging Face's"},
  "seed": _whole("same seed, same text; drawn if left out", 0, MAX_SEED),
  "min_tokens": _whole("the text does not end before", 0, 2**31 - 1),
  "stop": {"anyOf": [STOP, {"type": ["array", "null"], "items": STOP, "maxItems": 4}],
           "description": "the text ends before the one that is complete first"},
  "stream": _flag("server-sent events"),
  "stream_options": {"type": ["object", "null"], "properties": {"include_usage": _flag("usage comes last")},
                     "additionalProperties": False, "description": "goes with stream"},
  "response_format": {"anyOf": [
    {"type": "null"},
    _object("free, or any JSON", {"type": {"enum": ["text", "json_object"]}}, ["type"]),
    _object("JSON by a schema", {
      "type": {"enum": ["json_schema"]},
      "json_schema": _object("", {"name": _text("", 64), "description": _text(""), "strict": _flag(""),
                                  "schema": {"type": "object"}}, ["schema"])}, ["type", "json_schema"])],
    "description": "what the text must be"},
  "regex": _text("the text must match it (in place of response_format)"),
  "grammar": _text("the text must follow it, in Lark's notation (in place of response_format)"),
  "user": _text("those that wait take turns by user", 256),
}
COMPLETION = SHARED | {
  "prompt": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1,
                                            "maxItems": MAX_PROMPTS},
                       IDS, {"type": "array", "items": IDS, "minItems": 1, "maxItems": MAX_PROMPTS}],
             "description": "a text, token ids, or a list of either"},
  "echo": _flag("the prompt comes first; with logprobs, its tokens' too"),
  "logprobs": _whole("log-probabilities of the tokens, and of so many likeliest ones at each", 0, MAX_TOP),
  "best_of": _whole("n, if it is given", 1, MAX_N),
}
NAME = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}
CALL = _object("", {"id": _text("", 256), "type": {"enum": ["function"]},
                    "function": _object("", {"name": NAME, "arguments": {"type": "string"}},
                                        ["name", "arguments"])}, ["id", "type", "function"])
PART = _object("", {"type": {"enum": ["text"]}, "text": {"type": "string"}}, ["type", "text"])
MESSAGE = _object("", {
  "role": {"enum": ["system", "user", "assistant", "tool"]},
  "content": {"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": PART, "minItems": 1,
                                                       "maxItems": 64}]},
  "tool_calls": {"type": ["array", "null"], "items": CALL, "maxItems": 64},
  "tool_call_id": _text("", 256),
}, ["role"])
TOOL = _object("", {"type": {"enum": ["function"]}, "function": _object("", {
  "name": NAME, "description": _text(""), "parameters": {"type": ["object", "null"]}, "strict": _flag("")},
  ["name"])}, ["type", "function"])
CHAT = SHARED | {
  "messages": {"type": "array", "items": MESSAGE, "minItems": 1, "maxItems": 1024,
               "description": "the conversation; the model's own template renders it"},
  "max_completion_tokens": _whole("max_tokens, by its newer name", 1, 2**31 - 1),
  "logprobs": _flag("log-probabilities of the tokens"),
  "top_logprobs": _whole("and of so many likeliest ones at each; goes with logprobs", 0, MAX_TOP),
  "tools": {"type": ["array", "null"], "items": TOOL, "maxItems": 64, "description": "that may be called"},
  "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required", None]},
                            _object("", {"type": {"enum": ["function"]}, "function": _object(
                              "", {"name": NAME}, ["name"])}, ["type", "function"])],
                  "description": "auto, if there are tools"},
  "parallel_tool_calls": _flag("true; false ends the answer with the first call"),
}

# What clients know from elsewhere, and why it is not served.
UNSERVED = {
  "best_of": "ask for n samples", "suffix": "the models here continue texts, they do not fill gaps",
  "functions": "use tools", "function_call": "use tool_choice",
  "chat_template": "only the model's own template is run",
  "chat_template_kwargs": "only the model's own template is run",
  "add_generation_prompt": "the model's own template says how an answer begins",
  "continue_final_message": "the model's own template says how an answer begins",
  "audio": "the models here read and write text", "modalities": "the models here read and write text",
  "prediction": "nothing is done with it", "store": "nothing is kept", "metadata": "nothing is kept",
  "service_tier": "there is one", "reasoning_effort": "say it in a message, as the model's template wants it",
  "verbosity": "say it in a message", "web_search_options": "nothing is fetched",
  "safety_identifier": "use user", "prompt_cache_key": "prefixes are found by themselves",
  "prompt_cache_retention": "prefixes are found by themselves",
  "ignore_eos": "use min_tokens", "stop_token_ids": "use stop", "guided_json": "use response_format",
  "guided_regex": "use regex", "guided_grammar": "use grammar",
}


def check_fields(body: dict, fields: dict, required: tuple[str, ...]) -> None:
  """Raises Refusal: a field that is missing, unknown (with the nearest), not served, or out of bounds."""
  if not isinstance(body, dict):
    raise Refusal(f"the body must be a JSON object, got {shown(body)}", code="invalid_type")
  for name in body:
    if name not in fields:
      if body[name] is None and name in UNSERVED:
        continue
      if name in UNSERVED:
        raise Refusal(f"{name} is not served: {UNSERVED[name]}", name, code="unsupported_parameter")
      near = nearest(name, fields)
      hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(fields)}"
      raise Refusal(f"unknown parameter {shown(name)}{hint}", name[:64], code="unknown_parameter")
  for name in required:
    if body.get(name) is None:
      raise Refusal(f"{name} is missing: it is required", name, code="missing_required_parameter")
  for name, value in body.items():
    if name in fields:
      check(value, fields[name], name)


def check(value, schema: dict, name: str) -> None:
  """Raises Refusal unless `value` is what `schema` says; `name` is its path, as messages[3].role."""
  if "anyOf" in schema:
    return _check_any(value, schema["anyOf"], name)
  if "enum" in schema:
    if not any(type(value) is type(each) and value == each for each in schema["enum"]):
      raise Refusal(f"{name}={shown(value)} must be {describe(schema)}", name)
    return
  if not _has_type(value, schema):
    raise Refusal(f"{name}={shown(value)} must be {describe(schema)}", name, code="invalid_type")
  if isinstance(value, int | float) and not isinstance(value, bool):
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    holds = low <= value <= high and value > schema.get("exclusiveMinimum", -math.inf)  # Never of NaN.
  elif isinstance(value, str):
    holds = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf)
    holds = holds and re.search(schema.get("pattern", ""), value) is not None and not (
      "pattern" in schema and value.endswith("\n"))
  elif isinstance(value, list):
    holds = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf)
  else:
    holds = not isinstance(value, dict) or len(value) <= schema.get("maxProperties", math.inf)
  if not holds:
    raise Refusal(f"{name}={shown(value)} must be {describe(schema)}", name)
  if isinstance(value, list) and "items" in schema:
    for i, each in enumerate(value):
      check(each, schema["items"], f"{name}[{i}]")
  if isinstance(value, dict):
    _check_object(value, schema, name)


def _check_any(value, schemas, name):
  """The alternatives in turn; where none holds, what is wrong by the nearest of them."""
  faults = []
  for schema in schemas:
    try:
      return check(value, schema, name)
    except Refusal as e:
      faults.append((schema, e))
  deep = [e for _, e in faults if e.param != name]
  if len({e.param for e in deep}) == 1:
    what, _, wanted = str(deep[0]).partition(" must be ")
    others = [str(e).partition(" must be ")[2] for e in deep[1:]]
    raise Refusal(f"{what} must be {' or '.join(dict.fromkeys([wanted, *others]))}" if wanted else what,
                  deep[0].param, code=deep[0].code)
  if deep:  # Of its type, and wrong inside: the last, which is the most particular.
    raise deep[-1]
  typed = [e for schema, e in faults if e.code != "invalid_type"]
  if len(typed) == 1:
    raise typed[0]
  wanted = " or ".join(dict.fromkeys(describe(schema) for schema in schemas))
  raise Refusal(f"{name}={shown(value)} must be {wanted}", name, code=faults[0][1].code)


def _check_object(value, schema, name):
  known = schema.get("properties", {})
  for key, each in value.items():
    path = f"{name}.{key[:64]}"
    if key in known:
      check(each, known[key], path)
      continue
    if not re.search(schema.get("propertyNames", {}).get("pattern", ""), key):
      raise Refusal(f"{path} must be a token id, as \"50256\"", path)
    rest = schema.get("additionalProperties", True)
    if rest is False:
      near = nearest(key, known)
      hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
      raise Refusal(f"{path} is unknown{hint}", path, code="unknown_parameter")
    if rest is not True:
      check(each, rest, path)
  for key in schema.get("required", ()):
    if key not in value:
      raise Refusal(f"{name}.{key} is missing", f"{name}.{key}", code="missing_required_parameter")


def _has_type(value, schema):
  kinds = schema.get("type", list(TYPES))
  kinds = [kinds] if isinstance(kinds, str) else kinds
  if isinstance(value, bool):
    return "boolean" in kinds
  return any(isinstance(value, TYPES[kind]) for kind in kinds)


def describe(schema: dict) -> str:
  """"a whole number from 1 to 8", for messages."""
  if "enum" in schema:
    return "one of " + ", ".join(str(each) for each in schema["enum"] if each is not None)
  kinds = schema.get("type", "object")
  kind = next((k for k in ([kinds] if isinstance(kinds, str) else kinds) if k != "null"), "null")
  if kind in ("integer", "number"):
    what = {"integer": "a whole number", "number": "a number"}[kind]
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    if low == high:
      return f"{low}"
    between = ("above", "and at most") if "exclusiveMinimum" in schema else ("from", "to")
    return f"{what} {between[0]} {low} {between[1]} {high}"
  if kind == "string":
    if "pattern" in schema:
      return f"a string that matches {schema['pattern']}"
    return f"a string of {schema.get('minLength', 0)} to {schema['maxLength']} characters" if (
      "maxLength" in schema) else "a string"
  if kind == "array":
    most = f"{schema.get('minItems', 0)} to {schema['maxItems']}" if "maxItems" in schema else (
      f"at least {schema.get('minItems', 0)}")
    return f"a list of {most} entries"
  if kind == "object" and "maxProperties" in schema:
    return f"an object of at most {schema['maxProperties']} entries"
  return {"boolean": "true or false", "null": "null", "object": "an object"}[kind]


def shown(value, most: int = 60) -> str:
  """A value in a message, cut."""
  text = repr(value[:most + 1] if isinstance(value, str | list) else value if (
    not isinstance(value, dict)) else dict(list(value.items())[:8]))
  return text if len(text) <= most else text[:most] + "..."

"""Requests of the OpenAI API, read: bytes -> JSON -> an Ask, or a Refusal that names the field."""
import dataclasses
import json
import math
import secrets

from infer.fields import CHAT, COMPLETION, MAX_SEED, Refusal, check_fields, shown

MAX_DEPTH = 64  # Of JSON: lists and objects within each other.
PLAIN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
         "frequency_penalty", "min_tokens")  # Of Sampling, under the same name.

NO_BEAMS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "logit_bias", "stop", "response_format", "regex", "grammar", "tool_choice",
            "tools", "top_logprobs", "echo", "stream")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
  """What is served, as requests are held against it."""
  model: str
  vocab_size: int
  max_length: int  # Tokens of a prompt and its text.
  max_requests: int  # Texts of one request.
  has_template: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
  """One request, with every bound held."""
  is_chat: bool
  prompts: tuple[str | list[int], ...] = ()  # Of a completion.
  messages: tuple[dict, ...] = ()  # Of a chat; content is a string.
  n: int = 1
  seed: int = 0
  max_tokens: int | None = None  # None: what the context has room for.
  settings: dict = dataclasses.field(default_factory=dict)  # Sampling's, but seed and max_tokens.
  stop: tuple[str, ...] = ()
  stream: bool = False
  include_usage: bool = False
  echo: bool = False
  logprobs: int | None = None  # How many of the likeliest are shown; None: no log-probabilities.
  constraint: tuple[str, str, str] | None = None  # (kind, text) for infer.grammar, and whose field it is.
  tools: tuple[dict, ...] = ()
  tool_choice: str = "none"  # "none", "auto", "required", or the name of the function to call.
  parallel_tool_calls: bool = True
  user: str = ""
  beams: dict | None = None  # Of infer.beam.BeamSearch.

  def seeds(self) -> list[int]:
    return [(self.seed + i) % (MAX_SEED + 1) for i in range(self.n)]


def read_json(raw: bytes):
  """Raises Refusal: no UTF-8, no JSON (NaN and Infinity are none), too deep, or half a surrogate pair."""
  def refuse(name):
    raise ValueError(f"{name} is no JSON")

  def finite(digits):
    if math.isinf(value := float(digits)):
      raise ValueError(f"{digits[:40]} is too large a number")
    return value

  try:
    value = json.loads(raw.decode("utf-8"), parse_constant=refuse, parse_float=finite)
  except UnicodeDecodeError as e:
    raise Refusal(f"the body is no UTF-8: byte {e.start}", code="invalid_json") from None
  except RecursionError:
    raise Refusal(f"the body nests deeper than {MAX_DEPTH}", code="invalid_json") from None
  except ValueError as e:
    raise Refusal(f"the body is no JSON: {str(e)[:200]}", code="invalid_json") from None
  has_escapes = b"\\u" in raw
  level, depth = [value], 0
  while level:
    if depth > MAX_DEPTH:
      raise Refusal(f"the body nests deeper than {MAX_DEPTH}", code="invalid_json")
    if has_escapes:
      for each in level:
        _check_text(each)
    level = [inner for each in level if isinstance(each, list | dict)
             for inner in (each.values() if isinstance(each, dict) else each)]
    depth += 1
  return value


def _check_text(value):
  for text in value if isinstance(value, dict) else [value]:
    try:
      text.encode() if isinstance(text, str) else None
    except UnicodeEncodeError:
      raise Refusal(f"{shown(text)} holds half a surrogate pair", code="invalid_json") from None


def read_completion(body, limits: Limits) -> Ask:
  """/v1/completions.

  Raises:
    Refusal: named by field.
  """
  check_fields(body, COMPLETION, ("prompt",))
  given = {name: value for name, value in body.items() if value is not None}
  prompt = given["prompt"]
  is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
  prompts = (prompt,) if is_one else tuple(prompt)
  for i, each in enumerate(prompts):
    name = "prompt" if is_one else f"prompt[{i}]"
    if isinstance(each, list) and max(each) >= limits.vocab_size:
      raise Refusal(f"{name}: token {max(each)} is outside the vocabulary of {limits.vocab_size}", name)
  if given.get("best_of", given.get("n", 1)) != given.get("n", 1):
    raise Refusal(f"best_of={given['best_of']} is not served unless it is n={given.get('n', 1)}: ask for n "
                  "samples and choose", "best_of", code="unsupported_parameter")
  echo, logprobs = given.get("echo", False), given.get("logprobs")
  max_tokens = given.get("max_tokens", 16)
  if max_tokens == 0 and not (echo and logprobs is not None):
    raise Refusal("max_tokens=0 scores a prompt: it goes with echo and logprobs", "max_tokens")
  shared = _read_shared(given, limits, len(prompts))
  if max_tokens == 0 and (shared["constraint"] or given.get("n", 1) > 1):
    raise Refusal("max_tokens=0 scores a prompt: no text is made that n or a grammar could be about",
                  "max_tokens")
  settings = shared.pop("settings") | {"logprobs": logprobs}
  settings |= {"prompt_logprobs": logprobs} if echo and logprobs is not None else {}
  return Ask(is_chat=False, prompts=prompts, max_tokens=max_tokens, echo=echo, logprobs=logprobs,
             settings=settings, **shared)


def read_chat(body, limits: Limits) -> Ask:
  """/v1/chat/completions.

  Raises:
    Refusal: named by field.
  """
  check_fields(body, CHAT, ("messages",))
  given = {name: value for name, value in body.items() if value is not None}
  if not limits.has_template:
    raise Refusal(f"{limits.model} has no chat template: ask /v1/completions to continue a text", "messages",
                  code="no_chat_template")
  max_tokens = given.get("max_completion_tokens", given.get("max_tokens"))
  if max_tokens != given.get("max_tokens", max_tokens):
    raise Refusal(f"max_tokens={given['max_tokens']} and max_completion_tokens={max_tokens} are the same "
                  "setting: give one", "max_tokens")
  if max_tokens == 0:
    raise Refusal("max_tokens=0 must be at least 1", "max_tokens")
  if "top_logprobs" in given and not given.get("logprobs"):
    raise Refusal("top_logprobs goes with logprobs=true", "top_logprobs")
  logprobs = given.get("top_logprobs", 0) if given.get("logprobs") else None
  tools, choice = _read_tools(given)
  shared = _read_shared(given, limits, 1)
  if shared["constraint"] and choice not in ("none", "auto"):
    raise Refusal("tool_choice says that the answer is a call: it cannot be a text by "
                  f"{shared['constraint'][2]} too", "tool_choice")
  settings = shared.pop("settings") | {"logprobs": logprobs}
  return Ask(is_chat=True, messages=_read_messages(given["messages"]), max_tokens=max_tokens,
             settings=settings, logprobs=logprobs, tools=tools, tool_choice=choice,
             parallel_tool_calls=given.get("parallel_tool_calls", True), **shared)


def _read_shared(given, limits, n_prompts):
  """The fields of Ask that both endpoints have."""
  if (model := given.get("model", limits.model)) != limits.model:
    raise Refusal(f"model={shown(model)} is not served here; served: {limits.model}", "model", status=404,
                  code="model_not_found")
  n, max_tokens = given.get("n", 1), given.get("max_tokens")
  if n * n_prompts > limits.max_requests:
    raise Refusal(f"n={n} texts of {n_prompts} prompts are more than the {limits.max_requests} that may run "
                  "and wait", "n")
  if "stream_options" in given and not given.get("stream"):
    raise Refusal("stream_options goes with stream=true", "stream_options")
  if max_tokens is not None and given.get("min_tokens", 0) > max_tokens:
    raise Refusal(f"min_tokens={given['min_tokens']} must be at most max_tokens={max_tokens}", "min_tokens")
  if given.get("min_tokens", 0) > limits.max_length:
    raise Refusal(f"min_tokens={given['min_tokens']} is more than the {limits.max_length} positions of the "
                  "model", "min_tokens")
  beams = _read_beams(given)
  settings = {name: given[name] for name in (PLAIN if beams is None else ("min_tokens",)) if name in given}
  bias = given.get("logit_bias", {})
  for token in bias:
    if int(token) >= limits.vocab_size:
      raise Refusal(f"logit_bias.{token}: it is outside the vocabulary of {limits.vocab_size}",
                    f"logit_bias.{token}")
  if bias:
    settings["logit_bias"] = tuple(sorted((int(token), float(value)) for token, value in bias.items()))
  stop = given.get("stop", ())
  return {
    "settings": settings, "n": n, "seed": given.get("seed", secrets.randbelow(MAX_SEED + 1)),
    "stop": (stop,) if isinstance(stop, str) else tuple(stop), "stream": given.get("stream", False),
    "include_usage": bool(given.get("stream_options", {}).get("include_usage")),
    "constraint": _read_constraint(given), "user": given.get("user", ""),
    "beams": beams,
  }


def _read_beams(given):
  """What a beam search is asked for; None: it is not."""
  if not given.get("use_beam_search"):
    for name in ("length_penalty", "early_stopping"):
      if name in given:
        raise Refusal(f"{name} goes with use_beam_search", name)
    return None
  off = {"temperature": 1, "top_p": 1, "repetition_penalty": 1, "tool_choice": "none",
         "response_format": {"type": "text"}}
  for name in NO_BEAMS:
    if given.get(name) and given[name] != off.get(name):
      raise Refusal(f"{name}={shown(given[name])} has no meaning in a beam search, which draws nothing and "
                    "looks ahead: leave it out", name)
  if given.get("logprobs") is not True and given.get("logprobs"):
    raise Refusal(f"logprobs={given['logprobs']}: of a beam search only the chosen tokens' are told: "
                  "logprobs=0", "logprobs")
  n = given.get("n", 1)
  return {"width": n, "n": n} | {name: given[name] for name in ("length_penalty", "early_stopping")
                                 if name in given}


def _read_constraint(given):
  form = given.get("response_format", {"type": "text"})
  schema = form.get("json_schema", {}).get("schema")
  found = {"json_object": [("json", "", "response_format")],
           "json_schema": [("json_schema", json.dumps(schema), "response_format")]}.get(form["type"], [])
  found += [(kind, given[name], name) for name, kind in (("regex", "regex"), ("grammar", "lark"))
            if name in given]
  if len(found) > 1:
    raise Refusal(f"{found[0][2]} and {found[1][2]} both say what the text must be: give one", found[1][2])
  return found[0] if found else None


def _read_tools(given):
  """(tools, choice): "none", "auto", "required" or the name of one of them."""
  tools = tuple(given.get("tools", ()))
  names = [tool["function"]["name"] for tool in tools]
  if doubles := {name for name in names if names.count(name) > 1}:
    raise Refusal(f"tools: two are named {min(doubles)}", "tools")
  choice = given.get("tool_choice", "auto" if tools else "none")
  if not tools and choice != "none":
    raise Refusal("tool_choice goes with tools", "tool_choice")
  if "parallel_tool_calls" in given and not tools:
    raise Refusal("parallel_tool_calls goes with tools", "parallel_tool_calls")
  if isinstance(choice, dict):
    choice = choice["function"]["name"]
    if choice not in names:
      raise Refusal(f"tool_choice: no tool is named {choice}; there is {', '.join(names)}", "tool_choice")
    if choice in ("none", "auto", "required"):
      raise Refusal(f"tool_choice: a function named {choice} cannot be told from the choice", "tool_choice")
  return tools, choice


def _read_messages(messages) -> tuple[dict, ...]:
  """As data.chat takes them: content a string, and of an assistant's calls and a tool's id where they are."""
  made = []
  for i, message in enumerate(messages):
    given = {name: value for name, value in message.items() if value is not None}
    role, content, name = given["role"], given.get("content"), f"messages[{i}]"
    if "tool_calls" in given and role != "assistant":
      raise Refusal(f"{name}.tool_calls goes with role=assistant", f"{name}.tool_calls")
    if ("tool_call_id" in given) != (role == "tool"):
      raise Refusal(f"{name}.tool_call_id goes with role=tool, and it with that", f"{name}.tool_call_id")
    if content is None and not given.get("tool_calls"):
      raise Refusal(f"{name}.content is missing", f"{name}.content", code="missing_required_parameter")
    if isinstance(content, list):
      content = "".join(part["text"] for part in content)
    calls = {"tool_calls": given["tool_calls"]} if given.get("tool_calls") else {}
    linked = {"tool_call_id": given["tool_call_id"]} if role == "tool" else {}
    made.append({"role": role, "content": content or "", **calls, **linked})
  return tuple(made)


def fit_tokens(ask: Ask, n_prompt: int, limits: Limits, name: str) -> int:
  """max_tokens of a text whose prompt has so many tokens.

  Raises:
    Refusal: they are more than the model has positions.
  """
  room = limits.max_length - n_prompt
  wanted = ask.max_tokens if ask.max_tokens is not None else max(room, 1)
  if wanted > room:
    hint = f"; nearest valid max_tokens: {room}" if room > 0 else ""
    raise Refusal(f"{name}: its {n_prompt} tokens and max_tokens={wanted} are more than the "
                  f"{limits.max_length} positions of the model{hint}", "max_tokens" if room > 0 else name,
                  code="context_length_exceeded")
  if ask.settings.get("min_tokens", 0) > wanted:
    raise Refusal(f"min_tokens={ask.settings['min_tokens']} must be at most max_tokens={wanted}",
                  "min_tokens")
  return wanted

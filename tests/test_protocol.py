"""Requests read and refused: every bound at its border, every field by its name."""
import dataclasses
import json
import math

import hypothesis
import hypothesis.strategies as st
import pytest

from infer.answers import Choice
from infer.fields import CHAT, COMPLETION, UNSERVED, Refusal
from infer.protocol import MAX_DEPTH, Limits, fit_tokens, read_chat, read_completion, read_json
from tests.fake_engine import Scored, Token, bytes_tokenizer

LIMITS = Limits(model="m", vocab_size=259, max_length=100, max_requests=20, has_template=True)
TALK = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
# Field -> (its least, its most, what is beside them).
BOUNDS = {
  "max_tokens": (1, 2**31 - 1, {}), "temperature": (1e-4, 2, {}), "top_p": (1e-9, 1, {}),
  "top_k": (1, 2**31 - 1, {}), "min_p": (0, 1, {}), "repetition_penalty": (0.01, 100, {}),
  "presence_penalty": (-2, 2, {}), "frequency_penalty": (-2, 2, {}), "n": (1, 8, {}),
  "seed": (0, 2**32 - 1, {}), "min_tokens": (0, 50, {"max_tokens": 50}),
}


def completion(**body):
  return read_completion({"prompt": "hi"} | body, LIMITS)


def chat(**body):
  return read_chat({"messages": TALK} | body, LIMITS)


def refusal(read, **body):
  with pytest.raises(Refusal) as e:
    read(**body)
  assert e.value.status in (400, 404) and len(str(e.value)) < 700
  return e.value


# Bounds.

@pytest.mark.parametrize("read", [completion, chat])
@pytest.mark.parametrize("name", BOUNDS)
def test_numbers_at_their_bounds_and_beyond(read, name):
  least, most, beside = BOUNDS[name]
  for good in (least, most):
    read(**beside | {name: good})
  beyond = [least - 1, most + 1] if isinstance(least, int) else [-least, most * (1 + 1e-9)]
  for bad in (*beyond, -1e18, 1e18, 10**400, -(10**400), math.nan, math.inf, True, "1", [1], {}):
    if bad == -1 and least <= -1 or name == "max_tokens" and bad == 0:
      continue
    assert refusal(read, **beside | {name: bad}).param == name, bad


def test_every_number_of_the_tables_has_both_bounds():
  def numbers(schema, path):
    if isinstance(schema, dict):
      kinds = schema.get("type", ())
      if {"integer", "number"} & set([kinds] if isinstance(kinds, str) else kinds):
        yield path, schema
      for key, inner in schema.items():
        yield from numbers(inner, f"{path}.{key}")
    elif isinstance(schema, list):
      for inner in schema:
        yield from numbers(inner, path)

  found = [*numbers(COMPLETION, ""), *numbers(CHAT, "")]
  assert len(found) > 30
  for path, schema in found:
    assert {"minimum", "exclusiveMinimum"} & schema.keys() and "maximum" in schema, path


def test_what_is_in_neither_table_is_refused_with_the_nearest():
  assert "did you mean max_tokens" in str(refusal(completion, max_token=3))
  for name in UNSERVED:
    if name not in COMPLETION:
      assert refusal(completion, **{name: "x"}).code == "unsupported_parameter"
    if name not in CHAT:
      e = refusal(chat, **{name: "x"})
      assert e.param == name and e.code == "unsupported_parameter"
  chat(service_tier=None, chat_template=None)
  assert refusal(chat, **{"x" * 5000: 1}).param == "x" * 64


def test_each_field_of_a_table_is_read_or_refused():
  """A value that changes nothing of what is asked for would be one that is ignored."""
  changes = {
    "model": "m", "max_tokens": 7, "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.5,
    "repetition_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": 1, "logit_bias": {"5": 1}, "n": 2,
    "seed": 5, "min_tokens": 3, "stop": "x", "stream": True, "response_format": {"type": "json_object"},
    "regex": "a", "grammar": "start: \"a\"", "user": "u", "echo": True, "logprobs": 3, "best_of": 1,
    "use_beam_search": True, "max_completion_tokens": 7, "prompt": "ho"}
  for read, table in ((completion, COMPLETION), (chat, CHAT)):
    plain = read(seed=0)
    for name in table.keys() - {"length_penalty", "early_stopping",
                                "messages", "top_logprobs", "stream_options", "tools", "tool_choice",
                                "parallel_tool_calls"}:
      value = True if read is chat and name == "logprobs" else changes[name]
      changed = read(**{"seed": 0} | {name: value})
      assert (changed != plain) == (name not in ("model", "best_of")), name
  assert chat(logprobs=True, top_logprobs=4).logprobs == 4 and chat(logprobs=True).logprobs == 0
  beams = dict(use_beam_search=True, n=3, length_penalty=0.5, early_stopping="never")
  assert chat(**beams, temperature=0, top_p=1, min_tokens=2).beams == {
    "width": 3, "n": 3, "length_penalty": 0.5, "early_stopping": "never"}
  assert chat(**beams, temperature=0, top_p=1, min_tokens=2).settings == {"min_tokens": 2, "logprobs": None}
  assert chat(stream=True, stream_options={"include_usage": True}).include_usage
  assert not chat(tools=[TOOL], parallel_tool_calls=False).parallel_tool_calls


# JSON.

def test_what_is_no_json_is_refused():
  for raw, said in ((b"", "no JSON"), (b"{", "no JSON"), (b'"\xff"', "no UTF-8"), (b'{"a": NaN}', "NaN"),
                    (b"[-Infinity]", "Infinity"), (b"[1e999]", "too large"), (b"9" * 5000, "no JSON"),
                    (b"[" * 100000, "deep"), (b"[" * 80 + b"]" * 80, "deep"), (b'{"a":' * 5000, "deep"),
                    (b'"\\ud800"', "surrogate"), (b'{"\\udfff": 1}', "surrogate")):
    with pytest.raises(Refusal, match=said):
      read_json(raw)
  assert read_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH) and read_json(b'"\\ud83e\\udd9c"') == "🦜"


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                      st.sampled_from(["type", "role", "content", "json_schema", "function", "name", "0"]),
                      inner, max_size=3), max_leaves=6)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.dictionaries(st.sampled_from([*COMPLETION, *CHAT]), JSON, max_size=5))
def test_any_body_is_read_or_refused(body):
  for read, first in ((read_completion, {"prompt": "x"}), (read_chat, {"messages": TALK})):
    try:
      read(first | body, LIMITS)
    except Refusal as e:
      assert e.param is not None and e.param.split(".")[0].split("[")[0] in body and str(e)


# What is read.

def test_prompts():
  assert completion(prompt="a").prompts == ("a",) and completion(prompt=["a", ""]).prompts == ("a", "")
  assert completion(prompt=[1, 2]).prompts == ([1, 2],)
  assert completion(prompt=[[1], [2]]).prompts == ([1], [2])
  for bad in ([], [[]], [-1], [259], [1.5], [True], ["a", 1], {}, None, 5, [[1], "a"], ["x"] * 65):
    assert refusal(completion, prompt=bad).param.startswith("prompt"), bad
  assert refusal(completion, prompt=[[1], [300]]).param == "prompt[1]"
  assert refusal(completion, prompt=["x"] * 21).param == "n" and refusal(completion, prompt=["x"] * 3, n=7)


def test_seeds_of_samples_follow_each_other():
  assert completion(n=3, seed=2**32 - 2).seeds() == [2**32 - 2, 2**32 - 1, 0]
  assert completion().seed != completion().seed  # One in four thousand million.


def test_settings_that_do_not_go_together():
  for read, body, name in (
      (completion, dict(best_of=2), "best_of"), (completion, dict(max_tokens=0), "max_tokens"),
      (completion, dict(max_tokens=0, echo=True, logprobs=1, n=2), "max_tokens"),
      (completion, dict(min_tokens=20, max_tokens=10), "min_tokens"),
      (completion, dict(min_tokens=101), "min_tokens"),
      (completion, dict(stream_options={}), "stream_options"),
      (completion, dict(model="other"), "model"), (completion, dict(regex="a", grammar="b"), "grammar"),
      (completion, dict(logit_bias={"259": 1}), "logit_bias.259"), (completion, dict(stop=["a"] * 5), "stop"),
      (completion, dict(stop=[""]), "stop[0]"), (completion, dict(logit_bias={"-1": 1}), "logit_bias.-1"),
      (completion, dict(logit_bias={"1": 101}), "logit_bias.1"), (completion, dict(logprobs=21), "logprobs"),
      (completion, dict(logit_bias={str(i): 1 for i in range(301)}), "logit_bias"),
      (chat, dict(top_logprobs=2), "top_logprobs"), (chat, dict(logprobs=2), "logprobs"),
      (chat, dict(max_tokens=3, max_completion_tokens=4), "max_tokens"),
      (chat, dict(max_tokens=0), "max_tokens"),
      (chat, dict(tool_choice="auto"), "tool_choice"), (chat, dict(tools=[TOOL, TOOL]), "tools"),
      (chat, dict(parallel_tool_calls=True), "parallel_tool_calls"),
      (chat, dict(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "no"}}), "tool_choice"),
      (chat, dict(tools=[TOOL], tool_choice="required", regex="a"), "tool_choice"),
      (chat, dict(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name"),
      (chat, dict(response_format={"type": "json_schema"}), "response_format.json_schema"),
      (chat, dict(response_format={"type": "yaml"}), "response_format.type"),
      (chat, dict(length_penalty=2.0), "length_penalty"),
      (completion, dict(use_beam_search=False, early_stopping=True), "early_stopping"),
      (completion, dict(use_beam_search=True, early_stopping="always"), "early_stopping"),
      (completion, dict(use_beam_search=True, stop="a"), "stop"),
      (completion, dict(use_beam_search=True, logprobs=2), "logprobs"),
      (chat, dict(use_beam_search=True, stream=True), "stream"),
      (chat, dict(use_beam_search=True, temperature=0.5), "temperature"),
      (chat, dict(use_beam_search=True, regex="a"), "regex"),
      (chat, dict(use_beam_search=True, tools=[TOOL]), "tools")):
    assert refusal(read, **body).param == name, body


def test_messages():
  parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
  call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
  asked = chat(messages=[{"role": "user", "content": parts},
                         {"role": "assistant", "content": None, "tool_calls": [call]},
                         {"role": "tool", "tool_call_id": "1", "content": "4"}])
  assert asked.messages == ({"role": "user", "content": "ab"},
                            {"role": "assistant", "content": "", "tool_calls": [call]},
                            {"role": "tool", "content": "4", "tool_call_id": "1"})
  user = lambda **more: [{"role": "user", "content": ""} | more]
  for bad, name in (
      ([], "messages"), (TALK * 1025, "messages"), ([{}], "messages[0].role"),
      (user(role="root"), "messages[0].role"), ([{"role": "user"}], "messages[0].content"),
      (user(content=5), "messages[0].content"), (user(tool_calls=[call]), "messages[0].tool_calls"),
      (TALK + user(content=[{"type": "text"}]), "messages[1].content[0].text"),
      (user(content=[{"type": "image_url", "text": ""}]), "messages[0].content[0].type"),
      (user(role="tool"), "messages[0].tool_call_id"), (user(weight=1), "messages[0].weight")):
    assert refusal(chat, messages=bad).param == name, bad


def test_a_model_without_a_template_does_not_chat():
  with pytest.raises(Refusal, match="no chat template"):
    read_chat({"messages": TALK}, dataclasses.replace(LIMITS, has_template=False))


def test_the_context_bounds_the_text():
  assert fit_tokens(chat(), 90, LIMITS, "messages") == 10
  assert fit_tokens(completion(max_tokens=10), 90, LIMITS, "prompt") == 10
  for asked, n, name in ((completion(max_tokens=11), 90, "max_tokens"), (chat(), 100, "messages"),
                         (completion(), 500, "prompt"), (chat(min_tokens=11), 90, "min_tokens")):
    with pytest.raises(Refusal) as e:
      fit_tokens(asked, n, LIMITS, "messages" if asked.is_chat else "prompt")
    assert e.value.param == name


def test_constraints():
  schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
  form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
  kind, text, name = chat(response_format=form).constraint
  assert (kind, json.loads(text), name) == ("json_schema", schema, "response_format")
  assert completion(regex="a+").constraint == ("regex", "a+", "regex")
  assert completion(grammar="g").constraint == ("lark", "g", "grammar")
  assert chat(response_format={"type": "text"}).constraint is None


# Texts, event by event.

def read_all(ask, prompt, text, finish="length", **given):
  choice, deltas = Choice(ask, bytes_tokenizer(), prompt, **given), []
  for n, token in enumerate(text, 1):
    deltas.append(choice.push(Token(0, token, -n, ((token, -n), (65, -9), (66, -10)),
                                    finish if n == len(text) else None)))
    if choice.stopped:
      break
  return choice, deltas


def test_logprobs_come_with_the_text_that_they_are_of():
  """A stop string's tokens and the end token have none; a character's tokens come together."""
  choice, deltas = read_all(completion(logprobs=2, stop="END"), [1], "aéENxEND!".encode())
  assert choice.whole.text == "aéENx" and choice.whole.finish == "stop" and choice.stopped
  assert [s.id for s in choice.whole.shown] == list("aéENx".encode())
  assert [s.offset for s in choice.whole.shown] == [0, 1, 1, 2, 3, 4]
  assert [len(d.shown) for d in deltas] == [1, 0, 2, 0, 0, 3, 0, 0, 0] and choice.n_tokens == 9
  assert all(len(s.top) == 2 for s in choice.whole.shown)
  for delta in deltas:
    assert delta.text.encode() == bytes(s.id for s in delta.shown)
  choice, _ = read_all(completion(logprobs=0), [1], [*b"ab", 258], finish="stop")
  assert [s.id for s in choice.whole.shown] == list(b"ab") and choice.n_tokens == 3
  choice, _ = read_all(completion(logprobs=0, stop="bc"), [1], b"ab")
  assert choice.whole.text == "ab" and len(choice.whole.shown) == 2 and choice.whole.finish == "length"


def test_an_echoed_prompt_comes_first_and_whole():
  asked = completion(echo=True, logprobs=1)
  choice = Choice(asked, bytes_tokenizer(), [256, *b"hi"], echo="hi")
  assert choice.push_prompt(Scored(0, 1, [-1.0], [((5, -0.5), (6, -0.7))], None)).text == ""
  assert choice.push_prompt(Scored(0, 2, [float("-inf")], [((5, -0.5),)], None)).text == ""
  delta = choice.push(Token(0, 33, -2.0, ((33, -2.0),), "length"))
  assert delta.text == "hi!" and [s.id for s in delta.shown] == [256, *b"hi!"]
  assert [s.logprob for s in delta.shown] == [None, -1.0, -9999.0, -2.0]
  assert [s.offset for s in delta.shown] == [0, 0, 1, 2] and choice.n_tokens == 1
  scored = Choice(completion(echo=True, logprobs=1, max_tokens=0), bytes_tokenizer(), [256], echo="")
  assert scored.push_prompt(Scored(0, 1, [], [], "length")).finish == "length"
  assert [s.logprob for s in scored.whole.shown] == [None] and scored.n_tokens == 0

"""infer/tools.py: what chat templates write for a call is read back as that call, however the text is cut."""
import json
import time

import hypothesis
import hypothesis.strategies as st
import jsonschema
import numpy as np
import pytest

from data.chat import RENDERER
from data.tokenizer import Special, load_tokenizer
from infer.tools import MARKS, Call, CallReader, find_style, force_call
from tests.test_chat import TEMPLATES, byte_level

# How the families' own templates write an assistant's calls.
CALLS = {
  "hermes": """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}
{%- for c in m.tool_calls %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}
{{- '<tool_call>\n{"name": "' + c.name + '", "arguments": ' }}{{ c.arguments | tojson }}
{{- '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}""",
  "llama": """{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{%- if m.tool_calls %}{% set c = m.tool_calls[0] %}
{{- '{"name": "' + c.name + '", "parameters": ' }}{{ c.arguments | tojson }}{{ '}' }}
{%- else %}{{ m.content }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}""",
  "llama_python": """{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{%- set c = m.tool_calls[0] %}{{ '<|python_tag|>' + c.name + '.call(' }}
{%- for k, v in c.arguments.items() %}{{ k + '="' + v + '"' }}
{%- if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}
{{- ')<|eom_id|>' }}{% endfor %}""",
  "mistral": """{% for m in messages %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}
{{- '{"name": "' + c.name + '", "arguments": ' }}{{ c.arguments | tojson }}{{ ', "id": "abc012345"}' }}
{%- if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' + eos_token }}{% endfor %}""",
  "mistral_args": """{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}
{{- '[TOOL_CALLS]' + c.name + '[ARGS]' }}{{ c.arguments | tojson }}{% endfor %}{{ eos_token }}{% endfor %}""",
  "mistral_id": """{% for m in messages %}{% for c in m.tool_calls %}
{{- '[TOOL_CALLS]' + c.name + '[CALL_ID]abc012345[ARGS]' }}{{ c.arguments | tojson }}{% endfor %}
{{- eos_token }}{% endfor %}""",
}
STYLES = {name: name.partition("_")[0] for name in CALLS}
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "</s>")
NAMES = {"get_weather", "search.web-2", "f"}
ARGUMENTS = [
  {"city": "Zürich \"HB\"", "days": 3}, {}, {"a": {"b": [1, {"c": "}"}], "d": None}, "e": -1.5e-3},
  {"code": "if x:\n\treturn '{[</tool_call>[TOOL_CALLS]<|python_tag|>'; \\", "東京": True},
]


def answer(name, content, calls):
  """What the template writes behind the assistant's header."""
  message = {"role": "assistant", "content": content,
             "tool_calls": [{"name": n, "arguments": a} for n, a in calls]}
  text, = RENDERER.render(CALLS[name], [{"messages": [message], "eos_token": "</s>"}])
  for end in ENDS:
    text = text.removesuffix("\n").removesuffix(end)
  for head in ("<|im_start|>assistant\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"):
    text = text.removeprefix(head)
  return text


def read(style, parts, names=NAMES):
  reader = CallReader(style, names)
  shown = "".join(map(reader.push, parts)) + reader.finish()
  return shown, [(c.name, json.loads(c.arguments)) for c in reader.calls]


def cuts(text):
  """Whole, in two at every place, in threes, and character by character."""
  yield [text]
  yield from ([text[:i], text[i:]] for i in range(1, len(text)))
  yield [text[i:i + 3] for i in range(0, len(text), 3)]
  yield list(text)


CASES = [(name, content, calls)
         for name, contents, several in (
             ("hermes", ["", "I'll look:\n\n {x} < y"], True), ("llama", [""], False),
             ("mistral", [""], True), ("mistral_args", ["", "Let me see. [x]"], True),
             ("mistral_id", [""], True))
         for content in contents
         for calls in ([[("get_weather", a)] for a in ARGUMENTS]
                       + [[("f", ARGUMENTS[0]), ("search.web-2", ARGUMENTS[3]), ("f", {})]] * several)]


@pytest.mark.parametrize("name, content, calls", CASES)
def test_a_rendered_call_is_read_back_however_it_is_cut(name, content, calls):
  text = answer(name, content, calls)
  for parts in cuts(text):
    shown, found = read(STYLES[name], parts)
    assert found == calls, parts
    assert shown == content.rstrip(), parts


def test_llamas_tools_of_its_own():
  calls = [("f", {"query": "who's (there)?", "more": "a, b"})]
  for parts in cuts(answer("llama_python", "", calls)):
    assert read("llama", parts) == ("", calls)
  other = '{"type": "function", "name": "get_weather", "parameters": {}}'
  for parts in cuts('{"name": "f", "parameters": {"a": 1}}; ' + other):
    assert read("llama", parts) == ("", [("f", {"a": 1}), ("get_weather", {})])
  for parts in cuts('<|python_tag|>{"name": "f", "parameters": {"a": [2]}}'):
    assert read("llama", parts) == ("", [("f", {"a": [2]})])


@hypothesis.given(arguments=st.dictionaries(st.text(max_size=5), st.recursive(
  st.none() | st.booleans() | st.integers(-10**9, 10**9) | st.text(max_size=12),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
  max_leaves=6), max_size=4), name=st.sampled_from(["hermes", "llama", "mistral", "mistral_args"]),
  seed=st.randoms(use_true_random=False))
@hypothesis.settings(max_examples=80, deadline=None)
def test_any_arguments_come_back(arguments, name, seed):
  text = answer(name, "", [("f", arguments)])
  places = sorted({0, len(text), *(seed.randrange(len(text)) for _ in range(6))})
  parts = [text[a:b] for a, b in zip(places, places[1:])]
  assert read(STYLES[name], parts) == ("", [("f", arguments)])


@pytest.mark.parametrize("style, text", [
  ("hermes", "No call: 3 < 4, <tool>, <tool_cal and </tool_call>.  \n"),
  ("hermes", "<tool_call>\nnot JSON</tool_call> and more"),
  ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
  ("hermes", '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>'),
  ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
  ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>'),
  ("hermes", 'cut off <tool_call>\n{"name": "f", "arguments": {"x": "'),
  ("hermes", "<tool_call>"), ("hermes", " "), ("hermes", ""),
  ("hermes", '<tool_call>{"name": "f", "arguments": ' + '{"x": [' * 40 + "]}" * 39),
  ("llama", '{"answer": {"name": "f", "parameters": {}}}'),
  ("llama", '  {"name": "Bob", "parameters": {"age": 3}}'), ("llama", "{x} is a set"),
  ("llama", '{"name": "f'),
  ("llama", 'Sure: {"name": "f", "parameters": {}}'), ("llama", "{}"), ("llama", "[1]"),
  ("llama", "<|python_tag|>import os\nos.system('ls')"), ("llama", "<|python_tag|>f.call(open('x'))"),
  ("llama", "<|python_tag|>f.call(x=open('y'))"), ("llama", "<|python_tag|>f.call(**{'a': 1})"),
  ("llama", "<|python_tag|>g.call(x=1)"), ("llama", "<|python_tag|>f.call(x={1})"),
  ("llama", "<|python_tag|>f(x=1)"), ("llama", "<|python_tag|>f.call(1)"),
  ("mistral", "[TOOL_CALLS] none"), ("mistral", "[TOOL_CALLS] []"), ("mistral", "[TOOL_CALLS] [1]"),
  ("mistral", "[TOOL_CALLS]a b{}"), ("mistral", "[TOOL_CALLS]g[ARGS]{}"), ("mistral", "[TOOL_CALLS]f[ARGS]["),
  ("mistral", "[TOOL[TOOL_CALLS"), ("mistral", "[TOOL_CALLS](f){}"),
])
def test_what_is_no_call_is_shown_as_it_is(style, text):
  for parts in cuts(text):
    assert read(style, parts) == (text, []), parts


def test_text_streams_up_to_a_call_and_nothing_of_the_call_is_shown():
  reader, shown = CallReader("hermes", {"f"}), []
  for c in 'Hi you <b>\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n':
    shown.append(reader.push(c))
  assert shown[:2] == ["H", "i"]  # As soon as it is certain.
  assert shown[7:9] == ["", " <b"]  # "<" may begin a call; so the space before it waits.
  assert "".join(shown) == "Hi you <b>" and reader.finish() == ""
  reader = CallReader("llama", {"f"})
  assert [reader.push(p) for p in ('{"res', 'ult"', ": ", "1}")] == ["", '{"result"', ":", " 1}"]


def test_calls_amid_text_and_after_one_that_is_none():
  good = '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>'
  for parts in cuts(f"a <tool_call>x {good} b {good}\n{good}"):
    assert read("hermes", parts) == ("a <tool_call>xb", [("f", {"a": 1})] * 3)
  for parts in cuts('<tool_call>{"name": "f", "arguments": {"s": "two\nlines"}}'):  # No end is written.
    assert read("hermes", parts) == ("", [("f", {"s": "two\nlines"})])


def test_marks_that_are_special_tokens():
  """They come as ids without a text; shown they have none either."""
  specials = {"[TOOL_CALLS]": Special(7), "[ARGS]": Special(8), "<s>": Special(9),
              "<|python_tag|>": Special(10)}
  reader = CallReader("mistral", {"f"}, specials)
  pushed = [("See", 1), ("", 9), ("", 7), ("f", 2), ("", 8), ('{"x":', 3), (" 1}", 4), ("", 7), ("f", 2),
            ("", 8), ("{}", 5)]
  assert "".join(reader.push(*p) for p in pushed) + reader.finish() == "See"
  assert reader.calls == [Call("f", '{"x": 1}'), Call("f", "{}")]
  reader = CallReader("llama", {"f"}, specials)
  pushed = [("", 10), ("print", 1), ("(1)", 2)]
  assert "".join(reader.push(*p) for p in pushed) + reader.finish() == "print(1)"
  assert reader.calls == []


def test_a_long_call_and_a_deep_one():
  """In a second of a processor, and without a crash."""
  text = '<tool_call>{"name": "f", "arguments": {"x": "' + "ab\\n" * 8000 + '"}}</tool_call>'
  began = time.process_time()
  assert read("hermes", [text[i:i + 4] for i in range(0, len(text), 4)])[1][0][1]["x"] == "ab\n" * 8000
  assert time.process_time() - began < 1
  deep = "<tool_call>" + '{"name":' * 5000 + "1" + "}" * 5000
  assert read("hermes", [deep]) == (deep, [])
  deep = "<|python_tag|>f.call(x=" + "-" * 20_000 + "1)"
  assert read("llama", [deep]) == (deep, [])


@pytest.mark.parametrize("name", CALLS)
def test_the_style_is_read_off_the_template(name):
  template = CALLS[name].replace("'{\"name\"", "'<|python_tag|>{\"name\"") if name == "llama" else CALLS[name]
  assert find_style(template) == STYLES[name]


def test_templates_without_calls_or_of_another_kind():
  assert find_style(CALLS["llama"]) == "llama"  # Llama 3.2's small ones know no python_tag.
  for template in (None, *TEMPLATES.values(), "<tool_call>\n<function=", "<tool_call>{{ name }}\n<arg_key>"):
    assert find_style(template) is None
  for name, template in TEMPLATES.items():
    assert find_style(template) is None, name


# Calls that must be.

TOOLS = [
  {"name": "f", "parameters": {
    "type": "object", "additionalProperties": False, "required": ["who"], "properties": {
      "who": {"$ref": "#/$defs/name"}, "n": {"type": "integer", "maximum": 9}},
    "$defs": {"name": {"enum": ["Ann", "Bo"]}}}},
  {"name": "get_weather", "parameters": {"type": "object", "additionalProperties": False, "properties": {}}},
]


@pytest.mark.parametrize("style, template, tools", [
  ("hermes", "", TOOLS), ("llama", "", TOOLS), ("mistral", "", TOOLS), ("mistral", "[ARGS]", TOOLS[:1]),
  ("hermes", "", TOOLS[1:])])
def test_what_the_grammar_of_a_call_lets_through_is_one(tmp_path, style, template, tools):
  pytest.importorskip("llguidance", reason="extra [serve]")
  from infer.grammar import GrammarCompiler
  byte_level().save(str(tmp_path / "tokenizer.json"))
  tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
  compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id])
  opening, text = force_call(style, tools, template)
  rng, seen = np.random.default_rng(0), set()
  for _ in range(12):
    state, ids = compiler.compile("lark", text), []
    while not state.done:
      may = np.flatnonzero(np.unpackbits(state.mask().view(np.uint8), bitorder="little"))
      ids.append(int(rng.choice(may)))
      state.push(ids[-1])
    assert state.may_end
    shown, calls = read(style, [opening + tokenizer.decode(ids)], {tool["name"] for tool in tools})
    assert shown == "" and len(calls) == 1
    parameters, = (tool["parameters"] for tool in tools if tool["name"] == calls[0][0])
    jsonschema.validate(calls[0][1], parameters)
    seen.add(calls[0][0])
  assert seen == {tool["name"] for tool in tools}


def test_calls_that_cannot_be_forced():
  with pytest.raises(ValueError, match="no tool to call"):
    force_call("hermes", [])
  with pytest.raises(ValueError, match="name it"):
    force_call("mistral", TOOLS, "[ARGS]")
  assert all(mark in MARKS for mark in ("[TOOL_CALLS]", "[ARGS]"))

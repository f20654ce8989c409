"""Chat templates: the ids of transformers, nothing special from users, no harm from hostile ones."""
import json
import time

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from data.chat import Chat, Renderer, find_template
from data.tokenizer import load_tokenizer
from infer.server import force_answer

# Small ones, of the shapes that the families' own have.
TEMPLATES = {
  "chatml": """
{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}{{ '<|im_start|>system\nBe helpful<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
  "llama3": """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
  "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{- raise_exception('no system role') }}{% endif %}
{%- for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
  "mistral": """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}
{{- '[INST] ' + m['content'] + ' [/INST]' }}
{%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}""",
  "qwen": """{% for m in messages %}{% set c = m.content %}
{%- if m.role == 'assistant' and '</think>' in c %}
{%- set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
  "phi3": """{% for m in messages %}
{{- '<|' + m['role'] + '|>' + '\n' + m['content'] + '<|end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' + '\n' }}{% else %}{{ eos_token }}{% endif %}""",
}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>",
        "qwen": "<|im_end|>", "phi3": "<|end|>"}
SPECIALS = ("<s>", "</s>", "<eos>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
            "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|end|>", "<|user|>",
            "<|assistant|>")
TALK = [{"role": "user", "content": "  What is 2 + 2?\n"},
        {"role": "assistant", "content": "Four, naïve 東京 🦜."},
        {"role": "user", "content": "And\n\n3<4? [x] a|b> 'tis"}]


def byte_level():
  """Every byte, a few merges, all the specials; Phi-3's take the white space behind them."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  pieces = [*alphabet, "Ġa", "in", "Ġt", "Ċ" * 2, "WhatĠ"]
  model = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)},
                                          [("Ġ", "a"), ("i", "n"), ("Ġ", "t"), ("Ċ", "Ċ")]))
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = decoders.ByteLevel()
  model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", len(pieces))])
  model.add_special_tokens([tokenizers.AddedToken(s, special=True, normalized=False, rstrip=s in (
      "<|end|>", "<|user|>", "<|assistant|>")) for s in SPECIALS])
  model.add_tokens(["<think>", "</think>"])
  return model


def metaspace():
  """Llama 2's shape: the first word of a text gets a space, what follows a special token does not."""
  pieces = ["<unk>", *SPECIALS, *(f"<0x{b:02X}>" for b in range(256)),
            "\u2581", "W", "h", "\u2581W", "\u2581Wh"]
  model = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [
      ("\u2581", "W"), ("\u2581W", "h")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
  model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
  model.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), decoders.Strip(" ", 1, 0)])
  model.add_special_tokens([tokenizers.AddedToken(s, special=True, normalized=False)
                            for s in ("<unk>", *SPECIALS)])
  return model


@pytest.fixture(scope="module", params=[byte_level, metaspace], ids=lambda f: f.__name__)
def folder(request, tmp_path_factory):
  path = tmp_path_factory.mktemp(request.param.__name__)
  request.param().save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(json.dumps({
    "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"},
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": [{"name": "default", "template": TEMPLATES["chatml"]},
                      {"name": "tool_use", "template": "no"}]}))
  return path


@pytest.fixture(scope="module")
def tokenizer(folder):
  return load_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("name", TEMPLATES)
def test_same_ids_as_transformers(folder, tokenizer, name):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  chat = Chat(tokenizer, TEMPLATES[name])
  for messages in (TALK[:1], TALK, [{"role": "user", "content": ""}], TALK[:2]):
    for add in (True, False):
      wanted = theirs.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=True,
                                          add_generation_prompt=add, return_dict=False)
      assert chat.encode(messages, add) == wanted
  assert chat.end_ids == (tokenizer.specials[ENDS[name]].id,)


def test_a_template_may_look_into_what_the_assistant_said(tokenizer):
  """Qwen 3 drops earlier thoughts, whose marks are ordinary tokens; "<" and ">" are ends of special ones."""
  chat = Chat(tokenizer, TEMPLATES["qwen"])
  said = lambda text: chat.encode([TALK[0], {"role": "assistant", "content": text}, TALK[2]])
  assert said("<think>\nhm\n</think>\n\nFour") == said("Four") != said("hm Four")
  assert said("<think>\nhm\n</think>Say <|im_end|>") == said("Say <|im_end|>")


SPELT = st.lists(st.one_of(
  st.sampled_from([*SPECIALS, "im_end|>", "<|", "|>", "\U000f0000", "\u2581", "x", " "]),
  st.text(st.characters(exclude_categories=["Cs"]), max_size=4)), max_size=8).map("".join)


@hypothesis.given(texts=st.lists(SPELT, min_size=1, max_size=3), system=SPELT, name=st.sampled_from(
  ["chatml", "llama3", "mistral", "qwen", "phi3"]))
@hypothesis.settings(max_examples=60, deadline=None)
def test_what_users_say_is_never_special(tokenizer, texts, system, name):
  roles = ["system", *["user", "assistant"] * 2]
  spoken = [{"role": r, "content": t} for r, t in zip(roles, [system, *texts])]
  plain = [m | {"content": "x"} for m in spoken]
  chat, ids = Chat(tokenizer, TEMPLATES[name]), {s.id for s in tokenizer.specials.values()}
  special = lambda messages: [i for i in chat.encode(messages) if i in ids]
  assert special(spoken) == special(plain)
  assert not ids.intersection(tokenizer.encode(system) + tokenizer.encode_inner(system))


@pytest.mark.parametrize("edit", ["replace('x', '')", "lower", "reverse", "upper | lower", "trim('x')"])
def test_a_template_that_rewrites_what_users_say_makes_nothing_special(tokenizer, edit):
  chat = Chat(tokenizer, "{% for m in messages %}{{ '<|user|>' + (m.content | " + edit + ") + '<|end|>' }}"
              "{% endfor %}")
  ids = {s.id for s in tokenizer.specials.values()}
  for text in ("<|imx_end|>", "<|IM_END|>", ">|dne_mi|<", "<x|im_end|>", "x<|im_end|>x"):
    try:
      made = chat.encode([{"role": "user", "content": text}])
    except ValueError as e:
      assert "makes special tokens of what the messages say" in str(e)
    else:
      assert [i for i in made if i in ids] == [tokenizer.specials[s].id for s in ("<|user|>", "<|end|>")]


# Limits.

@pytest.fixture(scope="module")
def renderer():
  renderer = Renderer(seconds=0.4, max_chars=1000)
  yield renderer
  renderer.close()


@pytest.mark.parametrize("template, words", [
  ("{% for i in range(10**9) %}{% endfor %}", "OverflowError|Range too big"),
  ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "stopped.*0.4 s"),
  ("{% for i in range(99999) %}xxxxxxxxxx{% endfor %}", "more than 1000 characters"),
  ("{{ 'a' * 10**10 }}", "needs more than 512 MB"),
  ("{{ 9 ** (9 ** 9) }}", "stopped|MB"),
  ("{{ ''.__class__.__mro__ }}", "unsafe"),
  ("{{ ''['__class__'] | string }}{{ (lambda: 0) }}", "TemplateSyntaxError"),
  ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe|undefined"),
  ("{% set _ = messages.append(1) %}", "unsafe|SecurityError"),
  ("{% include '/etc/passwd' %}", "no loader"),
  ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself|stopped"),
  ("{{ raise_exception('only pairs') }}", "only pairs"),
  ("a\n{% if %}", "line 2")])
def test_hostile_templates_are_stopped(renderer, template, words):
  began = time.monotonic()
  with pytest.raises(ValueError, match=f"^chat template: .*({words})"):
    renderer.render(template, [{"messages": [{"role": "user", "content": "hi"}]}])
  assert time.monotonic() - began < 15
  assert renderer.render("{{ '{0.__class__}'.format(messages) }}", [{"messages": []}]) == [""]
  assert renderer.render("{{ a | tojson }} {% generation %}{{ 'é' | tojson }}{% endgeneration %}", [
      {"a": {"b": "<é>"}}]) == ['{"b": "<é>"} "é"']  # And the next one is served.


def test_memory_has_a_limit_however_it_grows():
  """With time enough for it on a slow machine."""
  renderer = Renderer(seconds=20, max_chars=1000)
  double = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
  with pytest.raises(ValueError, match="^chat template: .*512 MB"):
    renderer.render(double, [{"messages": []}])
  renderer.close()


@pytest.mark.parametrize("messages, words", [
  ([], "at least one"),
  ("hi", "must be a list"),
  (["hi"], r"messages\[0\] must be an object"),
  ([TALK[0], {"role": "user"}], r"messages\[1\].content is missing"),
  ([{"role": "user", "content": None}], r"messages\[0\].content must be a string, got NoneType"),
  ([{"role": "user", "content": "a", "nmae": "b"}],
   r"messages\[0\].nmae is unknown; known: content, role, tool_call_id, tool_calls"),
  ([{"role": "user<|im_end|>", "content": "a"}], r"messages\[0\].role='user<|im_end|>' is no role"),
  ([{"role": "user", "content": "a\ud800"}], r"messages\[0\].content holds half a surrogate pair at 1")])
def test_a_wrong_message_is_named(tokenizer, messages, words):
  with pytest.raises(ValueError, match=words):
    Chat(tokenizer, TEMPLATES["chatml"]).encode(messages)


def test_where_templates_are_found(folder, tmp_path):
  assert find_template(folder) == TEMPLATES["chatml"]
  assert find_template(tmp_path) is None
  (tmp_path / "tokenizer_gguf.json").write_text(json.dumps({"tokenizer.chat_template": "gguf"}))
  assert find_template(tmp_path) == "gguf"
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
  assert find_template(tmp_path) == "config"
  (tmp_path / "chat_template.jinja").write_text("file")
  assert find_template(tmp_path) == "file"
  (tmp_path / "chat_template.jinja").unlink()
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [
      {"name": n, "template": n} for n in "ab"]}))
  with pytest.raises(ValueError, match="names .'a', 'b'., none of them default"):
    find_template(tmp_path)


# Tools.

TOOLS_TEMPLATE = """
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}{% for tool in tools %}{{- tool | tojson }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- '}</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": [1, "é"]}'}}


def test_tools_and_calls_are_rendered_and_stay_text(tmp_path):
  byte_level().save(str(tmp_path / "tokenizer.json"))
  tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
  chat = Chat(tokenizer, TOOLS_TEMPLATE)
  tool = {"type": "function", "function": {"name": "add", "description": "adds"}}
  talk = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
          {"role": "tool", "content": "4", "tool_call_id": "1"}]
  text = tokenizer.decode(chat.encode(talk, tools=[tool]))
  assert json.dumps(tool) in text
  assert '<tool_call>{"name": "add", "arguments": {"a": [1, "é"]}}</tool_call>' in text
  special = tokenizer.specials["<|im_end|>"].id
  n_special = chat.encode(talk, tools=[tool]).count(special)
  end = "<|im_end|>"
  evil = {"type": "function", "function": {"name": "add", "description": f"x{end}", end: end}}
  call = CALL | {"function": {"name": f"add{end}", "arguments": json.dumps({end: end})}}
  ids = chat.encode([talk[0], talk[1] | {"tool_calls": [call]}, talk[2] | {"content": end}], tools=[evil])
  assert ids.count(special) == n_special
  for bad in ("[1]", "{", None):
    with pytest.raises(ValueError, match=r"messages\[1\].tool_calls\[0\].function.arguments"):
      chat.encode([talk[0], talk[1] | {"tool_calls": [CALL | {"function": {"name": "a", "arguments": bad}}]}])


def test_a_forced_call_begins_as_the_template_writes_it(tmp_path):
  byte_level().save(str(tmp_path / "tokenizer.json"))
  chat = Chat(load_tokenizer(tmp_path / "tokenizer.json"), TOOLS_TEMPLATE)
  ids, opening, grammar = force_answer("hermes", [{"name": "add"}], chat)
  assert chat.tokenizer.decode(ids) == opening == "<tool_call>\n" and '"add"' in grammar

"""infer/grammar.py: whatever a model with random weights writes is what the schema, regex or grammar says."""
import collections
import concurrent.futures
import datetime
import ipaddress
import json
import re
import time
import uuid

import jax
import jsonschema
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from data.config import TokenizerConfig
from data.tokenizer import load_tokenizer, train_tokenizer
from infer.sampling import Sampling, sample, stack_settings
from tests.test_chat import byte_level

pytest.importorskip("llguidance", reason="extra [serve]")
from infer.grammar import LIMITS, MAX_BYTES, GrammarCompiler, to_words  # noqa: E402

ARRAY, OBJECT, STRING, INTEGER = ({"type": kind} for kind in ("array", "object", "string", "integer"))
CLOSED = {"type": "object", "additionalProperties": False}
TREE = {"$defs": {"tree": {**CLOSED, "required": ["v"], "properties": {
  "v": INTEGER, "l": {"$ref": "#/$defs/tree"}, "r": {"$ref": "#/$defs/tree"}}}}, "$ref": "#/$defs/tree"}


def closed(required=None, **properties):
  return {**CLOSED, "properties": properties, "required": list(properties) if required is None else required}


SCHEMAS = [
  OBJECT, {**STRING, "maxLength": 12}, INTEGER, {"type": "number"}, {"type": "boolean"}, {"type": "null"},
  {"enum": ["red", "green", 12, None, {"a": [1]}, "\"quoted\" é"]}, {"const": {"a": [1, "x"]}},
  {**INTEGER, "minimum": 3, "maximum": 117}, {**INTEGER, "exclusiveMinimum": -5, "exclusiveMaximum": 2},
  {**INTEGER, "minimum": -1000}, {**INTEGER, "multipleOf": 7, "minimum": 0},
  {"type": "number", "minimum": 0, "maximum": 1},
  {"type": "number", "exclusiveMinimum": 2.5, "maximum": 10.25},
  {**STRING, "minLength": 3, "maxLength": 5}, {**STRING, "pattern": "^[a-z]{2,6}$"},
  {**STRING, "pattern": "^(\\+\\d{1,3} )?\\d{3}-\\d{4}$"}, {**STRING, "pattern": "x[0-9]+y", "maxLength": 30},
  *({**STRING, "format": name} for name in (
      "date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname")),
  {**ARRAY, "items": INTEGER, "maxItems": 8},
  {**ARRAY, "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 4},
  {**ARRAY, "prefixItems": [INTEGER, {"type": "boolean"}], "items": False, "minItems": 2},
  {**ARRAY, "items": {**ARRAY, "items": {"type": "boolean"}, "maxItems": 3}, "maxItems": 3},
  closed(), closed(a=INTEGER), closed([], a=INTEGER, b={"type": "boolean"}, c={"type": "null"}),
  closed(["b"], a=INTEGER, b={**STRING, "maxLength": 4}, c={"type": "null"}),
  closed(name={**STRING, "maxLength": 10}, age={**INTEGER, "minimum": 0, "maximum": 150},
         tags={**ARRAY, "items": {"enum": ["x", "y", "z"]}, "maxItems": 3}),
  closed(at=closed(lat={"type": "number", "minimum": -90, "maximum": 90},
                   lon={"type": "number", "minimum": -180, "maximum": 180})),
  closed(**{"é \"k\"": INTEGER, "": INTEGER, "a b": INTEGER}),
  {**OBJECT, "properties": {"a": INTEGER}, "additionalProperties": {"type": "boolean"}, "required": ["a"]},
  {**OBJECT, "patternProperties": {"^n[0-9]$": INTEGER}, "additionalProperties": False, "maxProperties": 0},
  {"anyOf": [INTEGER, {**STRING, "maxLength": 3}, {"type": "null"}]},
  {"type": ["integer", "null", "boolean"]},
  {"anyOf": [closed(kind={"const": "a"}, x=INTEGER), closed(kind={"const": "b"}, y={"type": "boolean"})]},
  {"oneOf": [{**INTEGER, "minimum": 0, "maximum": 9}, {**STRING, "pattern": "^[AB]$"}]},
  {"allOf": [{**INTEGER, "minimum": 2}, {"maximum": 40}]},
  {"allOf": [{**OBJECT, "properties": {"a": INTEGER}, "required": ["a"]},
             {**OBJECT, "properties": {"b": INTEGER}, "required": ["b"]}]},
  TREE, {"$defs": {"id": {**STRING, "pattern": "^[0-9a-f]{4}$"}}, **closed(a={"$ref": "#/$defs/id"},
                                                                           b={"$ref": "#/$defs/id"})},
  {"definitions": {"n": {**INTEGER, "maximum": 5}}, "type": "array", "items": {"$ref": "#/definitions/n"},
   "maxItems": 3},
  closed(list={**ARRAY, "maxItems": 2, "items": closed(["k"], k={"enum": [1, 2]}, next={"$ref": "#"})}),
  {"title": "T", "description": "d", "examples": [1], "default": 3, **INTEGER},
  closed(steps={**ARRAY, "minItems": 1, "maxItems": 3, "items": closed(
    explanation={**STRING, "maxLength": 20}, output={**STRING, "maxLength": 20})}, answer=STRING),
]


def is_format(value, name):
  """Raises ValueError or AssertionError where the text is none."""
  if name in ("date", "time", "date-time"):
    kind = {"date": datetime.date, "time": datetime.time, "date-time": datetime.datetime}[name]
    value = value.upper().replace(":60", ":59")  # Leap seconds, which Python lacks.
    kind.fromisoformat(re.sub(r"\.\d+", "", value))
  elif name in ("ipv4", "ipv6"):
    {"ipv4": ipaddress.IPv4Address, "ipv6": ipaddress.IPv6Address}[name](value)
  elif name == "uuid":
    uuid.UUID(value)
  elif name == "email":
    assert re.fullmatch(r"[^@\s]+@[^@\s]+", value) or value.startswith('"')
  else:
    label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    assert all(re.fullmatch(label, part) for part in value.split("."))


def sentencepiece(folder):
  text = 'The quick brown fox said: {"name": 12, "b": [true, null]} naïve 東京\n'
  texts = [text * 3 + str(i) for i in range(99)]
  return train_tokenizer(texts, TokenizerConfig(vocab_size=340), folder / "t.model")


def tokenizer_json(folder):
  byte_level().save(str(folder / "tokenizer.json"))
  return load_tokenizer(folder / "tokenizer.json")


def gguf(folder):
  tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), '{"', '":', "Ġ1", "tr", "ue", "true", "</s>",
            "<|im_end|>"]
  fields = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [1] * (len(tokens) - 2) + [3, 3],
            "merges": ['{ "', '" :', "Ġ 1", "t r", "u e", "tr ue"], "eos_token_id": len(tokens) - 2}
  path = folder / "tokenizer_gguf.json"
  path.write_text(json.dumps({f"tokenizer.ggml.{key}": value for key, value in fields.items()}))
  return load_tokenizer(path)


MADE = {"sentencepiece": sentencepiece, "tokenizer.json": tokenizer_json, "gguf": gguf}


@pytest.fixture(scope="module", params=MADE)
def compiler(request, tmp_path_factory):
  tokenizer = MADE[request.param](tmp_path_factory.mktemp("tokenizer"))
  made = GrammarCompiler(tokenizer, tokenizer.vocab_size + 45, [tokenizer.eos_id])
  made.tokenizer = tokenizer
  return made


def letter(compiler, grammar, c: bytes):
  """The token of a letter that may come next; a vocabulary may hold it twice."""
  found = [i for i in allowed(grammar) if compiler.tokenizer.token_bytes[i] == c]
  assert found
  return int(found[0])


def allowed(grammar):
  mask_W = grammar.mask()
  assert mask_W.dtype == np.uint32
  return np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))


def write(compiler, grammar, rng, most=1500):
  """What random logits make of it: its text, and the seconds of each mask. Longer ones grow eager to end."""
  tokenizer, ids, seconds = compiler.tokenizer, [], []
  ending_V = np.array([4.0 * any(c in raw for c in b'"]},@') for raw in tokenizer.token_bytes] + [0.0] * 45)
  for n in range(most):
    began = time.perf_counter()
    may = allowed(grammar)
    seconds.append(time.perf_counter() - began)
    assert len(may) and may.max() < tokenizer.vocab_size
    ends = tokenizer.eos_id in may
    assert ends == grammar.may_end
    assert grammar.done == (may.tolist() == [tokenizer.eos_id])
    logits = rng.normal(size=compiler.vocab_size) * 3 + ending_V * (1 if n < 100 else 4)
    token = int(may[np.argmax((logits + rng.gumbel(size=logits.shape))[may])])
    if token == tokenizer.eos_id or (ends and n > 100):
      grammar.push(tokenizer.eos_id)
      assert grammar.error is None
      return b"".join(tokenizer.token_bytes[i] for i in ids).decode(), seconds
    ids.append(token)
    grammar.push(token)
  raise AssertionError(f"no end after {most} tokens: {tokenizer.decode(ids)[:300]!r}")


def check_schema(schema, text):
  value = json.loads(text)
  jsonschema.Draft202012Validator(schema).validate(value)
  if "format" in schema:
    is_format(value, schema["format"])


@pytest.mark.parametrize("within", [
  lambda time: time, lambda time: {"anyOf": [INTEGER, time]}, lambda time: closed(a=time),
  lambda time: {"$defs": {"t": time}, **ARRAY, "items": {"$ref": "#/$defs/t"}, "maxItems": 1}])
def test_times_come_to_an_end(compiler, within):
  """No longer than nine digits of a second and an offset make them, or than was asked for."""
  for more, digits in (({}, 14), ({"maxLength": 99}, 14), ({"maxLength": 12}, 2)):
    schema = within({**STRING, "format": "time", **more})
    opening = {"anyOf": '"', "properties": '{"a":"', "$defs": '["'}
    text = next((o for key, o in opening.items() if key in schema), '"') + "20:30:32." + "1" * digits
    grammar = compiler.compile("json_schema", json.dumps(schema))
    for c in text.encode():
      grammar.push(letter(compiler, grammar, bytes([c])))
    may = {compiler.tokenizer.token_bytes[i] for i in allowed(grammar) if i < compiler.tokenizer.vocab_size}
    assert may and {raw[:1] for raw in may} <= {b"Z", b"z"}, may


def run_schemas(compiler, n_each):
  rng, seconds, count = np.random.default_rng(0), [], 0
  for schema in SCHEMAS:
    for _ in range(n_each):
      text, spent = write(compiler, compiler.compile("json_schema", json.dumps(schema)), rng)
      check_schema(schema, text)
      count, seconds = count + 1, seconds + spent
  print(f"{count} texts of {len(SCHEMAS)} schemas, {len(seconds)} masks over {compiler.vocab_size} tokens: "
        f"{np.mean(seconds) * 1e3:.3f} ms mean, {np.quantile(seconds, 0.99) * 1e3:.3f} ms at p99")
  return count


def test_every_text_is_valid(compiler):
  assert len(SCHEMAS) >= 50
  assert run_schemas(compiler, 2) == 2 * len(SCHEMAS)


@pytest.mark.slow
def test_a_thousand_texts_are_valid(compiler):
  assert run_schemas(compiler, 20) >= 1000


@pytest.mark.parametrize("pattern", [
  "[0-9]{3}-[a-z]+", "(yes|no|maybe)", "a(bc)*d?", "", "[0-9]+(\\.[0-9]+)?", "(?i:abc)", "[^\\n]{1,9}",
  "é+|東京"])
def test_regex_matches_all_of_the_text(compiler, pattern):
  rng = np.random.default_rng(1)
  for _ in range(5):
    text, _ = write(compiler, compiler.compile("regex", pattern), rng)
    assert re.fullmatch(pattern, text), (pattern, text)


def test_lark_grammars_with_json_inside(compiler):
  rng = np.random.default_rng(2)
  sums = 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[1-9][0-9]{0,2}/'
  for _ in range(5):
    text, _ = write(compiler, compiler.compile("lark", sums), rng)
    assert re.fullmatch(r"[0-9+()]+", text) and compile(text, "", "eval")
  call = 'start: "<call>" obj "</call>"\nobj: %json ' + json.dumps(closed(a={"enum": [1, 2]}))
  text, _ = write(compiler, compiler.compile("lark", call), rng)
  assert json.loads(text.removeprefix("<call>").removesuffix("</call>"))["a"] in (1, 2)


def test_json_is_any_object(compiler):
  rng = np.random.default_rng(3)
  for _ in range(5):
    text, _ = write(compiler, compiler.compile("json"), rng)
    assert isinstance(json.loads(text), dict)


def test_white_space_comes_to_an_end(compiler):
  """A model that writes nothing but spaces must write something else after 32 of them."""
  grammar = compiler.compile("json_schema", json.dumps(closed(a=INTEGER)))
  for token in compiler.tokenizer.encode_inner("{"):
    grammar.push(token)
  space, = compiler.tokenizer.encode_inner(" ")
  for _ in range(32):
    grammar.push(space)
  assert space not in allowed(grammar)
  with pytest.raises(ValueError, match=f"token {space} may not come next"):
    grammar.push(space)


def test_the_librarys_own_settings_are_not_the_clients(compiler):
  """They could make the text no JSON."""
  schema = closed(a=INTEGER, b=INTEGER)
  settings = {"x-guidance": {"item_separator": "#", "key_separator": "#", "lenient": True}}
  grammar = compiler.compile("json_schema", json.dumps(schema | settings))
  text, _ = write(compiler, grammar, np.random.default_rng(6))
  check_schema(schema, text)


def test_threads_may_share_a_compiler(compiler):
  """The server compiles while the engine asks for masks."""
  def work(seed):
    rng = np.random.default_rng(seed)
    for schema in SCHEMAS[20:36]:
      check_schema(schema, write(compiler, compiler.compile("json_schema", json.dumps(schema)), rng)[0])

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(work, range(4)))


# What is legal, and how likely it stays.

def test_the_mask_is_all_that_may_follow(compiler):
  """By brute force over the vocabulary: a token is legal where some whole text goes on with it."""
  words = ["red", "reddish", "green", "12", "12.5", "é!"]
  tokenizer, n_free = compiler.tokenizer, 0
  raws = [w.encode() for w in words]
  for word in raws:
    grammar, written = compiler.compile("regex", "|".join(map(re.escape, words))), b""
    while written != word:
      legal = [i for i, raw in enumerate(tokenizer.token_bytes)
               if raw and any(r.startswith(written + raw) for r in raws)]
      follow = {r[len(written):len(written) + 1] for r in raws if r.startswith(written)}
      if written in raws:
        legal = sorted([*legal, tokenizer.eos_id])
      if len(follow) > 1:  # Else only one byte can follow, and the tokenizer's own way of writing it is kept.
        assert allowed(grammar).tolist() == legal
        n_free += 1
      else:
        assert set(allowed(grammar)) <= set(legal) and grammar.mask().any()
      rest = word[len(written):]
      fits = {i: len(raw) for i in allowed(grammar)
              if (raw := tokenizer.token_bytes[i]) and rest.startswith(raw)}
      token = max(fits, key=fits.get)
      grammar.push(int(token))
      written += tokenizer.token_bytes[token]
  assert n_free >= 6


def test_legal_texts_keep_their_probabilities_renormalised(compiler):
  """1,000 texts through mask and sampler, by a model that likes the same tokens everywhere: each text has the
  product of its tokens' shares of what was legal."""
  V, eos, n = compiler.vocab_size, compiler.tokenizer.eos_id, 1000
  logits_V = np.random.default_rng(4).normal(size=V).astype(np.float32)
  start, chances = compiler.compile("regex", "[ab][cd]?|e"), {}

  def walk(grammar, ids, p):
    may = allowed(grammar)
    mass = np.exp(logits_V[may].astype(np.float64))
    for i, share in zip(may.tolist(), mass / mass.sum()):
      after = grammar.copy()
      after.push(i)
      walk(after, (*ids, i), p * share) if i != eos else chances.update({ids: p * share})

  walk(start, (), 1.0)
  assert len(chances) >= 7 and sum(chances.values()) == pytest.approx(1)
  draw, texts, counts = jax.jit(sample, static_argnames="n_top"), [()] * n, collections.Counter()
  grammars = [start.copy() for _ in range(n)]
  settings = stack_settings([Sampling(seed=i) for i in range(n)])
  logits_BV, none_BV = np.stack([logits_V] * n), np.zeros((n, V), np.int32)
  for pos in range(5):
    mask_BW = np.stack([grammar.mask() for grammar in grammars])
    drawn = draw(logits_BV, none_BV, mask_BW, np.full(n, pos, np.int32), settings, n_top=0)
    for row, token in enumerate(np.asarray(drawn.token_B).tolist()):
      if texts[row] is not None:
        grammars[row].push(token)
        counts.update([texts[row]] if token == eos else [])
        texts[row] = None if token == eos else (*texts[row], token)
  assert sum(counts.values()) == n and counts.keys() <= chances.keys()
  chi2 = sum((counts[ids] - n * p) ** 2 / (n * p) for ids, p in chances.items())
  freedom = len(chances) - 1
  assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


def test_ends_are_where_the_text_may_end(compiler):
  grammar, eos = compiler.compile("regex", "ab?"), compiler.tokenizer.eos_id
  assert not grammar.may_end and not grammar.done and eos not in allowed(grammar)
  with pytest.raises(ValueError, match="may not come next"):
    grammar.push(eos)
  grammar.push(letter(compiler, grammar, b"a"))
  other, b = grammar.copy(), letter(compiler, grammar, b"b")
  assert grammar.may_end and not grammar.done and eos in allowed(grammar)
  grammar.push(b)
  assert grammar.may_end and grammar.done and allowed(grammar).tolist() == [eos]
  assert not other.done and b in allowed(other)  # What was done to one is not done to its copy.
  grammar.push(eos)
  assert grammar.done and grammar.error is None and allowed(grammar).tolist() == [eos]
  assert compiler.compile("regex", "").done


def test_several_stop_ids_and_a_padded_vocabulary(tmp_path):
  tokenizer = gguf(tmp_path)
  end, = (s.id for name, s in tokenizer.specials.items() if name == "<|im_end|>")
  made = GrammarCompiler(tokenizer, 320, [tokenizer.eos_id, end])
  grammar = made.compile("regex", "a")
  assert grammar.mask().shape == (10,)
  grammar.push(tokenizer.token_bytes.index(b"a"))
  assert set(allowed(grammar)) == {tokenizer.eos_id, end}
  a, b = map(tokenizer.token_bytes.index, (b"a", b"b"))
  grammar = GrammarCompiler(tokenizer, 320, [a]).compile("regex", "[ab]+")
  assert allowed(grammar).tolist() == [b]  # A stop id that is a text elsewhere is none here.
  grammar.push(b)
  assert allowed(grammar).tolist() == sorted([a, b])
  np.testing.assert_array_equal(to_words([0, 31, 33], 70), np.array([2**31 + 1, 2, 0], np.uint32))
  for ids in ([], [320], [-1]):
    with pytest.raises(ValueError, match="stop_ids="):
      GrammarCompiler(tokenizer, 320, ids)


# Mistakes, and malice.

DEEP = '{"type": "array", "items": '
BAD = [
  ("json_schema", '{"type": "foo"}', "at #: Invalid type: foo"),
  ("json_schema", json.dumps(closed(a=closed(b={**STRING, "pattern": "(x"}))),
   r"(?s)at #/properties/a/properties/b: regex parse error.*unclosed group"),
  ("json_schema", json.dumps({"$defs": {"z": {"not": INTEGER}}, **closed(p={"$ref": "#/$defs/z"})}),
   r"at #/\$defs/z: Unimplemented keys: \[\"not\"\]"),
  ("json_schema", json.dumps({"$defs": {"z": INTEGER}, **closed(
    p={"anyOf": [{"$ref": "#/$defs/z"}, {"not": {}}]})}), r"at #/properties/p/anyOf/1: Unimplemented keys"),
  ("json_schema", json.dumps({**ARRAY, "items": {"anyOf": [INTEGER, {"$ref": "#/nope"}]}}),
   "at #/items/anyOf/1: Pointer '/nope' does not exist"),
  ("json_schema", '{"$ref": "file:///etc/passwd"}', "at #: .*fetch|at #: .*retriev"),
  ("json_schema", '{"$ref": "#"}', "nothing satisfies it"),
  ("json_schema", '{"type": "object",', "is no JSON: .*line 1 column"),
  ("json_schema", '{"minimum": NaN}', "NaN is no number"),
  ("json_schema", '{"minimum": 1e999}', "at #: expected value"),
  ("json_schema", '{"maximum": ' + "9" * 5000 + "}", "is no JSON: Exceeds the limit"),
  ("json_schema", "[]", "must be an object"), ("json_schema", "", "is no JSON"),
  ("json_schema", '{"const": "\\ud83d"}', "at #: unexpected end of hex escape"),
  ("json_schema", DEEP * 60 + "{}" + "}" * 60, "deeper than the 48 levels"),
  ("json_schema", "[" * 10_000 + "]" * 10_000, "deeper than the 48 levels"),
  ("json_schema", DEEP * 10_000 + "{}" + "}" * 10_000, f"280002 bytes are more than the {MAX_BYTES}"),
  ("json_schema", json.dumps({"enum": ["x" * 100] * 10_000}), f"more than the {MAX_BYTES}"),
  ("json_schema", json.dumps({"allOf": [{"anyOf": [closed([], **{f"k{d}{i}": INTEGER}) for i in range(10)]}
                                        for d in range(4)]}), "schema too large|nothing"),
  ("regex", "a(b", "(?s)invalid regex .*unclosed group"), ("regex", "(?!a)b", "look-around"),
  ("regex", "x\ud800", "half a surrogate pair at 1"),
  ("regex", "(" * 2000 + "a" + ")" * 2000, "invalid regex"),
  ("lark", "start: foo", "unknown name: \"foo\""), ("lark", "start: " + "(" * 2000, "nested"),
  ("lark", "%import /etc/passwd\nstart: INT", "Expected name"),
  ("lark", 'start: <|im_start|> "a"', "special token"),
  ("lark", "start: <[{special}]>", "no token of the vocabulary"),
  ("xml", "", "'xml' is unknown; known: json_schema"),
]


@pytest.mark.parametrize("kind, text, words", BAD, ids=range(len(BAD)))
def test_mistakes_are_named_within_a_second(compiler, kind, text, words):
  special = min(s.id for s in compiler.tokenizer.specials.values() if s.id != compiler.tokenizer.eos_id)
  text = text.replace("{special}", str(special))
  began = time.process_time()
  with pytest.raises(ValueError, match=words) as info:
    compiler.compile(kind, text)
  assert time.process_time() - began < 1
  assert len(str(info.value)) < 1200 and "backtrace" not in str(info.value)
  compiler.compile("json_schema", "{}")  # And the next one is served.


@pytest.mark.parametrize("pattern", ["(a{1000}){1000}", "((a{100}){100}){100}b", "(a{1000}){30}", ".*a.{60}",
                                     "(.*a.{12}b)|(.*c.{14}d)"])
def test_what_is_costly_is_cut_short(compiler, pattern):
  """Each step within 0.3 s of a processor, whatever the pattern; where a limit is met the text must end."""
  began = time.process_time()
  grammar = compiler.compile("regex", pattern)
  assert time.process_time() - began < 1
  for _ in range(40):
    began = time.process_time()
    may = allowed(grammar)
    assert time.process_time() - began < 0.3
    if grammar.error:
      assert may.tolist() == [compiler.tokenizer.eos_id] and grammar.done and not grammar.may_end
      assert "\n" not in grammar.error and grammar.copy().error == grammar.error
      break
    grammar.push(letter(compiler, grammar, b"a"))


def test_a_limit_that_one_text_met_is_not_the_next_ones(compiler, monkeypatch):
  """Copies share the library's states."""
  monkeypatch.setitem(LIMITS, "max_lexer_states", 2000)
  tokenizer, rng, lengths = compiler.tokenizer, np.random.default_rng(0), []
  limited = GrammarCompiler(tokenizer, compiler.vocab_size, [tokenizer.eos_id])
  for _ in range(3):
    grammar, n = limited.compile("regex", ".*a.{15}b"), 0
    while n < 5000 and grammar.error is None:
      grammar.push(letter(compiler, grammar, (b"a", b"b")[rng.integers(2)]))
      grammar.mask()
      n += 1
    assert "too many states" in grammar.error and grammar.done and not grammar.may_end
    assert allowed(grammar).tolist() == [tokenizer.eos_id]
    lengths.append(n)
  assert min(lengths) > 5 and max(lengths) < 2 * min(lengths)


def test_a_grammar_is_compiled_once(compiler):
  text = json.dumps(closed(**{f"k{i}": {**STRING, "pattern": f"^[a-z]{{{i}}}x.*y$"} for i in range(1, 60)}))
  began = time.process_time()
  first = compiler.compile("json_schema", text)
  middle = time.process_time()
  second = compiler.compile("json_schema", text)
  assert time.process_time() - middle < max(0.02, (middle - began) / 2)
  token = int(allowed(first)[0])
  first.push(token)
  assert token in allowed(second)

"""What a text must be: a JSON schema, a regex or a grammar -> which tokens may come next.

llguidance does the work (extra [serve]): https://github.com/guidance-ai/llguidance. Its tokenizer is made of
the bytes of each id, so every vocabulary that data.tokenizer reads will do. Whatever a client writes is
bounded: in size, in depth, in what compiling it and what each token may cost.
"""
import collections
import json
import threading
import time

import llguidance
import numpy as np

from data.tokenizer import Tokenizer

KINDS = ("json_schema", "json", "regex", "lark")
MAX_BYTES = 1 << 16  # Of a schema, a regex or a grammar.
MAX_DEPTH = 48  # Of a schema; the library's own parser ends at 128 of its kind of depth.
WHITE = r"[ \n\r\t]{1,32}"  # In JSON: a model that writes nothing else must come to an end.
# At the first a grammar is compiled within half a second on a slow core, at the second a mask in about 10 ms.
LIMITS = {"initial_lexer_fuel": 100_000, "step_lexer_fuel": 100_000, "step_max_items": 50_000,
          "max_lexer_states": 50_000, "max_grammar_size": 100_000, "verbose_errors": False}
CACHED = 32  # Compiled grammars that are kept; the states of one may come to 15 MB.
# Letters of a time: RFC 3339 takes any number of digits of a second, and a model may write them for ever.
LONGEST = {"time": len("23:59:59.123456789+00:00"), "date-time": len("2026-11-27T23:59:59.123456789+00:00")}
FIND_S = 0.3  # Looking for the place of a mistake in a schema.


class GrammarCompiler:
  """Makes grammars for one tokenizer. May be used from several threads.

  Usage:
    grammar = GrammarCompiler(tokenizer, cfg.padded_vocab_size, [tokenizer.eos_id]).compile("regex", "[0-9]+")
    while not grammar.done:
      grammar.push(draw(grammar.mask()))

  Attributes:
    vocab_size: bits of a mask.
  """

  def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids):
    """Args:
      vocab_size: of the logits: ids that the tokenizer lacks are never allowed.
      stop_ids: tokens that may stand where the text may end, and nowhere else.

    Raises:
      ValueError: no stop id, or one outside the vocabulary.
    """
    self.vocab_size, self.stop_ids = vocab_size, tuple(stop_ids)
    if not self.stop_ids or not 0 <= min(self.stop_ids) <= max(self.stop_ids) < vocab_size:
      raise ValueError(f"stop_ids={self.stop_ids} must be ids below {vocab_size}, at least one: a text "
                       "under a grammar ends with one of them")
    vocabulary = _Vocabulary(tokenizer, vocab_size, self.stop_ids)
    self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary),
                                             eos_token=list(self.stop_ids))
    vocabulary.greedy = self._tokenizer.greedy_tokenize
    self._stops_W = to_words(self.stop_ids, vocab_size)
    written = (i for i, raw in enumerate(tokenizer.token_bytes[:vocab_size]) if raw)
    self._text_W = self._stops_W | to_words(written, vocab_size)
    self._limits = llguidance.LLParserLimits(**LIMITS)
    self._compiled, self._lock = collections.OrderedDict(), threading.Lock()

  def compile(self, kind: str, text: str = "") -> "Grammar":
    """A grammar of which nothing is written yet.

    Args:
      kind: "json_schema" (text: the schema), "json" (any object), "regex" (which must match all of the text;
        Rust's syntax) or "lark" (llguidance's: %json and %regex may be in it).

    Raises:
      ValueError: what is wrong with the text and where, or that it is too large.
    """
    if kind not in KINDS:
      raise ValueError(f"grammar kind {kind!r} is unknown; known: {', '.join(KINDS)}")
    with self._lock:
      if found := self._compiled.get((kind, text)):
        self._compiled.move_to_end((kind, text))
        return Grammar(self, found.deep_copy(), (kind, text))
    matcher = self._make(kind, text)
    with self._lock:
      self._compiled[kind, text] = matcher
      if len(self._compiled) > CACHED:
        self._compiled.popitem(last=False)
    return Grammar(self, matcher.deep_copy(), (kind, text))

  def _forget(self, source):
    """Copies share the states that a limit is about: the next text begins with none."""
    with self._lock:
      self._compiled.pop(source, None)

  def _make(self, kind, text):
    try:
      size = len(text.encode())
    except UnicodeEncodeError as e:
      raise ValueError(f"{kind}: half a surrogate pair at {e.start}") from None
    if size > MAX_BYTES:
      raise ValueError(f"{kind}: {size} bytes are more than the {MAX_BYTES} that are served")
    if kind in ("regex", "lark"):
      grammar = llguidance.LLMatcher.grammar_from_regex(text) if kind == "regex" else (
          llguidance.LLMatcher.grammar_from_lark(text))
      matcher, error = self._try(grammar)
    else:
      schema = _read_schema(text) if kind == "json_schema" else {"type": "object"}
      matcher, error = self._try_schema(schema)
      if error is not None:
        error = f"at {self._find(schema, error)}: {error}"
    if error is not None:
      raise ValueError(f"{kind}: {error}")
    return matcher

  def _try(self, grammar: str):
    """-> (the library's state, what is wrong or None)."""
    matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
    if matcher.is_error():
      return None, _what(matcher)
    first = Grammar(self, matcher)
    first.mask()  # Some of it is made, and some limits are met, only now.
    return matcher, first.error

  def _try_schema(self, schema):
    try:
      grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={
          "whitespace_pattern": WHITE, "lenient": False})
    except ValueError as e:
      return None, str(e)
    return self._try(grammar)

  def _find(self, schema: dict, error: str) -> str:
    """Where in the schema the error is: the smallest part that has it too, found within FIND_S."""
    place, part, until = "#", schema, time.monotonic() + FIND_S
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    while True:
      for name, child in _parts(part):
        if time.monotonic() > until:
          return place
        if isinstance(child, dict) and self._try_schema(shared | child)[1] == error:
          place, part = f"{place}/{name}", child
          break
      else:
        return place


class Grammar:
  """One text under a grammar, at some token of it.

  Attributes:
    done: nothing but a stop id can follow.
    error: why the text had to end though the grammar was not satisfied (a limit of LIMITS was met at this
      token); None as long as all is well. Masks then allow the stop ids only.
  """

  def __init__(self, compiler: GrammarCompiler, state: llguidance.LLMatcher, source=None):
    self._compiler, self._state, self._source, self._mask_W = compiler, state, source, None
    self.error: str | None = None

  def mask(self) -> np.ndarray:
    """uint32 [ceil(V / 32)]: bit i % 32 of word i // 32 is set where token i may come next.

    All that may are in it, except where only one text can follow: there it holds the token that the
    tokenizer writes that text with.
    """
    if self._mask_W is None:
      text_W = self._compiler._text_W
      mask_W = np.frombuffer(self._state.compute_bitmask(), np.uint32)[:len(text_W)] & text_W
      if self._state.is_error():
        self.error = _what(self._state)
      elif not mask_W.any():
        self.error = "no token of the vocabulary can come next"
      self._mask_W = mask_W
    if self.error is not None and self._mask_W is not self._compiler._stops_W:
      self._mask_W = self._compiler._stops_W
      self._compiler._forget(self._source)
    return self._mask_W

  def push(self, token: int) -> None:
    """The token that came next.

    Raises:
      ValueError: it was not allowed.
    """
    if not self.mask()[token // 32] >> token % 32 & 1:
      raise ValueError(f"token {token} may not come next in this grammar")
    if token in self._compiler.stop_ids:
      return
    self._mask_W = None
    if not self._state.consume_token(token):
      self.error = _what(self._state)

  @property
  def done(self) -> bool:
    return self._state.is_stopped() or (self._state.is_accepting() and not np.any(
        self.mask() & ~self._compiler._stops_W))

  @property
  def may_end(self) -> bool:
    """The text is whole as it is."""
    return self.error is None and self._state.is_accepting()

  def copy(self) -> "Grammar":
    """Another text with the same beginning."""
    other = Grammar(self._compiler, self._state.deep_copy(), self._source)
    other.error = self.error
    return other


def to_words(ids, vocab_size: int) -> np.ndarray:
  """uint32 [ceil(vocab_size / 32)] with the bits of the ids set."""
  bits = np.zeros(-(-vocab_size // 32) * 32, bool)
  bits[list(ids)] = True
  return np.packbits(bits, bitorder="little").view(np.uint32)


class _Vocabulary:
  """What llguidance asks of a tokenizer. Special tokens and stop ids have no bytes: they are no text."""

  def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids):
    self.tokens = (tokenizer.token_bytes + [b""] * (vocab_size - tokenizer.vocab_size))[:vocab_size]
    for i in stop_ids:
      self.tokens[i] = b""
    self.eos_token_id, self.bos_token_id, self.special_token_ids = stop_ids[0], None, []
    self._encode, self.greedy = tokenizer.encode_inner, None

  def __call__(self, text: bytes) -> list[int]:
    """How the tokenizer writes what must follow, where it can write just that."""
    ids = self._encode(text.decode())  # The library asks about whole characters only.
    return ids if b"".join(map(self.tokens.__getitem__, ids)) == text else self.greedy(text.decode())


def _read_schema(text: str) -> dict:
  """Raises ValueError: no JSON, no object, or too deep."""
  try:
    schema = json.loads(text, parse_constant=_refuse_constant)
  except RecursionError:
    raise ValueError(f"json_schema: deeper than the {MAX_DEPTH} levels that are served") from None
  except ValueError as e:
    raise ValueError(f"json_schema is no JSON: {e}") from None
  if not isinstance(schema, dict):
    raise ValueError(f"json_schema must be an object, got {text[:40]!r}")
  _check_depth(schema)
  schema.pop("x-guidance", None)  # Settings of the library, which are not the client's.
  _bound_times(schema)
  return schema


def _bound_times(schema):
  """Within the schema, whose other parts stay as they are."""
  if (longest := LONGEST.get(str(schema.get("format")))) is not None:
    said = schema.get("maxLength", longest)
    schema["maxLength"] = min(said, longest) if type(said) is int else said
  for name, child in _parts(schema):
    if isinstance(child, dict) and name != "not":
      _bound_times(child)


def _refuse_constant(name):
  raise ValueError(f"{name} is no number")


def _parts(schema: dict):
  """(name, schema) of those directly within."""
  for key, value in schema.items():
    if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
      yield from ((f"{key}/{name}", child) for name, child in value.items())
    elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
      yield from ((f"{key}/{i}", child) for i, child in enumerate(value))
    elif key in ("items", "additionalProperties", "not"):
      yield key, value


def _check_depth(schema):
  level, depth = [schema], 0
  while level:
    depth += 1
    if depth > MAX_DEPTH:
      raise ValueError(f"json_schema: deeper than the {MAX_DEPTH} levels that are served")
    level = [child for each in level if isinstance(each, dict | list)
             for child in (each.values() if isinstance(each, dict) else each)]


def _what(matcher) -> str:
  """The library's message, without its own state and backtraces."""
  message = matcher.get_error()
  for end in ("<backtrace>", "<state>", "<non-verbose/>"):
    message = message.partition(end)[0]
  message = message.strip()[:1000]
  if message.startswith("panic"):
    return "llguidance cannot compile it; it may ask for a special token, of which no text is made"
  return "nothing satisfies it" if message.startswith("NoExtension") else message

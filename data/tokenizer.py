"""Text <-> token ids: SentencePiece models, Hugging Face tokenizer.json files and GGUF vocabularies as one
class.

Every tokenizer is reduced to a table of the bytes that each id stands for. Decoding is joining
them, so the length of a token in bytes (for bits per byte) and streaming (never half a character)
come from the same table.
"""
import codecs
import collections.abc
import copy
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re

import numpy as np
import sentencepiece
import tokenizers

from data.config import TokenizerConfig
from data.files import replacing
from data.tokenizer_gguf import CONTROL, NO_PREFIX, WHOLE_WORDS, read_fields, to_sentencepiece, to_tokenizers

# The ids of the special pieces of a tokenizer trained here.
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3

# Names that published tokenizer.json files give their special tokens, where no
# tokenizer_config.json says it.
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>")
EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>")
TURN_NAMES = ("<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]")
PAD_NAMES = ("<pad>", "<|pad|>", "<|endoftext|>")

SPACE = "\u2581"  # What SentencePiece writes for a space.
# Training reads blocks of whole lines of about this size, so that line ends are learned too.
BLOCK_CHARS = 2000


class Tokenizer:
  """One vocabulary.

  Attributes:
    vocab_size: number of ids.
    encode_batch: list of texts -> list of lists of ids, as `encode` for each.
    bos_id, eos_id, pad_id: a vocabulary without a beginning marker opens documents with its end
      marker, as GPT-2 does; one without padding pads with the end marker, whose weight is 0.
    sha256: of the file it was read from.
    token_bytes: [V] what each id stands for; empty for special ones.
    n_bytes_V: int32 [V], their lengths.
    specials: what a chat template writes for a special token -> Special. No text becomes one of their ids.
    names: "bos_token", "eos_token", ... -> what a chat template writes for it.
    add_bos: whether the model's own tokenizer begins a text with bos_id.
  """

  def __init__(
    self,
    *,
    encode_batch,
    token_bytes: list[bytes],
    bos_id: int,
    eos_id: int,
    pad_id: int,
    sha256: str,
    encode_inner=None,
    specials: "dict[str, Special] | None" = None,
    names: dict[str, str] | None = None,
    add_bos: bool = True,
  ):
    self._encode_batch, self._encode_inner = encode_batch, encode_inner
    self.token_bytes = token_bytes
    self.n_bytes_V = np.array([len(b) for b in token_bytes], np.int32)
    self.vocab_size = len(token_bytes)
    self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
    self.sha256 = sha256
    self.specials, self.names, self.add_bos = specials or {}, names or {}, add_bos
    self._special_ids = frozenset(special.id for special in self.specials.values())
    first = encode_batch(["a"])[0]
    # Llama 2 puts one space before every text: decoding takes it away.
    self._prefix_space = bool(first) and token_bytes[first[0]].startswith(b" ")

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return [self._spell(ids) for ids in self._encode_batch(texts)]

  def encode(self, text: str) -> list[int]:
    """The ids of the text alone, without special ones, even where the text spells one."""
    return self.encode_batch([text])[0]

  def encode_inner(self, text: str) -> list[int]:
    """As `encode`, for text that follows a special token: no space is put before it."""
    return self._spell(self._encode_inner(text)) if self._encode_inner else self.encode(text)

  def resized(self, vocab_size: int) -> "Tokenizer":
    """For a model with another number of rows: more are empty ids, fewer may only drop special ones.

    Raises:
      ValueError: a text may become an id that the model lacks.
    """
    if any(self.token_bytes[vocab_size:]) or self.eos_id >= vocab_size:
      raise ValueError(f"model.vocab_size={vocab_size}, but its tokenizer has {self.vocab_size} tokens, and "
                       "text is made of those beyond")
    other = copy.copy(self)
    other.token_bytes = (self.token_bytes + [b""] * (vocab_size - self.vocab_size))[:vocab_size]
    other.n_bytes_V = np.array([len(b) for b in other.token_bytes], np.int32)
    other.vocab_size = vocab_size
    other.specials = {name: s for name, s in self.specials.items() if s.id < vocab_size}
    return other

  def _spell(self, ids):
    """Special ids that a library made of a text that spells them -> the ids of their characters."""
    if self._special_ids.isdisjoint(ids):
      return ids
    contents = {special.id: name for name, special in self.specials.items()}
    whole = {raw: i for i, raw in reversed(list(enumerate(self.token_bytes)))}  # The lowest id of several.
    spelt = []
    for i in ids:
      for c in contents.get(i, ""):
        raw = c.encode()
        spelt += [whole[raw]] if raw in whole else [whole[bytes([b])] for b in raw if bytes([b]) in whole]
      if i not in contents:
        spelt.append(i)
    return spelt

  def decode(self, ids: collections.abc.Iterable[int]) -> str:
    """The text; bytes that are no UTF-8 become U+FFFD, special ids nothing.

    Raises:
      ValueError: an id outside the vocabulary.
    """
    ids = list(ids)
    if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
      raise ValueError(
        f"token ids {min(ids)} .. {max(ids)} are outside the vocabulary of {self.vocab_size}"
      )
    text = b"".join(map(self.token_bytes.__getitem__, ids)).decode(errors="replace")
    return text.removeprefix(" ") if self._prefix_space else text

  def stream(self) -> "TextStream":
    """Decodes ids one at a time."""
    return TextStream(self)


class TextStream:
  """The text that each new token adds; half a character waits for the token that completes it."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    self._strip = tokenizer._prefix_space

  def push(self, token: int) -> str:
    if not 0 <= token < self._tokenizer.vocab_size:
      raise ValueError(
        f"token id {token} is outside the vocabulary of {self._tokenizer.vocab_size}"
      )
    text = self._utf8.decode(self._tokenizer.token_bytes[token])
    if self._strip and text:
      self._strip = False
      return text.removeprefix(" ")
    return text

  def finish(self) -> str:
    """What is left at the end: U+FFFD if the text stops within a character."""
    return self._utf8.decode(b"", final=True)


def load_tokenizer(path: str | os.PathLike, kind: str | None = None) -> Tokenizer:
  """Reads a vocabulary; without a kind, a name that ends in .json is Hugging Face's, or a GGUF's fields.

  Raises:
    ValueError: the file is missing, is neither, or cannot give back the text that it encoded.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"tokenizer {path}: no such file")
  kind = kind or {"tokenizer_gguf.json": "gguf"}.get(path.name)
  kind = kind or ("huggingface" if path.suffix == ".json" else "sentencepiece")
  return TOKENIZER[kind](path)


@dataclasses.dataclass(frozen=True, slots=True)
class Special:
  """A special token; those that strip take the white space beside them away (Phi-3's do)."""
  id: int
  lstrip: bool = False
  rstrip: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Beside:
  """What the files beside a vocabulary say of it."""
  names: dict[str, str]  # "bos_token" -> "<s>"
  specials: frozenset[str]
  added: dict[int, tuple[str, bool]]  # id -> (what it is written as, whether it is special)
  add_bos: bool | None


def _read_beside(path: pathlib.Path) -> Beside:
  """tokenizer_config.json, and special_tokens_map.json for what that leaves out."""
  config, older = ({}, {})
  for name, target in (("tokenizer_config.json", config), ("special_tokens_map.json", older)):
    file = path.with_name(name)
    try:
      target.update(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})
    except ValueError as e:
      raise ValueError(f"{file} cannot be read: {e}") from None
  content = lambda token: token.get("content") if isinstance(token, dict) else token
  tokens = {key: content(value) for key, value in (older | config).items() if key.endswith("_token")}
  names = {key: token for key, token in tokens.items() if isinstance(token, str)}
  specials = set(names.values())
  for key in ("additional_special_tokens", "extra_special_tokens"):
    more = (older | config).get(key) or ()
    specials.update(map(content, more.values() if isinstance(more, dict) else more))
  added = {int(i): (token["content"], bool(token.get("special")))
           for i, token in (config.get("added_tokens_decoder") or {}).items()}
  specials.update(token for token, special in added.values() if special)
  add_bos = config.get("add_bos_token")
  return Beside(names, frozenset(s for s in specials if isinstance(s, str)), added,
                add_bos if isinstance(add_bos, bool) else None)


def _load_sentencepiece(path: pathlib.Path) -> Tokenizer:
  raw = path.read_bytes()
  return _from_sentencepiece(path, raw, hashlib.sha256(raw).hexdigest(), _read_beside(path))


def _from_sentencepiece(path, proto: bytes, sha256: str, beside: Beside) -> Tokenizer:
  try:
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    inner = sentencepiece.SentencePieceProcessor(model_proto=proto + NO_PREFIX)
  except RuntimeError as error:
    raise ValueError(f"tokenizer {path} is no SentencePiece model: {error}") from None
  named = beside.specials.union(TURN_NAMES)  # Pieces that users are not to write; plain ones for the library.
  token_bytes, specials = [], {}
  for i in range(model.vocab_size()):
    piece = model.id_to_piece(i)
    if model.is_byte(i):
      token_bytes.append(bytes([int(piece[1:-1], 16)]))
    elif model.is_control(i) or model.is_unknown(i) or piece in named:
      token_bytes.append(b"")
      specials[piece] = Special(i)
    else:
      token_bytes.append(piece.replace(SPACE, " ").encode())
  for i, (piece, special) in sorted(beside.added.items()):
    if i >= model.vocab_size():  # Phi-3 adds its markers behind the model's pieces.
      token_bytes += [b""] * (i + 1 - len(token_bytes))
      token_bytes[i] = b"" if special else piece.encode()
      specials |= {piece: Special(i)} if special else {}
  fallback = [model.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
  has_fallback = all(map(model.is_byte, fallback))

  def encode(library, text):
    # SentencePiece writes spaces as U+2581, so a real U+2581 would come back as a space: spell it
    # in bytes.
    first, *rest = [text] if not has_fallback else text.split(SPACE)
    ids = library.encode(first, num_threads=1)  # prepare has a process for each core.
    return ids + [i for part in rest for i in (*fallback, *inner.encode(part, num_threads=1))]

  def encode_batch(texts: list[str]) -> list[list[int]]:
    if not any(SPACE in text for text in texts):
      return model.encode(texts, num_threads=1)
    return [encode(model, text) for text in texts]

  find = lambda key, i: specials[beside.names[key]].id if beside.names.get(key) in specials else i
  bos, eos, pad = (find(key, i) for key, i in (
      ("bos_token", model.bos_id()), ("eos_token", model.eos_id()), ("pad_token", model.pad_id())))
  if eos < 0:
    raise ValueError(f"tokenizer {path} has no end-of-sentence piece: documents need one")
  spelt = {i: piece for piece, i in ((piece, s.id) for piece, s in specials.items())}
  names = {key: spelt[i] for key, i in (("bos_token", bos), ("eos_token", eos), ("pad_token", pad)) if i >= 0}
  return Tokenizer(
    encode_batch=encode_batch,
    encode_inner=lambda text: encode(inner, text),
    token_bytes=token_bytes,
    bos_id=bos if bos >= 0 else eos,
    eos_id=eos,
    pad_id=pad if pad >= 0 else eos,
    sha256=sha256,
    specials=specials,
    names=names | beside.names,
    add_bos=bos >= 0 if beside.add_bos is None else beside.add_bos,
  )


def _load_huggingface(path: pathlib.Path) -> Tokenizer:
  raw, beside = path.read_bytes(), _read_beside(path)
  try:
    model = tokenizers.Tokenizer.from_str(raw.decode())
    spec = json.loads(raw)
  except Exception as error:  # The library raises a bare Exception; what it says names the fault.
    raise ValueError(f"tokenizer {path} is no tokenizer.json: {error}") from None
  plain = [token for token in spec.get("added_tokens") or ()
           if token["content"] in beside.specials and not token["special"]]
  for token in plain:  # Only the files beside it say that they are special.
    token["special"] = True
  if plain:
    model = tokenizers.Tokenizer.from_str(json.dumps(spec))
  inner = None
  if '"prepend_scheme":"first"' in json.dumps(spec, separators=(",", ":")):
    inner = json.dumps(spec).replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    inner = tokenizers.Tokenizer.from_str(inner)
  return _from_tokenizers(path, model, inner, spec.get("decoder") or {},
                          hashlib.sha256(raw).hexdigest(), beside)


def _from_tokenizers(path, model, inner, decoder: dict, sha256: str, beside: Beside) -> Tokenizer:
  """Args:
    inner: the same for text that follows a special token, if that differs.
    decoder: as tokenizer.json writes it.
  """
  for library in filter(None, (model, inner)):
    library.encode_special_tokens = True  # "<eos>" written in a text is text.
    library.no_truncation()
    library.no_padding()
    library.add_special_tokens([s for s in sorted(beside.specials) if model.token_to_id(s) is not None])
  to_bytes = _huggingface_bytes(path, decoder)
  added, vocab = model.get_added_tokens_decoder(), {i: token for token, i in model.get_vocab().items()}
  token_bytes, specials = [], {}
  for i in range(max(vocab) + 1):
    if i in added and not added[i].special:
      token_bytes.append(added[i].content.encode())
    elif i in added:
      token_bytes.append(b"")
      specials[added[i].content] = Special(i, added[i].lstrip, added[i].rstrip)
    else:
      token_bytes.append(to_bytes(vocab.get(i, "")))

  def special(key, names):
    known = [beside.names[key]] if key in beside.names else names
    ids = [model.token_to_id(name) for name in known]
    return next((i for i in ids if i is not None), None)

  eos = special("eos_token", EOS_NAMES)
  if eos is None:
    raise ValueError(f"tokenizer {path}: it has none of {list(EOS_NAMES)} to end a document; name "
                     "its own as eos_token in a tokenizer_config.json beside it")
  bos, pad = special("bos_token", BOS_NAMES), special("pad_token", PAD_NAMES)
  opens = bos is not None and model.encode("a").ids[:1] == [bos]
  names = {key: vocab[i] for key, i in (("bos_token", bos), ("eos_token", eos)) if i is not None}
  bos, pad = (eos if i is None else i for i in (bos, pad))
  for i in (bos, eos, pad):
    token_bytes[i] = b""
    specials.setdefault(vocab[i], Special(i))

  def encode_batch(texts: list[str]) -> list[list[int]]:
    return [e.ids for e in model.encode_batch_fast(texts, add_special_tokens=False)]

  return Tokenizer(
    encode_batch=encode_batch,
    encode_inner=inner and (lambda text: inner.encode(text, add_special_tokens=False).ids),
    token_bytes=token_bytes,
    bos_id=bos,
    eos_id=eos,
    pad_id=pad,
    sha256=sha256,
    specials=specials,
    names=names | beside.names,
    add_bos=opens if beside.add_bos is None else beside.add_bos,
  )


def _load_gguf(path: pathlib.Path) -> Tokenizer:
  fields, sha256 = read_fields(path), hashlib.sha256(path.read_bytes()).hexdigest()
  tokens, kinds = fields["tokens"], fields["token_type"]
  ids = {f"{name}_token": fields.get(f"{key}_token_id") for name, key in (
      ("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))}
  names = {key: tokens[i] for key, i in ids.items() if i is not None}
  specials = frozenset(t for t, kind in zip(tokens, kinds) if kind == CONTROL).union(names.values())
  beside = Beside(names, specials, {},
                  fields.get("add_bos_token", fields["model"] == "llama" or fields.get("pre") in WHOLE_WORDS))
  if fields["model"] == "llama":
    return _from_sentencepiece(path, to_sentencepiece(fields), sha256, beside)
  return _from_tokenizers(path, to_tokenizers(fields, path), None, {"type": "ByteLevel"}, sha256, beside)


def _huggingface_bytes(path, decoder: dict):
  """token string -> bytes, by what the file's decoder does."""
  kinds = [d["type"] for d in decoder.get("decoders", [decoder]) if "type" in d]
  if "ByteLevel" in kinds:
    table = _byte_level()

    def spelled(token):
      try:
        return bytes([table[c] for c in token])
      except KeyError:  # An added token, as it is.
        return token.encode()

    return spelled
  if "ByteFallback" in kinds or "Metaspace" in kinds:
    byte = re.compile(r"<0x([0-9A-F]{2})>")
    return lambda token: (bytes([int(m[1], 16)]) if (m := byte.fullmatch(token))
                          else token.replace(SPACE, " ").encode())
  raise ValueError(f"tokenizer {path}: its decoder is {kinds or None}; ByteLevel, ByteFallback and "
                   "Metaspace are known to give back the text that was encoded")


def _byte_level() -> dict[str, int]:
  """GPT-2's printable character for each byte, inverted."""
  visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [b for b in range(256) if b not in visible]
  return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


TOKENIZER = {"sentencepiece": _load_sentencepiece, "huggingface": _load_huggingface, "gguf": _load_gguf}


def train_tokenizer(
  texts: collections.abc.Iterable[str],
  cfg: TokenizerConfig,
  out_path: str | os.PathLike,
  total_bytes: int | None = None,
) -> Tokenizer:
  """Trains SentencePiece so that decode(encode(x)) == x: byte fallback, nothing normalised.

  The same texts and config give the same file, whatever the machine.

  Args:
    texts: documents.
    total_bytes: of all texts, to read cfg.train_bytes evenly from them; None reads all.
    out_path: the model file; written whole or not at all.

  Raises:
    ValueError: the vocabulary is too large or too small for the text.
  """
  share = 1.0 if not total_bytes else min(1.0, cfg.train_bytes / total_bytes)
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_blocks(texts, share),
      model_writer=model,
      model_type=cfg.model,
      vocab_size=cfg.vocab_size,
      pad_id=PAD_ID,
      bos_id=BOS_ID,
      eos_id=EOS_ID,
      unk_id=UNK_ID,
      byte_fallback=True,
      split_digits=True,
      allow_whitespace_only_pieces=True,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      character_coverage=0.9999,
      max_sentence_length=1 << 20,
      num_threads=1,  # It is written into the file, and the pieces must not depend on the machine.
      minloglevel=2,
    )
  except RuntimeError as error:
    limit = re.search(r"<= (\d+)|\d+ vs (\d+)", str(error))
    nearest = f"; nearest valid: {limit[1] or limit[2]}" if limit else ""
    raise ValueError(f"data.tokenizer.vocab_size={cfg.vocab_size} does not suit the text{nearest} "
                     f"(SentencePiece: {str(error).strip()})") from None
  with replacing(pathlib.Path(out_path)) as part:
    part.write_bytes(model.getvalue())
  return load_tokenizer(out_path)


def _blocks(texts, share: float):
  """Blocks of whole lines holding `share` of each text's characters, spread over it.

  NUL is left out: SentencePiece would drop the block, and byte fallback covers it.
  """
  credit = 0.0
  for text in texts:
    block, size = [], 0
    for line in text.replace("\0", "").splitlines(keepends=True) + [None]:
      for at in range(0, len(line or ""), BLOCK_CHARS):  # A very long line is cut.
        block.append(line[at:at + BLOCK_CHARS])
        size += len(block[-1])
      if block and (line is None or size >= BLOCK_CHARS):
        credit += size * share
        if credit >= size / 2:
          credit -= size
          yield "".join(block)
        block, size = [], 0

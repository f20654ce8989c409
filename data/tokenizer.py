"""Text <-> token ids: SentencePiece models and Hugging Face tokenizer.json files as one class.

Every tokenizer is reduced to a table of the bytes that each id stands for. Decoding is joining
them, so the length of a token in bytes (for bits per byte) and streaming (never half a character)
come from the same table.
"""
import codecs
import collections.abc
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

# The ids of the special pieces of a tokenizer trained here.
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3

# Names that published tokenizer.json files give their special tokens, where no
# tokenizer_config.json says it.
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>")
EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>")
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
    prefix_space: bool = False,
  ):
    self.encode_batch = encode_batch
    self.token_bytes = token_bytes
    self.n_bytes_V = np.array([len(b) for b in token_bytes], np.int32)
    self.vocab_size = len(token_bytes)
    self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
    self.sha256 = sha256
    # Llama 2 puts one space before every text: decoding takes it away.
    self._prefix_space = prefix_space

  def encode(self, text: str) -> list[int]:
    """The ids of the text alone, without special ones, even where the text spells one."""
    return self.encode_batch([text])[0]

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
  """Reads a vocabulary; without a kind, a name that ends in .json is Hugging Face's.

  Raises:
    ValueError: the file is missing, is neither, or cannot give back the text that it encoded.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"tokenizer {path}: no such file")
  kind = kind or ("huggingface" if path.suffix == ".json" else "sentencepiece")
  return TOKENIZER[kind](path)


def _load_sentencepiece(path: pathlib.Path) -> Tokenizer:
  raw = path.read_bytes()
  try:
    model = sentencepiece.SentencePieceProcessor(model_proto=raw)
  except RuntimeError as error:
    raise ValueError(f"tokenizer {path} is no SentencePiece model: {error}") from None
  token_bytes = []
  for i in range(model.vocab_size()):
    piece = model.id_to_piece(i)
    if model.is_byte(i):
      token_bytes.append(bytes([int(piece[1:-1], 16)]))
    elif model.is_control(i) or model.is_unknown(i):
      token_bytes.append(b"")
    else:
      token_bytes.append(piece.replace(SPACE, " ").encode())
  fallback = [model.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
  has_fallback = all(map(model.is_byte, fallback))

  def encode_batch(texts: list[str]) -> list[list[int]]:
    # SentencePiece writes spaces as U+2581, so a real U+2581 would come back as a space: spell it
    # in bytes.
    if not has_fallback or not any(SPACE in text for text in texts):
      return model.encode(texts, num_threads=1)  # prepare has a process for each core.
    batch = []
    for text in texts:
      first, *rest = model.encode(text.split(SPACE), num_threads=1)
      batch.append(first + [i for part in rest for i in (*fallback, *part)])
    return batch

  bos, eos, pad = model.bos_id(), model.eos_id(), model.pad_id()
  if eos < 0:
    raise ValueError(f"tokenizer {path} has no end-of-sentence piece: documents need one")
  prefix_space = token_bytes[model.encode("a")[0]].startswith(b" ")
  return Tokenizer(
    encode_batch=encode_batch,
    token_bytes=token_bytes,
    bos_id=bos if bos >= 0 else eos,
    eos_id=eos,
    pad_id=pad if pad >= 0 else eos,
    sha256=hashlib.sha256(raw).hexdigest(),
    prefix_space=prefix_space,
  )


def _load_huggingface(path: pathlib.Path) -> Tokenizer:
  raw = path.read_bytes()
  try:
    model = tokenizers.Tokenizer.from_str(raw.decode())
    spec = json.loads(raw)
  except Exception as error:  # The library raises a bare Exception; what it says names the fault.
    raise ValueError(f"tokenizer {path} is no tokenizer.json: {error}") from None
  model.encode_special_tokens = True  # "<eos>" written in a text is text.
  model.no_truncation()
  model.no_padding()
  to_bytes = _huggingface_bytes(path, spec.get("decoder") or {})
  added = model.get_added_tokens_decoder()
  token_bytes = []
  for i in range(model.get_vocab_size()):
    if i in added:
      token_bytes.append(b"" if added[i].special else added[i].content.encode())
    else:
      token_bytes.append(to_bytes(model.id_to_token(i) or ""))
  named = path.with_name("tokenizer_config.json")
  named = json.loads(named.read_text()) if named.is_file() else {}

  def special(key, names):
    token = named.get(key)
    token = token["content"] if isinstance(token, dict) else token
    ids = [model.token_to_id(name) for name in ([token] if token else names)]
    return next((i for i in ids if i is not None), None)

  eos = special("eos_token", EOS_NAMES)
  if eos is None:
    raise ValueError(f"tokenizer {path}: it has none of {list(EOS_NAMES)} to end a document; name "
                     "its own as eos_token in a tokenizer_config.json beside it")
  bos, pad = special("bos_token", BOS_NAMES), special("pad_token", PAD_NAMES)
  bos, pad = (eos if i is None else i for i in (bos, pad))
  for i in (bos, eos, pad):
    token_bytes[i] = b""

  def encode_batch(texts: list[str]) -> list[list[int]]:
    return [e.ids for e in model.encode_batch_fast(texts, add_special_tokens=False)]

  return Tokenizer(
    encode_batch=encode_batch,
    token_bytes=token_bytes,
    bos_id=bos,
    eos_id=eos,
    pad_id=pad,
    sha256=hashlib.sha256(raw).hexdigest(),
    prefix_space="Strip" in json.dumps(spec.get("decoder")),
  )


def _huggingface_bytes(path, decoder: dict):
  """token string -> bytes, by what the file's decoder does."""
  kinds = [d["type"] for d in decoder.get("decoders", [decoder]) if "type" in d]
  if "ByteLevel" in kinds:
    table = _byte_level()
    return lambda token: (
      bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
    )
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


TOKENIZER = {"sentencepiece": _load_sentencepiece, "huggingface": _load_huggingface}


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

"""The vocabulary inside a GGUF file -> a tokenizer of the library that the model was made with.

Importing writes the file's `tokenizer.*` fields to tokenizer_gguf.json; what they mean is in llama.cpp's
docs/gguf.md. Byte-level BPE ("gpt2") becomes a `tokenizers.Tokenizer`, pieces with scores ("llama") become
the SentencePiece model that they were read from.
"""
import json
import pathlib
import struct

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type; SentencePiece's own numbers.
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
FIELDS = {  # name -> type of it, or of its items; those that are needed.
  "gpt2": {"tokens": str, "token_type": int, "merges": str},
  "llama": {"tokens": str, "token_type": int, "scores": float},
}


def _gpt2():
  return [pre_tokenizers.ByteLevel(add_prefix_space=False)]


def _digits():
  return [pre_tokenizers.Digits(individual_digits=True), *_gpt2()]


def _split(pattern):
  return lambda: [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


# tokenizer.ggml.pre -> how text is cut before merges.
PRE_TOKENIZER = {
  "gpt-2": _gpt2, "olmo": _gpt2, "phi-2": _gpt2,
  "smollm": _digits, "starcoder": _digits, "refact": _digits, "command-r": _digits,
  "llama-bpe": _split(LLAMA3_SPLIT), "llama3": _split(LLAMA3_SPLIT), "llama-v3": _split(LLAMA3_SPLIT),
  "dbrx": _split(LLAMA3_SPLIT),  # OLMo 2
  "qwen2": _split(QWEN2_SPLIT), "deepseek-r1-qwen": _split(QWEN2_SPLIT), "stablelm2": _split(QWEN2_SPLIT),
}
NFC = ("qwen2", "deepseek-r1-qwen")
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")  # A word that is a token needs no merges.


def read_fields(path: pathlib.Path) -> dict:
  """The fields without their prefix: model, pre, tokens, ...

  Raises:
    ValueError: one is missing, of another type or of another length than the tokens.
  """
  try:
    raw = json.loads(path.read_text(encoding="utf-8"))
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in raw.items()}
  except (ValueError, AttributeError) as e:
    raise ValueError(f"tokenizer {path} is no tokenizer_gguf.json: {e}") from None
  model = fields.get("model")
  if model not in FIELDS:
    raise ValueError(f"tokenizer {path} is no tokenizer_gguf.json that is known here: "
                     f"tokenizer.ggml.model={model!r}; known: {', '.join(FIELDS)}")
  for name, of in FIELDS[model].items():
    value, allowed = fields.get(name), (int, float) if of is float else of
    if not isinstance(value, list) or not all(isinstance(v, allowed) for v in value):
      raise ValueError(f"tokenizer {path}: tokenizer.ggml.{name} must be a list of {of.__name__}")
    if name != "merges" and len(value) != len(fields["tokens"]):
      raise ValueError(f"tokenizer {path}: {len(value)} tokenizer.ggml.{name} for "
                       f"{len(fields['tokens'])} tokens")
  for name in ("bos", "eos", "padding", "unknown"):
    i = fields.get(f"{name}_token_id")
    if i is not None and not (isinstance(i, int) and 0 <= i < len(fields["tokens"])):
      raise ValueError(f"tokenizer {path}: tokenizer.ggml.{name}_token_id={i!r} is none of its "
                       f"{len(fields['tokens'])} tokens")
  return fields


def to_tokenizers(fields: dict, path) -> tokenizers.Tokenizer:
  """Byte-level BPE, as a tokenizer.json of the model holds it."""
  pre = fields.get("pre", "gpt-2")
  if pre not in PRE_TOKENIZER:
    raise ValueError(f"tokenizer {path}: tokenizer.ggml.pre={pre!r} is not known; known: "
                     f"{', '.join(PRE_TOKENIZER)}")
  vocab = {token: i for i, token in enumerate(fields["tokens"])}
  if len(vocab) < len(fields["tokens"]):
    raise ValueError(f"tokenizer {path}: {len(fields['tokens']) - len(vocab)} of its tokens occur twice")
  merges = [tuple(merge.split(" ", 1)) for merge in fields["merges"]]
  try:
    model = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in WHOLE_WORDS))
  except Exception as e:  # The library raises a bare Exception.
    raise ValueError(f"tokenizer {path}: tokenizer.ggml.merges: {e}") from None
  if pre in NFC:
    model.normalizer = normalizers.NFC()
  model.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZER[pre]())
  model.decoder = decoders.ByteLevel()
  for kind, special in ((CONTROL, True), (UNKNOWN, True), (USER_DEFINED, False)):
    model.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)
                      for token, t in zip(fields["tokens"], fields["token_type"]) if t == kind])
  return model


def to_sentencepiece(fields: dict) -> bytes:
  """A SentencePiece BPE model of the same pieces (sentencepiece_model.proto of google/sentencepiece)."""
  pieces = b"".join(  # Gemma's runs of spaces are spaces in the file.
      _message(1, _message(1, token.replace(" ", "\u2581").encode()) + _key(2, 5) + struct.pack("<f", score)
               + _number(3, kind))
      for token, score, kind in zip(fields["tokens"], fields["scores"], fields["token_type"]))
  trainer = _number(3, 2) + _number(4, len(fields["tokens"]))  # BPE
  trainer += _number(35, int(fields["token_type"].count(BYTE) == 256))  # byte_fallback
  for field, name, piece in ((45, "unknown", "<unk>"), (46, "bos", "<s>"), (47, "eos", "</s>"),
                             (48, "padding", "<pad>")):
    i = fields.get(f"{name}_token_id")
    trainer += _message(field, (piece if i is None else fields["tokens"][i]).encode())
  normalizer = _message(1, b"identity") + _number(3, int(fields.get("add_space_prefix", True)))
  normalizer += _number(4, int(fields.get("remove_extra_whitespaces", False))) + _number(5, 1)
  return pieces + _message(2, trainer) + _message(3, normalizer)


def _varint(n: int) -> bytes:
  out = b""
  while n > 127:
    out, n = out + bytes([n & 127 | 128]), n >> 7
  return out + bytes([n])


def _key(field, wire):
  return _varint(field << 3 | wire)


def _number(field, value):
  return _key(field, 0) + _varint(value)


def _message(field, raw):
  return _key(field, 2) + _varint(len(raw)) + raw


# Behind a model, where a later field replaces an earlier one: normalizer_spec.add_dummy_prefix is false.
NO_PREFIX = _message(3, _number(3, 0))

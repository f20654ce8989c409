import hashlib
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers

from data.config import TokenizerConfig
from data.sources import make_text
from data.tokenizer import load_tokenizer, train_tokenizer

TEXTS = [make_text(i) for i in range(300)]
ALL_PLANES = st.text(
  st.one_of(
    st.characters(exclude_categories=["Cs"]),  # Surrogates are no text.
    st.sampled_from("\u2581 \n\t\r\0\u2028\ufeff\ufffd"),
    st.integers(1, 16).map(lambda plane: chr(plane << 16 | 0x1234)),
  ),
  max_size=60,
)
AWKWARD = [
  "",
  " ",
  "  a  \n\n\tb ",
  "\u2581",
  "\u2581 \u2581a",
  "a\0b",
  "<s></s><unk><0x41>",
  "\r\n\x85\u2028",
  "\ufeffx",
  "e\u0301 \u00e9",
  "x" * 5000,
  "\U0010ffff\U0001f600",
]


@pytest.fixture(scope="module", params=["bpe", "unigram", "byte_level", "byte_fallback"])
def tokenizer(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  if request.param in ("bpe", "unigram"):
    return train_tokenizer(
      TEXTS, TokenizerConfig(model=request.param, vocab_size=360), folder / "t.model"
    )
  path = folder / "tokenizer.json"
  (_byte_level if request.param == "byte_level" else _byte_fallback)().save(str(path))
  return load_tokenizer(path)


def _byte_level():
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  model.train_from_iterator(
    TEXTS,
    tokenizers.trainers.BpeTrainer(
      vocab_size=512,
      initial_alphabet=alphabet,
      special_tokens=["<|endoftext|>"],
      show_progress=False,
    ),
  )
  return model


def _byte_fallback():
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "a", "b", "\u2581", "ab"]
  model = tokenizers.Tokenizer(tokenizers.models.BPE(
    {p: i for i, p in enumerate(pieces)}, [("a", "b")], unk_token="<unk>", byte_fallback=True))
  model.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
  model.decoder = tokenizers.decoders.Sequence([
    tokenizers.decoders.Replace("\u2581", " "),
    tokenizers.decoders.ByteFallback(),
    tokenizers.decoders.Fuse(),
  ])
  model.add_special_tokens(["<unk>", "<s>", "</s>"])
  return model


def check_round_trip(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.n_bytes_V[np.array(ids, int)].sum() == len(text.encode())
  stream = tokenizer.stream()
  deltas = [stream.push(i) for i in ids]
  assert "".join(deltas) == text and stream.finish() == ""


@hypothesis.given(text=ALL_PLANES)
@hypothesis.settings(max_examples=150, deadline=None)
def test_round_trip_on_all_unicode_planes(tokenizer, text):
  if "\u2581" in text and tokenizer.token_bytes[-1] == b"ab":
    # Llama-style tokenizer.json files cannot tell U+2581 from a space.
    text = text.replace("\u2581", "")
  check_round_trip(tokenizer, text)


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_of_awkward_text(tokenizer, text):
  if not (tokenizer.token_bytes[-1] == b"ab" and "\u2581" in text):
    check_round_trip(tokenizer, text)


def test_text_that_spells_a_special_token_is_text(tokenizer):
  ids = tokenizer.encode("</s><s><|endoftext|>")
  assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)


def test_batches_are_single_texts(tokenizer):
  texts = TEXTS[:5] + ["\u2581 x"]
  assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_stream_waits_for_whole_characters(tokenizer):
  ids = tokenizer.encode("\U0001f600")
  stream = tokenizer.stream()
  assert len(ids) == 4 and [stream.push(i) for i in ids] == ["", "", "", "\U0001f600"]
  stream.push(ids[0])
  assert stream.finish() == "\ufffd"


def test_special_and_foreign_ids(tokenizer):
  assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.eos_id]) == "hi"
  with pytest.raises(ValueError, match=f"{tokenizer.vocab_size}.*outside"):
    tokenizer.decode([tokenizer.vocab_size])


def test_same_ids_as_the_library(tmp_path):
  model = _byte_level()
  model.save(str(tmp_path / "tokenizer.json"))
  tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
  for text in TEXTS[:50]:
    assert tokenizer.encode(text) == model.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == model.decode(model.encode(text).ids)
  assert tokenizer.bos_id == tokenizer.eos_id == model.token_to_id("<|endoftext|>")


def test_tokenizer_config_names_the_special_tokens(tmp_path):
  model = _byte_fallback()
  model.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
  assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == model.token_to_id("<s>")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic(tmp_path, kind):
  cfg = TokenizerConfig(model=kind, vocab_size=360, train_bytes=40_000)
  total = sum(len(text.encode()) for text in TEXTS)
  hashes = {
    train_tokenizer(iter(TEXTS), cfg, tmp_path / f"{i}.model", total).sha256 for i in range(2)
  }
  assert hashes == {hashlib.sha256((tmp_path / "0.model").read_bytes()).hexdigest()}


def test_training_reads_evenly_up_to_its_budget(tmp_path):
  from data.tokenizer import _blocks
  texts = ["".join(f"{name} {i}\n" for i in range(5000)) for name in "abcdefgh"]
  taken = list(_blocks(texts, 0.25))
  shares = [
    sum(len(block) for block in taken if block[0] == name) / len(text)
    for name, text in zip("abcdefgh", texts)
  ]
  assert 0.24 < sum(map(len, taken)) / sum(map(len, texts)) < 0.26
  assert min(shares) > 0.15 and max(shares) < 0.35
  assert "".join(_blocks(texts, 1.0)) == "".join(texts)


def test_layout_is_learned(tmp_path):
  """Line ends and indentation become pieces: half of what source code is made of."""
  tokenizer = train_tokenizer(["def f(x):\n        return x\n\n\n" * 200, *TEXTS],
                              TokenizerConfig(vocab_size=512), tmp_path / "t.model")
  assert len(tokenizer.encode("        ")) == 1
  assert any(b.endswith(b":\n") for b in tokenizer.token_bytes)


@pytest.mark.parametrize(
  "size, nearest", [(100_000, "nearest valid: 6.."), (20, "nearest valid: 31.")]
)
def test_a_vocabulary_that_does_not_suit_the_text_is_refused(tmp_path, size, nearest):
  with pytest.raises(ValueError, match=f"vocab_size={size} .*{nearest}"):
    train_tokenizer(TEXTS, TokenizerConfig(vocab_size=size), tmp_path / "t.model")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["t.model", "tokenizer.json"])
def test_other_files_are_refused_by_name(tmp_path, name):
  with pytest.raises(ValueError, match=f"{name}: no such file"):
    load_tokenizer(tmp_path / name)
  (tmp_path / name).write_text("something else")
  with pytest.raises(ValueError, match=f"{name} is no "):
    load_tokenizer(tmp_path / name)

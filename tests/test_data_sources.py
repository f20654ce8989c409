import functools
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python import array_record_module

from data import sources
from data.config import SourceConfig

TEXTS = [sources.make_text(i) for i in range(40)]


def documents(**fields):
  cfg = SourceConfig(**fields)
  return [d for part in sources.plan(cfg) for d in sources.read(cfg, part)]


def write_lines(path, lines):
  open_ = {".gz": gzip.open, ".zst": zstandard.open}.get(path.suffix, open)
  with open_(path, "wb") as file:
    file.write(b"".join(lines))


@functools.cache  # The library keeps builders by name, and takes each name once.
def tfds_builder():
  import tensorflow_datasets as tfds

  class Stories(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = tfds.features.FeaturesDict({
        "body": tfds.features.Text(),
        "title": tfds.features.Text(),
      })
      return self.dataset_info_from_configs(features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
      return {"train": ((i, {"body": text, "title": "no"}) for i, text in enumerate(TEXTS))}

    def _generate_examples(self):
      raise NotImplementedError

  return Stories


def write_tfds(folder):
  builder = tfds_builder()(data_dir=folder, file_format="array_record")
  builder.download_and_prepare()
  return str(builder.data_dir)


def write(kind, folder, texts):
  """A source of the kind that holds the texts in order: its config's fields."""
  lines = [json.dumps({"body": text}).encode() + b"\n" for text in texts]
  if kind == "text":
    for i, text in enumerate(texts):
      (folder / f"{i:04d}.txt").write_bytes(text.encode())
    return {"kind": "text", "path": f"{folder}/*.txt"}
  if kind.startswith("jsonl"):
    write_lines(folder / f"x.{kind}", lines)
    return {"kind": "jsonl", "path": str(folder / f"x.{kind}"), "text_key": "body"}
  if kind == "parquet":
    pyarrow.parquet.write_table(
      pyarrow.table({"n": range(len(texts)), "body": texts}),
      folder / "x.parquet",
      row_group_size=15,
    )
    return {"kind": "parquet", "path": str(folder / "x.parquet"), "text_key": "body"}
  if kind == "tfds":
    return {"kind": "tfds", "path": write_tfds(folder), "text_key": "body"}
  writer = array_record_module.ArrayRecordWriter(str(folder / "x.array_record"), "group_size:1")
  for text in texts:
    writer.write(text.encode())
  writer.close()
  return {"kind": "array_record", "path": str(folder / "x.array_record")}


KINDS = ["text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "tfds", "array_record"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part_bytes", [500, 1 << 24])
def test_every_kind_gives_the_texts_in_order(tmp_path, monkeypatch, kind, part_bytes):
  monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
  found = documents(**write(kind, tmp_path, TEXTS))
  assert [d.text for d in found] == TEXTS
  assert len({d.key for d in found}) == len(TEXTS)
  if kind in ("jsonl", "array_record", "tfds"):
    assert (len(sources.plan(SourceConfig(**write(kind, tmp_path, TEXTS)))) > 1) == (
      part_bytes == 500
    )


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_jsonl_key_is_where_the_line_is(tmp_path, suffix):
  fields = write(suffix, tmp_path, TEXTS)
  raw = b"".join(json.dumps({"body": text}).encode() + b"\n" for text in TEXTS)
  for document in documents(**fields):
    at = int(document.key.rpartition("@")[2])
    assert json.loads(raw[at:].partition(b"\n")[0])["body"] == document.text


def test_a_jsonl_file_may_be_cut_anywhere(tmp_path, monkeypatch):
  """Also where a line begins: it is read by one part, and no part reads half a line."""
  texts = [str(i) * (i % 5 + 1) for i in range(30)]
  write_lines(tmp_path / "x.jsonl", [json.dumps({"text": t}).encode() + b"\n" for t in texts])
  for part_bytes in range(1, 50):
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    assert [d.text for d in documents(kind="jsonl", path=f"{tmp_path}/x.jsonl")] == texts


def test_what_is_dropped_is_named(tmp_path):
  lines = [
    b'{"text": "good"}\n',
    b"\n",
    b'{"text": ""}\n',
    b'{"text": 3}\n',
    b'{"txt": "x"}\n',
    b'{"text": null}\n',
    b"[1]\n",
    b'{"text": "cut\n',
    b'{"text": "\xff"}\n',
    b'{"text": "\\ud800"}\n',
    b'{"text": "last"}',
  ]
  write_lines(tmp_path / "x.jsonl", lines)
  found = documents(kind="jsonl", path=str(tmp_path / "x.jsonl"))
  assert [d.text or d.reason for d in found] == [
    "good", "empty", "not_text", *["missing_field"] * 3, "bad_json", "not_utf8", "not_utf8", "last"]
  (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
  (tmp_path / "b.txt").write_bytes(b"")
  assert [d.reason for d in documents(path=f"{tmp_path}/*.txt")] == ["not_utf8", "empty"]


def test_globs(tmp_path, capsys):
  (tmp_path / "sub" / "sub").mkdir(parents=True)
  for name in ("b.py", "sub/a.py", "sub/sub/c.py", "sub/n.txt"):
    (tmp_path / name).write_text(name)
  found = documents(path=f"{tmp_path}/**/*.py, {tmp_path}/sub/*")
  assert [d.text for d in found] == ["b.py", "sub/a.py", "sub/n.txt", "sub/sub/c.py"]
  assert len(documents(path=f"{tmp_path}/*.py,{tmp_path}/*.rst")) == 1
  assert f"WARNING: data.sources: text: no file matches {tmp_path}/*.rst" in capsys.readouterr().err
  with pytest.raises(ValueError, match=r"text: no file matches '.*\.rst, .*\.rs'"):
    documents(path=f"{tmp_path}/*.rst, {tmp_path}/*.rs")


def test_the_standard_library_is_found_without_installed_packages():
  keys = [
    sources._address(path) for path in sources.find_files(SourceConfig(path="{stdlib}/**/*.py"))
  ]
  assert "{stdlib}/asyncio/base_events.py" in keys and len(keys) > 500
  assert not [key for key in keys if "site-packages" in key or not key.startswith("{stdlib}/")]


def test_what_pip_installed_is_found_and_addressed_alike(monkeypatch, tmp_path):
  for folder in (tmp_path / "lib", tmp_path / "lib/site-packages"):  # No venv: one in the other.
    (folder / "jax/tests").mkdir(parents=True)
    for name in ("jax/a.py", "jax/tests/b.py"):
      (folder / name).write_text("x")
  monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {
    "stdlib": str(tmp_path / "lib"), "purelib": str(tmp_path / "lib/site-packages")})
  found = sources.find_files(SourceConfig(path="{stdlib}/jax/*.py,{site}/jax/**/*.py,!{site}/**/test*/**"))
  assert [sources._address(path) for path in found] == ["{stdlib}/jax/a.py", "{site}/jax/a.py"]


def test_synthetic_text_is_pinned():
  found = documents(kind="synthetic", documents=25_000)
  assert found[1].key == "synthetic#1"
  assert found[1].text.startswith("A story of Dan, number 1.\n\nDan draws a chair in the river. ")
  assert found[24_999].text == sources.make_text(24_999)


def test_wrong_names_are_refused_with_the_right_ones(tmp_path):
  fields = write("parquet", tmp_path, TEXTS) | {"text_key": "txt"}
  with pytest.raises(
    ValueError, match=r"'txt' is no column of .*x.parquet, which has \['n', 'body'\]"
  ):
    documents(**fields)
  fields = write("tfds", tmp_path, TEXTS)
  with pytest.raises(
    ValueError, match=r"text_key 'text' is not one of the features \['body', 'title'\]"
  ):
    documents(**fields | {"text_key": "text"})
  with pytest.raises(ValueError, match=r"split 'test' is not one of \['train'\]"):
    documents(**fields | {"split": "test"})
  with pytest.raises(ValueError, match="kind 'csv' is not one of .*jsonl"):
    documents(kind="csv", path="x")


def test_an_exclamation_mark_takes_files_out(tmp_path):
  for name in ("a.py", "test/b.py", "sub/test_c/d.py", "sub/e.py"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x")
  cfg = SourceConfig(path=f"{tmp_path}/**/*.py,!{tmp_path}/**/test*/**")
  assert [p.removeprefix(f"{tmp_path}/") for p in sources.find_files(cfg)] == ["a.py", "sub/e.py"]

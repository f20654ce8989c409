import collections
import contextlib
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from data import prepare as prepare_lib
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.prepare import documents, prepare
from data.sources import make_text
from data.tokenise import is_validation
from data.tokenizer import train_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
TEXTS = [make_text(i) for i in range(120)]
silent = lambda line: None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """120 text files and a tokenizer."""
  folder = tmp_path_factory.mktemp("texts")
  for i, text in enumerate(TEXTS):
    (folder / f"{i:03d}.txt").write_text(text)
  train_tokenizer(TEXTS, TokenizerConfig(vocab_size=400), folder / "tokenizer.model")
  return folder


def config(folder, cache, **fields):
  folder = pathlib.Path(folder)
  return DataConfig(
    sources=[SourceConfig(path=f"{folder}/*.txt")],
    cache_path=str(cache),
    val_fraction=0.2,
    tokenizer=TokenizerConfig(path=str(folder / "tokenizer.model")),
    **fields,
  ).validate()


@pytest.fixture
def small_units(monkeypatch):
  monkeypatch.setattr(prepare_lib, "UNIT_BYTES", (5000, 5000))


def test_every_document_comes_back(folder, tmp_path):
  prepared = prepare(config(folder, tmp_path), log=silent)
  found = {split: [text for _, _, text in documents(prepared, split)] for split in ("train", "val")}
  assert collections.Counter(found["train"] + found["val"]) == collections.Counter(TEXTS)
  assert (
    found["val"] == [text for text in TEXTS if is_validation(text, 0.2)]
    and 10 < len(found["val"]) < 40
  )
  for split, texts in found.items():
    assert prepared.count(split, "documents") == len(texts)
    assert prepared.count(split, "bytes") == sum(len(text.encode()) for text in texts)
    assert prepared.count(split, "tokens") == sum(
      len(prepared.tokenizer.encode(text)) + 2 for text in texts
    )
    assert prepared.sources[0].lengths(split).sum() == prepared.count(split, "tokens")
  record = prepared.sources[0].read("train", 3)
  assert (
    record.tokens[0] == prepared.tokenizer.bos_id and record.tokens[-1] == prepared.tokenizer.eos_id
  )
  assert record.key.startswith(str(folder)) and record.n_bytes == len(
    pathlib.Path(record.key).read_bytes()
  )


def test_read_is_kept_and_dropped(tmp_path):
  lines = [json.dumps({"text": text}) for text in TEXTS] + [
    '{"text": ""}',
    "{",
    '{"other": 1}',
    '{"text": ""}',
  ]
  (tmp_path / "x.jsonl").write_text("\n".join(lines))
  cfg = DataConfig(
    sources=[SourceConfig(kind="jsonl", path=str(tmp_path / "x.jsonl"))],
    cache_path=str(tmp_path / "c"),
    tokenizer=TokenizerConfig(vocab_size=380),
  )
  manifest = prepare(cfg, log=silent).sources[0].manifest
  assert (manifest["read"], manifest["kept"]) == (124, 120)
  assert manifest["dropped"] == {"bad_json": 1, "empty": 2, "missing_field": 1}


def test_nothing_usable_is_refused(tmp_path):
  (tmp_path / "x.jsonl").write_text('{"body": "x"}\n' * 3)
  cfg = DataConfig(
    sources=[SourceConfig(kind="jsonl", path=str(tmp_path / "x.jsonl"))],
    cache_path=str(tmp_path / "c"),
    tokenizer=TokenizerConfig(vocab_size=380),
  )
  with pytest.raises(ValueError, match=r"'text: missing_field': 3"):
    prepare(cfg, log=silent)


def test_copies_fall_on_one_side(tmp_path):
  for i, text in enumerate(TEXTS * 3):
    (tmp_path / f"{i}.txt").write_text(text)
  train_tokenizer(TEXTS, TokenizerConfig(vocab_size=400), tmp_path / "tokenizer.model")
  prepared = prepare(config(tmp_path, tmp_path / "c"), log=silent)
  train, val = ({text for _, _, text in documents(prepared, split)} for split in ("train", "val"))
  assert val and not train & val


def test_workers_and_cache_do_not_change_the_content(folder, tmp_path, small_units):
  one = prepare(config(folder, tmp_path / "1", workers=1), log=silent)
  two = prepare(config(folder, tmp_path / "2", workers=2), log=silent)
  assert len(one.sources[0].manifest["units"]) > 5
  assert one.content_hash == two.content_hash
  assert one.sources[0].manifest == two.sources[0].manifest  # With the hash of every file.
  lines = []
  assert prepare(config(folder, tmp_path / "1"), log=lines.append).content_hash == one.content_hash
  assert not lines  # It is only read.


def test_a_trained_tokenizer_is_kept_and_sees_no_validation_text(folder, tmp_path):
  cfg = config(folder, tmp_path)
  cfg.tokenizer = TokenizerConfig(vocab_size=380)
  first = prepare(cfg, log=silent)
  train_tokenizer(
    [t for t in TEXTS if not is_validation(t, 0.2)], cfg.tokenizer, tmp_path / "own.model"
  )
  assert pathlib.Path(first.tokenizer_path).read_bytes() == (tmp_path / "own.model").read_bytes()
  assert prepare(cfg, log=lambda line: pytest.fail(line)).tokenizer.sha256 == first.tokenizer.sha256


def test_what_determines_the_content_names_the_folder(tmp_path):
  files = tmp_path / "files"
  files.mkdir()
  for i, text in enumerate(TEXTS):
    (files / f"{i}.txt").write_text(text)
  train_tokenizer(TEXTS, TokenizerConfig(vocab_size=400), files / "tokenizer.model")
  folders = []

  def again(**fields):
    folders.append(prepare(config(files, tmp_path / "c", **fields), log=silent).sources[0].folder)

  again()
  again(packing="concat", prefetch=9)
  assert folders[0] == folders[1]
  os.utime(files / "3.txt", ns=(1, 1))
  again()
  (files / "new.txt").write_text("one more")
  again()
  train_tokenizer(TEXTS, TokenizerConfig(vocab_size=401), files / "tokenizer.model")
  again()
  assert len(set(folders)) == 4


def flip(path):
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(raw)


def lie(path):
  path.write_text(path.read_text().replace('"read": 120', '"read": 121'))


def other_tokenizer(path):
  """A manifest that is sound, but of another vocabulary."""
  manifest = json.loads(path.read_text())
  del manifest["sha256"]
  manifest["tokenizer_sha256"] = "0" * 64
  path.write_text(json.dumps({**manifest, "sha256": prepare_lib._hash(manifest)}))


@pytest.mark.parametrize(
  "name, damage, message",
  [
    ("00000.train.array_record", flip, "expected sha256 .*, found"),
    ("00000.train.lengths.npy", flip, "expected sha256 .*, found"),
    ("00000.val.array_record", pathlib.Path.unlink, "expected .* bytes, found no file"),
    (
      "00000.train.array_record",
      lambda path: os.truncate(path, 1000),
      "expected .* bytes, found 1000",
    ),
    ("manifest.json", flip, "damaged|expected sha256"),
    ("manifest.json", lie, "expected sha256"),
    ("manifest.json", other_tokenizer, "tokenizer_sha256: expected .*, found 0000"),
  ],
)
def test_a_damaged_cache_stops_the_run(folder, tmp_path, name, damage, message):
  path = prepare(config(folder, tmp_path), log=silent).sources[0].folder / name
  damage(path)
  with pytest.raises(ValueError, match=f"{name}.*({message}).*delete"):
    prepare(config(folder, tmp_path), log=silent)


def test_damage_is_found_when_a_record_is_read(folder, tmp_path):
  source = prepare(config(folder, tmp_path), log=silent).sources[0]
  path = source.folder / "00000.train.array_record"
  raw = path.read_bytes()
  at = raw.index(b"000.txt") + 40  # Within the ids of the first document.
  path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:])
  with pytest.raises(RuntimeError, match="00000.train.array_record|hash mismatch"):
    [source.read("train", i) for i in range(source.count("train", "documents"))]


@contextlib.contextmanager
def file_size_limit(n_bytes):
  """Writes past n_bytes of a file fail, as they do on a full disk."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit, workers", [(1, 1), (3000, 1), (30_000, 1), (30_000, 2)])
def test_a_failed_write_raises_and_leaves_nothing_that_validates(
  folder, tmp_path, small_units, limit, workers
):
  cfg = config(folder, tmp_path / "c", workers=workers)
  (tmp_path / "c").mkdir()
  error = "File too large" if workers == 1 else "unit 0 failed in its worker process"
  with file_size_limit(limit), pytest.raises((OSError, RuntimeError), match=error):
    prepare(cfg, log=silent)
  assert not list(tmp_path.glob("c/*/manifest.json")) and not list(tmp_path.glob("c/*/*.part"))
  whole = prepare(config(folder, tmp_path / "whole"), log=silent)
  assert prepare(cfg, log=silent).content_hash == whole.content_hash


def can_mount():
  command = ["unshare", "-m", "true"]
  return bool(shutil.which("unshare")) and subprocess.run(command).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="mounting a small tmpfs needs root")
def test_a_full_disk(folder, tmp_path):
  script = ("from data.prepare import *; from tests.test_data_prepare import *; import sys\n"
            "prepare(config(sys.argv[1], sys.argv[2]), log=print)")
  (tmp_path / "small").mkdir()
  run = subprocess.run(
    [
      "unshare",
      "-m",
      "sh",
      "-c",
      'mount -t tmpfs -o size=64k none "$1" && '
      '"$2" -c "$3" "$4" "$1"; code=$?; ls "$1"/*/; exit $code',
      "sh",
      str(tmp_path / "small"),
      sys.executable,
      script,
      str(folder),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert run.returncode == 1 and "No space left" in run.stderr, run.stderr
  assert (
    "spec.json" in run.stdout
    and "manifest.json" not in run.stdout
    and "00000.json" not in run.stdout
  )


SLOW = """
import sys, time
from data import prepare as lib
from tests.test_data_prepare import config
lib.UNIT_BYTES = (5000, 5000)
fast = lib.tokenise_unit
def slow(*args):
  time.sleep(0.05)
  return fast(*args)
lib.tokenise_unit = slow
lib.prepare(config(sys.argv[1], sys.argv[2], workers=1))
"""


def test_a_killed_run_goes_on_where_it_stopped(folder, tmp_path, small_units):
  run = subprocess.Popen(
    [sys.executable, "-c", SLOW, str(folder), str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL
  )
  while len(units := sorted(tmp_path.glob("*/0*.json"))) < 3 and run.poll() is None:
    time.sleep(0.01)
  run.send_signal(signal.SIGKILL)
  run.wait()
  assert not list(tmp_path.glob("*/manifest.json"))
  times = [unit.stat().st_mtime_ns for unit in units]
  prepared = prepare(config(folder, tmp_path), log=silent)
  assert [unit.stat().st_mtime_ns for unit in units] == times and len(
    prepared.sources[0].manifest["units"]
  ) > 3
  assert (
    prepared.content_hash == prepare(config(folder, tmp_path / "whole"), log=silent).content_hash
  )


def test_the_callers_main_module_does_not_run_again(folder, tmp_path):
  script = tmp_path / "script.py"
  script.write_text("import sys; print('main', flush=True)\n"
                    "from data import prepare as lib; lib.UNIT_BYTES = (5000, 5000)\n"
                    "from tests.test_data_prepare import config\n"
                    "cfg = config(sys.argv[1], sys.argv[2], workers=2)\n"
                    "print(lib.prepare(cfg, log=lambda line: None).content_hash)")
  run = subprocess.run(
    [sys.executable, script, str(folder), str(tmp_path / "c")],
    cwd=ROOT,
    text=True,
    check=True,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
  )
  assert run.stdout.splitlines()[0] == "main" and len(run.stdout.splitlines()) == 2


def test_the_command_prints_the_table_and_refuses(tmp_path, capsys):
  flags = [f"--config={ROOT / 'configs' / 'tiny.py'}", f"--config.data.cache_path={tmp_path}"]
  assert prepare_lib.main(flags) == 0
  table = capsys.readouterr().out
  for word in ("synthetic", "read", "kept", "dropped", "bytes/token", "400", str(tmp_path)):
    assert word in table
  assert prepare_lib.main([*flags, "--config.data.tokenizer.vocab_size=90000"]) == 2
  assert "nearest valid" in capsys.readouterr().err

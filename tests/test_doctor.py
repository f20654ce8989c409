"""The doctor's verdicts, each with its fault planted."""
import fcntl
import os
import subprocess
import sys
import time

import pytest

from train import doctor
from train.doctor import GB, Verdict

GOOD_PROBE = {"platform": "cpu", "kind": "cpu", "count": 8, "dtype": "float32", "error": 1e-5, "flops": 2e11}


def python(code):
  return [sys.executable, "-c", code]


def worst(verdicts):
  verdicts = verdicts if isinstance(verdicts, list) else [verdicts]
  verdict = max(verdicts, key=lambda v: ("OK", "WARN", "BAD").index(v.level))
  assert all(bool(v.remedy) == (v.level != "OK") for v in verdicts), verdicts
  assert all("\n" not in v.text + v.remedy for v in verdicts), verdicts
  return verdict


@pytest.mark.parametrize("version, level", [
  ((3, 10, 9), "BAD"), ((3, 11, 0), "OK"), ((3, 13, 5), "OK"), ((3, 14, 0), "WARN")])
def test_python(version, level):
  assert worst(doctor.check_python(version)).level == level


@pytest.mark.parametrize("requirements, level, words", [
  (["numpy>=2", "pytest; extra == 'test'"], "OK", ["numpy 2"]),
  (["numpy>=99"], "BAD", ["numpy 2", ">=99", 'pip install "numpy>=99"']),
  (["numpy>=2", "no-such-package>=1"], "BAD",
   ["no-such-package is missing", 'pip install "no-such-package>=1"']),
  (["no-such-package; extra == 'gpu'", "no-such-package; python_version < '3'"], "OK", []),
])
def test_packages_against_their_floors(requirements, level, words):
  verdict = worst(doctor.check_packages(requirements))
  assert verdict.level == level and all(w in str(verdict) for w in words), verdict


def test_packages_without_our_own_metadata(monkeypatch):
  monkeypatch.setattr(doctor, "PACKAGE", "not-installed-here")
  assert worst(doctor.check_packages()).level == "WARN"


def test_a_hung_runtime_is_reported_in_time():
  start = time.monotonic()
  verdict = worst(doctor.check_devices(0.5, python("import time; time.sleep(60)")))
  assert verdict.level == "BAD" and "no answer within 0.5 s" in verdict.text and time.monotonic() - start < 5


def test_a_runtime_that_fails_is_reported_by_its_last_line():
  verdict = worst(doctor.check_devices(30, python("raise RuntimeError('no TPU for you')")))
  assert (verdict.level, verdict.text) == ("BAD", "RuntimeError: no TPU for you")


def test_the_real_devices():
  devices, matmul = doctor.check_devices(120)
  assert devices.level == "OK" and matmul.level == "OK" and "TFLOP/s" in matmul.text, (devices, matmul)


@pytest.mark.parametrize("found, accelerator, platforms, level, words", [
  ({}, None, "", "OK", "8 x cpu"),
  ({}, "tpu", "", "WARN", 'pip install -e ".[tpu]"'),
  ({}, "tpu", "cpu", "OK", "8 x cpu"),
  ({"platform": "tpu", "kind": "TPU v4"}, "tpu", "", "OK", "8 x TPU v4"),
  ({"error": 0.5}, None, "", "BAD", "off by 0.5"),
  ({"error": float("nan")}, None, "", "BAD", "off by nan"),
])
def test_devices_and_what_they_compute(found, accelerator, platforms, level, words, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", platforms)
  verdicts = doctor._judge_devices({**GOOD_PROBE, **found}, accelerator)
  assert worst(verdicts).level == level and any(words in str(v) for v in verdicts), verdicts


def test_a_lock_names_its_holder_and_a_stale_one_its_remedy(tmp_path):
  lock = str(tmp_path / "libtpu_lockfile")
  assert worst(doctor.check_tpu_lock(lock)).level == "OK"
  hold = f"import time; f = open({lock!r}, 'w'); print(flush=True); time.sleep(60)"
  holder = subprocess.Popen(python(hold), stdout=subprocess.PIPE)
  holder.stdout.readline()
  verdict = worst(doctor.check_tpu_lock(lock))
  assert verdict.level == "BAD" and f"pid {holder.pid} (" in verdict.text
  assert f"kill {holder.pid}" in verdict.remedy
  holder.kill()
  holder.wait()
  os.utime(lock, (time.time() - 7200,) * 2)
  verdict = worst(doctor.check_tpu_lock(lock))
  assert verdict.level == "BAD" and "120 minutes old and no process holds it" in verdict.text
  assert verdict.remedy.startswith(f"rm -f {lock}") and os.path.exists(lock)


def test_a_lock_with_the_number_of_a_process(tmp_path, monkeypatch, capsys):
  """Exit 3 and its number once it is gone; held, whatever the kernel says, as long as it lives."""
  lock = tmp_path / "libtpu_lockfile"
  writer = subprocess.Popen(python("import time; time.sleep(60)"))
  lock.write_text(f"{writer.pid}\n")
  os.utime(lock, (time.time() - 180,) * 2)
  monkeypatch.setattr(doctor, "diagnose", lambda *_: [
      Verdict("BAD", "disk", "full", "free some"), doctor.check_tpu_lock(str(lock))])
  assert doctor.main([]) == 1
  assert f"the TPU is held by pid {writer.pid} (" in capsys.readouterr().out
  writer.kill()
  writer.wait()
  assert doctor.main([]) == doctor.STALE == 3
  said = capsys.readouterr().out
  assert f"pid {writer.pid}, which is gone, left it: {lock} is 3 minutes old" in said
  assert f"remedy: rm -f {lock}" in said and lock.exists()


def test_a_lock_of_a_process_that_cannot_be_looked_into_is_held_all_the_same(tmp_path, monkeypatch):
  monkeypatch.setattr(doctor, "_has_open", lambda *_: False)  # As for another user's process.
  lock = tmp_path / "lock"
  with open(lock, "w") as f:
    fcntl.flock(f, fcntl.LOCK_EX)
    assert f"pid {os.getpid()} " in worst(doctor.check_tpu_lock(str(lock))).text
  assert "no process holds it" in worst(doctor.check_tpu_lock(str(lock))).text


@pytest.mark.parametrize("usage, inodes, level, words", [
  ((100 * GB, 50 * GB), (1000, 0), "BAD", "0 inodes free"),
  ((100 * GB, 50 * GB), (0, 0), "OK", "50.0 GB free"),
  ((100 * GB, 0.5 * GB), (1e6, 1e6), "BAD", "0.5 GB free"),
  ((100 * GB, 5 * GB), (1e6, 1e6), "WARN", "5.0 GB free"),
  ((100 * GB, 50 * GB), (1e6, 1e6), "OK", "50.0 GB free of 100"),
])
def test_disk(usage, inodes, level, words, tmp_path):
  verdict = worst(doctor.check_disk("disk", tmp_path / "not" / "there", usage, inodes))
  assert verdict.level == level and words in verdict.text and str(tmp_path) in verdict.text


def test_disk_of_this_machine(tmp_path):
  assert "GB free" in worst(doctor.check_disk("disk", tmp_path)).text


def test_permission(tmp_path, monkeypatch):
  assert worst(doctor.check_writable(tmp_path / "new" / "run")).level == "OK"
  assert not list(tmp_path.iterdir())
  verdict = worst(doctor.check_writable("/proc/run"))  # Nobody can write there, not even root.
  assert verdict.level == "BAD" and "/proc cannot be written" in verdict.text


@pytest.mark.parametrize("available, level", [(0.5 * GB, "BAD"), (3 * GB, "WARN"), (16 * GB, "OK")])
def test_memory(available, level):
  assert worst(doctor.check_memory(available)).level == level


def test_memory_of_this_machine_is_within_what_it_has():
  assert 0 < doctor._available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_compile_cache(tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  (tmp_path / "entry").write_bytes(b"x" * 10_000_000)
  assert worst(doctor.check_compile_cache(tmp_path)).text == f"{tmp_path}: 1 files, 0.01 GB"
  assert worst(doctor.check_compile_cache(tmp_path / "new")).level == "OK"
  assert worst(doctor.check_compile_cache("/proc/cache")).level == "WARN"
  (tmp_path / "open").mkdir()
  (tmp_path / "open").chmod(0o777)
  verdict = worst(doctor.check_compile_cache(tmp_path / "open"))
  assert verdict.level == "WARN" and verdict.remedy == f"chmod 700 {tmp_path / 'open'}"
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/cache")
  assert worst(doctor.check_compile_cache()).text == "gs://bucket/cache (remote, not tried)"


def test_git():
  assert worst(doctor.check_git(None)).level == "WARN"
  dirty = worst(doctor.check_git({"sha": "a" * 40, "dirty": True}))
  assert dirty.text == "a" * 12 + ", with uncommitted changes"
  assert worst(doctor.check_git({"sha": "a" * 40, "dirty": False})).text == "a" * 12


def test_wandb_login_is_seen_and_not_required(tmp_path, monkeypatch):
  monkeypatch.delenv("WANDB_API_KEY", raising=False)
  assert "not logged in" in worst(doctor.check_wandb(tmp_path)).text
  (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
  (tmp_path / ".netrc").chmod(0o600)
  assert worst(doctor.check_wandb(tmp_path)).text == "logged in"


@pytest.mark.parametrize("levels, code, last", [
  (["OK", "WARN"], 0, "0 bad, 1 warnings, 1 fine"), (["OK", "BAD", "WARN"], 1, "1 bad, 1 warnings, 1 fine")])
def test_exit_code_and_output(levels, code, last, monkeypatch, capsys):
  verdicts = [Verdict(level, "name", "text", "" if level == "OK" else "do this") for level in levels]
  monkeypatch.setattr(doctor, "diagnose", lambda workdir, cache: verdicts)
  assert doctor.main(["--workdir=x"]) == code
  lines = capsys.readouterr().out.splitlines()
  assert lines[-1] == last and lines.count("      remedy: do this") == len(levels) - 1
  assert lines[0] == "OK    name           text"


def test_the_whole_examination(tmp_path, monkeypatch):
  monkeypatch.setattr(doctor, "check_devices", lambda: [])
  names = [v.name for v in doctor.diagnose(tmp_path, tmp_path)]
  assert {"python", "packages", "tpu lock", "memory", "disk, workdir", "disk, cache", "permission",
          "compile cache", "git", "wandb"} <= set(names)

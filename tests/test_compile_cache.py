"""Programs are kept for the next start, only where it is safe; elsewhere a run goes on without."""
import os
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from infer import compile_cache
from infer.compile_cache import CompileCache, default_folder, find_fault
from tests.tiny import ROOT


@pytest.fixture(autouse=True)
def settings():
  """JAX's, as they were."""
  names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
  before = {name: getattr(jax.config, name) for name in names}
  yield
  if jax.config.jax_compilation_cache_dir != before["jax_compilation_cache_dir"]:
    from jax.experimental.compilation_cache import compilation_cache as of_jax
    of_jax.reset_cache()
  for name, value in before.items():
    jax.config.update(name, value)


def mode(path):
  return path.stat().st_mode & 0o777


def test_it_is_made_for_this_user_alone(tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
  folder = tmp_path / "home" / "assay" / "jax"
  assert default_folder() == str(folder) and find_fault(default_folder()) is None
  assert [mode(p) for p in (folder, folder.parent, folder.parent.parent)] == [0o700] * 3
  assert not list(folder.iterdir()), "looking leaves nothing"
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
  assert default_folder() == "/elsewhere"


def in_the_way(path):
  path.write_text("")
  return path


def below_a_file(path):
  path.write_text("")
  return path / "cache"


def open_to_others(bits):
  def make(path):
    path.mkdir()
    path.chmod(bits)
    return path
  return make


def of_another(path):
  path.mkdir(mode=0o755)
  os.chown(path, 12345, -1)
  return path


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
FAULTS = {
  "a file": (in_the_way, "cannot be written|is a file"), "below a file": (below_a_file, "Not a directory"),
  "the group's": (open_to_others(0o770), r"mode 0770: others can write there.*chmod 700 {}"),
  "everybody's": (open_to_others(0o707), r"mode 0707: others can write there.*chmod 700 {}"),
  "everybody's, sticky": (open_to_others(0o1777), "mode 1777"),
  "nobody's to write": (lambda path: "/proc/cache", r"cannot be written.*set JAX_COMPILATION_CACHE_DIR"),
}


@pytest.mark.parametrize("name", [*FAULTS, pytest.param("another's", marks=as_root)])
@pytest.mark.parametrize("create", [True, False])
def test_a_folder_that_is_not_safe_is_refused(name, create, tmp_path):
  make, words = {**FAULTS, "another's": (of_another, "belongs to user 12345 .mode 0755., not to root")}[name]
  folder = make(tmp_path / "cache")
  fault = find_fault(str(folder), create)
  assert re.search(words.format(re.escape(str(folder))), fault), fault


@pytest.mark.parametrize("bits", [0o700, 0o755, 0o750])
def test_others_may_read(bits, tmp_path):
  assert find_fault(str(open_to_others(bits)(tmp_path / "cache"))) is None


def test_a_refused_folder_is_a_warning_and_not_used(tmp_path, capsys):
  folder = open_to_others(0o777)(tmp_path / "cache")
  jax.config.update("jax_compilation_cache_dir", str(folder))  # As the environment's variable does.
  cache = CompileCache()
  try:
    said = capsys.readouterr().err
    assert said.startswith(f"WARNING: compile cache {folder} of ") and "Compiling without it" in said
    assert jax.config.jax_compilation_cache_dir is None
    jax.jit(lambda x: x * 2.25)(jnp.ones(7))
    assert cache.describe().startswith("no cache; ") and not list(folder.iterdir())
  finally:
    cache.close()


def test_a_file_system_that_hangs_is_left_behind_in_time(tmp_path, monkeypatch, capsys):
  assert compile_cache.PROBE_S < 5
  monkeypatch.setattr(compile_cache, "_look_at", lambda *_: time.sleep(60))
  start = time.monotonic()
  cache = CompileCache(str(tmp_path))
  cache.close()
  assert 3 < time.monotonic() - start < 5 and "does not answer within 4 s" in capsys.readouterr().err


def test_the_second_process_finds_what_the_first_compiled(tmp_path):
  code = ("import jax, sys; from infer.compile_cache import CompileCache; c = CompileCache(sys.argv[1]);"
          "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0);"
          "jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((64, 64))); print(c.describe())")
  env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"JAX_PLATFORMS": "cpu"}
  first, second = (subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env, text=True,
                                  capture_output=True, check=True).stdout for _ in range(2))
  assert "cache hit 0/" in first and "cache hit 0/" not in second


def test_programs_are_counted_and_a_late_one_is_warned_of(capsys):
  cache = CompileCache()

  @jax.jit
  def step(x):
    return x * 1.25

  x, longer = jnp.ones(3), jnp.ones(4)
  try:
    step.lower(x).compile()
    assert len(cache.seconds["step"]) == 1 and "step " in cache.describe()
    cache.settle(["step"])
    assert capsys.readouterr().err == ""
    step(longer)
    said = capsys.readouterr().err
    assert re.search(r"WARNING: step was compiled \(.* s\) after .* for the 2\. time", said), said
    with pytest.raises(AssertionError, match="compiled once each, not {'step': 2}"):
      cache.settle(["step"])
  finally:
    cache.close()
  step(jnp.ones(5))
  assert len(cache.seconds["step"]) == 2, "closed"


@pytest.mark.slow
def test_a_second_start_compiles_in_at_most_30_percent_of_the_first(tmp_path):
  """The programs' own seconds, and the first step of the second run is the first's to the last digit."""
  def start(name):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"),
                        "XLA_FLAGS": ""}
    said = subprocess.run(
        [sys.executable, "-m", "train.main", "--config=configs/tiny.py", f"--workdir={tmp_path / name}",
         "--config.steps=5", f"--config.data.cache_path={tmp_path / 'data'}"],
        cwd=ROOT, env=env, text=True, capture_output=True, check=True)
    assert "WARNING" not in said.stderr + said.stdout
    line = re.search(r"compile: .* s, cache hit (\d+)/(\d+), dir=\S+; (.*)", said.stdout)
    print(line[0], re.search("first step after .*", said.stdout)[0], sep="\n")
    return sum(map(float, re.findall(r" ([\d.]+) s", line[3]))), int(line[1]), int(line[2])

  first, hits, _ = start("first")
  assert hits == 0
  second, hits, asked = start("second")
  assert hits == asked >= 3 and second <= 0.3 * first, (first, second)

"""Programs that were kept as they were traced are those of a new trace, and are found again only while
nothing that they are made of has changed."""
import sys

import jax
import numpy as np
import pytest

from infer.engine import Engine
from infer.traced import Traced
from tests.test_engine import forced_logprobs, make_engine, params_of, texts_of
from tests.tiny import mesh_of

pytest.importorskip("flatbuffers", reason="extra [serve]: jax.export writes with it")
Z = np.zeros(8, np.float32)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  monkeypatch.setattr(Traced.__init__, "__defaults__", (str(tmp_path),))
  return tmp_path


@pytest.mark.parametrize("case, mesh", [("mixed windows", "one"), ("mla", "one"), ("moe", "all")])
def test_a_kept_program_is_the_traced_one(case, mesh, folder, monkeypatch):
  mesh = mesh_of(mesh)
  rows = dict(row_buckets=(2,)) if mesh.size > 1 else {}
  settings = dict(slots=4, page_size=4, max_length=200, prefill_chunk=16, row_buckets=(4,)) | rows
  make = lambda: Engine(*params_of(case, mesh)[::2], mesh, **settings, keep_traced=True)
  texts = texts_of((30, 20), (9, 1))
  plain = forced_logprobs(make_engine(case, mesh, **rows), texts)
  first = forced_logprobs(make(), texts)
  there = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
  assert len(there) >= 2

  def fail(*_):
    raise AssertionError("it was traced again")

  fail.__name__ = "run_step"
  monkeypatch.setattr("infer.engine.run_step", fail)
  for wanted, one, other in zip(plain, first, forced_logprobs(make(), texts)):
    np.testing.assert_array_equal(wanted, one)
    np.testing.assert_array_equal(wanted, other)
  assert there == {file: file.stat().st_mtime_ns for file in folder.iterdir()}


class Counted:
  """A function of one array, and how often it was traced."""

  def __init__(self):
    self.n = 0

  def look(self, **changes):
    """How often it is traced for one more lowering; what it computes is right each time."""
    before = self.n
    mesh, cfg = mesh_of("one"), changes.get("cfg", "a config")

    def double(x):
      self.n += 1
      return x * 2

    with jax.set_mesh(mesh):
      x = jax.device_put(changes.get("x", Z) + 1, jax.NamedSharding(mesh, jax.P(None)))
      program = Traced(cfg, mesh).lower(double, (), (x,), result=0).compile()
      np.testing.assert_array_equal(program(x), np.asarray(x) * 2)
    return self.n - before


def test_what_changes_is_traced_again(folder, monkeypatch):
  counted = Counted()
  assert [counted.look() for _ in range(3)] == [1, 0, 0]
  assert [counted.look(cfg="another") for _ in range(2)] == [1, 0]
  assert [counted.look(x=Z[:4]) for _ in range(2)] == [1, 0]
  assert [counted.look(x=Z.astype(np.int32)) for _ in range(2)] == [1, 0]
  with jax.default_matmul_precision("highest"):
    assert [counted.look() for _ in range(2)] == [1, 0]
  monkeypatch.setattr("importlib.metadata.version", lambda _: "9.9")
  assert [counted.look() for _ in range(2)] == [1, 0]
  monkeypatch.undo()


def test_a_source_that_changes_is_traced_again(folder, tmp_path_factory, monkeypatch):
  """Ours, and whatever else is loaded that nobody installed: an experiment's own layer."""
  counted, place = Counted(), tmp_path_factory.mktemp("experiment")
  (place / "my_layer_of_this_test.py").write_text("A = 1\n")
  monkeypatch.syspath_prepend(str(place))
  assert [counted.look() for _ in range(2)] == [1, 0]
  import my_layer_of_this_test  # noqa: F401
  assert [counted.look() for _ in range(2)] == [1, 0]
  (place / "my_layer_of_this_test.py").write_text("A = 2\n")
  assert [counted.look() for _ in range(2)] == [1, 0]
  (place / "my_layer_of_this_test.py").write_text("A = 1\n")
  assert counted.look() == 0
  (place / "my_layer_of_this_test.py").unlink()
  assert [counted.look() for _ in range(2)] == [1, 0]
  del sys.modules["my_layer_of_this_test"]
  ours = place / "model"
  ours.mkdir()
  (ours / "layers.py").write_text("")
  monkeypatch.setattr("infer.traced.OURS", [ours])
  assert [counted.look() for _ in range(2)] == [1, 0]
  (ours / "layers.py").write_text("B = 1")
  assert [counted.look() for _ in range(2)] == [1, 0]


def test_what_is_damaged_is_traced_again(folder):
  counted = Counted()
  assert counted.look() == 1
  file, = folder.iterdir()
  whole = file.read_bytes()
  for damaged in (b"", whole[:20], whole[:-3], whole[:40] + b"x" + whole[41:]):
    file.write_bytes(damaged)
    assert [counted.look() for _ in range(2)] == [1, 0]
    assert [*folder.iterdir()] == [file]
  file.unlink()
  folder.rmdir()  # It is only a cache.
  assert [counted.look() for _ in range(2)] == [1, 1]


def test_what_cannot_be_kept_is_traced(folder):
  """A call of this process."""
  mesh = mesh_of("one")
  with jax.set_mesh(mesh):
    x = jax.device_put(Z, jax.NamedSharding(mesh, jax.P(None)))
    function = lambda x: jax.pure_callback(lambda x: np.asarray(x) + 3, jax.typeof(x), x)
    program = Traced("a config", mesh).lower(function, (), (x,), result=0).compile()
    np.testing.assert_array_equal(program(x), Z + 3)
  assert not [*folder.iterdir()]

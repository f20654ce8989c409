"""Checkpoints: bit-identical, all or nothing, never trusted by name, never lost."""
import dataclasses
import errno
import importlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train.checkpoint
from model.hub.orbax import (
  CheckpointError,
  find_damage,
  find_newest_good,
  find_steps,
  restore_params,
)
from model.sharding import make_mesh
from train.checkpoint import (
  FREE_TO_CHANGE,
  Checkpointer,
  changed_settings,
  diff_configs,
  select_for_deletion,
)
from train.config import CheckpointConfig, TrainConfig

ROOT = pathlib.Path(__file__).parents[1]
SPEC = jax.P("fsdp", "tensor")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  """Shaped like the training state: nested dicts, an optax state, a scalar, an EMA or none."""
  step: jax.Array
  params: dict
  opt_state: tuple
  ema: dict | None


def make_state(mesh, seed=0, ema=True, rows=16):
  """Random bits, so NaN payloads, denormals and -0.0 too, in float32 and bfloat16."""
  rng = np.random.default_rng(seed)

  def draw(dtype):
    size = rows * 8 * jnp.dtype(dtype).itemsize
    array = np.frombuffer(rng.bytes(size), dtype).reshape(rows, 8)
    return jax.device_put(array, jax.NamedSharding(mesh, SPEC))

  def params():
    return {"blocks": {"w": draw(np.float32)}, "embed": draw(jnp.bfloat16)}

  count = jax.device_put(jnp.int32(seed), jax.NamedSharding(mesh, jax.P()))
  adam = optax.ScaleByAdamState(count, params(), params())
  return State(count, params(), (adam, optax.EmptyState()), params() if ema else None)


def abstract(state, mesh):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=jax.NamedSharding(mesh, x.sharding.spec)), state)


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save_steps(root, mesh, steps=(1, 2, 3), **config):
  """Saves make_state(seed=step) at each step."""
  checkpoints = Checkpointer(root, CheckpointConfig(**{"keep_last": 9, **config}))
  for step in steps:
    checkpoints.save(step, make_state(mesh, step), {}, {})
  checkpoints.wait()
  return checkpoints


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(fsdp=4, tensor=2)


@pytest.fixture(scope="module")
def saved(mesh, tmp_path_factory):
  """Steps 1, 2, 3, to be copied before they are damaged."""
  root = tmp_path_factory.mktemp("run") / "checkpoints"
  save_steps(root, mesh)
  return root


@pytest.fixture
def root(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def reopen(root):
  return Checkpointer(root, CheckpointConfig(keep_last=9))


def largest_file(step_dir):
  return max((step_dir / "state").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)


# What comes back.

@pytest.mark.parametrize("ema", [True, False])
def test_bits_survive_on_any_mesh(tmp_path, mesh, ema):
  state = make_state(mesh, seed=7, ema=ema)
  checkpoints = Checkpointer(tmp_path / "checkpoints", CheckpointConfig())
  assert checkpoints.restore(abstract(state, mesh)) is None
  assert checkpoints.save(7, state, {"config": {"a": (1, None)}}, {"eval/val/loss": 2.5})
  assert not checkpoints.save(7, state, {})
  for other in (mesh, make_mesh(data=2, fsdp=2, tensor=2), make_mesh(data=8)):
    restored = checkpoints.restore(abstract(state, other))
    assert_same_bits(restored.state, state)
    assert restored.state.params["blocks"]["w"].sharding == jax.NamedSharding(other, SPEC)
    assert restored.step == 7 == restored.meta["step"] and restored.rejected == []
    assert restored.meta["config"] == {"a": [1, None]}


def test_donating_the_state_right_after_save_does_not_touch_it(tmp_path):
  x = jnp.arange(4 << 20, dtype=jnp.float32)
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  expected = np.array(x)
  checkpoints = Checkpointer(tmp_path, CheckpointConfig())
  checkpoints.save(1, {"x": x}, {})
  for _ in range(10):
    x = add(x)
  checkpoints.wait()
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = {"x": jax.ShapeDtypeStruct(expected.shape, expected.dtype, sharding=sharding)}
  assert (np.asarray(checkpoints.restore(like).state["x"]) == expected).all()


def test_params_only(root, mesh):
  state = make_state(mesh, 3)
  for which in ("params", "ema"):
    like = abstract(getattr(state, which), make_mesh(data=8))
    params, meta, rejected = restore_params(root.parent, like, which)
    assert_same_bits(params, getattr(state, which))
    assert meta["step"] == 3 and rejected == []
  as_numpy = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
  params, meta, _ = restore_params(root / "2", as_numpy)
  assert isinstance(params["embed"], np.ndarray) and meta["step"] == 2
  assert_same_bits(params, make_state(mesh, 2).params)
  largest_file(root / "3").write_bytes(b"")
  params, meta, rejected = restore_params(root, as_numpy)
  assert meta["step"] == 2 and rejected[0][0] == 3


def test_a_state_of_another_shape_is_refused(root, mesh):
  checkpoints = reopen(root)
  wider = abstract(make_state(mesh, rows=32), mesh)
  with pytest.raises(ValueError, match=r"w is float32\[16, 8\] there, float32\[32, 8\] here"):
    checkpoints.restore(wider)
  with pytest.raises(ValueError, match=r"ema/blocks/w \(float32\[16, 8\]\) has no place here"):
    checkpoints.restore(abstract(make_state(mesh, ema=False), mesh))
  cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
                      abstract(make_state(mesh), mesh))
  with pytest.raises(ValueError, match=r"w is float32\[16, 8\] there, bfloat16\[16, 8\] here"):
    checkpoints.restore(cast)
  assert find_steps(root) == [1, 2, 3]


def test_a_refused_meta_reads_and_renames_nothing(root, mesh):
  def refuse(meta):
    raise ValueError(f"refused {meta['step']}")

  largest_file(root / "3").unlink()
  with pytest.raises(ValueError, match="refused 2"):
    reopen(root).restore(abstract(make_state(mesh), mesh), refuse)
  assert find_steps(root) == [1, 2, 3]


# What is damaged is named, and the newest good one is used.

def flip_byte(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


DAMAGE = {
  "flipped byte": (lambda p: flip_byte(largest_file(p)), "are not those that were written"),
  "truncated": (lambda p: os.truncate(largest_file(p), 100), ": 100 bytes, "),
  "deleted": (lambda p: largest_file(p).unlink(), ": missing"),
  "added": (lambda p: (p / "state" / "stray").write_text(""), "state/stray: not in the manifest"),
  "a folder in its place": (lambda p: ((p / "meta.json").unlink(), (p / "meta.json").mkdir()),
                            "meta.json: missing"),
  "manifest deleted": (lambda p: (p / "manifest.json").unlink(), "manifest.json: missing"),
  "manifest truncated": (lambda p: os.truncate(p / "manifest.json", 50), "json: unreadable"),
  "manifest flipped": (lambda p: flip_byte(p / "manifest.json"), ""),
  "manifest not utf-8": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "unreadable"),
  "meta flipped": (lambda p: flip_byte(p / "meta.json"), "meta.json: its"),
  "renamed": (lambda p: (shutil.rmtree(p), shutil.copytree(p.parent / "1", p)), "is of step 1,"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_older_checkpoint_used(root, mesh, kind):
  damage, reason = DAMAGE[kind]
  names = [p.relative_to(root / "3").as_posix() for p in (root / "3").rglob("*") if p.is_file()]
  names.append("state/stray")
  damage(root / "3")
  checkpoints = reopen(root)
  restored = checkpoints.restore(abstract(make_state(mesh), mesh))
  assert restored.step == 2
  assert_same_bits(restored.state, make_state(mesh, 2))
  (step, why), = restored.rejected
  assert step == 3 and reason in why and any(name in why for name in names)
  assert find_steps(root) == [1, 2] and (root / "3.damaged").is_dir()
  checkpoints.save(3, make_state(mesh, 33), {})  # The step is free again.
  checkpoints.wait()
  restored = checkpoints.restore(abstract(make_state(mesh), mesh))
  assert restored.step == 3 and restored.rejected == []
  assert_same_bits(restored.state, make_state(mesh, 33))


def test_every_single_byte_is_covered(root):
  """A flip anywhere, in any file, is seen."""
  rng = random.Random(0)
  files = [p for p in (root / "3").rglob("*") if p.is_file() and p.name != "manifest.json"]
  for path in files:
    original = path.read_bytes()
    for _ in range(3):
      data = bytearray(original)
      data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
      path.write_bytes(data)
      damage, = find_damage(root / "3")
      assert damage.startswith(path.relative_to(root / "3").as_posix() + ": ")
    path.write_bytes(original)
  assert find_damage(root / "3") == []


def test_all_damaged_is_an_error_never_a_fresh_start(root, mesh):
  for step in (1, 2, 3):
    flip_byte(largest_file(root / str(step)))
  checkpoints = reopen(root)
  with pytest.raises(CheckpointError, match="(?s)damaged.*step 3.*step 2.*step 1.*from scratch"):
    checkpoints.restore(abstract(make_state(mesh), mesh))
  assert find_steps(root) == [1, 2, 3]  # For a human to look at, or put right.


# A save that dies or fails.

class Killed(BaseException):
  """Stands for kill -9: nothing after it runs, nothing is cleaned up."""


CUTS = {  # Where, in the order in which they are reached; which step is then the newest.
  "before the meta": ("model.hub.orbax.write_manifest", 0, 3),
  "half a manifest": ("json.dump", 0, 3),
  "before the rename": ("pathlib.Path.rename", 1, 3),
  "before anything is deleted": ("pathlib.Path.rename", 2, 4),
  "before files are deleted": ("shutil.rmtree", 0, 4),
}


@pytest.mark.parametrize("cut", CUTS)
def test_killed_between_any_two_writes(root, mesh, monkeypatch, cut):
  target, after, newest = CUTS[cut]
  checkpoints = Checkpointer(root, CheckpointConfig(keep_last=1))
  checkpoints._writer.wait_until_finished()
  module, name = target.rsplit(".", 1)
  owner = pathlib.Path if module == "pathlib.Path" else importlib.import_module(module)
  owner = train.checkpoint if name == "write_manifest" else owner
  original, calls = getattr(owner, name), []

  def dies(*args, **kwargs):
    if name == "rename" and "state" in str(args[0]):
      return original(*args, **kwargs)  # Orbax's own.
    calls.append(args)
    if len(calls) > after:
      raise Killed
    return original(*args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(owner, name, dies)
    checkpoints.save(4, make_state(mesh, 4), {})
    with pytest.raises(Killed):
      checkpoints.wait()
  restarted = Checkpointer(root, CheckpointConfig(keep_last=1))
  assert not [p for p in root.iterdir() if p.suffix]
  restored = restarted.restore(abstract(make_state(mesh), mesh))
  assert restored.step == newest and restored.rejected == []
  assert_same_bits(restored.state, make_state(mesh, newest))
  restarted.save(5, make_state(mesh, 5), {})
  restarted.wait()
  assert find_steps(root) == [5] and find_damage(root / "5") == []


CHILD = """
import sys, jax, numpy as np
from train.checkpoint import Checkpointer
from train.config import CheckpointConfig
jax.config.update("jax_platforms", "cpu")
bits = lambda step: np.frombuffer(np.random.default_rng(step).bytes(4 << 20), "u1")
make = lambda step: {"x": jax.device_put(bits(step))}
sharding = make(0)["x"].sharding
checkpoints = Checkpointer(sys.argv[1], CheckpointConfig(keep_last=1))
restored = checkpoints.restore({"x": jax.ShapeDtypeStruct((4 << 20,), "u1", sharding=sharding)})
step = restored.step if restored else 0
if restored:
  assert (restored.state["x"] == make(step)["x"]).all() and not restored.rejected
print("from", step, flush=True)
while True:
  step += 1
  checkpoints.save(step, make(step), {})
  print("saving", step, flush=True)
"""


def kill_and_restart(root, n_kills, rng):
  """Kills a process that does nothing but save, n times; each goes on where the last one got to."""
  reached = 0
  for _ in range(n_kills):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(root)], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, cwd=ROOT)
    first = child.stdout.readline()
    assert first.startswith("from "), child.stderr.read()
    start = int(first.split()[1])
    assert start >= reached
    for _ in range(rng.randint(1, 4)):
      child.stdout.readline()
    time.sleep(rng.random() * 0.1)
    child.send_signal(signal.SIGKILL)
    saving = [int(line.split()[1]) for line in child.communicate()[0].splitlines()]
    step_dir, rejected = find_newest_good(root)
    assert rejected == []
    reached = int(step_dir.name) if step_dir else 0
    assert reached >= max([start, *(step - 1 for step in saving)])  # save() waits for the last one.
  assert reached > 0


def test_kill_9_while_saving(tmp_path):
  kill_and_restart(tmp_path, 2, random.Random())


@pytest.mark.slow
def test_kill_9_while_saving_20_times(tmp_path):
  kill_and_restart(tmp_path, 20, random.Random())


def check_failed_save(checkpoints, root, mesh, make_room):
  """Step 4 has no room: raised at the next check, nothing is lost, with room it works again."""
  steps = find_steps(root)
  with pytest.raises(CheckpointError, match=r"saving step 4 to .*/4 failed: .*No space left on"):
    checkpoints.save(4, make_state(mesh, 4, rows=1 << 14), {})
    deadline = time.time() + 30
    while time.time() < deadline:
      checkpoints.check()
      time.sleep(0.01)
  checkpoints.check()  # Raised once.
  assert find_steps(root) == steps and not [p for p in root.iterdir() if p.suffix]
  assert all(find_damage(root / str(step)) == [] for step in steps)
  make_room()
  (root / "4.saving" / "state").mkdir(parents=True)  # As a thread of the failed save may do, later.
  checkpoints.save(4, make_state(mesh, 4, rows=1 << 14), {})
  checkpoints.wait()
  restored = checkpoints.restore(abstract(make_state(mesh, rows=1 << 14), mesh))
  assert restored.step == 4
  assert_same_bits(restored.state, make_state(mesh, 4, rows=1 << 14))


@pytest.mark.parametrize("where", ["train.checkpoint.write_manifest", "pathlib.Path.mkdir",
                                   "pathlib.Path.write_text"])
def test_planted_full_disk(root, mesh, monkeypatch, where):
  def fails(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  checkpoints = reopen(root)
  monkeypatch.setattr(where, fails)
  check_failed_save(checkpoints, root, mesh, monkeypatch.undo)


@pytest.fixture
def small_disk(tmp_path):
  disk = tmp_path / "disk"
  disk.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
  if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("needs Linux and the right to mount a tmpfs")
  yield disk
  subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's.
@pytest.mark.parametrize("left", [0, 2 << 20])  # Bytes; the state needs 3.4 MB.
def test_full_disk(small_disk, mesh, left):
  root, filler = small_disk / "checkpoints", small_disk / "filler"
  checkpoints = save_steps(root, mesh)
  with open(filler, "wb") as f:
    free = shutil.disk_usage(small_disk).free - left
    f.write(bytes(free))
  check_failed_save(checkpoints, root, mesh, filler.unlink)


# Which are kept.

POLICIES = {
  "last": (CheckpointConfig(keep_last=2), [5, 6]),
  "last and every": (CheckpointConfig(keep_last=1, keep_every=2), [2, 4, 6]),
  "last and best": (CheckpointConfig(keep_last=1, best="loss"), [2, 6]),
  "all three": (CheckpointConfig(keep_last=1, keep_every=3, best="loss"), [2, 3, 6]),
  "a metric that never came": (CheckpointConfig(keep_last=2, best="other"), [5, 6]),
}
LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 1.5, 6: 4.0}


@pytest.mark.parametrize("name", POLICIES)
def test_kept_exactly(tmp_path, name):
  config, expected = POLICIES[name]
  checkpoints = Checkpointer(tmp_path, config)
  for step, loss in LOSSES.items():
    if step == 4:  # A restart forgets nothing.
      checkpoints.wait()
      checkpoints = Checkpointer(tmp_path, config)
    checkpoints.save(step, {"x": jnp.float32(step)}, {}, {"loss": loss})
  checkpoints.wait()
  assert find_steps(tmp_path) == expected == sorted(int(p.name) for p in tmp_path.iterdir())


def test_the_newest_is_never_deleted():
  config = CheckpointConfig(keep_last=1, best="loss")
  assert select_for_deletion({1: {"loss": 1.0}, 2: {}, 3: {"loss": 2.0}}, config) == [2]
  assert select_for_deletion({1: {}, 2: {}, 3: {}}, config) == [1, 2]
  assert select_for_deletion({3: {}}, config) == []


# Settings.

def test_every_free_setting_exists():
  leaves = [leaf for leaf, _, _ in diff_configs({}, dataclasses.asdict(TrainConfig()))]
  for name in FREE_TO_CHANGE:
    assert any(train.checkpoint._is_under(leaf, name) for leaf in leaves), name


def test_changed_settings():
  old, new = (dataclasses.asdict(TrainConfig()) for _ in range(2))
  assert changed_settings(old, new, []) == []
  new["checkpoint"]["every"], new["mesh"]["fsdp"], new["log"]["wandb"] = 7, 2, "offline"
  new["data"]["sources"][0]["max_epochs"] = 4.0
  assert changed_settings(old, new, []) == []
  new["steps"], new["optim"]["lr"], new["eval"]["rows"] = 2000, 1e-4, 1
  new["data"]["sources"][0]["path"] = "x"
  new["optim"]["decay_scale"] = ((".*", 1.0),)
  everything = [("data.sources[0].path", "", "x"), ("eval.rows", 256, 1),
                ("optim.decay_scale", [["norm|bias", 0.0], [".*", 1.0]], [[".*", 1.0]]),
                ("optim.lr", 3e-4, 1e-4), ("steps", 1000, 2000)]
  assert changed_settings(old, new, []) == everything
  assert changed_settings(old, new, ["steps", "optim", "data.sources"]) == [everything[1]]
  with pytest.raises(ValueError, match="no setting is called that; did you mean steps?"):
    changed_settings(old, new, ["step"])
  assert changed_settings({"a": 1, "b": 1}, {"a": 1.0, "c": None}, []) == [
    ("a", 1, 1.0), ("b", 1, "(absent)"), ("c", "(absent)", None)]
  new["data"]["sources"].append(dict(new["data"]["sources"][0]))
  assert ("data.sources[1].name", "(absent)", "text") in changed_settings(old, new, [])


# The command line.

def run(*args):
  return subprocess.run([sys.executable, "-m", "train.checkpoint", *map(str, args)], cwd=ROOT,
                        capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "tpu"})


def test_command_line(root, mesh, capsys):
  """In this process, and once as a command, which must not ask for the machine's accelerator."""
  from train.checkpoint_cli import main

  def call(*args):
    with pytest.raises(SystemExit) as e:
      main([str(a) for a in args])
    out = capsys.readouterr()
    return e.value.code, out.out, out.err

  real = run("diff", root / "2", root / "3")
  assert real.returncode == 1, real.stderr
  assert "params/blocks/w" in real.stdout and "settings: identical" in real.stdout
  assert call("diff", root.parent, root / "3")[0] == 0
  code, out, _ = call("show", root)
  assert code == 0 and "opt_state/0/mu/blocks/w" in out and "fsdp, tensor" in out and "16x8" in out
  assert "params: 256 values" in out
  code, out, _ = call("verify", root.parent)
  assert code == 0 and out.count("OK") == 3
  bad = largest_file(root / "2")
  flip_byte(bad)
  code, out, _ = call("verify", root.parent)
  assert code == 1 and out.count("OK") == 2 and bad.relative_to(root / "2").as_posix() in out
  assert call("verify", root / "3")[0] == 0
  assert call("diff", root / "2", root / "3")[0] == 1
  code, _, err = call("show", root.parent / "nowhere")
  assert code == 2 and "does not exist" in err
  (root / "9.saving").mkdir()
  code, out, _ = call("ls", root.parent)
  assert code == 0 and out.count("yes") == 2 and "no: state/" in out and "not finished" in out

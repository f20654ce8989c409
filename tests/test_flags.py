"""The command line: strict keys with suggestions, typed values, help, hashes, and what config.json keeps."""
import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import random
import resource
import subprocess
import sys

import pytest

from data import flags
from train.config import TrainConfig

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("[!_]*.py"))
LETTERS = "abcdefghijklmnopqrstuvwxyz_."
FOUR_DEVICES = "--xla_force_host_platform_device_count=4"
SCHEMA = '''
"""A made-up run."""
import dataclasses

@dataclasses.dataclass(kw_only=True, slots=True)
class Item:
  weight: float | None = None  # Share.

@dataclasses.dataclass(kw_only=True, frozen=True)
class Frozen:
  """Never changed in place."""
  axes: tuple[str, ...] = ("data",)

@dataclasses.dataclass(kw_only=True, slots=True)
class Run:
  n: int = 3  # Of things, (of "all" kinds) # really.
  rate: float = 0.5
  # Above the field,
  # in two lines.
  on: bool = False  # And beside it.
  name: str = "a"
  path: str | None = None
  pair: tuple[int, float] = (1, 2.0)
  pairs: tuple[tuple, ...] = (
    ("x", 1),  # Within.
  )
  mixed: str | tuple[int, ...] | None = None
  items: list[Item] = dataclasses.field(default_factory=lambda: [Item(), Item()])
  frozen: Frozen = Frozen()

  def validate(self, n_devices=None):
    n: int = 4  # Not the field's comment.
    if self.n > 100:
      raise ValueError(f"n={self.n} must be at most 100")
    return self

def get_config(arg=""):
  if arg == "broken":
    return Run(n={}["missing"])
  return Run(name=arg or "a", rate=REPLACE)
'''


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / "run.py"
  path.write_text(SCHEMA.replace("REPLACE", "1"))
  return str(path)


def load(*argv, checks=()):
  parser = argparse.ArgumentParser("prog")
  parser.add_argument("--workdir")
  return flags.load(parser, list(argv), checks=checks)


def mistake(capsys, *argv, checks=()):
  """The message of a command line that must exit with 2."""
  with pytest.raises(SystemExit) as exit_:
    load(*argv, checks=checks)
  captured = capsys.readouterr()
  assert exit_.value.code == 2 and not captured.out, (exit_.value.code, captured)
  assert captured.err.startswith("prog: error: ") and captured.err.count("\n") == 1, captured.err
  return captured.err


def one_edit(name, positions=None):
  """The name with one letter missing, changed, added or swapped; reproducible."""
  rng = random.Random(name)
  for i in positions or sorted({0, rng.randrange(len(name)), len(name) - 1}):
    yield name[:i] + name[i + 1:]
    yield name[:i] + rng.choice([x for x in LETTERS if x != name[i]]) + name[i + 1:]
    yield name[:i] + rng.choice(LETTERS) + name[i:]
    if i + 1 < len(name) and name[i] != name[i + 1]:
      yield name[:i] + name[i + 1] + name[i] + name[i + 2:]


def names_of(config):
  leaves = list(flags.leaves(config))
  return leaves, {leaf[:i] for leaf in leaves for i, x in enumerate(leaf) if x == "."}


# Of two kinds of sources; the fields of the others are the same.
@pytest.mark.parametrize("config", [
  pytest.param(name, marks=() if name in ("tiny", "dense_8b") else pytest.mark.slow) for name in CONFIGS])
def test_every_one_edit_mutation_of_every_name_is_rejected_with_the_right_suggestion(config, capsys):
  path = f"configs/{config}.py"
  leaves, sections = names_of(flags.read_config(path))
  known, tried = {*leaves, *sections}, 0
  for name in sorted(known):
    for wrong in one_edit(name):
      if wrong in known or not wrong or wrong.strip(".") == name:
        continue
      message = mistake(capsys, f"--config={path}", f"--config.{wrong}=1")
      assert message.startswith(f"prog: error: unknown key {wrong}; did you mean ")
      meant = message.rpartition("did you mean ")[2].rstrip("?\n").split(" or ")
      assert name in meant and len(meant) <= 3, (name, message)
      tried += 1
  assert tried > 8 * len(leaves)


@pytest.mark.slow
def test_every_one_edit_mutation_at_every_position():
  leaves, sections = names_of(TrainConfig())
  known = {*leaves, *sections}
  for name in sorted(known):
    for wrong in one_edit(name, range(len(name))):
      assert wrong in known or wrong.strip(".") == name or name in flags.nearest(wrong, known), (name, wrong)


@pytest.mark.parametrize("command", ["train.main", "data.inspect"])
def test_a_misspelt_key_stops_a_real_command_within_three_seconds(command):
  """Of CPU time: starting up is one thread, and what else runs on this machine must not decide."""
  for key, meant in (("model.n_layer", "model.n_layers"), ("optm.lr", "optim.lr")):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-m", command, "--config=configs/tiny.py", f"--config.{key}=2"],
                         capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 2
    assert f"unknown key {key}; did you mean {meant}?" in run.stderr and "Traceback" not in run.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


def test_values_reach_fields_of_every_type(config_file):
  config, args = load(
    f"--config={config_file}", "--workdir=here", "--config.n=7", "--config.rate", "1e-3", "--config.on=true",
    "--config.path=None", "--config.pair=(3, 4)", "--config.pairs=(('y', 2), ('z', (1, 2)))",
    "--config.items[1].weight=0.3", "--config.frozen.axes=('fsdp', 'data')", "--config.mixed=(1, 2)",
    "--config.name=1.5", "--config.n=8")
  assert (config.n, config.rate, config.on, config.path, config.pair) == (8, 1e-3, True, None, (3, 4.0))
  assert type(config.pair[1]) is float
  assert config.pairs == (("y", 2), ("z", (1, 2))) and config.mixed == (1, 2) and config.name == "1.5"
  assert [i.weight for i in config.items] == [None, 0.3] and config.frozen.axes == ("fsdp", "data")
  assert args.workdir == "here" and args.overrides[0] == "n=7" and args.overrides[1] == "rate=1e-3"
  assert load(f"--config={config_file}", "--config.on=False", "--config.rate=inf")[0].rate == float("inf")
  assert load(f"--config={config_file}", "--config.mixed=text")[0].mixed == "text"
  assert load(f"--config={config_file}:arg")[0].name == "arg"
  assert type(load(f"--config={config_file}")[0].rate) is float  # get_config wrote the int 1.


@pytest.mark.parametrize("flag, fragments", [
  ("n=4.5", ["n=4.5", "expected int"]),
  ("n=abc", ["n=abc", "expected int"]),
  ("n=True", ["n=True", "expected int"]),
  ("n=None", ["n=None", "expected int"]),
  ("rate=fast", ["rate=fast", "expected float"]),
  ("rate=True", ["rate=True", "expected float"]),
  ("on=1", ["on=1", "expected bool"]),
  ("pair=(1,)", ["pair=(1,)", "expected tuple[int, float]"]),
  ("pair=(1, 'a')", ["pair=(1, 'a')", "expected tuple[int, float]"]),
  ("frozen.axes=data", ["frozen.axes=data", "expected tuple[str, ...]"]),
  ("items[0].weight=x", ["items[0].weight=x", "expected float | None"]),
  ("items[2].weight=1", ["unknown key items[2].weight", "items[0].weight or items[1].weight"]),
  ("frozen=1", ["frozen is a section", "frozen.axes"]),
  ("items=1", ["items is a section", "items[0].weight"]),
  ("weight=1", ["unknown key weight; did you mean items[0].weight"]),
  ("frozen.somethingelse=1", ["unknown key frozen.somethingelse; known: frozen.axes"]),
  ("on", ["--config.on needs a value"]),
  ("n=101", ["n=101 must be at most 100"]),
])
def test_mistakes_name_key_value_and_what_was_expected(flag, fragments, config_file, capsys):
  message = mistake(capsys, f"--config={config_file}", f"--config.{flag}")
  assert all(f in message for f in fragments), message


def test_mistakes_around_the_config(config_file, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert "give --config=FILE.py; found: " in mistake(capsys)
  assert "no such file; did you mean configs/tiny.py?" in mistake(capsys, "--config=configs/tni.py")
  broken = mistake(capsys, f"--config={config_file}:broken")
  assert "(line 39) raised KeyError: 'missing'" in broken, broken
  (tmp_path / "wrong.py").write_text(SCHEMA.replace("REPLACE", "'x'"))
  assert "rate='x': expected float" in mistake(capsys, f"--config={tmp_path}/wrong.py")
  (tmp_path / "syntax.py").write_text("def get_config(:")
  assert "SyntaxError" in mistake(capsys, f"--config={tmp_path}/syntax.py")
  (tmp_path / "number.py").write_text("get_config = lambda: 3")
  assert "returned a int, not a dataclass" in mistake(capsys, f"--config={tmp_path}/number.py")
  one = f"--config={config_file}"
  assert "unknown flag --workdri; did you mean --workdir?" in mistake(capsys, one, "--workdri=x")
  assert "unknown flag --work" in mistake(capsys, one, "--work=x")  # Not taken for an abbreviation.
  assert "did you mean --config.rate?" in mistake(capsys, one, "--confg.rate=1")
  assert "did you mean --print_config?" in mistake(capsys, one, "--print_confi")
  assert "no such file" in mistake(capsys, one, "--diff=nowhere.py")

  def check(config):
    raise ValueError(f"name={config.name!r} is not known")
  assert "name='a' is not known" in mistake(capsys, one, checks=[check])


def printed(capsys, *argv):
  with pytest.raises(SystemExit) as exit_:
    load(*argv)
  captured = capsys.readouterr()
  assert exit_.value.code == 0 and not captured.err
  return captured.out.splitlines()


def test_print_config_is_sorted_and_ends_with_the_hash(config_file, capsys):
  *lines, last = printed(capsys, f"--config={config_file}", "--config.items[1].weight=2", "--print_config")
  assert lines == sorted(lines) and "items[1].weight = 2.0" in lines and "n = 3" in lines
  config, _ = load(f"--config={config_file}", "--config.items[1].weight=2")
  assert last == f"hash {flags.config_hash(config)}"
  config.n += 1
  assert last != f"hash {flags.config_hash(config)}"


def test_diff_prints_the_leaves_that_differ(config_file, tmp_path, capsys):
  other = tmp_path / "other.py"
  other.write_text(SCHEMA.replace("REPLACE", "0.25").replace("[Item(), Item()]", "[Item()]"))
  lines = printed(capsys, f"--config={config_file}", f"--diff={other}", "--config.n=4")
  assert lines == ["items[1].weight: None != absent", "n: 4 != 3", "rate: 1.0 != 0.25"]
  assert printed(capsys, f"--config={config_file}", f"--diff={config_file}") == [""]


def test_hash_does_not_depend_on_process_or_order_of_fields():
  fields = [("b", int, 1), ("a", str, "x"), ("c", tuple[str, ...], ("u", "v"))]
  one, two = (dataclasses.make_dataclass("C", order)() for order in (fields, fields[::-1]))
  assert flags.config_hash(one) == flags.config_hash(two)
  code = "from data import flags; print(flags.config_hash(flags.read_config('configs/tiny.py')))"
  hashes = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True,
                           env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
  assert hashes == {flags.config_hash(flags.read_config(str(ROOT / "configs/tiny.py"))) + "\n"}


def test_help_teaches_every_field_with_type_default_and_comment(config_file, capsys):
  text = "\n".join(printed(capsys, f"--config={config_file}", "--help"))
  for line in ("n                              int = 3  # Of things, (of \"all\" kinds) # really.",
               "on                             bool = False  # Above the field, in two lines. And beside it.",
               "pairs                          tuple[tuple, ...] = (('x', 1),)  # Within.",
               "items[1].weight                float | None = None  # Share.",
               "frozen: Never changed in place.", "--workdir", "--print_config"):
    assert line in text, line
  text = "\n".join(printed(capsys, "--help"))  # No config: the schema of those that ship, with its defaults.
  for name in flags.leaves(TrainConfig()):
    assert f"\n  {name} " in text, name
  assert "batch_size                     int = 16  # Global, in sequences." in text


@pytest.mark.parametrize("config", CONFIGS)
def test_config_json_gives_back_the_same_config(config, tmp_path):
  config, args = load(f"--config={ROOT}/configs/{config}.py", "--config.model.rules.embed=()",
                      "--config.mesh.fsdp=-1", "--config.mesh.expert=1", "--config.mesh.tensor=1",
                      "--config.optim.freeze=(('embed', True), ('.*', False))")
  flags.write_config_json(tmp_path / "config.json", config, args.overrides)
  record = json.loads((tmp_path / "config.json").read_text())
  again = flags.from_json(TrainConfig, record["config"])
  assert again == config and flags.config_hash(again) == record["hash"]
  assert flags.leaves(again) == flags.leaves(config)
  assert record["overrides"] == args.overrides
  assert record["versions"]["jax"] and record["versions"]["python"] == platform.python_version()
  assert set(record["git"] or ["sha", "dirty", "diff"]) == {"sha", "dirty", "diff"}
  assert set(os.listdir(tmp_path)) <= {"config.json", "git.diff"}


def test_what_is_not_committed_is_kept_as_a_patch_that_makes_the_same_tree(monkeypatch, tmp_path):
  def git(*command):
    subprocess.run(["git", "-C", str(there), *command], check=True, capture_output=True)

  there, copy = tmp_path / "repo", tmp_path / "copy"
  there.mkdir()
  git("init", "-q")
  (there / "a.py").write_text("x = 1\n")
  (there / ".gitignore").write_text("ignored\n")
  git("add", "."), git("-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "a")
  monkeypatch.setattr(flags, "ROOT", there)
  flags.write_config_json(tmp_path / "config.json", load(f"--config={ROOT}/configs/tiny.py")[0], [], "abc")
  clean = json.loads((tmp_path / "config.json").read_text())
  assert (clean["git"]["diff"], clean["git"]["dirty"], clean["data"]) == (None, False, "abc")
  (there / "a.py").write_text("x = 2\n")
  (there / "new file.py").write_text("y = 1\n")
  (there / "ignored").write_text("secret")
  (there / "large").write_bytes(b"x" * 2**21)
  flags.write_config_json(tmp_path / "config.json", load(f"--config={ROOT}/configs/tiny.py")[0], [])
  patch = (tmp_path / "git.diff").read_text()
  state = json.loads((tmp_path / "config.json").read_text())["git"]
  assert state["diff"] == hashlib.sha256(patch.encode()).hexdigest() and state["dirty"]
  assert "secret" not in patch and "# new file large" in patch and len(patch) < 2**20
  subprocess.run(["git", "clone", "-q", str(there), str(copy)], check=True)
  subprocess.run(["git", "-C", str(copy), "apply"], input=patch, text=True, check=True)
  assert (copy / "a.py").read_text() == "x = 2\n" and (copy / "new file.py").read_text() == "y = 1\n"


def test_from_json_refuses_what_it_does_not_know_and_fills_what_is_absent():
  tree = json.loads(json.dumps(flags.as_json(TrainConfig())))
  with pytest.raises(ValueError, match=r"unknown key model.n_layer; did you mean model.n_layers\?"):
    flags.from_json(TrainConfig, {**tree, "model": {**tree["model"], "n_layer": 2}})
  with pytest.raises(ValueError, match=r"data.sources\[0\].weight='x': expected float"):
    tree["data"]["sources"][0]["weight"] = "x"
    flags.from_json(TrainConfig, tree)
  assert flags.from_json(TrainConfig, {"steps": 7}) == TrainConfig(steps=7)


def test_without_git_there_is_no_git_state(monkeypatch, tmp_path):
  monkeypatch.setattr(flags, "ROOT", tmp_path)
  assert flags.git_state() is None
  monkeypatch.setenv("PATH", str(tmp_path))
  assert flags.git_state() is None


@pytest.mark.parametrize("environment, devices", [
  ({"JAX_PLATFORMS": "cpu"}, "1"),
  ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FOUR_DEVICES}, "4"),
  ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FOUR_DEVICES, "JAX_NUM_CPU_DEVICES": "2"}, "2"),
  ({"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": "localhost:1"}, "None"),
  ({"JAX_NUM_CPU_DEVICES": "2"}, "None"),
  ({"JAX_PLATFORMS": "tpu,cpu"}, "None"),
])
def test_devices_are_counted_only_where_that_is_certain(environment, devices):
  clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
  code = ("import jax; from data import flags; print(flags.known_devices()); "
          "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()")
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                       env={**clean, **environment})
  assert run.stdout.strip() == devices, run.stderr

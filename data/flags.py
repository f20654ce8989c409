"""The command line of every command that takes --config: strict keys, typed values, useful help.

  load(parser, argv) -> (config, args)
  --config=configs/x.py[:arg]  --config.a.b=v  --config.data.sources[0].weight=0.3
  --print_config  --diff=other.py[:arg]

The schema is whatever dataclass get_config() returns: nothing of ours is imported here. A user's
mistake exits 2 with one line that names the key, the value and the nearest valid choice.
"""
import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import textwrap
import tokenize
import traceback
import types
import typing

from ml_collections.config_flags import config_path

ROOT = pathlib.Path(__file__).parents[1]
RECORDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")  # In config.json.
WORDS = {"true": True, "false": False, "inf": float("inf"), "nan": float("nan")}  # Not literals.
USAGE = """configuration:
  --config.NAME=VALUE sets one field, e.g. --config.optim.lr=1e-3 --config.model.window=None
  --config.data.sources[0].weight=0.3 --config.model.layer_pattern="('local', 'global')"
  Every NAME, its type, its value in {source} and what it means:
"""


def load(parser: argparse.ArgumentParser, argv: list[str] | None = None, *, checks=(), elsewhere=False):
  """Reads the command line. Exits 0 after --help, --print_config, --diff; 2 after a user's mistake.

  Args:
    parser: holds the command's own flags; --config, --print_config and --diff are added to it.
    argv: without the program's name; None: sys.argv.
    checks: callables of the validated config that raise ValueError, e.g. a look-up of its names.
    elsewhere: the config is of another machine, whose devices are not those of this one.

  Returns:
    (config, args): the validated config, and the flags with `args.overrides`, a list of "a.b=v".
  """
  parser.allow_abbrev = False  # --workdi is a mistake, not an abbreviation.
  parser.add_argument("--config", metavar="FILE.py[:ARG]", help="a file whose get_config(ARG) is the run")
  parser.add_argument("--print_config", action="store_true", help="print the resolved config and its hash")
  parser.add_argument("--diff", metavar="FILE.py[:ARG]", help="print the fields that differ from this config")
  try:
    overrides, rest = _split_argv(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(rest):
      _teach(parser, rest)
    args, unknown = parser.parse_known_args(rest)
    if args.config is None:
      raise ValueError(f"give --config=FILE.py; found: {', '.join(_shipped())}")
    config = read_config(args.config)
    if unknown:
      raise ValueError(_unknown_flag(unknown[0], parser, config))
    override(config, overrides)
    only_shown = args.print_config or args.diff is not None  # A pod's config can be read on a laptop.
    elsewhere = elsewhere or getattr(args, "dry_run", False)
    _validate(config, checks, None if only_shown or elsewhere else known_devices())
    if args.print_config:
      print(*_lines(config), f"hash {config_hash(config)}", sep="\n")
      parser.exit(0)
    if args.diff is not None:
      other = _validate(read_config(args.diff), checks)
      print(*diff(config, other), sep="\n")
      parser.exit(0)
  except ValueError as e:
    parser.exit(2, f"{parser.prog}: error: {e}\n")
  args.overrides = overrides
  return config, args


def read_config(path: str):
  """"configs/x.py:arg" -> what its get_config("arg") returns, every value of its declared type.

  Raises:
    ValueError: a missing file, a file or get_config that raises, a value of the wrong type.
  """
  file, _, arg = path.partition(":")
  if not pathlib.Path(file).is_file():
    near = nearest(file, _shipped())
    raise ValueError(f"--config={path}: no such file" + (f"; did you mean {' or '.join(near)}?" if near
                                                         else f"; found: {', '.join(_shipped())}"))
  spec = importlib.util.spec_from_file_location(f"config_file_{pathlib.Path(file).stem}", file)
  if spec is None:
    raise ValueError(f"--config={path}: not a Python file")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # inspect finds the source of a dataclass through it.
  try:
    spec.loader.exec_module(module)
    config = module.get_config(*[arg] if arg else [])
  except Exception as e:  # Anything may come out of the user's file: say what and where.
    frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == spec.origin]
    where = f" (line {frames[-1].lineno})" if frames else ""
    raise ValueError(f"--config={path}{where} raised {type(e).__name__}: {e}") from e
  if not dataclasses.is_dataclass(config) or isinstance(config, type):
    raise ValueError(f"--config={path}: get_config() returned a {type(config).__name__}, not a dataclass")
  for name, value, type_ in list(walk(config)):
    if (right := _coerce(name, value, type_)) is not value:
      _set(config, name, right)
  return config


def resolve(path: str, overrides: list[str], checks=()) -> tuple[object, dict]:
  """What "--config=PATH" and "a.b=v" strings say, for a program that makes them up.

  Returns:
    The validated config, and those of its leaves that were set to something else than the default.

  Raises:
    ValueError: whatever `load` exits with 2 for.
  """
  config = override(read_config(path), overrides)
  default = leaves(type(config)())
  chosen = {name: v for name, v in leaves(config).items() if name not in default or v != default[name]}
  return _validate(config, checks, known_devices()), chosen


def override(config, overrides: list[str]):
  """Applies "a.b=v" strings in order, in place.

  Raises:
    ValueError: an unknown key (with what was meant), a section, or a value of the wrong type.
  """
  for text in overrides:
    name, _, value = text.partition("=")
    known = {k: type_ for k, _, type_ in walk(config)}
    if name not in known:
      raise ValueError(_unknown_key(name, known))
    _set(config, name, _parse(name, value, known[name]))
  return config


def leaves(config) -> dict[str, object]:
  """Dotted name -> value, in the order of declaration; "a.b[0].c" in a list of dataclasses."""
  return {name: value for name, value, _ in walk(config)}


def config_hash(config) -> str:
  """"sha256:..." of the lines of --print_config: equal on every machine, for every field order."""
  return "sha256:" + hashlib.sha256("\n".join(_lines(config)).encode()).hexdigest()


def diff(config, other) -> list[str]:
  """One line for each leaf that differs: "key: this != other"."""
  this, that = ({k: repr(v) for k, v in leaves(c).items()} for c in (config, other))
  return [f"{k}: {this.get(k, 'absent')} != {that.get(k, 'absent')}"
          for k in sorted(this.keys() | that.keys()) if this.get(k) != that.get(k)]


def as_json(config) -> dict:
  """Nested plain values; tuples become lists when written. `from_json` is its inverse."""
  return dataclasses.asdict(config)


def flatten(tree, prefix: str = "") -> dict[str, object]:
  """`as_json`'s dict, or one that was read from a file, -> leaves by dotted name, as `leaves` of a config
  has them. A list is a leaf unless it holds sections."""
  if isinstance(tree, dict):
    items = [(f"{prefix}.{k}" if prefix else k, v) for k, v in tree.items()]
  elif isinstance(tree, (list, tuple)) and tree and all(isinstance(v, dict) for v in tree):
    items = [(f"{prefix}[{i}]", v) for i, v in enumerate(tree)]
  else:
    return {prefix: tree}
  return functools.reduce(lambda done, item: done | flatten(item[1], item[0]), items, {})


def from_json(schema: type, tree: dict, prefix: str = ""):
  """`as_json`'s dict, read back from a file, -> a `schema`. Absent fields keep their defaults.

  Raises:
    ValueError: unknown keys and values of the wrong type.
  """
  declared = {field.name: field.type for field in dataclasses.fields(schema)}
  for name in tree.keys() - declared.keys():
    raise ValueError(_unknown_key(prefix + name, [prefix + n for n in declared]))
  return schema(**{k: _from_json(prefix + k, v, declared[k]) for k, v in tree.items()})


def write_config_json(path, config, overrides: list[str], data_hash: str | None = None):
  """Writes the resolved config, its hash, overrides, versions, git state and the hash of the data, all or
  nothing. What of the checkout is not committed goes beside it, into git.diff."""
  state, changes = git_state(), git_diff()
  record = {
    "config": as_json(config),
    "hash": config_hash(config),
    "overrides": list(overrides),
    "versions": versions(RECORDED),
    "git": state and {**state, "diff": changes and hashlib.sha256(changes.encode()).hexdigest()},
    "data": data_hash,
  }
  path = pathlib.Path(path)
  if changes:
    path.with_name("git.diff").write_text(changes)
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(record, indent=1) + "\n")
  os.replace(partial, path)


def versions(packages) -> dict[str, str | None]:
  """Installed versions and python's, from metadata: nothing is imported. None: not installed."""
  found = {"python": platform.python_version()}
  for package in packages:
    found[package] = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found


def git_state() -> dict | None:
  """{"sha", "dirty"} of the checkout this code runs from; None: not a checkout, or no git."""
  try:
    return {"sha": _git("rev-parse", "HEAD").strip(), "dirty": bool(_git("status", "--porcelain"))}
  except (OSError, subprocess.SubprocessError):
    return None


def git_diff(most: int = 2**20) -> str | None:
  """What of the checkout is not committed, as a patch: changes, and new files that git does not ignore as far
  as `most` bytes go. None: nothing, not a checkout, or no git."""
  try:
    text = _git("diff", "HEAD")
    for name in filter(None, _git("ls-files", "-zo", "--exclude-standard").split("\0")):
      if len(text) + (ROOT / name).stat().st_size < most:
        text += _git("diff", "--no-index", "/dev/null", name, codes=(0, 1))
      else:
        text += f"# new file {name}: too large to keep\n"
    return text or None
  except (OSError, subprocess.SubprocessError):
    return None


def _git(*command, codes=(0,)):
  done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, errors="replace",
                        timeout=10)
  if done.returncode not in codes:
    done.check_returncode()
  return done.stdout


def known_devices() -> int | None:
  """How many devices the run will have, if certain without touching one: one process on the CPU."""
  jax = sys.modules.get("jax")
  if jax is None or jax.config.jax_platforms != "cpu" or "JAX_COORDINATOR_ADDRESS" in os.environ:
    return None
  if jax.config.jax_num_cpu_devices > 0:  # It beats XLA_FLAGS.
    return jax.config.jax_num_cpu_devices
  flag = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
  return int(flag[-1]) if flag else 1


def _validate(config, checks, n_devices=None):
  config.validate(n_devices=n_devices)
  for check in checks:
    check(config)
  return config


def _split_argv(argv):
  """-> (["a.b=v", ...] from the --config.a.b flags, the rest)."""
  overrides, rest, argv = [], [], list(argv)
  while argv:
    arg = argv.pop(0)
    if not arg.startswith("--config."):
      rest.append(arg)
      continue
    text = arg.removeprefix("--config.")
    if "=" not in text:
      if not argv or argv[0].startswith("--"):
        raise ValueError(f"{arg} needs a value: {arg}=VALUE")
      text += "=" + argv.pop(0)
    overrides.append(text)
  return overrides, rest


def _lines(config):
  return [f"{k} = {v!r}" for k, v in sorted(leaves(config).items())]


def _shipped():
  return sorted(os.path.relpath(p) for p in (ROOT / "configs").glob("[!_]*.py"))


# Values and types.

def _is_sections(value):
  return isinstance(value, list | tuple) and bool(value) and all(map(dataclasses.is_dataclass, value))


def walk(config, prefix=""):
  """(dotted name, value, declared type) of each leaf, in the order of declaration."""
  for field in dataclasses.fields(config):
    name, value = prefix + field.name, getattr(config, field.name)
    if _is_sections(value):
      for i, item in enumerate(value):
        yield from walk(item, f"{name}[{i}].")
    elif dataclasses.is_dataclass(value):
      yield from walk(value, name + ".")
    else:
      yield name, value, field.type


def _set(config, name, value):
  try:
    config_path.set_value(name, config, value)
  except dataclasses.FrozenInstanceError:  # A frozen section is replaced in its parent.
    section, _, field = name.rpartition(".")
    _set(config, section, dataclasses.replace(config_path.get_value(section, config), **{field: value}))


def _parse(name, text, type_):
  """The value that `text` spells: a Python literal where the type takes it, else the text itself."""
  values = [text]
  with contextlib.suppress(ValueError, SyntaxError):
    values.insert(0, ast.literal_eval(text))
  if text.lower() in WORDS:
    values.insert(0, WORDS[text.lower()])
  for value in values:
    with contextlib.suppress(ValueError):
      return _coerce(name, value, type_)
  raise ValueError(f"{name}={text}: expected {type_name(type_)}")


def _coerce(name, value, type_):
  """`value` as a `type_`: ints become floats and lists tuples where it says so, nothing else changes."""
  origin, args = typing.get_origin(type_) or type_, typing.get_args(type_)
  if origin in (typing.Union, types.UnionType):
    for option in args:
      with contextlib.suppress(ValueError):
        return _coerce(name, value, option)
  elif origin in (tuple, list) and isinstance(value, tuple | list):
    if not args:
      return origin(_coerce(name, v, origin) if isinstance(v, tuple | list) else v for v in value)
    items = [args[0]] * len(value) if origin is list or args[-1] is ... else args
    if len(items) == len(value):
      return origin(_coerce(name, v, t) for v, t in zip(value, items))
  elif origin is float and isinstance(value, int | float) and not isinstance(value, bool):
    return float(value)
  elif origin is int and isinstance(value, int) and not isinstance(value, bool):
    return int(value)
  elif origin is typing.Any or origin not in (int, float) and isinstance(value, origin):
    return value
  raise ValueError(f"{name}={value!r}: expected {type_name(type_)}")


def _from_json(name, value, type_):
  options = typing.get_args(type_) if isinstance(type_, types.UnionType) else [type_]
  for option in options:
    if dataclasses.is_dataclass(option) and isinstance(value, dict):
      return from_json(option, value, name + ".")
    item = (typing.get_args(option) or [None])[0]
    if dataclasses.is_dataclass(item) and isinstance(value, list):
      return [from_json(item, v, f"{name}[{i}].") for i, v in enumerate(value)]
  return _coerce(name, value, type_)


def type_name(type_) -> str:
  """How a type is written in the source: "int | None", "tuple[str, ...]"."""
  return type_.__name__ if isinstance(type_, type) and not typing.get_args(type_) else str(type_)


# What was meant.

def _unknown_key(name, known):
  sections = {k[:m.start()] for k in known for m in re.finditer(r"\.", k)}
  sections |= {s.partition("[")[0] for s in sections}
  if name in sections:
    fields = sorted({re.match(r"(\[\d+\])?\.?\w+", k[len(name):])[0] for k in known
                     if k.startswith((name + ".", name + "["))})
    return f"{name} is a section: set one of its fields, {', '.join(name + f for f in fields)}"
  if near := nearest(name, [*known, *sections]):
    return f"unknown key {name}; did you mean {' or '.join(near)}?"
  if same := [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]][:3]:
    return f"unknown key {name}; did you mean {' or '.join(same)}?"
  section = name.rpartition(".")[0]
  fields = [k for k in known if k.startswith(section + ".")] if section in sections else known
  return f"unknown key {name}; known: {', '.join(fields)}"


def _unknown_flag(arg, parser, config):
  flag = arg.partition("=")[0]
  known = [*parser._option_string_actions, *(f"--config.{name}" for name in leaves(config))]
  near = nearest(flag, known)
  return f"unknown flag {flag}" + (f"; did you mean {' or '.join(near)}?" if near else "; see --help")


def nearest(name: str, known, most: int = 3) -> list[str]:
  """The names that are most like `name`: several only where they are equally so; none if none is."""
  near = difflib.get_close_matches(name, known, n=most)
  likeness = {other: difflib.SequenceMatcher(None, other, name).ratio() for other in near}
  return sorted(other for other in near if likeness[other] == likeness[near[0]])


# Help.

def _teach(parser, argv):
  """Puts every field into the help: of the config on the command line, else the defaults."""
  given = [a.removeprefix("--config=") for a in argv if a.startswith("--config=")]
  if not given and "--config" in argv[:-1]:
    given = [argv[argv.index("--config") + 1]]
  if given:
    config, source = read_config(given[-1]), given[-1]
  else:
    config, source = type(read_config(_shipped()[0]))(), "a config that sets nothing"
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.epilog = "\n".join([USAGE.format(source=source).rstrip(), *_describe(config), "",
                             f"configs: {', '.join(_shipped())}", *["", parser.epilog or ""]])


def _describe(config, prefix=""):
  """Lines "  name  type = value  comment" of one section and those below it."""
  lines, below = [], []
  comments = _comments(type(config))
  for field in dataclasses.fields(config):
    name, value = prefix + field.name, getattr(config, field.name)
    if _is_sections(value):
      below += [line for i, item in enumerate(value) for line in _describe(item, f"{name}[{i}].")]
    elif dataclasses.is_dataclass(value):
      below += _describe(value, name + ".")
    else:
      comment = f"  # {comments[field.name]}" if comments.get(field.name) else ""
      lines.append(f"  {name:30} {type_name(field.type)} = {value!r}" + comment)
  title = (inspect.getdoc(type(config)) or "").partition("\n")[0]
  if title.startswith(type(config).__name__ + "("):  # What dataclass makes up where there is none.
    title = ""
  return ["", f"  {prefix.rstrip('.') or 'run'}" + (f": {title}" if title else ""), *lines, *below]


@functools.cache
def _comments(schema):
  """Field name -> its comment in the source: the lines just above it and the ends of its own."""
  source = textwrap.dedent(inspect.getsource(schema))
  tokens = tokenize.generate_tokens(io.StringIO(source).readline)
  comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
  alone = {i for i, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("#")}
  found = {}
  for field in ast.parse(source).body[0].body:
    if isinstance(field, ast.AnnAssign):
      first = field.lineno
      while first - 1 in alone:
        first -= 1
      lines = range(first, field.end_lineno + 1)
      found[field.target.id] = " ".join(comments[i] for i in lines if i in comments)
  return found

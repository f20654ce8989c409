"""Models of others in, and out again.

  python -m model.hub check SRC            is it a model that is known here, and whole? Reads headers only
  python -m model.hub import SRC DIR       -> a run's folder: infer.generate chats with it, training goes on
  python -m model.hub export DIR DST       -> a folder that transformers loads

SRC is a Hugging Face folder (config.json, *.safetensors, tokenizer), a GGUF file, or a name on the Hugging
Face hub (owner/name) where huggingface_hub is installed and the network allows it. DIR is a run's folder: of
an import, or the --workdir of a training.

Only safetensors and GGUF are read. Pickles (*.bin, *.pt) and code that comes with a model are never run.
"""
import argparse
import math
import pathlib
import re
import sys
import time

from model.hub.errors import HubError

ALLOWED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt"]


def main(argv: list[str] | None = None) -> int:
  args = _parse(argv)
  import jax
  jax.config.update("jax_platforms", "cpu")  # Nothing here computes; a run may hold the accelerator.

  from model.hub.orbax import CheckpointError
  try:
    COMMANDS[args.command](args)
  except (ValueError, FileNotFoundError) as e:
    print(f"python -m model.hub: error: {e}", file=sys.stderr)
    return 2
  except (CheckpointError, OSError) as e:
    print(f"python -m model.hub: failed: {type(e).__name__}: {e}", file=sys.stderr)
    return 1
  return 0


def _parse(argv):
  from model.hub.families import FAMILIES
  layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
  families = f"families: {', '.join(FAMILIES)}"
  parser = argparse.ArgumentParser("python -m model.hub", description=__doc__, epilog=families, **layout)
  commands = parser.add_subparsers(dest="command", metavar="check|import|export", required=True)
  sub = {name: commands.add_parser(name, help=about, description=about, epilog=families, **layout)
         for name, about in (("check", "is it a model that is known here, and whole?"),
                             ("import", "a model of others -> a run's folder"),
                             ("export", "a run's folder -> a folder that transformers loads"))}
  for name in ("check", "import"):
    sub[name].add_argument("src", metavar="SRC", help="a Hugging Face folder, a GGUF file, owner/name"
                           + ("; or a run's folder" if name == "check" else ""))
  sub["import"].add_argument("dir", metavar="DIR", help="a new folder")
  sub["import"].add_argument("--param_dtype", metavar="DTYPE", help="float32 | bfloat16 (bfloat16 where all "
                             "of it is stored so, else float32)")
  sub["import"].add_argument("--length", type=int, metavar="TOKENS", help="what the model will be used for: "
                             "dynamic and longrope positions choose by it (the longest that it is made for)")
  sub["export"].add_argument("dir", metavar="DIR", help="a run's folder, of an import or a training")
  sub["export"].add_argument("dst", metavar="DST", help="a new folder")
  sub["export"].add_argument("--family", metavar="NAME", help="what to write it as (as it was imported, or "
                             "the first that can say all of the model)")
  sub["export"].add_argument("--shard_gb", type=float, default=5.0, metavar="GB", help="largest file (5)")
  args = parser.parse_args(argv)
  if args.command == "export" and not 0 < args.shard_gb < math.inf:
    parser.error(f"--shard_gb={args.shard_gb} must be above 0")
  if args.command == "import" and args.length is not None and args.length < 1:
    parser.error(f"--length={args.length} must be at least 1")
  return args


def _check(args):
  from model.hub import convert
  path = pathlib.Path(args.src)
  if (path / "checkpoints").is_dir():
    config, step_dir = convert.open_run(path)
    family = (config.get("hub") or {}).get("family")
    print(f"{step_dir}: every byte is what was written; family: {family or 'not of an import'}")
    return
  source = convert.open_source(_find(args.src))
  _say(source)
  print("it can be imported")


def _import(args):
  from model.hub import convert
  if (pathlib.Path(args.src) / "checkpoints").is_dir():
    raise HubError(f"{args.src} is a run's folder already")
  source = convert.open_source(_find(args.src), param_dtype=args.param_dtype, length=args.length)
  _say(source)
  target = convert.import_model(source, args.dir, Progress())
  print(f"{target} is a run's folder now: python -m infer.generate --help")


def _export(args):
  from model.hub import convert
  target = convert.export_model(args.dir, args.dst, family=args.family,
                                shard_bytes=int(args.shard_gb * 1e9), progress=Progress())
  print(f"{target}: transformers.AutoModelForCausalLM.from_pretrained({str(target)!r})")


COMMANDS = {"check": _check, "import": _import, "export": _export}


def _say(source):
  n = sum(math.prod(source.plan.shape(name)) for name in source.plan.tensors)
  print(f"{source.path}: {source.family.name}, {n:,} parameters in {len(source.tensors)} tensors, "
        f"{source.model.param_dtype} here")
  for note in source.notes:
    print(f"note: {note}")


def _find(src: str) -> pathlib.Path:
  """A path, or a name on the hub, of which the data files are fetched."""
  path = pathlib.Path(src)
  if path.exists():
    return path
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", src):
    raise HubError(f"{src} does not exist, and is no name on the hub (owner/name)")
  try:
    import huggingface_hub
  except ImportError:
    raise HubError(f"{src} does not exist here; to fetch a model of that name: pip install huggingface_hub, "
                   "or download its folder and give the path") from None
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(src, allow_patterns=ALLOWED))
  except Exception as e:  # Its errors are of many libraries; what it says names the fault.
    why = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
    raise HubError(f"{src} does not exist here, and fetching it failed ({why}); download its folder and give "
                   "the path") from e


class Progress:
  """Tensors done, on stderr: at most two lines a second on a terminal, one a minute elsewhere."""

  def __init__(self):
    self._next, self._live = time.monotonic() + 1, sys.stderr.isatty()

  def __call__(self, done, total):
    if time.monotonic() >= self._next:
      print(f"{done} of {total} tensors", file=sys.stderr, end="\r" if self._live and done < total else "\n")
      self._next = time.monotonic() + (0.5 if self._live else 60)


if __name__ == "__main__":
  sys.exit(main())

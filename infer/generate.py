"""Continues prompts with a trained model.

  python -m infer.generate --run=runs/quickstart --prompt="def main("
  python -m infer.generate --run=runs/quickstart --prompt="import os" --temperature=0 --max_tokens=40
  python -m infer.generate --run=runs/quickstart --prompts_file=prompts.jsonl --n_samples=4 --out=texts.jsonl
  python -m infer.generate --run='runs/quickstart-*' --prompt="class "
  python -m infer.generate --run='runs/quickstart-*' --prompt="class "        the newest that is finished

One text is shown as it is made; several are listed as they end. Tokens a second go to stderr.
"""
import argparse
import contextlib
import dataclasses
import glob
import json
import math
import pathlib
import sys

from data.flags import nearest
from infer.sampling import Sampling

FIELDS = tuple(f.name for f in dataclasses.fields(Sampling))
FILE_HELP = "one prompt a line; or .jsonl: {\"prompt\": ..., and any of " + ", ".join(FIELDS) + "}"


def main(argv: list[str] | None = None) -> int:
  parser = make_parser()
  try:
    args = _parse(parser, argv)
    requests = read_requests(args)
    args.run = find_run(args.run)
  except ValueError as e:
    print(f"{parser.prog}: error: {e}", file=sys.stderr)
    return 2
  from jax.errors import JaxRuntimeError  # JAX and its devices, after the cheap mistakes.

  from model.hub.orbax import CheckpointError
  generator = None
  try:
    run, generator = _load(args)
    _note_lengths(run, requests)
    with open(args.out, "w") if args.out else contextlib.nullcontext() as out:
      if out is None and len(requests) == 1:
        _show_one(generator, run.tokenizer, *requests[0])
      else:
        _list_all(generator, run.tokenizer, requests, args.n_samples, out)
  except ValueError as e:
    if generator is not None:  # All that the user gave was looked at before: a fault of ours.
      raise
    print(f"{parser.prog}: error: {e}", file=sys.stderr)
    return 2
  except (OSError, CheckpointError, JaxRuntimeError) as e:  # Disk, checkpoint, device.
    print(f"{parser.prog}: failed: {type(e).__name__}: {e}", file=sys.stderr)
    return 1
  _print_stats(generator.stats)
  return 0


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser("python -m infer.generate", description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  default = Sampling()
  add = parser.add_argument_group("what").add_argument
  add("--run", required=True, metavar="DIR",
      help="the run's folder (its --workdir), or the newest finished of DIR-*, or of a pattern")
  add("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated; may be empty")
  add("--prompts_file", metavar="FILE", help=FILE_HELP)
  add("--n_samples", type=int, default=1, metavar="N", help="texts a prompt, by seeds seed, seed + 1, ...")
  add("--out", metavar="FILE.jsonl", help="write texts, tokens and log-probabilities there instead")

  add = parser.add_argument_group("how (in this order, which is Hugging Face's)").add_argument
  add("--repetition_penalty", type=float, metavar="X", help="above 1 discourages repeating (off)")
  add("--temperature", type=float, default=default.temperature, metavar="X", help="0 is greedy (%(default)s)")
  add("--top_k", type=int, metavar="K", help="draw from the K likeliest tokens (off)")
  add("--top_p", type=float, metavar="P", help="draw from the likeliest that hold a mass of P (off)")
  add("--min_p", type=float, metavar="P", help="draw from those at least P times the likeliest (off)")
  add("--seed", type=int, default=default.seed, metavar="N", help="same seed, same text (%(default)s)")
  add("--max_tokens", type=int, default=default.max_tokens, metavar="N", help="most new tokens (%(default)s)")
  add("--stop", action="append", default=[], metavar="TEXT",
      help="end before this; may be repeated; a line's end is $'\\n' in bash")

  add = parser.add_argument_group("with which weights, and where").add_argument
  add("--weights", choices=("params", "ema"), help="(ema if the run keeps it)")
  add("--step", type=int, metavar="N", help="of this checkpoint (the newest good one)")
  add("--compute_dtype", choices=("float32", "bfloat16"), help="(the run's; float32 is faster on CPUs)")
  add("--batch_size", type=int, default=32, metavar="N", help="most texts at a time (%(default)s)")
  add("--tensor", type=int, default=1, metavar="N", help="devices that share each layer (%(default)s)")
  return parser


def _parse(parser, argv):
  args, unknown = parser.parse_known_args(argv)
  if unknown:
    near = nearest(unknown[0].partition("=")[0], parser._option_string_actions)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; see --help"
    raise ValueError(f"unknown argument {unknown[0]}{hint}")
  for name in ("n_samples", "batch_size", "tensor"):
    if getattr(args, name) < 1:
      raise ValueError(f"--{name}={getattr(args, name)} must be at least 1")
  if args.out and not pathlib.Path(args.out).parent.is_dir():
    raise ValueError(f"--out={args.out}: there is no folder {pathlib.Path(args.out).parent}")
  return args


def find_run(name: str) -> str:
  """The run's folder that `name` is; else, with a line that says so, the newest finished one that the pattern
  `name`, or `name`-*, matches; else `name` itself, and `open_run` says what is wrong with it.

  Raises:
    ValueError: none of the runs that match is finished.
  """
  is_run = lambda path: (pathlib.Path(path) / "config.json").is_file()
  found = [] if is_run(name) else glob.glob(name) or glob.glob(name.rstrip("/") + "-*")
  runs = [path for path in found if is_run(path)]
  if not runs:
    return name
  from model.hub.orbax import find_steps
  ages, states = {}, []
  for path in sorted(map(pathlib.Path, runs)):
    steps = json.loads((path / "config.json").read_text())["config"]["steps"]
    last = max(find_steps(path / "checkpoints"), default=0)
    states.append(f"{path} at step {last} of {steps}")
    if last >= steps:
      ages[path] = (path / "checkpoints" / str(last)).stat().st_mtime
  if not ages:
    raise ValueError(f"--run={name}: no run is finished; give one of them: {', '.join(states)}")
  newest = max(ages, key=ages.get)
  print(f"--run={name}: {newest}, the newest of {len(ages)} finished", file=sys.stderr)
  return str(newest)


def read_requests(args) -> list[tuple[str, Sampling]]:
  """(prompt, settings) of each text to make: the command line's, then the file's, each n_samples times.

  Raises:
    ValueError: no prompt, an unreadable file, a setting that is unknown or out of range.
  """
  base = {name: getattr(args, name) for name in FIELDS}
  base = Sampling(**base | {"stop": tuple(args.stop)}).validate()
  requests = [(prompt, base) for prompt in args.prompt]
  if args.prompts_file:
    requests += _read_file(pathlib.Path(args.prompts_file), base)
  if not requests:
    raise ValueError("give --prompt=TEXT (it may be empty) or --prompts_file=FILE")
  return [(prompt, dataclasses.replace(setting, seed=(setting.seed + i) % 2**32))
          for prompt, setting in requests for i in range(args.n_samples)]


def _read_file(path, base):
  try:
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # JSON holds other line ends.
  except (OSError, UnicodeDecodeError) as e:
    raise ValueError(f"--prompts_file={path} cannot be read: {e}") from None
  if path.suffix != ".jsonl":
    return [(line, base) for line in lines]
  requests = []
  for i, line in enumerate(lines, 1):
    try:
      requests.append(_read_json(line, base))
    except (ValueError, TypeError) as e:
      raise ValueError(f"{path}, line {i}: {e}") from None
  return requests


def _read_json(line, base):
  record = json.loads(line)
  if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
    raise ValueError(f"expected {{\"prompt\": \"...\"}}, got {line[:80]}")
  prompt = record.pop("prompt")
  for name in record.keys() - set(FIELDS):
    raise ValueError(f"unknown setting {name!r}; known: prompt, {', '.join(FIELDS)}")
  if "stop" in record:
    record["stop"] = (record["stop"],) if isinstance(record["stop"], str) else tuple(record["stop"])
  return prompt, dataclasses.replace(base, **record).validate()


def _load(args):
  from infer.load import load_params, open_run
  run = open_run(args.run)
  import jax

  from infer.compile_cache import CompileCache
  from infer.decode import Generator, decode_config
  from model.sharding import make_mesh
  CompileCache()
  mesh = make_mesh(data=-1, tensor=args.tensor)
  cfg = dataclasses.replace(run.model, compute_dtype=args.compute_dtype or run.model.compute_dtype)
  cfg = decode_config(cfg, mesh)
  params, step, weights, rejected = load_params(run, cfg, mesh, weights=args.weights, step=args.step)
  for bad, reason in rejected:
    print(f"checkpoint {bad} is damaged and passed over: {reason}", file=sys.stderr)
  n_params = sum(math.prod(a.shape) for a in jax.tree.leaves(params))
  print(f"{run.path} at step {step}: {weights}, {n_params / 1e6:.1f}M parameters, computing in "
        f"{cfg.compute_dtype} on {mesh.size} {jax.devices()[0].device_kind}", file=sys.stderr)
  return run, Generator(cfg, params, mesh, stop_ids=[run.tokenizer.eos_id], batch_size=args.batch_size)


def _note_lengths(run, requests):
  from infer.text import encode_prompt
  longest = max(len(encode_prompt(run.tokenizer, prompt)) + s.max_tokens for prompt, s in requests)
  if longest > run.seq_len:
    print(f"note: up to {longest} tokens with the prompt, more than the {run.seq_len} that the model was "
          "trained on", file=sys.stderr)


def _show_one(generator, tokenizer, prompt, setting):
  from infer.text import stream
  print(prompt, end="", flush=True)
  for piece in stream(generator, tokenizer, [prompt], setting):
    print(piece.text, end="", flush=True)
  print()


def _list_all(generator, tokenizer, requests, n_samples, out):
  from infer.text import iter_completions
  prompts, settings = zip(*requests)
  for i, done in iter_completions(generator, tokenizer, list(prompts), list(settings)):
    if out is None:
      sample = f", sample {i % n_samples + 1} of {n_samples}" if n_samples > 1 else ""
      print(f"--- prompt {i // n_samples + 1}{sample} ({len(done.tokens)} tokens, {done.finish})")
      print(prompts[i] + done.text + "\n", flush=True)
    else:
      record = {"prompt": prompts[i], "prompt_index": i // n_samples, "sample": i % n_samples,
                **dataclasses.asdict(done), "settings": dataclasses.asdict(settings[i])}
      print(json.dumps(record), file=out, flush=True)


def _print_stats(stats):
  rate = lambda n, seconds: f"{n} tokens in {seconds:.2f} s, {n / max(seconds, 1e-9):.1f} tokens/s"
  print(f"prefill {rate(stats.prefill_tokens, stats.prefill_s)}; decode "
        f"{rate(stats.decode_tokens, stats.decode_s)}; compiling {stats.compile_s:.1f} s", file=sys.stderr)


if __name__ == "__main__":
  sys.exit(main())

"""Continues prompts with a trained model, or talks with an imported one.

  python -m infer.generate --run=runs/quickstart --prompt="def main("
  python -m infer.generate --run=runs/quickstart --prompt="import os" --temperature=0 --max_tokens=40
  python -m infer.generate --run=runs/quickstart --prompts_file=prompts.jsonl --n_samples=4 --out=texts.jsonl
  python -m infer.generate --run='runs/quickstart-*' --prompt="class "        the newest that is finished
  python -m infer.generate --model=smollm2                                    a conversation, a line a turn
  python -m infer.generate --model=smollm2 --prompt="What is the capital of France?" --temperature=0
  python -m infer.generate --model=smollm2 --system="Answer in French." --prompt="Who are you?"
  python -m infer.generate --model=smollm2 --raw --prompt="Once upon a time"

A run's folder is what training writes; a model's is what `python -m model.hub import` writes. A model is
asked through its own chat template unless you say --raw; what you type never becomes a special token of it.
One text is shown as it is made; several are listed as they end. Tokens a second go to stderr.
"""
import argparse
import contextlib
import dataclasses
import glob
import json
import pathlib
import signal
import sys

from infer.flags import parse_strictly
from infer.sampling import Sampling

TALK = 4096  # Tokens that a conversation has room for, if the model has.
FIELDS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed")
FILE_HELP = "one prompt a line; or .jsonl: {\"prompt\": ..., and any of " + ", ".join(FIELDS) + "}"


class BadPrompt(ValueError):
  """What the chat template refuses."""


def main(argv: list[str] | None = None) -> int:
  parser = make_parser()
  try:
    args = _parse(parser, argv)
    requests = read_requests(args)
    args.run = find_run(args.run) if args.run else None
  except ValueError as e:
    print(f"{parser.prog}: error: {e}", file=sys.stderr)
    return 2
  from jax.errors import JaxRuntimeError  # JAX and its devices, after the cheap mistakes.

  from model.hub.orbax import CheckpointError
  engine = None
  try:
    run, chat, stop_ids = _open(args)
    if not requests:
      engine = _make_engine(args, run, stop_ids, 1, TALK)
      _talk(run, engine, chat, args, _sampling(args))
    else:
      ids = _encode(run, chat, args, [prompt for prompt, _ in requests])
      longest = _find_longest(run, ids, requests)
      _note_length(run, longest)
      engine = _make_engine(args, run, stop_ids, len(ids), longest)
      with open(args.out, "w") if args.out else contextlib.nullcontext() as out:
        if out is None and len(requests) == 1:
          _show_one(engine, run.tokenizer, ids, *requests[0], echo=chat is None)
        else:
          _list_all(engine, run.tokenizer, ids, requests, args.n_samples, out, echo=chat is None)
  except ValueError as e:
    if engine is not None and not isinstance(e, BadPrompt):  # The rest was looked at before: our fault.
      raise
    print(f"{parser.prog}: error: {e}", file=sys.stderr)
    return 2
  except (OSError, CheckpointError, JaxRuntimeError) as e:  # Disk, checkpoint, device.
    print(f"{parser.prog}: failed: {type(e).__name__}: {e}", file=sys.stderr)
    return 1
  _print_counters(engine.counters)
  return 0


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser("python -m infer.generate", description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  default = Sampling()
  add = parser.add_argument_group("what").add_argument
  add("--run", metavar="DIR",
      help="the run's folder (its --workdir), or the newest finished of DIR-*, or of a pattern")
  add("--model", metavar="DIR", help="instead: an imported model's folder; without a prompt, lines of stdin")
  add("--system", metavar="TEXT", help="with --model: how it is to behave (what its template says)")
  add("--raw", action="store_true", help="with --model: continue the prompt itself, without the template")
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
  args = parse_strictly(parser, argv)
  if args.run and (args.raw or args.system is not None):
    name = "--raw" if args.raw else "--system"
    raise ValueError(f"{name} is about a chat template: it goes with --model=DIR")
  if args.raw and args.system is not None:
    raise ValueError("--system is written by the chat template, which --raw leaves out: give one of them")
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
  """(prompt, settings) of each text to make: the command line's, then the file's, each n_samples times. None
  with --model is a conversation.

  Raises:
    ValueError: no prompt, an unreadable file, a setting that is unknown or out of range.
  """
  base = _sampling(args)
  requests = [(prompt, base) for prompt in args.prompt]
  if args.prompts_file:
    requests += _read_file(pathlib.Path(args.prompts_file), base)
  if not requests and (args.run or args.raw or args.out):
    raise ValueError("give --prompt=TEXT (it may be empty) or --prompts_file=FILE")
  return [(prompt, dataclasses.replace(setting, seed=(setting.seed + i) % 2**32))
          for prompt, setting in requests for i in range(args.n_samples)]


def _sampling(args) -> Sampling:
  given = {name: getattr(args, name) for name in FIELDS}
  return Sampling(**given | {"stop": tuple(args.stop)}).validate()


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


def _open(args):
  """(run, its chat template or None, the ids that end a text). No device is touched."""
  from infer.load import find_ends, open_chat, open_run
  run = open_run(args.run) if args.run else open_run(args.model, "--model")
  chat = None if args.run or args.raw else open_chat(run)
  if args.model and not args.raw and chat is None:
    raise ValueError(f"--model={args.model} has no chat template: say --raw to continue a text without one")
  return run, chat, find_ends(run, chat) if args.model else (run.tokenizer.eos_id,)


def _make_engine(args, run, stop_ids, n_texts, longest):
  """Few programs, since most runs are short; sizes are rounded up, so that the compile cache knows them the
  next time."""
  from infer.engine import Engine
  from infer.load import load_model
  from model.sharding import ways
  cfg, params, mesh = load_model(run, compute_dtype=args.compute_dtype, weights=args.weights, step=args.step,
                                 tensor=args.tensor)
  power = lambda n: 2**(n - 1).bit_length()
  slots = min(args.batch_size, power(n_texts))
  return Engine(cfg, params, mesh, stop_ids=stop_ids, slots=slots, max_length=max(256, power(longest)),
                row_buckets=(-(-slots // ways(mesh, cfg.rules.batch)),))


def _encode(run, chat, args, prompts) -> list[list[int]]:
  """What the model reads. A run's documents began with its marker; a model's begin as its tokenizer says."""
  from infer.text import encode_prompt
  if chat is not None:
    return [_ask(chat, [*_opening(args), {"role": "user", "content": prompt}]) for prompt in prompts]
  bos = args.run is not None or run.tokenizer.add_bos
  return [encode_prompt(run.tokenizer, prompt)[not bos and prompt != "":] for prompt in prompts]


def _opening(args) -> list[dict]:
  return [] if args.system is None else [{"role": "system", "content": args.system}]


def _ask(chat, messages):
  try:
    return chat.encode(messages)
  except ValueError as e:
    raise BadPrompt(str(e)) from None


def _talk(run, engine, chat, args, setting) -> None:
  """Answers the lines of stdin, each with all that was said before it."""
  from infer.text import stream
  opening, messages, ask = _opening(args), [], sys.stdin.isatty()
  print("Ctrl-D ends the conversation; Ctrl-C an answer.", file=sys.stderr)
  while True:
    print("> " if ask else "", end="", flush=True)
    line = sys.stdin.readline()
    if not line:
      return
    if not line.strip():
      continue
    question, answer = {"role": "user", "content": line.removesuffix("\n")}, ""
    messages, prompt = _fit(chat, opening, messages, question, engine.max_length - setting.max_tokens)
    _note_length(run, len(prompt) + setting.max_tokens)
    with _interrupts() as interrupted:
      for piece in stream(engine, run.tokenizer, [prompt], setting):
        print(piece.text, end="", flush=True)
        answer += piece.text
        if interrupted:
          break
    print(flush=True)
    messages += [question, {"role": "assistant", "content": answer.strip()}]


def _fit(chat, opening, messages, question, room):
  """(the messages that there is room for, the prompt): the oldest turns go first."""
  said = len(messages)
  while len(prompt := _ask(chat, [*opening, *messages, question])) > room:
    if not messages:
      raise BadPrompt(f"the prompt has {len(prompt)} tokens, and there is room for {room} beside an answer")
    messages = messages[2:]
  if len(messages) < said:
    print(f"note: the first {said - len(messages)} messages are forgotten: there is room for {room} tokens "
          "beside an answer", file=sys.stderr)
  return messages, prompt


@contextlib.contextmanager
def _interrupts():
  """A list that has an item after Ctrl-C, which breaks no step of the engine so; the second one does."""
  interrupted = []

  def interrupt(*_):
    interrupted.append(True)
    signal.signal(signal.SIGINT, before)

  before = signal.signal(signal.SIGINT, interrupt)
  try:
    yield interrupted
  finally:
    signal.signal(signal.SIGINT, before)


def _find_longest(run, ids, requests) -> int:
  """Tokens of the longest text with its prompt."""
  room = run.model.max_length
  for prompt, (_, s) in zip(ids, requests):
    if room and len(prompt) + s.max_tokens > room:
      raise ValueError(f"the prompt's {len(prompt)} tokens and max_tokens={s.max_tokens} are more than the "
                       f"model.max_length={room} positions of the model; nearest valid max_tokens: "
                       f"{max(room - len(prompt), 0)}")
  return max(len(prompt) + s.max_tokens for prompt, (_, s) in zip(ids, requests))


def _note_length(run, longest):
  if longest > run.seq_len:
    print(f"note: up to {longest} tokens with the prompt, more than the {run.seq_len} that the model was "
          "trained on", file=sys.stderr)


def _show_one(engine, tokenizer, ids, prompt, setting, *, echo):
  from infer.text import stream
  print(prompt if echo else "", end="", flush=True)
  for piece in stream(engine, tokenizer, ids, setting):
    print(piece.text, end="", flush=True)
  print()


def _list_all(engine, tokenizer, ids, requests, n_samples, out, *, echo):
  from infer.text import iter_completions
  prompts, settings = zip(*requests)
  for i, done in iter_completions(engine, tokenizer, ids, list(settings)):
    if out is None:
      sample = f", sample {i % n_samples + 1} of {n_samples}" if n_samples > 1 else ""
      print(f"--- prompt {i // n_samples + 1}{sample} ({len(done.tokens)} tokens, {done.finish})")
      print((prompts[i] if echo else "") + done.text + "\n", flush=True)
    else:
      record = {"prompt": prompts[i], "prompt_index": i // n_samples, "sample": i % n_samples,
                **dataclasses.asdict(done), "settings": dataclasses.asdict(settings[i])}
      print(json.dumps(record), file=out, flush=True)


def _print_counters(counters):
  """Steps that read a prompt make tokens of other texts too: they count to the first rate only."""
  made, seconds = counters["generated_tokens"], counters["prefill_s"] + counters["decode_s"]
  rate = lambda n, seconds: f"{n / max(seconds, 1e-9):.1f} tokens/s"
  read = counters["prompt_tokens"] - counters["prefix_hit_tokens"]
  print(f"{made} tokens in {seconds:.2f} s, {rate(made, seconds)}: prefill {read} at "
        f"{rate(read, counters['prefill_s'])}, decode at "
        f"{rate(counters['decode_tokens'], counters['decode_s'])}; compiling {counters['compile_s']:.1f} s",
        file=sys.stderr)


if __name__ == "__main__":
  sys.exit(main())

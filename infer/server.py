"""Serves a model by the OpenAI API, with a chat page at /.

  python -m infer.server --model=smollm2                      an imported model, at http://127.0.0.1:8000
  python -m infer.server --run='runs/quickstart-*'            the newest finished run: it continues texts
  python -m infer.server --model=smollm2 --port=9000 --slots=32 --max_waiting=256
  python -m infer.server --model=smollm2 --host=0.0.0.0 --api_key_file=key.txt

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 40, "seed": 1}'

/health says whether requests are taken, /metrics is for Prometheus, /openapi.json describes every parameter;
each is served or refused by name. Only this machine is answered unless --host says otherwise, and then a key
is needed. SIGTERM: what runs is finished, no more is taken, exit code 0; a second one ends at once. An engine
that dies or stands still ends the server with exit code 1.
"""
import argparse
import concurrent.futures
import dataclasses
import gc
import importlib.util
import re
import sys

from infer.flags import parse_strictly
from infer.listen import Options, bind, read_key
from infer.scheduler import PAGE_SIZE

# Flag -> (type, default, least, help).
NUMBERS = {
  "slots": (int, 16, 1, "texts made at a time"),
  "max_length": (int, None, 2, "most tokens of a prompt and its text (the model's)"),
  "pages": (int, None, 2, "of the cache (half of what would fill every slot)"),
  "page_size": (int, PAGE_SIZE, 1, "tokens a page"),
  "prefill_chunk": (int, 256, 1, "tokens of prompts read at once; beside texts a quarter"),
  "tensor": (int, 1, 1, "devices that share each layer"),
  "max_waiting": (int, 64, 0, "texts beyond the slots before 429 is answered"),
  "deadline_s": (float, 600.0, 0.001, "seconds that a text may take"),
  "stuck_s": (float, 60.0, 1.0, "seconds without a step before the engine is taken for dead"),
  "drain_s": (float, 30.0, 0.0, "seconds that texts get to end after SIGTERM"),
}
NEEDED = "flatbuffers", "llguidance", "prometheus_client", "starlette", "uvicorn"  # Of the extra [serve].


def main(argv: list[str] | None = None) -> int:
  parser = make_parser()
  try:
    args = _parse(parser, argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Options) if f.name != "key"}
    options = Options(key=read_key(args.host, args.api_key_file), **given)
    listener = bind(args.host, args.port)  # Before the minutes that a large model takes to load.
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
      raise ValueError(f"no module {', '.join(missing)}; pip install -e '.[serve]'")
  except ValueError as e:
    print(f"{parser.prog}: error: {e}", file=sys.stderr)
    return 2
  gc.disable()  # What is imported, traced and loaded stays.
  from jax.errors import JaxRuntimeError  # JAX and its devices, after the cheap mistakes.

  from model.hub.orbax import CheckpointError
  try:
    served, engine = _load(args)
    gc.freeze()
  except ValueError as e:
    print(f"{parser.prog}: error: {e}", file=sys.stderr)
    return 2
  except (OSError, CheckpointError, JaxRuntimeError) as e:  # Disk, checkpoint, device.
    print(f"{parser.prog}: failed: {type(e).__name__}: {e}", file=sys.stderr)
    return 1
  finally:
    gc.enable()
  from infer.serving import HttpServer
  server = HttpServer(served, engine, options, listener)
  host = f"[{args.host}]" if ":" in args.host else args.host
  print(f"{served.name} is served at http://{host}:{server.port}", file=sys.stderr, flush=True)
  return server.run_until_end()


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser("python -m infer.server", description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument_group("what").add_argument
  add("--run", metavar="DIR",
      help="the run's folder (its --workdir), or the newest finished of DIR-*, or of a pattern")
  add("--model", metavar="DIR", help="instead: an imported model's folder")
  add("--name", metavar="NAME", help="the model's, to clients (its folder's)")
  add("--weights", choices=("params", "ema"), help="(ema if the run keeps it)")
  add("--step", type=int, metavar="N", help="of this checkpoint (the newest good one)")
  add("--compute_dtype", choices=("float32", "bfloat16"), help="(the run's; float32 is faster on CPUs)")
  add = parser.add_argument_group("to whom").add_argument
  add("--host", default="127.0.0.1", metavar="ADDRESS",
      help="to listen at; other machines are only answered with a key (%(default)s)")
  add("--port", type=int, default=8000, metavar="N", help="0 is a free one (%(default)s)")
  add("--api_key_file", metavar="FILE",
      help="its one line is the key that clients must show; or set ASSAY_API_KEY")
  add = parser.add_argument_group("how much").add_argument
  for name, (kind, default, _, text) in NUMBERS.items():
    add(f"--{name}", type=kind, default=default, metavar="N" if kind is int else "X",
        help=text if default is None else f"{text} (%(default)s)")
  add("--cache_dtype", choices=("int8",), help="of keys and values (the compute dtype)")
  add("--ring_windows", action="store_true",
      help="layers with a window keep no more than that needs; then no prefix is found again")
  return parser


def _parse(parser, argv):
  args = parse_strictly(parser, argv)
  for name, (_, _, least, _) in NUMBERS.items():
    value = getattr(args, name)
    if value is not None and not least <= value < float("inf"):
      raise ValueError(f"--{name}={value} must be at least {least}")
  if not 0 <= args.port < 65536:
    raise ValueError(f"--port={args.port} must be in 0 .. 65535")
  return args


def _load(args):
  """(what is served, its engine, whose programs are compiled).

  Raises:
    ValueError: a mistake in the flags, or a folder that is not what they say.
  """
  from data.chat import RENDERER
  if args.model:
    RENDERER.start()  # Is ready when the template is tried.
  from infer.generate import find_run
  from infer.load import find_ends, load_model, open_chat, open_run
  run = open_run(find_run(args.run)) if args.run else open_run(args.model, "--model")
  chat = open_chat(run) if args.model else None
  if chat is None:
    RENDERER.close()
  stop_ids = find_ends(run, chat) if args.model else (run.tokenizer.eos_id,)
  from infer.engine import Engine
  cfg, params, mesh = load_model(run, compute_dtype=args.compute_dtype, weights=args.weights, step=args.step,
                                 tensor=args.tensor)
  engine = Engine(cfg, params, mesh, stop_ids=stop_ids, slots=args.slots, page_size=args.page_size,
                  n_pages=args.pages, max_length=args.max_length, prefill_chunk=args.prefill_chunk,
                  cache_dtype=args.cache_dtype, ring_windows=args.ring_windows, keep_traced=True)
  with concurrent.futures.ThreadPoolExecutor(1) as beside:
    compiling = beside.submit(engine.compile_all)
    served = _serve_as(args, run, chat, cfg, engine, stop_ids)
    compiling.result()
  print("{compiles:.0f} programs compiled or loaded in {compile_s:.1f} s".format(**engine.counters),
        file=sys.stderr, flush=True)
  return served, engine


def _serve_as(args, run, chat, cfg, engine, stop_ids):
  """What the server's pages need to know, and how requests are made; while programs are compiled."""
  import infer.serving  # noqa: F401  Takes its time.
  from infer.app import Served
  from infer.beam import BeamSearch
  from infer.engine import Request
  from infer.grammar import GrammarCompiler
  from infer.sampling import Sampling
  from infer.tools import CallReader, find_style

  def make_request(prompt, settings, grammar, user, beams=None):
    return Request(prompt=prompt, sampling=Sampling(**settings), grammar=grammar, user=user,
                   beams=beams and BeamSearch(**beams))

  style = find_style(chat.template) if chat else None
  tools = {} if style is None else {
    "tools": lambda names: CallReader(style, names, run.tokenizer.specials),
    "force_call": lambda functions: force_answer(style, functions, chat)}
  room = engine.gauges()["pages_total"] // engine.n_ways * args.page_size  # Of one text, if it had all pages.
  return Served(
    name=args.name or run.path.resolve().name, tokenizer=run.tokenizer, make_request=make_request,
    max_length=min(engine.max_length, int(room)), chat=chat,
    begins_with_bos=args.run is not None or run.tokenizer.add_bos,
    grammars=GrammarCompiler(run.tokenizer, cfg.padded_vocab_size, stop_ids), **tools)


def force_answer(style, functions, chat):
  """(ids that an answer begins with which calls one of the functions, their text, the rest's grammar).

  Raises:
    ValueError: it cannot be forced.
  """
  from infer.tools import MARKS, force_call
  opening, grammar = force_call(style, functions, chat.template)
  ids = []
  for part in filter(None, re.split(f"({'|'.join(map(re.escape, MARKS))})", opening)):
    special = chat.tokenizer.specials.get(part) if part in MARKS else None
    ids += chat.tokenizer.encode_inner(part) if special is None else [special.id]
  return ids, opening, grammar


if __name__ == "__main__":
  sys.exit(main())

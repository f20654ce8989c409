"""`bench engine`: the serving engine without a server: decode by batch, and prefill, in tokens/s; beside
transformers on the same weights, in turns."""
import contextlib
import os
import pathlib
import sys
import tempfile
import time

import numpy as np

from experiments.bench.rival import Rival, compare_times

WARM_UP = 1  # Rounds before the first that counts.


def run(args) -> dict:
  """The bench's line.

  Raises:
    ValueError: the folder is no imported model.
  """
  from infer.engine import Engine
  from infer.load import load_model, open_run
  run = open_run(args.model, "--model")
  cfg, params, mesh = load_model(run, compute_dtype="float32", weights=None, step=None, tensor=1)
  longest = max(args.prompt + args.tokens + 2 * max(args.batch), args.prefill) + 1
  engine = Engine(cfg, params, mesh, slots=max(args.batch), max_length=-(-longest // 16) * 16)
  engine.warm_up()
  with contextlib.ExitStack() as stack:
    rival = stack.enter_context(start_transformers(args.model)) if args.against else None
    points = measure(engine, rival, args, cfg.vocab_size)
  line = {"bench": "engine", "model": run.path.name, "prompt_tokens": args.prompt, "points": points,
          "compiles": engine.counters["compiles"]}
  if rival is not None:
    line["transformers"] = rival.version
  print(table(points), file=sys.stderr)
  return line


@contextlib.contextmanager
def start_transformers(model: str):
  """transformers with the weights of our own folder: what we export from it."""
  from model.hub.convert import export_model
  with tempfile.TemporaryDirectory() as folder:
    exported = export_model(model, pathlib.Path(folder) / "exported")
    rival = Rival("transformers_eager", exported, os.cpu_count())
    try:
      yield rival
    finally:
      rival.close()


def measure(engine, rival, args, vocab_size) -> list[dict]:
  """Of each point: tokens/s by the median round; with a rival, its own and the ratio. In every round each
  point is ours and then theirs."""
  draw = np.random.default_rng(0)
  prompts = draw.integers(0, vocab_size, (max(args.batch), args.prompt)).tolist()
  times = {("decode", batch): ([], []) for batch in args.batch} | {("prefill", 1): ([], [])}
  for i in range(WARM_UP + args.rounds):
    fresh = draw.integers(0, vocab_size, args.prefill).tolist()  # The engine knows prompts that it has read.
    for (what, batch), (ours, theirs) in times.items():
      given = prompts[:batch] if what == "decode" else [fresh]
      n = args.tokens if what == "decode" else 0
      seconds, logprobs = make_tokens(engine, given, n) if n else read_prompt(engine, fresh)
      ours.append(seconds)
      if rival is not None:
        answer = rival.ask({"prompts": given, "tokens": n})
        theirs.append(answer["seconds"])
        check_same(logprobs, answer["logprobs"])
    print(f"bench engine: round {i + 1} of {WARM_UP + args.rounds}", file=sys.stderr, flush=True)
  points = []
  for (what, batch), (ours, theirs) in times.items():
    tokens = batch * args.tokens if what == "decode" else args.prefill
    rate = lambda seconds: round(tokens / float(np.median(seconds[WARM_UP:])), 1)
    point = {"what": what, "batch": batch, "tokens": tokens, "tokens_per_s": rate(ours)}
    if rival is not None:
      point |= {"transformers_tokens_per_s": rate(theirs), **compare_times(ours[WARM_UP:], theirs[WARM_UP:])}
    points.append(point)
  return points


def make_tokens(engine, prompts, n: int) -> tuple[float, list[float]]:
  """(seconds for n tokens of each text while all are being made, log-probabilities of their first tokens)."""
  ids, first = [_submit(engine, prompt, n + 2 * len(prompts)) for prompt in prompts], {}
  while len(first) < len(ids):
    for token in engine.step():
      first.setdefault(token.request, token.logprob)
  made, start = 0, time.perf_counter()
  while made < n * len(ids):
    made += len(engine.step())
  seconds = (time.perf_counter() - start) * n * len(ids) / made
  for id in ids:
    engine.cancel(id)
  while engine.has_work:
    engine.step()
  return seconds, [first[id] for id in ids]


def read_prompt(engine, prompt) -> tuple[float, list[float]]:
  """(seconds from a prompt to its first token, whose log-probability)."""
  start, logprobs = time.perf_counter(), []
  _submit(engine, prompt, 1)
  while engine.has_work:
    logprobs += [token.logprob for token in engine.step()]
  return time.perf_counter() - start, logprobs


def _submit(engine, prompt, max_tokens):
  from infer.engine import Request
  from infer.sampling import Sampling
  return engine.submit(Request(prompt=prompt, sampling=Sampling(max_tokens=max_tokens, temperature=0.0)))


def check_same(ours: list[float], theirs: list[float]) -> None:
  """Raises RuntimeError: the likeliest first tokens are not equally likely on both sides."""
  if len(ours) != len(theirs) or np.abs(np.subtract(ours, theirs)).max() > 1e-3:
    raise RuntimeError(f"not the same model: log-probabilities of the first tokens are {ours} here, "
                       f"{theirs} there")


def table(points: list[dict]) -> str:
  """Tokens/s, for people."""
  lines = [f"{'tokens/s':>12} {'ours':>8} {'transformers':>13} {'ratio':>6}  95 %"]
  for p in points:
    name = f"{p['what']} {p['batch']}" if p["what"] == "decode" else f"prefill {p['tokens']}"
    line = f"{name:>12} {p['tokens_per_s']:8.1f}"
    if "ratio" in p:
      low, high = p["interval_95"]
      line += f" {p['transformers_tokens_per_s']:13.1f} {p['ratio']:6.2f}  {low:.2f} .. {high:.2f}"
    lines.append(line)
  return "\n".join(lines)

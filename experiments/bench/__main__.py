"""python -m experiments.bench train|decode|engine|serve|data|roofline [...]: one JSON line of what this
machine does, measured in this run.

  train [--against=torch] [--rounds=10]   the fixed case of experiments/bench/case.py through train.step; with
                                          --against, PyTorch eager takes turns with it, a step each
  decode [--batch=1,8]                    prefill and decode of the same model through infer.engine
  engine --model=DIR [--against=transformers]   the serving engine: decode of 1, 8 and 16 texts, and prefill
  serve --model=DIR                       load on infer.server: 16 clients, each asking again when its answer
                                          has ended; --static: they wait for each other; --rate=4: four
                                          requests a second; --url: on a server that runs; see serve --help
  data [--rows=2000]                      rows of made-up text through data.pipeline
  roofline                                two models: the step that train.roofline says of this machine, its
                                          rates measured between the steps, beside what is measured

Machines are noisy: each line has the load average and the machine's own GEMM speed (float32; the best of
NumPy's BLAS and XLA, and its median), measured between the steps. Absolute figures of different runs do not
compare; ratios within a run do.
"""
import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time

import numpy as np

from data.flags import nearest
from experiments.bench.load import ServerFailed, add_flags
from experiments.bench.rival import Rival, compare_times
from train.chips import measure_gemm

WARM_UP = 2  # Steps before the first that counts.


def train(args):
  from experiments.bench.case import compile_step, train_config
  from model.count import flops_per_token
  from model.sharding import make_mesh
  cfg = train_config()
  start = time.perf_counter()
  step, params, compiled = compile_step(cfg, make_mesh(fsdp=-1))
  compile_s = time.perf_counter() - start
  n_params = sum(a.size for a in params.values())
  line = {"bench": "train", "compile_s": round(compile_s, 1), "parameters": n_params,
          "temporaries_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6)}
  with tempfile.TemporaryDirectory() as folder:
    rival = _start_torch(pathlib.Path(folder) / "case.npz", cfg, params) if args.against else None
    del params
    ours, theirs, gemms, first = [], [], [], None
    for i in range(WARM_UP + args.rounds):
      start = time.perf_counter()
      numbers = step()
      ours.append(time.perf_counter() - start)
      if rival is not None:
        answer = rival.ask()
        theirs.append(answer["seconds"])
      if i == 0:
        first = numbers, answer if rival is not None else None
      gemms.append(measure_gemm(0.2, 1024))
    tokens = cfg.batch_size * cfg.seq_len
    line |= _speed(ours[WARM_UP:], tokens, gemms, tokens * flops_per_token(cfg.model, cfg.seq_len, n_params))
    line |= {"first_loss": first[0]["loss"], "first_grad_norm": first[0]["grad_norm"]}
    if rival is not None:
      line["against_torch"] = _compare(ours[WARM_UP:], theirs[WARM_UP:], *first)
      rival.close()
      line["torch"] = rival.version
  return line


def _start_torch(path, cfg, params):
  from experiments.bench.case import make_rows
  rows, optim = make_rows(cfg), cfg.optim
  np.savez(path, tokens=rows["tokens"], targets=rows["targets"], rope_theta=cfg.model.rope_theta,
           norm_eps=cfg.model.norm_eps, lr=optim.lr, b1=optim.b1, b2=optim.b2, eps=optim.eps,
           weight_decay=optim.weight_decay, grad_clip=optim.grad_clip,
           **{f"params/{name}": a for name, a in params.items()})
  return Rival("torch_eager", path, os.cpu_count())


def _compare(ours, theirs, first, their_first):
  for name in ("loss", "grad_norm"):
    if abs(first[name] / their_first[name] - 1) > 1e-3:
      raise RuntimeError(f"not the same model: {name} of the first step is {first[name]} here, "
                         f"{their_first[name]} there")
  return compare_times(ours, theirs) | {
    "torch_step_ms": round(1e3 * float(np.median(theirs))),
    "torch_first_loss": their_first["loss"], "torch_first_grad_norm": their_first["grad_norm"]}


def decode(args):
  import jax

  from experiments.bench.case import train_config
  from infer.engine import Engine
  from infer.sampling import Sampling
  from model.count import decode_bytes_per_token, flops_per_token
  from model.sharding import make_mesh
  from model.transformer import init_params
  cfg, mesh = train_config().model, make_mesh(fsdp=-1)
  with jax.set_mesh(mesh):
    params = init_params(cfg, mesh, jax.random.key(0))[1]
  n_params, prompt = sum(a.size for a in jax.tree.leaves(params)), 512
  line, gemms, runs = (
      {"bench": "decode", "parameters": n_params, "prompt_tokens": prompt}, [measure_gemm(0.2, 1024)], [])
  for batch in args.batch:
    n_tokens = 32 + 2 * batch  # Prompts are read one after the other, while others make tokens.
    engine = Engine(cfg, params, mesh, slots=batch, max_length=prompt + n_tokens, keep_prefixes=False)
    prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, prompt)).tolist()
    seconds, prefill = [], []
    for i in range(WARM_UP + args.rounds):
      read_s, made_s, made = _generate(engine, prompts, Sampling(max_tokens=n_tokens, temperature=0.0))
      assert made > 16 * batch, made
      if i >= WARM_UP:
        seconds.append(made_s / made * batch)
        prefill.append(batch * prompt / read_s)
      gemms.append(measure_gemm(0.2, 1024))
    forward = flops_per_token(cfg, prompt + n_tokens, n_params) / 3
    n_bytes = decode_bytes_per_token(cfg, n_params, batch, prompt + n_tokens // 2)
    speed = _speed(seconds, batch, gemms, batch * forward)
    runs.append({"batch": batch, **speed, "prefill_tokens_per_s": round(statistics.median(prefill)),
                 "compile_s": round(engine.counters["compile_s"], 1),
                 "bytes_per_s": round(speed["tokens_per_s"] * n_bytes)})
  return line | runs[-1] | {"runs": runs}


def _generate(engine, prompts, sampling):
  """(seconds until all prompts are read, seconds in which all make tokens, how many they make then)."""
  begin, waiting, n = time.perf_counter(), set(range(len(prompts))), 0
  with contextlib.closing(engine.generate(prompts, sampling)) as tokens:
    for token in tokens:
      if waiting:
        waiting.discard(token.request)
        read = time.perf_counter()
      elif token.finish is not None:
        return read - begin, time.perf_counter() - read, n
      else:
        n += 1


def engine(args):
  from experiments.bench.engine import run
  for name in ("batch", "prompt", "tokens", "prefill"):
    if (least := min(getattr(args, name)) if name == "batch" else getattr(args, name)) < 1:
      raise ValueError(f"--{name}={least} must be at least 1")
  return run(args)


def serve(args):
  try:
    from experiments.bench.serve import run
  except ImportError as e:
    raise ValueError(f"{e}; pip install -e '.[test]'") from None
  return run(args)


def data(args):
  from data.config import DataConfig, SourceConfig, TokenizerConfig
  from data.pipeline import Rows, make_batches
  from data.prepare import prepare
  B, T = 8, 512
  line = {"bench": "data", "batch_size": B, "seq_len": T}
  with tempfile.TemporaryDirectory() as folder:
    source = SourceConfig(name="synthetic", kind="synthetic", documents=4000)
    cfg = DataConfig(sources=[source], tokenizer=TokenizerConfig(vocab_size=512), cache_path=folder)
    start = time.perf_counter()
    prepared = prepare(cfg.validate(), log=lambda *_: None)
    line["prepare_s"] = round(time.perf_counter() - start, 1)
    line["prepared_tokens"] = prepared.count("train", "tokens")
    batches = make_batches(Rows(prepared, cfg, seq_len=T, batch_size=B), start_step=0, slots=range(B),
                           prefetch=cfg.prefetch)
    seconds = []
    for _ in range(WARM_UP + max(args.rows // B, args.rounds)):
      start = time.perf_counter()
      next(batches)
      seconds.append(time.perf_counter() - start)
  seconds = seconds[WARM_UP:]
  mean = statistics.mean(seconds)  # Batches come in bursts, made ahead: the median would say too little.
  return line | {"rows_per_s": round(B / mean), "tokens_per_s": round(B * T / mean),
                 "step_ms": round(1e3 * mean, 2)}


ROOFLINE = {  # Name -> changes of the fixed case.
  "512 wide, 4 layers, vocabulary 32000": dict(n_layers=4, unroll=1),
  "768 wide, 2 layers, vocabulary 4096": dict(n_layers=2, d_model=768, n_heads=12, d_ff=2048, vocab_size=4096,
                                              unroll=1),
}


def roofline(args):
  from experiments.bench.case import compile_step, train_config
  from model.sharding import make_mesh
  from train.chips import measure_copy, measure_cpu
  from train.roofline import estimate_step
  chip, runs = measure_cpu(), []
  for name, changes in ROOFLINE.items():
    cfg = train_config(**changes).validate(1)
    step, _, _ = compile_step(cfg, make_mesh(fsdp=-1))
    seconds, peaks, copies = [], [], []
    for _ in range(WARM_UP + args.rounds):
      start = time.perf_counter()
      step()
      seconds.append(time.perf_counter() - start)
      peaks.append(max(measure_gemm(0.3, 1024).values()))
      copies.append(measure_copy(0.3))
    # Of each round what the machine had to give in it: others use it too.
    peak, copy = statistics.median(peaks), statistics.median(copies)
    now = dataclasses.replace(chip, flops={"float32": peak, "bfloat16": peak}, hbm_bandwidth=copy)
    modelled, measured = estimate_step(cfg, now, 1), statistics.median(seconds[WARM_UP:])
    runs.append({"model": name, "measured_ms": round(1e3 * measured, 1),
                 "modelled_ms": round(1e3 * modelled.step_s, 1),
                 "modelled_over_measured": round(modelled.step_s / measured, 2),
                 "terms_ms": {term: round(1e3 * s, 1) for term, s in modelled.seconds.items()},
                 "gemm_flops_per_s": round(peak), "copy_bytes_per_s": round(copy)})
  return {"bench": "roofline", "runs": runs}


def _speed(seconds, tokens, gemms, flops):
  """What the median step says, beside the machine's speed in the same minutes."""
  step_s = statistics.median(seconds)
  best = {library: round(max(gemm[library] for gemm in gemms)) for library in gemms[0]}
  peak = max(best.values())
  typical = statistics.median(max(gemm.values()) for gemm in gemms)
  return {"tokens_per_s": round(tokens / step_s, 1), "step_ms": round(1e3 * step_s, 1), "steps": len(seconds),
          "flops_per_s": round(flops / step_s), "gemm_flops_per_s": peak,
          "gemm_median_flops_per_s": round(typical), "gemm_by_library": best,
          "fraction_of_gemm_peak": round(flops / step_s / peak, 3)}


def main(argv=None):
  try:
    args = _parse(argv)
  except ValueError as e:
    print(f"experiments.bench: error: {e}", file=sys.stderr)
    return 2
  from data.flags import versions
  if args.bench not in (engine, serve):
    from train.host import keep_memory  # As training does, and serving does not: one arena costs it 15 %.
    keep_memory()
  try:
    line = args.bench(args)
  except (ValueError, ServerFailed) as e:
    if args.bench not in (engine, serve):
      raise
    what = "error" if isinstance(e, ValueError) else "failed"
    print(f"experiments.bench {args.case}: {what}: {e}", file=sys.stderr)
    return getattr(e, "code", 2)
  line |= {"peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
           "load": os.getloadavg(), "cpus": os.cpu_count(),
           "versions": versions(["jax", "jaxlib", "flax", "numpy"])}
  print(json.dumps(line), flush=True)
  for fault in line.get("faults", ()):
    print(f"experiments.bench {line['bench']}: FAULT: {fault}", file=sys.stderr)
  return 1 if line.get("faults") else 0


def _parse(argv):
  parser = argparse.ArgumentParser(prog="experiments.bench", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  cases = parser.add_subparsers(dest="case", required=True)
  batches = lambda text: [int(n) for n in text.split(",")]
  for case in (train, decode, engine, serve, data, roofline):
    sub = cases.add_parser(case.__name__, allow_abbrev=False)
    sub.set_defaults(bench=case, parser=sub)
    if case is serve:
      add_flags(sub)
      continue
    sub.add_argument("--rounds", type=int, default=10, help="steps that count")
    if case is train:
      sub.add_argument("--against", choices=["torch"], help="take turns with PyTorch eager")
    if case is decode:
      sub.add_argument("--batch", type=batches, default=[1, 8], help="requests that run together")
    if case is engine:
      sub.add_argument("--model", required=True, metavar="DIR", help="an imported model; float32")
      sub.add_argument("--against", choices=["transformers"], help="take turns with it, on the same weights")
      sub.add_argument("--batch", type=batches, default=[1, 8, 16], help="texts that are made together")
      for name, default, text in (("prompt", 128, "tokens before them"), ("tokens", 32, "of each, a round"),
                                  ("prefill", 512, "tokens of the prompt that is read")):
        sub.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    if case is data:
      sub.add_argument("--rows", type=int, default=2000)
  args, unknown = parser.parse_known_args(argv)
  if unknown:
    near = nearest(unknown[0].partition("=")[0], args.parser._option_string_actions)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"unknown argument {unknown[0]}{hint}")
  if getattr(args, "rounds", 10) < 10:
    raise ValueError(f"--rounds={args.rounds} must be at least 10: fewer say nothing on a noisy machine")
  return args


if __name__ == "__main__":
  sys.exit(main())

"""What a finished run shows: its score beside simple models of the same text, a sample, a plot, and the next
commands."""
import itertools
import pathlib

import jax

from data.baselines import BASELINE
from data.prepare import documents
from infer.engine import Engine
from infer.load import decode_config, load_params, open_run
from infer.sampling import Sampling
from infer.text import complete, encode_prompt
from train.metrics import read_metrics
from train.plot import plot_run

MOST_BYTES = 20_000_000  # Of training text that a baseline reads.


def write_report(cfg, workdir: pathlib.Path, run, command: str) -> None:
  """Writes DIR/report.md and DIR/plot.png, and prints the former. `run` is train.loop.Run."""
  if jax.process_count() > 1:
    return  # One process can make it afterwards: the same command without the others.
  print("\nreport: baselines, sample and plot ...", flush=True)
  lines = read_metrics(workdir / "metrics.jsonl")
  parts = [f"# {workdir}", _scores(cfg, run, lines), _sample(cfg, workdir, run.mesh)]
  plot_run(workdir / "metrics.jsonl", workdir / "plot.png")
  parts.append(_next_commands(workdir, command))
  text = "\n\n".join(part for part in parts if part) + "\n"
  (workdir / "report.md").write_text(text)
  print(f"\n{text}", flush=True)


def _scores(cfg, run, lines):
  evals = [line for line in lines if "eval/val/bpb" in line]
  if not evals:
    return ""
  steps = [line for line in lines if "loss" in line]
  rows = [(f"this model after {evals[-1]['step']} steps, {steps[-1]['tokens']:,} tokens",
           evals[-1]["eval/val/bpb"])]
  if cfg.report.baselines:
    held_out = "".join(text for _, _, text in documents(run.prepared, "val")).encode()
    read = _text_read(cfg, run)
    titles = {"gzip": "gzip -9 of the held-out text",
              "ngram5": f"order-5 byte n-grams of the {len(read) / 1e6:.1f} MB that the model read"}
    rows += [(titles[name], BASELINE[name](read, held_out)) for name in cfg.report.baselines]
  width = max(len(name) for name, _ in rows)
  table = "\n".join(f"| {name:<{width}} | {bits:.3f} |" for name, bits in rows)
  n_documents, n_bytes = run.prepared.count("val", "documents"), run.prepared.count("val", "bytes")
  return (f"Bits per byte of {n_documents} held-out documents ({n_bytes / 1e3:,.0f} kB); less is better:\n\n"
          f"| {'':<{width}} | bits/byte |\n|{'-' * (width + 2)}|---|\n{table}")


def _text_read(cfg, run) -> bytes:
  """The training text in the order in which the run read it, or its first MOST_BYTES."""
  text, size = [], 0
  for step, slot in itertools.product(range(cfg.steps), range(cfg.batch_size)):
    row = run.rows.row(step, slot)
    text.append(run.prepared.tokenizer.decode(row["targets"][row["segments"] > 0].tolist()).encode())
    size += len(text[-1])
    if size > MOST_BYTES:
      break
  return b"".join(text)


def _sample(cfg, workdir, mesh):
  """As a user would, from what is on disk."""
  if not cfg.report.prompts:
    return ""
  run = open_run(workdir)
  params, *_ = load_params(run, decode_config(run.model, mesh), mesh)
  prompts = [encode_prompt(run.tokenizer, prompt) for prompt in cfg.report.prompts]
  engine = Engine(run.model, params, mesh, stop_ids=(run.tokenizer.eos_id,), slots=len(prompts),
                  max_length=max(map(len, prompts)) + cfg.report.n_tokens)
  settings = [Sampling(max_tokens=cfg.report.n_tokens, temperature=cfg.report.temperature, seed=i)
              for i in range(len(cfg.report.prompts))]
  done = complete(engine, run.tokenizer, prompts, settings)
  return "\n\n".join(["A sample (the first words were given):",
                      *(f"```\n{prompt}{text.text}\n```" for prompt, text in zip(cfg.report.prompts, done))])


def _next_commands(workdir, command):
  return f"""Everything is in {workdir}: report.md, plot.png, metrics.jsonl, config.json, checkpoints/

    {command} --config.steps=N --allow_change=steps   # train on, to N steps
    python -m infer.generate --run={workdir} --prompt="def "   # talk to it
    python -m train.checkpoint show {workdir}   # what it learned, by name and shape
    python -m train.plot {workdir}   # the plot again, or several runs in one"""

"""What a run will read: shares, epochs and packing over its steps, or the rows of one as text.

python -m data.inspect --config=configs/quickstart.py --steps=1000
python -m data.inspect --config=configs/quickstart.py --step=7
"""
import argparse
import collections
import functools
import sys
import typing

import numpy as np
import rich.console
import rich.table

from data import flags

if typing.TYPE_CHECKING:
  from data.pipeline import Rows


def summarise(rows: "Rows", steps: int) -> list[dict]:
  """Of each source over the first `steps` steps, without reading a token.

  Returns:
    source, target and rows (shares of the rows), tokens (share of the trained tokens), epochs,
    documents (distinct ones seen), of (how many there are), packing (share of its rows' places that
    is no padding).
  """
  n_rows = steps * rows.batch_size
  drawn, tokens = np.zeros(len(rows.sources), np.int64), np.zeros(len(rows.sources), np.int64)
  documents = collections.defaultdict(set)
  for number in range(n_rows):
    i, n = rows.mixture.locate(number)
    pieces = rows.sources[i].pieces(n)
    drawn[i] += 1
    tokens[i] += sum(length for _, _, length in pieces)
    documents[i].update(d for d, _, _ in pieces)
  target = rows.mixture.target(n_rows)
  return [
    {
      "source": name,
      "target": target[i],
      "rows": drawn[i] / n_rows,
      "tokens": tokens[i] / tokens.sum(),
      "epochs": drawn[i] / epochs.n_rows,
      "documents": len(documents[i]),
      "of": epochs.source.count(rows.split, "documents"),
      "packing": tokens[i] / max(1, drawn[i] * rows.seq_len),
    }
    for i, (name, epochs) in enumerate(zip(rows.names, rows.sources))
  ]


def _print_summary(console, rows, steps):
  table = rich.table.Table(
    title=f"{steps:,} steps of {rows.batch_size} rows of {rows.seq_len} tokens"
  )
  table.add_column("source")
  for column in ("target", "rows", "tokens", "epochs", "documents seen", "packing"):
    table.add_column(column, justify="right")
  for s in summarise(rows, steps):
    table.add_row(
      s["source"],
      f"{s['target']:.2%}",
      f"{s['rows']:.2%}",
      f"{s['tokens']:.2%}",
      f"{s['epochs']:.3f}",
      f"{s['documents']:,} of {s['of']:,}",
      f"{s['packing']:.2%}",
    )
  console.print(table)
  for stage in rows.mixture.stages[1:]:
    shares = ", ".join(f"{name} {share:.2%}" for name, share in zip(rows.names, stage.shares))
    console.print(f"from step {stage.first_row // rows.batch_size:,}: {shares}", highlight=False)


def _print_step(console, rows, step):
  for slot in range(rows.batch_size):
    row = rows.row(step, slot)
    console.rule(f"step {step} slot {slot}", align="left")
    for segment, piece in enumerate(rows.address(step, slot), start=1):
      console.print(
        f"{piece.source} {piece.document} [{piece.start}:{piece.stop}]",
        style="bold cyan",
        markup=False,
        soft_wrap=True,
        highlight=False,
      )
      text = rows.tokenizer.decode(row["targets"][row["segments"] == segment].tolist())
      console.print(text, markup=False, highlight=False, soft_wrap=True)
    if padding := int((row["segments"] == 0).sum()):
      console.print(f"[dim]{padding} places of padding")


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog="python -m data.inspect", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--steps", type=int, help="summarise so many steps; the default is those of the config"
  )
  parser.add_argument(
    "--step", type=int, help="print the rows of this step, decoded, with their addresses"
  )
  config, args = flags.load(parser, argv)
  from data.pipeline import Rows  # Grain takes a second to import: a mistake is named before.
  from data.prepare import prepare
  try:
    if args.steps is not None and args.steps < 1:
      raise ValueError(f"--steps={args.steps} must be at least 1")
    if args.step is not None and args.step < 0:
      raise ValueError(f"--step={args.step} must be at least 0")
    prepared = prepare(config.data, log=functools.partial(print, file=sys.stderr))
    rows = Rows(
      prepared,
      config.data,
      seq_len=config.seq_len,
      batch_size=config.batch_size,
      seed=config.seed,
      steps=config.steps,
    )
  except ValueError as error:
    print(f"{parser.prog}: error: {error}", file=sys.stderr)
    return 2
  console = rich.console.Console()
  if args.step is not None:
    _print_step(console, rows, args.step)
  else:
    _print_summary(console, rows, args.steps or config.steps)
  return 0


if __name__ == "__main__":
  sys.exit(main())

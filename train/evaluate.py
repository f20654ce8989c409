"""Loss and bits per byte of the validation rows, in order, on the averaged weights if there are any."""
import collections
import math
import time

import jax

from data.pipeline import Rows, val_batches
from train.metrics import read_metrics
from train.together import agree


class Evaluation:
  """Attributes:
    seconds: of the last evaluation.
  """

  def __init__(self, cfg, prepared, feed, clock):
    self.cfg, self.feed, self.clock, self.seconds = cfg, feed, clock, 0.0
    self._last = None, {}  # (step, metrics).
    self.rows = None
    if prepared.count("val", "tokens"):
      self.rows = Rows(prepared, cfg.data, seq_len=cfg.seq_len, batch_size=cfg.batch_size, split="val")

  def is_due(self, step: int) -> bool:
    every = self.cfg.eval.every
    return self.rows is not None and (step in (0, self.cfg.steps) or every is not None and step % every == 0)

  def is_pending(self, step: int, path) -> bool:
    """Whether the run was stopped before it could finish the evaluation of this step. Process 0 reads, all
    agree."""
    done = (any(line["step"] == step and "eval/val/loss" in line for line in read_metrics(path))
            if path.exists() else False)
    return self.is_due(step) and not agree("evaluation", self.clock, done)[0]

  def at(self, step: int) -> dict:
    """The metrics of this step; empty if it was not evaluated."""
    return self._last[1] if self._last[0] == step else {}

  def _next(self, batches):
    with self.clock.within("waiting for data"):
      return next(batches, None)

  def __call__(self, step, state, step_fn, write, stop) -> bool:
    """Evaluates and writes the metrics. False: a signal to stop cut it short, and the resumed run does it
    again."""
    start, total = time.perf_counter(), collections.Counter()
    params = state.params if state.ema is None else state.ema
    with self.clock.within("evaluation"):
      batches = val_batches(self.rows, slots=self.feed.slots, limit=self.cfg.eval.rows)
      while (batch := self._next(batches)) is not None:
        if jax.process_count() == 1 and stop.received:
          return False
        sums = jax.device_get(step_fn(params, self.feed.put(batch)))
        total.update({name: value.item() for name, value in sums.items()})
    self.seconds = time.perf_counter() - start
    self._last = step, {"eval/val/loss": total["nll"] / total["tokens"],
                        "eval/val/bpb": total["nll"] / math.log(2) / total["bytes"]}
    write(step, {**self._last[1], "eval/val/tokens": total["tokens"], "eval/val/s": self.seconds})
    return True

"""What is written about each step: metrics, one step late, and the rows of the steps that were skipped."""
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from model.count import active_parameters, flops_per_token
from train.metrics import describe_mfu, mfu
from train.optim import path_name

FIRST = ("loss", "grad_norm", "lr")  # In this order, then the others.
HIDDEN = ("tokens", "sigmas", "z")


class TooManySkips(RuntimeError):
  """More steps in a row were skipped than optim.max_skips."""


class LostLoss(RuntimeError):
  """An auxiliary loss that is asked for does not arrive."""


class StepLog:
  """Metrics of a step are read when the next one is under way, so the device never waits for the host.

  Attributes:
    tokens: trained on so far, over all runs of this workdir.
  """

  def __init__(self, cfg, workdir, rows, writer, progress, tokens):
    self.cfg, self.workdir, self.rows, self.writer, self.progress = cfg, workdir, rows, writer, progress
    self.tokens, self._pending, self._read = tokens, None, time.perf_counter()

  def describe(self, params, peak, source):
    """Says what the model costs, and against which peak (train.metrics.peak_flops) its use is counted."""
    n_params, active = (sum(math.prod(a.shape) for a in jax.tree.leaves(params)),
                        active_parameters(self.cfg.model, params))
    self._flops_per_token = flops_per_token(self.cfg.model, self.cfg.seq_len, active)
    self._peak = peak
    met = f"{n_params / 1e6:.1f}M parameters" + (
        f", of which a token meets {active / 1e6:.1f}M" if active < n_params else "")
    self.progress.note(f"model: {met}, {self._flops_per_token / 1e6:.1f} MFLOP a token")
    self.progress.note(describe_mfu(source))
    self._read = time.perf_counter()

  def later(self, step, metrics, params, wait_s):
    """Queues this step's metrics and writes those of the step before.

    Args:
      params: the newest, to look for what is not finite.
      wait_s: how long the step waited for its rows.
    """
    before, self._pending = self._pending, (step, metrics, wait_s)
    self._write(before, params)

  def flush(self, params):
    before, self._pending = self._pending, None
    self._write(before, params)

  def pause(self, seconds):
    """Time that was not spent on steps."""
    self._read += seconds

  def write(self, step, values):
    self.writer.write(step, values)
    self.progress.update(step, values)

  def _write(self, queued, params):
    if queued is None:
      return
    step, metrics, wait_s = queued
    metrics = jax.device_get(metrics)
    now = time.perf_counter()
    seconds, self._read = now - self._read, now
    tokens, skipped = float(metrics["tokens"]), bool(metrics["skipped"])
    self.tokens += 0 if skipped else int(tokens)
    others = sorted(k for k, v in metrics.items() if np.ndim(v) == 0 and k not in FIRST + HIDDEN)
    if step % self.cfg.log.every == 0 or step == self.cfg.steps or skipped:
      self.write(step, {**{k: float(metrics[k]) for k in (*FIRST, *others)}, "tokens": self.tokens,
                        "tokens_per_s": tokens / seconds,
                        "mfu": mfu(tokens / seconds * self._flops_per_token, self._peak),
                        "data_wait_ms": 1e3 * wait_s, "step_ms": 1e3 * seconds, **_routers(metrics)})
    if step == 1:
      self._check_balance(metrics)
    if skipped:
      self._explain(step, metrics, params)

  def _check_balance(self, metrics):
    """A loss that the settings ask for is there: it is never exactly 0, however even the experts' loads.

    Raises:
      LostLoss: it is 0.
    """
    balance = self.cfg.balance
    for name, setting in (("balance_loss", "loss"), ("router_z_loss", "z_loss"),
                          ("sequence_loss", "sequence_loss")):
      weight = getattr(balance, setting)
      if weight and metrics.get(name, 0.0) == 0.0:  # Not a number is another matter.
        raise LostLoss(f"balance.{setting}={weight}, but {name} is {metrics.get(name)} in the first step: "
                       f"model.ffn={self.cfg.model.ffn!r} does not report it")

  def _explain(self, step, metrics, params):
    """A skipped step: its rows, the worst first, in a file; too many in a row end the run."""
    loss_B = np.asarray(metrics["nll_B"]) / np.maximum(metrics["weight_B"], 1)
    worst = np.argsort(np.where(np.isfinite(loss_B), -loss_B, -np.inf), kind="stable").tolist()
    rows = [{"slot": slot, "loss": str(loss_B[slot]),
             "pieces": [piece._asdict() for piece in self.rows.address(step - 1, slot)]} for slot in worst]
    bad = [path_name(path) for path, a in jax.tree_util.tree_flatten_with_path(params)[0]
           if not jnp.isfinite(a).all()]
    numbers = {name: str(metrics[name]) for name in ("loss", "grad_norm", "sigmas")}
    path = self.workdir / "skipped" / f"{step}.json"
    if jax.process_index() == 0:
      path.parent.mkdir(exist_ok=True)
      path.write_text(json.dumps(
          {"step": step, **numbers, "non_finite_parameters": bad, "rows": rows}, indent=1))
    self.progress.note(f"WARNING: step {step} skipped: loss {metrics['loss']:.4g}, gradient norm "
                       f"{metrics['grad_norm']:.4g}, {metrics['sigmas']:.1f} standard deviations above the "
                       f"mean; its rows are in {path}", style="yellow")
    if metrics["skipped"] > self.cfg.optim.max_skips:
      raise TooManySkips(
          f"{int(metrics['skipped'])} steps skipped in a row, more than "
          f"optim.max_skips={self.cfg.optim.max_skips}; non-finite parameters: {bad[:3] or 'none'}; "
          f"rows in {path.parent}. To go on: a lower optim.lr, or "
          f"optim.spike_sigma={self.cfg.optim.spike_sigma} raised or None, "
          "with --allow_change for what you change")


def _routers(metrics):
  """The health of the routers, per layer as lists, and of the worst layer as numbers that can be plotted."""
  layers = {name: np.asarray(v) for name, v in metrics.items() if name.startswith("moe/")}
  worst = {f"{name}/worst": v.min() if name == "moe/entropy" else v.max() for name, v in layers.items()}
  return layers | worst

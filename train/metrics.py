"""What a run says while it runs: DIR/metrics.jsonl, W&B, TensorBoard, the live display, and MFU.

metrics.jsonl is the record: one JSON object a line, appended by one write, floats to the last bit.
The line of a step has step, loss, grad_norm, lr, tokens, tokens_per_s, mfu, data_wait_ms, step_ms;
the line of an evaluation has step and eval/NAME/loss, eval/NAME/bpb. JSON has no NaN: non-finite
floats are the strings "NaN", "Infinity" and "-Infinity", which `read_metrics` turns back.

W&B runs in a process of its own that follows metrics.jsonl (`python -m train.metrics`), so nothing
that the network does can slow a step, stop the run or hold up its exit.
"""
import argparse
import collections
import errno
import importlib.util
import json
import math
import os
import pathlib
import secrets
import subprocess
import sys
import threading
import time

from train.chips import find_chip, measure_gemm

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
WANDB_WAIT_S, WANDB_LAST_WORDS_S = 10, 60  # How long a run that ends waits for W&B; how long W&B goes on.

MFU_CONVENTION = (
  "6 FLOPs per token and matmul parameter (the head counts, the embedding look-up does not) plus 12 per head "
  "dimension and query-key pair that the causal mask and the window let through; remat does not count")


class MetricsWriter:
  """Appends to DIR/metrics.jsonl, and sends the same to where `log` says.

  On resume, call `truncate_after(restored step)` before the first `write`. Processes other than the
  first pass primary=False and write nothing.
  """

  def __init__(self, run_dir, log, *, primary: bool = True):
    """`log` is a train.config.LogConfig: its wandb, wandb_project and tensorboard are read."""
    self.path = pathlib.Path(run_dir) / "metrics.jsonl"
    self._log, self._primary = log, primary
    self._file = self._wandb = self._tensorboard = None
    self._kept_step = None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def truncate_after(self, step: float):
    """Drops lines of later steps and a partial last line: all or nothing, whenever it is killed."""
    self._kept_step = None if math.isinf(step) else step
    if not self._primary or not self.path.exists():
      return
    partial = self.path.with_suffix(".partial")
    with open(partial, "wb") as f:
      for line in self.path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n") and json.loads(line)["step"] <= step:
          f.write(line)
      f.flush()
      os.fsync(f.fileno())
    os.replace(partial, self.path)

  def write(self, step: int, values: dict[str, object]):
    """Adds one line. Values are numbers (NumPy's and jax's scalars too), strings, or None for unknown."""
    if not self._primary:
      return
    if self._file is None:
      self._open()
    line = {"step": int(step), **{k: _plain(v) for k, v in values.items()}}
    text = json.dumps(line, allow_nan=False).encode() + b"\n"
    if self._file.write(text) < len(text):
      raise OSError(errno.ENOSPC, "only part of a line could be written", str(self.path))
    if self._tensorboard is not None:
      for name, value in values.items():
        if isinstance(_plain(value), int | float):
          self._tensorboard.add_scalar(name, float(value), step)
    if self._wandb is not None and self._wandb.poll() is not None:
      self._say_wandb_failed()

  def close(self):
    """Flushes everything. Waits a few seconds for W&B, which goes on for a minute in the background."""
    if self._file is not None:
      self._file.close()
    if self._tensorboard is not None:
      self._tensorboard.close()
    if self._wandb is not None:
      self._wandb.stdin.close()
      try:
        if self._wandb.wait(timeout=WANDB_WAIT_S):
          self._say_wandb_failed()
      except subprocess.TimeoutExpired:
        print(f"wandb is still uploading and has {WANDB_LAST_WORDS_S} s; what it does not manage: wandb sync "
              f"{self.path.parent}/wandb/*run-*", file=sys.stderr)
    self._file = self._tensorboard = self._wandb = None

  def _open(self):
    run_dir = self.path.parent
    run_dir.mkdir(parents=True, exist_ok=True)
    if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
      self.truncate_after(math.inf)
    self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
    if self._log.tensorboard:
      import tensorboardX
      purge = None if self._kept_step is None else self._kept_step + 1
      self._tensorboard = tensorboardX.SummaryWriter(  # Its own file names collide within a second.
        str(run_dir / "tensorboard"), purge_step=purge, filename_suffix=f".{time.time_ns()}")
    if self._log.wandb:
      command = [sys.executable, "-m", "train.metrics", f"--run={run_dir.absolute()}",
                 f"--mode={self._log.wandb}", f"--project={self._log.wandb_project}",
                 f"--offset={self._file.tell()}"]
      with open(run_dir / "wandb.log", "ab") as output:
        # A session of its own: Ctrl-C and a scheduler's signals to the run must not cut the last upload.
        self._wandb = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output,
                                       cwd=pathlib.Path(__file__).parents[1], start_new_session=True)

  def _say_wandb_failed(self):
    log = self.path.parent / "wandb.log"
    last = (log.read_text().strip().splitlines() or ["no message"])[-1]
    print(f"WARNING: wandb has stopped: {last} (see {log}); {self.path} is complete", file=sys.stderr)
    self._wandb.stdin.close()
    self._wandb = None


def check_log(config):
  """Raises ValueError where config.log asks for a package that is not installed; for flags.load(checks=)."""
  if config.log.tensorboard and importlib.util.find_spec("tensorboardX") is None:
    raise ValueError('log.tensorboard=True needs tensorboardX: pip install -e ".[tensorboard]"')
  if config.log.wandb and importlib.util.find_spec("wandb") is None:
    raise ValueError(f"log.wandb={config.log.wandb!r} needs wandb: pip install wandb")


def read_metrics(path) -> list[dict]:
  """The lines of a metrics.jsonl; a last line without its newline (a kill while writing) is left out.

  Raises:
    ValueError: a line that is not a JSON object with a step, by its number.
  """
  lines = []
  for number, line in enumerate(pathlib.Path(path).read_bytes().splitlines(keepends=True), 1):
    if line.endswith(b"\n"):
      try:
        values = json.loads(line)
        lines.append({"step": values["step"], **{k: _number(v) for k, v in values.items()}})
      except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}:{number} is not a line of metrics: {line[:80]!r}") from e
  return lines


def _number(value):
  return NON_FINITE.get(value, value) if isinstance(value, str) else value


def _plain(value):
  """A JSON value; float32 scalars become the double of the same value, vectors lists."""
  if getattr(value, "ndim", 0) == 1:
    return [_plain(v) for v in value]
  if value is None or isinstance(value, str | bool | int):
    return value
  value = value.item() if hasattr(value, "item") else value
  if isinstance(value, float) and not math.isfinite(value):
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
  return value


# The live display.

class Progress:
  """Shows a run: a live bar on a terminal, a plain line now and then elsewhere (CI logs)."""

  WINDOW = 50  # Steps that speed, time left and data wait are averaged over.
  QUIET_STEPS = 1000  # From one warning to the next.

  def __init__(self, steps: int, *, stream=None, every_s: float = 10.0, primary: bool = True):
    """`steps` is the step at which the run ends, `every_s` the pause between plain lines."""
    self._steps, self._every_s, self._primary = steps, every_s, primary
    self._stream = stream or sys.stdout
    self._recent = collections.deque(maxlen=self.WINDOW)  # (step_ms, data_wait_ms, tokens_per_s)
    self._step, self._values, self._evals = 0, {}, {}
    self._said_s, self._said_step, self._warned_step = -math.inf, None, -math.inf
    self._live = None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def update(self, step: int, values: dict[str, object]):
    """Takes what `MetricsWriter.write` takes; `step` counts the finished steps."""
    if not self._primary:
      return
    if evals := {k: v for k, v in values.items() if k.startswith("eval/") and isinstance(v, int | float)}:
      self._evals = evals
      self.note(f"step {step}  " + "  ".join(f"{k} {v:.4f}" for k, v in evals.items()))
    if "loss" in values:
      self._step, self._values = step, values
      self._recent.append([float(values.get(k) or 0) for k in ("step_ms", "data_wait_ms", "tokens_per_s")])
      self._watch_data()
      self._show()

  def note(self, text: str, style: str | None = None):
    """Prints a line of its own, above the bar if there is one."""
    if self._primary and self._live is not None:
      self._live.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
    elif self._primary:
      print(text, file=self._stream, flush=True)

  def close(self):
    """Leaves the last state on the screen."""
    if self._live is not None:
      self._live.stop()
      self._live = None
    elif self._recent and self._said_step != self._step:
      self.note(self.line())
      self._said_step = self._step

  def line(self) -> str:
    """"step 120/1000  loss 3.2145  45.2k tokens/s  mfu 41.0%  data wait 0.3%  left 1m20s"."""
    step_ms, wait_ms, tokens = self._means()
    mfu, speed = self._values.get("mfu"), self._values.get("tokens_per_s")
    mfu = mfu and speed and mfu * tokens / speed  # Over the same steps as the speed.
    return "  ".join([
      f"step {self._step}/{self._steps}", f"loss {self._values['loss']:.4f}", f"{_short(tokens)} tokens/s",
      "mfu n/a" if mfu is None else f"mfu {mfu:.1%}", f"data wait {wait_ms / max(step_ms, 1e-9):.1%}",
      f"left {duration((self._steps - self._step) * step_ms / 1000)}"])

  def _means(self):
    """Of the recent steps: ms a step, ms of it waiting for data, tokens a second."""
    step_ms, wait_ms, speeds = zip(*self._recent)
    tokens = sum(ms * speed for ms, speed in zip(step_ms, speeds) if math.isfinite(speed))
    return sum(step_ms) / len(step_ms), sum(wait_ms) / len(wait_ms), tokens / max(sum(step_ms), 1e-9)

  def _watch_data(self):
    step_ms, wait_ms, _ = self._means()
    if (len(self._recent) == self.WINDOW and wait_ms > 0.05 * step_ms
        and self._step - self._warned_step >= self.QUIET_STEPS):
      self._warned_step = self._step
      self.note(f"WARNING: the loader is the bottleneck: {wait_ms / step_ms:.0%} of the last {self.WINDOW} "
                f"steps ({wait_ms:.1f} of {step_ms:.1f} ms each) was waiting for data. Raise data.prefetch; "
                "`python -m experiments.bench data` tells how fast the loader is alone.", style="bold yellow")

  def _show(self):
    if self._stream.isatty():
      self._show_live()
    elif time.monotonic() - self._said_s >= self._every_s or self._step == self._steps:
      self._said_s, self._said_step = time.monotonic(), self._step
      self.note(self.line())

  def _show_live(self):
    if self._live is None:
      from rich.console import Console
      from rich.live import Live
      self._live = Live(get_renderable=self._render, console=Console(file=self._stream), refresh_per_second=4)
      self._live.start()

  def _render(self):
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text
    line = Text(self.line(), no_wrap=True, overflow="ellipsis")
    line.highlight_regex(r"(?<=loss )\S+", "bold cyan")
    shown = Table.grid(expand=True)
    shown.add_row(ProgressBar(total=self._steps, completed=self._step))
    shown.add_row(line)
    if self._evals:
      evals = "  ".join(f"{k.removeprefix('eval/')} {v:.4f}" for k, v in self._evals.items())
      shown.add_row(Text(f"last evaluation  {evals}", style="dim", no_wrap=True, overflow="ellipsis"))
    return shown


def _short(number):
  """12345 -> "12.3k"."""
  for unit in ("", "k", "M", "G"):
    if number < 1000 or unit == "G":
      return f"{number:.0f}" if not unit else f"{number:.1f}{unit}"
    number /= 1000


def duration(seconds):
  """3725 -> "1h02m"."""
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


# Model FLOPs utilisation.

def peak_flops(devices) -> tuple[float | None, str]:
  """FLOP/s of all `devices` (jax.devices()) together, and where the number is from.

  CPU devices are one machine a process: its peak is measured here, for a second. None: an unknown kind.
  """
  kind = devices[0].device_kind
  if devices[0].platform == "cpu":
    hosts = len({d.process_index for d in devices})
    peak = max(measure_gemm().values())
    return hosts * peak, (f"{hosts} x CPU at {peak / 1e9:.0f} GFLOP/s "
                          "(float32 GEMM, the better of NumPy's and XLA's, measured)")
  chip = find_chip(kind)
  if chip is None:
    return None, f"n/a (unknown peak for {kind!r}: add it to train.chips.CHIP)"
  peak = chip.flops["bfloat16"]
  return len(devices) * peak, f"{len(devices)} x {kind} at {peak / 1e12:.0f} TFLOP/s (bf16, data sheet)"


def mfu(flops_per_s: float, peak: float | None) -> float | None:
  """Share of the peak; None where the peak is unknown."""
  return None if peak is None else flops_per_s / peak


def describe_mfu(peak_source: str) -> str:
  """The line that a run prints once, so that its mfu can be compared with another's."""
  return f"mfu(convention={MFU_CONVENTION!r}, peak={peak_source})"


# The process that feeds W&B.

def _follow(args):
  """Logs each line added to metrics.jsonl until stdin closes: when the run ends, however it ends."""
  ended = threading.Event()
  threading.Thread(target=_outlive, args=(ended,), daemon=True).start()
  import wandb
  run_dir = pathlib.Path(args.run)
  id_path = run_dir / "wandb" / "run_id"
  id_path.parent.mkdir(exist_ok=True)
  if not id_path.exists():
    id_path.write_text(secrets.token_hex(4))
  config_path = run_dir / "config.json"
  config = json.loads(config_path.read_text())["config"] if config_path.exists() else None
  run = wandb.init(project=args.project, name=run_dir.name, id=id_path.read_text(), resume="allow",
                   mode=args.mode, dir=str(run_dir), config=config)
  run.define_metric("step")
  run.define_metric("*", step_metric="step")  # A resumed run repeats steps, which W&B's own counter forbids.
  with open(run_dir / "metrics.jsonl", "rb") as f:
    f.seek(args.offset)
    while True:
      last_look = ended.is_set()
      line = f.readline()
      if line.endswith(b"\n"):
        run.log({k: _number(v) for k, v in json.loads(line).items() if v is not None})
        continue
      f.seek(-len(line), os.SEEK_CUR)
      if last_look:
        break
      ended.wait(0.5)
  run.finish()


def _outlive(ended):
  """Says when the run has ended, and ends this process a while later, for a dead network keeps W&B trying."""
  sys.stdin.read()
  ended.set()
  time.sleep(WANDB_LAST_WORDS_S)
  os._exit(1)


def main():
  parser = argparse.ArgumentParser(prog="python -m train.metrics",
                                   description="Follows a run and feeds W&B; MetricsWriter starts it.")
  parser.add_argument("--run", required=True, help="the folder of the run")
  parser.add_argument("--mode", required=True, choices=("offline", "online"))
  parser.add_argument("--project", required=True)
  parser.add_argument("--offset", type=int, default=0, help="bytes of metrics.jsonl that W&B already has")
  _follow(parser.parse_args())


if __name__ == "__main__":
  main()

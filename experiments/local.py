"""Runs on this machine: a number at a time, each on cores or chips of its own, shown as they go."""
import concurrent.futures
import contextlib
import datetime
import fcntl
import glob
import os
import pathlib
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
import typing

from data.files import write_json
from experiments.cells import Outcome, Run, read_outcome
from train.launch import end_with_parent
from train.metrics import duration, read_metrics

PROGRAM = "train.main"
POLL_S = 0.1
FREE_WITHIN_S = 120.0  # A run whose sweep was killed saves, and lets go of its folder.
KILL_AFTER_S = 120.0  # One that is told to stop and does not.
STOPPED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)


class Place(typing.NamedTuple):
  """What one run at a time may use."""
  cores: tuple[int, ...]
  env: dict[str, str]


def split_machine(jobs: int) -> list[Place]:
  """As many places as runs go at a time, which share no core, GPU or TPU chip.

  Raises:
    ValueError: there are not so many.
  """
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))
  gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else [
    str(i) for i in range(len(glob.glob("/proc/driver/nvidia/gpus/*")))]
  chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    gpus, chips = [], []
  if jobs == 1:
    return [Place(tuple(cores), {})]
  for what, found in (("core", len(cores)), ("GPU", len(gpus)), ("TPU chip", len(chips))):
    if found and jobs > found:
      raise ValueError(f"--jobs={jobs}: each run has a {what} of its own, and there "
                       f"{'is' if found == 1 else 'are'} {found}; nearest valid: --jobs={found}")
  places = []
  for i in range(jobs):
    share = lambda things: things[i * len(things) // jobs:(i + 1) * len(things) // jobs]  # noqa: B023
    env = {"CUDA_VISIBLE_DEVICES": ",".join(share(gpus))} if gpus else {}
    if chips:  # A process that sees one chip, and no neighbours.
      env |= {"TPU_VISIBLE_CHIPS": str(i), "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
              "TPU_PROCESS_BOUNDS": "1,1,1"}
    places.append(Place(tuple(share(cores)), env))
  return places


def run_one(run: Run, place: Place | None = None, *, stop: threading.Event | None = None,
            prune: typing.Callable[[], bool] | None = None) -> Outcome | None:
  """Runs, or goes on with, train.main in run.workdir until it ends, and writes outcome.json there.

  Args:
    stop: once it is set, the run saves and ends.
    prune: asked now and then; where it says True the run is ended too, and its outcome is "pruned".

  Returns:
    None where the run was stopped, and is to go on another time.
  """
  stop, begin, pruned = stop or threading.Event(), time.monotonic(), False
  run.workdir.mkdir(parents=True, exist_ok=True)
  if (holder := _wait_until_free(run.workdir, stop)) is not None:
    return Outcome("failed", 2, 0.0, f"{run.workdir} is in use by process {holder}")
  if (ended := read_outcome(run.workdir)) is not None and ended.status != "failed":
    return ended  # By whoever held the folder.
  (run.workdir / "outcome.json").unlink(missing_ok=True)
  log = run.workdir / "output.log"
  with open(log, "ab", buffering=0) as output:
    command = [sys.executable, "-m", PROGRAM, *run.command]
    output.write(f"# {datetime.datetime.now():%Y-%m-%d %H:%M:%S} {shlex.join(command)}\n".encode())
    first = output.tell()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                               env=os.environ | (place.env if place else {}) | {"PYTHONUNBUFFERED": "1"},
                               start_new_session=True, preexec_fn=lambda: _settle(place))
    told = None
    while process.poll() is None:
      if told is None and (stop.is_set() or prune is not None and prune()):
        pruned, told = not stop.is_set(), time.monotonic()
        process.terminate()
      if told is not None and time.monotonic() - told > KILL_AFTER_S:
        process.kill()
      time.sleep(POLL_S)
  code, seconds = process.returncode, time.monotonic() - begin
  if pruned and code != 0:
    outcome = Outcome("pruned", code, seconds)
  elif code in STOPPED or told is not None and code != 0:
    return None
  else:
    outcome = Outcome("failed" if code else "done", code, seconds, _last_words(log, first) if code else None)
  write_json(run.workdir / "outcome.json", outcome._asdict())
  return outcome


def _settle(place):
  """In the child."""
  end_with_parent()
  if place is not None and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, place.cores)


def _wait_until_free(workdir, stop):
  """None, or the process that still holds the folder."""
  deadline = time.monotonic() + FREE_WITHIN_S
  while True:
    with open(workdir / "lock", "a+") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
      except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
    if time.monotonic() > deadline or stop.is_set():
      return holder
    time.sleep(POLL_S)


def _last_words(log, first):
  """The line in which a run says why it failed: the last of its output that is not blank."""
  with open(log, "rb") as file:
    file.seek(first)
    lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
  return lines[-1].strip()[:500] if lines else "it said nothing"


def run_local(runs: list[Run], jobs: int, board) -> dict[pathlib.Path, Outcome]:
  """All of them, `jobs` at a time. SIGTERM and Ctrl-C stop it: the runs under way save first.

  Args:
    board: told what begins and ends (`Board`).

  Returns:
    By workdir, how those ended that ended.

  Raises:
    ValueError: this machine has not so many cores, GPUs or chips.
  """
  places, ended, stop = queue.SimpleQueue(), {}, threading.Event()
  for place in split_machine(jobs):
    places.put(place)

  def work(run):
    if stop.is_set():
      return
    place = places.get()
    board.begin(run)
    try:
      outcome = run_one(run, place, stop=stop)
    except OSError as e:
      outcome = Outcome("failed", 1, 0.0, f"{type(e).__name__}: {e}")
    finally:
      places.put(place)
    if outcome is not None:
      ended[run.workdir] = outcome
    board.end(run, outcome)

  with until_signal(stop), concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    waiting = {pool.submit(work, run) for run in runs}
    while waiting:  # Not in one wait: the main thread takes the signals.
      done, waiting = concurrent.futures.wait(waiting, timeout=0.25)
      for future in done:
        future.result()
  return ended


@contextlib.contextmanager
def until_signal(stop: threading.Event):
  """Sets `stop` on SIGTERM and Ctrl-C."""
  before = {number: signal.signal(number, lambda *_: stop.set())
            for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


class Board:
  """What the sweep is doing: a live table on a terminal, a line for each end elsewhere."""

  def __init__(self, total: int, metric: str, jobs: int, estimates: dict | None = None, *, done: int = 0,
               stream=None):
    """
    Args:
      total: runs, those that are done included.
      estimates: a run's folder -> seconds that it is expected to take.
    """
    self._total, self._metric, self._jobs, self._done = total, metric, jobs, done
    self._estimates = estimates or {}
    self._stream = stream or sys.stdout
    self._running, self._lock, self._live = {}, threading.Lock(), None
    self._took = []  # (seconds, estimate or None) of the runs that ended.

  def __enter__(self):
    if self._stream.isatty():
      from rich.console import Console
      from rich.live import Live
      self._live = Live(get_renderable=self._render, console=Console(file=self._stream), refresh_per_second=2)
      self._live.start()
    return self

  def __exit__(self, *_):
    if self._live is not None:
      self._live.stop()

  def begin(self, run):
    with self._lock:
      self._running[run.workdir] = run, time.monotonic()

  def end(self, run, outcome):
    with self._lock:
      self._running.pop(run.workdir)
      if outcome is None:
        return self._say(f"stopped  {run.cell.name} seed {run.seed}; the same command goes on with it")
      self._done += 1
      self._took.append((outcome.seconds, self._estimates.get(run.workdir)))
      value = last_value(run.workdir, self._metric)
      what = {"done": f"{self._metric} {value:.4f}" if value is not None else "", "pruned": "pruned"}.get(
        outcome.status, f"exit {outcome.exit_code}: {str(outcome.error)[:120]}")
      style = "red" if outcome.status == "failed" else None
      self._say(f"[{self._done}/{self._total}] {outcome.status:6} {run.cell.name} seed {run.seed}  "
                f"{outcome.seconds:.0f} s  {what}  {self._left()}", style)

  def _left(self):
    """"left 3m20s", from what the runs took so far."""
    if not self._took or self._done >= self._total:
      return ""
    known = [(took, guess) for took, guess in self._took if guess]
    mean = sum(took for took, _ in self._took) / len(self._took)
    seconds = mean * (self._total - self._done) / self._jobs
    if known and len(known) == len(self._took):  # The others cost as much more than these as was expected.
      rest = sum(self._estimates.values()) - sum(guess for _, guess in known)
      seconds = rest * sum(took for took, _ in known) / sum(guess for _, guess in known) / self._jobs
    return f"left {duration(max(seconds, 0))}"

  def _say(self, text, style=None):
    if self._live is not None:
      self._live.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
    else:
      print(text, file=self._stream, flush=True)

  def _render(self):
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    shown = Table.grid(padding=(0, 2))
    shown.add_row(ProgressBar(total=self._total, completed=self._done, width=40),
                  f"{self._done}/{self._total} runs  {self._left()}")
    for run, since in list(self._running.values()):
      steps, line = run.cell.resolved.steps, _last_line(run.workdir)
      step = line.get("step", 0)
      loss = f"loss {line['loss']:.4f}" if isinstance(line.get("loss"), float) else "starting"
      shown.add_row(ProgressBar(total=steps, completed=step, width=40),
                    f"{run.cell.name} seed {run.seed}  step {step}/{steps}  {loss}  "
                    f"{time.monotonic() - since:.0f} s")
    return shown


def _last_line(workdir):
  """The newest step of a run that is under way."""
  try:
    return next((line for line in reversed(read_metrics(workdir / "metrics.jsonl")) if "loss" in line), {})
  except (OSError, ValueError):
    return {}


def last_value(workdir, metric: str) -> float | None:
  """The last value of a key of metrics.jsonl; None where there is none."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  lines = read_metrics(path) if path.exists() else []
  return next((line[metric] for line in reversed(lines) if isinstance(line.get(metric), int | float)), None)

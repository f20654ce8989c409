"""What the process around the training needs: its place among processes, signals, time, memory."""
import collections
import contextlib
import ctypes
import glob
import importlib.util
import os
import pathlib
import platform
import resource
import signal
import sys
import time

import jax
import numpy as np

from train.together import agree, join

ASK_EVERY_S = 2.0  # How often several processes tell each other whether one was told to stop.


def start_distributed(stall_s: float = 300.0) -> None:
  """Joins the other processes when a launcher or a TPU pod says that there are some; alone otherwise.

  Call it before StopSignal(): signals are ours, not those of JAX's preemption service.

  Raises:
    train.together.Apart: the others did not come.
  """
  jax.config.update("jax_enable_preemption_service", False)
  together = "JAX_COORDINATOR_ADDRESS" in os.environ
  if jax.config.jax_platforms == "cpu" and (jax.config.jax_num_cpu_devices > 1 or together):
    # Programs in flight side by side can starve each other's collectives for ever, or, between processes,
    # meet those of the other program.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # Between processes (Gloo) a collective that waits holds a thread of XLA's pool, which has one per device:
    # with all of them held a step stood still for ever, once in a few hundred. With one device a process the
    # threads of one program mixed up their messages ("Received data size doesn't match"): there it has one.
    n = jax.config.jax_num_cpu_devices
    os.environ.setdefault("NPROC", str(max(os.cpu_count(), 4 * n) if n > 1 else 1))
  if together:
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    join(stall_s, num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID"))
  elif _on_tpu_host() or int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1:
    join(stall_s)  # The cluster says who is who.


def _on_tpu_host():
  chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(chips) and importlib.util.find_spec("libtpu") is not None and jax.config.jax_platforms != "cpu"


def is_cpu_host() -> bool:
  """Whether the devices will be this machine's CPU, as far as can be said without asking JAX for them."""
  return jax.config.jax_platforms == "cpu" or not (_on_tpu_host() or glob.glob("/dev/nvidia[0-9]*"))


def keep_memory() -> None:
  """Makes glibc keep what XLA frees on a CPU, instead of handing gigabytes back to the kernel after each
  step, which must clear them page by page in the next: a fifth of the time of a step. Call it before JAX
  starts its threads."""
  if platform.libc_ver()[0] != "glibc":
    return
  trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_* of malloc.h.
  mallopt = ctypes.CDLL(None).mallopt
  mallopt(mmap_max, 0)  # Large blocks come from the heap too,
  mallopt(trim_threshold, -1)  # which never shrinks,
  mallopt(arena_max, 1)  # and is one for all threads.


class StopSignal:
  """SIGTERM and Ctrl-C, taken at a moment when the state can be saved.

  Before there is a state (`at_once`) the process ends where it is: what it was doing can be restarted.
  Afterwards the loop asks `requested` at each step; a second signal does not wait.
  """
  EXIT = {signal.SIGTERM: 143, signal.SIGINT: 130}

  def __init__(self, clock=None, watch=None):
    """`clock` and `watch` (train.together.Watch) are needed where there are several processes."""
    self._clock, self._watch = clock, watch
    self.at_once, self.received = True, None
    self._ask_at, self._asked = 0, (0, time.perf_counter())  # The next step to ask at; the last, and when.
    for number in self.EXIT:
      signal.signal(number, self._handle)

  def _handle(self, number, frame):
    if self.at_once or self.received == signal.SIGINT:
      # Not an exception: it could surface inside a library's callback, and be taken for a failure of the
      # library.
      print(f"stopped by {signal.Signals(number).name}; the same command starts again",
            file=sys.stderr, flush=True)
      if self._watch is not None:
        self._watch.stopped(number, self.EXIT[number])
      os._exit(self.EXIT[number])
    self.received = signal.Signals(number)

  def requested(self, step: int, now: bool = False) -> bool:
    """True on all processes at the same step, once any of them was told to stop.

    Asking costs a round over the network, so it is done every ASK_EVERY_S by the slowest process's clock.
    """
    if jax.process_count() == 1:
      return self.received is not None
    if step < self._ask_at and not now:
      return False
    since = (time.perf_counter() - self._asked[1]) / max(step - self._asked[0], 1)
    told = agree("stop", self._clock, np.array([self.received or 0, since], np.float32))
    self._asked = step, time.perf_counter()
    self._ask_at = step + int(np.clip(ASK_EVERY_S / max(told[:, 1].max(), 1e-3), 1, 100))
    if told[:, 0].any():
      self.received = signal.Signals(int(told[:, 0].max()))
    return self.received is not None

  @property
  def exit_code(self) -> int:
    return self.EXIT[self.received]


class Stopwatch:
  """Where the wall time goes: always in exactly one phase, so the phases sum to the whole.

  train.together tells the other processes where this one is by it.

  Attributes:
    step: of the training; the loop sets it.
    marks: how many phases were entered: the same in all processes when they are at the same place.
    notes: of one process, that a long phase goes on.
  """

  def __init__(self, phase: str = "start", age: float = 0.0):
    """`age`: seconds that count as spent in the first phase already (process_age())."""
    self.seconds, self.phase, self.since = collections.Counter(), phase, time.perf_counter() - age
    self.step, self.marks, self.notes = 0, 0, 0

  def enter(self, phase):
    """Ends the phase that runs and begins another; returns the one that ended."""
    now = time.perf_counter()
    self.seconds[self.phase] += now - self.since
    before, self.phase, self.since = self.phase, phase, now
    self.marks += 1
    return before

  @contextlib.contextmanager
  def within(self, phase):
    before = self.enter(phase)
    try:
      yield
    finally:
      self.enter(before)

  def describe(self) -> str:
    total = self._sum_up()
    parts = ", ".join(f"{name} {s:.1f} s ({s / total:.0%})" for name, s in self.seconds.most_common())
    return f"time: {total:.1f} s: {parts}"

  def describe_start(self) -> str:
    """Once the first step is done: where the time since the command went, in order."""
    total = self._sum_up()
    parts = ", ".join(f"{name} {s:.1f}" for name, s in self.seconds.items() if s >= 0.05)
    return f"first step after {total:.1f} s: {parts}"

  def _sum_up(self):
    now = time.perf_counter()
    self.seconds[self.phase] += now - self.since
    self.since = now
    return sum(self.seconds.values())


def process_age() -> float:
  """Seconds since this process was started, interpreter and first imports included; 0 where Linux does not
  tell."""
  try:
    started = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
  except (OSError, AttributeError):
    return 0.0


def peak_memory() -> str:
  """Of the first local device, or of this process where the device is its memory."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return f"{stats['peak_bytes_in_use'] / 2**30:.2f} GiB on {jax.local_devices()[0].device_kind}"
  return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of this process"

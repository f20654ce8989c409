"""What the process around the training needs: its place among processes, compile cache, signals, memory."""
import collections
import ctypes
import glob
import importlib.util
import os
import pathlib
import platform
import resource
import signal
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils


def start_distributed() -> None:
  """Joins the other processes when a launcher or a TPU pod says that there are some; alone otherwise."""
  if jax.config.jax_platforms == "cpu" and jax.config.jax_num_cpu_devices > 1:
    # More fake devices than cores: programs in flight side by side can starve each other's collectives for
    # ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
  if "JAX_COORDINATOR_ADDRESS" in os.environ:
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    jax.distributed.initialize(num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID"))
  elif _on_tpu_host() or int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1:
    jax.distributed.initialize()  # The cluster says who is who.


def _on_tpu_host():
  chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(chips) and importlib.util.find_spec("libtpu") is not None and jax.config.jax_platforms != "cpu"


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


class CompileCache:
  """The persistent compilation cache, with its hits and misses counted. A folder that cannot be written is a
  warning."""

  def __init__(self, path):
    self.path = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", path))
    self.counts = collections.Counter()
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      (self.path / ".writable").touch()
    except OSError as e:
      print(f"WARNING: compile cache {self.path} cannot be written ({e.strerror}): compiling without it",
            file=sys.stderr)
      self.path = None
    else:
      jax.config.update("jax_compilation_cache_dir", str(self.path))
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
      jax.monitoring.register_event_listener(self._count)

  def _count(self, event, **_):
    if event.startswith("/jax/compilation_cache/cache_"):
      self.counts[event.rsplit("_", 1)[-1]] += 1

  def describe(self) -> str:
    hits, misses = self.counts["hits"], self.counts["misses"]
    return "no cache" if self.path is None else f"cache hit {hits}/{hits + misses}, dir={self.path}"


class StopSignal:
  """SIGTERM and Ctrl-C, taken at a moment when the state can be saved.

  Before there is a state (`at_once`) the process ends where it is: what it was doing can be restarted.
  Afterwards the loop asks `requested` at each step; a second signal does not wait.
  """
  EXIT = {signal.SIGTERM: 143, signal.SIGINT: 130}

  def __init__(self):
    self.at_once, self.received = True, None
    for number in self.EXIT:
      signal.signal(number, self._handle)

  def _handle(self, number, frame):
    if self.at_once or self.received == signal.SIGINT:
      # Not an exception: it could surface inside a library's callback, and be taken for a failure of the library.
      print(f"stopped by {signal.Signals(number).name}; the same command starts again", file=sys.stderr, flush=True)
      os._exit(self.EXIT[number])
    self.received = signal.Signals(number)

  def requested(self, step: int) -> bool:
    """True on all processes at the same step, once any of them was told to stop."""
    if jax.process_count() == 1:
      return self.received is not None
    if step % 10:
      return False  # Asking costs a round over the network.
    asked = multihost_utils.process_allgather(np.int32(self.received or 0))
    if asked.any():
      self.received = signal.Signals(int(asked.max()))
    return bool(asked.any())

  @property
  def exit_code(self) -> int:
    return self.EXIT[self.received]


def peak_memory() -> str:
  """Of the first local device, or of this process where the device is its memory."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return f"{stats['peak_bytes_in_use'] / 2**30:.2f} GiB on {jax.local_devices()[0].device_kind}"
  return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of this process"

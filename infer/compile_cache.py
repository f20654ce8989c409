"""What was compiled is kept for the next start: JAX's persistent cache, in a folder that is safe to load
programs from."""
import collections
import contextlib
import ctypes
import os
import pathlib
import platform
import stat
import sys
import tempfile
import threading

PROBE_S = 4.0  # A folder that does not answer by then (a network file system that hangs) is done without.


def default_folder() -> str:
  """JAX_COMPILATION_CACHE_DIR (which JAX reads too), or a folder of this user's for all runs and commands."""
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(home, "assay", "jax")


def find_fault(folder: str, create: bool = True, wait_s: float = PROBE_S) -> str | None:
  """Why compiled programs must not be kept in `folder`, with the remedy; None if they can be.

  Who can write there can make this user run any code, so it must be this user's and no one else's to write.
  It is made with mode 0700 if `create`.
  """
  answer = []
  ask = lambda: answer.append(_look_at(folder, create))
  thread = threading.Thread(target=ask, name="compile cache", daemon=True)  # What hangs is left behind.
  thread.start()
  thread.join(wait_s)
  return answer[0] if answer else (f"does not answer within {wait_s:g} s; set JAX_COMPILATION_CACHE_DIR to a "
                                   "folder on another file system")


def _look_at(folder, create):
  try:
    if "://" in folder:  # A bucket says by itself who may write.
      from etils import epath  # As JAX does.
      path = epath.Path(folder)
      if create:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").write_text("")
      return None
    path = pathlib.Path(folder).absolute()
    if create:
      _make(path)
    if path.exists() and (fault := _find_stranger(path)):
      return fault
    with tempfile.TemporaryFile(dir=next(p for p in (path, *path.parents) if p.exists())) as f:
      f.write(b"x")  # Permission bits alone do not tell.
    return None
  except Exception as e:  # Whatever a file system or a library for one throws: it is only a cache.
    return f"cannot be written ({getattr(e, 'strerror', None) or f'{type(e).__name__}: {e}'}); {_ELSEWHERE}"


_ELSEWHERE = "set JAX_COMPILATION_CACHE_DIR to a folder of yours"


def _make(path):
  """The folder, and those above it that are missing, for this user alone."""
  for one in (*reversed(path.parents), path):
    if not one.exists():
      one.mkdir(mode=0o700, exist_ok=True)  # Another process may be as fast.


def _find_stranger(path):
  found = path.stat()
  owner, mode = found.st_uid, stat.S_IMODE(found.st_mode)
  if not stat.S_ISDIR(found.st_mode):
    return f"is a file, not a folder; move it away, or {_ELSEWHERE}"
  if owner != os.geteuid():
    return (f"belongs to {_user(owner)} (mode {mode:04o}), not to {_user(os.geteuid())}, and programs are "
            f"run from it; {_ELSEWHERE}")
  if mode & 0o022:
    return (f"of {_user(owner)} has mode {mode:04o}: others can write there, and programs are run from it; "
            f"chmod 700 {path}")
  return None


def _user(number):
  import pwd
  try:
    return f"{pwd.getpwuid(number).pw_name} ({number})"
  except KeyError:
    return f"user {number}"


def _warn(text):
  print(f"WARNING: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def many_frees():
  """For a while in which programs are loaded. The description of one is a hundred thousand small blocks;
  glibc sorts those that were freed ("fast bins") again after each large one, which took a tenth of the time:
  here there are none."""
  mallopt = ctypes.CDLL(None).mallopt if platform.libc_ver()[0] == "glibc" else lambda *_: None
  mxfast = 1  # M_MXFAST of malloc.h.
  mallopt(mxfast, 0)
  try:
    yield
  finally:
    mallopt(mxfast, 16 * ctypes.sizeof(ctypes.c_size_t))  # As it was.


class CompileCache:
  """The persistent compilation cache of this process, and what is compiled in it. A folder that cannot serve
  is a warning.

  Attributes:
    folder: None where there is no cache.
    seconds: program, by the name of its function -> of each time that it was compiled or loaded.
  """

  def __init__(self, folder: str | None = None):
    """`folder`: default_folder(), unless JAX is already told another."""
    import jax
    self.folder = str(folder or jax.config.jax_compilation_cache_dir or default_folder())
    self.seconds, self._counts = collections.defaultdict(list), collections.Counter()
    self._is_late = lambda: False
    if fault := find_fault(self.folder):
      _warn(f"compile cache {self.folder} {fault}. Compiling without it")
      self.folder = None
    if self.folder != jax.config.jax_compilation_cache_dir:
      from jax.experimental.compilation_cache import compilation_cache
      compilation_cache.reset_cache()  # JAX looks at the setting once.
      jax.config.update("jax_compilation_cache_dir", self.folder)
    worth_s = min(0.5, jax.config.jax_persistent_cache_min_compile_time_secs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", worth_s)
    jax.monitoring.register_event_listener(self._count_hit)
    jax.monitoring.register_event_duration_secs_listener(self._count_program)

  def _count_hit(self, event, **_):
    if event.startswith("/jax/compilation_cache/cache_"):
      self._counts[event.rsplit("_", 1)[-1]] += 1

  def _count_program(self, event, seconds, fun_name="?", **_):
    if event != "/jax/core/compile/backend_compile_duration":
      return
    name = fun_name.removeprefix("jit(").removesuffix(")")
    self.seconds[name].append(seconds)
    if self._is_late():
      _warn(f"{name} was compiled ({seconds:.1f} s) after the run's own programs, for the "
            f"{len(self.seconds[name])}. time: its shapes change, or it is made anew each time")

  def settle(self, programs, is_late=lambda: True):
    """From here on whatever is compiled when `is_late` is warned of. Asserts that each of `programs` was
    compiled once."""
    found = {name: len(self.seconds[name]) for name in programs}
    assert set(found.values()) == {1}, f"programs were to be compiled once each, not {found}"
    self._is_late = is_late

  def close(self):
    """Counts and warns no more."""
    from jax import monitoring
    monitoring.unregister_event_listener(self._count_hit)
    monitoring.unregister_event_duration_listener(self._count_program)

  def describe(self) -> str:
    """"cache hit 2/3, dir=/home/me/.cache/assay/jax; train_step 4.2 s, eval_step 1.1 s, 9 others 0.8 s"."""
    hits, misses = self._counts["hits"], self._counts["misses"]
    total = {name: sum(s) for name, s in sorted(self.seconds.items(), key=lambda item: -sum(item[1]))}
    shown = [f"{name} {total.pop(name):.1f} s" for name in list(total)[:3]]
    others = [f"{len(total)} others {sum(total.values()):.1f} s"] if total else []
    where = "no cache" if self.folder is None else f"cache hit {hits}/{hits + misses}, dir={self.folder}"
    return f"{where}; {', '.join(shown + others)}" if shown else where

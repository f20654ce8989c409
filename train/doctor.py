"""Is this machine fit for a run? python -m train.doctor [--workdir=DIR]

One line a check: OK, WARN (a run works, something will hurt) or BAD (a run would fail), and the remedy
for each that is not OK. Exits 3 if the lock of a process that is gone keeps the TPU, 1 if anything else is
BAD. Devices are asked in a process with a time limit: a hung libtpu is reported, not suffered. Nothing is
changed: a stale lock is only named.
"""
import argparse
import contextlib
import dataclasses
import glob
import importlib.metadata
import importlib.util
import json
import netrc
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

from packaging.requirements import Requirement

from data.flags import git_state
from infer.compile_cache import default_folder, find_fault

PACKAGE = "assay-lm"
PYTHON = ((3, 11), (3, 13))  # The first and the last that are supported.
GB = 1e9
STALE = 3  # The exit code.
TPU_LOCK = "/tmp/libtpu_lockfile"
TPU_FILES = ("/dev/accel", "/dev/vfio/")
PROBE = """
import json, time, jax, jax.numpy as jnp, numpy as np
devices = jax.devices()
big, dtype = (2048, jnp.float32) if devices[0].platform == "cpu" else (8192, jnp.bfloat16)
a = np.random.default_rng(0).standard_normal((256, 256))
product = jnp.matmul(jnp.asarray(a, jnp.float32), jnp.asarray(a, jnp.float32), precision="highest")
x = jnp.ones((big, big), dtype)
f = jax.jit(lambda x: x @ x)
f(x).block_until_ready()
times = []
for _ in range(5):
  start = time.perf_counter()
  f(x).block_until_ready()
  times.append(time.perf_counter() - start)
print(json.dumps(dict(
  platform=devices[0].platform, kind=devices[0].device_kind, count=len(devices), dtype=jnp.dtype(dtype).name,
  error=float(np.abs(np.asarray(product) - a @ a).max()), flops=2 * big ** 3 / min(times))))
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
  level: str  # OK | WARN | BAD
  name: str
  text: str
  remedy: str = ""
  code: int = 1  # What the command exits with if this is BAD.

  def __str__(self):
    remedy = f"\n      remedy: {self.remedy}" if self.remedy else ""
    return f"{self.level:5} {self.name:14} {self.text}{remedy}"


def check_python(version=None) -> Verdict:
  version = tuple(version or sys.version_info)[:3]
  text = ".".join(map(str, version))
  first, last = (".".join(map(str, v)) for v in PYTHON)
  if version[:2] < PYTHON[0]:
    return Verdict("BAD", "python", f"{text}, not {first} to {last}", f"install Python {last}")
  if version[:2] > PYTHON[1]:
    return Verdict("WARN", "python", f"{text}, newer than {last}: not tested", f"use Python {last}")
  return Verdict("OK", "python", text)


def check_packages(requirements: list[str] | None = None) -> list[Verdict]:
  """Installed versions against the floors in the metadata of our own package, extras apart."""
  if requirements is None:
    try:
      requirements = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
      return [Verdict("WARN", "packages", f"{PACKAGE} is not installed, so version floors are unknown",
                      "pip install -e . (in the checkout)")]
  bad, good = [], []
  for requirement in map(Requirement, requirements):
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
      continue
    name, remedy = requirement.name, f'pip install "{requirement}"'
    try:
      version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      bad.append(Verdict("BAD", "packages", f"{name} is missing", remedy))
      continue
    if requirement.specifier.contains(version, prereleases=True):
      good.append(f"{name} {version}")
    else:
      bad.append(Verdict("BAD", "packages", f"{name} {version} is not {requirement.specifier}", remedy))
  return bad or [Verdict("OK", "packages", ", ".join(good))]


def check_devices(timeout_s: float = 120, command: list[str] | None = None) -> list[Verdict]:
  """Asks jax for its devices and multiplies two matrices, in a process that is ended after `timeout_s`."""
  try:
    probe = subprocess.run(command or [sys.executable, "-c", PROBE], capture_output=True, text=True,
                           timeout=timeout_s)
  except subprocess.TimeoutExpired:
    return [Verdict("BAD", "devices", f"no answer within {timeout_s:g} s: the accelerator's runtime hangs",
                    "end the process that holds it (see tpu lock), or reboot; CPU only: JAX_PLATFORMS=cpu")]
  if probe.returncode:
    last = (probe.stderr.strip().splitlines() or [f"exit {probe.returncode}"])[-1]
    return [Verdict("BAD", "devices", last,
                    'pip install -U -e ".[tpu]" (or ".[gpu]"); to run on the CPU: JAX_PLATFORMS=cpu')]
  return _judge_devices(json.loads(probe.stdout.strip().splitlines()[-1]), _accelerator())


def _judge_devices(found, accelerator) -> list[Verdict]:
  """`found`: what PROBE prints; `accelerator`: what the device files say, tpu, gpu or None."""
  text = f"{found['count']} x {found['kind']} ({found['platform']})"
  if found["platform"] == "cpu" and accelerator and os.environ.get("JAX_PLATFORMS") != "cpu":
    devices = Verdict("WARN", "devices", f"{text}, but this machine has a {accelerator}",
                      f'pip install -e ".[{accelerator}]"')
  else:
    devices = Verdict("OK", "devices", text)
  speed = f"{found['flops'] / 1e12:.2f} TFLOP/s in {found['dtype']} on one device"
  if not found["error"] < 1e-3:
    return [devices, Verdict("BAD", "matmul", f"a 256 x 256 product is off by {found['error']:.2g}",
                             "do not train on this machine; report the device, or update its drivers")]
  return [devices, Verdict("OK", "matmul", f"right to {found['error']:.1g}; {speed}")]


def _accelerator():
  if any(glob.glob(prefix + "[0-9]*") for prefix in TPU_FILES):
    return "tpu"
  return "gpu" if os.path.exists("/dev/nvidia0") else None


def check_tpu_lock(lock: str = TPU_LOCK) -> Verdict:
  """Who holds the TPU, and whether libtpu's lock file outlived its process."""
  writer = _writer(lock)
  holders = _lockers(lock) | {pid for pid in _pids() if _has_open(pid, lock)} | ({writer} & set(_pids()))
  holders = sorted(holders & set(_pids()) or holders)  # One that locked and is gone left it to its child.
  if holders:
    who = ", ".join(f"pid {pid} ({_command(pid)})" for pid in holders)
    return Verdict("BAD", "tpu lock", f"the TPU is held by {who}",
                   f"wait for it, or if it is yours and not needed: kill {' '.join(map(str, holders))}")
  if os.path.exists(lock):
    age = (time.time() - os.stat(lock).st_mtime) / 60
    by = "" if writer is None else f"pid {writer}, which is gone, left it: "
    return Verdict("BAD", "tpu lock", f"{by}{lock} is {age:.0f} minutes old and no process holds it",
                   f"rm -f {lock} (with sudo if another user left it)", code=STALE)
  return Verdict("OK", "tpu lock", "none")


def _writer(lock):
  """The process whose number is in the file, if any is."""
  with contextlib.suppress(OSError, ValueError):
    return int(pathlib.Path(lock).read_text()[:20].partition("\n")[0])
  return None


def _pids():
  return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _lockers(lock):
  """Processes that hold a kernel lock on the file; /proc/locks shows every user's."""
  found = set()
  with contextlib.suppress(OSError):
    inode = os.stat(lock).st_ino
    for line in pathlib.Path("/proc/locks").read_text().splitlines():
      if match := re.search(rf"(\d+) \S+:{inode} ", line):
        found.add(int(match[1]))
  return found


def _has_open(pid, lock):
  """Whether the process has a TPU's device file or the lock file open (of other users, only root sees it)."""
  with contextlib.suppress(OSError):
    for fd in os.listdir(f"/proc/{pid}/fd"):
      with contextlib.suppress(OSError):
        target = os.readlink(f"/proc/{pid}/fd/{fd}")
        if target == lock or re.match(r"/dev/(accel|vfio/)\d", target):
          return True
  return False


def _command(pid):
  with contextlib.suppress(OSError):
    words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return b" ".join(words).decode(errors="replace").strip()[:60]
  return "gone"


def check_disk(name: str, path, usage=None, inodes=None) -> Verdict:
  """Free space and inodes where `path` is or will be; `usage` and `inodes` are (total, free)."""
  place = _existing(path)
  if usage is None:
    disk = shutil.disk_usage(place)
    usage = (disk.total, disk.free)
  if inodes is None:
    stat = os.statvfs(place)
    inodes = (stat.f_files, stat.f_favail)
  text = f"{usage[1] / GB:.1f} GB free of {usage[0] / GB:.0f}"
  full = inodes[0] and inodes[1] < 1000  # Some file systems have no fixed number: 0.
  if usage[1] < 1 * GB or full:
    return Verdict("BAD", name, f"{text}, {inodes[1]} inodes free at {place}",
                   "free some space, or write elsewhere: --workdir=DIR, --config.data.cache_path=DIR")
  if usage[1] < 10 * GB:
    return Verdict("WARN", name, f"{text} at {place}: a few checkpoints may fill it",
                   "free some space, or keep fewer checkpoints: --config.checkpoint.keep_last=1")
  return Verdict("OK", name, f"{text} at {place}")


def check_writable(path) -> Verdict:
  place = _existing(path)
  if fault := _write_fault(place):
    return Verdict("BAD", "permission", f"{place} cannot be written: {fault}",
                   f"chown or chmod {place}, or write elsewhere: --workdir=DIR")
  return Verdict("OK", "permission", f"{place} can be written")


def _write_fault(place):
  """What the system says to a file in this folder, or None: permission bits alone do not tell."""
  try:
    with tempfile.TemporaryFile(dir=place) as f:
      f.write(b"x")
  except OSError as e:
    return e.strerror
  return None


def _existing(path):
  """The path, or the nearest of its parents that is there."""
  path = pathlib.Path(path).absolute()
  return next(p for p in (path, *path.parents) if p.exists())


def check_memory(available: float | None = None) -> Verdict:
  """Bytes that can still be had, by the kernel and by this container's limit."""
  if available is None:
    available = _available_memory()
  text = f"{available / GB:.1f} GB available"
  if available < 1 * GB:
    return Verdict("BAD", "memory", text, "end other processes; the smallest run takes about 1 GB")
  if available < 4 * GB:
    return Verdict("WARN", "memory", text, "end other processes, or take a smaller batch_size or model")
  return Verdict("OK", "memory", text)


def _available_memory():
  info = pathlib.Path("/proc/meminfo")
  if not info.exists():
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  available = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", info.read_text())[1])
  limit, used = (pathlib.Path("/sys/fs/cgroup") / f for f in ("memory.max", "memory.current"))
  if limit.exists() and limit.read_text().strip().isdigit():
    available = min(available, int(limit.read_text()) - int(used.read_text()))
  return available


def check_compile_cache(folder: str | None = None) -> Verdict:
  """Of compiled programs, for all runs and commands of this user."""
  folder = str(folder or default_folder())
  if "://" in folder:
    return Verdict("OK", "compile cache", f"{folder} (remote, not tried)")
  if fault := find_fault(folder, create=False):
    what, _, remedy = fault.rpartition("; ")
    return Verdict("WARN", "compile cache", f"{folder} {what}: every start compiles anew", remedy)
  files = [f for f in pathlib.Path(folder).glob("*") if f.is_file()]
  size = sum(f.stat().st_size for f in files) / GB
  return Verdict("OK", "compile cache", f"{folder}: {len(files)} files, {size:.2f} GB")


def check_git(state="ask") -> Verdict:
  state = git_state() if state == "ask" else state
  if state is None:
    return Verdict("WARN", "git", "not a git checkout: runs cannot record their code", "use a git clone")
  return Verdict("OK", "git", state["sha"][:12] + (", with uncommitted changes" if state["dirty"] else ""))


def check_wandb(home=None) -> Verdict:
  """Only log.wandb='online' needs a login, so its absence is no fault."""
  logged_in = bool(os.environ.get("WANDB_API_KEY"))
  with contextlib.suppress(OSError, netrc.NetrcParseError):
    logged_in |= "api.wandb.ai" in netrc.netrc(pathlib.Path(home or pathlib.Path.home()) / ".netrc").hosts
  return Verdict("OK", "wandb", "logged in" if logged_in
                 else "not logged in: offline works, --config.log.wandb=online needs `wandb login`")


def check_not_needed() -> Verdict:
  found = [name for name in ("torch", "tensorflow") if importlib.util.find_spec(name)]
  return Verdict("OK", "not needed", f"torch, tensorflow ({' and '.join(found) or 'neither'} installed)")


def diagnose(workdir, cache) -> list[Verdict]:
  """All checks, in the order in which a run would stumble."""
  return [
    check_python(),
    *check_packages(),
    check_not_needed(),
    check_tpu_lock(),
    *check_devices(),
    check_memory(),
    check_disk("disk, workdir", workdir),
    check_disk("disk, cache", cache),
    check_writable(workdir),
    check_compile_cache(),
    check_git(),
    check_wandb(),
  ]


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog="python -m train.doctor", description=__doc__.partition("\n")[0])
  parser.add_argument("--workdir", default="runs", help="where runs will be written")
  parser.add_argument("--cache", default="runs/cache", help="data.cache_path, where tokenised data will be")
  args = parser.parse_args(argv)
  verdicts = diagnose(args.workdir, args.cache)
  print(*verdicts, sep="\n")
  bad, warn = (sum(v.level == level for v in verdicts) for level in ("BAD", "WARN"))
  print(f"{bad} bad, {warn} warnings, {len(verdicts) - bad - warn} fine")
  return max((v.code for v in verdicts if v.level == "BAD"), default=0)


if __name__ == "__main__":
  sys.exit(main())

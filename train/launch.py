"""Several processes on this machine, as a pod would run them: python -m train.launch [options] -- COMMAND

Each process gets its own fake CPU devices, and they meet through jax.distributed. COMMAND's `python` is the
one that runs this. On a pod the command is run without this, once on each host.
"""
import argparse
import ctypes
import datetime
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

EPILOG = """examples:
  python -m train.launch --processes=2 --devices=4 -- python -m train.main --config=configs/tiny.py
  python -m train.launch --processes=4 --devices=2 -- python -m train.main --config=configs/tiny.py \\
      --workdir=runs/four --config.mesh.data=2 --config.mesh.tensor=2      the mesh is over all 8 devices

What process 0 writes is shown; what each writes is in DIR/process-N.log. SIGTERM and Ctrl-C go to all
processes (train.main saves and exits with 143 or 130); a second Ctrl-C kills. When one fails, the others have
--grace seconds to notice and to say who is missing (train.main: within stall_s), then they are killed.

exit code: 0 when all exit with 0; otherwise that of the first that failed, 128 + N where signal N killed it;
2 for a mistake in these options, before anything starts."""


def parse(argv):
  parser = argparse.ArgumentParser(prog="train.launch", description=__doc__, epilog=EPILOG,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--processes", type=positive, required=True, metavar="N", help="how many to start")
  parser.add_argument("--devices", type=positive, required=True, metavar="N", help="fake CPU devices of each")
  parser.add_argument("--logs", type=pathlib.Path, metavar="DIR",
                      help="default: logs/ in the --workdir of COMMAND, or runs/launch-TIME")
  parser.add_argument("--grace", type=float, default=330.0, metavar="SECONDS",
                      help="for the others after one has failed; default: %(default)g, more than stall_s")
  parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what each runs")
  args = parser.parse_args(argv)
  args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
  if not args.command:
    parser.error("no command: it comes after --, as in -- python -m train.main --config=configs/tiny.py")
  if args.command[0] in ("python", "python3"):
    args.command[0] = sys.executable
  if shutil.which(args.command[0]) is None:
    parser.error(f"no program is called {args.command[0]!r}")
  if not args.grace >= 0:
    parser.error(f"--grace={args.grace:g} must be at least 0")
  if "JAX_COORDINATOR_ADDRESS" in os.environ:
    parser.error("JAX_COORDINATOR_ADDRESS is set: this process is already one of several")
  args.logs = args.logs or default_logs(args.command)
  try:
    args.logs.mkdir(parents=True, exist_ok=True)
    args.files = [(args.logs / f"process-{i}.log").open("ab", buffering=0) for i in range(args.processes)]
  except OSError as e:
    parser.error(f"--logs={args.logs} cannot be written: {e.strerror}")
  return args


def positive(text):
  if (n := int(text)) < 1:
    raise argparse.ArgumentTypeError(f"{n} must be at least 1")
  return n


def default_logs(command):
  for word, after in zip(command, [*command[1:], ""]):
    if word == "--workdir" or word.startswith("--workdir="):
      return pathlib.Path(after if word == "--workdir" else word.split("=", 1)[1]) / "logs"
  return pathlib.Path("runs") / f"launch-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


class Processes:
  """The processes of one run, each in a process group of its own."""

  def __init__(self, command, n, devices, files):
    port, self._files, self._begin = free_port(), files, time.monotonic()
    self.ended: dict[int, tuple[int, float]] = {}  # Process -> (exit code, after how many seconds), in order.
    self._told = 0
    self._all = []
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._forward)
    for i in range(n):
      env = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(n), "JAX_PROCESS_ID": str(i)}
      self._all.append(subprocess.Popen(
          command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if i == 0 else files[i],
          stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent))
      files[i].write(f"# {datetime.datetime.now():%Y-%m-%d %H:%M:%S} process {i}, pid {self._all[i].pid}: "
                     f"{shlex.join(command)}\n".encode())
    self._shown = threading.Thread(target=self._show, daemon=True)
    self._shown.start()

  def _show(self):
    """Process 0's output, here and in its log; but for what Gloo says of each of its connections."""
    for line in self._all[0].stdout:
      self._files[0].write(line)
      if not line.startswith(b"[Gloo] Rank"):
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()

  def _forward(self, number, frame):
    self._told += number == signal.SIGINT
    self.signal(number if self._told < 2 else signal.SIGKILL)

  def signal(self, number):
    """To the processes, not to their groups: each knows what to do with its children; SIGKILL to all."""
    for process in self._all:
      if process.poll() is None:
        (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)

  def wait(self, grace_s):
    """Until all have ended; `grace_s` after the first failure, those that are left are killed."""
    deadline = None
    while len(self.ended) < len(self._all):
      for i, process in enumerate(self._all):
        if i not in self.ended and (code := process.poll()) is not None:
          self.ended[i] = code, time.monotonic() - self._begin
          if code != 0 and deadline is None:
            deadline = time.monotonic() + grace_s
      if deadline is not None and time.monotonic() > deadline:
        self.signal(signal.SIGKILL)
      time.sleep(0.05)
    self._shown.join(2)

  def exit_code(self) -> int:
    """Of the first that failed."""
    return next((code if code > 0 else 128 - code for code, _ in self.ended.values() if code), 0)

  def describe(self) -> str:
    words = lambda code: f"exit {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    return "\n".join(f"process {i}: {words(code)} after {seconds:.1f} s, {self._files[i].name}"
                     for i, (code, seconds) in sorted(self.ended.items()))


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def end_with_parent():
  """In the child: SIGTERM if the launcher is killed (Linux)."""
  if sys.platform == "linux":
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def main(argv=None) -> int:
  args = parse(argv)
  processes = Processes(args.command, args.processes, args.devices, args.files)
  processes.wait(args.grace)
  code = processes.exit_code()
  first = next((i for i, (c, _) in processes.ended.items() if c), 0)
  if first != 0:
    text = (args.logs / f"process-{first}.log").read_text(errors="replace")
    print(f"\nthe last lines of process {first}, the first that failed:")
    print("\n".join(f"  {line}" for line in text.splitlines()[-12:]))
  print(f"\n{processes.describe()}\nexit {code}", flush=True)
  return code


if __name__ == "__main__":
  sys.exit(main())

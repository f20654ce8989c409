"""The meeting point of jax.distributed, as a process of its own beside process 0 (train.together starts it).

Inside process 0, which is where JAX puts it, it would die with process 0, and the C++ of every other process
aborts in that moment: nobody could say who was lost, and where. Imports little: it must be up in a moment.
"""
import fcntl
import os
import pathlib
import signal
import sys
import tempfile
import time

from jaxlib import _jax

DONE = "done"  # What process 0 says when all have left; without it, it has died.
TAKE_OVER_S = 10.0


def lock(port: str):
  """The right to serve `port`: gRPC would let two servers share it, each with half of the clients.

  One whose process 0 has died only stays for the others to find out, and makes way for the next run.

  Raises:
    OSError: a run that lives has it.
  """
  path = pathlib.Path(tempfile.gettempdir()) / f"assay-coordinator-{os.getuid()}-{port}"
  file, deadline = open(path, "a+"), time.monotonic() + TAKE_OVER_S  # noqa: SIM115
  while True:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      break
    except BlockingIOError:
      file.seek(0)
      words = file.read().split()
      if words[:1] == ["orphan"]:
        os.kill(int(words[1]), signal.SIGKILL)
      elif time.monotonic() > deadline:
        raise OSError(f"port {port} is used by another run, coordinator {' '.join(words)}") from None
      time.sleep(0.2)
  say(file, f"serving {os.getpid()}")
  return file


def say(file, text):
  file.truncate(0)
  file.write(text)
  file.flush()


def main(address, n_processes, heartbeat_s, shutdown_s, orphan_s):
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)  # Process 0 is told too, and needs this to the end.
  try:
    file = lock(address.rsplit(":", 1)[1])
    service = _jax.get_distributed_runtime_service(
        address, int(n_processes), heartbeat_timeout=int(heartbeat_s), shutdown_timeout=int(shutdown_s),
        recoverable=False)
  except Exception as e:  # Whatever it is, process 0 reports it.
    print(f"{type(e).__name__}: {e}", flush=True)
    return
  print("up", flush=True)
  if sys.stdin.readline().strip() != DONE:
    say(file, f"orphan {os.getpid()}")
    time.sleep(float(orphan_s))
  service.shutdown()


if __name__ == "__main__":
  main(*sys.argv[1:])

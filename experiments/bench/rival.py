"""What others do with the same model, in a process of its own: we take turns."""
import json
import subprocess
import sys

import numpy as np


class Rival:
  """A yardstick that waits while we run. It answers a line of stdin by a line of JSON.

  Attributes:
    version: of what it measures.
  """

  def __init__(self, module: str, *args):
    command = [sys.executable, "-m", f"experiments.bench.{module}", *map(str, args)]
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self.version = self._read()["version"]

  def ask(self, question=None) -> dict:
    """Its next turn."""
    self._process.stdin.write(json.dumps(question) + "\n")
    self._process.stdin.flush()
    return self._read()

  def _read(self):
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f"PyTorch's process ended with exit code {self._process.wait()}: "
                         "its message is above")
    return json.loads(line)

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def compare_times(ours: list[float], theirs: list[float]) -> dict:
  """How much faster we are: the ratio of median times, with a bootstrap 95 % interval over the rounds."""
  ours, theirs = np.array(ours), np.array(theirs)
  # A round is drawn with both its times.
  pick = np.random.default_rng(0).integers(0, len(ours), (10_000, len(ours)))
  ratios = np.median(theirs[pick], axis=1) / np.median(ours[pick], axis=1)
  low, high = np.quantile(ratios, [0.025, 0.975])
  return {"ratio": round(float(np.median(theirs) / np.median(ours)), 3),
          "interval_95": [round(low, 3), round(high, 3)], "rounds": len(ours)}

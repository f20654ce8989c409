"""Runs of a sweep as tasks of Ray: python -m experiments.sweep experiments.NAME --on=ray

A task a run, which does what a run on this machine does (experiments.local.run_one). The nodes see the same
files under the same names, as on storage that all of them mount: this code, and the folder of the sweep.
"""
import dataclasses
import math
import os
import pathlib
import threading
import time

from data.flags import leaves, override
from experiments.cells import Outcome, Run
from experiments.local import until_signal
from experiments.task import Task

POLL_S = 0.25
ASK_S = 1.0  # How often a run asks whether it is to stop.
STORE_BYTES = 100 * 2**20  # Of a Ray on this machine; what goes through it is small.
RETRIES = 3  # Of a task whose node is lost: it goes on from its checkpoint.


@dataclasses.dataclass(kw_only=True, slots=True)
class Ray:
  """What a run needs of a node, and which Ray."""
  num_cpus: float = 1.0
  num_gpus: float = 0.0
  num_tpus: float = 0.0  # Chips, the resource that Ray calls TPU.
  address: str | None = None  # Of a cluster's head, or auto; None: a Ray of its own on this machine.

  @property
  def resources(self) -> dict[str, float]:
    found = {"CPU": self.num_cpus, "GPU": self.num_gpus, "TPU": self.num_tpus}
    return {name: n for name, n in found.items() if n}


def read_settings(texts) -> Ray:
  """From "name=value" each. Raises ValueError: an unknown name, a number that is none or below 0."""
  settings = override(Ray(), list(texts))
  for name, value in leaves(settings).items():
    if isinstance(value, float) and not 0 <= value < math.inf:
      raise ValueError(f"{name}={value:g} must be a number from 0; nearest valid: 0")
  if not settings.resources:
    raise ValueError("num_cpus=0 and nothing else: a run needs something; nearest valid: num_cpus=1")
  return settings


def run_on_ray(runs: list[Run], settings: Ray, board) -> dict[pathlib.Path, Outcome]:
  """All of them, as many at a time as the cluster has resources for. SIGTERM and Ctrl-C stop it: the runs
  under way save first.

  Args:
    board: told what begins and ends (experiments.local.Board).

  Returns:
    By workdir, how those ended that ended.

  Raises:
    ValueError: Ray is not installed or not there, or none of its nodes has so much.
  """
  os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
  if settings.address is None:  # Else Ray listens on all interfaces, whatever address its node has.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
  try:
    import ray
  except ImportError:
    raise ValueError('--on=ray needs ray: pip install -e ".[ray]"') from None
  _connect(ray, settings.address)
  try:
    _check_resources(ray, settings.resources)
    return _run_all(ray, runs, settings, board)
  finally:
    ray.shutdown()


def _connect(ray, address):
  here = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
  paths = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
  try:
    ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR",
             runtime_env={"env_vars": {"PYTHONPATH": paths}}, **({} if address else here))
  except Exception as e:  # Of no class of its own, where Ray does not start in time.
    raise ValueError(f"Ray at address={address}: {str(e).splitlines()[0]}") from None


def _check_resources(ray, resources):
  nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
  if any(all(node.get(name, 0) >= n for name, n in resources.items()) for node in nodes):
    return
  for name, n in resources.items():
    most = max(node.get(name, 0) for node in nodes)
    if most < n:
      field = f"num_{name.lower()}s"
      raise ValueError(f"{field}={n:g}, but no node of this Ray has more than {most:g}; nearest valid: "
                       f"{field}={most:g}")
  wanted = " and ".join(f"num_{name.lower()}s={n:g}" for name, n in resources.items())
  raise ValueError(f"no node of this Ray has {wanted}")


def _run_all(ray, runs, settings, board):
  switch = ray.remote(num_cpus=0)(Switch).remote()
  work = ray.remote(
    num_cpus=settings.num_cpus, num_gpus=settings.num_gpus, max_retries=RETRIES,
    resources={"TPU": settings.num_tpus} if settings.num_tpus else {})(_work)
  waiting = {work.remote(Task(run.workdir.absolute(), run.command), os.getcwd(), switch, i): i
             for i, run in enumerate(runs)}
  stop, told, begun, ended = threading.Event(), False, set(), {}

  def begin(numbers):
    for i in sorted(numbers - begun):
      begun.add(i)
      board.begin(runs[i])

  with until_signal(stop):
    while waiting:
      done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
      if stop.is_set() and not told:
        told = ray.get(switch.stop.remote())
      begin(ray.get(switch.list_begun.remote()))
      for reference in done:
        i, outcome = waiting.pop(reference), _result(ray, reference)
        if outcome is not None:
          begin({i})
          ended[runs[i].workdir] = outcome
        if i in begun:
          board.end(runs[i], outcome)
  return ended


def _result(ray, reference):
  try:
    return ray.get(reference)
  except ray.exceptions.RayError as e:  # The node, not the run: there is no outcome.json, and it can go on.
    return Outcome("failed", 1, 0.0, f"{type(e).__name__}: {str(e).splitlines()[0]}")


# What runs elsewhere.

class Switch:
  """An actor that all tasks know."""

  def __init__(self):
    self._begun, self._stopped = set(), False

  def begin(self, i) -> bool:
    """Whether there is anything to begin."""
    if not self._stopped:
      self._begun.add(i)
    return not self._stopped

  def list_begun(self):
    return self._begun

  def stop(self):
    self._stopped = True
    return True

  def is_stopped(self):
    return self._stopped


class _Stop:
  """What run_one takes for a threading.Event."""

  def __init__(self, switch):
    self._switch, self._asked, self._set = switch, 0.0, False

  def is_set(self):
    import ray
    if not self._set and time.monotonic() - self._asked > ASK_S:
      self._set, self._asked = ray.get(self._switch.is_stopped.remote()), time.monotonic()
    return self._set


def _work(task, cwd, switch, i):
  import ray

  from experiments.local import run_one
  if not ray.get(switch.begin.remote(i)):
    return None
  for folder in (pathlib.Path(cwd), task.workdir.parents[1]):
    if not folder.exists():
      where = ray.util.get_node_ip_address()
      return Outcome("failed", 1, 0.0, f"node {where} does not see {folder}: all nodes must see --out and "
                                       "this code under the same names")
  os.chdir(cwd)
  try:
    return run_one(task, stop=_Stop(switch))
  except OSError as e:
    return Outcome("failed", 1, 0.0, f"{type(e).__name__}: {e}")

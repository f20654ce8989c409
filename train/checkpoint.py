"""Saving and resuming: asynchronous, all or nothing, trusted only by checksum.

python -m train.checkpoint ls|show|verify|diff PATH
model/hub/orbax.py holds the layout on disk and the reading half, which inference shares.
"""
import concurrent.futures
import dataclasses
import difflib
import json
import math
import pathlib
import re
import shutil
import time
import typing

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from data.flags import flatten
from model.hub.orbax import (
  META,
  STATE,
  CheckpointError,
  find_newest_good,
  find_steps,
  read_meta,
  restore_arrays,
  sync_folder,
  write_manifest,
)
from train.config import CheckpointConfig
from train.host import Stopwatch
from train.together import agree

AS_THE_MESH = "same numbers up to the order of summation, so not bit-identical"
# Settings that a resumed run may change freely, and why; any other one changes the numbers. A name
# stands for all that is under it, and list indices are left out.
FREE_TO_CHANGE = {
  "checkpoint": "when and what is kept does not touch the state",
  "log": "only what is written about the run",
  "stall_s": "when processes give each other up, not what they compute",
  "report": "only what is written after the run",
  "eval.every": "evaluation reads the weights and draws no random numbers of the run's",
  "optim.max_skips": "decides when to give up, not what a step does",
  "data.prefetch": "rows are a function of the step, however early they are made",
  "data.workers": "tokenised shards are identical for any number of processes",
  "data.cache_path": "where the shards are; their manifest says what they are",
  "data.sources.max_epochs": "refuses a run, never changes a row",
  "mesh": AS_THE_MESH, "model.rules": AS_THE_MESH, "model.context": AS_THE_MESH,
  "model.exchange": AS_THE_MESH, "model.pipeline_microbatches": AS_THE_MESH,
  "model.grouped_impl": AS_THE_MESH,
}
ABSENT = "(absent)"


class Refused(ValueError):
  """The settings and what the workdir holds do not go together."""


class Restored(typing.NamedTuple):
  state: typing.Any
  meta: dict
  step: int
  rejected: list[tuple[int, str]]  # Newer checkpoints that were damaged: (step, reason).


class Checkpointer:
  """The checkpoints of one run. Every process calls every method, at the same step.

  Usage, around each step:
    checkpoints.check()  # Raises what went wrong with a save since the last call.
    ...
    checkpoints.save(step, state, meta, metrics)  # Returns once the state is off the devices.
  and wait() before the process ends.
  """

  def __init__(self, root, config: CheckpointConfig, clock: Stopwatch | None = None):
    """Opens `root` (made if missing) and removes what an earlier, killed run left half done.

    Attributes:
      leftovers: the names of what was removed, on process 0.
    """
    self.root, self.config = pathlib.Path(root).absolute(), config
    self.leftovers, self._clock = [], clock or Stopwatch()
    self._writer = _make_writer()
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._pending: tuple[int, concurrent.futures.Future] | None = None
    self._newest: int | None = None  # The step last saved or restored by this object.
    self._failures = 0
    if jax.process_index() == 0:
      self.root.mkdir(parents=True, exist_ok=True)
      for path in sorted(self.root.glob("*.saving")) + sorted(self.root.glob("*.deleting")):
        shutil.rmtree(path)
        self.leftovers.append(path.name)

  def save(self, step: int, state, meta: dict, metrics: dict | None = None) -> bool:
    """Starts a save and returns once `state` may be donated; the rest happens behind the training.

    A save that is still being written is waited for. The checkpoint appears, whole, under its final
    name, and only then are older ones deleted.

    Args:
      state: pytree of jax.Array.
      meta: goes to meta.json; keys step, time and metrics are added.
      metrics: name -> number at this step. The lowest of the one that config.best names is kept.

    Returns:
      False if this step is the one that was last saved or restored.

    Raises:
      CheckpointError: the last save failed, or this one could not start.
    """
    self.wait()
    if step == self._newest:
      return False
    meta = {**meta, "step": step, "time": time.time(), "metrics": metrics or {}}
    text = json.dumps(meta, indent=1)
    part = self._part(step)
    try:
      if jax.process_index() == 0:
        for old in self.root.glob("*.saving"):
          shutil.rmtree(old, ignore_errors=True)
        part.mkdir()
      self._writer.save(part / STATE, args=ocp.args.PyTreeSave(state))
    except Exception as e:
      raise self._failure(step, e) from e
    self._pending = step, self._pool.submit(self._finish, step, text)
    return True

  def annotate(self, step: int, metrics: dict) -> None:
    """Gives a checkpoint the metrics of an evaluation that came after it was saved."""
    path = self.root / str(step)
    if jax.process_index() == 0 and path.exists():
      meta = read_meta(path)
      (path / f"{META}.new").write_text(json.dumps({**meta, "metrics": metrics}, indent=1))
      (path / f"{META}.new").rename(path / META)
      write_manifest(path)

  def check(self) -> None:
    """Raises CheckpointError if a save has failed since the last call; costs nothing otherwise."""
    if self._pending and self._pending[1].done():
      self.wait()

  def wait(self) -> None:
    """Blocks until the save in progress, if any, is whole on disk, and raises like `check`."""
    if self._pending is None:
      return
    (step, future), self._pending = self._pending, None
    try:
      future.result()
    except Exception as e:
      raise self._failure(step, e) from e
    self._newest = step

  def restore(self, abstract_state, check_meta=lambda meta: None) -> Restored | None:
    """The newest checkpoint whose bytes are right, on the mesh of `abstract_state`.

    Newer, damaged ones are renamed to STEP.damaged, so that their steps can be saved again.

    Args:
      abstract_state: pytree of jax.ShapeDtypeStruct with NamedShardings, shaped as what was saved.
      check_meta: called with the checkpoint's meta before any array is read; refuses it by raising.

    Returns:
      None if nothing was ever saved.

    Raises:
      CheckpointError: all are damaged.
      ValueError: the state is of another shape than this run's.
    """
    self.wait()
    step, rejected = self._agree_on_step()
    if step is None:
      return None
    meta = read_meta(self.root / str(step))
    check_meta(meta)
    state = restore_arrays(self.root / str(step), abstract_state)
    if jax.process_index() == 0:
      for bad, _ in rejected:
        (self.root / str(bad)).rename(_free_name(self.root / f"{bad}.damaged"))
    self._newest = step
    return Restored(state, meta, step, rejected)

  def _agree_on_step(self):
    """Process 0 reads and hashes; the others take its word, so that all resume at one step."""
    found, rejected, error = -1, [], None
    if jax.process_index() == 0:
      try:
        step_dir, rejected = find_newest_good(self.root)
        found = -1 if step_dir is None else int(step_dir.name)
      except CheckpointError as e:
        found, error = -2, e
    found = int(agree("restore", self._clock, np.int32(found))[0])
    if found == -2:
      raise error or CheckpointError(f"no good checkpoint under {self.root}: see process 0's error")
    return (None if found == -1 else found), rejected

  def _finish(self, step, meta_text):
    """In the background: the order of these lines is what makes a kill at any moment harmless."""
    self._writer.wait_until_finished()
    if jax.process_index() != 0:
      return
    part = self._part(step)
    (part / META).write_text(meta_text)
    write_manifest(part)
    part.rename(self.root / str(step))
    sync_folder(self.root)
    for old in select_for_deletion(self._read_metrics(), self.config):
      doomed = self.root / f"{old}.deleting"
      (self.root / str(old)).rename(doomed)
      shutil.rmtree(doomed)

  def _read_metrics(self):
    """step -> its metrics. A damaged meta.json counts as none here: restore is what names it."""
    metrics = {}
    for step in find_steps(self.root):
      try:
        metrics[step] = dict(read_meta(self.root / str(step))["metrics"])
      except (OSError, ValueError, KeyError, TypeError):
        metrics[step] = {}
    return metrics

  def _failure(self, step, cause):
    """The error to raise; gives back the space that the failed save took, and makes a new start."""
    self._writer = _make_writer()  # The old one may raise the rest of this at its next save.
    if jax.process_index() == 0:
      shutil.rmtree(self._part(step), ignore_errors=True)
    self._failures += 1  # Its threads may still write: the next save goes elsewhere.
    why = f"{type(cause).__name__}: {cause}".split(" [tensorstore_spec=")[0]
    if "No space left" in why:
      why += f" ({shutil.disk_usage(self.root).free / 1e6:.1f} MB are free now)"
    kept = ", ".join(map(str, find_steps(self.root))) or "none"
    return CheckpointError(f"saving step {step} to {self.root / str(step)} failed: {why}; "
                           f"steps that are saved: {kept}")

  def _part(self, step):
    return self.root / (f"{step}.{self._failures}.saving" if self._failures else f"{step}.saving")


def _make_writer():
  return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True))


@dataclasses.dataclass(frozen=True, slots=True)
class _Info:
  """What Orbax's policies look at."""
  step: int
  metrics: dict | None
  time: None = None


def select_for_deletion(metrics: dict[int, dict], config: CheckpointConfig) -> list[int]:
  """The steps to delete: not among the last, not on the grid, not the best (NaN never is)."""
  policies = [keep.LatestN(config.keep_last)]
  if config.keep_every is not None:
    policies.append(keep.EveryNSteps(config.keep_every))
  if config.best is not None:
    policies.append(keep.BestN(get_metric_fn=lambda m: m[config.best], reverse=True, n=1,
                               keep_checkpoints_without_metrics=False))
  infos = [_Info(step, m if math.isfinite(m.get(config.best, math.nan)) else None)
           for step, m in sorted(metrics.items())]
  stays = keep.AnyPreservationPolicy(policies).should_preserve(
    infos, context=keep.PreservationContext())
  return [info.step for info, stay in zip(infos, stays) if not stay]


def _free_name(path):
  names = (path.with_name(f"{path.name}{i or ''}") for i in range(1_000_000))
  return next(p for p in names if not p.exists())


# Settings.

Change = tuple[str, typing.Any, typing.Any]  # Leaf, old value, new value.


def diff_configs(old: dict, new: dict) -> list[Change]:
  """Each leaf that differs, sorted by name. Sections in lists are indexed: data.sources[0].path."""
  old, new = (flatten(json.loads(json.dumps(config))) for config in (old, new))
  changes = [(leaf, old.get(leaf, ABSENT), new.get(leaf, ABSENT))
             for leaf in sorted(old.keys() | new.keys())]
  return [(leaf, a, b) for leaf, a, b in changes if repr(a) != repr(b)]


def changed_settings(old: dict, new: dict, allowed: list[str]) -> list[Change]:
  """Each setting whose change would alter the numbers of a resumed run.

  Args:
    old: the resolved config of the checkpoint.
    new: the resolved config of this run.
    allowed: leaves (or sections: "optim") that the user lets change.

  Raises:
    ValueError: a name in `allowed` that neither config has.
  """
  leaves = [leaf for config in (old, new) for leaf in flatten(config)]
  for name in allowed:
    if not any(_is_under(leaf, name) for leaf in leaves):
      near = difflib.get_close_matches(name, leaves, n=1, cutoff=0.4)
      raise ValueError(f"--allow_change={name}: no setting is called that"
                       + (f"; did you mean {near[0]}?" if near else ""))
  free = [*FREE_TO_CHANGE, *allowed]
  if new.get("model", {}).get("dispatch") == "capacity":  # What is dropped depends on who shares a device.
    free = [name for name in free if name in allowed or FREE_TO_CHANGE[name] != AS_THE_MESH]
  return [change for change in diff_configs(old, new) if not any(_is_under(change[0], name) for name in free)]


def refuse_changes(workdir, old: dict, new: dict, allowed: list[str]) -> None:
  """Raises Refused with the old and new value of each of `changed_settings`."""
  if changes := changed_settings(old, new, allowed):
    lines = [f"  {leaf}: {was} there, {now} here; to allow it: --allow_change={leaf}"
             for leaf, was, now in changes]
    raise Refused("\n".join([
        f"{workdir} was begun with other settings (or give another --workdir):", *lines]))


def _is_under(leaf, name):
  forms = leaf, re.sub(r"\[\d+\]", "", leaf)
  return any(form == name or form.startswith((name + ".", name + "[")) for form in forms)


if __name__ == "__main__":
  from train.checkpoint_cli import main
  main()

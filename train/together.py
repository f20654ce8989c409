"""Many processes as one run: who is where, and an end with a name when one of them is not.

Each process beats: every second a thread tells the key-value store of jax.distributed in which step and phase
(train.host.Stopwatch) its main thread is, and reads what the others told. Another thread judges. Ages are
measured here, from one change of what a process tells to the next, so the hosts' clocks do not matter:

  silent   a process that does not beat for stall_s: killed, stopped, its host gone
  stuck    all beat, but none has moved for stall_s times PATIENCE of the phase of those that are the furthest
           behind: an endless loop in a loader, a branch that the others did not take
  ended    it failed or was stopped by a signal before there was a state, and said so; this is not waited for

A main thread that waits for another process does so inside a C++ collective, so the thread that judges prints
the table (process, step, phase, age) and ends the process.
"""
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback

import jax
import numpy as np
from jax._src import distributed

from train.coordinator import DONE

ROOT = pathlib.Path(__file__).parents[1]
BEAT_S = 1.0
BEATS = "assay/beats"
SOON_S = 5.0  # Enough for each process to see what has become of the others.
# Phase -> how many times stall_s it may last: its length is the machine's affair, and differs by process. In
# all others a process that does nothing for stall_s is stuck.
PATIENCE = dict.fromkeys(
    ("start", "imports", "joining", "devices", "preparing data", "peak", "restoring", "tracing", "compiling",
     "initialising", "saving"), 12)


class Apart(RuntimeError):
  """The processes could not come together."""


# Coming together.

class Coordinator:
  """The process in which jax.distributed's service runs, with the methods of the service."""

  def __init__(self, address, n_processes, stall_s):
    limit = str(int(4 * stall_s) + 100)  # JAX's own limits abort without a name, so they come after ours.
    command = [sys.executable, "-m", "train.coordinator", address, str(n_processes), limit, limit,
               str(stall_s + 30)]
    self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     stderr=subprocess.DEVNULL, text=True)
    if (said := self._process.stdout.readline().strip()) != "up":
      raise Apart(f"the coordinator on {address} did not start: {said or 'no message'}")

  def shutdown(self):
    with contextlib.suppress(OSError):
      self._process.stdin.write(DONE)
      self._process.stdin.close()


def join(stall_s: float, **who) -> None:
  """jax.distributed.initialize(**who), with the service in a process of its own.

  Raises:
    Apart: the others did not come within stall_s (at least a minute: they may still be starting).
  """
  wait_s = max(int(stall_s), 60)
  original = distributed._jax.get_distributed_runtime_service
  distributed._jax.get_distributed_runtime_service = (
      lambda address, n, **_: Coordinator(address, n, stall_s))
  try:
    jax.distributed.initialize(**who, initialization_timeout=wait_s,
                               heartbeat_timeout_seconds=int(4 * stall_s) + 100,
                               shutdown_timeout_seconds=wait_s)
  except Apart:
    raise
  except RuntimeError as e:  # JAX's own errors are of this kind.
    state = distributed.global_state
    raise Apart(f"start: process {state.process_id} of {state.num_processes} did not meet the others at "
                f"{state.coordinator_address} within {wait_s} s: {str(e).splitlines()[0]}") from e
  finally:
    distributed._jax.get_distributed_runtime_service = original


def agree(name: str, clock, value) -> np.ndarray:
  """What each process says, [process, ...], to the bit; a barrier, whose name the table shows while it lasts.

  It goes through the key-value store, not over the devices: those need not have come so far, and on CPUs the
  messages of two programs in flight can be taken for each other's (seen with Gloo).
  """
  value = np.asarray(value)
  if jax.process_count() == 1:
    return value[None]
  client, me = distributed.global_state.client, jax.process_index()
  n = _ROUNDS[name] = _ROUNDS[name] + 1
  key = lambda n, i: f"assay/agree/{name}/{n}/{i}"
  with clock.within(f"barrier: {name}"):
    client.key_value_set_bytes(key(n, me), value.tobytes())
    said = [_wait_for(client, key(n, i)) for i in range(jax.process_count())]
  if n > 1:  # All have said this, so all have read what came before.
    client.key_value_delete(key(n - 1, me))
  return np.stack([np.frombuffer(text, value.dtype).reshape(value.shape) for text in said])


_ROUNDS = collections.Counter()  # Name -> how often it was agreed on, the same in all processes.


def _wait_for(client, key) -> bytes:
  """For as long as it takes: the judge (Watch) ends the process where it takes too long."""
  while True:
    try:
      return client.blocking_key_value_get_bytes(key, int(1000 * BEAT_S))
    except RuntimeError as e:  # JAX's own errors are of this kind.
      if "DEADLINE_EXCEEDED" not in str(e):
        time.sleep(BEAT_S)


# Who is where.

@dataclasses.dataclass(slots=True)
class Peer:
  """What is known here about a process. Times are of this process's clock."""
  heard: float  # When it last beat.
  moved: float  # When it last went from one phase to the next, or made a note.
  marks: int = 0  # Phases entered so far: the same number at the same place of the program.
  step: int = 0
  phase: str = "start"
  notes: int = 0
  ended: dict | None = None  # why, missing: whom it blames, code: with which it exits.

  def take(self, beat: dict, now: float):
    self.heard = now
    place = beat["marks"], beat["step"], beat["phase"], beat["notes"]
    if place != (self.marks, self.step, self.phase, self.notes):
      self.moved = now
      self.marks, self.step, self.phase, self.notes = place
    self.ended = beat["ended"]


@dataclasses.dataclass(frozen=True)
class Verdict:
  missing: tuple[int, ...]
  why: str
  code: int = 1


def judge(peers: list[Peer], me: int, now: float, stall_s: float) -> Verdict | None:
  """None while all is well, or may yet be."""
  others = [i for i in range(len(peers)) if i != me]
  for i in others:
    if peers[i].ended is not None:
      return Verdict(tuple(peers[i].ended["missing"]), peers[i].ended["why"], peers[i].ended["code"])
  if silent := tuple(i for i in others if now - peers[i].heard > stall_s):
    return Verdict(silent, f"no sign of life for {stall_s:g} s")
  # While any of them moves the others only wait for it, however long they have.
  behind = tuple(i for i, p in enumerate(peers) if p.marks == min(p.marks for p in peers))
  limit = stall_s * max(PATIENCE.get(peers[i].phase, 1) for i in behind)
  if now - max(p.moved for p in peers) <= limit:
    return None
  state = "alive, but behind the others" if len(behind) < len(peers) else "alive, but stuck"
  return Verdict(behind, f"{state}: no process has moved for {limit:g} s")


def describe(peers: list[Peer], verdict: Verdict, me: int, now: float) -> str:
  names = ", ".join(map(str, verdict.missing))
  kind = "process" if len(verdict.missing) == 1 else "processes"
  rows = [("process", "step", "phase", "in it for", "last sign of life")]
  for i, p in enumerate(peers):
    rows.append((str(i), str(p.step), p.phase, f"{now - p.moved:.1f} s",
                 "this one" if i == me else f"{now - p.heard:.1f} s ago"))
  widths = [max(len(row[k]) for row in rows) for k in range(5)]
  pad = lambda k, text: text.rjust(widths[k]) if k < 2 else text.ljust(widths[k])
  lines = ["  ".join(pad(k, text) for k, text in enumerate(row)).rstrip() for row in rows]
  lines = [line + ("  <--" if i - 1 in verdict.missing else "") for i, line in enumerate(lines)]
  return "\n".join([f"{kind} {names}: {verdict.why}", *lines])


def find_place() -> str:
  """Where the main thread hangs: the last lines of this project, and the innermost of all."""
  if threading.current_thread() is threading.main_thread():
    return ""  # It has said why it cannot go on.
  stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
  ours = [frame for frame in stack[:-1] if frame.filename.startswith(str(ROOT))]
  return (f"The main thread of process {jax.process_index()} on {socket.gethostname()} is here:\n"
          + "".join(traceback.format_list([*ours[-4:], stack[-1]])))


class Watch:
  """Beats for this process and watches the others, from `Watch()` to `close` or `leave`.

  Alone, it does nothing. The training pays an attribute of the clock a phase.
  """

  def __init__(self, clock, stall_s: float):
    self._clock, self._stall_s = clock, stall_s
    self._n, self._me, now = jax.process_count(), jax.process_index(), time.monotonic()
    self.alone = self._n == 1
    self._peers = [Peer(now, now) for _ in range(self._n)]
    self._last: dict[int, str] = {}  # What each said last.
    self._count, self._read_at = 0, now
    self._closed, self._ending, self._ended = threading.Event(), threading.Lock(), None
    # The store is read by all; with hundreds of processes each does it less often.
    self._every_s = max(BEAT_S, self._n / 32)
    if not self.alone:
      for work in (self._beat, self._judge):
        threading.Thread(target=work, name=f"watch{work.__name__}", daemon=True).start()

  def close(self):
    """All have come to the end."""
    if not self.alone and not self._closed.is_set():
      agree("end", self._clock, 0)
      self._closed.set()

  def leave(self, code: int, why: str) -> int:
    """Ends the process, whose main thread cannot go on because of `why`; returns `code` where it is alone.

    But for a mistake of the user's (2), that may be because a collective failed: see first who has died.
    """
    if self.alone or self._closed.is_set():
      return code
    self._ending.acquire()  # The judge, if it was first, exits.
    if code != 2 and (verdict := self._find_lost()) and verdict.why != why:
      self._exit(verdict)
    self._tell(Verdict((self._me,), why, code))
    self._wait_for_others()
    self._finish(code)

  def stopped(self, number: int, code: int):
    """Told to stop by a signal when there is nothing to save: the others need not wait for this process."""
    if not self.alone and not self._closed.is_set():
      # Not in this thread: the signal may have come while it was within the store's client.
      verdict = Verdict((self._me,), f"stopped by {signal.Signals(number).name}", code)
      teller = threading.Thread(target=self._tell, args=(verdict,), daemon=True)
      teller.start()
      teller.join(SOON_S)
      if self._me == 0:
        self._wait_for_others()
      self._dismiss()

  # The two threads.

  def _beat(self):
    while not self._closed.is_set():
      self._exchange()
      time.sleep(self._every_s)

  def _judge(self):
    at = time.monotonic()
    while not self._closed.wait(BEAT_S):
      before, at = at, time.monotonic()
      if at - before > 5 * BEAT_S:  # It was this process that slept.
        for peer in self._peers:
          peer.heard = peer.moved = at
        self._read_at = at
        continue
      if at - self._read_at > self._stall_s:
        verdict = Verdict((0,), "the coordinator on its host does not answer")
      else:
        verdict = judge(self._peers, self._me, at, self._stall_s)
      if verdict and any(p.ended for p in self._peers):
        time.sleep(2 * BEAT_S)  # The main thread may be about to say the same.
      if verdict and self._ending.acquire(blocking=False) and not self._closed.is_set():
        self._exit(verdict)

  def _exchange(self):
    now, clock, own = time.monotonic(), self._clock, self._peers[self._me]
    beat = {"marks": clock.marks, "step": clock.step, "phase": clock.phase, "notes": clock.notes,
            "ended": self._ended}
    own.take(beat, now)
    self._count += 1
    client = distributed.global_state.client
    try:
      client.key_value_set(f"{BEATS}/{self._me}", json.dumps({**beat, "count": self._count}),
                           allow_overwrite=True)
      found = client.key_value_dir_get(BEATS)
    except Exception:  # The judge sees that nothing was read.
      return
    now = self._read_at = time.monotonic()
    for key, text in found:
      i = int(key.rsplit("/", 1)[1])
      if i != self._me and text != self._last.get(i):
        self._last[i] = text
        self._peers[i].take(json.loads(text), now)

  # The end.

  def _tell(self, verdict):
    self._ended = {"why": verdict.why, "missing": verdict.missing, "code": verdict.code}
    self._exchange()

  def _find_lost(self):
    """A collective has failed. Who has died, or has given a reason?"""
    time.sleep(SOON_S)
    now = time.monotonic()
    lost = tuple(i for i, p in enumerate(self._peers)
                 if i != self._me and p.ended is None and now - p.heard > SOON_S - 1 + self._every_s - BEAT_S)
    told = judge(self._peers, self._me, now, self._stall_s)
    return told or (Verdict(lost, "has died: its connections are closed") if lost else None)

  def _wait_for_others(self):
    """Until all have ended or are silent, for a while."""
    deadline = time.monotonic() + 2 * SOON_S
    while (now := time.monotonic()) < deadline:
      if all(p.ended is not None or now - p.heard > max(SOON_S, 3 * self._every_s)
             for i, p in enumerate(self._peers) if i != self._me):
        return
      time.sleep(BEAT_S / 5)

  def _exit(self, verdict):
    now = time.monotonic()
    if verdict.code > 128:
      print(f"process {verdict.missing[0]} was {verdict.why} before there was anything to save",
            file=sys.stderr)
    else:
      print(f"train.main: failed: {describe(self._peers, verdict, self._me, now)}\n{find_place()}"
            "The same command goes on from the last checkpoint; stall_s is the limit for waiting.",
            file=sys.stderr, flush=True)
    self._tell(verdict)
    self._finish(verdict.code)

  def _finish(self, code):
    """Without Python's and JAX's own farewells, which wait for the other processes."""
    self._wait_for_others()  # Process 0 takes the coordinator with it, which ends them without a word.
    self._dismiss()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def _dismiss(self):
    if self._me == 0 and distributed.global_state.service is not None:
      distributed.global_state.service.shutdown()

"""The thread that owns the engine, and what connects it with asyncio: submit, cancel, events, a watchdog.

Everything about a Call happens on the event loop's thread; the engine is touched by its own thread only. They
meet in a queue of commands one way and in `call_soon_threadsafe`, once a step, the other way.
"""
import asyncio
import collections
import math
import queue
import sys
import threading
import time
import traceback

from infer.fields import Refusal

IDLE_S = 0.25  # Between two beats of a thread that has nothing to do.
MAX_RETRY_S = 60


class Call:
  """The texts of one HTTP request, as the engine makes them.

  Usage: `await call.accepted`, then `async for index, event in call`, `call.cancel()` in the end.
  """

  def __init__(self, worker: "Worker", requests: list, loop):
    self.requests, self.began = requests, time.monotonic()
    self.accepted = loop.create_future()  # Raises Refusal where the engine does not take one of them.
    self.accepted.add_done_callback(lambda f: f.exception())  # There may be nobody left to ask.
    self.open, self._cancelled = set(range(len(requests))), set()  # What goes on, and what is not wanted.
    self._worker, self._events = worker, asyncio.Queue()

  def __aiter__(self):
    return self

  async def __anext__(self):
    """(index, Token or Scored). Raises Refusal: the rest is not coming, and why."""
    while self.open or not self._events.empty():
      event = await self._events.get()
      if isinstance(event, Refusal):
        raise event
      if event[0] not in self._cancelled:
        return event
    raise StopAsyncIteration

  def cancel(self, index: int | None = None) -> None:
    """One text, or all, are wanted no more; their pages are free after the engine's next step."""
    for each in [index] if index is not None else sorted(self.open):
      self._cancelled.add(each)
      if each in self.open:
        self._worker.close_one(self, each)
        self._worker.commands.put(("cancel", self, each))

  def put(self, index, event) -> None:
    """Of the worker, on the loop's thread."""
    if index in self.open:
      self._events.put_nowait((index, event))
      if event.finish is not None:
        self._worker.close_one(self, index)

  def fail(self, refusal: Refusal) -> None:
    """Of the worker, on the loop's thread."""
    if not self.accepted.done():
      self.accepted.set_exception(refusal)
    elif self.open:
      self._events.put_nowait(refusal)
    for index in sorted(self.open):
      self._worker.close_one(self, index)

  def leave(self) -> None:
    """The client is gone: what waits for this call stops waiting."""
    self.cancel()
    gone = Refusal("the client closed the connection", status=499, code="client_gone")
    if not self.accepted.done():
      self.accepted.set_exception(gone)
    self._events.put_nowait(gone)


class Worker:
  """Usage: worker = Worker(engine, ...); worker.start(loop, on_death); call = worker.submit(requests).

  Attributes:
    state: "ok", "draining" or "failed".
    fault: why it failed, or None.
    n_open: texts that run or wait.
  """

  def __init__(self, engine, *, slots: int, max_waiting: int, deadline_s: float, stuck_s: float, metrics):
    """Args:
      max_waiting: texts beyond the slots that are taken in.
      deadline_s: a text that is not done by then ends with an error.
      stuck_s: a thread that has not gone round for so long is taken for dead.
    """
    self._engine, self._metrics = engine, metrics
    self.most = slots + max_waiting
    self.deadline_s, self.stuck_s = deadline_s, stuck_s
    self.state, self.fault, self.n_open = "ok", None, 0
    self.commands = queue.SimpleQueue()
    # Engine's id -> [call, index, when its last token came, whether it has only waited]; of its thread.
    self._known = {}
    self._calls = set()  # Of the loop's thread.
    self._ends = collections.deque(maxlen=64)  # When texts ended.
    self._beat, self._closed = time.monotonic(), threading.Event()
    self._snapshot = (engine.gauges(), dict(engine.counters))
    metrics.snapshot = lambda: (*self._snapshot, self.beat_age)
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  @property
  def beat_age(self) -> float:
    """Seconds since the engine's thread last went round."""
    return time.monotonic() - self._beat

  @property
  def gauges(self) -> dict[str, float]:
    return self._snapshot[0]

  def start(self, loop, on_death) -> None:
    """`on_death` is called once, on the loop's thread, when the engine is dead."""
    self._loop, self._on_death = loop, on_death
    self._beat = time.monotonic()
    self._thread.start()
    self._watchdog.start()

  def close(self) -> None:
    """Ends both threads after the step that runs, and waits for them: a process that ends amid a step may
    crash. An engine that is dead or stands still is left behind."""
    self._closed.set()
    self.commands.put(("wake", None, None))
    for thread in (self._thread, self._watchdog):
      if self.fault is None and thread.is_alive():
        thread.join(self.stuck_s)

  def submit(self, requests: list) -> Call:
    """Raises Refusal: 503 where the engine is dead or about to end, 429 where too many wait."""
    if self.state != "ok":
      raise self.refuse_state()
    if self.n_open + len(requests) > self.most:
      wait = self._guess_wait(self.n_open + len(requests) - self.most)
      raise Refusal(f"{self.n_open} texts run or wait, of {self.most} at most; try again in {wait} s",
                    status=429, code="queue_full", retry_after=wait)
    call = Call(self, requests, self._loop)
    self._calls.add(call)
    self.n_open += len(requests)
    self.commands.put(("submit", call, None))
    return call

  def refuse_state(self) -> Refusal:
    if self.state == "draining":
      return Refusal("the server is about to end and takes no more requests", status=503, code="draining",
                     retry_after=5)
    return Refusal(f"the engine is dead: {self.fault}", status=503, code="engine_dead", retry_after=30)

  def drain(self) -> None:
    """No more requests are taken; those that run go on."""
    if self.state == "ok":
      self.state = "draining"

  def fail_all(self, refusal: Refusal) -> None:
    """Ends everything that runs with an error."""
    for call in list(self._calls):
      call.fail(refusal)

  def close_one(self, call, index) -> None:
    """Of Call, on the loop's thread: one of its texts goes on no more."""
    call.open.discard(index)
    self.n_open -= 1
    self._ends.append(time.monotonic())
    if not call.open:
      self._calls.discard(call)

  def _guess_wait(self, n_ends):
    """Seconds until so many texts will have ended, at the rate of the last ones."""
    if len(self._ends) < 2:
      return 1
    rate = len(self._ends) / max(time.monotonic() - self._ends[0], 1e-3)
    return min(max(math.ceil(n_ends / rate), 1), MAX_RETRY_S)

  # The engine's thread.

  def _run(self):
    try:
      while not self._closed.is_set():
        self._beat = time.monotonic()
        self._obey(wait=not self._engine.has_work and not self._engine.run_first())
        if self._engine.has_work:
          now = time.monotonic()
          events = self._engine.step()
          self._note_begun(now)
          self._snapshot = (self._engine.gauges(), dict(self._engine.counters))
          self._route(events)
          self._end_late()
    except BaseException as e:  # Whatever ends this thread ends the server.
      traceback.print_exc()
      self.fault = f"{type(e).__name__}: {str(e)[:300]}"

  def _obey(self, wait):
    """Takes in all commands; waits for one if there is nothing else to do."""
    try:
      while True:
        name, call, index = self.commands.get(timeout=IDLE_S) if wait else self.commands.get_nowait()
        wait = False
        if name == "submit":
          self._submit(call)
        elif name == "cancel":
          for id in [id for id, (c, i, *_) in self._known.items() if c is call and i == index]:
            self._engine.cancel(id)
            del self._known[id]
    except queue.Empty:
      self._snapshot = (self._engine.gauges(), dict(self._engine.counters))

  def _submit(self, call):
    made = []
    try:
      for index, request in enumerate(call.requests):
        made.append(self._engine.submit(request))
        self._known[made[-1]] = [call, index, None, True]
    except ValueError as e:  # What only the engine knows, as how many pages there are.
      for id in made:
        self._engine.cancel(id)
        del self._known[id]
      refusal = Refusal(str(e), code="invalid_value")
      return self._tell(call.fail, refusal)
    self._tell(_accept, call)

  def _note_begun(self, now):
    """After a step that began at `now`: for whom it was the first."""
    for id, known in self._known.items():
      if known[3] and not self._engine.is_waiting(id):
        known[3] = False
        self._metrics.queue_wait.observe(now - known[0].began)

  def _route(self, events):
    now, batch = time.monotonic(), []
    for event in events:
      if (known := self._known.get(event.request)) is None:
        continue
      call, index, last, _ = known
      batch.append((call, index, event))
      if hasattr(event, "id"):  # A Token.
        if last is None:
          self._metrics.ttft.observe(now - call.began)
        else:
          self._metrics.inter_token.observe(now - last)
        known[2] = now
      if event.finish is not None:
        self._metrics.end_to_end.observe(now - call.began)
        del self._known[event.request]
    if batch:
      self._tell(_deliver, batch)

  def _end_late(self):
    now = time.monotonic()
    late = {call for call, *_ in self._known.values() if now - call.began > self.deadline_s}
    for id in [id for id, (call, *_) in self._known.items() if call in late]:
      self._engine.cancel(id)
      del self._known[id]
    for call in late:
      self._tell(call.fail, Refusal(f"the text was not done within {self.deadline_s:g} s", status=504,
                                    code="deadline"))

  def _tell(self, function, *args):
    try:
      self._loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # The loop has ended: nobody listens.
      if not self._loop.is_closed():
        raise

  # The watchdog's thread.

  def _watch(self):
    while not self._closed.wait(IDLE_S):
      if not self._thread.is_alive():
        self.fault = self.fault or "its thread has ended"
      elif self.beat_age > self.stuck_s:
        self.fault = f"no step has come back for {self.beat_age:.0f} s"
      if self.fault is not None:
        print(f"engine: {self.fault}", file=sys.stderr, flush=True)
        return self._tell(self._die)

  def _die(self):
    self.state = "failed"
    self.fail_all(self.refuse_state())
    self._on_death()


def _accept(call):
  if not call.accepted.done():
    call.accepted.set_result(None)


def _deliver(batch):
  for call, index, event in batch:
    call.put(index, event)

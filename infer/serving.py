"""The HTTP server around the application: sockets, clients that are slow, signals, and the end."""
import asyncio
import os
import socket
import sys
import threading

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from infer.app import Api, Served
from infer.fields import Refusal
from infer.listen import LOOPBACK, Options, is_loopback
from infer.serve_metrics import Metrics
from infer.worker import Worker

LINGER_S = 3.0  # /health goes on saying that the engine is dead.
KILL_S = 20.0  # After that the process ends, whatever its threads do.
HEADER_S = 15.0  # For the headers of a request to arrive.
IDLE_S = 30.0  # Between two requests of a connection.
STALL_S = 30.0  # A client that has not read for so long is cut off.


class Protocol(H11Protocol):
  """HTTP/1.1, and an end for those who do not finish their headers or do not read their answers."""
  _header_timer = _stall_timer = None

  def connection_made(self, transport):
    super().connection_made(transport)
    self._expect_headers()

  def data_received(self, data):
    self._expect_headers()
    super().data_received(data)
    if self._is_answering() and self._header_timer is not None:
      self._header_timer.cancel()
      self._header_timer = None

  def connection_lost(self, exc):
    super().connection_lost(exc)
    for timer in (self._header_timer, self._stall_timer):
      if timer is not None:
        timer.cancel()

  def pause_writing(self):
    super().pause_writing()
    self._stall_timer = self.loop.call_later(STALL_S, self.transport.abort)

  def resume_writing(self):
    super().resume_writing()
    if self._stall_timer is not None:
      self._stall_timer.cancel()

  def _expect_headers(self):
    if self._header_timer is None and not self._is_answering():
      self._header_timer = self.loop.call_later(HEADER_S, self._end_headers)

  def _end_headers(self):
    self._header_timer = None
    if not self._is_answering() and self.timeout_keep_alive_task is None:
      self.transport.abort()

  def _is_answering(self):
    return self.cycle is not None and not self.cycle.response_complete


class HttpServer(uvicorn.Server):
  """One model's. `run_until_end` answers until a signal or the engine's death."""

  def __init__(self, served: Served, engine, options: Options, listener: socket.socket):
    """`engine`: warmed up; another thread owns it from the start of the server on."""
    self.metrics = Metrics()
    self.worker = Worker(engine, slots=options.slots, max_waiting=options.max_waiting,
                         deadline_s=options.deadline_s, stuck_s=options.stuck_s, metrics=self.metrics)
    hosts = (*LOOPBACK, options.host) if is_loopback(options.host) else ()
    api = Api(served, self.worker, self.metrics, key=options.key, hosts=tuple(dict.fromkeys(hosts)))
    most = 2 * self.worker.most + 256  # Connections; those of /health and /metrics among them.
    super().__init__(uvicorn.Config(
      api.app, http=Protocol, ws="none", lifespan="off", loop="asyncio", log_level="error",
      log_config=None, access_log=False, server_header=False, proxy_headers=False, limit_concurrency=most,
      timeout_keep_alive=IDLE_S, timeout_graceful_shutdown=5, h11_max_incomplete_event_size=1 << 15))
    self._drain_s, self._listener, self._ending = options.drain_s, listener, None

  @property
  def port(self) -> int:
    return self._listener.getsockname()[1]

  def run_until_end(self) -> int:
    """The exit code: 0 after a signal, 1 where the engine died."""
    try:
      self.run(sockets=[self._listener])
    finally:
      self.worker.close()
    return 1 if self.worker.fault is not None else 0

  async def startup(self, sockets=None):
    self._loop = asyncio.get_running_loop()
    self.worker.start(self._loop, self._begin_death)
    await super().startup(sockets)

  def handle_exit(self, sig, frame):
    """The first signal drains, the second ends at once. (uvicorn's own would end by the signal.)"""
    if self.worker.state == "draining":
      self.should_exit = self.force_exit = True
    else:
      self._loop.call_soon_threadsafe(self.begin_drain)

  def begin_drain(self) -> None:
    """No more requests are taken; the server ends when the last text has."""
    self.worker.drain()
    self._ending = self._ending or self._loop.create_task(self._drain())

  async def _drain(self):
    print(f"draining: {self.worker.n_open} texts", file=sys.stderr, flush=True)
    deadline = self._loop.time() + self._drain_s
    while self.worker.n_open and self._loop.time() < deadline:
      await asyncio.sleep(0.05)
    self.worker.fail_all(Refusal("the server ended before the text did", status=503, code="draining",
                                 retry_after=5))
    self.should_exit = True

  def _begin_death(self):
    timer = threading.Timer(KILL_S, os._exit, (1,))  # The engine's thread may hold on to the process.
    timer.daemon = True
    timer.start()
    self._loop.call_later(LINGER_S, setattr, self, "should_exit", True)

"""The engine's thread: what it makes gets to those who asked, whoever leaves, and however it ends."""
import asyncio
import dataclasses
import threading
import time

import pytest

from infer import sampling
from infer.fields import Refusal
from infer.serve_metrics import COUNTERS, GAUGES, METRICS, Metrics
from infer.worker import Worker
from tests.fake_engine import FakeEngine, Request, Sampling


def request(text="hello", max_tokens=10**5, **settings):
  return Request(prompt=list(text.encode()), sampling=Sampling(max_tokens=max_tokens, **settings))


def run(test, engine=None, **options):
  """Runs the coroutine function `test` with a worker around the engine; `died` is set when it is dead."""
  engine = engine or FakeEngine()

  async def body():
    given = dict(slots=engine.slots, max_waiting=4, deadline_s=60.0, stuck_s=60.0, metrics=Metrics())
    worker, died = Worker(engine, **given | options), asyncio.Event()
    worker.start(asyncio.get_running_loop(), died.set)
    try:
      await asyncio.wait_for(test(worker, engine, died), 20)
    finally:
      worker.close()

  asyncio.run(body())


async def read(call):
  """Of each text: its bytes."""
  texts = [b"" for _ in call.requests]
  await call.accepted
  async for index, event in call:
    texts[index] += bytes([event.id]) if event.id < 256 else b""
  return texts


async def until(holds, seconds=5.0):
  end = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < end, "it did not come to hold"
    await asyncio.sleep(0.005)


def test_each_call_gets_its_own_texts():
  async def test(worker, engine, died):
    calls = [worker.submit([request(f"text {i}"), request(f"twin {i}")]) for i in range(4)]
    assert await asyncio.gather(*map(read, calls)) == [
      [f"text {i}".encode(), f"twin {i}".encode()] for i in range(4)]
    assert worker.n_open == 0 and not engine.has_work and not worker._known and not worker._calls
    told = worker._metrics.render().decode()
    assert "assay_ttft_seconds_count 8.0" in told and "assay_end_to_end_seconds_count 8.0" in told
    assert f"assay_inter_token_seconds_count {8 * 6}.0" in told
    await until(lambda: 'assay_generated_tokens_total 56.0' in worker._metrics.render().decode())

  run(test)


def test_the_wait_for_a_slot_is_told():
  """One slot, and steps of 50 ms: the second waits for the three of the first; a third leaves unserved."""
  async def test(worker, engine, died):
    first, second, third = (worker.submit([request("ab")]) for _ in range(3))
    await first.accepted
    await asyncio.sleep(0.01)
    third.cancel()
    assert await asyncio.gather(read(first), read(second)) == [[b"ab"], [b"ab"]]
    told = dict(line.split() for line in worker._metrics.render().decode().splitlines() if line[0] != "#")
    assert told["assay_queue_wait_seconds_count"] == "2.0"
    assert told['assay_queue_wait_seconds_bucket{le="0.08"}'] == "1.0"
    assert 0.12 <= float(told["assay_queue_wait_seconds_sum"]) < 1

  run(test, FakeEngine(slots=1, delay=0.05))


def test_every_metric_is_in_the_table():
  metrics = Metrics()
  told = {line.split()[2].removesuffix("_total"): line.split(maxsplit=3)[3]
          for line in metrics.render().decode().splitlines() if line.startswith("# HELP")}
  assert {name: text for name, text in told.items() if not name.endswith("_created")} == METRICS
  assert {*COUNTERS.values(), *GAUGES.values()} < METRICS.keys()


def test_too_many_are_told_when_to_come_again():
  async def test(worker, engine, died):
    calls = [worker.submit([request("x" * 100)] * 2) for _ in range(4)]
    with pytest.raises(Refusal) as e:
      worker.submit([request()])
    assert e.value.status == 429 and e.value.retry_after == 1  # Nothing has ended yet.
    assert worker.n_open == 8
    calls[0].cancel()
    assert worker.n_open == 6
    worker.submit([request()]).cancel()
    for call in calls:
      call.cancel()
    await until(lambda: not engine.has_work)
    await asyncio.sleep(0.5)
    worker.submit([request("x" * 100)] * 8)  # 10 texts have ended within half a second.
    with pytest.raises(Refusal) as e:
      worker.submit([request()] * 100)
    assert 3 <= e.value.retry_after <= 20  # 100 texts at less than 20 a second.

  run(test, FakeEngine(delay=0.01))


def test_what_is_cancelled_frees_the_engine():
  async def test(worker, engine, died):
    calls = [worker.submit([request("y" * 1000, seed=i)]) for i in range(8)]
    await calls[0].accepted
    await anext(calls[0])
    for call in calls[:7]:
      call.cancel()
    assert worker.n_open == 1
    await until(lambda: engine.gauges()["running"] + engine.gauges()["waiting"] == 1)
    calls[7].cancel()
    await until(lambda: not engine.has_work)
    await until(lambda: worker.gauges["pages_used"] == 0)
    with pytest.raises(StopAsyncIteration):
      while True:
        await anext(calls[0])

  run(test, FakeEngine(delay=0.002))


def test_one_of_several_texts_is_cancelled():
  async def test(worker, engine, died):
    call, counts = worker.submit([request("z" * 50), request("w" * 50)]), [0, 0]
    await call.accepted
    async for index, _ in call:
      counts[index] += 1
      if index == 0 and counts[0] == 5:
        call.cancel(0)
    assert counts == [5, 51] and worker.n_open == 0

  run(test)


def test_what_the_engine_refuses_is_the_requests_fault_alone():
  async def test(worker, engine, died):
    bad, good = worker.submit([request(), request("x" * 300)]), worker.submit([request()])
    with pytest.raises(Refusal, match="more than there are pages") as e:
      await bad.accepted
    assert e.value.status == 400 and await read(good) == [b"hello"]
    assert worker.n_open == 0 and worker.state == "ok" and len(engine.requests) == 2
    assert not engine.has_work

  run(test, FakeEngine(pages=200))


def test_a_text_that_takes_too_long_ends():
  async def test(worker, engine, died):
    slow, quick = worker.submit([request("x" * 100000)]), worker.submit([request("ab")])
    assert await read(quick) == [b"ab"]
    with pytest.raises(Refusal) as e:
      await read(slow)
    assert e.value.status == 504 and e.value.code == "deadline"
    await until(lambda: not engine.has_work)
    assert worker.state == "ok" and worker.n_open == 0

  run(test, FakeEngine(delay=0.001, pages=10**6), deadline_s=0.3)


def exhausted():
  raise MemoryError("planted")


def hang():
  time.sleep(3)


def leave():
  raise SystemExit


@pytest.mark.parametrize("fault, said", [(exhausted, "MemoryError: planted"), (hang, "no step has come back"),
                                         (leave, "SystemExit")])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_ends_what_runs_and_takes_no_more(fault, said):
  async def test(worker, engine, died):
    call, waiting = worker.submit([request("x" * 1000)] * 2), worker.submit([request("y" * 1000)] * 6)
    await call.accepted
    await anext(call)
    engine.fault, began = fault, time.monotonic()
    for each in (call, waiting):
      with pytest.raises(Refusal) as e:
        while True:
          await anext(each)
      assert e.value.status == 503 and said in str(e.value)
    await asyncio.wait_for(died.wait(), 1)
    assert time.monotonic() - began < 3 and worker.n_open == 0 and worker.state == "failed"
    with pytest.raises(Refusal) as e:
      worker.submit([request()])
    assert e.value.status == 503 and e.value.code == "engine_dead"

  run(test, FakeEngine(delay=0.001, pages=10**6), stuck_s=1.0)


def test_an_engine_that_rests_is_not_taken_for_stuck():
  async def test(worker, engine, died):
    await asyncio.sleep(1.2)
    assert worker.state == "ok" and worker.fault is None
    assert await read(worker.submit([request("a")])) == [b"a"]

  run(test, stuck_s=0.6)


def test_draining_finishes_what_runs():
  async def test(worker, engine, died):
    call = worker.submit([request("x" * 50)])
    worker.drain()
    with pytest.raises(Refusal) as e:
      worker.submit([request()])
    assert (e.value.status, e.value.code) == (503, "draining") and e.value.retry_after
    assert await read(call) == [b"x" * 50]

  run(test, FakeEngine(delay=0.001))


def test_the_fake_is_asked_as_the_engine_is():
  fields = lambda cls: [(f.name, f.default) for f in sorted(dataclasses.fields(cls), key=lambda f: f.name)]
  assert fields(Sampling) == fields(sampling.Sampling)


def test_closing_ends_both_threads():
  before = threading.active_count()

  async def test(worker, engine, died):
    assert threading.active_count() == before + 2

  run(test)
  time.sleep(0.6)
  assert threading.active_count() <= before


def test_closing_waits_for_what_runs():
  """XLA aborts a process that ends while a program runs for the first time."""
  engine, begun, ended = FakeEngine(), threading.Event(), threading.Event()

  async def test(worker, engine, died):
    await asyncio.to_thread(begun.wait)

  def run_first():
    begun.set()
    time.sleep(0.5)
    ended.set()
    return False

  engine.run_first = run_first
  run(test, engine)
  assert ended.is_set()


def test_programs_run_first_while_nobody_asks():
  """And who asks meanwhile does not wait for all of them."""
  engine = FakeEngine()
  engine.n_unrun, ran = 10**6, engine.run_first

  async def test(worker, engine, died):
    assert await read(worker.submit([request("one")])) == [b"one"]
    assert 0 < engine.n_unrun < 10**6
    engine.n_unrun = 3
    while engine.n_unrun:
      await asyncio.sleep(0.01)
    assert await read(worker.submit([request("two")])) == [b"two"]

  engine.run_first = lambda: time.sleep(0.001) or ran()
  run(test, engine)

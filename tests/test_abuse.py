"""The server against those who mean it ill: seconds of it each time, ten minutes with -m slow."""
import collections
import contextlib
import json
import os
import random
import socket
import threading
import time

import httpx
import pytest

from infer.fields import CHAT, COMPLETION
from infer.openapi import describe_api
from tests.fake_engine import FakeEngine, make_served
from tests.test_server import ask, post, running, until

VALUES = [
  None, True, False, 0, 1, -1, 2, 0.5, 1e18, -1e18, 1e308, 10**400, "", "x", "\ud800", "\x00", "auto",
  "required", "🦜" * 50, [], [[]], [[[[]]]], {}, {"type": "text"}, {"5": 5}, {"x": 1}, {"": None}, ["a"] * 5,
  {"type": "json_schema", "json_schema": {"schema": {}}}, [0, 1], [258], [[1], [2]],
  [{"role": "user", "content": "x"}], [{"role": "user", "content": [{"type": "text", "text": "y"}]}]]
RAW = [
  b"", b"{", b"null", b"[1]", b'"', b"\xff\xfe{}", b'{"prompt": "\xed\xa0\x80"}', b"[" * 200000,
  b'{"a":' * 9999, b'{"prompt": NaN}', b'{"n": 1e999, "prompt": ""}', b'{"n": ' + b"9" * 5000 + b"}",
  b"\x00" * 100, b" " * 2**20, b'{"prompt": "' + b"x" * 2**20 + b'"}']


def make_body(chance):
  """Bytes of a body that is wrong in places."""
  if chance.random() < 0.1:
    return chance.choice(RAW)
  is_chat = chance.random() < 0.5
  fields = list(CHAT if is_chat else COMPLETION) + ["chat_template", "max_token"]
  body = {"messages": [{"role": "user", "content": "hello"}]} if is_chat else {"prompt": "hello"}
  for name in chance.sample(fields, chance.choice([0, 1, 1, 1, 2, 3])):
    body[name] = chance.choice(VALUES)
  raw = json.dumps(body).encode()
  if chance.random() < 0.1:
    at = chance.randrange(len(raw))
    raw = raw[:at] + chance.randbytes(2) + raw[at + chance.randrange(3):]
  return raw


def check_answer(path, body, got):
  """What is refused is a 4xx in OpenAI's shape; nothing is a 5xx."""
  assert got.status_code == 200 or 400 <= got.status_code < 500, (path, body[:300], got.text[:300])
  if got.status_code != 200:
    error = got.json()["error"]
    assert error["message"] and len(error["message"]) < 1000 and error["code"], (body[:300], error)
    assert error["param"] is not None or error["code"] in (
      "invalid_json", "invalid_type", "body_too_large", "queue_full"), (body[:300], error)


def send_bodies(server, seed, seconds):
  chance, end, n = random.Random(seed), time.monotonic() + seconds, 0
  with httpx.Client(timeout=30) as http:
    while time.monotonic() < end:
      path = chance.choice(["/v1/completions", "/v1/chat/completions"])
      body = make_body(chance)
      check_answer(path, body, http.post(f"http://127.0.0.1:{server.port}{path}", content=body,
                                         headers={"content-type": "application/json"}))
      n += 1
  return n


def send_bytes(server, seed, seconds):
  """What is no HTTP, or stops, or drips, or hangs up."""
  chance, end = random.Random(seed), time.monotonic() + seconds
  whole = post({"prompt": "x" * 100, "max_tokens": 50, "stream": True})
  while time.monotonic() < end:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=2) as s:
      kind = chance.randrange(5)
      if kind == 0:
        s.sendall(chance.randbytes(chance.randrange(1, 3000)))
      elif kind == 1:
        s.sendall(whole[:chance.randrange(len(whole))])
      elif kind == 2:
        for byte in whole[:chance.randrange(60)]:
          s.sendall(bytes([byte]))
      elif kind == 3:
        s.sendall(b"GET / HTTP/1.1\r\nA: " + b"b" * chance.choice([10, 70000]))
        s.sendall(b"\r\n" * chance.randrange(3))
      else:
        s.sendall(whole * chance.randrange(1, 4))
        s.recv(chance.randrange(1, 500))
      if chance.random() < 0.3:
        s.shutdown(socket.SHUT_WR)


def memory():
  """MB of this process that are in use."""
  with open("/proc/self/statm") as f:
    return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def attack(server, seconds, n_threads):
  """Both at once, from several threads; how many bodies were answered."""
  counts, faults = [], []

  def guarded(function, *args):
    try:
      counts.append(function(server, *args) or 0)
    except BaseException as e:
      faults.append(e)

  threads = [threading.Thread(target=guarded, args=(function, seed, seconds))
             for seed in range(n_threads) for function in (send_bodies, send_bytes)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  if faults:
    raise faults[0]
  until(lambda: server.worker.n_open == 0 and not server.engine.has_work)
  assert ask(server, "/health").status_code == 200 and server.worker.gauges["pages_used"] == 0
  return sum(counts)


def test_nothing_brings_it_down_in_seconds(capfd):
  with running(FakeEngine(slots=8)) as server:
    assert attack(server, 2, 1) > 15
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["made up", "real"])
def test_nothing_brings_it_down_in_ten_minutes(capfd, kind):
  """Memory may grow by 50 MB. ABUSE_S=seconds for less."""
  from tests.real_engine import make_real
  seconds = float(os.environ.get("ABUSE_S", 600))
  engine, served = make_real() if kind == "real" else (FakeEngine(slots=8), None)
  with running(engine, served) as server:
    if kind == "made up":
      engine.requests = collections.deque(maxlen=9)  # It keeps what it was asked.
    attack(server, 20, 2)  # What is made once.
    before = memory()
    n = attack(server, seconds, 2)
    grown = memory() - before
    with capfd.disabled():
      print(f"{kind}: {n} bodies in {seconds:g} s, {grown:+.1f} MB")
    assert grown < 50 and n > 3 * seconds
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("n_examples", [4, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_description_is_what_is_answered(n_examples):
  """Bodies that hold to /openapi.json, and ones that do not, by schemathesis: those are refused."""
  pytest.importorskip("schemathesis", reason="makes requests by the description: pip install schemathesis")
  import hypothesis
  import schemathesis
  from schemathesis import checks
  with running(FakeEngine(slots=8)) as server:
    address = f"http://127.0.0.1:{server.port}"
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 7
    for operation in operations:
      for mode in schemathesis.GenerationMode:
        if mode.name == "NEGATIVE" and operation.method == "get":
          continue  # There is nothing to be wrong about.

        @hypothesis.settings(max_examples=n_examples, deadline=None, database=None, derandomize=True,
                             suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(operation.as_strategy(mode))
        def check(case):
          case.call_and_validate(base_url=address, checks=[
            checks.not_a_server_error, checks.CHECKS.get_one("status_code_conformance"),
            checks.CHECKS.get_one("content_type_conformance"),
            checks.CHECKS.get_one("response_schema_conformance"),
            checks.CHECKS.get_one("negative_data_rejection")])

        check()


def test_the_description_is_openapi():
  described = describe_api("m")
  assert described["openapi"] == "3.1.0" and json.loads(json.dumps(described)) == described
  assert make_served().name == "fake"

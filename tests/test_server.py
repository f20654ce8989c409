"""The server as its clients see it: the official client's calls, refusals, disconnects, the end."""
import concurrent.futures
import contextlib
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import httpx
import pytest

from infer.listen import Options, bind
from infer.serve_metrics import METRICS
from infer.server import main, make_parser
from infer.serving import HttpServer
from tests.fake_engine import FakeEngine, make_served
from tests.tiny import ROOT

openai = pytest.importorskip("openai", reason="the client that the server is for")
TALK = [{"role": "user", "content": "hello wörld"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@contextlib.contextmanager
def running(engine=None, served=None, **options):
  """An HttpServer that answers, in a thread."""
  engine = engine or FakeEngine()
  server = HttpServer(served or make_served(), engine, Options(port=0, slots=engine.slots, **options),
                      bind("127.0.0.1", 0))
  codes = []
  thread = threading.Thread(target=lambda: codes.append(server.run_until_end()), daemon=True)
  thread.start()
  until(lambda: server.started)
  server.engine, server.codes = engine, codes
  try:
    yield server
  finally:
    server.should_exit = server.force_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def server():
  with running() as server:
    yield server


@pytest.fixture(autouse=True)
def nothing_is_left(request):
  yield
  if "server" in request.fixturenames:
    server = request.getfixturevalue("server")
    until(lambda: server.worker.n_open == 0 and not server.engine.has_work)


@pytest.fixture
def client(server):
  return client_of(server)


def client_of(server, key="-"):
  return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=key, max_retries=0)


def ask(server, path, body=None, **more):
  """The answer to a raw request."""
  url = f"http://127.0.0.1:{server.port}{path}"
  with httpx.Client(timeout=20) as http:
    return http.get(url, **more) if body is None else http.post(url, **(
      {"content": body, "headers": {"content-type": "application/json"}} if isinstance(body, bytes)
      else {"json": body}) | more)


def post(asked) -> bytes:
  """A request as it is sent."""
  body = json.dumps(asked).encode()
  return (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
          + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)


def until(holds, seconds=10.0):
  end = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < end, "it did not come to hold"
    time.sleep(0.01)


# The official client.

def test_completions(client, server):
  made = client.completions.create(model="fake", prompt=["hello", "wörld"], seed=7, max_tokens=20, user="me")
  assert [(c.index, c.text, c.finish_reason) for c in made.choices] == [
    (0, "hello", "stop"), (1, "wörld", "stop")]
  assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (13, 13, 26)
  assert made.object == "text_completion" and made.model == "fake" and made.id.startswith("cmpl-")
  assert server.engine.requests[-1].user == "me" and server.engine.requests[-1].prompt[0] == 256
  ids = client.completions.create(model="fake", prompt=[104, 105], seed=0)
  assert ids.choices[0].text == "hi" and ids.usage.prompt_tokens == 2  # No marker is put before ids.
  cut = client.completions.create(model="fake", prompt="hello", seed=0, max_tokens=2)
  assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("he", "length")


def test_samples_are_those_of_the_seeds_after_it(client):
  make = lambda **more: [c.text for c in client.completions.create(
    model="fake", prompt="abc", max_tokens=9, **more).choices]
  assert make(n=3, seed=4) == make(seed=4) + make(seed=5) + make(seed=6)
  assert make(seed=4) == make(seed=4) != make(seed=5)
  assert len({*make(n=8)}) == 7  # The fake's seeds go round after 7.


def test_beam_search(client, server):
  """The texts are the engine's, the best first, for each prompt."""
  asked = dict(model="fake", n=3, temperature=0, logprobs=0, max_tokens=9,
               extra_body={"use_beam_search": True, "length_penalty": 2})
  got = client.completions.create(prompt=["abc", "x"], **asked)
  assert [c.text for c in got.choices] == ["abc", "bcd", "cde", "x", "y", "z"]
  assert [c.finish_reason for c in got.choices] == ["stop", "length", "length"] * 2
  assert got.choices[1].logprobs.token_logprobs == [-0.5, -1.0, -1.5]
  assert got.usage.completion_tokens == 4 + 3 + 3 + 2 + 1 + 1
  request = server.engine.requests[-1]
  assert request.beams == {"width": 3, "n": 3, "length_penalty": 2}
  assert request.sampling.temperature == 1 and len(server.engine.requests[-2].prompt) == 4


def test_settings_reach_the_engine(client, server):
  client.completions.create(
    model="fake", prompt="x", max_tokens=5, temperature=0.5, top_p=0.9, presence_penalty=1,
    frequency_penalty=-1, logit_bias={"65": 5, "3": -100}, seed=3, logprobs=2,
    extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2})
  got = server.engine.requests[-1].sampling
  assert (got.max_tokens, got.temperature, got.top_p, got.top_k, got.min_p, got.repetition_penalty) == (
    5, 0.5, 0.9, 4, 0.1, 1.2)
  assert (got.presence_penalty, got.frequency_penalty, got.min_tokens, got.seed) == (1, -1, 2, 3)
  assert got.logit_bias == ((3, -100.0), (65, 5.0)) and got.logprobs == 2 and got.prompt_logprobs is None
  client.chat.completions.create(model="fake", messages=TALK)
  assert server.engine.requests[-1].sampling.max_tokens == 200 - 13


def test_streams_are_the_whole_in_pieces(client):
  for stop in (None, "o w", ["zz", "ö"]):
    asked = dict(model="fake", messages=TALK, seed=0, stop=stop, n=2, logprobs=True, top_logprobs=2)
    whole = client.chat.completions.create(**asked)
    chunks = [*client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})]
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert all(c.usage is None for c in chunks[:-1]) and len({c.id for c in chunks}) == 1
    for choice in whole.choices:
      mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
      assert "".join(c.delta.content or "" for c in mine) == choice.message.content
      assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
      assert [c.delta.role for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
      entries = [e for c in mine for e in c.logprobs.content]
      assert entries == choice.logprobs.content
      assert b"".join(bytes(e.bytes) for e in entries).decode() == choice.message.content
      assert all(len(e.top_logprobs) == 2 for e in entries)
    first = whole.choices[0].message.content
    assert first == {None: "hello wörld", "o w": "hell"}.get(stop if stop is None or isinstance(stop, str)
                                                             else "list", "hello w")
  text = client.completions.create(model="fake", prompt="abc", seed=0, stream=True, echo=True)
  assert "".join(c.choices[0].text for c in text) == "abcabc"


def test_a_stop_string_stops_the_engine_too():
  with running(FakeEngine(delay=0.002, pages=10**6), make_served(max_length=10**5)) as server:
    made = client_of(server).completions.create(model="fake", prompt="abc" + "x" * 4000, stop="c", seed=0,
                                                max_tokens=5000)
    assert made.choices[0].text == "ab" and made.usage.completion_tokens == 3
    assert server.engine.counters["generated_tokens"] < 500


def test_scoring_a_prompt(client):
  made = client.completions.create(model="fake", prompt="héy", max_tokens=0, echo=True, logprobs=1)
  choice = made.choices[0]
  assert choice.text == "héy" and choice.finish_reason == "length" and made.usage.completion_tokens == 0
  assert choice.logprobs.tokens[:2] == ["<s>", "h"] and len(choice.logprobs.tokens) == 5
  assert choice.logprobs.token_logprobs == [None, -0.25, -0.5, -0.75, -1.0]
  assert choice.logprobs.text_offset == [0, 0, 1, 1, 2] and choice.logprobs.top_logprobs[0] is None


def test_structured_texts(client, server):
  make = lambda **more: client.chat.completions.create(model="fake", messages=TALK, **more).choices[0]
  assert json.loads(make(response_format={"type": "json_object"}).message.content) == {"a": 1}
  form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
  assert json.loads(make(response_format=form, n=2).message.content) == {"name": "x"}
  assert len({id(r.grammar) for r in server.engine.requests[-2:]}) == 2  # Each text has a state of its own.
  assert make(extra_body={"regex": "a+b"}).message.content == "aab"
  with pytest.raises(openai.BadRequestError, match="regex at character 2") as e:
    make(extra_body={"regex": "a+bad"})
  assert e.value.param == "regex"
  with pytest.raises(openai.UnprocessableEntityError, match="too hard"):
    make(extra_body={"regex": "hard"})


def test_tools(client, server):
  talk = [{"role": "user", "content": 'so: CALL add {"a": 1};CALL add {"a": 2};'}]
  make = lambda **more: client.chat.completions.create(model="fake", messages=talk, tools=[TOOL], seed=0,
                                                       **more)
  made = make().choices[0]
  assert made.finish_reason == "tool_calls" and made.message.content == "so: "
  assert [(c.function.name, json.loads(c.function.arguments)) for c in made.message.tool_calls] == [
    ("add", {"a": 1}), ("add", {"a": 2})]
  chunks = [c.choices[0] for c in make(stream=True)]
  calls = [call for c in chunks for call in c.delta.tool_calls or ()]
  assert [(c.index, c.function.arguments) for c in calls] == [(0, '{"a": 1}'), (1, '{"a": 2}')]
  assert "".join(c.delta.content or "" for c in chunks) == "so: " and chunks[-1].finish_reason == "tool_calls"
  one = make(parallel_tool_calls=False).choices[0]
  assert len(one.message.tool_calls) == 1 and one.finish_reason == "tool_calls"
  assert make(tool_choice="none").choices[0].message.content == talk[0]["content"]
  for choice in ("required", {"type": "function", "function": {"name": "add"}}):
    forced = make(tool_choice=choice).choices[0]
    assert forced.message.content is None and forced.message.tool_calls[0].function.name == "add"
    assert forced.finish_reason == "tool_calls"
    assert server.engine.requests[-1].prompt[-4:] == list(b"CALL")
  never = {"type": "function", "function": {"name": "never"}}
  with pytest.raises(openai.BadRequestError, match="cannot be forced"):
    client.chat.completions.create(model="fake", messages=talk, tools=[TOOL, never], tool_choice=never)
  with running(served=make_served(tools=None, grammars=None)) as plain:
    for more, name in ((dict(tools=[TOOL]), "tools"),
                       (dict(response_format={"type": "json_object"}), "response_format")):
      with pytest.raises(openai.BadRequestError) as e:
        client_of(plain).chat.completions.create(model="fake", messages=talk, **more)
      assert e.value.param == name


def test_models_and_what_is_not_served(client, server):
  assert [m.id for m in client.models.list()] == ["fake"] and client.models.retrieve("fake").id == "fake"
  for wrong, kind in ((lambda: client.models.retrieve("gpt"), openai.NotFoundError),
                      (lambda: client.completions.create(model="gpt", prompt=""), openai.NotFoundError),
                      (lambda: client.embeddings.create(model="fake", input="x"), openai.BadRequestError),
                      (lambda: client.completions.create(model="fake", prompt="x", temperature=3),
                       openai.BadRequestError),
                      (lambda: client.chat.completions.create(
                        model="fake", messages=[{"role": "user", "content": "refuse me"}]),
                       openai.BadRequestError)):
    with pytest.raises(kind) as e:
      wrong()
    assert e.value.code and e.value.body["message"]


# Refusals.

def test_refusals_have_openais_shape(server):
  for path, body, status, param in (
      ("/v1/completions", b"{", 400, None), ("/v1/completions", b"\xff\xfe", 400, None),
      ("/v1/completions", b"[" * 5000, 400, None), ("/v1/completions", b"[1]", 400, None),
      ("/v1/completions", {"prompt": "x", "n": 10**18}, 400, "n"),
      ("/v1/completions", {"prompt": "x", "max_token": 1}, 400, "max_token"),
      ("/v1/completions", {"prompt": "x" * 300}, 400, "prompt"),
      ("/v1/chat/completions", {"messages": TALK, "chat_template": "{{ x }}"}, 400, "chat_template"),
      ("/v1/chat/completions", {"messages": TALK, "max_tokens": 190}, 400, "max_tokens"),
      ("/v1/nothing", None, 404, None), ("/v1/completions", None, 405, None), ("/health", {}, 405, None),
      ("/v1/models/%2e%2e%2fetc", None, 404, "model")):
    got = ask(server, path, body)
    error = got.json()["error"]
    assert (got.status_code, error["param"]) == (status, param), (path, body, error)
    assert error.keys() == {"message", "type", "param", "code"} and len(error["message"]) < 700
    assert got.headers["content-type"] == "application/json"
  assert ask(server, "/v1/completions", b" " * (1 << 20) + b"  ").status_code == 413
  typed = lambda kind: ask(server, "/v1/completions", b"{}", headers={"content-type": kind})
  assert typed("text/plain").status_code == 415  # What a page elsewhere may send without asking.
  assert typed("application/json; charset=utf-8").status_code == 400
  told = ask(server, "/metrics").text
  assert 'assay_errors_total{code="wrong_content_type"} 1.0' in told
  assert 'assay_http_responses_total{path="/v1/completions",status="413"} 1.0' in told
  assert 'path="other",status="404"' in told and "nothing" not in told


def test_a_fault_of_ours_is_a_500_that_tells_nothing(server, monkeypatch, capfd):
  monkeypatch.setattr("infer.app.read_completion", None)
  got = ask(server, "/v1/completions", {"prompt": "x"})
  assert got.status_code == 500 and got.json()["error"]["code"] == "internal_error"
  assert "NoneType" not in got.text and "TypeError" in capfd.readouterr().err


def test_metrics_and_the_description(server):
  ask(server, "/v1/completions", {"prompt": "abc", "seed": 0})
  told = ask(server, "/metrics")
  assert told.headers["content-type"].startswith("text/plain")
  for name in METRICS:
    assert f"# HELP {name}" in told.text
  described = ask(server, "/openapi.json").json()
  assert "min_p" in json.dumps(described["paths"]["/v1/completions"])
  health = ask(server, "/health")
  assert health.status_code == 200 and health.json()["status"] == "ok"


def test_a_key(server):
  key = "k" * 32
  with running(key=key) as locked:
    assert client_of(locked, key).models.list().data
    for given in ({}, {"authorization": "Bearer x"}, {"authorization": f"Bearer {key}x"},
                  {"authorization": f"Basic {key}"}, {"authorization": "Bearer \xe9".encode("latin-1")}):
      for path in ("/v1/models", "/metrics", "/openapi.json"):
        got = ask(locked, path, headers=given)
        assert got.status_code == 401 and got.json()["error"]["code"] == "invalid_api_key"
    assert ask(locked, "/health").status_code == ask(locked, "/").status_code == 200


def test_other_names_and_other_origins_get_nothing(server):
  """A page elsewhere whose name was made to mean this machine (DNS rebinding), and one that just asks."""
  assert ask(server, "/v1/models", headers={"host": "evil.example:8000"}).status_code == 403
  for good in ("localhost:1", "127.0.0.1", "[::1]:80", "LOCALHOST"):
    assert ask(server, "/v1/models", headers={"host": good}).status_code == 200
  got = ask(server, "/v1/models", headers={"origin": "https://evil.example"})
  assert not [name for name in got.headers if name.startswith("access-control")]


def test_the_page_needs_nothing_from_elsewhere(server):
  got = ask(server, "/")
  policy = got.headers["content-security-policy"]
  assert "default-src 'none'" in policy and policy.count("sha256-") == 2 and "unsafe" not in policy
  assert not re.findall(r"(?:src|href)=\"(?!data:)|url\(|https?://|@import| on[a-z]+=\"| style=\"", got.text)


# Those who leave, wait, or are slow.

def test_disconnects_leave_nothing_running():
  """200 clients hang up in the middle of an answer, a third of them of one that is no stream."""
  engine = FakeEngine(slots=8, delay=0.001, pages=10**6)
  with running(engine, make_served(max_length=10**5), max_waiting=300) as server:
    for i in range(200):
      asked = {"prompt": "x" * 5000, "max_tokens": 50000, "stream": i % 3 > 0, "n": 1 + i % 2}
      with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(post(asked))
        if i % 3 > 0 and i % 5 == 0:
          assert s.recv(100).startswith(b"HTTP/1.1 200")
    until(lambda: server.worker.n_open == 0 and not server.engine.has_work)
    until(lambda: server.worker.gauges["pages_used"] == 0)
    assert ask(server, "/health").status_code == 200 and len(server.engine.requests) > 100


@pytest.mark.slow
def test_a_thousand_disconnects_leave_no_page_held():
  """In the middle of streams of the real engine; the gauge is that of /metrics."""
  from tests.real_engine import make_real
  engine, served = make_real(n_pages=500)
  gauge = lambda name: float(re.search(f"^{name} (.*)$", ask(server, "/metrics").text, re.MULTILINE)[1])

  def leave(i):
    asked = {"prompt": "x" * (1 + i % 90) + str(i), "max_tokens": 300, "min_tokens": 300, "stream": True,
             "n": 1 + i % 3}
    with httpx.Client(timeout=60) as http, http.stream("POST", address, json=asked) as answer:
      assert answer.status_code == 200
      lines = answer.iter_lines()
      assert all(next(lines).startswith(("data: {", "")[n % 2]) for n in range(1 + 2 * (i % 4)))
    if i % 50 == 7:
      held.append(gauge("assay_pages_used"))

  with running(engine, served) as server:
    address, held = f"http://127.0.0.1:{server.port}/v1/completions", []
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      list(pool.map(leave, range(1000)))
    until(lambda: gauge("assay_pages_used") == 0)
    assert max(held) > 0 and ask(server, "/health").json()["open"] == 0


def test_too_many_requests_are_told_when_to_come_again():
  with running(FakeEngine(slots=2, delay=0.01), max_waiting=2) as server:
    streams = [client_of(server).completions.create(model="fake", prompt="x" * 90, max_tokens=90, stream=True)
               for _ in range(4)]
    with pytest.raises(openai.RateLimitError) as e:
      client_of(server).completions.create(model="fake", prompt="x")
    assert int(e.value.response.headers["retry-after"]) >= 1 and e.value.code == "queue_full"
    with pytest.raises(openai.BadRequestError, match="more than the 4"):
      client_of(server).completions.create(model="fake", prompt="x", n=5)
    for stream in streams:
      stream.close()
    until(lambda: server.worker.n_open == 0)
    assert client_of(server).completions.create(model="fake", prompt="x", seed=0).choices[0].text == "x"


def test_deadlines():
  with running(FakeEngine(delay=0.01, pages=10**6), make_served(max_length=10**5), deadline_s=0.2) as server:
    asked = dict(model="fake", prompt="x" * 1000, max_tokens=1000)
    with pytest.raises(openai.APIStatusError) as e:
      client_of(server).completions.create(**asked)
    assert e.value.status_code == 504
    with pytest.raises(openai.APIError, match="not done within 0.2 s"):
      for _ in client_of(server).completions.create(**asked, stream=True):
        pass
    assert ask(server, "/health").status_code == 200


def test_those_who_do_not_finish_asking_are_cut_off(monkeypatch):
  monkeypatch.setattr("infer.serving.HEADER_S", 0.3)
  monkeypatch.setattr("infer.app.BODY_S", 0.3)
  with running() as server:
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for begun, more, said in ((b"", b"", b""), (health[:-2], b"", b""), (health[:-2], b"A:b\r\n", b""),
                              (health, health[:5], b"HTTP/1.1 200"),
                              (post({"prompt": "x"})[:-3], b"", b"HTTP/1.1 408")):
      with socket.create_connection(("127.0.0.1", server.port), timeout=5) as s:
        s.sendall(begun)
        time.sleep(0.15)
        s.sendall(more)
        began, got = time.monotonic(), b""
        with contextlib.suppress(ConnectionResetError):
          while part := s.recv(4096):
            got += part
        assert got.startswith(said) and (got or not said) and time.monotonic() - began < 2


def test_those_who_do_not_read_are_cut_off(monkeypatch):
  monkeypatch.setattr("infer.serving.STALL_S", 0.3)
  with running(FakeEngine(pages=10**6), make_served(max_length=10**5)) as server:
    asked = {"prompt": "x" * 20000, "max_tokens": 20000, "stream": True, "logprobs": 20}
    with socket.socket() as s:
      s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
      s.connect(("127.0.0.1", server.port))
      s.sendall(post(asked))
      until(lambda: len(server.engine.requests) == 1)
      until(lambda: server.worker.n_open == 0 and not server.server_state.connections)


# The end.

@contextlib.contextmanager
def process(*flags):
  """The fake engine's server as a process: (it, its port)."""
  with subprocess.Popen([sys.executable, "-m", "tests.fake_engine", *flags], cwd=ROOT, stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE, text=True) as p:
    try:
      port = int(p.stdout.readline())
      until(lambda: _answers(port))
      yield p, port
    finally:
      p.kill()


def _answers(port):
  try:
    return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
  except httpx.TransportError:
    return False


def _stream(port, n=200):
  client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)
  return client.completions.create(model="fake", prompt="x" * n, max_tokens=n, seed=0, stream=True)


def test_sigterm_drains():
  with process("--delay=0.01") as (p, port):
    stream = _stream(port)
    next(stream)
    os.kill(p.pid, signal.SIGTERM)
    until(lambda: httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503)
    assert httpx.get(f"http://127.0.0.1:{port}/health").json()["status"] == "draining"
    got = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "x"})
    assert got.status_code == 503 and int(got.headers["retry-after"]) > 0
    assert "".join(c.choices[0].text for c in stream) == "x" * 199
    assert p.wait(10) == 0


def test_what_does_not_end_while_draining_ends_with_an_error():
  with process("--delay=0.01", "--drain_s=0.3") as (p, port):
    stream = _stream(port, 30000)
    next(stream)
    os.kill(p.pid, signal.SIGTERM)
    with pytest.raises(openai.APIError, match="before the text did"):
      for _ in stream:
        pass
    assert p.wait(10) == 0


@pytest.mark.parametrize("flag, said", [("--fault_after=50", "RuntimeError: planted"),
                                        ("--hang_after=50", "no step has come back")])
def test_a_dead_engine_ends_the_process(flag, said):
  with process("--delay=0.005", "--stuck_s=1", flag) as (p, port):
    stream, began = _stream(port), time.monotonic()
    with pytest.raises(openai.APIError, match=said):
      for _ in stream:
        pass
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503
    assert time.monotonic() - began < 5
    got = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "x"})
    assert got.status_code == 503 and got.json()["error"]["code"] == "engine_dead"
    assert p.wait(30) == 1 and said in p.stderr.read()


@pytest.mark.slow
def test_a_killed_engine_thread_ends_the_process(tmp_path):
  """Of the real engine, with two texts waiting."""
  from tests.real_engine import serving, tiny_folder
  with serving(tiny_folder(tmp_path), "--slots=4", "--name=fake") as (p, port, *_):
    client, ends = client_of(types.SimpleNamespace(port=port)), []

    def read(i):
      try:
        for _ in client.completions.create(model="fake", prompt="Once", max_tokens=2000, seed=i,
                                           stream=i % 2 > 0, extra_body={"min_tokens": 2000}):
          pass
      except openai.OpenAIError as e:
        ends.append((str(e), time.monotonic()))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(6)]
    for thread in threads:
      thread.start()
    metrics = lambda: httpx.get(f"http://127.0.0.1:{port}/metrics").text
    until(lambda: re.search(r"^assay_running 4.0$(.*\n)*^assay_waiting 2.0$", metrics(), re.MULTILINE))
    os.kill(p.pid, signal.SIGUSR1)
    began = time.monotonic()
    until(lambda: httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503, 5)
    sick = time.monotonic() - began
    assert httpx.get(f"http://127.0.0.1:{port}/health").json()["status"] == "failed"
    for thread in threads:
      thread.join(10)
    assert len(ends) == 6 and all("the engine is dead" in text for text, _ in ends)
    assert p.wait(30) == 1
    print(f"503 after {sick:.1f} s, the last error after {max(at for _, at in ends) - began:.1f} s, "
          f"the end after {time.monotonic() - began:.1f} s")


# The command line.

@pytest.mark.parametrize("flags, said", [
  ([], "give --run=DIR"), (["--run=a", "--model=b"], "not both"),
  (["--model=x", "--prot=1"], "did you mean --port"), (["--model=x", "--port=70000"], "--port=70000"),
  (["--model=x", "--slots=0"], "--slots=0 must be at least 1"),
  (["--model=x", "--stuck_s=nan"], "--stuck_s=nan"),
  (["--model=x", "--host=a.example"], "give --api_key_file"),
  (["--model=x", "--host=0.0.0.0"], "give --api_key_file"), (["--model=/nowhere/x"], "is no imported model"),
  (["--model=x", "--api_key_file=/nowhere"], "cannot be read")])
def test_mistakes_are_told_at_once(flags, said, capsys, monkeypatch):
  monkeypatch.delenv("ASSAY_API_KEY", raising=False)
  assert main([*flags, *["--port=0"] * ("--port=70000" not in flags)]) == 2
  assert said in capsys.readouterr().err


def test_short_keys_are_none(tmp_path, capsys):
  for text, good in (("", False), ("short", False), ("k" * 31 + "\xe9", False), ("k" * 32 + "\n", True)):
    (tmp_path / "key").write_text(text)
    assert main(["--model=/nowhere", "--host=0.0.0.0", "--port=0", f"--api_key_file={tmp_path}/key"]) == 2
    assert ("no imported model" in capsys.readouterr().err) == good


def test_weights_that_cannot_be_read_end_the_start(tmp_path, capsys, monkeypatch):
  """Whether that is seen before anything is compiled, or while it is."""
  from tests.real_engine import tiny_folder

  def fail(*_):
    raise OSError("the disk is gone")

  flags = f"--model={tiny_folder(tmp_path)}", "--port=0", "--slots=1", "--prefill_chunk=32"
  assert main([*flags, "--step=7"]) == 2 and "--step=7 was not saved" in capsys.readouterr().err
  monkeypatch.setattr("infer.engine.read_weights", fail)
  assert main([*flags]) == 1
  said = capsys.readouterr().err
  assert "at step 0: params" in said and "failed: OSError: the disk is gone" in said and gc.isenabled()
  next((tmp_path / "run").rglob("meta.json")).write_text("{}")
  assert main([*flags]) == 1 and "damaged" in capsys.readouterr().err


def test_a_missing_extra_is_named(capsys, monkeypatch):
  monkeypatch.setattr("infer.server.NEEDED", ("starlette", "no_such_module"))
  assert main(["--model=/nowhere", "--port=0"]) == 2
  said = capsys.readouterr().err
  assert "no module no_such_module; pip install -e '.[serve]'" in said and "starlette" not in said


def test_help_names_every_flag():
  text = make_parser().format_help()
  for name in ("--model", "--host", "--api_key_file", "--slots", "--drain_s", "--stuck_s", "SIGTERM"):
    assert name in text


def test_mistakes_do_not_wait_for_jax():
  code = ("import sys; from infer.server import main; c = main(['--model=x', '--host=::']); "
          "assert 'jax' not in sys.modules; sys.exit(c)")
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"ASSAY_API_KEY": "x"},
                        capture_output=True).returncode == 2

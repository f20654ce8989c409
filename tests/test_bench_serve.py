"""`bench serve`: its figures by closed forms, on a clock that only moves when somebody waits; and against a
server of sockets."""
import asyncio
import heapq
import json
import subprocess
import sys

import httpx
import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import serve
from experiments.bench.clients import (
  Client,
  Request,
  draw_arrivals,
  draw_requests,
  plot,
  send_closed,
  send_open,
  send_static,
  summarise,
  together,
)
from experiments.bench.load import ServerFailed
from tests.fake_engine import FakeEngine
from tests.test_server import running
from tests.tiny import ROOT


class MadeUpClock(asyncio.SelectorEventLoop):
  """An event loop whose time passes at once, and only while everybody waits."""

  def __init__(self):
    super().__init__()
    self._now, look = 100.0, self._selector.select

    def select(timeout):
      self._now += timeout or 0.0
      return look(0)

    self._selector.select = select

  def time(self):
    return self._now


class Stream(httpx.AsyncByteStream):
  """Parts of an answer, each (seconds after the one before, bytes)."""

  def __init__(self, *parts):
    self._parts = parts

  async def __aiter__(self):
    for seconds, part in self._parts:
      await asyncio.sleep(seconds)
      yield part


def event(value):
  return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()


def text(first, gap, n, usage=True):
  """The stream of n tokens."""
  pieces = [(gap if i else first, event({"choices": [{"text": "x"}]})) for i in range(n)]
  end = [(0, event({"choices": [], "usage": {"completion_tokens": n}}))] * usage
  return httpx.Response(200, stream=Stream(*pieces, *end, (0, event("[DONE]"))))


def send_all(answer, order, *args, timeout_s=1e6):
  """(what was seen, when each request came). `answer`: (how many came before, the request's body) ->
  Response."""
  came = []

  async def handle(request):
    came.append(asyncio.get_running_loop().time() - 100.0)
    response = answer(len(came) - 1, json.loads(request.content))
    if isinstance(response, Exception):
      raise response
    return response

  async def body():
    async with httpx.AsyncClient(transport=httpx.MockTransport(handle), base_url="http://made.up") as http:
      return await order(Client(http, "m", timeout_s).send, *args)

  with asyncio.Runner(loop_factory=MadeUpClock) as runner:
    return runner.run(body()), came


def asks(*max_tokens):
  return [Request([1, 2], n) for n in max_tokens]


def percentiles(p50, p95, p99):
  return pytest.approx({"p50": p50, "p95": p95, "p99": p99}, abs=0.006)


# Figures.

def test_latencies_are_those_that_were_made():
  """Of 100 requests, one after the other, the k-th waits 0.1 k s, and 0.01 k s for each of 4 tokens more."""
  seen, _ = send_all(lambda i, _: text(0.1 * (i + 1), 0.01 * (i + 1), 5), send_closed, asks(*[5] * 100), 1)
  line = summarise(seen)
  assert line["ttft_ms"] == percentiles(5050, 9505, 9901)  # 100 (1 + 99 p).
  assert line["tpot_ms"] == percentiles(505, 950.5, 990.1)
  assert line["inter_token_ms"] == percentiles(505, 950.5, 990.1)
  assert line["end_to_end_ms"] == percentiles(7070, 13307, 13861.4)
  wall_s = 0.14 * 5050
  assert (line["requests"], line["completed"], line["prompt_tokens"], line["output_tokens"]) == (
    100, 100, 200, 500)
  assert line["wall_s"] == pytest.approx(wall_s)
  assert line["tokens_per_s"] == pytest.approx(500 / wall_s, abs=0.05)
  assert line["requests_per_s"] == pytest.approx(100 / wall_s, abs=1e-3)
  assert line["errors"] == {} and line["answers_429"] == 0


def test_the_picture_holds_the_percentiles(tmp_path, monkeypatch):
  from matplotlib.figure import Figure
  figures, save = [], Figure.savefig
  monkeypatch.setattr(Figure, "savefig", lambda self, path: (figures.append(self), save(self, path)))
  seen, _ = send_all(lambda i, _: text(0.1 * (i + 1), 0.01 * (i + 1), 5), send_closed, asks(*[5] * 100), 1)
  plot(seen, tmp_path / "x.png", "title")
  assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
  first, between, end = figures[0].axes
  assert first.texts[0].get_text() == "p50  5050\np95  9505\np99  9901"
  for axes, most in ((first, 10_000), (between, 1000), (end, 14_000)):
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(most) and axes.get_ylim()[0] == 0
    assert most <= axes.get_ylim()[1] < 1.2 * most


def test_a_piece_may_be_more_than_a_token():
  """Where its text is only whole with the next one. The server knows how many there were."""
  two = [(0.5, event({"choices": [{"text": "x"}]})), (0.9, event({"choices": [{"text": "yz"}]})),
         (0, event({"choices": [], "usage": {"completion_tokens": 4}})), (0, event("[DONE]"))]
  (one,), _ = send_all(lambda *_: httpx.Response(200, stream=Stream(*two)), send_closed, asks(4), 1)
  line = summarise([one])
  assert line["output_tokens"] == 4 and line["tpot_ms"]["p50"] == 300 and line["inter_token_ms"]["p50"] == 900
  (one,), _ = send_all(lambda *_: text(1, 1, 3, usage=False), send_closed, asks(3), 1)
  assert one.n_tokens == 3 and one.ended - one.began == pytest.approx(3)


def test_what_is_asked_for():
  bodies = []
  send_all(lambda _, body: bodies.append(body) or text(1, 1, 3), send_closed, asks(3), 1)
  (body,) = bodies
  assert body["prompt"] == [1, 2] and body["max_tokens"] == body["min_tokens"] == 3 and body["stream"]
  assert body["model"] == "m" and body["stream_options"] == {"include_usage": True}


def test_too_many_requests_wait_as_they_are_told():
  def answer(i, _):
    told = {0: {"retry-after": "7"}, 1: {"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, 2: {}}
    return httpx.Response(429, headers=told[i]) if i < 3 else text(0.5, 0.1, 3)

  seen, came = send_all(answer, send_closed, asks(3), 1)
  assert came == pytest.approx([0, 7, 8, 9])
  line = summarise(seen)
  assert line["answers_429"] == 3 and line["completed"] == 1 and line["ttft_ms"]["p50"] == 9500  # All waits.


@pytest.mark.parametrize("answer, kind", [
  (httpx.Response(400, json={"error": {"code": "invalid_value"}}), "400 invalid_value"),
  (httpx.Response(502, text="<html>"), "502"), (httpx.ConnectError("no"), "ConnectError"),
  (httpx.Response(200, stream=Stream((3, event({"choices": [1]})), (1, event({"error": {"code": "dead"}})))),
   "dead"),
  (httpx.Response(200, stream=Stream((3, event({"choices": [1]})))), "cut off"),
  (httpx.Response(200, stream=Stream((1, event("{")))), "no JSON"),
  (httpx.Response(200, stream=Stream((99, b""))), "timeout"), (httpx.Response(429), "timeout")])
def test_errors_are_counted_by_kind(answer, kind):
  """And what failed is in no other figure."""
  seen, _ = send_all(lambda _, body: answer if body["max_tokens"] == 3 else text(1, 1, 2), send_closed,
                     asks(3, 2), 1, timeout_s=20)
  line = summarise(seen)
  assert line["errors"] == {kind: 1} and line["completed"] == 1 and line["output_tokens"] == 2
  assert line["ttft_ms"] == percentiles(1000, 1000, 1000)
  faults = serve.find_faults(line | {"compiles": 0})
  assert faults == [f"1 of 2 requests failed: 1 x {kind}"]


def test_the_time_in_which_all_texts_are_made():
  seconds, n = together([[0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [2.5, 3.5, 4.5, 5.5, 6.5, 7.5]])
  assert (seconds, n) == (5.0, 5 + 5)
  with pytest.raises(ValueError, match="2 texts were never"):
    together([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]])


# Order.

def test_closed_and_static_loops():
  """Texts of n tokens that take n seconds, for 3 clients: against list scheduling, and the sum of maxima."""
  lengths = np.random.default_rng(0).integers(1, 50, 20).tolist()
  answer = lambda _, body: text(1, 1, body["max_tokens"])
  seen, came = send_all(answer, send_closed, asks(*lengths), 3)
  free, began = [0.0] * 3, []
  for n in lengths:
    began.append(heapq.heappop(free))
    heapq.heappush(free, began[-1] + n)
  assert came == pytest.approx(began) and summarise(seen)["wall_s"] == pytest.approx(max(free))
  seen, came = send_all(answer, send_static, asks(*lengths), 3)
  waves = [lengths[i:i + 3] for i in range(0, 20, 3)]
  assert came == pytest.approx([sum(map(max, waves[:i])) for i, wave in enumerate(waves) for _ in wave])
  assert summarise(seen)["wall_s"] == sum(map(max, waves))


def test_an_open_loop_does_not_wait():
  arrivals = draw_arrivals(50, 4.0, seed=3)
  seen, came = send_all(lambda *_: text(30, 1, 2), send_open, asks(*[2] * 50), arrivals)
  assert came == pytest.approx(arrivals) and summarise(seen)["ttft_ms"] == percentiles(30000, 30000, 30000)


def test_arrivals_are_a_poisson_process():
  arrivals = np.array(draw_arrivals(20_000, 4.0, seed=0))
  gaps = np.diff(arrivals, prepend=0)
  assert gaps.mean() == pytest.approx(0.25, rel=0.03) and gaps.std() == pytest.approx(0.25, rel=0.03)
  counts = np.bincount(arrivals.astype(int))[:-1]  # Of a second: mean and variance are the rate.
  assert counts.mean() == pytest.approx(4, rel=0.03) and counts.var() == pytest.approx(4, rel=0.06)
  assert draw_arrivals(5, 4.0, seed=0) == arrivals[:5].tolist() != draw_arrivals(5, 4.0, seed=1)


def test_requests_are_those_of_the_seed():
  draw = lambda n, **more: draw_requests(n, **dict(seed=1, prompt=(10, 20), output=(3, 5), common=0.0,
                                                   vocab_size=1000) | more)
  made = draw(500)
  assert made == draw(510)[:500] and made != draw(500, seed=2)  # More to warm up changes nothing.
  assert {len(r.prompt) for r in made} == {*range(10, 21)} and {r.max_tokens for r in made} == {3, 4, 5}
  assert max(t for r in made for t in r.prompt) == 999
  lengths = [r.max_tokens for r in draw(4000, prompt=(1, 1), output=(8, 256))]
  np.testing.assert_allclose(np.quantile(lengths, [0.25, 0.5, 0.75]), [19, 45, 108], rtol=0.08)
  half = draw(500, common=0.5)
  longest = max(half, key=lambda r: len(r.prompt)).prompt
  for a in half:
    same = next((i for i, (x, y) in enumerate(zip(a.prompt, longest)) if x != y), len(a.prompt))
    assert same >= round(len(a.prompt) / 2) and (a.prompt is longest or same < len(a.prompt))
  assert [(len(r.prompt), r.max_tokens) for r in half] == [(len(r.prompt), r.max_tokens) for r in made]


# Decode and the memory.

def test_the_share_of_the_bandwidth(monkeypatch):
  """Two layers of width 64 with an untied head, by hand: a step of 4 texts reads the weights once, and of
  each text 2 x 2 heads x 16 numbers a token and layer."""
  import jax

  from experiments.bench.case import train_config
  cfg = train_config(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, vocab_size=512, unroll=1).model
  per_layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64
  n_params = 2 * 512 * 64 + 2 * per_layer + 64
  read = (n_params - 512 * 64) * 4 / 4 + 100 * 2 * 2 * 2 * 16 * 4
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  monkeypatch.setattr("train.chips.measure_copy", lambda seconds: 1e9)
  line = {"decode": {"batch": 4, "tokens_per_s": 1000.0, "length": 100}}
  got = serve._hold_against_memory(line, (cfg, n_params))["decode"]
  assert got["bytes_per_token"] == read and got["copy_bytes_per_s"] == 1e9
  assert got["fraction_of_bandwidth"] == round(1000 * read / 1e9, 3)
  monkeypatch.setattr(jax, "device_count", lambda: 2)
  assert serve._hold_against_memory(line, (cfg, n_params)) == {}


# Against a server.

SMALL = ["--prompt_tokens=20:30", "--output_tokens=4:9", "--requests=12", "--warm_up=3", "--clients=4",
         "--seed=5"]


class CountingEngine(FakeEngine):
  """It finds 5 tokens of every prompt in its cache."""

  def submit(self, request):
    self.counters.update(prefix_hit_tokens=5, preemptions=2)
    return super().submit(request)


@pytest.fixture(scope="module")
def server():
  with running(CountingEngine()) as server:
    yield server


def run(flags, capsys):
  """(exit code, the line, stderr)."""
  code = bench.main(["serve", *flags])
  out, err = capsys.readouterr()
  return code, json.loads(out) if out else None, err


@pytest.mark.parametrize("more", [[], ["--static"], ["--rate=500"]])
def test_a_run_against_a_server(server, capsys, more, tmp_path):
  flags = [f for f in SMALL if not (f.startswith("--clients") and "--rate=500" in more)]
  flags += ["--common=0.3", f"--plot={tmp_path}/latency.png"]
  server.engine.requests.clear()
  code, line, err = run([f"--url=http://127.0.0.1:{server.port}/v1/", *flags, *more], capsys)
  assert code == 0 and line["faults"] == [], err
  want = draw_requests(15, seed=5, prompt=(20, 30), output=(4, 9), common=0.3, vocab_size=259)
  got = [(r.prompt, r.sampling.max_tokens) for r in server.engine.requests]
  assert sorted(got[3:]) == sorted((r.prompt, r.max_tokens) for r in want[:12])
  assert sorted(got[:3]) == sorted((r.prompt, r.max_tokens) for r in want[12:])
  assert line["completed"] == line["requests"] == 12 and line["loop"] == {
    "--static": "static", "--rate=500": "open"}.get(more[0] if more else None, "closed")
  n_prompt = sum(len(r.prompt) for r in want[:12])
  assert line["prompt_tokens"] == n_prompt and line["output_tokens"] == sum(r.max_tokens for r in want[:12])
  assert line["prefix_hit_rate"] == round(60 / n_prompt, 4) and line["preemptions"] == 24
  assert line["compiles"] == 0 and "decode" not in line and line["load"]
  assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")
  assert "12 requests" in err and "seen these prompts before" not in err


def test_what_must_not_be_is_told_loudly(server, capsys, monkeypatch):
  """A program compiled under load, and prompts that the server has seen."""
  submit = server.engine.submit

  def compiling(request):
    server.engine.counters.update(compiles=1)
    return submit(request)

  monkeypatch.setattr(server.engine, "submit", compiling)
  code, line, err = run([f"--url=http://127.0.0.1:{server.port}", *SMALL], capsys)
  assert code == 1 and line["compiles"] == 15 and "FAULT: THE SERVER COMPILED 15 PROGRAMS" in err
  assert "seen these prompts before" in err


def test_a_server_without_our_metrics(capsys):
  def answer(request):
    if request.url.path == "/v1/models":
      return httpx.Response(200, json={"data": [{"id": "x"}]})
    return httpx.Response(404) if request.url.path == "/metrics" else text(0, 0, 3)

  async def body():
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://x") as http:
      return await serve.read_metrics(http)

  assert asyncio.run(body()) is None
  assert serve.compare_metrics(None, None, None) == {
    "prefix_hit_rate": None, "preemptions": None, "compiles": None}
  assert "not known" in capsys.readouterr().err


# A server that is started.

FAKE = """
import sys
from infer.listen import Options, bind
from infer.serving import HttpServer
from tests.fake_engine import FakeEngine, make_served
engine = FakeEngine(slots=16, delay=0.02)
server = HttpServer(make_served(max_length=1000), engine, Options(port=0), bind("127.0.0.1", 0))
print(sys.argv[1:], f"fake is served at http://127.0.0.1:{server.port}", file=sys.stderr, flush=True)
sys.exit(server.run_until_end())
"""


def test_a_server_is_started_and_ended(capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(serve, "COMMAND", [sys.executable, "-c", FAKE])
  monkeypatch.setattr(serve, "_open_model", lambda *_: ("cfg", 1))
  monkeypatch.setattr(serve, "_hold_against_memory", lambda line, model: {"decode": [line["decode"], model]})
  ended = []
  monkeypatch.setattr(serve.Server, "close", lambda self, close=serve.Server.close: (
    close(self), ended.append((self.poll(), self.said()))))
  code, line, err = run(["--model=x", "--server=--slots=16 --pages=7", *SMALL], capsys)
  assert code == 0 and line["completed"] == 12, err
  decode, model = line["decode"]
  assert decode["batch"] == 4 and 50 < decode["tokens_per_s"] < 300 and model == ["cfg", 1]
  ((code, said),) = ended
  assert code == 0 and "['--model=x', '--slots=16', '--pages=7']" in said and "draining" in said


@pytest.mark.parametrize("code", [1, 2])
def test_a_server_that_does_not_start_says_why(code):
  program = f"import sys; print('no such luck', file=sys.stderr); sys.exit({code})"
  with pytest.raises(ServerFailed, match=f"exit code {code} before it served:\n  no such luck") as e:
    with serve.start_server([sys.executable, "-c", program]):
      pass
  assert e.value.code == code


# Mistakes.

URL = "--url=http://127.0.0.1:9"


@pytest.mark.parametrize("flags, said", [
  ([], "give one of --url"), ([URL, "--model=x"], "not --url and --model"), (["--url=localhost:1"], "http://"),
  ([URL, "--rate=2", "--clients=3"], "not go with --clients"), ([URL, "--rate=2", "--static"], "--static"),
  ([URL, "--clients=0"], "--clients=0 must be at least 1"), ([URL, "--rate=nan"], "--rate=nan"),
  ([URL, "--common=2"], "in 0 .. 1"), ([URL, "--prompt_tokens=9:3"], "1 <= LOW <= HIGH"),
  ([URL, "--output_tokens=many"], "must be LOW:HIGH"), ([URL, "--plot=/nowhere/x.png"], "--plot=/nowhere"),
  ([URL, "--rat=2"], "did you mean --rate"), ([URL, "--server=--slots=3"], "not for --url"),
  (["--model=/nowhere"], "is no imported model"), (["--model=x", "--here=y"], "goes with --url"),
  (["--model=x", "--server=--port=1"], "--port cannot be set"),
  (["--model=x", "--server=--slot=1"], "--slot=1 is unknown"),
  ([URL, "--api_key_file=/nowhere"], "cannot be read"), ([URL, "--here=/nowhere"], "--here=/nowhere")])
def test_mistakes_are_told_at_once(flags, said, capsys, monkeypatch):
  monkeypatch.setattr(serve, "measure", None)
  code, line, err = run(flags, capsys)
  assert code == 2 and line is None and said in err


def test_texts_that_the_server_has_no_room_for(server, capsys):
  code, line, err = run([f"--url=http://127.0.0.1:{server.port}", "--prompt_tokens=20:150"], capsys)
  assert code == 2 and "room for 200; nearest valid: --output_tokens=8:50" in err
  code, _, err = run([URL], capsys)
  assert code == 1 and "does not list its models: ConnectError" in err


def test_a_missing_client_is_named():
  code = ("import sys; sys.modules['httpx'] = None; from experiments.bench.__main__ import main; "
          "sys.exit(main(['serve', '--url=http://127.0.0.1:9']))")
  got = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert got.returncode == 2 and "pip install -e '.[test]'" in got.stderr

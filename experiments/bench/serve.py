"""`bench serve`: load against a server, and what its clients and its own counters say of it."""
import asyncio
import collections
import contextlib
import dataclasses
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import httpx

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
from experiments.bench.load import Load, ServerFailed, check_length, read_load
from infer.listen import read_key

COMMAND = [sys.executable, "-m", "infer.server", "--port=0"]
PROBE_PROMPT, PROBE_TOKENS = 16, 64  # Of the texts by which decode alone is measured.
END_S = 60.0  # For the server to end after SIGTERM.


def run(args) -> dict:
  """The bench's line; its "faults" are what must not be.

  Raises:
    ValueError: a mistake in the flags.
    ServerFailed: there is no server to measure.
  """
  load = read_load(args)
  key, model = read_key("localhost", args.api_key_file), _open_model(args, load)
  if args.url:
    url = args.url.rstrip("/").removesuffix("/v1")
    line = asyncio.run(measure(load, url, key, args.plot, model))
    return line | _hold_against_memory(line, model)
  flags = [f"--model={args.model}" if args.model else f"--run={args.run}", *shlex.split(args.server)]
  flags += [f"--api_key_file={args.api_key_file}"] if args.api_key_file else []
  with start_server([*COMMAND, *flags]) as server:
    line = asyncio.run(measure(load, server.url, key, args.plot, model))
    if (code := server.poll()) is not None:
      line["faults"].append(f"the server ended with exit code {code}:\n{server.said()}")
  return line | _hold_against_memory(line, model)  # The device is free again.


# The server.

class Server:
  """A server as a child process. It says its address on stderr."""

  def __init__(self, command: list[str]):
    self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    self._lines, self._urls = collections.deque(maxlen=40), queue.SimpleQueue()
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self):
    for line in self._process.stderr:
      self._lines.append(line)
      if found := re.search(r"is served at (http://\S+)", line):
        self._urls.put(found[1])
    self._urls.put(None)

  def wait(self) -> str:
    """Its address, when it answers there. Raises ServerFailed: it has ended."""
    url = self._urls.get()
    while url is not None and self.poll() is None:
      with contextlib.suppress(httpx.ConnectError):  # It is about to listen.
        httpx.get(f"{url}/health", trust_env=False, timeout=END_S)
        return url
      time.sleep(0.05)
    code = self._process.wait()
    raise ServerFailed(f"the server ended with exit code {code} before it served:\n{self.said()}",
                       2 if code == 2 else 1)

  def poll(self) -> int | None:
    """Its exit code, if it has ended."""
    return self._process.poll()

  def said(self) -> str:
    """The last lines of its stderr."""
    if self.poll() is not None:
      self._reader.join(5)
    return "".join(f"  {line}" for line in self._lines)

  def close(self) -> None:
    self._process.terminate()
    try:
      self._process.wait(END_S)
    except subprocess.TimeoutExpired:
      _say(f"the server did not end within {END_S:g} s of SIGTERM, and was killed:\n{self.said()}")
      self._process.kill()
      self._process.wait()


@contextlib.contextmanager
def start_server(command: list[str]):
  """A Server that has a `url`; ended with SIGTERM."""
  _say(f"starts {shlex.join(command[1:])}")
  began, server = time.monotonic(), Server(command)
  before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # It does not outlive us.
  try:
    server.url = server.wait()
    _say(f"serves at {server.url} after {time.monotonic() - began:.1f} s")
    yield server
  finally:
    server.close()
    signal.signal(signal.SIGTERM, before)


def _say(text):
  print(f"bench serve: {text}", file=sys.stderr, flush=True)


# The load.

async def measure(load: Load, url: str, key: str | None, plot_path: str | None, model) -> dict:
  """Warm-up, the load, and decode alone if there is a `model` to judge it by."""
  headers = {} if key is None else {"authorization": f"Bearer {key}"}
  async with httpx.AsyncClient(
      base_url=url, headers=headers, timeout=httpx.Timeout(None, connect=10), trust_env=False,
      limits=httpx.Limits(max_connections=None, max_keepalive_connections=None)) as http:
    served = await find_model(http, load)
    drawn = draw_requests(load.requests + load.warm_up, seed=load.seed, prompt=load.prompt,
                          output=load.output, common=load.common, vocab_size=served.get("vocab_size", 256))
    requests, warm_up = drawn[:load.requests], drawn[load.requests:]
    client = Client(http, served["id"], load.timeout_s)
    start = await read_metrics(http)
    if warm_up:
      _say(f"{len(warm_up)} requests to warm up")
      await send_closed(client.send, warm_up, load.clients)
    before = await read_metrics(http)
    seen = await _send(load, client, requests)
    after = await read_metrics(http)
    line = {"bench": "serve", "model": served["id"], **_describe(load), **summarise(seen),
            **compare_metrics(start, before, after)}
    if model is not None and (decoded := await _measure_decode(client, served, load)) is not None:
      line["decode"] = decoded
  line["faults"] = find_faults(line)
  if (rate := line["prefix_hit_rate"]) is not None and rate > load.common + 0.02:
    _say(f"{rate:.0%} of the prompts' tokens were in the prefix cache, and only {load.common:.0%} are common "
         "to all: the server has seen these prompts before; take another --seed, or start it anew")
  if plot_path:
    plot(seen, plot_path, f"{served['id']}: {_title(load)}, {line['tokens_per_s']:g} tokens/s")
  return line


async def _send(load, client, requests):
  progress = Progress(len(requests))

  async def send(request, due):
    seen = await client.send(request, due)
    progress.note(seen)
    return seen

  _say(f"{len(requests)} requests, {_title(load)}")
  if load.rate:
    return await send_open(send, requests, draw_arrivals(len(requests), load.rate, load.seed))
  return await (send_static if load.static else send_closed)(send, requests, load.clients)


def _title(load):
  return f"{load.rate:g} requests/s" if load.rate else f"{load.clients} clients, {load.loop} loop"


def _describe(load):
  size = {"rate_per_s": load.rate} if load.rate else {"clients": load.clients}
  return {"loop": load.loop, **size, "seed": load.seed, "prompt_range": load.prompt,
          "output_range": load.output, "common": load.common}


class Progress:
  """A line on stderr every five seconds."""

  def __init__(self, n: int):
    self._n, self._began, self._said = n, time.monotonic(), time.monotonic()
    self._ended = self._tokens = 0

  def note(self, seen) -> None:
    self._ended, self._tokens, now = self._ended + 1, self._tokens + seen.n_tokens, time.monotonic()
    if now - self._said > 5:
      self._said = now
      _say(f"{self._ended} of {self._n} requests, {self._tokens / (now - self._began):.0f} tokens/s")


async def find_model(http, load: Load) -> dict:
  """What /v1/models says of the model.

  Raises:
    ServerFailed: nothing answers, or not so.
    ValueError: it does not have room for the longest request.
  """
  try:
    answer = await http.get("/v1/models")
    answer.raise_for_status()
    served = answer.json()["data"][0]
  except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as e:
    raise ServerFailed(f"{http.base_url} does not list its models: {type(e).__name__}: {e}") from None
  check_length(load, served.get("max_length"))
  return served


# What the server counts.

async def read_metrics(http) -> dict[str, float] | None:
  """The metrics of infer.serve_metrics that have no labels; None where there are none of them."""
  try:
    answer = await http.get("/metrics")
  except httpx.HTTPError:
    return None
  lines = answer.text.splitlines() if answer.status_code == 200 else []
  found = dict(line.split() for line in lines if re.match(r"assay_\w+ ", line))
  return {name.removesuffix("_total"): float(value) for name, value in found.items()} or None


def compare_metrics(start, before, after) -> dict:
  """Of the load: the prefix cache's hit rate (of tokens), preemptions; and compiles, of the warm-up too."""
  if not (start and before and after):
    _say("/metrics has none of ours: hit rate, preemptions and compiles are not known")
    return {"prefix_hit_rate": None, "preemptions": None, "compiles": None}
  more = lambda name, since=before: after[f"assay_{name}"] - since[f"assay_{name}"]
  return {"prefix_hit_rate": round(more("prefix_hit_tokens") / max(more("prompt_tokens"), 1), 4),
          "preemptions": int(more("preemptions")), "compiles": int(more("compiles", start))}


def find_faults(line: dict) -> list[str]:
  """What must not be."""
  faults = []
  if line["errors"]:
    kinds = ", ".join(f"{n} x {kind}" for kind, n in line["errors"].items())
    faults.append(f"{line['requests'] - line['completed']} of {line['requests']} requests failed: {kinds}")
  if line["compiles"]:
    faults.append(f"THE SERVER COMPILED {line['compiles']} PROGRAMS UNDER LOAD: every figure has that in it")
  return faults


# Decode and the memory.

def _open_model(args, load):
  """(config as it is served, parameters), or None: then decode is not held against the memory.

  Raises:
    ValueError: the folder, or a flag for the server, is wrong.
  """
  path = args.model or args.run or args.here
  if path is None:
    return None
  import jax

  from infer.generate import find_run
  from infer.load import open_run
  from infer.server import make_parser
  from model.sharding import abstract_mesh
  from model.transformer import abstract_params
  flags, unknown = make_parser().parse_known_args(shlex.split(args.server))
  if unknown:
    raise ValueError(f"--server={args.server}: {unknown[0]} is unknown; see python -m infer.server --help")
  found = open_run(find_run(path) if args.run else path, "--run" if args.run else "--model" if args.model
                   else "--here")
  if not args.url:
    check_length(load, min(filter(None, (flags.max_length or 2048, found.model.max_length))))
  cfg = dataclasses.replace(found.model, compute_dtype=flags.compute_dtype or found.model.compute_dtype)
  return cfg, sum(a.size for a in jax.tree.leaves(abstract_params(cfg, abstract_mesh(data=1))[1]))


async def _measure_decode(client, served, load):
  """Texts that are made together, after the load: {batch, tokens_per_s, length}, or None, and it says why."""
  n = load.clients
  n_tokens = PROBE_TOKENS + 2 * n  # Their prompts are read one by one.
  if PROBE_PROMPT + n_tokens > served.get("max_length", 2**31):
    return _say(f"decode alone is not measured: it takes texts of {PROBE_PROMPT + n_tokens} tokens")
  drawn = draw_requests(n, seed=load.seed + 1, prompt=(PROBE_PROMPT,) * 2, output=(1, 1), common=0.0,
                        vocab_size=served.get("vocab_size", 256))
  seen = await send_closed(client.send, [Request(r.prompt, n_tokens) for r in drawn], n)
  if errors := [s.error for s in seen if s.error is not None]:
    return _say(f"decode alone is not measured: {errors[0]}")
  try:
    seconds, pieces = together([s.pieces for s in seen])
  except ValueError as e:
    return _say(f"decode alone is not measured: {e}; give at most as many --clients as the server has slots")
  tokens = pieces * sum(s.n_tokens for s in seen) / sum(len(s.pieces) for s in seen)
  return {"batch": n, "tokens_per_s": round(tokens / seconds, 1), "length": PROBE_PROMPT + n_tokens // 2}


def _hold_against_memory(line, model) -> dict:
  """The line's "decode" with the share of the memory's bandwidth that it uses: bytes that must be read, over
  those that a copy on this machine moves in the same time."""
  if "decode" not in line:
    return {}
  import jax
  from jax.errors import JaxRuntimeError

  from model.count import decode_bytes_per_token
  from train.chips import measure_copy
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # Beside a server on the same GPU.
  cfg, n_params = model
  decode = line["decode"]
  try:
    if jax.device_count() > 1:
      _say("decode is not held against the memory: several devices have a memory each")
      return {}
    copy = measure_copy(2.0)
  except JaxRuntimeError as e:
    _say(f"decode is not held against the memory: the server has the device: {str(e)[:200]}")
    return {}
  per_token = decode_bytes_per_token(cfg, n_params, decode["batch"], decode["length"])
  used = decode["tokens_per_s"] * per_token
  return {"decode": decode | {
    "bytes_per_token": round(per_token), "bytes_per_s": round(used), "copy_bytes_per_s": round(copy),
    "fraction_of_bandwidth": round(used / copy, 3)}}

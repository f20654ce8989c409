"""Load for `bench serve`: requests drawn by a seed, clients that send them, and what the clients saw."""
import asyncio
import collections
import dataclasses
import itertools
import json
import math

import httpx
import numpy as np

LEAST_WAIT_S = 0.1  # After an answer of 429, whatever it says.


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
  prompt: list[int]
  max_tokens: int


@dataclasses.dataclass(slots=True)
class Seen:
  """One request as its client saw it; times in seconds of the event loop's clock."""
  began: float  # When it was due: what it waited for a turn, or after a 429, counts.
  pieces: list[float] = dataclasses.field(default_factory=list)  # When each piece of its text came.
  n_prompt: int = 0
  n_tokens: int = 0  # As the server counts them; a piece may be more than one.
  n_refused: int = 0  # Answers of 429.
  error: str | None = None  # A short kind.
  ended: float = 0.0


def draw_requests(n: int, *, seed: int, prompt: tuple[int, int], output: tuple[int, int], common: float,
                  vocab_size: int) -> list[Request]:
  """Of lengths the logarithm is uniform: many are short and few are long, as people ask. The first `common`
  (a share) of every prompt is of one text."""
  lengths, ids = (np.random.default_rng([seed, i]) for i in range(2))
  draw = lambda k: ids.integers(0, vocab_size, k).tolist()
  shared, made = draw(prompt[1]), []
  for _ in range(n):
    n_prompt, n_output = (int(low * ((high + 1) / low) ** lengths.random()) for low, high in (prompt, output))
    n_shared = round(common * n_prompt)
    made.append(Request(shared[:n_shared] + draw(n_prompt - n_shared), n_output))
  return made


def draw_arrivals(n: int, rate: float, seed: int) -> list[float]:
  """Seconds after the start, of a Poisson process of `rate` a second."""
  return np.cumsum(np.random.default_rng([seed, 2]).exponential(1 / rate, n)).tolist()


class Client:
  """Sends requests to /v1/completions, as streams."""

  def __init__(self, http: httpx.AsyncClient, model: str, timeout_s: float):
    """`timeout_s`: for a request, with all its waits."""
    self._http, self._model, self._timeout_s = http, model, timeout_s

  async def send(self, request: Request, due: float) -> Seen:
    """Asks until it is answered, or fails. min_tokens keeps the text from ending early."""
    seen = Seen(due, n_prompt=len(request.prompt))
    body = {"model": self._model, "prompt": request.prompt, "max_tokens": request.max_tokens,
            "min_tokens": request.max_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}
    try:
      async with asyncio.timeout_at(due + self._timeout_s):
        while (wait := await self._ask(body, seen)) is not None:
          seen.n_refused += 1
          await asyncio.sleep(max(wait, LEAST_WAIT_S))
    except TimeoutError:
      seen.error = "timeout"
    except httpx.HTTPError as e:
      seen.error = type(e).__name__
    except json.JSONDecodeError:
      seen.error = "no JSON"
    seen.ended = _now()
    return seen

  async def _ask(self, body, seen):
    """Seconds to wait before asking again; None: it has an answer, or an error."""
    async with self._http.stream("POST", "/v1/completions", json=body) as answer:
      if answer.status_code == 429:
        return _seconds(answer.headers.get("retry-after", ""))
      if answer.status_code != 200:
        seen.error = f"{answer.status_code} {_code(await answer.aread())}".strip()
        return None
      async for line in answer.aiter_lines():
        if line == "data: [DONE]":
          seen.n_tokens = seen.n_tokens or len(seen.pieces)
          return None
        if line.startswith("data: ") and not _take(json.loads(line[6:]), seen):
          return None
      seen.error = "cut off"


def _take(event, seen):
  """Whether the stream goes on after this event."""
  if "error" in event:
    seen.error = event["error"].get("code") or "error"
    return False
  if event.get("choices"):
    seen.pieces.append(_now())
  if event.get("usage"):
    seen.n_tokens = event["usage"]["completion_tokens"]
  return True


def _now():
  return asyncio.get_running_loop().time()


def _seconds(text):
  """Of Retry-After; a date, or none, is a second."""
  return float(text) if text.replace(".", "", 1).isdigit() else 1.0


def _code(raw):
  try:
    return json.loads(raw)["error"]["code"] or ""
  except (ValueError, KeyError, TypeError):
    return ""


# In which order.

async def send_closed(send, requests, clients: int) -> list[Seen]:
  """So many clients, each of which sends its next request when its last has ended."""
  left = iter(requests)

  async def client():
    return [await send(request, _now()) for request in left]

  return [*itertools.chain(*await asyncio.gather(*(client() for _ in range(clients))))]


async def send_static(send, requests, clients: int) -> list[Seen]:
  """So many at a time; the next ones are sent when the last of these has ended."""
  seen = []
  for first in range(0, len(requests), clients):
    wave = requests[first:first + clients]
    seen += await asyncio.gather(*(send(request, _now()) for request in wave))
  return seen


async def send_open(send, requests, arrivals: list[float]) -> list[Seen]:
  """Each at its time, whatever has become of the others."""
  start = _now()

  async def one(request, arrival):
    await asyncio.sleep(start + arrival - _now())
    return await send(request, start + arrival)

  return await asyncio.gather(*map(one, requests, arrivals))


# What it says.

def latencies(seen: list[Seen]) -> dict[str, list[float]]:
  """Seconds, of the requests that ended well: to the first token, between tokens (of each text its mean:
  TPOT; of each two pieces: inter-token), to the end."""
  good = [s for s in seen if s.error is None and s.pieces]
  return {
    "ttft": [s.pieces[0] - s.began for s in good],
    "tpot": [(s.pieces[-1] - s.pieces[0]) / (s.n_tokens - 1) for s in good if s.n_tokens > 1],
    "inter_token": [b - a for s in good for a, b in itertools.pairwise(s.pieces)],
    "end_to_end": [s.ended - s.began for s in good],
  }


def summarise(seen: list[Seen]) -> dict:
  """The figures of a bench's line. Rates are of what ended well, from the first request to the last end."""
  good = [s for s in seen if s.error is None]
  wall_s = max(s.ended for s in seen) - min(s.began for s in seen)
  prompt, output = sum(s.n_prompt for s in good), sum(s.n_tokens for s in good)
  line = {"requests": len(seen), "completed": len(good), "wall_s": round(wall_s, 2), "prompt_tokens": prompt,
          "output_tokens": output, "tokens_per_s": round(output / wall_s, 1),
          "requests_per_s": round(len(good) / wall_s, 3)}
  for name, seconds in latencies(seen).items():
    line[f"{name}_ms"] = percentiles(seconds)
  errors = collections.Counter(s.error for s in seen if s.error is not None)
  return line | {"answers_429": sum(s.n_refused for s in seen), "errors": dict(errors.most_common())}


def percentiles(seconds: list[float]) -> dict[str, float] | None:
  """In ms; between two values by a straight line."""
  if not seconds:
    return None
  return {f"p{p}": round(1e3 * float(np.percentile(seconds, p)), 2) for p in (50, 95, 99)}


def together(texts: list[list[float]]) -> tuple[float, float]:
  """(seconds, pieces) of the time in which every text was being made: from the last one's first piece to the
  first one's last.

  Args:
    texts: of each, when its pieces came.

  Raises:
    ValueError: there is no such time.
  """
  start, end = max(pieces[0] for pieces in texts), min(pieces[-1] for pieces in texts)
  n = sum(start < piece <= end for pieces in texts for piece in pieces)
  if n < 4 * len(texts):
    raise ValueError(f"{len(texts)} texts were never being made together for long")
  return end - start, n


def plot(seen: list[Seen], path, title: str) -> None:
  """Draws the latencies' percentiles, from 0 to 100, into a PNG."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  from train.plot import COLOURS, STYLE
  names = {"ttft": "to the first token", "inter_token": "from token to token", "end_to_end": "to the end"}
  with plt.rc_context(STYLE):
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axes, (name, what), colour in zip(panels, names.items(), COLOURS):
      values = 1e3 * np.sort(latencies(seen)[name])
      axes.set(title=what, xlabel="percentile", ylabel="ms")
      if not len(values):
        continue
      axes.plot(np.linspace(0, 100, len(values)), values, color=colour, linewidth=1.8)
      at = {p: np.percentile(values, p) for p in (50, 95, 99)}
      axes.plot([*at], [*at.values()], color=colour, marker="o", linestyle="")
      axes.text(0.04, 0.96, "\n".join(f"p{p}  {_short(value)}" for p, value in at.items()), va="top",
                transform=axes.transAxes)
      axes.set(xlim=(0, 101), ylim=(0, None))  # After what is drawn, which says how far they go.
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path)
    plt.close(figure)


def _short(value):
  """Three digits."""
  return f"{value:.{max(2 - math.floor(math.log10(max(value, 1e-9))), 0)}f}"

"""An engine of a few lines for what only asks: the forward pass over whole prompts, a batch a step."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from infer.engine import Scored, Token

ROWS, LENGTH = 8, 64  # Of a batch, which is padded, so that little is compiled.


class FakeEngine:
  """The interface of infer.engine.Engine: greedy, each token by a whole forward pass. Answers of a batch come
  in another order than its requests, prompts in pieces, the first piece twice (as of one that is preempted).

  Args:
    slots: requests that run together.
    piece: most positions of a Scored.
  """

  def __init__(self, cfg, graphdef, params, mesh, *, stop_ids=(), slots=8, piece=7):
    self._cfg, self._graphdef, self._params, self._mesh = cfg, graphdef, params, mesh
    self._stop_ids, self._slots, self._piece = stop_ids, slots, piece
    self._waiting, self._running, self._n = [], {}, 0
    self.submitted = []  # Requests, in order.

  @property
  def has_work(self):
    return bool(self._waiting or self._running)

  def submit(self, request):
    request.sampling.validate()
    if not request.prompt:
      raise ValueError("the prompt is empty")
    self.submitted.append(request)
    self._waiting.append((self._n, request))
    self._n += 1
    return self._n - 1

  def cancel(self, request):
    self._running.pop(request, None)

  def step(self):
    while self._waiting and len(self._running) < self._slots:
      number, request = self._waiting.pop(0)
      self._running[number] = request, list(request.prompt)
    events = []
    rows = {number: tokens for number, (_, tokens) in self._running.items()}
    logprobs = dict(zip(rows, self._forward(list(rows.values()))))
    for number in sorted(self._running, reverse=True):
      request, tokens = self._running[number]
      events += self._advance(number, request, tokens, logprobs[number])
    return events

  def _advance(self, number, request, tokens, logprob_TV):
    scores = request.sampling.prompt_logprobs is not None
    if scores:
      first = request.score_from
      for i, start in enumerate([first, *range(first, len(tokens), self._piece)]):
        at = np.arange(start, min(len(tokens), start + self._piece))
        best = logprob_TV[at - 1].argmax(axis=1)
        yield Scored(number, start, [float(logprob_TV[j - 1, tokens[j]]) for j in at],
                     [((int(b), float(logprob_TV[j - 1, b])),) for j, b in zip(at, best)],
                     "length" if i > 0 and at[-1] == len(tokens) - 1 else None)
      del self._running[number]
      return
    made = int(logprob_TV[len(tokens) - 1].argmax())
    logprob = float(logprob_TV[len(tokens) - 1, made])
    tokens.append(made)
    n_made = len(tokens) - len(request.prompt)
    finish = "stop" if made in self._stop_ids else "length" if n_made == request.sampling.max_tokens else None
    if finish:
      del self._running[number]
    yield Token(number, made, logprob, (), finish)

  def _forward(self, rows):
    """float32 [T, V] of each row: log-probabilities of what follows each token."""
    return [row for at in range(0, len(rows), ROWS) for row in self._forward_batch(rows[at:at + ROWS])]

  def _forward_batch(self, rows):
    length = LENGTH * -(-max(map(len, rows)) // LENGTH)
    tokens_BT, segment_BT = np.zeros((2, ROWS, length), np.int32)
    for i, row in enumerate(rows):
      tokens_BT[i, :len(row)], segment_BT[i, :len(row)] = row, 1
    with jax.set_mesh(self._mesh):
      split = jax.NamedSharding(self._mesh, self._cfg.rules("batch", None))
      rows = jax.device_put((tokens_BT, segment_BT), split)
      logits = np.asarray(_logits(self._graphdef, self._params, *rows))
    logits = logits[..., :self._cfg.vocab_size].astype(np.float32)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, tokens_BT, segment_BT):
  model = nnx.merge(graphdef, params)
  pos_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None] + jnp.zeros_like(tokens_BT)
  return model.logits(model(tokens_BT, pos_BT, segment_BT)[0])

"""Tokens -> tokens: prefill, then decode, each compiled once per bucket of shapes.

A batch lives on the device as a `State`, which every call consumes and returns (its caches are donated). A
call makes several tokens, and they are read while the next one runs: the device does not wait for Python.
"""
import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from infer.sampling import Sampling, Settings, sample, stack_settings
from model.cache import init_cache
from model.config import ModelConfig
from model.sharding import DECODE, fit, place, ways
from model.transformer import Transformer, abstract_params, unstack

MIN_CHUNK = 16  # Tokens; shorter prompts are padded to it.
MIN_CACHE = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """A batch between two calls."""
  caches: tuple
  x_BD: jax.Array  # What the model made of each row's last token: the next one is drawn from it.
  pos_B: jax.Array  # Where the next token will stand.
  limit_B: jax.Array  # The first position that gets none.
  done_B: jax.Array
  counts_BV: jax.Array  # Of the prompt's tokens and the text's, as `sample` reads them.


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
  request: int  # Index into the prompts.
  id: int
  logprob: float  # Under the model itself, whatever the settings.
  finish: str | None  # On a request's last token: "stop" (it is one of the stop ids) or "length".


@dataclasses.dataclass(slots=True)
class Stats:
  """Sums over all batches; compiling is in compile_s only."""
  prefill_tokens: int = 0
  prefill_s: float = 0.0
  decode_tokens: int = 0
  decode_s: float = 0.0
  compile_s: float = 0.0


class Generator:
  """Continues prompts.

  Usage:
    generator = Generator(cfg, params, mesh, stop_ids=[tokenizer.eos_id])
    for token in generator.generate([[1, 5, 7], [1, 9]], Sampling(max_tokens=20)): ...

  Attributes:
    stats: Stats.
    programs: (name, shape) -> the compiled program; nothing else is ever compiled.
  """

  def __init__(self, cfg: ModelConfig, params, mesh, *, stop_ids=(), batch_size: int = 32,
               prefill_chunk: int = 512, steps_per_call: int = 8):
    """Args:
      cfg: of any rules; those of DECODE are used.
      params: of `model.transformer`, sharded anyhow. They are copied: cast, and one tree a layer.
      stop_ids: tokens that end a text.
      batch_size: most requests that run together.
      prefill_chunk: most tokens of a prompt that are read at once.
      steps_per_call: tokens made between two looks of the host.

    Raises:
      ValueError: the model cannot be split over the mesh.
    """
    self.cfg, self.mesh = decode_config(cfg, mesh), mesh
    self.stop_ids, self.batch_size = tuple(stop_ids), batch_size
    self.prefill_chunk, self.steps_per_call = prefill_chunk, steps_per_call
    self.stats, self.programs = Stats(), {}
    with jax.set_mesh(mesh):
      self._graphdef, abstract = abstract_params(self.cfg, mesh)
      params = jax.device_put(params, jax.tree.map(lambda a: a.sharding, abstract))
      self._weights = unstack(self.cfg, cast_params(self.cfg, params))

  def generate(self, prompts: list[list[int]], settings: Sampling | list[Sampling], *, cancelled=frozenset()):
    """Yields a Token for each token made, in order within a request; requests of a batch take turns.

    Args:
      prompts: token ids, at least one each.
      settings: of all requests, or one each. Stop strings are text: see infer.text.
      cancelled: a set that the caller may add requests to while iterating; they get no more tokens.

    Raises:
      ValueError: an empty prompt, an id outside the vocabulary, a setting out of range.
    """
    if isinstance(settings, Sampling):
      settings = [settings] * len(prompts)
    if len(settings) != len(prompts):
      raise ValueError(f"{len(settings)} settings for {len(prompts)} prompts: give one, or one each")
    for i, (prompt, setting) in enumerate(zip(prompts, settings)):
      if not len(prompt):
        raise ValueError(f"prompt {i} is empty: start it with the tokenizer's bos_id")
      length, longest = len(prompt) + setting.max_tokens, self.cfg.max_length
      if length > (longest or length):
        raise ValueError(f"prompt {i}: its {len(prompt)} tokens and max_tokens={setting.max_tokens} are more "
                         f"than the model.max_length={longest} positions of the model; nearest valid "
                         f"max_tokens: {longest - len(prompt)}")
      if bad := [t for t in prompt if not 0 <= t < self.cfg.vocab_size]:
        raise ValueError(f"prompt {i}: token {bad[0]} is outside the vocabulary of {self.cfg.vocab_size}")
      setting.validate(self.cfg.vocab_size)
      for name in ("logprobs", "prompt_logprobs", "stop_ids"):
        if getattr(setting, name) not in (None, ()):
          raise ValueError(f"prompt {i}: {name} is not served here")
    return self._generate(prompts, settings, cancelled)

  def _generate(self, prompts, settings, cancelled):
    for first in range(0, len(prompts), self.batch_size):
      rows = slice(first, first + self.batch_size)
      yield from self._run_batch(first, prompts[rows], settings[rows], cancelled)

  def _run_batch(self, first, prompts, settings, cancelled):
    state = self._prefill_batch(prompts, settings)
    B, S = state.done_B.shape[0], self._cache_length(prompts, settings)
    unused = [Sampling()] * (B - len(prompts))
    starts = [*map(len, prompts), *[0] * len(unused)]
    settings_B = self._put(stack_settings([*settings, *unused], starts, self.stop_ids))
    live = dict(enumerate(range(first, first + len(prompts))))  # Row -> request.

    def call():
      nonlocal state
      cancel_B = self._put(np.array([row not in live for row in range(B)]))
      state, made = self._call("decode", (B, S), self._weights, settings_B, cancel_B, state)
      return made

    began, compiled, n_made = time.perf_counter(), self.stats.compile_s, 0
    made = call()
    while live:
      ahead = call()  # The device goes on while what it made before is read.
      token_NB, logprob_NB, finish_NB = map(np.asarray, made)
      for n, row in np.argwhere(token_NB >= 0).tolist():
        request = live.get(row)
        if request is None or request in cancelled:
          live.pop(row, None)
          continue
        finish = FINISH[finish_NB[n, row]]
        n_made += 1
        if finish is not None:
          del live[row]
        yield Token(request, int(token_NB[n, row]), float(logprob_NB[n, row]), finish)
      made = ahead
    self.stats.decode_tokens += n_made
    self.stats.decode_s += time.perf_counter() - began - (self.stats.compile_s - compiled)

  def _prefill_batch(self, prompts, settings) -> State:
    """The prompts read, chunk by chunk, into caches that have room for the rest."""
    ways = math.prod(self.mesh.shape[axis] for axis in self.cfg.rules.batch)
    B, S = ways * round_up(-(-len(prompts) // ways), 1), self._cache_length(prompts, settings)
    longest = max(map(len, prompts))
    length_B, limit_B = np.zeros(B, np.int32), np.zeros(B, np.int32)  # Rows without a request are done.
    tokens_BT = np.zeros((B, longest + self.prefill_chunk), np.int32)
    counts_BV = np.zeros((B, self.cfg.padded_vocab_size), np.int32)
    for row, (prompt, setting) in enumerate(zip(prompts, settings)):
      length_B[row], limit_B[row] = len(prompt), len(prompt) + setting.max_tokens
      tokens_BT[row, :len(prompt)] = prompt
      counts_BV[row, prompt] = 1
    began, compiled = time.perf_counter(), self.stats.compile_s
    state = self._call("start", (B, S), self._put(length_B), self._put(limit_B), self._put(counts_BV))
    length_B, start = self._put(length_B), 0
    while start < longest:
      T = min(self.prefill_chunk, round_up(longest - start, MIN_CHUNK))
      state = self._call("prefill", (B, S, T), self._weights, self._put(tokens_BT[:, start:start + T]),
                         self._put(np.int32(start)), length_B, state)
      start += T
    jax.block_until_ready(state)
    self.stats.prefill_tokens += sum(map(len, prompts))
    self.stats.prefill_s += time.perf_counter() - began - (self.stats.compile_s - compiled)
    return state

  def _cache_length(self, prompts, settings):
    return round_up(max(len(p) + s.max_tokens for p, s in zip(prompts, settings)), MIN_CACHE)

  def _put(self, tree):
    """Host arrays, split over the batch; scalars everywhere."""
    spec = lambda a: self.cfg.rules("batch", *[None] * (a.ndim - 1)) if a.ndim else jax.P()
    return jax.tree.map(lambda a: jax.device_put(a, place(self.mesh, spec(a))), tree)

  def _call(self, name, shape, *args):
    """Runs the program for this shape, compiled before its first use: any other input is then an error."""
    with jax.set_mesh(self.mesh):
      if (name, shape) not in self.programs:
        began = time.perf_counter()
        made = {"start": functools.partial(start, self.cfg, shape[1]),
                "prefill": functools.partial(prefill, self._graphdef),
                "decode": functools.partial(decode, self._graphdef, self.stop_ids, self.steps_per_call)}[name]
        donated = () if name == "start" else (len(args) - 1,)
        self.programs[name, shape] = jax.jit(made, donate_argnums=donated).lower(*args).compile()
        self.stats.compile_s += time.perf_counter() - began
      return self.programs[name, shape](*args)


# What runs on the device.

FINISH = (None, "stop", "length")  # By the number that `decode` returns.


def start(cfg, length: int, length_B, limit_B, counts_BV) -> State:
  """A batch of which nothing is read yet, with caches for `length` tokens."""
  B = length_B.shape[0]
  x_BD = jnp.zeros((B, cfg.d_model), jnp.dtype(cfg.compute_dtype), out_sharding=cfg.rules("batch", None))
  return State(init_cache(cfg, B, length), x_BD, length_B, limit_B, length_B == 0, counts_BV)


def prefill(graphdef, weights, tokens_BT, begin, length_B, state: State) -> State:
  """Reads the tokens at positions begin, begin + 1, ...; those at length_B or after are padding."""
  params, layers = weights
  model = nnx.merge(graphdef, params)
  pos_BT = begin + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None] + jnp.zeros_like(tokens_BT)
  segment_BT = (pos_BT < length_B[:, None]).astype(jnp.int32)
  x_BTD, caches = model.extend(tokens_BT, pos_BT, segment_BT, state.caches, layers)
  last_BT1 = (pos_BT == length_B[:, None] - 1)[..., None]
  x_BD = jnp.where(last_BT1.any(axis=1), jnp.where(last_BT1, x_BTD, 0).sum(axis=1), state.x_BD)
  return dataclasses.replace(state, caches=caches, x_BD=x_BD)


def decode(graphdef, stop_ids, n_steps, weights, settings: Settings, cancel_B, state: State):
  """Makes up to n_steps tokens a row, fewer if all rows end.

  Returns:
    (state, (token_NB, logprob_NB, finish_NB)): token -1 where a row had ended before, finish an index of
    FINISH; they are on every device, so that every process can read them.
  """
  params, layers = weights
  model = nnx.merge(graphdef, params)
  rules = model.cfg.rules
  b, bv, nb = rules("batch"), rules("batch", None), rules(None, "batch")
  draw = jax.shard_map(draw_any, in_specs=(bv, bv, b, b), out_specs=(b, b), check_vma=False)
  mark = jax.shard_map(lambda counts_BV, token_B: counts_BV.at[jnp.arange(token_B.shape[0]), token_B].add(2),
                       in_specs=(bv, b), out_specs=bv, check_vma=False)

  def step(carry):
    n, state, made = carry
    logits_BV = jax.sharding.reshard(model.logits(state.x_BD[:, None])[:, 0], bv)
    token_B, logprob_B = draw(logits_BV, state.counts_BV, state.pos_B, settings)
    stop_B = functools.reduce(jnp.logical_or, [token_B == i for i in stop_ids], jnp.zeros_like(state.done_B))
    finish_B = jnp.where(stop_B, 1, jnp.where(state.pos_B + 1 >= state.limit_B, 2, 0))
    done_B = state.done_B | (finish_B > 0)
    out = (jnp.where(state.done_B, -1, token_B), logprob_B, finish_B)
    made = tuple(jax.lax.dynamic_update_index_in_dim(all_NB, one_B.astype(all_NB.dtype), n, 0)
                 for all_NB, one_B in zip(made, out))
    x_B1D, caches = model.extend(token_B[:, None], state.pos_B[:, None], (~done_B)[:, None].astype(jnp.int32),
                                 state.caches, layers)
    state = State(caches, x_B1D[:, 0], state.pos_B + 1, state.limit_B, done_B, mark(state.counts_BV, token_B))
    return n + 1, state, made

  state = dataclasses.replace(state, done_B=state.done_B | cancel_B)
  empty = lambda value, dtype: jnp.full((n_steps, cancel_B.shape[0]), value, dtype, out_sharding=nb)
  made = empty(-1, jnp.int32), empty(0, jnp.float32), empty(0, jnp.int32)
  unfinished = lambda carry: (carry[0] < n_steps) & ~jnp.all(carry[1].done_B)
  _, state, made = jax.lax.while_loop(unfinished, step, (0, state, made))
  return state, tuple(jax.sharding.reshard(a, jax.P(None, None)) for a in made)


def draw_any(logits_BV, counts_BV, pos_B, settings):
  """`sample` without a grammar -> (token_B, logprob_B)."""
  B, V = logits_BV.shape
  all_BW = jnp.full((B, -(-V // 32)), 0xFFFFFFFF, jnp.uint32)
  drawn = sample(logits_BV, counts_BV, all_BW, pos_B, settings, n_top=0)
  return drawn.token_B, drawn.logprob_B


# Weights and shapes.

def decode_config(cfg: ModelConfig, mesh) -> ModelConfig:
  """The config under the DECODE rules, for this mesh.

  Raises:
    ValueError: a dim of the weights is no multiple of the devices that it is split over.
  """
  for name, rule in (("n_heads", "heads"), ("d_ff", "mlp"), ("d_expert", "mlp"), ("n_experts", "experts"),
                     ("padded_vocab_size", "vocab")):
    value, axes = getattr(cfg, name) or 0, getattr(DECODE, rule)
    if value % ways(mesh, axes):
      axis = "*".join(f"mesh.{a}" for a in axes)
      raise ValueError(f"model.{name}={value} is not a multiple of {axis}={ways(mesh, axes)}; nearest valid "
                       f"{axis}: {math.gcd(value, ways(mesh, axes))}")
  if cfg.dispatch == "capacity":  # Which requests share a batch must not decide what is dropped.
    cfg = dataclasses.replace(cfg, dispatch="dropless", exchange="gather")
  return fit(dataclasses.replace(cfg, rules=DECODE), mesh)


def cast_params(cfg: ModelConfig, params):
  """The parameters as the forward pass reads them, so that no step of decode casts them again.

  What has a logical axis is read in the compute dtype (model.layers.read); norms are float32 as they are.
  """
  if cfg.compute_dtype == cfg.param_dtype:
    return params
  declared = nnx.state(nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0))))
  is_param = lambda x: isinstance(x, nnx.Variable)
  is_read = jax.tree.map(lambda p: p.replace(any(p.get_metadata()["axes"])), declared, is_leaf=is_param)
  cast = lambda read, a: a.astype(cfg.compute_dtype) if read else a
  return jax.jit(lambda params: jax.tree.map(cast, nnx.to_pure_dict(is_read), params))(params)


def round_up(n: int, least: int) -> int:
  """The power of two times `least` that holds n."""
  while least < n:
    least *= 2
  return least

"""One step of the engine, as it runs on the device: tokens are fed, and tokens are made.

Shapes: W ways of the batch, each with its own requests and pages; R rows that make a token each, and C
tokens of one prompt (a chunk, or none): M = R or R + 1 sequences, T = R + C tokens; S slots, and one more for
nobody.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from infer.sampling import MOST_TOP, Settings, measure, sample, stack_settings
from model.cache import init_paged_cache
from model.kernels.paged import Where

SCORED_TOGETHER = 32  # Positions of a prompt whose logits are in memory at a time.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """What stays on the device."""
  caches: tuple
  token_WS: jax.Array  # The last that each slot's request made.
  counts_WSV: jax.Array  # As infer.sampling.sample has them.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkInputs:
  token_WC: jax.Array
  next_WC: jax.Array  # The token of the prompt after each.
  start_W: jax.Array
  n_W: jax.Array  # Tokens that are no padding.
  is_first_W: jax.Array  # Since the request has its slot.
  counts_WV: jax.Array  # What the slot then begins with.
  n_top_W: jax.Array  # How many log-probabilities of the prompt are wanted beside its own; -1: none at all.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
  """What a step does."""
  slot_WM: jax.Array
  pos_WR: jax.Array  # Where the rows' last tokens stand, which are fed.
  page_WML: jax.Array
  makes_WM: jax.Array
  settings: Settings  # Each [W, M, ...].
  mask_WMw: jax.Array  # As infer.sampling.sample has it.
  chunk: ChunkInputs | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Made:
  drawn_WM: tuple  # token, logprob, and [..., MOST_TOP] ids and logprobs; anything where none was to be made.
  scored_WC: tuple  # logprob of each next token, ids and logprobs; () without a chunk.


def stack_inputs(samplings, starts, stop_ids, W) -> Settings:
  """As infer.sampling.stack_settings has them, each leading with the ways."""
  return jax.tree.map(lambda a: a.reshape(W, -1, *a.shape[1:]), stack_settings(samplings, starts, stop_ids))


def empty_inputs(W, M, C, L, S, V) -> Inputs:
  """NumPy arrays of a step for nobody, to be filled in, settings too; L pages a sequence may have."""
  R, zeros = M - bool(C), lambda *shape: np.zeros(shape, np.int32)
  chunk = ChunkInputs(token_WC=zeros(W, C), next_WC=zeros(W, C), start_W=zeros(W), n_W=zeros(W),
                      is_first_W=np.zeros(W, bool), counts_WV=zeros(W, V), n_top_W=zeros(W) - 1)
  return Inputs(slot_WM=zeros(W, M) + S, pos_WR=zeros(W, R), page_WML=zeros(W, M, L),
                makes_WM=np.zeros((W, M), bool), settings=None,
                mask_WMw=np.full((W, M, -(-V // 32)), 0xffffffff, np.uint32), chunk=chunk if C else None)


def empty_state(cfg, W, S, n_pages, page_size, cache_dtype, ring_chunk=None) -> State:
  """ring_chunk: the longest chunk, where layers with a window keep only what it needs."""
  spec = lambda shape: cfg.rules("batch", *[None] * (len(shape) - 1))
  zeros = lambda *shape: jnp.zeros(shape, jnp.int32, out_sharding=spec(shape))
  ring = None if ring_chunk is None else (S, ring_chunk)
  return State(init_paged_cache(cfg, W, n_pages, page_size, cache_dtype, ring), zeros(W, S + 1),
               zeros(W, S + 1, cfg.padded_vocab_size))


def run_step(graphdef, weights, inputs: Inputs, state: State) -> tuple[State, Made]:
  params, layers = weights
  model = nnx.merge(graphdef, params)
  chunk, rules = inputs.chunk, model.cfg.rules
  R = inputs.pos_WR.shape[1]
  nobody = state.token_WS.shape[1] - 1

  row_WR = inputs.slot_WM[:, :R]
  token_WT, pos_WT = _each_way(rules, _pick)(state.token_WS, row_WR), inputs.pos_WR
  is_token_WT = row_WR != nobody
  page_WML, n_W, counts_WSV = inputs.page_WML, jnp.zeros_like(inputs.slot_WM[:, 0]), state.counts_WSV
  slot_WM = inputs.slot_WM
  if chunk is None:
    page_WML = jnp.pad(page_WML, ((0, 0), (0, 1), (0, 0)))
    slot_WM = jnp.pad(slot_WM, ((0, 0), (0, 1)), constant_values=nobody)
  else:
    n_W = chunk.n_W
    place_1C = jnp.arange(chunk.token_WC.shape[1], dtype=jnp.int32)[None]
    token_WT = jnp.concatenate([token_WT, chunk.token_WC], axis=1)
    pos_WT = jnp.concatenate([pos_WT, chunk.start_W[:, None] + place_1C], axis=1)
    is_token_WT = jnp.concatenate([is_token_WT, place_1C < n_W[:, None]], axis=1)
    counts_WSV = _each_way(rules, _begin)(
        counts_WSV, inputs.slot_WM[:, -1], chunk.is_first_W, chunk.counts_WV)

  pages = {n: page_WML if n is None else _ring_pages(slot_WM, nobody, n, page_WML.shape[2])
           for n in {cache.n_ring for cache in state.caches}}
  caches = tuple(dataclasses.replace(cache, where=Where(pos_WT, pages[cache.n_ring], n_W))
                 for cache in state.caches)
  x_WTD, caches = model.extend(token_WT, pos_WT, is_token_WT.astype(jnp.int32), caches, layers)
  caches = tuple(dataclasses.replace(cache, where=None) for cache in caches)

  last_WM = jnp.zeros_like(inputs.slot_WM) + jnp.arange(inputs.slot_WM.shape[1])[None]
  scored_WC = ()
  if chunk is not None:  # Its token is made of its last one.
    last_WM = jnp.where(last_WM == R, R + jnp.maximum(n_W, 1)[:, None] - 1, last_WM)
    scored_WC = _score(model, x_WTD[:, R:], chunk)
  logits_WMV = _logits(model, _each_way(rules, _pick)(x_WTD, last_WM))
  next_WM = _each_way(rules, _pick)(pos_WT, last_WM) + 1
  token_WS, counts_WSV, drawn_WM = _draw_all(
      rules, logits_WMV, state.token_WS, counts_WSV, inputs.slot_WM, inputs.makes_WM, next_WM,
      inputs.mask_WMw, inputs.settings)
  return State(caches, token_WS, counts_WSV), Made(drawn_WM, scored_WC)


def _ring_pages(slot_WM, nobody, n, L):
  """[W, M, L]: a slot's own n pages, again and again."""
  page_WML = 1 + n * slot_WM[..., None] + (jnp.arange(L, dtype=jnp.int32) % n)[None, None]
  return jnp.where(slot_WM[..., None] == nobody, 0, page_WML)


def fork(state: State, slot_WN, token_WN, from_WN, to_WN) -> State:
  """Says the last token of slots, and copies whole pages; slot S and page 0 are nobody's."""
  def local(state, slot_1N, token_1N, from_1N, to_1N):
    copy = lambda a: a.at[0, to_1N[0]].set(a[0, from_1N[0]])
    return State(jax.tree.map(copy, state.caches), state.token_WS.at[0, slot_1N[0]].set(token_1N[0]),
                 state.counts_WSV)

  args = state, slot_WN, token_WN, from_WN, to_WN
  specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, args)
  return jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)(*args)


def _each_way(rules, f):
  """f on each way of the batch, without its leading dim."""
  def local(*args):
    return jax.tree.map(lambda a: a[None], f(*jax.tree.map(lambda a: a[0], args)))

  whole = jax.shard_map(local, in_specs=rules("batch"), out_specs=rules("batch"), check_vma=False)
  return lambda *args: whole(*jax.tree.map(functools.partial(_by_way, rules), args))


def _by_way(rules, a):
  return jax.sharding.reshard(a, rules("batch", *[None] * (a.ndim - 1)))


def _pick(a_S, index_M):
  return a_S[index_M]


def _begin(counts_SV, slot, is_first, new_V):
  return counts_SV.at[slot].set(jnp.where(is_first, new_V, counts_SV[slot]))


def _logits(model, x_WMD):
  return _by_way(model.cfg.rules, model.logits(x_WMD))


@functools.partial(jax.jit, static_argnums=0)
def _draw_all(rules, *args):
  """_draw on each way; traced once for all sizes of a chunk."""
  return _each_way(rules, _draw)(*args)


def _draw(logits_MV, token_S, counts_SV, slot_M, makes_M, pos_M, mask_Mw, settings):
  """(token_S, counts_SV, what was drawn). A sequence that is to make none draws for nobody."""
  drawn = sample(logits_MV, counts_SV[slot_M], mask_Mw, pos_M, settings, n_top=MOST_TOP)
  slot_M = jnp.where(makes_M, slot_M, token_S.shape[0] - 1)
  return (token_S.at[slot_M].set(drawn.token_B), counts_SV.at[slot_M, drawn.token_B].add(2),
          (drawn.token_B, drawn.logprob_B, drawn.top_id_Bn, drawn.top_logprob_Bn))


def _score(model, x_WCD, chunk):
  """Of the prompt's own tokens, where a request wants it; in blocks, so that no [C, V] is in memory."""
  rules, (W, C, _) = model.cfg.rules, x_WCD.shape
  n = min(SCORED_TOGETHER, C)
  by_way = functools.partial(_by_way, rules)

  def block(args):
    x_WnD, next_Wn, n_top_Wn = args
    return _each_way(rules, lambda *a: measure(*a, n_top=MOST_TOP))(_logits(model, x_WnD), next_Wn, n_top_Wn)

  def score(*args):
    cut = lambda a: jnp.moveaxis(a.reshape(W, C // n, n, *a.shape[2:]), 1, 0)
    join = lambda a: by_way(jnp.moveaxis(a, 0, 1).reshape(W, C, *a.shape[3:]))
    return tuple(map(join, jax.lax.map(block, tuple(map(cut, args)))))

  def nothing(*_):
    zeros = lambda dtype, *more: by_way(jnp.zeros((W, C, *more), dtype))
    return zeros(jnp.float32), zeros(jnp.int32, MOST_TOP), zeros(jnp.float32, MOST_TOP)

  n_top_WC = jnp.maximum(chunk.n_top_W, 0)[:, None] + jnp.zeros_like(chunk.token_WC)
  return jax.lax.cond(jnp.any(chunk.n_top_W >= 0), score, nothing, x_WCD, chunk.next_WC, n_top_WC)

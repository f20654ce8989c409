"""One step of the engine, as it runs on the device: tokens are fed, and tokens are made.

Shapes: W ways of the batch, each with its own requests and pages; R rows, which feed the last token of a
request each, and a chunk of C tokens of up to G prompts, or none: T = R + C tokens, after M of which one is
made; S slots, and one more for nobody; L pages a sequence may have.
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
  pos_WC: jax.Array
  part_WC: jax.Array  # Of which prompt each is.
  n_W: jax.Array  # Tokens that are no padding.
  n_top_WC: jax.Array  # How many log-probabilities are wanted beside the next token's; -1: none at all.
  page_WL: jax.Array  # As model.kernels.paged.Where has them.
  first_WG: jax.Array
  slot_WG: jax.Array
  is_first_WG: jax.Array  # Since the request has its slot.
  counts_WGV: jax.Array  # What the slot then begins with.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
  """What a step does."""
  slot_WR: jax.Array
  pos_WR: jax.Array  # Where the rows' last tokens stand, which are fed.
  page_WRL: jax.Array
  last_WM: jax.Array  # After which of the T tokens one is made,
  slot_WM: jax.Array  # and for whom.
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


def empty_inputs(W, R, C, M, *, G, L, S, V) -> Inputs:
  """NumPy arrays of a step for nobody, to be filled in, settings too."""
  zeros = lambda *shape: np.zeros(shape, np.int32)
  chunk = None if not C else ChunkInputs(
    token_WC=zeros(W, C), next_WC=zeros(W, C), pos_WC=zeros(W, C), part_WC=zeros(W, C), n_W=zeros(W),
    n_top_WC=zeros(W, C) - 1, page_WL=zeros(W, L), first_WG=zeros(W, G) + L, slot_WG=zeros(W, G) + S,
    is_first_WG=np.zeros((W, G), bool), counts_WGV=zeros(W, G, V))
  return Inputs(slot_WR=zeros(W, R) + S, pos_WR=zeros(W, R), page_WRL=zeros(W, R, L), last_WM=zeros(W, M),
                slot_WM=zeros(W, M) + S, settings=None,
                mask_WMw=np.full((W, M, -(-V // 32)), 0xffffffff, np.uint32), chunk=chunk)


def empty_state(cfg, W, S, n_pages, page_size, cache_dtype, ring_chunk=None) -> State:
  """ring_chunk: the longest chunk, where layers with a window keep only what it needs."""
  spec = lambda shape: cfg.rules("batch", *[None] * (len(shape) - 1))
  zeros = lambda *shape: jnp.zeros(shape, jnp.int32, out_sharding=spec(shape))
  ring = None if ring_chunk is None else (S, ring_chunk)
  return State(init_paged_cache(cfg, W, n_pages, page_size, cache_dtype, ring), zeros(W, S + 1),
               zeros(W, S + 1, cfg.padded_vocab_size))


def made_like(has_chunk: bool) -> Made:
  """The structure of what a step makes."""
  return Made((0,) * 4, (0,) * 3 if has_chunk else ())


def run_step(graphdef, weights, inputs: Inputs, state: State) -> tuple[State, Made]:
  params, layers = weights
  model = nnx.merge(graphdef, params)
  chunk, rules = inputs.chunk, model.cfg.rules
  R, nobody = inputs.slot_WR.shape[1], state.token_WS.shape[1] - 1
  token_WT, pos_WT = _each_way(rules, _pick)(state.token_WS, inputs.slot_WR), inputs.pos_WR
  is_token_WT, counts_WSV = inputs.slot_WR != nobody, state.counts_WSV
  if chunk is not None:
    token_WT = jnp.concatenate([token_WT, chunk.token_WC], axis=1)
    pos_WT = jnp.concatenate([pos_WT, chunk.pos_WC], axis=1)
    is_there_WC = jnp.arange(chunk.token_WC.shape[1])[None] < chunk.n_W[:, None]
    is_token_WT = jnp.concatenate([is_token_WT, is_there_WC], axis=1)
    counts_WSV = _each_way(rules, _begin)(counts_WSV, chunk.slot_WG, chunk.is_first_WG, chunk.counts_WGV)

  where = {n: _find(rules, inputs, pos_WT, nobody, n) for n in {cache.n_ring for cache in state.caches}}
  caches = tuple(dataclasses.replace(cache, where=where[cache.n_ring]) for cache in state.caches)
  x_WTD, caches = model.extend(token_WT, pos_WT, is_token_WT.astype(jnp.int32), caches, layers)
  caches = tuple(dataclasses.replace(cache, where=None) for cache in caches)

  scored_WC = () if chunk is None else _score(model, x_WTD[:, R:], chunk)
  logits_WMV = _logits(model, _each_way(rules, _pick)(x_WTD, inputs.last_WM))
  next_WM = _each_way(rules, _pick)(pos_WT, inputs.last_WM) + 1
  token_WS, counts_WSV, drawn_WM = _draw_all(rules, logits_WMV, state.token_WS, counts_WSV, inputs.slot_WM,
                                             next_WM, inputs.mask_WMw, inputs.settings)
  return State(caches, token_WS, counts_WSV), Made(drawn_WM, scored_WC)


def _find(rules, inputs, pos_WT, nobody, n_ring) -> Where:
  """n_ring: the caches' own pages of each slot are used again and again, or None: those that are listed."""
  chunk, page_WRL = inputs.chunk, inputs.page_WRL
  listed_L = jnp.arange(page_WRL.shape[2], dtype=jnp.int32)
  if n_ring is not None:
    page_WRL = _ring_pages(inputs.slot_WR[..., None], listed_L[None, None], nobody, n_ring)
  if chunk is None:
    none = jnp.zeros_like(inputs.slot_WR[:, :0])
    return Where(pos_WT, page_WRL, none, none, none, none.sum(axis=1))
  page_WL = chunk.page_WL
  if n_ring is not None:
    part_WL = jnp.maximum((listed_L[None, :, None] >= chunk.first_WG[:, None]).sum(axis=2) - 1, 0)
    pick = lambda a_WG: _each_way(rules, _pick)(a_WG, part_WL)
    page_WL = _ring_pages(pick(chunk.slot_WG), listed_L[None] - pick(chunk.first_WG), nobody, n_ring)
  return Where(pos_WT, page_WRL, page_WL, chunk.first_WG, chunk.part_WC, chunk.n_W)


def _ring_pages(slot, at, nobody, n):
  """The page of a slot's own n that is its `at`-th."""
  return jnp.where(slot == nobody, 0, 1 + n * slot + at % n)


def fork(state: State, slot_WN, token_WN, from_WN, to_WN) -> tuple[State]:
  """Says the last token of slots, and copies whole pages; slot S and page 0 are nobody's."""
  def local(state, slot_1N, token_1N, from_1N, to_1N):
    copy = lambda a: a.at[0, to_1N[0]].set(a[0, from_1N[0]])
    return State(jax.tree.map(copy, state.caches), state.token_WS.at[0, slot_1N[0]].set(token_1N[0]),
                 state.counts_WSV)

  args = state, slot_WN, token_WN, from_WN, to_WN
  specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, args)
  return (jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)(*args),)


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


def _begin(counts_SV, slot_G, is_first_G, new_GV):
  return counts_SV.at[slot_G].set(jnp.where(is_first_G[:, None], new_GV, counts_SV[slot_G]))


def _logits(model, x_WMD):
  return _by_way(model.cfg.rules, model.logits(x_WMD))


@functools.partial(jax.jit, static_argnums=0)
def _draw_all(rules, *args):
  """_draw on each way; traced once for all sizes of a chunk."""
  return _each_way(rules, _draw)(*args)


def _draw(logits_MV, token_S, counts_SV, slot_M, pos_M, mask_Mw, settings):
  """(token_S, counts_SV, what was drawn)."""
  drawn = sample(logits_MV, counts_SV[slot_M], mask_Mw, pos_M, settings, n_top=MOST_TOP)
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

  args = x_WCD, chunk.next_WC, jnp.maximum(chunk.n_top_WC, 0)
  return jax.lax.cond(jnp.any(chunk.n_top_WC >= 0), score, nothing, *args)

"""Mixture of experts: router, dispatch, and the sums by which its balance is seen. Each token goes to k of
E experts; e of them are on this device."""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.exchange import EXCHANGE, take
from model.kernels.grouped import GROUPED
from model.layers import embed_shards, finer_than_length, gather_embed, sum_over, weight
from model.lookup import lookup
from model.sharding import on_devices

# name -> (scores of logits, how many of the best scores in a group are summed to choose between groups).
ROUTER = {
  "softmax": (jax.nn.softmax, 1),  # Mixtral (arXiv:2401.04088); groups as in DeepSeek V2 (arXiv:2405.04434).
  "sigmoid": (jax.nn.sigmoid, 2),  # DeepSeek V3 (arXiv:2412.19437).
}


SUMS = ("load_E", "prob_E", "z", "entropy", "sequence", "dropped", "tokens")


class MoE(nnx.Module):
  """Top-k of E SwiGLU experts of width F = d_expert, and shared experts that see every token."""

  def __init__(self, cfg, *, rngs, shared):
    D, E, F = cfg.d_model, cfg.n_experts, cfg.d_expert
    self.cfg = cfg
    full = dataclasses.replace(cfg, param_dtype="float32")  # 16-bit logits choose other experts.
    self.w_router = weight(full, (D, E), (None, None), rngs, fan_in=D)
    if cfg.router_bias:
      self.balance_bias = nnx.Param(jnp.zeros((E,), jnp.float32), axes=(None,))
    self.w_gate = weight(cfg, (E, D, F), ("experts", "embed", "mlp"), rngs, fan_in=D)
    self.w_up = weight(cfg, (E, D, F), ("experts", "embed", "mlp"), rngs, fan_in=D)
    self.w_down = weight(cfg, (E, F, D), ("experts", "mlp", "embed"), rngs, fan_in=F, residual=True)
    if cfg.n_shared_experts:
      self.shared = shared(cfg, rngs=rngs, d_ff=cfg.n_shared_experts * F)

  def __call__(self, x_BTD, segment_BT):
    """Padding (segment 0) is not routed: it gets zeros from the experts, takes no room and counts nowhere.

    Returns:
      (y_BTD, aux): float32 sums over the tokens of all devices: load_E (choices of each expert, before
      drops), prob_E (router probabilities), z (squared log-normalisers), entropy, sequence (the balance loss
      of each row, times its tokens), dropped (choices not computed), tokens.
    """
    cfg, rules = self.cfg, self.cfg.rules
    bias_E = self.balance_bias[...] if cfg.router_bias else jnp.zeros((cfg.n_experts,), jnp.float32)
    experts, shards = zip(*(embed_shards(cfg, w) for w in (self.w_gate, self.w_up, self.w_down)))
    specs = (rules("batch", "length", None), rules("batch", "length"), jax.P(), jax.P(), shards)
    length = "residual" if finer_than_length(rules, rules.mlp) else "length"
    out = (rules("batch", length, None), dict.fromkeys(SUMS, jax.P()))
    y_BTD, aux = on_devices(functools.partial(_on_device, cfg, shards), specs, out)(
        x_BTD, segment_BT, self.w_router[...], bias_E, experts)
    y_BTD = jax.sharding.reshard(y_BTD, rules("batch", "residual", None))
    if cfg.n_shared_experts:
      y_BTD = y_BTD + self.shared(x_BTD)[0]
    return checkpoint_name(y_BTD, "ffn_out"), aux


def _on_device(cfg, shards, x_btD, segment_bt, w_router_DE, bias_E, experts):
  rules, (b, t, D) = cfg.rules, x_btD.shape
  x_nD, real_n = x_btD.reshape(b * t, D), segment_bt.reshape(-1) > 0
  logits_nE = jnp.einsum("nD,DE->nE", x_nD.astype(jnp.float32), w_router_DE, precision="highest")
  ids_nk, weights_nk, prob_nE = route(cfg, logits_nE, bias_E)
  ids_nk = jnp.where(real_n[:, None], ids_nk, cfg.n_experts)

  experts = tuple(gather_embed(rules, w, spec, dim) for w, spec, dim in zip(experts, shards, (1, 1, 2)))
  if rules.mlp:  # Said here, so that the gradient is summed over the slices of F once a token.
    x_nD, weights_nk = (jax.lax.pcast(a, rules.mlp, to="varying") for a in (x_nD, weights_nk))
  e = experts[0].shape[0]
  room = math.ceil(cfg.capacity_factor * cfg.n_experts_per_token * b * t / cfg.n_experts)
  dispatch = functools.partial(DISPATCH[cfg.dispatch], cfg, experts, min(room, b * t))
  exchange = EXCHANGE[cfg.exchange] if rules.experts and e < cfg.n_experts else None
  if exchange is None:
    y_nD, dropped = dispatch(x_nD, ids_nk, weights_nk, e)
  else:
    y_nD, dropped = exchange(rules.experts, e, dispatch, x_nD, ids_nk, weights_nk)
  y_btD = y_nD.reshape(b, t, D)
  y_btD = sum_over(y_btD, rules.mlp, finer_than_length(rules, rules.mlp))
  return y_btD, _sums(cfg, (b, t), ids_nk, prob_nE, logits_nE, real_n, dropped)


def route(cfg, logits_nE, bias_E):
  """Who goes where: (ids_nk, weights_nk, probabilities_nE). The choice itself has no gradient."""
  score, n_best = ROUTER[cfg.router]
  score_nE = score(logits_nE)
  select_nE = jax.lax.stop_gradient(score_nE + bias_E[None])
  if cfg.n_expert_groups:
    select_nE = _limit_groups(select_nE, cfg.n_expert_groups, cfg.n_groups_per_token, n_best)
  ids_nk = jax.lax.top_k(select_nE, cfg.n_experts_per_token)[1]
  weights_nk = jnp.take_along_axis(score_nE, ids_nk, axis=-1)
  # A single weight stays (Switch): 1 would not depend on the router.
  if cfg.router_normalize and cfg.n_experts_per_token > 1:
    weights_nk = weights_nk / (weights_nk.sum(-1, keepdims=True) + 1e-20)
  weights_nk = weights_nk * cfg.routed_scale
  return ids_nk, weights_nk, score_nE / (score_nE.sum(-1, keepdims=True) + 1e-20)


def _limit_groups(select_nE, n_groups, n_chosen, n_best):
  """-inf outside the n_chosen groups with the largest sums of their n_best scores (DeepSeek V2, V3)."""
  n, E = select_nE.shape
  by_group = select_nE.reshape(n, n_groups, E // n_groups)
  group_score = jax.lax.top_k(by_group, min(n_best, E // n_groups))[0].sum(-1)
  chosen = jax.lax.top_k(group_score, n_chosen)[1]
  allowed = (chosen[..., None] == jnp.arange(n_groups)[None, None]).any(1)
  return jnp.where(allowed[..., None], by_group, -jnp.inf).reshape(n, E)


def _sums(cfg, shape, ids_nk, prob_nE, logits_nE, real_n, dropped):
  """What `MoE` says of its router; see there."""
  (b, t), E, k, rules = shape, cfg.n_experts, cfg.n_experts_per_token, cfg.rules
  real_bt = real_n.reshape(b, t)
  prob_bE = jnp.where(real_bt[..., None], prob_nE.reshape(b, t, E), 0).sum(1)
  load_bE = (ids_nk.reshape(b, t * k, 1) == jnp.arange(E)[None, None]).sum(1).astype(jnp.float32)
  # A row's tokens may be on several devices; f and P are of the whole row.
  row_load, row_prob, row_n = (
      sum_over(a, rules.length) for a in (load_bE, prob_bE, real_bt.sum(1).astype(jnp.float32)))
  sequence_b = E / k * (row_load * row_prob).sum(-1) / jnp.maximum(row_n, 1)
  entropy_n = jax.scipy.special.entr(jax.lax.stop_gradient(prob_nE)).sum(-1)
  over_tokens = {
    "load_E": load_bE.sum(0), "prob_E": prob_bE.sum(0),
    "z": jnp.where(real_n, jax.nn.logsumexp(logits_nE, axis=-1) ** 2, 0).sum(),
    "entropy": jnp.where(real_n, entropy_n, 0).sum(),
    "dropped": dropped.astype(jnp.float32), "tokens": real_n.sum().astype(jnp.float32)}
  sums = {name: sum_over(a, rules.batch + rules.length) for name, a in over_tokens.items()}
  return sums | {"sequence": sum_over(sequence_b.sum(), rules.batch)}


def dropless(cfg, experts, room, x_nD, ids_nk, weights_nk, n_experts, n_groups=1, move=None):
  """Pairs (token, choice) sorted by expert, and a product of ragged groups (MegaBlocks, arXiv:2211.15841).

  Args:
    experts: (w_gate_eDF, w_up_eDF, w_down_eFD).
    room: unused; every pair has its row.
    ids_nk: below n_experts, or n_experts for pairs that are not routed.
    move: (rows, sizes) -> (rows of this device's experts, their sizes, what brings results back).

  Returns:
    (y_nD, how many pairs were not computed).
  """
  del room, n_groups
  product = lookup(GROUPED, cfg.grouped_impl, "model.grouped_impl")
  n, k = ids_nk.shape
  order_m, rank_m, sizes_E = _sort(ids_nk, n_experts)
  # Rows that are not routed are read by nobody: what the product leaves past the last group is undefined.
  source_m = jnp.where(jnp.arange(n * k) < sizes_E.sum(), order_m, n * k)
  places_nk = jnp.where(ids_nk < n_experts, rank_m.reshape(n, k), n * k)
  rows_mD = take(x_nD, source_m // k, places_nk)
  rows_mD, sizes_e, back = move(rows_mD, sizes_E) if move else (rows_mD, sizes_E, lambda rows: rows)
  w_gate, w_up, w_down = experts
  h_mF = jax.nn.silu(product(rows_mD, w_gate, sizes_e)) * product(rows_mD, w_up, sizes_e)
  out_mD = back(product(h_mF, w_down, sizes_e))
  return _combine(out_mD, source_m, places_nk, weights_nk), jnp.zeros((), jnp.int32)


def capacity(cfg, experts, room, x_nD, ids_nk, weights_nk, n_experts, n_groups=1, move=None):
  """Each expert has `room` rows for each group of n / n_groups tokens; later tokens find it full
  (Switch, arXiv:2101.03961). Arguments as of `dropless`."""
  del cfg
  n, k = ids_nk.shape
  place = functools.partial(_find_room, n_experts=n_experts, room=room)
  pair_GEC, place_Gm = jax.vmap(place)(ids_nk.reshape(n_groups, -1, k))
  m, g = n * k // n_groups, jnp.arange(n_groups)
  # Of one group -> of all, whose rooms lie side by side: [E, G C].
  pair_GEC = jnp.where(pair_GEC < m, pair_GEC + g[:, None, None] * m, n * k)
  source_M = jnp.swapaxes(pair_GEC, 0, 1).reshape(-1)
  expert_Gm, slot_Gm = place_Gm // room, place_Gm % room
  n_rows = n_experts * n_groups * room
  place_Gm = jnp.where(expert_Gm < n_experts, (expert_Gm * n_groups + g[:, None]) * room + slot_Gm, n_rows)
  places_nk = place_Gm.reshape(n, k)
  rows_ECD = take(x_nD, source_M // k, places_nk).reshape(n_experts, -1, x_nD.shape[1])
  rows_eCD, _, back = move(rows_ECD, None) if move else (rows_ECD, None, lambda rows: rows)
  w_gate, w_up, w_down = experts
  h_eCF = (jax.nn.silu(jnp.einsum("eCD,eDF->eCF", rows_eCD, w_gate))
           * jnp.einsum("eCD,eDF->eCF", rows_eCD, w_up))
  out_ECD = back(jnp.einsum("eCF,eFD->eCD", h_eCF, w_down))
  dropped = (ids_nk < n_experts).sum() - (places_nk < n_rows).sum()
  return _combine(out_ECD.reshape(n_rows, -1), source_M, places_nk, weights_nk), dropped


def dense(cfg, experts, room, x_nD, ids_nk, weights_nk, n_experts, n_groups=1, move=None):
  """All experts on all tokens: what the others must equal. Arguments as of `dropless`."""
  del cfg, room, n_groups, move
  w_gate, w_up, w_down = experts
  hit_nke = ids_nk[..., None] == jnp.arange(n_experts)[None, None]
  weight_ne = jnp.where(hit_nke, weights_nk[..., None], 0).sum(1)
  h_neF = jax.nn.silu(jnp.einsum("nD,eDF->neF", x_nD, w_gate)) * jnp.einsum("nD,eDF->neF", x_nD, w_up)
  y_nD = jnp.einsum("neF,eFD,ne->nD", h_neF, w_down, weight_ne, preferred_element_type=jnp.float32)
  return y_nD.astype(x_nD.dtype), jnp.zeros((), jnp.int32)


DISPATCH = {"dropless": dropless, "capacity": capacity, "dense": dense}


def _sort(ids_nk, n_experts):
  """Pairs by expert, earlier tokens first: (pair of each row, row of each pair, rows of each expert)."""
  ids_m = ids_nk.reshape(-1)
  order_m = jnp.argsort(ids_m, stable=True)
  sizes_E = (ids_m[:, None] == jnp.arange(n_experts)[None]).sum(0).astype(jnp.int32)
  return order_m, jnp.argsort(order_m), sizes_E


def _find_room(ids_nk, n_experts, room):
  """(pair_EC: which pair has the room, n k for none; place_m: e C + c of each pair, E C for none)."""
  order_m, row_m, sizes_E = _sort(ids_nk, n_experts)
  m = order_m.shape[0]
  start_E, slot_C = jnp.cumsum(sizes_E) - sizes_E, jnp.arange(room)
  row_EC = start_E[:, None] + slot_C[None]
  pair_EC = jnp.where(slot_C[None] < sizes_E[:, None], order_m.at[row_EC].get(mode="clip"), m)
  ids_m = ids_nk.reshape(-1)
  slot_m = row_m - start_E.at[ids_m].get(mode="clip")
  kept = (ids_m < n_experts) & (slot_m < room)
  return pair_EC, jnp.where(kept, ids_m * room + slot_m, n_experts * room)


def _combine(out_mD, source_m, places_nk, weights_nk):
  """The weighted sum over each token's choices."""
  n, k = places_nk.shape
  pairs_nkD = take(out_mD, places_nk.reshape(-1), source_m[:, None]).reshape(n, k, -1)
  y_nD = jnp.einsum("nkD,nk->nD", pairs_nkD, weights_nk, preferred_element_type=jnp.float32)
  return y_nD.astype(out_mD.dtype)

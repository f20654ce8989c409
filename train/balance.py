"""What a router adds to training: losses that even out the experts' loads, the bias that does so without a
loss, and the numbers by which its health is seen. All from sums over the global batch."""
import jax
import jax.numpy as jnp

from train.optim import match


def router_sums(layers: dict) -> dict:
  """place in the pattern -> the sums of model.moe.MoE, of the blocks that have a router."""
  return {i: aux for i, aux in layers.items() if "load_E" in aux}


def balance_losses(cfg, sums, loads, n_tokens):
  """The losses of all routers, per token and summed over the layers.

  balance.loss is Switch's (arXiv:2101.03961): E sum_i f_i P_i, with f the share of choices and P the mean
  probability of expert i, over the global batch (arXiv:2501.11873). balance.sequence_loss is the same of each
  row (arXiv:2412.19437). balance.z_loss is the mean squared log-normaliser (arXiv:2202.08906).

  Args:
    sums: of `router_sums`, of one micro-batch; every array leads with the layers.
    loads: place -> load_LE, of all micro-batches of the step.
    n_tokens: routed in all micro-batches of the step.

  Returns:
    {"balance_loss", "sequence_loss", "router_z_loss"}: before their coefficients; micro-batches add up.
  """
  total = {"balance_loss": 0.0, "sequence_loss": 0.0, "router_z_loss": 0.0}
  for i, s in sums.items():
    choice_LE = jax.lax.stop_gradient(loads[i]) / (cfg.n_experts_per_token * n_tokens)
    total["balance_loss"] += cfg.n_experts * (choice_LE * s["prob_E"] / n_tokens).sum()
    total["sequence_loss"] += s["sequence"].sum() / n_tokens
    total["router_z_loss"] += s["z"].sum() / n_tokens
  return total


def weigh(balance, losses):
  """What is added to the loss per token."""
  return (balance.loss * losses["balance_loss"] + balance.sequence_loss * losses["sequence_loss"]
          + balance.z_loss * losses["router_z_loss"])


def update_biases(cfg, step, params, loads):
  """Moves each expert's selection bias by bias_rate towards the mean load (arXiv:2408.15664), up to the share
  bias_until of the steps; what optim.freeze names stays."""
  balance = cfg.balance
  if not cfg.model.router_bias:
    return params
  frozen = match("freeze", cfg.optim.freeze, params)["blocks"]
  rate = jnp.where(step < balance.bias_until * cfg.steps, balance.bias_rate, 0.0)
  blocks = dict(params["blocks"])
  for i, load_LE in loads.items():
    if frozen[i]["ffn"]["balance_bias"]:
      continue
    old = blocks[i]["ffn"]["balance_bias"]
    change = rate * jnp.sign(load_LE.mean(-1, keepdims=True) - load_LE)
    new = old + change.reshape(old.shape, out_sharding=jax.typeof(old).sharding)
    blocks[i] = {**blocks[i], "ffn": {**blocks[i]["ffn"], "balance_bias": new}}
  return {**params, "blocks": blocks}


def router_metrics(cfg, sums) -> dict:
  """Per layer, in the order of the layers, as vectors: the largest load over the mean, experts without a
  token, the share of choices that were dropped, the entropy of the router in nats."""
  per_place = [_health(cfg, s) for s in sums.values()]
  return {f"moe/{name}": jnp.stack([p[name] for p in per_place], axis=1).reshape(-1) for name in per_place[0]}


def _health(cfg, s):
  load_LE, tokens_L = s["load_E"], jnp.maximum(s["tokens"], 1.0)
  return {"max_over_mean_load": load_LE.max(-1) / jnp.maximum(load_LE.mean(-1), 1e-9),
          "dead_experts": (load_LE == 0).sum(-1).astype(jnp.float32),
          "drop_fraction": s["dropped"] / (tokens_L * cfg.n_experts_per_token),
          "entropy": s["entropy"] / tokens_L}

"""Is a mixture of experts better than a dense model whose tokens meet as many parameters?

Of 4 or 8 experts, each half as wide as the dense feed-forward, a token meets 2; only the router is more.
Balanced by a loss (Switch) or by a bias (arXiv:2408.15664).
"""
BASE = "configs/small.py"
SEEDS = range(3)

_EXPERTS = {"model.ffn": "moe", "model.n_experts_per_token": 2, "model.d_expert": 192}


def runs():
  yield "dense", {"model.d_ff": 384}
  for n in (4, 8):
    yield f"{n} experts", {**_EXPERTS, "model.n_experts": n}
  yield "8 experts, by bias", {**_EXPERTS, "model.n_experts": 8, "model.router_bias": True}

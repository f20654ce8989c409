"""The smallest mixture of experts: 8 experts, 2 a token, evened out by a bias instead of a loss.

python -m train.main --config=configs/moe_tiny.py
Cost: a minute on a laptop. Expected: the loss falls below 3.0 within 40 steps, and
moe/max_over_mean_load/worst falls. Split it over pretended devices with
JAX_NUM_CPU_DEVICES=8 JAX_PLATFORMS=cpu ... --config.mesh.expert=4 --config.mesh.tensor=2
"""
from configs import tiny
from train.config import TrainConfig


def get_config(arg: str = "") -> TrainConfig:
  if arg:
    raise ValueError(f"arg={arg!r}: this config takes none; nearest valid: configs/moe_tiny.py")
  c = tiny.get_config()
  m = c.model
  m.ffn, m.n_experts, m.n_experts_per_token, m.d_expert = "moe", 8, 2, 64
  m.n_shared_experts, m.router, m.router_bias = 1, "sigmoid", True
  c.balance.bias_rate = 0.01
  return c

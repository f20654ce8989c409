"""A mixture of the shape of DeepSeek V3 (arXiv:2412.19437): 61 layers, the first 3 dense, 256 experts in 8
groups of which a token sees 8 in at most 4, and one shared; evened out by the bias and a faint loss a row.
Attention is 128 plain heads in place of latent attention, so it has 688B parameters instead of 671B. For
2,048 chips; deepseek_v3.py:1024 is for 1,024.

python -m train.main --config=configs/deepseek_v3.py --config.data.sources[0].path=/data/*.jsonl.zst
Expected: not trained here. The program is traced for its 2,048 chips by tests/test_contracts.py.
"""
from data.config import DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig
from train.config import BalanceConfig, MeshConfig, OptimConfig, TrainConfig

TOPOLOGY = {"": "v5p:8x16x16", "1024": "v5p:8x8x16"}


def get_config(arg: str = "") -> TrainConfig:
  if arg not in TOPOLOGY:
    raise ValueError(f"arg={arg!r}; nearest valid: configs/deepseek_v3.py, configs/deepseek_v3.py:1024")
  return TrainConfig(
    steps=100_000, batch_size=15_360 if arg else 16_384, seq_len=4096, accum_steps=15 if arg else 8,
    loss_chunk=1024,
    model=ModelConfig(n_layers=61, d_model=7168, n_heads=128, head_dim=128, d_ff=18_432,
                      remat="full", ffn="moe", n_experts=256, n_experts_per_token=8,
                      d_expert=2048, n_shared_experts=1, n_dense_layers=3, router="sigmoid", router_bias=True,
                      n_expert_groups=8, n_groups_per_token=4, routed_scale=2.5),
    data=DataConfig(sources=[SourceConfig(name="text", kind="jsonl", path="/data/text/*.jsonl.zst")],
                    tokenizer=TokenizerConfig(vocab_size=129_280), val_fraction=0.001),
    optim=OptimConfig(lr=2.2e-4, warmup_steps=2000, schedule="wsd"),
    balance=BalanceConfig(sequence_loss=1e-4, bias_until=0.97),
    mesh=MeshConfig(fsdp=64 if arg else 128, expert=16))  # Products of sides of the torus.

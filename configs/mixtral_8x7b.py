"""A mixture of the shape of Mixtral 8x7B (arXiv:2401.04088): 47B parameters, 13B a token, for 256 chips;
mixtral_8x7b.py:64 is for 64.

python -m train.main --config=configs/mixtral_8x7b.py --config.data.sources[0].path=/data/*.jsonl.zst
Expected: not trained here. The program is traced for its 256 chips by tests/test_contracts.py.
"""
from data.config import DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig
from train.config import BalanceConfig, MeshConfig, OptimConfig, TrainConfig

TOPOLOGY = {"": "v5p:4x8x8", "64": "v5p:4x4x4"}


def get_config(arg: str = "") -> TrainConfig:
  if arg not in TOPOLOGY:
    raise ValueError(f"arg={arg!r}; nearest valid: configs/mixtral_8x7b.py, configs/mixtral_8x7b.py:64")
  return TrainConfig(
    steps=100_000, batch_size=64 if arg else 256, seq_len=8192, loss_chunk=2048,
    model=ModelConfig(n_layers=32, d_model=4096, n_heads=32, n_kv_heads=8, d_ff=14336, rope_theta=1e6,
                      norm_eps=1e-5, remat="full", ffn="moe", n_experts=8,
                      n_experts_per_token=2),
    data=DataConfig(sources=[SourceConfig(name="text", kind="jsonl", path="/data/text/*.jsonl.zst")],
                    tokenizer=TokenizerConfig(vocab_size=32_000), val_fraction=0.001),
    optim=OptimConfig(lr=3e-4, warmup_steps=2000),
    balance=BalanceConfig(loss=0.02, z_loss=1e-3),
    mesh=MeshConfig(fsdp=16 if arg else 32, expert=4 if arg else 8))

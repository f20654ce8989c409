"""A dense model of the shape of Llama 3 70B (arXiv:2407.21783), for 128 chips of v5p; dense_70b.py:v6e is for
256 of v6e.

python -m train.main --config=configs/dense_70b.py --config.data.sources[0].path=/data/*.jsonl.zst
Expected: not trained here. The program is traced for its chips by tests/test_contracts.py.
"""
from data.config import DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig
from train.config import MeshConfig, OptimConfig, TrainConfig

TOPOLOGY = {"": "v5p:4x4x8", "v6e": "v6e:16x16"}


def get_config(arg: str = "") -> TrainConfig:
  if arg not in TOPOLOGY:
    raise ValueError(f"arg={arg!r}; nearest valid: configs/dense_70b.py, configs/dense_70b.py:v6e")
  return TrainConfig(
    steps=100_000, batch_size=256 if arg else 128, seq_len=8192, z_loss=1e-4, loss_chunk=2048,
    model=ModelConfig(n_layers=80, d_model=8192, n_heads=64, n_kv_heads=8, d_ff=28672, rope_theta=500_000.0,
                      norm_eps=1e-5, remat="full"),
    data=DataConfig(sources=[SourceConfig(name="text", kind="jsonl", path="/data/text/*.jsonl.zst")],
                    tokenizer=TokenizerConfig(vocab_size=128_256), val_fraction=0.001),
    optim=OptimConfig(lr=1.5e-4, warmup_steps=2000),
    mesh=MeshConfig(fsdp=256 if arg else 128))

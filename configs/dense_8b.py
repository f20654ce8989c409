"""A dense model of the shape of Llama 3 8B (arXiv:2407.21783), for 256 chips; dense_8b.py:32 is for 32, one
row each.

python -m train.main --config=configs/dense_8b.py --config.data.sources[0].path=/data/*.jsonl.zst
Expected: not trained here. The program is traced for its 256 chips by tests/test_contracts.py.
"""
from data.config import DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig
from train.config import MeshConfig, OptimConfig, TrainConfig

TOPOLOGY = {"": "v5p:4x8x8", "32": "v5p:2x4x4"}


def get_config(arg: str = "") -> TrainConfig:
  if arg not in TOPOLOGY:
    raise ValueError(f"arg={arg!r}; nearest valid: configs/dense_8b.py, configs/dense_8b.py:32")
  return TrainConfig(
    steps=100_000, batch_size=32 if arg else 512, seq_len=8192, z_loss=1e-4, loss_chunk=2048,
    model=ModelConfig(n_layers=32, d_model=4096, n_heads=32, n_kv_heads=8, d_ff=14336, rope_theta=500_000.0,
                      norm_eps=1e-5, remat="full"),
    data=DataConfig(sources=[SourceConfig(name="text", kind="jsonl", path="/data/text/*.jsonl.zst")],
                    tokenizer=TokenizerConfig(vocab_size=128_256), val_fraction=0.001),
    optim=OptimConfig(lr=3e-4, warmup_steps=2000),
    mesh=MeshConfig(fsdp=32 if arg else 256))

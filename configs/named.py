"""The shapes of models that people know, for training from scratch, rehearsing and planning:

python -m train.main --config=configs/named.py:llama-3.1-8b --dry_run --chip=v5p --n=64
Expected: with no name, SmolLM2's 135M; an unknown name lists them. Nothing here was trained by us; to begin
with a model's own weights see configs/continued.py.
"""
import math

from data.config import DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig, RopeScaling
from train.config import OptimConfig, TrainConfig

# What the models of a family have in common.
LLAMA = dict(norm_eps=1e-5)
LLAMA3 = LLAMA | dict(vocab_size=128_256, rope_theta=500_000.0, n_kv_heads=8, rope_scaling=RopeScaling(
  kind="llama3", factor=8.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0))
QWEN3 = dict(vocab_size=151_936, head_dim=128, qk_norm="rmsnorm", rope_theta=1e6)
GEMMA = dict(head_dim=256, ffn="geglu", norm="rmsnorm_plus1", norm_position="both", head="tied")
GEMMA2 = GEMMA | dict(vocab_size=256_000, window=4096, layer_pattern=("local", "global"),
                      attention_softcap=50.0, logit_softcap=30.0)
GEMMA3 = GEMMA | dict(vocab_size=262_144, qk_norm="rmsnorm_plus1", rope_theta=1e6, rope_theta_local=1e4,
                      window=512)
FIVE_TO_ONE = ("local",) * 5 + ("global",)
DEEPSEEK = dict(attention="mla", kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                ffn="moe")


def yarn(mscale):
  return RopeScaling(kind="yarn", factor=40.0, original_length=4096, mscale=mscale, mscale_all_dim=mscale)


# Layers, width, heads, width of the feed-forward; then what is its own. Parameters: tests/test_named.py.
NAMED = {
  "smollm2-135m": (30, 576, 9, 1536, LLAMA | dict(
    vocab_size=49_152, n_kv_heads=3, rope_theta=1e5, head="tied")),
  "llama-2-7b": (32, 4096, 32, 11_008, LLAMA | dict(vocab_size=32_000)),
  "llama-3.1-8b": (32, 4096, 32, 14_336, LLAMA3),
  "llama-3.1-70b": (80, 8192, 64, 28_672, LLAMA3),
  "mistral-7b": (32, 4096, 32, 14_336, LLAMA | dict(vocab_size=32_000, n_kv_heads=8, window=4096)),
  "qwen2-7b": (28, 3584, 28, 18_944, dict(vocab_size=152_064, n_kv_heads=4, qkv_bias=True, rope_theta=1e6)),
  "qwen3-8b": (36, 4096, 32, 12_288, QWEN3 | dict(n_kv_heads=8)),
  "qwen3-30b-a3b": (48, 2048, 32, 6144, QWEN3 | dict(
    n_kv_heads=4, ffn="moe", n_experts=128, n_experts_per_token=8, d_expert=768)),
  "gemma-2-9b": (42, 3584, 16, 14_336, GEMMA2 | dict(n_kv_heads=8)),
  "gemma-3-270m": (18, 640, 4, 2048, GEMMA3 | dict(n_kv_heads=1, layer_pattern=FIVE_TO_ONE)),
  "gemma-3-1b": (26, 1152, 4, 6912, GEMMA3 | dict(n_kv_heads=1, layer_pattern=(FIVE_TO_ONE * 5)[:26])),
  "olmo-2-7b": (32, 4096, 32, 11_008, dict(
    vocab_size=100_352, rope_theta=500_000.0, norm_position="branch", qk_norm="rmsnorm", qk_norm_over="all")),
  "gpt2": (12, 768, 12, 3072, dict(
    vocab_size=50_257, positions="learned", max_length=1024, norm="layernorm", norm_eps=1e-5, ffn="gelu",
    head="tied", qkv_bias=True, out_bias=True, ffn_bias=True)),
  "phi-3-mini": (32, 3072, 32, 8192, LLAMA | dict(vocab_size=32_064, window=2047)),
  "mixtral-8x7b": (32, 4096, 32, 14_336, LLAMA | dict(
    vocab_size=32_000, n_kv_heads=8, rope_theta=1e6, ffn="moe", n_experts=8, n_experts_per_token=2)),
  "deepseek-v2-lite": (27, 2048, 16, 10_944, DEEPSEEK | dict(
    vocab_size=102_400, n_experts=64, n_experts_per_token=6, d_expert=1408, n_shared_experts=2,
    n_dense_layers=1, router_normalize=False, rope_scaling=yarn(0.707))),
  "deepseek-v3": (61, 7168, 128, 18_432, DEEPSEEK | dict(
    vocab_size=129_280, q_lora_rank=1536, n_experts=256, n_experts_per_token=8, d_expert=2048,
    n_shared_experts=1, n_dense_layers=3, router="sigmoid", router_bias=True, n_expert_groups=8,
    n_groups_per_token=4, routed_scale=2.5, rope_scaling=yarn(1.0))),
}


def get_config(arg: str = "") -> TrainConfig:
  name = arg or "smollm2-135m"
  if name not in NAMED:
    raise ValueError(f"arg={arg!r}; nearest valid: configs/named.py:{', configs/named.py:'.join(NAMED)}")
  layers, width, heads, hidden, own = NAMED[name]
  model = ModelConfig(n_layers=layers, d_model=width, n_heads=heads, d_ff=hidden, remat="full", **own)
  if name.startswith("gemma"):
    model.embed_scale = math.sqrt(width)
  data = DataConfig(sources=[SourceConfig(name="text", kind="jsonl", path="/data/text/*.jsonl.zst")],
                    tokenizer=TokenizerConfig(vocab_size=model.vocab_size), val_fraction=0.001)
  length = min(4096, model.max_length or 4096)
  return TrainConfig(steps=100_000, batch_size=256, seq_len=length, loss_chunk=1024, model=model, data=data,
                     optim=OptimConfig(lr=3e-4, warmup_steps=2000))

"""Published training speeds on TPUs: what ran, and how fast it was. tests/test_roofline.py predicts them.

All are MaxText's. Its MFU of 2023 halves attention for causality, as ours does. Most of its 2025 tables do
not (docs/reference/models/tiering.md, note 2): the published tokens/s agree with 12 n_heads head_dim T per
layer and token. `causal` says which of the two a row is in; the prediction is turned into the same.
"""
import dataclasses

from data.config import DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig
from train.config import MeshConfig, TrainConfig

# MaxText's names -> the products that its remat policies compute again.
MINIMAL = ("scores",)  # Saves every product's result but attention's.
NO_MLP_IN = ("scores", "ffn_in")  # save_dot_except_mlpwi; and qkv, out and the layer's input offloaded.
NO_OUT_NO_MLP = ("scores", "out", "ffn_in")  # qkv and the layer's input offloaded.
FULL = ("qkv", "scores", "out", "ffn_in")
FULL_MOE, NO_EXPERTS = (*FULL, "ffn_out"), ("scores", "ffn_in", "ffn_out")

REPO = "github.com/AI-Hypercomputer/maxtext"
SCRIPTS = f"{REPO} at 76bd53b0f: MaxText/configs/{{}}/README.md and the .sh beside it, base.yml, pyconfig.py"
TIERS = f"{REPO} docs/reference/models/tiering.md"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
  chip: str
  n: int  # Chips. MaxText's v5p-128 counts cores.
  mfu: float
  causal: bool
  recompute: tuple[str, ...]
  model: dict
  rows: int  # Per chip.
  seq_len: int
  mesh: dict
  source: str
  tokens_per_s: float | None = None  # Per chip, where published.

  def config(self) -> TrainConfig:
    """The same run in our terms, validated."""
    model = ModelConfig(**dict(attention_impl="chunked", remat="full") | self.model)
    data = DataConfig(sources=[SourceConfig(name="none", kind="synthetic")],
                      tokenizer=TokenizerConfig(vocab_size=model.vocab_size))
    return TrainConfig(batch_size=self.rows * self.n, seq_len=self.seq_len, model=model, data=data,
                       mesh=MeshConfig(**self.mesh)).validate(self.n)


def scaled(scale) -> dict:
  """MaxText's decoder of December 2023 at global_parameter_scale: heads and d_ff double first, then d_model,
  then depth."""
  cycles, rest = divmod(scale.bit_length() - 1, 3)
  heads, width = cycles + (rest > 0), cycles + (rest > 1)
  return dict(vocab_size=32_768, n_layers=16 << cycles, d_model=2560 << width, n_heads=8 << heads,
              head_dim=256, d_ff=8192 << heads, ffn="relu", head="tied")


_LLAMA = dict(n_heads=64, n_kv_heads=8, head_dim=128, n_layers=80, d_model=8192, d_ff=28_672)
_LLAMA_8B = dict(n_heads=32, n_kv_heads=8, head_dim=128, n_layers=32, d_model=4096, d_ff=14_336)
_MIXTRAL = dict(**_LLAMA_8B, vocab_size=32_000, ffn="moe", n_experts=8, n_experts_per_token=2)


def _v5p(scale, n, rows, tensor, mfu):
  return Anchor(chip="v5p", n=n, mfu=mfu, causal=True, recompute=MINIMAL, model=scaled(scale), rows=rows,
                seq_len=2048, mesh=dict(fsdp=n // tensor, tensor=tensor), source=SCRIPTS.format("v5p"))


def _v5e(scale, rows, tensor, mfu):
  return Anchor(chip="v5e", n=256, mfu=mfu, causal=True, recompute=FULL, model=scaled(scale), rows=rows,
                seq_len=2048, mesh=dict(fsdp=256 // tensor, tensor=tensor), source=SCRIPTS.format("v5e"))


ANCHORS = {
  "32B, 64 v5p": _v5p(32, 64, 8, 4, 0.7147),
  "64B, 64 v5p": _v5p(64, 64, 4, 4, 0.7031),
  "128B, 128 v5p": _v5p(128, 128, 2, 8, 0.6868),
  "16B, 256 v5e": _v5e(16, 6, 1, 0.6110),
  "32B, 256 v5e": _v5e(32, 4, 1, 0.6686),
  "64B, 256 v5e": _v5e(64, 2, 1, 0.5990),
  "128B, 256 v5e": _v5e(128, 1, 16, 0.5606),
  "Llama 2 70B, 512 v5p": Anchor(
    chip="v5p", n=512, mfu=0.654, causal=True, recompute=NO_MLP_IN, model=dict(**_LLAMA, vocab_size=32_000),
    rows=4, seq_len=4096, mesh=dict(fsdp=512), tokens_per_s=692,
    source=TIERS + "; benchmarks/maxtext_v5p_model_configs.py at 92e59fdf, llama2_70b_v5p_128"),
  "Llama 3.1 8B, 256 v6e": Anchor(
    chip="v6e", n=256, mfu=0.4546, causal=False, recompute=NO_MLP_IN, rows=4, seq_len=8192,
    model=dict(**_LLAMA_8B, vocab_size=128_256), mesh=dict(fsdp=256), tokens_per_s=7207,
    source=TIERS + "; tpu-recipes training/trillium/Llama3.1-8B-MaxText/v6e-256 (4.546 s a step)"),
  "Llama 3.1 70B, 256 v6e": Anchor(
    chip="v6e", n=256, mfu=0.5033, causal=False, recompute=NO_OUT_NO_MLP, rows=5, seq_len=8192,
    model=dict(**_LLAMA, vocab_size=128_256), mesh=dict(fsdp=256), tokens_per_s=960,
    source=TIERS + "; benchmarks/maxtext_trillium_model_configs.py at 92e59fdf, llama3_1_70b_8192"),
  "Mixtral 8x7B, 128 v5p": Anchor(
    chip="v5p", n=128, mfu=0.5256, causal=False, recompute=FULL_MOE, rows=36, seq_len=4096,
    model=dict(**_MIXTRAL, precision="pure_bf16"), mesh=dict(fsdp=128), tokens_per_s=2909,
    source=TIERS + " (8x4x4: 128 chips); tpu-recipes training/v5p/Mixtral-8X7B-Maxtext"),
  "Mixtral 8x7B, 256 v6e": Anchor(
    chip="v6e", n=256, mfu=0.3523, causal=False, recompute=NO_EXPERTS, rows=12, seq_len=4096,
    model=dict(**_MIXTRAL, dispatch="capacity"), mesh=dict(fsdp=256), tokens_per_s=3899,
    source=TIERS + "; tpu-recipes training/trillium/Mixtral-8x7B-MaxText (mixtral_8x7b_dropped)"),
}

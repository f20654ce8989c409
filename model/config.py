"""Typed model configuration: the only place where an architecture knob is declared."""
import dataclasses

from model.lookup import check_choice
from model.sharding import TRAIN, AxisRules

# name -> (parameters, compute). Norms, softmax, router, loss and optimizer are always float32.
PRECISION = {
  "fp32": ("float32", "float32"),
  "bf16": ("float32", "bfloat16"),  # float32 master weights: what TPU runs want.
  "pure_bf16": ("bfloat16", "bfloat16"),
}


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)
class ModelConfig:
  """A decoder. None means derived (see `validate`) unless the comment says that None is off."""
  vocab_size: int | None = None  # The tokenizer's. Arrays are padded to a multiple of 128.
  n_layers: int = 4
  d_model: int = 256
  n_heads: int = 4
  n_kv_heads: int | None = None  # n_heads (MHA); fewer is GQA; 1 is MQA.
  head_dim: int | None = None  # d_model / n_heads.
  d_ff: int | None = None  # 8/3 d_model if gated, else 4 d_model; up to a multiple of 128.

  attention: str = "gqa"  # model.attention.ATTENTION, or "module:Class".
  attention_impl: str = "auto"  # model.kernels.attention.KERNEL, or "module:function"; auto: by platform.
  context: str = "gather"  # Keys on other devices, where rules.length splits rows: model.context.CONTEXT.
  ffn: str = "swiglu"  # model.ffn.FFN, or "module:Class". "moe" is a mixture of SwiGLU experts.
  norm: str = "rmsnorm"  # model.layers.NORM.
  norm_position: str = "pre"  # pre | post | both (Gemma 2).
  qk_norm: str | None = None  # A key of NORM, over each head (Qwen 3); None is off.
  head: str = "untied"  # untied | tied to the embedding.
  qkv_bias: bool = False
  out_bias: bool = False
  ffn_bias: bool = False

  window: int | None = None  # Tokens that a "local" layer sees, itself included; None is off.
  layer_pattern: tuple[str, ...] | None = None  # Of local | global, repeated over the layers.
  attention_softcap: float | None = None  # cap * tanh(logits / cap); None is off.
  logit_softcap: float | None = None  # The same for the output logits.
  embed_scale: float | None = None  # Multiplies the embeddings (Gemma: sqrt(d_model)); None is off.
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  dropout: float = 0.0  # On the embedding and on each residual branch.

  init: str = "normal"  # normal (init_std) | fan_in (1/sqrt of the fan-in).
  init_std: float = 0.02
  precision: str = "bf16"  # A key of PRECISION: sets the next two where they are None.
  param_dtype: str | None = None
  compute_dtype: str | None = None
  remat: str = "none"  # A key of model.transformer.REMAT.
  unroll: int = 1  # Groups of layers per scan iteration: more compiles longer, and may run faster.

  n_experts: int | None = None  # The next 13 are read by ffn="moe" only.
  n_experts_per_token: int | None = None
  d_expert: int | None = None  # Hidden width of one expert; d_ff.
  n_shared_experts: int = 0  # Experts that see every token, as one SwiGLU of their summed width.
  n_dense_layers: int = 0  # The first layers, whose feed-forward is a SwiGLU of d_ff.
  router: str = "softmax"  # softmax (Mixtral) | sigmoid (DeepSeek V3): model.moe.ROUTER.
  router_bias: bool = False  # A bias that only selects, moved towards even loads (arXiv:2408.15664).
  n_expert_groups: int | None = None  # Of equal size; a token goes to n_groups_per_token of them.
  n_groups_per_token: int | None = None
  routed_scale: float = 1.0  # Times the weights of the routed experts (DeepSeek V3: 2.5).
  dispatch: str = "dropless"  # dropless | capacity | dense (all experts on all tokens: the oracle).
  grouped_impl: str = "auto"  # dropless only, its products: model.kernels.grouped.GROUPED; auto: by platform.
  capacity_factor: float = 1.25  # capacity only: room for this many times the mean of a device's tokens.
  exchange: str = "gather"  # How tokens reach experts on other devices: gather | all_to_all | ragged.

  pipeline_microbatches: int | None = None  # Where the mesh has stages; None: as many as stages.
  pipeline_repeats: int = 1  # Visits of a micro-batch to each stage; above 1 the schedule is circular.
  rules: AxisRules = TRAIN

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the embedding and columns of the head; logits past vocab_size are never sampled."""
    return -(-self.vocab_size // 128) * 128

  @property
  def windows(self) -> tuple[int | None, ...]:
    """The window of each layer of one group of the pattern."""
    return tuple(self.window if kind == "local" else None for kind in self.layer_pattern)

  def validate(self) -> "ModelConfig":
    """Resolves what is derived from values in their ranges (train.config has them). Pure arithmetic:
    `check_names` looks the names up.

    Raises:
      ValueError: with the names, the values and the nearest valid choice.
    """
    if self.n_kv_heads is None:
      self.n_kv_heads = self.n_heads
    if self.n_heads % self.n_kv_heads:
      raise ValueError(f"model.n_heads={self.n_heads} is not a multiple of model.n_kv_heads="
                       f"{self.n_kv_heads}; nearest valid n_kv_heads: "
                       f"{_nearest_divisors(self.n_heads, self.n_kv_heads)}")
    if self.head_dim is None:
      if self.d_model % self.n_heads:
        raise ValueError(f"model.d_model={self.d_model} is not a multiple of model.n_heads={self.n_heads}: "
                         "nearest valid: model.head_dim, or n_heads "
                         f"{_nearest_divisors(self.d_model, self.n_heads)}")
      self.head_dim = self.d_model // self.n_heads
    if self.head_dim % 2:
      raise ValueError(f"model.head_dim={self.head_dim} must be even: rotary positions turn pairs; "
                       f"nearest valid: {self.head_dim - 1 or 2}, {self.head_dim + 1}")
    if self.d_ff is None:
      gated = self.ffn in ("swiglu", "geglu", "moe")
      self.d_ff = -(-(8 * self.d_model if gated else 12 * self.d_model) // 3 // 128) * 128
    self._validate_layers()
    self._validate_precision()
    if self.ffn == "moe":
      self._validate_experts()
    return self

  def _validate_experts(self):
    """The mixture of experts, of which n_experts and n_experts_per_token must be given."""
    for name in ("n_experts", "n_experts_per_token"):
      if getattr(self, name) is None:
        raise ValueError(f"model.ffn='moe' needs model.{name}; Mixtral has n_experts=8, "
                         "n_experts_per_token=2")
    E, k, groups, chosen = (
        self.n_experts, self.n_experts_per_token, self.n_expert_groups, self.n_groups_per_token)
    self.d_expert = self.d_expert or self.d_ff
    if self.ffn_bias and not (self.n_shared_experts or self.n_dense_layers):
      raise ValueError("model.ffn_bias=True is not read by model.ffn='moe', whose routed experts have none; "
                       "nearest valid: False")
    if (groups is None) != (chosen is None):
      raise ValueError(f"model.n_expert_groups={groups} and model.n_groups_per_token={chosen} go together: "
                       "give both, or None")
    if groups is not None and E % groups:
      raise ValueError(f"model.n_experts={E} is not a multiple of model.n_expert_groups={groups}; nearest "
                       f"valid n_expert_groups: {_nearest_divisors(E, groups)}")
    if groups is not None and chosen > groups:
      raise ValueError(f"model.n_groups_per_token={chosen} is more than model.n_expert_groups={groups}; "
                       f"nearest valid: {groups}")
    within = E if groups is None else E // groups * chosen
    if k > within:
      raise ValueError(f"model.n_experts_per_token={k} is more than the {within} experts that a token may "
                       f"choose from; nearest valid: {within}")
    if self.exchange == "all_to_all" and self.dispatch != "capacity":
      raise ValueError(f"model.exchange='all_to_all' has fixed room for each expert, which model.dispatch="
                       f"{self.dispatch!r} does not; nearest valid: model.dispatch='capacity', or "
                       "model.exchange='ragged'")
    if self.exchange == "ragged" and self.dispatch != "dropless":
      raise ValueError(f"model.exchange='ragged' drops nothing, which contradicts model.dispatch="
                       f"{self.dispatch!r}; nearest valid: model.dispatch='dropless', or "
                       "model.exchange='gather'")

  def _validate_layers(self):
    if self.layer_pattern is None:
      self.layer_pattern = ("global",) if self.window is None else ("local",)
    self.layer_pattern = tuple(self.layer_pattern)
    if not self.layer_pattern:
      raise ValueError("model.layer_pattern=() is of no layer; nearest valid: None")
    if ("local" in self.layer_pattern) != (self.window is not None):
      raise ValueError(f"model.window={self.window} contradicts model.layer_pattern={self.layer_pattern}: "
                       "a window is what 'local' layers see")
    if self.n_dense_layers >= self.n_layers or self.n_dense_layers % len(self.layer_pattern):
      step = len(self.layer_pattern)
      nearest = min(self.n_dense_layers, self.n_layers - 1) // step * step
      raise ValueError(f"model.n_dense_layers={self.n_dense_layers} must be below model.n_layers="
                       f"{self.n_layers} and a multiple of the {step} of model.layer_pattern; nearest valid: "
                       f"{nearest}")
    groups = (self.n_layers - self.n_dense_layers) // len(self.layer_pattern)
    if groups % self.pipeline_repeats:
      raise ValueError(f"model.pipeline_repeats={self.pipeline_repeats} does not divide the {groups} groups "
                       f"of layers (n_layers={self.n_layers} less n_dense_layers={self.n_dense_layers}, by "
                       f"{len(self.layer_pattern)}); nearest valid: "
                       f"{_nearest_divisors(groups, self.pipeline_repeats)}")
    if self.n_layers % len(self.layer_pattern):
      step = len(self.layer_pattern)
      low = self.n_layers // step * step
      raise ValueError(f"model.n_layers={self.n_layers} is not a multiple of the {step} layers of "
                       f"model.layer_pattern; nearest valid: {low or step}, {low + step}")

  def _validate_precision(self):
    check_choice("model.precision", self.precision, PRECISION)
    param, compute = PRECISION[self.precision]
    self.param_dtype, self.compute_dtype = self.param_dtype or param, self.compute_dtype or compute
    for name in ("param_dtype", "compute_dtype"):
      check_choice(f"model.{name}", getattr(self, name), ("float32", "bfloat16"))


def _nearest_divisors(n, wanted):
  """The divisors of n on both sides of `wanted`."""
  divisors = [d for d in range(1, n + 1) if n % d == 0]
  below = [d for d in divisors if d <= wanted][-1:]
  return ", ".join(str(d) for d in below + [d for d in divisors if d > wanted][:1])

"""Typed model configuration: the only place where an architecture knob is declared."""
import dataclasses

from model.lookup import check_choice
from model.positions import magnitude
from model.sharding import TRAIN, AxisRules

# name -> (parameters, compute). Norms, softmax, router, loss and optimizer are always float32.
PRECISION = {
  "fp32": ("float32", "float32"),
  "bf16": ("float32", "bfloat16"),  # float32 master weights: what TPU runs want.
  "pure_bf16": ("bfloat16", "bfloat16"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
  """How rotary positions are stretched past the length that a model was trained at."""
  kind: str = "none"  # A key of model.positions.SCALING: none | linear | dynamic | yarn | llama3 | longrope.
  factor: float = 1.0  # How many times longer than original_length.
  original_length: int | None = None  # Tokens of the rows in training; linear does without.
  length: int | None = None  # Tokens of use, by which dynamic and longrope choose; original_length * factor.
  low_freq_factor: float = 1.0  # llama3: waves longer than original_length over this are stretched,
  high_freq_factor: float = 4.0  # those shorter than original_length over this are not.
  beta_fast: float = 32.0  # yarn: what turns so often in original_length is not stretched,
  beta_slow: float = 1.0  # what turns so often or less is.
  truncate: bool = True  # yarn: to whole dims between those two.
  mscale: float | None = None  # yarn (DeepSeek): of the rotary part's magnitude,
  mscale_all_dim: float | None = None  # and of the whole head's; None is 0.
  attention_factor: float | None = None  # yarn, longrope: times cos and sin; None: of the factor.
  short_factors: tuple[float, ...] = ()  # longrope: of each frequency, where length is within the original,
  long_factors: tuple[float, ...] = ()  # and beyond it.


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
  norm_position: str = "pre"  # pre | post | both (Gemma 2) | branch (OLMo 2).
  qk_norm: str | None = None  # A key of NORM, of queries and keys (Qwen 3); None is off.
  qk_norm_over: str = "head"  # head: over each; all: over the numbers of all heads together (OLMo 2).
  head: str = "untied"  # untied | tied to the embedding.
  qkv_bias: bool = False
  out_bias: bool = False
  ffn_bias: bool = False

  window: int | None = None  # Tokens that a "local" layer sees, itself included; None is off.
  layer_pattern: tuple[str, ...] | None = None  # Of local | global, repeated over the layers.
  q_lora_rank: int | None = None  # The next 5 are of attention="mla"; None: one matrix makes the queries.
  kv_lora_rank: int | None = None  # Numbers of a token's latent, from which its keys and values are made.
  qk_nope_head_dim: int | None = None  # Of a head's queries and keys, those that do not turn,
  qk_rope_head_dim: int | None = None  # and those that turn, whose keys all heads share.
  v_head_dim: int | None = None
  attention_scale: float | None = None  # Times the logits; 1/sqrt(head_dim) (see `scale`).
  attention_softcap: float | None = None  # cap * tanh(logits / cap); None is off.
  logit_softcap: float | None = None  # The same for the output logits.
  embed_scale: float | None = None  # Multiplies the embeddings (Gemma: sqrt(d_model)); None is off.
  positions: str = "rope"  # rope | learned (GPT-2) | none.
  max_length: int | None = None  # learned only: positions in the table.
  rope_theta: float = 10_000.0
  rope_theta_local: float | None = None  # Of "local" layers, which rope_scaling then leaves; rope_theta.
  rotary_dim: int | None = None  # Of a head the first dims, which turn; head_dim.
  rope_scaling: RopeScaling = RopeScaling()
  norm_eps: float = 1e-6
  dropout: float = 0.0  # On the embedding and on each residual branch.

  init: str = "normal"  # normal (init_std) | fan_in (1/sqrt of the fan-in).
  init_std: float = 0.02
  parametrization: str = "standard"  # standard | mup: model.parametrization.PARAMETRIZATION.
  # mup: the d_model at which it is the standard one. The width of a feed-forward and the number of heads (or
  # their size) are to grow with d_model, as d_ff=None and heads of one size do.
  mup_base_width: int | None = None
  mup_base_head_dim: int | None = None  # head_dim at that width, by which attention_scale follows; head_dim.
  precision: str = "bf16"  # A key of PRECISION: sets the next two where they are None.
  param_dtype: str | None = None
  compute_dtype: str | None = None
  remat: str = "none"  # A key of model.transformer.REMAT.
  unroll: int = 1  # Groups of layers per scan iteration: more compiles longer, and may run faster.

  n_experts: int | None = None  # The next 14 are read by ffn="moe" only.
  n_experts_per_token: int | None = None
  d_expert: int | None = None  # Hidden width of one expert; d_ff.
  n_shared_experts: int = 0  # Experts that see every token, as one SwiGLU of their summed width.
  n_dense_layers: int = 0  # The first layers, whose feed-forward is a SwiGLU of d_ff.
  router: str = "softmax"  # softmax (Mixtral) | sigmoid (DeepSeek V3): model.moe.ROUTER.
  router_bias: bool = False  # A bias that only selects, moved towards even loads (arXiv:2408.15664).
  router_normalize: bool = True  # The weights of a token's experts sum to 1 (DeepSeek V2: as they come).
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

  @property
  def latent(self) -> bool:
    """Keys and values are made from a latent of each token (model.attention.MLAttention)."""
    return self.attention == "mla" or self.kv_lora_rank is not None

  @property
  def value_dim(self) -> int:
    """Numbers of a head's value."""
    return self.head_dim if self.v_head_dim is None else self.v_head_dim

  @property
  def turned_dim(self) -> int:
    """Of a head's numbers those that turn with the position."""
    return self.qk_rope_head_dim if self.latent else self.rotary_dim or self.head_dim

  @property
  def scale(self) -> float:
    """What the logits of attention are multiplied by."""
    if self.attention_scale is not None:
      return self.attention_scale
    scaling, scale = self.rope_scaling, self.head_dim**-0.5
    if self.latent and scaling.kind == "yarn" and scaling.mscale_all_dim:
      scale *= magnitude(scaling.factor, scaling.mscale_all_dim) ** 2  # DeepSeek V2, V3.
    return scale

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
    if self.latent:
      self._validate_latent()
    if self.head_dim is None:
      if self.d_model % self.n_heads:
        raise ValueError(f"model.d_model={self.d_model} is not a multiple of model.n_heads={self.n_heads}: "
                         "nearest valid: model.head_dim, or n_heads "
                         f"{_nearest_divisors(self.d_model, self.n_heads)}")
      self.head_dim = self.d_model // self.n_heads
    self._validate_positions()
    if self.parametrization == "mup":
      self._validate_mup()
    if self.d_ff is None:
      gated = self.ffn in ("swiglu", "geglu", "moe")
      self.d_ff = -(-(8 * self.d_model if gated else 12 * self.d_model) // 3 // 128) * 128
    self._validate_layers()
    self._validate_precision()
    if self.ffn == "moe":
      self._validate_experts()
    return self

  def _validate_latent(self):
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
      if getattr(self, name) is None:
        raise ValueError(f"model.attention={self.attention!r} needs model.{name}; DeepSeek V3 has "
                         "kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128")
    width = self.qk_nope_head_dim + self.qk_rope_head_dim
    self.head_dim = width if self.head_dim is None else self.head_dim
    for name, valid in (("head_dim", width), ("n_kv_heads", self.n_heads), ("rotary_dim", None),
                        ("qkv_bias", False), ("qk_norm", None)):
      if (value := getattr(self, name)) != valid:
        raise ValueError(f"model.{name}={value!r} contradicts model.attention={self.attention!r}; nearest "
                         f"valid: {valid!r}")

  def _validate_mup(self):
    if self.mup_base_width is None:
      raise ValueError("model.parametrization='mup' needs model.mup_base_width, the width that the learning "
                       f"rate was found at; nearest valid: {self.d_model}, or model.parametrization="
                       "'standard'")
    for name, valid, why in (
        ("head", "untied", "the rates of an embedding and of a head differ"),
        ("attention", "gqa", "a rank has no base")):
      value = getattr(self, name)
      if value != valid and (name == "head" or self.latent):
        raise ValueError(f"model.{name}={value!r} has no rule under model.parametrization='mup': {why}; "
                         f"nearest valid: {valid!r}, or model.parametrization='standard'")
    self.mup_base_head_dim = self.mup_base_head_dim or self.head_dim
    if self.attention_scale is None and self.mup_base_head_dim != self.head_dim:
      self.attention_scale = self.mup_base_head_dim**0.5 / self.head_dim

  def _validate_positions(self):
    scaling, dim = self.rope_scaling, self.turned_dim
    name = "qk_rope_head_dim" if self.latent else "rotary_dim" if self.rotary_dim else "head_dim"
    check_choice("model.positions", self.positions, ("rope", "learned", "none"))
    check_choice("model.qk_norm_over", self.qk_norm_over, ("head", "all"))
    if (self.positions == "learned") != (self.max_length is not None):
      raise ValueError(f"model.positions={self.positions!r} and model.max_length={self.max_length}: the "
                       "length is of a table of learned positions; nearest valid: both, or neither")
    if self.positions == "rope" and dim % 2:
      raise ValueError(f"model.{name}={dim} must be even: rotary positions turn pairs; "
                       f"nearest valid: {dim - 1 or 2}, {dim + 1}")
    if dim > self.head_dim:
      raise ValueError(f"model.rotary_dim={dim} is more than model.head_dim={self.head_dim}; nearest valid: "
                       f"{self.head_dim}")
    if self.rope_theta_local is not None and self.window is None:
      raise ValueError(f"model.rope_theta_local={self.rope_theta_local} is of 'local' layers, and "
                       "model.window=None makes none; nearest valid: None")
    where = f"model.rope_scaling.kind={scaling.kind!r}"
    if scaling.kind not in ("none", "linear") and scaling.original_length is None:
      raise ValueError(f"{where} needs model.rope_scaling.original_length, the tokens of a row in training")
    if scaling.kind == "dynamic" and dim == 2 or scaling.kind == "yarn" and self.rope_theta <= 1:
      raise ValueError(f"{where} has no formula for model.{name}={dim} and model.rope_theta="
                       f"{self.rope_theta}; nearest valid kind: 'linear'")
    if scaling.kind == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
      raise ValueError(f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor} must be below "
                       f"high_freq_factor={scaling.high_freq_factor}; nearest valid: 1.0 and 4.0")
    for factors in ("short_factors", "long_factors"):
      if scaling.kind == "longrope" and len(getattr(scaling, factors)) != dim // 2:
        raise ValueError(f"model.rope_scaling.{factors} has {len(getattr(scaling, factors))} numbers, but "
                         f"model.{name}={dim} is {dim // 2} pairs; nearest valid: {dim // 2} numbers")

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

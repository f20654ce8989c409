"""The run schema. Every knob in the project is a field of one of these dataclasses.

What a setting may be is data: RANGES, CHOICES and READ_IF. What settings must be together is `validate`.
"""
import dataclasses
import math
import re

from data.config import SOURCES, DataConfig
from data.flags import leaves, walk
from model.config import ModelConfig
from model.context import check_context
from model.lookup import check_choice
from model.positions import SCALING
from model.sharding import MESH_AXES, TRAIN, AxisRules, mesh_shape

# Of b1, b2, eps and momentum, those that each optimizer reads, with its defaults.
OPTIMIZER_KNOBS = {
  "adamw": dict(b1=0.9, b2=0.95, eps=1e-8),
  "adafactor": dict(eps=1e-30),
  "lion": dict(b1=0.9, b2=0.99),
  "muon": dict(b1=0.9, b2=0.95, eps=1e-8, momentum=0.95),  # The first three are of its Adam.
  "sgd": dict(momentum=0.9),
}
# Those whose updates do not grow with the gradient: what the rates of model.parametrization="mup" are for.
ADAM_LIKE = ("adamw", "adafactor", "lion")
SCHEDULES = ("cosine", "linear", "inverse_sqrt", "constant", "wsd")
BASELINES = ("gzip", "ngram5")  # The keys of data.baselines.BASELINE.

# Interval -> the settings whose value must lie in it, where it is not None; [] is any number of an entry.
RANGES = {
  "[1, inf)": (
    "steps", "batch_size", "seq_len", "accum_steps", "loss_chunk", "model.vocab_size", "model.n_layers",
    "model.d_model", "model.n_heads", "model.n_kv_heads", "model.head_dim", "model.d_ff", "model.window",
    "model.max_length", "model.rotary_dim", "model.q_lora_rank", "model.kv_lora_rank",
    "model.qk_nope_head_dim", "model.qk_rope_head_dim", "model.v_head_dim", "model.rope_scaling.factor",
    "model.rope_scaling.length", "model.unroll", "model.n_experts", "model.n_experts_per_token",
    "model.d_expert", "model.n_expert_groups", "model.n_groups_per_token", "model.pipeline_microbatches",
    "model.pipeline_repeats", "model.mup_base_width", "model.mup_base_head_dim", "mesh.slices",
    "data.sources[].documents", "data.tokenizer.vocab_size", "data.tokenizer.train_bytes", "data.workers",
    "data.prefetch",
    "optim.max_skips", "checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every", "eval.every",
    "eval.rows", "log.every", "log.profile_steps", "report.n_tokens"),
  "[2, inf)": ("model.rope_scaling.original_length",),
  "[0, inf)": ("z_loss", "model.n_shared_experts", "model.n_dense_layers", "balance.loss",
               "balance.sequence_loss", "balance.z_loss", "balance.bias_rate",
               "data.sources[].weight", "optim.warmup_steps", "optim.weight_decay",
               "report.temperature"),
  "(0, inf)": (
    "model.routed_scale", "model.capacity_factor", "model.attention_softcap", "model.logit_softcap",
    "model.embed_scale", "model.rope_theta", "model.rope_theta_local", "model.attention_scale",
    *(f"model.rope_scaling.{name}" for name in (
      "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
      "attention_factor", "short_factors", "long_factors")),
    "model.norm_eps", "model.init_std", "data.sources[].max_epochs", "data.temperature", "optim.lr",
    "optim.eps", "optim.grad_clip", "optim.spike_sigma", "stall_s"),
  "[0, 1)": ("model.dropout", "data.val_fraction", "optim.b1", "optim.b2", "optim.momentum", "optim.ema"),
  "[0, 1]": ("balance.bias_until", "optim.decay_fraction", "optim.final_lr_fraction"),
  f"[0, {2**32})": ("seed", "init_seed"),
}

# Setting -> the names that it, or each entry of it, may be.
CHOICES = {
  "model.layer_pattern": ("local", "global"),
  "model.rope_scaling.kind": tuple(SCALING),
  "mesh.slice_axis": MESH_AXES,
  "data.sources[].kind": SOURCES,
  "data.packing": ("best_fit", "concat"),
  "data.tokenizer.kind": ("sentencepiece", "huggingface", "gguf"),
  "data.tokenizer.model": ("bpe", "unigram"),
  "optim.schedule": SCHEDULES,
  "checkpoint.best": ("eval/val/loss", "eval/val/bpb"),
  "log.wandb": ("offline", "online"),
  "report.baselines": BASELINES,
  **{f"model.rules.{field.name}": MESH_AXES for field in dataclasses.fields(AxisRules)},
  "model.rules.layers": ("stage",),
}

# (setting, another, the values of that one under which the setting is read); else it must keep its default.
SET = "set"  # Neither None, 0, False nor empty.
READ_IF = (
  ("model.init_std", "model.init", ("normal",)),
  ("model.mup_base_width", "model.parametrization", ("mup",)),
  ("model.mup_base_head_dim", "model.parametrization", ("mup",)),
  *((f"model.{name}", "model.ffn", ("moe",)) for name in (
    "n_experts", "n_experts_per_token", "d_expert", "n_shared_experts", "n_dense_layers", "router",
    "router_bias", "router_normalize", "n_expert_groups", "n_groups_per_token", "routed_scale", "dispatch",
    "exchange")),
  ("init_seed", "init_from", (None,)),
  ("model.max_length", "model.positions", ("learned",)),
  *((f"model.{name}", "model.positions", ("rope",)) for name in (
    "rope_theta", "rope_theta_local", "rotary_dim", "rope_scaling.kind")),
  *((f"model.rope_scaling.{name}", "model.rope_scaling.kind", kinds) for name, kinds in (
    ("factor", tuple(kind for kind in SCALING if kind != "none")), ("length", ("dynamic", "longrope")),
    ("original_length", tuple(kind for kind in SCALING if kind not in ("none", "linear"))),
    *((name, ("llama3",)) for name in ("low_freq_factor", "high_freq_factor")),
    *((name, ("yarn",)) for name in ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim")),
    ("attention_factor", ("yarn", "longrope")), ("short_factors", ("longrope",)),
    ("long_factors", ("longrope",)))),
  *((f"model.{name}", "model.attention", ("mla",)) for name in (
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")),
  ("model.qk_norm_over", "model.qk_norm", SET),
  ("model.capacity_factor", "model.dispatch", ("capacity",)),
  ("model.grouped_impl", "model.ffn", ("moe",)),
  ("model.grouped_impl", "model.dispatch", ("dropless",)),
  *((f"balance.{name}", "model.ffn", ("moe",)) for name in ("sequence_loss", "z_loss")),
  ("balance.bias_rate", "model.router_bias", SET),
  ("balance.bias_until", "model.router_bias", SET),
  ("mesh.slice_axis", "mesh.slices", tuple(range(2, 1025))),
  ("data.sources[].path", "data.sources[].kind", tuple(k for k in SOURCES if k != "synthetic")),
  ("data.sources[].documents", "data.sources[].kind", ("synthetic",)),
  ("data.sources[].split", "data.sources[].kind", ("tfds",)),
  ("data.sources[].text_key", "data.sources[].kind", ("jsonl", "parquet", "tfds")),
  ("data.temperature", "data.sources[].weight", (None,)),
  ("data.tokenizer.model", "data.tokenizer.path", (None,)),
  ("data.tokenizer.vocab_size", "data.tokenizer.path", (None,)),
  ("data.tokenizer.train_bytes", "data.tokenizer.path", (None,)),
  ("optim.decay_fraction", "optim.schedule", ("wsd",)),
  ("optim.final_lr_fraction", "optim.schedule", ("cosine", "linear", "wsd")),
  ("optim.decay_scale", "optim.weight_decay", SET),
  ("checkpoint.keep_last", "checkpoint.every", SET),
  ("checkpoint.keep_every", "checkpoint.every", SET),
  ("checkpoint.best", "checkpoint.every", SET),
  ("checkpoint.best", "eval.every", SET),
  ("checkpoint.best", "data.val_fraction", SET),
  ("eval.every", "data.val_fraction", SET),
  ("eval.rows", "data.val_fraction", SET),
  ("log.wandb_project", "log.wandb", SET),
  ("report.baselines", "data.val_fraction", SET),
  ("report.n_tokens", "report.prompts", SET),
  ("report.temperature", "report.prompts", SET),
)


@dataclasses.dataclass(kw_only=True, slots=True)
class OptimConfig:
  name: str = "adamw"  # A key of train.optim.OPTIMIZER.
  lr: float = 3e-4  # At the peak of the schedule.
  schedule: str = "cosine"  # A key of train.optim.SCHEDULE.
  warmup_steps: int = 100
  decay_fraction: float = 0.2  # wsd only: the last share of the steps.
  final_lr_fraction: float = 0.1  # Of lr, at the last step (cosine, linear, wsd).
  weight_decay: float = 0.1  # Decoupled, times the lr.
  b1: float | None = None  # None: the optimizer's default (OPTIMIZER_KNOBS), as for the next three.
  b2: float | None = None
  eps: float | None = None
  momentum: float | None = None
  grad_clip: float | None = 1.0  # Of the global norm; None is off.
  # (pattern, value): the first regex found in a parameter's path wins; every parameter must be matched.
  decay_scale: tuple[tuple, ...] = (("norm|bias", 0.0), (".*", 1.0))  # Times weight_decay.
  lr_scale: tuple[tuple, ...] = ((".*", 1.0),)  # Times the schedule.
  freeze: tuple[tuple, ...] = ((".*", False),)
  ema: float | None = None  # Decay of a moving average of the weights, used to evaluate; None is off.
  # Skip steps whose loss is this far above its mean; None: only non-finite ones.
  spike_sigma: float | None = 8.0
  max_skips: int = 5  # In a row; one more stops the run.

  def validate(self) -> "OptimConfig":
    """Resolves b1, b2, eps and momentum. Which parameters the patterns meet, train.optim knows.

    Raises:
      ValueError: an unknown optimizer, a knob that it does not read, a rule that is no (pattern, value).
    """
    if ":" not in self.name:
      check_choice("optim.name", self.name, OPTIMIZER_KNOBS, " nor a module:function path")
      knobs = OPTIMIZER_KNOBS[self.name]
      for knob in ("b1", "b2", "eps", "momentum"):
        value = getattr(self, knob)
        if value is None:
          setattr(self, knob, knobs.get(knob))
        elif knob not in knobs:
          raise ValueError(f"optim.{knob}={value} is not read by optim.name={self.name!r}, which reads "
                           f"{', '.join(knobs)}; nearest valid: None")
    number = lambda v: type(v) in (int, float) and 0 <= v < math.inf
    switch = lambda v: isinstance(v, bool)
    for field, valid, kind in (("decay_scale", number, "number from 0"),
                               ("lr_scale", number, "number from 0"), ("freeze", switch, "True or False")):
      for rule in getattr(self, field):
        if len(rule) != 2 or not isinstance(rule[0], str) or not valid(rule[1]):
          raise ValueError(f"optim.{field}: {rule} must be (pattern, {kind})")
        try:
          re.compile(rule[0])
        except re.error as e:
          raise ValueError(f"optim.{field}: {rule[0]!r} is not a regular expression: {e}") from None
    return self


@dataclasses.dataclass(kw_only=True, slots=True)
class MeshConfig:
  """Devices along each axis, from slow to fast links; one may be -1: what is left."""
  stage: int = 1
  data: int = 1
  fsdp: int = -1
  expert: int = 1
  seq: int = 1
  tensor: int = 1
  slices: int = 1  # Groups of devices with a slow network between them,
  slice_axis: str = "data"  # and the axis that goes over it.


@dataclasses.dataclass(kw_only=True, slots=True)
class BalanceConfig:
  """What keeps the experts of a mixture evenly loaded (train.balance), over the global batch."""
  loss: float | None = None  # Switch's; None: 0.01, or 0 where model.router_bias does the work.
  sequence_loss: float = 0.0  # Of each row by itself (DeepSeek V3: 1e-4).
  z_loss: float = 0.0  # Mean squared log-normaliser of the router (ST-MoE: 1e-3).
  bias_rate: float = 1e-3  # How far model.router_bias moves in a step,
  bias_until: float = 1.0  # up to this share of the steps.


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckpointConfig:
  every: int | None = 500  # Steps; the last step is always saved. None: only the last.
  keep_last: int = 2
  keep_every: int | None = None  # Steps whose multiples are never deleted.
  best: str | None = None  # eval/val/loss | eval/val/bpb: where that was lowest is kept too.


@dataclasses.dataclass(kw_only=True, slots=True)
class EvalConfig:
  every: int | None = 250  # Steps; the last step is always evaluated when there is a validation split.
  rows: int | None = 256  # Of the validation split, in order; None: all of it.


@dataclasses.dataclass(kw_only=True, slots=True)
class LogConfig:
  every: int = 1  # Steps per line of metrics.jsonl.
  wandb: str | None = None  # offline | online; None is off.
  wandb_project: str = "assay"
  tensorboard: bool = False  # Event files under DIR/tensorboard.
  profile_steps: int = 5  # How many steps --profile traces.


@dataclasses.dataclass(kw_only=True, slots=True)
class ReportConfig:
  """What a finished run writes into DIR/report.md and prints."""
  baselines: tuple[str, ...] = ()  # Of data.baselines.BASELINE: gzip, ngram5.
  prompts: tuple[str, ...] = ()  # Continued and shown.
  n_tokens: int = 128
  temperature: float = 0.7


@dataclasses.dataclass(kw_only=True, slots=True)
class TrainConfig:
  steps: int = 1000
  batch_size: int = 16  # Global, in sequences.
  seq_len: int = 256
  seed: int = 0  # Of the order of the data, of dropout and of the first weights.
  init_seed: int = 0  # Another one draws other first weights; the rows stay those of the seed.
  init_from: str | None = None  # A run's or an imported model's folder, whose weights training begins with.
  accum_steps: int = 1  # Micro-batches per step.
  z_loss: float = 0.0  # Times the squared log-normaliser (PaLM: 1e-4).
  loss_chunk: int = 512  # Tokens per device whose logits exist at one time.
  # Of several processes: one that does nothing for so long is named, and all exit (train.together).
  stall_s: float = 300.0
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  balance: BalanceConfig = dataclasses.field(default_factory=BalanceConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  log: LogConfig = dataclasses.field(default_factory=LogConfig)
  report: ReportConfig = dataclasses.field(default_factory=ReportConfig)

  def validate(self, n_devices: int | None = None) -> "TrainConfig":
    """Resolves every None that means derived and raises on the first contradiction.

    Args:
      n_devices: of all processes together, if known without touching a device; what depends on it is
        checked when it is.

    Raises:
      ValueError: with names, values and the nearest valid choice.
    """
    self._validate_each()
    self.data.validate()
    self._validate_vocabulary()
    self.model.validate()
    self.optim.validate()
    name = self.optim.name
    if self.model.parametrization == "mup" and name not in ADAM_LIKE and ":" not in name:
      raise ValueError(f"optim.name={name!r} has no rule under model.parametrization='mup', whose rates are "
                       "Adam's; nearest valid: 'adamw', or model.parametrization='standard'")
    if self.seq_len > (self.model.max_length or self.seq_len):
      raise ValueError(f"seq_len={self.seq_len} is more than the model.max_length={self.model.max_length} "
                       f"positions of the model; nearest valid: {self.model.max_length}")
    mixture = self.model.ffn == "moe" or ":" in self.model.ffn and self.model.n_experts is not None
    if self.balance.loss is None:
      self.balance.loss = 0.01 if mixture and not self.model.router_bias else 0.0
    if self.balance.loss and not mixture:
      raise ValueError(f"balance.loss={self.balance.loss} is not read where model.ffn={self.model.ffn!r}, "
                       "only where that is 'moe'; nearest valid: None")
    if self.optim.warmup_steps >= self.steps:
      raise ValueError(f"optim.warmup_steps={self.optim.warmup_steps} must be below steps={self.steps}; "
                       f"nearest valid: {self.steps - 1}")
    self._validate_best()
    self._validate_rules()
    self.validate_mesh(n_devices)
    return self

  def _validate_each(self):
    """Each setting by itself, then whether it is read at all."""
    ranges = {name: interval for interval, names in RANGES.items() for name in names}
    for name, value, type_ in walk(self):
      entry = _any_entry(name)
      if value is not None and entry in ranges:
        for one in value if isinstance(value, tuple) else (value,):
          _check_range(name, one, ranges[entry], or_none=type(None) in getattr(type_, "__args__", ()))
      if value is not None and entry in CHOICES:
        for one in value if isinstance(value, tuple) else (value,):
          check_choice(name, one, CHOICES[entry])
    values, defaults = leaves(self), leaves(TrainConfig())
    for name, value in values.items():
      index, entry = (re.search(r"\[\d+\]", name) or ["[0]"])[0], _any_entry(name)
      for setting, other, valid in READ_IF:
        if setting != entry:
          continue
        default = defaults[setting.replace("[]", "[0]")]
        there = values[other.replace("[]", index)]
        if value != default and not (there if valid == SET else there in valid or ":" in str(there)):
          words = SET if valid == SET else " or ".join(map(repr, valid))
          raise ValueError(f"{name}={value!r} is not read where {other.replace('[]', index)}={there!r}, only "
                           f"where that is {words}; nearest valid: {default!r}")

  def _validate_vocabulary(self):
    tokenizer = self.data.tokenizer
    if tokenizer.path is not None:
      return
    if self.model.vocab_size is None:
      self.model.vocab_size = tokenizer.vocab_size
    if self.model.vocab_size != tokenizer.vocab_size:
      raise ValueError(f"model.vocab_size={self.model.vocab_size} contradicts data.tokenizer.vocab_size="
                       f"{tokenizer.vocab_size}, which training makes; nearest valid: None, which follows it")

  def _validate_best(self):
    save, evaluate = self.checkpoint, self.eval
    if save.best is not None and save.every % evaluate.every:
      raise ValueError(f"checkpoint.best={save.best!r}: checkpoint.every={save.every} is not a multiple of "
                       f"eval.every={evaluate.every}, so that what is saved was not evaluated; "
                       f"{_nearest_multiples('checkpoint.every', save.every, evaluate.every)}")

  def _validate_rules(self):
    rules = self.model.rules
    if fault := _rules_fault(rules):
      text, changes = fault
      valid = [change for change in changes if not _rules_fault(dataclasses.replace(rules, **change))]
      # Where the fault is one of several, the default of what it names.
      valid = valid or [{name: getattr(TRAIN, name) for change in changes for name in change}]
      words = lambda change: " and ".join(f"model.rules.{name}={axes}" for name, axes in change.items())
      raise ValueError(f"{text}; nearest valid: {', or '.join(map(words, valid))}")

  def validate_mesh(self, n_devices: int | None):
    """The part of `validate` that is about the mesh, of a config whose other parts are validated: fast enough
    to try thousands. Raises ValueError."""
    sizes = {axis: getattr(self.mesh, axis) for axis in MESH_AXES}
    if bad := {a: s for a, s in sizes.items() if s < 1 and s != -1}:
      raise ValueError(f"mesh: sizes {bad} must be at least 1, or -1 for what is left")
    if sum(s == -1 for s in sizes.values()) > 1:
      raise ValueError(f"mesh: only one axis may be -1, got {sizes}")
    if n_devices is not None:
      sizes = dict(zip(MESH_AXES, mesh_shape(sizes, n_devices)))
    if sizes[self.mesh.slice_axis] % self.mesh.slices and sizes[self.mesh.slice_axis] != -1:
      raise ValueError(f"mesh.{self.mesh.slice_axis}={sizes[self.mesh.slice_axis]}, the axis that goes over "
                       f"mesh.slices={self.mesh.slices}, is not a multiple of it; nearest valid mesh.slices: "
                       f"{math.gcd(sizes[self.mesh.slice_axis], self.mesh.slices)}")
    ways = lambda rule: math.prod(max(sizes[axis], 1) for axis in getattr(self.model.rules, rule))
    self._validate_splits(sizes, ways)
    self._validate_rows(ways)
    check_context(self.model, ways=ways("length"), heads_ways=ways("heads"), seq_len=self.seq_len)
    if self.model.context == "zigzag" and self.model.dropout and ways("length") > 1:
      raise ValueError(f"model.dropout={self.model.dropout} is not supported with model.context='zigzag': "
                       "its masks would depend on the mesh; nearest valid: model.context='ring'")
    if ways("layers") > 1:
      self._validate_pipeline(ways)

  def _validate_splits(self, sizes, ways):
    """Every dimension is a multiple of the devices that it is split over."""
    m = self.model
    vocab_size = m.vocab_size and m.padded_vocab_size
    dims = [("model.n_heads", m.n_heads, "heads"), ("model.d_ff", m.d_ff, "mlp"),
            ("model.padded_vocab_size", vocab_size, "vocab")]
    dims += [("model.d_model", m.d_model, rule) for rule in ("embed", "gradient", "moment")]
    dims += [("seq_len", self.seq_len, rule) for rule in ("length", "residual", "loss_length")]
    if m.latent:
      dims += [(f"model.{name}", getattr(m, name), rule) for name in ("q_lora_rank", "kv_lora_rank")
               for rule in ("embed", "gradient", "moment")]
    if m.ffn == "moe":
      dims += [("model.n_experts", m.n_experts, "experts"), ("model.d_expert", m.d_expert, "mlp")]
    for name, value, rule in dims:
      if value is None or value % ways(rule) == 0:
        continue
      axes = [axis for axis in getattr(m.rules, rule) if sizes[axis] > 1]
      near = (f"nearest valid mesh.{axes[0]}: {math.gcd(value, ways(rule))}" if len(axes) == 1
              else _nearest_multiples(name, value, ways(rule)))
      if rule == "heads":
        near += ", or model.rules.heads=() and model.rules.kv_heads=(), by which each device has all heads"
      raise ValueError(f"{name}={value} is not a multiple of {'*'.join('mesh.' + a for a in axes)}="
                       f"{ways(rule)}; {near}")

  def _validate_rows(self, ways):
    if self.batch_size % self.accum_steps:
      raise ValueError(f"batch_size={self.batch_size} is not a multiple of accum_steps={self.accum_steps}; "
                       f"{_nearest_multiples('batch_size', self.batch_size, self.accum_steps)}")
    rows, step = self.batch_size // self.accum_steps, ways("batch")
    if rows % step:
      raise ValueError(f"batch_size={self.batch_size} is not a multiple of "
                       f"{'*'.join(self.model.rules.batch)}={step} times accum_steps={self.accum_steps}; "
                       f"{_nearest_multiples('batch_size', self.batch_size, step * self.accum_steps)}")

  def _validate_pipeline(self, ways):
    p, m, v = ways("layers"), self.model, self.model.pipeline_repeats
    micro = m.pipeline_microbatches or p
    if m.dropout:
      raise ValueError(f"model.dropout={m.dropout} is not supported with mesh.stage={p}: its masks would "
                       "depend on the mesh; nearest valid: model.dropout=0.0, or mesh.stage=1")
    if v > 1 and micro < p:
      raise ValueError(f"model.pipeline_microbatches={micro} is less than mesh.stage={p}, which "
                       f"model.pipeline_repeats={v} needs; nearest valid: {p}")
    groups, group = (m.n_layers - m.n_dense_layers) // len(m.layer_pattern), len(m.layer_pattern)
    if groups % (p * v):
      near = _nearest_multiples("model.n_layers less n_dense_layers", groups * group, p * v * group)
      raise ValueError(f"model.n_layers={m.n_layers} less n_dense_layers={m.n_dense_layers}, by {group}, is "
                       f"not a multiple of mesh.stage={p} times model.pipeline_repeats={v}: {near}")
    step = micro * self.accum_steps * ways("batch")
    if self.batch_size % step:
      raise ValueError(f"batch_size={self.batch_size} is not a multiple of model.pipeline_microbatches="
                       f"{micro} times the {step // micro} devices and micro-batches that share it; "
                       f"{_nearest_multiples('batch_size', self.batch_size, step)}")


def _rules_fault(rules: AxisRules) -> tuple[str, list[dict]] | None:
  """(what is wrong, the changes of one rule that may mend it); None where nothing is.

  Dims of one array are split over different axes: those of a weight, and those of an activation.
  """
  weight = ("vocab", "heads", "kv_heads", "mlp", "experts")
  without = lambda name, axes: {name: tuple(axis for axis in getattr(rules, name) if axis not in axes)}
  for field in dataclasses.fields(rules):
    axes = getattr(rules, field.name)
    if len(set(axes)) < len(axes):
      once = {field.name: tuple(dict.fromkeys(axes))}
      return f"model.rules.{field.name}={axes} names an axis twice", [once]
  for one, others in (("embed", weight), ("gradient", weight), ("moment", weight), ("mlp", ("experts",)),
                      ("layers", (*weight, "embed", "gradient", "moment", "batch", "length", "residual")),
                      ("batch", ("length", "residual", "loss_length", "vocab", "heads", "kv_heads", "mlp")),
                      ("length", ("vocab", "heads", "kv_heads", "mlp")), ("loss_length", ("vocab",))):
    for other in others:
      if both := sorted(set(getattr(rules, one)) & set(getattr(rules, other))):
        text = (f"model.rules.{one}={getattr(rules, one)} and model.rules.{other}={getattr(rules, other)} "
                f"are of one array's dims, and both name {', '.join(both)}")
        return text, [without(one, both), without(other, both)]
  for one, other, why in (("experts", "batch", "tokens are exchanged over the axes of the experts"),
                          ("length", "residual", "the residual stream is split as the length, or finer"),
                          ("embed", "gradient", "gradients are split as the parameters, or finer"),
                          ("gradient", "moment", "optimizer state is split as the gradients, or finer")):
    if missing := [axis for axis in getattr(rules, one) if axis not in getattr(rules, other)]:
      more = {other: (*getattr(rules, other), *missing)}
      text = (f"model.rules.{other}={getattr(rules, other)} lacks {', '.join(missing)} of "
              f"model.rules.{one}={getattr(rules, one)}: {why}")
      return text, [more, without(one, missing)]
  return None


def _nearest_multiples(name, value, step):
  low = value // step * step
  return f"nearest valid {name}: {', '.join(str(v) for v in (low, low + step) if v)}"


def _any_entry(name):
  """data.sources[1].kind -> data.sources[].kind, as the tables have it."""
  return re.sub(r"\[\d+\]", "[]", name)


def _check_range(name, value, interval, or_none):
  low, high = map(float, interval[1:-1].split(", "))
  above = low <= value if interval[0] == "[" else low < value
  below = value <= high if interval[-1] == "]" else value < high
  if above and below:  # NaN is neither.
    return
  near = [f"{low:.0f}"] if interval[0] == "[" and not above else []
  near += [f"{high:.0f}"] if interval[-1] == "]" and not below else []
  near += ["None"] if or_none else []
  raise ValueError(f"{name}={value} must be in {interval}"
                   + (f"; nearest valid: {', '.join(near)}" if near else ""))

"""The run schema. Every knob in the project is a field of one of these dataclasses."""
import dataclasses
import math

from data.config import DataConfig
from model.config import ModelConfig

# Which of b1, b2, eps, momentum each optimizer reads; a test holds it to train.optim.OPTIMIZER.
OPTIMIZER_KNOBS = {
  "adamw": ("b1", "b2", "eps"),
  "adafactor": ("b2", "eps"),
  "lion": ("b1", "b2"),
  "muon": ("b1", "b2", "eps", "momentum"),
  "sgd": ("momentum",),
}
SCHEDULES = ("cosine", "linear", "inverse_sqrt", "constant", "wsd")


@dataclasses.dataclass(kw_only=True, slots=True)
class OptimConfig:
  name: str = "adamw"  # A key of train.optim.OPTIMIZER.
  lr: float = 3e-4  # At the peak of the schedule.
  schedule: str = "cosine"  # A key of train.optim.SCHEDULE.
  warmup_steps: int = 100
  decay_fraction: float = 0.2  # wsd only: the last share of the steps.
  final_lr_fraction: float = 0.1  # Of lr, at the last step (cosine, linear, wsd).
  weight_decay: float = 0.1  # Decoupled, times the lr.
  b1: float | None = None  # None: the optimizer's own default, as for the next three.
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


@dataclasses.dataclass(kw_only=True, slots=True)
class MeshConfig:
  """Devices along each axis; one may be -1: what is left."""
  stage: int = 1
  data: int = 1
  fsdp: int = -1
  expert: int = 1
  seq: int = 1
  tensor: int = 1


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckpointConfig:
  every: int | None = 500  # Steps; the last step is always saved. None: only the last.
  keep_last: int = 2
  keep_every: int | None = None  # Steps whose multiples are never deleted.
  best: str | None = None  # An evaluation metric such as "eval/val/loss": its lowest is kept too.


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
  seed: int = 0
  accum_steps: int = 1  # Micro-batches per step.
  z_loss: float = 0.0  # Times the squared log-normaliser (PaLM: 1e-4).
  loss_chunk: int = 512  # Tokens per device whose logits exist at one time.
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
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
    for name in ("steps", "batch_size", "seq_len", "accum_steps", "loss_chunk"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
    self.data.validate()
    if self.model.vocab_size is None and self.data.tokenizer.path is None:
      self.model.vocab_size = self.data.tokenizer.vocab_size
    self.model.validate()
    self._validate_optim()
    self._validate_periods()
    self._validate_mesh(n_devices)
    return self

  def _validate_optim(self):
    optim = self.optim
    if optim.warmup_steps >= self.steps:
      raise ValueError(f"optim.warmup_steps={optim.warmup_steps} must be below steps={self.steps}; "
                       f"nearest valid: {self.steps - 1}")
    if optim.schedule not in SCHEDULES:
      raise ValueError(f"optim.schedule={optim.schedule!r} is not one of {sorted(SCHEDULES)}")
    if optim.name not in OPTIMIZER_KNOBS and ":" not in optim.name:
      raise ValueError(f"optim.name={optim.name!r} is not one of {sorted(OPTIMIZER_KNOBS)} "
                       "nor a module:function path")
    for knob in ("b1", "b2", "eps", "momentum"):
      if (optim.name in OPTIMIZER_KNOBS and knob not in OPTIMIZER_KNOBS[optim.name]
          and getattr(optim, knob) is not None):
        raise ValueError(f"optim.{knob}={getattr(optim, knob)} is not read by optim.name={optim.name!r}, "
                         f"which reads {list(OPTIMIZER_KNOBS[optim.name])}")
    for name, low, high in (("lr", 0, math.inf), ("decay_fraction", 0, 1), ("final_lr_fraction", 0, 1),
                            ("weight_decay", 0, math.inf), ("ema", 0, 1)):
      value = getattr(optim, name)
      if value is not None and not low <= value <= high:
        raise ValueError(f"optim.{name}={value} must be in [{low}, {high}]")
    for name in ("grad_clip", "spike_sigma"):
      if (value := getattr(optim, name)) is not None and value <= 0:
        raise ValueError(f"optim.{name}={value} must be above 0, or None for off")

  def _validate_periods(self):
    for name in ("checkpoint.every", "checkpoint.keep_every", "checkpoint.keep_last", "eval.every",
                 "eval.rows", "log.every", "log.profile_steps", "optim.max_skips"):
      section, field = name.split(".")
      value = getattr(getattr(self, section), field)
      if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    if self.log.wandb not in (None, "offline", "online"):
      raise ValueError(f"log.wandb={self.log.wandb!r} is not one of 'offline', 'online', None")

  def _validate_mesh(self, n_devices):
    sizes = dataclasses.asdict(self.mesh)
    if bad := {a: s for a, s in sizes.items() if s < 1 and s != -1}:
      raise ValueError(f"mesh: sizes {bad} must be at least 1, or -1 for what is left")
    if sum(s == -1 for s in sizes.values()) > 1:
      raise ValueError(f"mesh: only one axis may be -1, got {sizes}")
    for axis in ("stage", "expert", "seq"):
      if sizes[axis] != 1:
        raise ValueError(f"mesh.{axis}={sizes[axis]}: no model part is split over it yet; nearest valid: 1")
    if n_devices is not None:
      from model.sharding import MESH_AXES, mesh_shape
      sizes = dict(zip(MESH_AXES, mesh_shape(sizes, n_devices)))
    vocab_size = self.model.vocab_size and self.model.padded_vocab_size
    for name, value in (("n_heads", self.model.n_heads), ("n_kv_heads", self.model.n_kv_heads),
                        ("d_ff", self.model.d_ff), ("padded_vocab_size", vocab_size)):
      if value is not None and sizes["tensor"] > 0 and value % sizes["tensor"]:
        raise ValueError(f"model.{name}={value} is not a multiple of mesh.tensor={sizes['tensor']}; "
                         f"nearest valid mesh.tensor: {math.gcd(value, sizes['tensor'])}")
    if self.batch_size % self.accum_steps:
      raise ValueError(f"batch_size={self.batch_size} is not a multiple of accum_steps={self.accum_steps}; "
                       f"{_nearest_multiples('batch_size', self.batch_size, self.accum_steps)}")
    ways = math.prod(max(sizes[axis], 1) for axis in self.model.rules.batch)
    if self.batch_size // self.accum_steps % ways:
      raise ValueError(f"batch_size={self.batch_size} is not a multiple of "
                       f"{'*'.join(self.model.rules.batch)}={ways} times accum_steps={self.accum_steps}; "
                       f"{_nearest_multiples('batch_size', self.batch_size, ways * self.accum_steps)}")
    for axis in self.model.rules.embed:
      if self.model.d_model % max(sizes[axis], 1):
        raise ValueError(f"model.d_model={self.model.d_model} is not a multiple of mesh.{axis}="
                         f"{sizes[axis]}; nearest valid mesh.{axis}: "
                         f"{math.gcd(self.model.d_model, sizes[axis])}")


def _nearest_multiples(name, value, step):
  low = value // step * step
  return f"nearest valid {name}: {', '.join(str(v) for v in (low, low + step) if v)}"

"""Every family by its model_type."""
import dataclasses

from model.config import ModelConfig, RopeScaling
from model.hub.deepseek import DEEPSEEK2, DEEPSEEK3
from model.hub.errors import HubError
from model.hub.family import Family
from model.hub.gemma import GEMMA2, GEMMA3
from model.hub.gpt2 import GPT2
from model.hub.llama import LLAMA, MISTRAL
from model.hub.mixtral import MIXTRAL
from model.hub.olmo import OLMO2
from model.hub.phi import PHI3
from model.hub.qwen import QWEN2, QWEN3, QWEN3_MOE
from model.lookup import check_choice

FAMILIES = {family.name: family for family in (
  LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, OLMO2, GPT2, PHI3, MIXTRAL, QWEN3_MOE, DEEPSEEK2, DEEPSEEK3)}


def find_family(config: dict) -> Family:
  """By config.json's model_type.

  Raises:
    HubError: with the nearest name that is known.
  """
  name = config.get("model_type")
  try:
    check_choice("model_type", str(name), FAMILIES)
  except ValueError as e:
    raise HubError(f"config.json: {e}") from None
  return FAMILIES[name]


def match_family(cfg: ModelConfig) -> Family:
  """The first family that can say all that a model of ours is.

  Raises:
    HubError: none can; naming for each what it would lose.
  """
  near = []
  for family in FAMILIES.values():
    if not (lost := find_lost(family, cfg)):
      return family
    near.append((len(lost), f"{family.name} ({', '.join(lost[:4])})"))
  near = "; ".join(text for _, text in sorted(near)[:3])
  raise HubError(f"no family says all of this model's config; the nearest, and what they would lose: {near}")


def find_lost(family: Family, cfg: ModelConfig) -> list[str]:
  """The fields of the config that exporting as this family would change."""
  try:
    again = family.to_model(family.to_theirs(cfg))
  except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError) as e:
    return [str(e)]
  return [f"model.{name}={getattr(cfg, name)!r}" for name in ARCHITECTURE
          if not _same(getattr(cfg, name), getattr(again, name))]


# Fields that say how to run or to train a model, not what it computes.
FREE = {"init", "init_std", "parametrization", "mup_base_width", "mup_base_head_dim", "precision",
        "param_dtype", "compute_dtype", "remat", "unroll", "dispatch",
        "grouped_impl", "capacity_factor", "exchange", "pipeline_microbatches", "pipeline_repeats", "rules",
        "attention_impl", "context", "dropout"}
ARCHITECTURE = [name for name in ModelConfig.__dataclass_fields__ if name not in FREE]


def _same(a, b):
  if isinstance(a, float) and isinstance(b, (int, float)):
    return abs(a - b) <= 1e-9 * abs(a)
  if isinstance(a, RopeScaling):  # How long the model is used is not theirs to say.
    a, b = (dataclasses.replace(scaling, length=None) for scaling in (a, b))
  return a == b

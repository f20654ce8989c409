"""Rotary settings, in and out: rope_parameters of transformers 5, rope_theta and rope_scaling before it."""
from model.config import RopeScaling
from model.hub.errors import HubError

KINDS = {"default": "none", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "llama3": "llama3",
         "longrope": "longrope", "su": "longrope"}
# Our field -> their key, by kind.
KEYS = {
  "none": {}, "linear": {}, "dynamic": {},
  "llama3": {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
  "yarn": {name: name for name in ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim",
                                   "attention_factor")},
  "longrope": {"attention_factor": "attention_factor", "short_factors": "short_factor",
               "long_factors": "long_factor"},
}


def find_parameters(theirs: dict, theta: float = 10_000.0) -> dict:
  """rope_parameters of config.json, however it writes them; by layer type where it does so."""
  parameters = theirs.get("rope_parameters") or {
    "rope_theta": theirs.get("rope_theta") or theta, **(theirs.get("rope_scaling") or {})}
  if not isinstance(parameters, dict):
    raise HubError(f"config.json: rope_parameters={parameters!r:.60} must be settings by name")
  return parameters


def read_rope(theirs: dict, parameters: dict, head_dim: int | None = None) -> dict:
  """rope_theta, rope_scaling and, given a head_dim, rotary_dim."""
  name = parameters.get("rope_type") or parameters.get("type") or "default"
  if name not in KINDS:
    raise HubError(f"config.json: rope_type={name!r} is not known; valid: {', '.join(KINDS)}")
  kind, longest = KINDS[name], theirs.get("max_position_embeddings")
  fields = {"rope_theta": float(parameters.get("rope_theta") or theirs.get("rope_theta") or 10_000.0)}
  share = parameters.get("partial_rotary_factor", theirs.get("partial_rotary_factor")) or 1.0
  if head_dim is not None and share != 1.0:
    fields["rotary_dim"] = int(head_dim * share)
  if kind == "none":
    return fields
  original = (theirs.get("original_max_position_embeddings")
              or parameters.get("original_max_position_embeddings") or longest)
  original = longest if kind == "dynamic" else None if kind == "linear" else original
  factor = parameters.get("factor") or (longest / original if original else 1.0)
  given = {ours: parameters[key] for ours, key in KEYS[kind].items() if parameters.get(key) is not None}
  given = {ours: tuple(map(float, v)) if isinstance(v, list) else v for ours, v in given.items()}
  return fields | {"rope_scaling": RopeScaling(
      kind=kind, factor=float(factor), original_length=original, **given)}


def write_rope(cfg, *, scaled: bool = True, theta: float | None = None) -> dict:
  """rope_parameters; `scaled` False: of layers that the scaling leaves."""
  scaling = cfg.rope_scaling
  kind = scaling.kind if scaled else "none"
  theirs = {"rope_type": "default" if kind == "none" else kind,
            "rope_theta": cfg.rope_theta if theta is None else theta}
  if cfg.rotary_dim is not None:
    theirs["partial_rotary_factor"] = cfg.rotary_dim / cfg.head_dim
  if kind == "none":
    return theirs
  theirs["factor"] = scaling.factor
  if kind not in ("linear", "dynamic"):
    theirs["original_max_position_embeddings"] = scaling.original_length
  for ours, key in KEYS[kind].items():
    value = getattr(scaling, ours)
    if value is not None:
      theirs[key] = list(value) if isinstance(value, tuple) else value
  return theirs


def write_lengths(cfg) -> dict:
  """max_position_embeddings where the scaling says it: what is stretched, by how much."""
  scaling = cfg.rope_scaling
  if scaling.kind == "dynamic":
    return {"max_position_embeddings": scaling.original_length}
  if scaling.original_length is not None:
    return {"max_position_embeddings": round(scaling.original_length * scaling.factor)}
  return {}

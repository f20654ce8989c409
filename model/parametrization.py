"""How the first weights and the learning rates of parameters follow the width: by the kind of each, which its
name says."""
import typing


class Powers(typing.NamedTuple):
  """Of d_model / mup_base_width: what the standard deviation of the first weights, and the learning rate of
  an optimizer like Adam, are multiplied by."""
  init: float
  rate: float


# name -> kind -> Powers. muP is Table 3 of Tensor Programs V (arXiv:2203.03466), whose output layer has no
# multiplier: with Adam a smaller weight and rate do the same, and the model is one that others can read.
PARAMETRIZATION = {
  "standard": dict.fromkeys(("input", "hidden", "output", "vector"), Powers(0.0, 0.0)),
  "mup": {
    "input": Powers(0.0, 0.0),  # Sums over no width: embeddings.
    "hidden": Powers(-0.5, -1.0),  # From width to width.
    "output": Powers(-1.0, -1.0),  # From width to a number that stays: the head, a router.
    "vector": Powers(0.0, 0.0),  # Norms and biases.
  },
}


def kind_of(name: str) -> str:
  """Of a parameter, such as "blocks/0/attention/wq"."""
  leaf = name.rpartition("/")[2]
  if leaf in ("embed", "position_embed"):
    return "input"
  if leaf in ("unembed", "w_router"):
    return "output"
  return "vector" if leaf == "scale" or leaf.endswith("bias") else "hidden"


def init_factor(cfg, name: str) -> float:
  """What the first values of a parameter, drawn by cfg.init, are multiplied by."""
  kind = kind_of(name)
  power = PARAMETRIZATION[cfg.parametrization][kind].init
  if power and cfg.init == "fan_in":  # Which shrinks with the square root of the width already.
    power += 0.5
  return _width(cfg) ** power


def rate_factor(cfg, name: str) -> float:
  """What the learning rate of a parameter is multiplied by."""
  return _width(cfg) ** PARAMETRIZATION[cfg.parametrization][kind_of(name)].rate


def _width(cfg):
  return cfg.d_model / (cfg.mup_base_width or cfg.d_model)

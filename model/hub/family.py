"""What a family's file is written in: names, transposes and settings, each read in both directions.

Ours are layouts of model.transformer ([D, N, H], [F, D], ...); theirs the tensors of Hugging Face, mostly
[out, in]. A Piece ties one of ours, of one layer, to one of theirs, or to a part of it.
"""
import collections.abc
import dataclasses
import math
import typing

import numpy as np

from model.config import ModelConfig
from model.hub.errors import HubError


class Move(typing.NamedTuple):
  """How an array of ours lies in one of theirs.

  Attributes:
    to_ours: (their array, our shape) -> our array. Both work on part of the rows too.
    to_theirs: our array -> theirs.
    axis: of ours, along which the rows of theirs run; None: it moves in one piece.
  """
  to_ours: collections.abc.Callable
  to_theirs: collections.abc.Callable
  axis: int | None


class Piece(typing.NamedTuple):
  """
  Attributes:
    ours: path in a block, or at the top: "attention/wq".
    theirs: "model.layers.{n}.self_attn.q_proj.weight", with {n} the layer and {e} the expert.
    move: Move.
    join: the axis on which the pieces of one of theirs lie side by side, in the order of the family's list.
  """
  ours: str
  theirs: str
  move: Move
  join: int | None = None


def _linear(n_in):
  return Move(lambda x, shape: x.T.reshape(shape),
              lambda y: y.reshape(math.prod(y.shape[:n_in]), -1).T, n_in)


def _plain(n_in):
  return Move(lambda x, shape: x.reshape(shape), lambda y: y.reshape(math.prod(y.shape[:n_in]), -1), 0)


LINEAR, LINEAR_IN_2 = _linear(1), _linear(2)  # Theirs [out, in]; ours leads with one or two dims of "in".
PLAIN, PLAIN_IN_2 = _plain(1), _plain(2)  # Theirs [in, out], as ours: embeddings, GPT-2.
VECTOR = Move(lambda x, shape: x.reshape(shape), lambda y: y.reshape(-1), 0)
PER_HEAD = Move(lambda x, shape: x.transpose(2, 0, 1), lambda y: y.transpose(1, 2, 0), None)  # [N, out, in].


def paired(move: Move, n: int, *, banded: bool) -> Move:
  """Theirs turns neighbours (2i, 2i + 1) of the last n dims of a head, ours the pairs (i, i + n/2)."""
  order = np.arange(n).reshape(-1, 2).T.reshape(-1)
  back = np.argsort(order)
  turn = lambda y, order: y[..., np.concatenate([np.arange(y.shape[-1] - n), y.shape[-1] - n + order])]
  return Move(lambda x, shape: turn(move.to_ours(x, shape), order),
              lambda y: move.to_theirs(turn(y, back)), move.axis if banded else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """
  Attributes:
    name: their model_type.
    architecture: the class that transformers loads.
    settings: (our field, their key, what it is where they leave it out; REQUIRED: it must be there).
    fixed: their key -> the values under which the model is what ours computes; the first is written.
    read: (their config, fields so far) -> more fields of ModelConfig.
    write: our config -> more of theirs.
    top: our config -> pieces outside of the layers.
    layer: (our config, layer) -> pieces of a layer.
    ignored: patterns of tensors that hold no parameters.
    rename: a name as some folders have it -> as `top` and `layer` do.
  """
  name: str
  architecture: str
  settings: tuple
  fixed: dict
  read: collections.abc.Callable
  write: collections.abc.Callable
  top: collections.abc.Callable
  layer: collections.abc.Callable
  ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
  rename: collections.abc.Callable = lambda name: name

  def to_model(self, theirs: dict, **changes) -> ModelConfig:
    """Raises HubError for a setting that is missing, or under which the model is another than ours."""
    for key, values in self.fixed.items():
      if theirs.get(key, values[0]) not in values:
        raise HubError(f"config.json: {key}={theirs[key]!r} is not known of {self.name}; valid: "
                       f"{', '.join(map(repr, values))}")
    fields = {}
    for ours, key, default in self.settings:
      value = theirs.get(key)
      if value is None and default is REQUIRED:
        raise HubError(f"config.json: {key} is missing, which {self.name} needs")
      fields[ours] = default if value is None else value
    try:
      _check_kinds(ModelConfig, fields, {ours: key for ours, key, _ in self.settings})
      fields |= self.read(theirs, fields)
      _check_kinds(ModelConfig, fields, {})
      return ModelConfig(**{**fields, **changes}).validate()
    except (TypeError, KeyError, AttributeError, ArithmeticError) as e:
      raise HubError(f"config.json: a setting has a value of another kind ({type(e).__name__}: {e})") from e

  def to_theirs(self, cfg: ModelConfig) -> dict:
    """config.json as transformers wants it."""
    theirs = {key: getattr(cfg, ours) for ours, key, _ in self.settings}
    fixed = {key: values[0] for key, values in self.fixed.items()}
    return {"architectures": [self.architecture], "model_type": self.name, **fixed, **theirs,
            "dtype": cfg.param_dtype, **self.write(cfg)}


def _check_kinds(of, fields: dict, names: dict):
  """Every value is of the type that the dataclass declares, and no size is absurd."""
  hints = typing.get_type_hints(of)
  for name, value in fields.items():
    kinds = [typing.get_origin(kind) or kind for kind in typing.get_args(hints[name])] or [hints[name]]
    kinds += [int] if float in kinds else []
    if typing.get_origin(hints[name]) is tuple:
      kinds = [tuple]
    if type(value) not in kinds or isinstance(value, float) and not math.isfinite(value):
      raise HubError(f"config.json: {names.get(name, name)}={value!r:.60} is of another kind than "
                     f"{hints[name]}")
    if type(value) is int and not 0 <= value <= LARGEST.get(name, 1 << 31):
      raise HubError(f"config.json: {names.get(name, name)}={value!r:.60} is not a size that is read here")
    if dataclasses.is_dataclass(value):
      _check_kinds(type(value), {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, {})


REQUIRED = object()
LARGEST = {"n_layers": 4096, "n_experts": 1 << 16}  # Lists as long are made before a tensor is seen.
SIZES = (("vocab_size", "vocab_size", REQUIRED), ("n_layers", "num_hidden_layers", REQUIRED),
         ("d_model", "hidden_size", REQUIRED), ("n_heads", "num_attention_heads", REQUIRED),
         ("d_ff", "intermediate_size", REQUIRED))
LLAMA_SIZES = (*SIZES, ("n_kv_heads", "num_key_value_heads", None), ("norm_eps", "rms_norm_eps", 1e-6))
HEAD_DIM = (("head_dim", "head_dim", None),)


def read_head(theirs, default=False):
  return {"head": "tied" if theirs.get("tie_word_embeddings", default) else "untied"}


def write_head(cfg):
  return {"tie_word_embeddings": cfg.head == "tied"}


def read_layers(theirs, kinds: list[str] | None, window) -> dict:
  """window and layer_pattern from their layer_types, or from one kind of all layers."""
  names = {"full_attention": "global", "sliding_attention": "local"}
  if unknown := set(kinds) - names.keys():
    raise HubError(f"config.json: layer_types of {sorted(map(str, unknown))} are not known; valid: "
                   f"{', '.join(names)}")
  pattern, n = tuple(names[kind] for kind in kinds), theirs["num_hidden_layers"]
  if len(pattern) != n:
    raise HubError(f"config.json: layer_types has {len(pattern)} layers, num_hidden_layers={n}")
  if "local" not in pattern or window is None:
    return {"window": None, "layer_pattern": None}
  period = next(p for p in range(1, n + 1) if n % p == 0 and pattern == pattern[:p] * (n // p))
  return {"window": window, "layer_pattern": pattern[:period]}


def write_layers(cfg) -> list[str]:
  names = {"global": "full_attention", "local": "sliding_attention"}
  return [names[kind] for kind in cfg.layer_pattern * (cfg.n_layers // len(cfg.layer_pattern))]


# Pieces that families share. LAYER is where a layer's tensors are.

LAYER = "model.layers.{n}."


def top(cfg) -> list[Piece]:
  head = [Piece("unembed", "lm_head.weight", LINEAR)] if cfg.head == "untied" else []
  return [Piece("embed", "model.embed_tokens.weight", PLAIN),
          Piece("final_norm/scale", "model.norm.weight", VECTOR), *head]


def norms(**theirs: str) -> list[Piece]:
  """norms(attention_norm="input_layernorm") -> their pieces."""
  return [Piece(f"{ours}/scale", f"{LAYER}{name}.weight", VECTOR) for ours, name in theirs.items()]


PRE_NORMS = dict(attention_norm="input_layernorm", ffn_norm="post_attention_layernorm")
BOTH_NORMS = dict(attention_norm="input_layernorm", attention_post_norm="post_attention_layernorm",
                  ffn_norm="pre_feedforward_layernorm", ffn_post_norm="post_feedforward_layernorm")
BRANCH_NORMS = dict(attention_post_norm="post_attention_layernorm",
                    ffn_post_norm="post_feedforward_layernorm")


def attention(cfg) -> list[Piece]:
  at = f"{LAYER}self_attn."
  pieces = [Piece("attention/wq", f"{at}q_proj.weight", LINEAR),
            Piece("attention/wk", f"{at}k_proj.weight", LINEAR),
            Piece("attention/wv", f"{at}v_proj.weight", LINEAR),
            Piece("attention/wo", f"{at}o_proj.weight", LINEAR_IN_2)]
  if cfg.qkv_bias:
    pieces += [Piece(f"attention/{c}_bias", f"{at}{c}_proj.bias", VECTOR) for c in "qkv"]
  if cfg.out_bias:
    pieces.append(Piece("attention/o_bias", f"{at}o_proj.bias", VECTOR))
  if cfg.qk_norm is not None:
    pieces += [Piece(f"attention/{c}_norm/scale", f"{at}{c}_norm.weight", VECTOR) for c in "qk"]
  return pieces


def swiglu(at: str = "mlp.", ours: str = "ffn/", names=("gate_proj", "up_proj", "down_proj")) -> list[Piece]:
  return [Piece(f"{ours}w_{w}", f"{LAYER}{at}{name}.weight", LINEAR)
          for w, name in zip(("gate", "up", "down"), names)]


def experts(at: str, router: str, names=("gate_proj", "up_proj", "down_proj")) -> list[Piece]:
  """Of routed experts, whose tensors are named at{e}.name."""
  return [Piece("ffn/w_router", f"{LAYER}{router}.weight", LINEAR), *swiglu(f"{at}{{e}}.", names=names)]

"""Llama 2 and 3, SmolLM2, Mistral."""
import dataclasses

from model.hub.family import (
  HEAD_DIM,
  LLAMA_SIZES,
  PRE_NORMS,
  Family,
  attention,
  norms,
  read_head,
  swiglu,
  top,
  write_head,
)
from model.hub.rope import find_parameters, read_rope, write_lengths, write_rope


def _read(theirs, fields):
  bias = bool(theirs.get("attention_bias", False))
  return {"qkv_bias": bias, "out_bias": bias, **read_head(theirs),
          **read_rope(theirs, find_parameters(theirs))}


def _write(cfg):
  return {"attention_bias": cfg.qkv_bias, "rope_parameters": write_rope(cfg), **write_lengths(cfg),
          **write_head(cfg)}


LLAMA = Family(
  name="llama", architecture="LlamaForCausalLM", settings=(*LLAMA_SIZES, *HEAD_DIM),
  fixed={"hidden_act": ("silu",), "mlp_bias": (False,)}, read=_read, write=_write, top=top,
  layer=lambda cfg, n: [*norms(**PRE_NORMS), *attention(cfg), *swiglu()])

MISTRAL = dataclasses.replace(
  LLAMA, name="mistral", architecture="MistralForCausalLM",
  settings=(*LLAMA.settings, ("window", "sliding_window", None)), fixed={"hidden_act": ("silu",)},
  read=lambda theirs, fields: {**read_head(theirs), **read_rope(theirs, find_parameters(theirs))},
  write=lambda cfg: {key: value for key, value in _write(cfg).items() if key != "attention_bias"})

"""OLMo 2: norms at the end of each branch, and over all heads' queries and keys together."""
from model.hub.family import (
  BRANCH_NORMS,
  HEAD_DIM,
  LLAMA_SIZES,
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
  return {"qkv_bias": bias, "out_bias": bias, "norm_position": "branch", "qk_norm": "rmsnorm",
          "qk_norm_over": "all", **read_head(theirs), **read_rope(theirs, find_parameters(theirs))}


OLMO2 = Family(
  name="olmo2", architecture="Olmo2ForCausalLM", settings=(*LLAMA_SIZES, *HEAD_DIM),
  fixed={"hidden_act": ("silu",)}, read=_read, top=top,
  write=lambda cfg: {"attention_bias": cfg.qkv_bias, "rope_parameters": write_rope(cfg), **write_lengths(cfg),
                     **write_head(cfg)},
  layer=lambda cfg, n: [*norms(**BRANCH_NORMS), *attention(cfg), *swiglu()])

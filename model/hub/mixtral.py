"""Mixtral: Mistral with a mixture of experts in each layer."""
from model.hub.family import (
  HEAD_DIM,
  LLAMA_SIZES,
  PRE_NORMS,
  Family,
  attention,
  experts,
  norms,
  read_head,
  top,
  write_head,
)
from model.hub.rope import find_parameters, read_rope, write_lengths, write_rope

MIXTRAL = Family(
  name="mixtral", architecture="MixtralForCausalLM",
  settings=(*LLAMA_SIZES, *HEAD_DIM, ("window", "sliding_window", None),
            ("n_experts", "num_local_experts", 8), ("n_experts_per_token", "num_experts_per_tok", 2)),
  fixed={"hidden_act": ("silu",)},
  read=lambda theirs, fields: {"ffn": "moe", **read_head(theirs),
                               **read_rope(theirs, find_parameters(theirs, 1_000_000.0))},
  write=lambda cfg: {"rope_parameters": write_rope(cfg), **write_lengths(cfg), **write_head(cfg)},
  top=top,
  layer=lambda cfg, n: [*norms(**PRE_NORMS), *attention(cfg),
                        *experts("block_sparse_moe.experts.", "block_sparse_moe.gate", ("w1", "w3", "w2"))])

"""Phi-3: one matrix for queries, keys and values, one for gate and up; LongRoPE."""
from model.hub.family import (
  LAYER,
  LINEAR,
  LINEAR_IN_2,
  LLAMA_SIZES,
  PRE_NORMS,
  Family,
  Piece,
  norms,
  read_head,
  top,
  write_head,
)
from model.hub.rope import find_parameters, read_rope, write_lengths, write_rope


def _read(theirs, fields):
  head_dim = fields["d_model"] // fields["n_heads"]
  return {**read_head(theirs), **read_rope(theirs, find_parameters(theirs), head_dim)}


def _write(cfg):
  original = cfg.rope_scaling.original_length
  lengths = write_lengths(cfg)
  more = {} if original is None else {"original_max_position_embeddings": original}
  return {"rope_parameters": write_rope(cfg), **lengths, **more, **write_head(cfg)}


def _layer(cfg, n):
  return [*norms(**PRE_NORMS),
          *(Piece(f"attention/w{c}", f"{LAYER}self_attn.qkv_proj.weight", LINEAR, 0) for c in "qkv"),
          Piece("attention/wo", f"{LAYER}self_attn.o_proj.weight", LINEAR_IN_2),
          *(Piece(f"ffn/w_{w}", f"{LAYER}mlp.gate_up_proj.weight", LINEAR, 0) for w in ("gate", "up")),
          Piece("ffn/w_down", f"{LAYER}mlp.down_proj.weight", LINEAR)]


PHI3 = Family(
  name="phi3", architecture="Phi3ForCausalLM",
  settings=(*LLAMA_SIZES, ("window", "sliding_window", None)), fixed={"hidden_act": ("silu",)},
  read=_read, write=_write, top=top, layer=_layer)

"""Qwen 2 and 2.5, Qwen 3, and Qwen 3's mixtures of experts."""
from model.hub.errors import HubError
from model.hub.family import (
  HEAD_DIM,
  LLAMA_SIZES,
  PRE_NORMS,
  REQUIRED,
  Family,
  attention,
  experts,
  norms,
  read_head,
  read_layers,
  swiglu,
  top,
  write_head,
  write_layers,
)
from model.hub.rope import find_parameters, read_rope, write_lengths, write_rope


def _read(theirs, fields):
  n, window = theirs["num_hidden_layers"], theirs.get("sliding_window")
  window = window if theirs.get("use_sliding_window") else None
  first = theirs.get("max_window_layers", 28)
  kinds = theirs.get("layer_types") or [
    "sliding_attention" if window and i >= first else "full_attention" for i in range(n)]
  return {**read_head(theirs), **read_rope(theirs, find_parameters(theirs)),
          **read_layers(theirs, kinds, window)}


def _write(cfg):
  local = cfg.window is not None
  return {"rope_parameters": write_rope(cfg), **write_lengths(cfg), **write_head(cfg),
          "use_sliding_window": local, "sliding_window": cfg.window, "max_window_layers": cfg.n_layers,
          "layer_types": write_layers(cfg)}


def _read3(theirs, fields):
  bias = bool(theirs.get("attention_bias", False))
  return {**_read(theirs, fields), "qk_norm": "rmsnorm", "qkv_bias": bias, "out_bias": bias}


def _write3(cfg):
  return {**_write(cfg), "attention_bias": cfg.qkv_bias}


SETTINGS3 = (*LLAMA_SIZES, *((ours, key, 128) for ours, key, _ in HEAD_DIM))
DENSE = dict(fixed={"hidden_act": ("silu",)}, top=top,
             layer=lambda cfg, n: [*norms(**PRE_NORMS), *attention(cfg), *swiglu()])
QWEN2 = Family(name="qwen2", architecture="Qwen2ForCausalLM", settings=(*LLAMA_SIZES, *HEAD_DIM),
               read=lambda theirs, fields: {**_read(theirs, fields), "qkv_bias": True}, write=_write, **DENSE)
QWEN3 = Family(name="qwen3", architecture="Qwen3ForCausalLM", settings=SETTINGS3, read=_read3, write=_write3,
               **DENSE)


def _read_moe(theirs, fields):
  n, dense = theirs["num_hidden_layers"], sorted(theirs.get("mlp_only_layers") or [])
  if theirs.get("decoder_sparse_step", 1) != 1 or dense != list(range(len(dense))) or len(dense) >= n:
    raise HubError(f"config.json: mlp_only_layers={dense} and decoder_sparse_step="
                   f"{theirs.get('decoder_sparse_step')}: only the first layers may be dense, and not all")
  bias = bool(theirs.get("attention_bias", False))
  window = theirs.get("sliding_window") if theirs.get("use_sliding_window") else None
  n_experts = theirs.get("num_experts") or theirs.get("num_local_experts")
  if n_experts is None:
    raise HubError("config.json: num_experts is missing, which qwen3_moe needs")
  return {**read_head(theirs), **read_rope(theirs, find_parameters(theirs)), "window": window,
          "ffn": "moe", "qk_norm": "rmsnorm", "qkv_bias": bias, "out_bias": bias, "n_experts": n_experts,
          "n_dense_layers": len(dense), "router_normalize": bool(theirs.get("norm_topk_prob", False))}


def _write_moe(cfg):
  return {"rope_parameters": write_rope(cfg), **write_lengths(cfg), **write_head(cfg),
          "use_sliding_window": cfg.window is not None, "sliding_window": cfg.window,
          "num_experts": cfg.n_experts, "num_local_experts": cfg.n_experts, "decoder_sparse_step": 1,
          "mlp_only_layers": list(range(cfg.n_dense_layers)), "norm_topk_prob": cfg.router_normalize,
          "attention_bias": cfg.qkv_bias}


def _layer_moe(cfg, n):
  dense = n < cfg.n_dense_layers
  return [*norms(**PRE_NORMS), *attention(cfg), *(swiglu() if dense else experts("mlp.experts.", "mlp.gate"))]


QWEN3_MOE = Family(
  name="qwen3_moe", architecture="Qwen3MoeForCausalLM",
  settings=(*LLAMA_SIZES, *HEAD_DIM, ("n_experts_per_token", "num_experts_per_tok", REQUIRED),
            ("d_expert", "moe_intermediate_size", REQUIRED)),
  fixed={"hidden_act": ("silu",)}, read=_read_moe, write=_write_moe, top=top, layer=_layer_moe)

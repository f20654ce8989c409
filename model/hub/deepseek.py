"""DeepSeek V2 and V3: latent attention, many small experts with groups. Their rotary dims are neighbours."""
from model.hub.errors import HubError
from model.hub.family import (
  LAYER,
  LINEAR,
  LINEAR_IN_2,
  PER_HEAD,
  PRE_NORMS,
  REQUIRED,
  SIZES,
  VECTOR,
  Family,
  Piece,
  experts,
  norms,
  paired,
  read_head,
  swiglu,
  top,
  write_head,
)
from model.hub.rope import find_parameters, read_rope, write_lengths, write_rope

SETTINGS = (
  *SIZES, ("norm_eps", "rms_norm_eps", 1e-6), ("q_lora_rank", "q_lora_rank", None),
  *((name, name, REQUIRED) for name in (
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")),
  ("n_experts", "n_routed_experts", REQUIRED), ("n_experts_per_token", "num_experts_per_tok", REQUIRED),
  ("d_expert", "moe_intermediate_size", REQUIRED), ("n_shared_experts", "n_shared_experts", REQUIRED),
  ("n_dense_layers", "first_k_dense_replace", 0), ("routed_scale", "routed_scaling_factor", 1.0))
FIXED = {"hidden_act": ("silu",), "attention_bias": (False,), "moe_layer_freq": (1,)}


def _attention(cfg):
  at, r = f"{LAYER}self_attn.", cfg.qk_rope_head_dim
  queries = paired(LINEAR, r, banded=True)
  if cfg.q_lora_rank is None:
    pieces = [Piece("attention/wq", f"{at}q_proj.weight", queries)]
  else:
    pieces = [Piece("attention/wq_a", f"{at}q_a_proj.weight", LINEAR),
              Piece("attention/q_a_norm/scale", f"{at}q_a_layernorm.weight", VECTOR),
              Piece("attention/wq_b", f"{at}q_b_proj.weight", queries)]
  return [*pieces,
          Piece("attention/wkv_a", f"{at}kv_a_proj_with_mqa.weight", paired(LINEAR, r, banded=False)),
          Piece("attention/kv_a_norm/scale", f"{at}kv_a_layernorm.weight", VECTOR),
          *(Piece(f"attention/w{c}_b", f"{at}kv_b_proj.weight", PER_HEAD, 1) for c in "kv"),
          Piece("attention/wo", f"{at}o_proj.weight", LINEAR_IN_2)]


def _layer(cfg, n):
  pieces = [*norms(**PRE_NORMS), *_attention(cfg)]
  if n < cfg.n_dense_layers:
    return pieces + swiglu()
  pieces += [*experts("mlp.experts.", "mlp.gate"), *swiglu("mlp.shared_experts.", "ffn/shared/")]
  if cfg.router_bias:
    pieces.append(Piece("ffn/balance_bias", f"{LAYER}mlp.gate.e_score_correction_bias", VECTOR))
  return pieces


def _read(theirs, fields):
  return {"attention": "mla", "ffn": "moe", **read_head(theirs), **read_rope(theirs, find_parameters(theirs))}


def _write(cfg):
  return {"rope_parameters": write_rope(cfg), **write_lengths(cfg), **write_head(cfg),
          "num_key_value_heads": cfg.n_kv_heads, "head_dim": cfg.qk_rope_head_dim,
          "qk_head_dim": cfg.head_dim, "n_group": cfg.n_expert_groups, "topk_group": cfg.n_groups_per_token}


def _read2(theirs, fields):
  method = theirs.get("topk_method", "greedy")
  if method not in ("greedy", "group_limited_greedy"):
    raise HubError(f"config.json: topk_method={method!r} is not known of deepseek_v2; valid: 'greedy', "
                   "'group_limited_greedy'")
  groups = {} if method == "greedy" else {
    "n_expert_groups": theirs["n_group"], "n_groups_per_token": theirs["topk_group"]}
  return {**_read(theirs, fields), "router_normalize": False, **groups}


def _write2(cfg):
  method = "greedy" if cfg.n_expert_groups is None else "group_limited_greedy"
  return {**_write(cfg), "topk_method": method, "norm_topk_prob": False}


def _read3(theirs, fields):
  if not theirs.get("rope_interleave", True):
    raise HubError("config.json: rope_interleave=False is not known of deepseek_v3; valid: True")
  return {**_read(theirs, fields), "router": "sigmoid", "router_bias": True,
          "router_normalize": bool(theirs.get("norm_topk_prob", True)),
          "n_expert_groups": theirs.get("n_group", 8), "n_groups_per_token": theirs.get("topk_group", 4)}


def _write3(cfg):
  return {**_write(cfg), "norm_topk_prob": cfg.router_normalize, "rope_interleave": True}


SHARED = dict(settings=SETTINGS, top=top, layer=_layer)
DEEPSEEK2 = Family(name="deepseek_v2", architecture="DeepseekV2ForCausalLM", read=_read2, write=_write2,
                   fixed={**FIXED, "mlp_bias": (False,)}, **SHARED)
DEEPSEEK3 = Family(name="deepseek_v3", architecture="DeepseekV3ForCausalLM", read=_read3, write=_write3,
                   fixed={**FIXED, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}, **SHARED)

"""Tiny models of every family, as the settings of transformers: odd sizes, and what changes numbers."""
import functools
import json

import numpy as np

from model.hub.convert import import_model, open_source
from model.hub.families import FAMILIES, find_family
from model.hub.plan import make_plan
from model.hub.safetensors_file import write_safetensors

SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
ORIGINAL = 16  # Tokens that the stretched models were trained at; tests look at 64.
ROPE = {
  "linear": dict(factor=4.0), "dynamic": dict(factor=4.0),
  "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=ORIGINAL),
  "yarn": dict(factor=4.0, original_max_position_embeddings=ORIGINAL),
  "longrope": dict(short_factor=[1.0, 1.1, 1.2, 1.4, 1.8], long_factor=[1.0, 1.5, 2.0, 3.0, 4.0],
                   original_max_position_embeddings=ORIGINAL, factor=4.0),
}
MLA = dict(n_routed_experts=8, moe_intermediate_size=24, kv_lora_rank=16, qk_nope_head_dim=8, v_head_dim=6,
           qk_rope_head_dim=6, num_experts_per_tok=3, first_k_dense_replace=1, num_key_value_heads=4,
           num_hidden_layers=3)
YARN = dict(rope_type="yarn", rope_theta=10_000.0, factor=4.0, mscale=0.7, mscale_all_dim=0.9,
            original_max_position_embeddings=ORIGINAL)


def _rope(kind, **more):
  values = ROPE.get(kind, {})
  longest = {"dynamic": ORIGINAL}.get(kind, 64)
  return dict(head_dim=10, max_position_embeddings=longest,
              rope_parameters={"rope_type": kind, "rope_theta": 10_000.0, **values}, **more)


# Name -> (model_type, changes to SIZES). The first case of a family is in the README's table.
CASES = {
  "Llama 3, SmolLM2": ("llama", _rope("llama3", tie_word_embeddings=True)),
  "Llama 2": ("llama", dict(num_key_value_heads=4, attention_bias=True)),
  "Llama, one kv head": ("llama", dict(num_key_value_heads=1, head_dim=6)),
  **{f"Llama, {kind}": ("llama", _rope(kind)) for kind in ("linear", "dynamic", "yarn")},
  "Mistral": ("mistral", dict(sliding_window=9, head_dim=10)),
  "Qwen 2": ("qwen2", dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=9,
                           max_window_layers=1)),
  "Qwen 3": ("qwen3", dict(head_dim=10, num_key_value_heads=1)),
  "Gemma 2": ("gemma2", dict(head_dim=10, sliding_window=9, query_pre_attn_scalar=13,
                             attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
  "Gemma 3": ("gemma3_text", dict(head_dim=10, sliding_window=9, num_hidden_layers=3, num_key_value_heads=1,
                                  layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                                  query_pre_attn_scalar=13, rope_parameters={
                                    "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e5),
                                    "sliding_attention": dict(rope_type="default", rope_theta=1e3)})),
  "OLMo 2": ("olmo2", {}),
  "GPT-2": ("gpt2", {}),
  "Phi-3": ("phi3", dict(hidden_size=40, original_max_position_embeddings=ORIGINAL, pad_token_id=0,
                         sliding_window=40,
                         rope_parameters=dict(rope_type="longrope", rope_theta=1e4, **ROPE["longrope"]))),
  "Phi-3, partial rotary": ("phi3", dict(hidden_size=40, pad_token_id=0, rope_parameters=dict(
    rope_type="default", rope_theta=1e4, partial_rotary_factor=0.4))),
  "Mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
  "Qwen 3 MoE": ("qwen3_moe", dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24,
                                   norm_topk_prob=True, head_dim=10, mlp_only_layers=[0],
                                   decoder_sparse_step=1, num_hidden_layers=3)),
  "DeepSeek V2": ("deepseek_v2", dict(**MLA, q_lora_rank=None, n_shared_experts=2, n_group=4, topk_group=2,
                                      topk_method="group_limited_greedy", routed_scaling_factor=1.5,
                                      rope_parameters=YARN)),
  "DeepSeek V3": ("deepseek_v3", dict(**MLA, q_lora_rank=12, n_shared_experts=1, n_group=4, topk_group=2,
                                      rope_parameters=YARN)),
}
GPT2 = dict(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)


def settings(case: str) -> dict:
  """config.json of a case, without what transformers adds."""
  name, changes = CASES[case]
  sizes = {k: v for k, v in SIZES.items() if k not in changes}
  base = GPT2 if name == "gpt2" else sizes
  return {"model_type": name, "architectures": [FAMILIES[name].architecture], **base, **changes}


def write_folder(path, config: dict, *, seed=0, dtype=np.float32, files=1):
  """A Hugging Face folder of random weights, made without transformers. Returns the tensors by name."""
  path.mkdir(parents=True)
  (path / "config.json").write_text(json.dumps(config))
  family, rng = find_family(config), np.random.default_rng(seed)
  plan = make_plan(family, family.to_model(config, precision="fp32"))
  tensors = {name: (rng.standard_normal(plan.shape(name)) * 0.1).astype(dtype) for name in plan.tensors}
  groups = [list(tensors)[i::files] for i in range(files)]
  names = [f"model-{i}.safetensors" for i in range(files)] if files > 1 else ["model.safetensors"]
  for name, group in zip(names, groups):
    write_safetensors(path / name, {k: (tensors[k].shape, tensors[k].dtype) for k in group},
                      lambda k: [tensors[k]])
  if files > 1:
    places = {k: name for name, group in zip(names, groups) for k in group}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
  return tensors


def import_folder(source, target, **options):
  return import_model(open_source(source, **options), target)


@functools.cache
def transformers_model(case: str):
  """A random model of transformers in float32, every parameter (norms and biases too) away from its start."""
  import torch
  import transformers
  transformers.logging.set_verbosity_error()
  torch.set_num_threads(1)
  torch.manual_seed(0)
  config = settings(case)
  config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
  with torch.no_grad():
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
      if "inv_freq" not in name and p.is_floating_point() and (p.requires_grad or "bias" in name):
        p += torch.randn_like(p) * (0.1 if p.ndim < 2 else 0.15)
  return model

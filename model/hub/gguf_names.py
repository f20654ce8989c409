"""A GGUF file as if it were a folder: its fields as config.json, its tensors under the names of transformers.

llama.cpp turns neighbours (2i, 2i + 1) of a head in its "llama" architecture, so q and k come with their rows
permuted; Gemma's norms come with the 1 added.
"""
import math
import re

import numpy as np

from model.hub.errors import HubError
from model.lookup import check_choice

TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
       "output.weight": "lm_head.weight"}
LAYER = {"attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
         "attn_output.weight": "self_attn.o_proj.weight",
         **{f"attn_{c}.{w}": f"self_attn.{c}_proj.{w}" for c in "qkv" for w in ("weight", "bias")},
         **{f"attn_{c}_norm.weight": f"self_attn.{c}_norm.weight" for c in "qk"},
         **{f"ffn_{w}.weight": f"mlp.{w}_proj.weight" for w in ("gate", "up", "down")}}
GEMMA_LAYER = {**LAYER, "post_attention_norm.weight": "post_attention_layernorm.weight",
               "ffn_norm.weight": "pre_feedforward_layernorm.weight",
               "post_ffw_norm.weight": "post_feedforward_layernorm.weight"}
# architecture -> (model_type, names in a layer).
ARCHITECTURES = {"llama": ("llama", LAYER), "qwen2": ("qwen2", LAYER), "qwen3": ("qwen3", LAYER),
                 "gemma2": ("gemma2", GEMMA_LAYER), "gemma3": ("gemma3_text", GEMMA_LAYER)}
# Their field, after "architecture." -> key of config.json.
FIELDS = {
  "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "context_length":
  "max_position_embeddings", "feed_forward_length": "intermediate_size", "attention.head_count":
  "num_attention_heads", "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
  "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.sliding_window": "sliding_window",
  "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
}
UNUSED = {"rope_freqs.weight"}  # Llama 3.1's factors by dim, which rope_scaling says too.


class _Changed:
  """A tensor whose rows are other than stored."""

  def __init__(self, tensor, change):
    self._tensor, self._change = tensor, change
    self.shape, self.dtype = tensor.shape, np.dtype("float32") if change is _less_one else tensor.dtype

  def read(self, start=0, stop=None):
    return self._change(self._tensor.read(start, stop))


def _less_one(x):
  return x.astype(np.float32) - 1


def _halves(head_dim):
  """Whole heads, each from neighbours to halves."""
  def change(x):
    heads = x.reshape(-1, head_dim // 2, 2, *x.shape[1:])
    return heads.swapaxes(1, 2).reshape(x.shape)
  return change


def as_folder(path, fields: dict, tensors: dict) -> tuple[dict, dict]:
  """(config, tensors by their names in transformers).

  Raises:
    HubError: another architecture, or a tensor without a name there.
  """
  arch = fields.get("general.architecture")
  try:
    check_choice("general.architecture", str(arch), ARCHITECTURES)
  except ValueError as e:
    raise HubError(f"{path}: {e}") from None
  model_type, names = ARCHITECTURES[arch]
  config = {"model_type": model_type, "tie_word_embeddings": "output.weight" not in tensors}
  for field, key in FIELDS.items():
    if (value := fields.get(f"{arch}.{field}")) is not None:
      config[key] = _decimal(value)
  _read_rope(path, arch, fields, config)
  if "token_embd.weight" not in tensors:
    raise HubError(f"{path}: token_embd.weight is missing")
  config["vocab_size"] = tensors["token_embd.weight"].shape[0]
  if model_type.startswith("gemma"):
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    big = config.get("num_hidden_layers") in (46, 62) and type(heads) is int and type(width) is int and heads
    config["query_pre_attn_scalar"] = width // heads if big else config.get("head_dim", 256)  # Of the 27B.
  for token in ("bos", "eos"):
    config[f"{token}_token_id"] = fields.get(f"tokenizer.ggml.{token}_token_id")
  return config, _rename(path, arch, names, config, tensors)


def _decimal(value):
  """1e-05 of the float32 9.999999747378752e-06."""
  return float(str(np.float32(value))) if isinstance(value, float) else value


def _read_rope(path, arch, fields, config):
  theta = fields.get(f"{arch}.rope.freq_base", 10_000.0)
  kind, factor = fields.get(f"{arch}.rope.scaling.type"), fields.get(f"{arch}.rope.scaling.factor")
  config["rope_theta"] = _decimal(theta)
  if kind == "linear" or kind is None and factor not in (None, 0.0, 1.0):
    config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
  elif kind == "yarn":
    config["rope_scaling"] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings":
                              fields.get(f"{arch}.rope.scaling.original_context_length")}
  elif kind not in (None, "none"):
    raise HubError(f"{path}: rope.scaling.type={kind!r:.40} is not known; valid: none, linear, yarn")


def _rename(path, arch, names, config, tensors):
  heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
  renamed = {}
  for name, tensor in tensors.items():
    layer = re.fullmatch(r"blk\.(\d{1,5})\.(.+)", name)
    if name in UNUSED:
      if arch == "llama":
        raise HubError(f"{path}: {name} stretches the rotary positions as Llama 3.1 does, and the file does "
                       "not say by which rule; import the safetensors of this model instead")
      continue
    if name not in TOP and not (layer and layer[2] in names):
      raise HubError(f"{path}: {name} has no place in {arch} here")
    theirs = TOP.get(name) or f"model.layers.{layer[1]}.{names[layer[2]]}"
    if theirs in renamed:
      raise HubError(f"{path}: {name} is there twice")
    rows = tensor.shape[0]
    n = {"attn_q": heads, "attn_k": kv_heads or heads}.get(layer[2].split(".")[0] if layer else "")
    if arch == "llama" and n:
      if type(n) is not int or n < 1 or rows % (2 * n):
        raise HubError(f"{path}: {name} has {rows} rows for {n} heads")
      tensor = _Changed(tensor, _halves(rows // n))
    if arch.startswith("gemma") and theirs.endswith("norm.weight"):
      tensor = _Changed(tensor, _less_one)
    renamed[theirs] = tensor
  if not all(math.prod(t.shape) for t in renamed.values()):
    raise HubError(f"{path}: a tensor is empty")
  return renamed

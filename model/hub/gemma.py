"""Gemma 2 and the text models of Gemma 3."""
import math

from model.hub.family import (
  BOTH_NORMS,
  LLAMA_SIZES,
  Family,
  attention,
  norms,
  read_head,
  read_layers,
  swiglu,
  top,
  write_head,
  write_layers,
)
from model.hub.rope import find_parameters, read_rope, write_lengths, write_rope

SETTINGS = (*LLAMA_SIZES, ("head_dim", "head_dim", 256))
SHARED = {"norm": "rmsnorm_plus1", "norm_position": "both", "ffn": "geglu"}
FIXED = {"hidden_activation": ("gelu_pytorch_tanh", "gelu"), "attention_bias": (False,),
         "use_bidirectional_attention": (None, False)}


def _read(theirs, fields, period):
  kinds = theirs.get("layer_types") or [
    "full_attention" if (i + 1) % period == 0 else "sliding_attention"
    for i in range(theirs["num_hidden_layers"])]
  return {**SHARED, **read_head(theirs, True), **read_layers(theirs, kinds, theirs.get("sliding_window")),
          "embed_scale": math.sqrt(fields["d_model"]),
          "attention_scale": theirs.get("query_pre_attn_scalar", 256) ** -0.5}


def _write(cfg):
  return {"layer_types": write_layers(cfg), "sliding_window": cfg.window, **write_head(cfg),
          "query_pre_attn_scalar": _number(cfg.scale**-2), **write_lengths(cfg)}


def _number(x):
  """256 of 256.00000000000006."""
  return round(x) if abs(x - round(x)) < 1e-6 * x else x


def _caps(theirs, softcap, final):
  return {"attention_softcap": theirs.get("attn_logit_softcapping", softcap),
          "logit_softcap": theirs.get("final_logit_softcapping", final)}


def _write_caps(cfg):
  return {"attn_logit_softcapping": cfg.attention_softcap, "final_logit_softcapping": cfg.logit_softcap}


def _layer(cfg, n):
  return [*norms(**BOTH_NORMS), *attention(cfg), *swiglu()]


GEMMA2 = Family(
  name="gemma2", architecture="Gemma2ForCausalLM", settings=SETTINGS, fixed=FIXED, top=top, layer=_layer,
  read=lambda theirs, fields: {**_read(theirs, fields, 2), **_caps(theirs, 50.0, 30.0),
                               **read_rope(theirs, find_parameters(theirs))},
  write=lambda cfg: {**_write(cfg), **_write_caps(cfg), "rope_parameters": write_rope(cfg)})


def _read3(theirs, fields):
  parameters = find_parameters(theirs, 1_000_000.0)
  both = {"full_attention": parameters,
          "sliding_attention": {"rope_theta": theirs.get("rope_local_base_freq", 10_000.0)}}
  both |= {kind: parameters[kind] for kind in both if kind in parameters}
  layers = _read(theirs, fields, theirs.get("sliding_window_pattern")
                 or theirs.get("_sliding_window_pattern") or 6)
  local = {} if layers["window"] is None else {
    "rope_theta_local": float(both["sliding_attention"]["rope_theta"])}
  return {**layers, **_caps(theirs, None, None), "qk_norm": "rmsnorm_plus1", **local,
          **read_rope(theirs, both["full_attention"])}


def _write3(cfg):
  local = write_rope(cfg, scaled=False, theta=cfg.rope_theta_local or 10_000.0)
  return {**_write(cfg), **_write_caps(cfg),
          "rope_parameters": {"full_attention": write_rope(cfg), "sliding_attention": local}}


GEMMA3 = Family(
  name="gemma3_text", architecture="Gemma3ForCausalLM", settings=SETTINGS, fixed=FIXED, read=_read3,
  write=_write3, top=top, layer=_layer)

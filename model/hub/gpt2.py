"""GPT-2: learned positions, biases everywhere, weights stored [in, out], queries, keys and values in one."""
from model.hub.family import LINEAR, PLAIN, PLAIN_IN_2, REQUIRED, VECTOR, Family, Piece, read_head, write_head

AT = "transformer.h.{n}."


def _read(theirs, fields):
  return {**read_head(theirs, True), "d_ff": theirs.get("n_inner") or 4 * fields["d_model"],
          "positions": "learned", "norm": "layernorm", "ffn": "gelu", "qkv_bias": True, "out_bias": True,
          "ffn_bias": True}


def _norm(ours, theirs):
  return [Piece(f"{ours}/scale", f"{theirs}.weight", VECTOR), Piece(f"{ours}/bias", f"{theirs}.bias", VECTOR)]


def _top(cfg):
  head = [] if cfg.head == "tied" else [Piece("unembed", "lm_head.weight", LINEAR)]
  return [Piece("embed", "transformer.wte.weight", PLAIN),
          Piece("position_embed", "transformer.wpe.weight", PLAIN),
          *_norm("final_norm", "transformer.ln_f"), *head]


def _layer(cfg, n):
  return [
    *_norm("attention_norm", f"{AT}ln_1"), *_norm("ffn_norm", f"{AT}ln_2"),
    *(Piece(f"attention/w{c}", f"{AT}attn.c_attn.weight", PLAIN, 1) for c in "qkv"),
    *(Piece(f"attention/{c}_bias", f"{AT}attn.c_attn.bias", VECTOR, 0) for c in "qkv"),
    Piece("attention/wo", f"{AT}attn.c_proj.weight", PLAIN_IN_2),
    Piece("attention/o_bias", f"{AT}attn.c_proj.bias", VECTOR),
    Piece("ffn/w_up", f"{AT}mlp.c_fc.weight", PLAIN), Piece("ffn/up_bias", f"{AT}mlp.c_fc.bias", VECTOR),
    Piece("ffn/w_down", f"{AT}mlp.c_proj.weight", PLAIN),
    Piece("ffn/down_bias", f"{AT}mlp.c_proj.bias", VECTOR)]


GPT2 = Family(
  name="gpt2", architecture="GPT2LMHeadModel",
  settings=(("vocab_size", "vocab_size", REQUIRED), ("n_layers", "n_layer", REQUIRED),
            ("d_model", "n_embd", REQUIRED), ("n_heads", "n_head", REQUIRED),
            ("max_length", "n_positions", 1024), ("norm_eps", "layer_norm_epsilon", 1e-5)),
  fixed={"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
         "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
  read=_read, write=lambda cfg: {"n_inner": cfg.d_ff, **write_head(cfg)}, top=_top, layer=_layer,
  ignored=(r".*\.attn\.(masked_)?bias",),
  rename=lambda name: name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}")

"""The whole forward pass against the papers' formulas, written out in float64 NumPy without looking at the
model's code paths: one token attends at a time, nothing is stacked, scanned, chunked or fused."""
import jax
import numpy as np
import pytest
from scipy import special

from tests.tiny import packed_batch, tiny, variants

WRITTEN_OUT = [name for name in variants() if "experiments." not in name]
ACTIVATION = {
  "swiglu": lambda x: x * special.expit(x), "relu": lambda x: np.maximum(x, 0),
  # GELU in the tanh form of GPT-2, which is also jax.nn.gelu's default.
  "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}
ACTIVATION["geglu"] = ACTIVATION["gelu"]


def norm(kind, p, x, eps):
  over = tuple(range(-p["scale"].ndim, 0))
  if kind == "layernorm":
    centred = x - x.mean(over, keepdims=True)
    return centred / np.sqrt(x.var(over, keepdims=True) + eps) * p["scale"] + p["bias"]
  return x / np.sqrt((x**2).mean(over, keepdims=True) + eps) * (p["scale"] + (kind == "rmsnorm_plus1"))


def rotate(cfg, x, pos, local):
  """A head at a position, pair by pair."""
  if cfg.positions != "rope":
    return x
  x, own_base = x.copy(), local and cfg.rope_theta_local is not None
  theta = cfg.rope_theta_local if own_base else cfg.rope_theta
  dim = cfg.qk_rope_head_dim or cfg.rotary_dim or len(x)
  for i in range(dim // 2):
    freq, size = theta ** (-2 * i / dim), 1.0
    if cfg.rope_scaling.kind != "none" and not own_base:
      freq, size = SCALED[cfg.rope_scaling.kind](cfg.rope_scaling, freq, i, theta, dim)
    turned = size * (x[i] + 1j * x[i + dim // 2]) * np.exp(1j * pos * freq)
    x[i], x[i + dim // 2] = turned.real, turned.imag
  return x


def yarn(s, freq, i, theta, dim):
  """Pair i: between those that turn beta_fast and beta_slow times in the original length."""
  place = lambda turns: dim * np.log(s.original_length / (turns * 2 * np.pi)) / 2 / np.log(theta)
  low, high = place(s.beta_fast), place(s.beta_slow)
  if s.truncate:
    low, high = np.floor(low), np.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  stretched = min(max((i - low) / (high - low), 0), 1)
  size = 0.1 * np.log(s.factor) * (s.mscale or 1) + 1
  if s.mscale and s.mscale_all_dim:
    size /= 0.1 * np.log(s.factor) * s.mscale_all_dim + 1
  return stretched * freq / s.factor + (1 - stretched) * freq, size


def llama3(s, freq, i, theta, dim):
  wave = 2 * np.pi / freq
  if wave < s.original_length / s.high_freq_factor:
    return freq, 1.0
  if wave > s.original_length / s.low_freq_factor:
    return freq / s.factor, 1.0
  smooth = (s.original_length / wave - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
  return (1 - smooth) * freq / s.factor + smooth * freq, 1.0


SCALED = {"yarn": yarn, "llama3": llama3}


def cap(x, limit):
  return x if limit is None else limit * np.tanh(x / limit)


def attention(cfg, p, x, pos, segment, window):
  """One row, x [T, D]."""
  T, N, K, local = len(x), cfg.n_heads, cfg.n_kv_heads, window is not None
  if cfg.attention == "mla":
    q, k, v = latent_attention(cfg, p, x, pos, local)
  else:
    q, k, v = (np.tensordot(x, p[w], 1) + p.get(b, 0)
               for w, b in (("wq", "q_bias"), ("wk", "k_bias"), ("wv", "v_bias")))
    if cfg.qk_norm:
      q, k = (norm(cfg.qk_norm, p[name], a, cfg.norm_eps) for name, a in (("q_norm", q), ("k_norm", k)))
    q = [[rotate(cfg, q[t, n], pos[t], local) for n in range(N)] for t in range(T)]
    k = [[rotate(cfg, k[t, n], pos[t], local) for n in range(K)] for t in range(T)]
  scale = cfg.attention_scale or cfg.head_dim**-0.5
  if cfg.attention == "mla" and cfg.rope_scaling.mscale_all_dim:
    scale *= (0.1 * cfg.rope_scaling.mscale_all_dim * np.log(cfg.rope_scaling.factor) + 1) ** 2
  out = np.zeros((T, N, v.shape[-1]))
  for t in range(T):
    seen = [s for s in range(t + 1) if segment[s] == segment[t] and (window is None or t - s < window)]
    for n in range(N):
      head = n * K // N
      logits = np.array([q[t][n] @ k[s][head] for s in seen]) * scale
      logits = cap(logits, cfg.attention_softcap)
      out[t, n] = special.softmax(logits) @ v[seen, head]
  return np.tensordot(out, p["wo"], 2) + p.get("o_bias", 0)


def latent_attention(cfg, p, x, pos, local):
  """DeepSeek V2's equations 9 to 19: all of a head's query, key and value of each token, written out."""
  T, N, P, R = len(x), cfg.n_heads, cfg.qk_nope_head_dim, cfg.kv_lora_rank
  c_q = norm(cfg.norm, p["q_a_norm"], x @ p["wq_a"], cfg.norm_eps) if "wq_a" in p else x
  q = np.tensordot(c_q, p["wq_b" if "wq_a" in p else "wq"], 1)
  both = x @ p["wkv_a"]
  c_kv = norm(cfg.norm, p["kv_a_norm"], both[:, :R], cfg.norm_eps)
  k, v = np.tensordot(c_kv, p["wk_b"], 1), np.tensordot(c_kv, p["wv_b"], 1)
  turned = lambda a, t: rotate(cfg, a, pos[t], local)
  q = [[np.concatenate([q[t, n, :P], turned(q[t, n, P:], t)]) for n in range(N)] for t in range(T)]
  k = [[np.concatenate([k[t, n], turned(both[t, R:], t)]) for n in range(N)] for t in range(T)]
  return q, k, v


def mixture(cfg, p, x):
  """Token by token: its experts, one after the other."""
  E, k, groups = cfg.n_experts, cfg.n_experts_per_token, cfg.n_expert_groups or 1
  y = np.zeros_like(x)
  for t, logits in enumerate(x @ p["w_router"]):
    scores = special.expit(logits) if cfg.router == "sigmoid" else special.softmax(logits)
    chosen_by = scores + p.get("balance_bias", 0)
    best = 2 if cfg.router == "sigmoid" else 1  # Of each group, by whose sum groups are chosen.
    of_group = np.sort(chosen_by.reshape(groups, -1), axis=1)[:, -best:].sum(1)
    kept = np.argsort(-of_group)[:cfg.n_groups_per_token or 1]
    allowed = [e for e in range(E) if e // (E // groups) in kept]
    experts = sorted(allowed, key=lambda e: -chosen_by[e])[:k]
    for e in experts:
      hidden = ACTIVATION["swiglu"](x[t] @ p["w_gate"][e]) * (x[t] @ p["w_up"][e])
      share = scores[e] / scores[experts].sum() if cfg.router_normalize else scores[e]
      y[t] += cfg.routed_scale * share * (hidden @ p["w_down"][e])
  return y + (feed_forward(cfg, p["shared"], x) if "shared" in p else 0)


def feed_forward(cfg, p, x):
  if "w_router" in p:
    return mixture(cfg, p, x)
  act, up = ACTIVATION["swiglu" if cfg.ffn == "moe" else cfg.ffn], x @ p["w_up"] + p.get("up_bias", 0)
  hidden = act(x @ p["w_gate"]) * up if "w_gate" in p else act(up)
  return hidden @ p["w_down"] + p.get("down_bias", 0)


def forward(cfg, params, tokens, pos, segment):
  """Logits [T, V] of one row."""
  x = params["embed"][tokens] * (cfg.embed_scale or 1.0)
  if cfg.positions == "learned":
    x = x + params["position_embed"][pos]
  n_in_group = len(cfg.layer_pattern)
  for layer in range(cfg.n_layers):
    kind = cfg.layer_pattern[layer % n_in_group]
    first = layer < cfg.n_dense_layers
    stack = params["first_blocks" if first else "blocks"][str(layer % n_in_group)]
    group = (layer if first else layer - cfg.n_dense_layers) // n_in_group
    if cfg.pipeline_repeats > 1:
      stack = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stack)
    p = jax.tree.map(lambda a, g=group: a[g], stack)
    parts = (("attention", lambda x, p=p, kind=kind: attention(
                cfg, p["attention"], x, pos, segment, cfg.window if kind == "local" else None)),
             ("ffn", lambda x, p=p: feed_forward(cfg, p["ffn"], x)))
    for name, f in parts:
      before = lambda y, p=p, name=name: norm(cfg.norm, p[f"{name}_norm"], y, cfg.norm_eps)
      after = lambda y, p=p, name=name: norm(cfg.norm, p[f"{name}_post_norm"], y, cfg.norm_eps)
      if cfg.norm_position == "pre":
        x = x + f(before(x))
      elif cfg.norm_position == "post":
        x = after(x + f(x))
      elif cfg.norm_position == "branch":
        x = x + after(f(x))
      else:
        x = x + after(f(before(x)))
  if cfg.norm_position != "post":
    x = norm(cfg.norm, params["final_norm"], x, cfg.norm_eps)
  head = params["embed"].T if cfg.head == "tied" else params["unembed"]
  return cap(x @ head[:, :cfg.vocab_size], cfg.logit_softcap)


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_the_model_is_its_definition(name):
  cfg, _, _, params, logits = tiny(name)
  rng = np.random.default_rng(0)  # Biases and scales are 0 and 1 at first, which would hide them.
  params = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), params)
  batch = packed_batch()
  got = logits(params, batch)
  exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  row = 1
  want = forward(cfg, exact, *(batch[k][row] for k in ("tokens", "positions", "segments")))
  text = batch["segments"][row] > 0
  np.testing.assert_allclose(got[row, text], want[text], atol=1e-4 * np.abs(want).max())

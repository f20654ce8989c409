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


def norm(p, x, eps):
  if "bias" in p:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p["bias"]
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"]


def rotate(x, pos, theta):
  half = x.shape[-1] // 2
  turned = (x[:half] + 1j * x[half:]) * np.exp(1j * pos * theta ** (-np.arange(half) / half))
  return np.concatenate([turned.real, turned.imag])


def cap(x, limit):
  return x if limit is None else limit * np.tanh(x / limit)


def attention(cfg, p, x, pos, segment, window):
  """One row, x [T, D]."""
  T, N, K = len(x), cfg.n_heads, cfg.n_kv_heads
  q, k, v = (np.tensordot(x, p[w], 1) + p.get(b, 0)
             for w, b in (("wq", "q_bias"), ("wk", "k_bias"), ("wv", "v_bias")))
  if cfg.qk_norm:
    q, k = norm(p["q_norm"], q, cfg.norm_eps), norm(p["k_norm"], k, cfg.norm_eps)
  q = [[rotate(q[t, n], pos[t], cfg.rope_theta) for n in range(N)] for t in range(T)]
  k = [[rotate(k[t, n], pos[t], cfg.rope_theta) for n in range(K)] for t in range(T)]
  out = np.zeros((T, N, cfg.head_dim))
  for t in range(T):
    seen = [s for s in range(t + 1) if segment[s] == segment[t] and (window is None or t - s < window)]
    for n in range(N):
      head = n * K // N
      logits = np.array([q[t][n] @ k[s][head] for s in seen]) / np.sqrt(cfg.head_dim)
      logits = cap(logits, cfg.attention_softcap)
      out[t, n] = special.softmax(logits) @ v[seen, head]
  return np.tensordot(out, p["wo"], 2) + p.get("o_bias", 0)


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
      y[t] += cfg.routed_scale * scores[e] / scores[experts].sum() * (hidden @ p["w_down"][e])
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
      before = lambda y, p=p, name=name: norm(p[f"{name}_norm"], y, cfg.norm_eps)
      after = lambda y, p=p, name=name: norm(p[f"{name}_post_norm"], y, cfg.norm_eps)
      if cfg.norm_position == "pre":
        x = x + f(before(x))
      elif cfg.norm_position == "post":
        x = after(x + f(x))
      else:
        x = x + after(f(before(x)))
  if cfg.norm_position != "post":
    x = norm(params["final_norm"], x, cfg.norm_eps)
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

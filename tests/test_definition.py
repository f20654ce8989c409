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


def feed_forward(cfg, p, x):
  act, up = ACTIVATION[cfg.ffn], x @ p["w_up"] + p.get("up_bias", 0)
  hidden = act(x @ p["w_gate"]) * up if "w_gate" in p else act(up)
  return hidden @ p["w_down"] + p.get("down_bias", 0)


def forward(cfg, params, tokens, pos, segment):
  """Logits [T, V] of one row."""
  x = params["embed"][tokens] * (cfg.embed_scale or 1.0)
  n_in_group = len(cfg.layer_pattern)
  for layer in range(cfg.n_layers):
    kind = cfg.layer_pattern[layer % n_in_group]
    p = jax.tree.map(lambda a, g=layer // n_in_group: a[g], params["blocks"][str(layer % n_in_group)])
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

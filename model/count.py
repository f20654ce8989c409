"""How large a model is and what a token costs: parameters, FLOPs, bytes. Arithmetic; nothing runs."""
import collections
import math

import jax
import jax.numpy as jnp

# The first word of a parameter's path that is here names its part.
PARTS = {"embed": "embedding", "position_embed": "embedding", "unembed": "head", "attention": "attention",
         "ffn": "ffn"}


def count_parameters(params) -> dict[str, int]:
  """Parameters by part (embedding, attention, ffn, norm, head), largest first, padding of the vocabulary
  included.

  Args:
    params: of `init_params` or `abstract_params`.
  """
  parts = collections.Counter()
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    words = [str(p.key) for p in path]
    parts[next((PARTS[w] for w in words if w in PARTS), "norm")] += math.prod(leaf.shape)
  return dict(parts.most_common())


def active_parameters(cfg, params) -> int:
  """Parameters that one token meets: of the routed experts those that it is sent to."""
  total = 0
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    words = [str(p.key) for p in path]
    routed = cfg.ffn == "moe" and words[0] == "blocks" and words[-2] == "ffn" and (
        words[-1] in ("w_gate", "w_up", "w_down"))
    size = math.prod(leaf.shape)
    total += size * cfg.n_experts_per_token // cfg.n_experts if routed else size
  return total


def flops_per_token(cfg, seq_len: int, n_params: int, *, causal: bool = True) -> float:
  """FLOPs of training (forward and backward) per token: 6 per parameter that multiplies, which the head does
  and the embedding look-up does not, and 12 per head dimension and query-key pair, half of them of the
  value's. Remat does not count.

  Args:
    cfg: a validated ModelConfig.
    seq_len: T; rows are taken as one document each.
    n_params: of the whole model; of a mixture of experts those that one token meets.
    causal: count the pairs that the mask and the window let through; False: all T * T, as a kernel without
      blocks computes them.
  """
  widths = 6 * cfg.n_heads * (cfg.head_dim + cfg.value_dim)
  return 6 * (n_params - looked_up(cfg)) + widths * _keys_per_query(cfg, seq_len, causal)


def looked_up(cfg) -> int:
  """Parameters of which a token reads a row, and multiplies nothing."""
  rows = (0 if cfg.head == "tied" else cfg.padded_vocab_size) + (cfg.max_length or 0)
  return rows * cfg.d_model


def _keys_per_query(cfg, seq_len, causal):
  """How many keys a query sees on average, summed over the layers: 1, 2, ... up to the window."""
  windows = [min(window or seq_len, seq_len) for window in cfg.windows]
  pairs = [w * (w + 1) / 2 + (seq_len - w) * w if causal else seq_len * seq_len for w in windows]
  return cfg.n_layers * sum(pairs) / len(pairs) / seq_len


def cache_bytes(cfg, length: int) -> int:
  """Bytes of keys and values that one sequence of `length` tokens holds."""
  return length * cfg.n_layers * _token_bytes(cfg)


def read_bytes(cfg, length: int) -> int:
  """Of them, what making the next token reads: of local layers the window."""
  slots = sum(min(window or length, length) for window in cfg.windows) * cfg.n_layers // len(cfg.windows)
  return slots * _token_bytes(cfg)


def _token_bytes(cfg):
  numbers = cfg.kv_lora_rank + cfg.turned_dim if cfg.latent else 2 * cfg.n_kv_heads * cfg.head_dim
  return numbers * jnp.dtype(cfg.compute_dtype).itemsize


def decode_bytes_per_token(cfg, n_params: int, batch: int, length: int) -> float:
  """Bytes read from memory to make one token: the weights, shared by the batch, and the sequence's own cache.
  Times tokens per second it is the bandwidth in use."""
  weights = (n_params - looked_up(cfg)) * jnp.dtype(cfg.compute_dtype).itemsize
  return weights / batch + read_bytes(cfg, length)

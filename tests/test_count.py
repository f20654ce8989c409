"""Counts against XLA's own, against the arrays themselves, and by hand."""
import jax
import numpy as np
import pytest
from flax import nnx

from model.cache import init_paged_cache
from model.count import cache_bytes, count_parameters, decode_bytes_per_token, flops_per_token, read_bytes
from model.transformer import abstract_params
from tests.tiny import abstract_batch, mesh_of, model_config
from train.config import TrainConfig
from train.losses import loss_spec, next_token_loss

SHAPES = {
  "square": {"d_model": 256, "n_heads": 4, "n_kv_heads": 4},
  "gqa, wide heads": {"d_model": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 96},
  "gelu, tied": {"d_model": 192, "n_heads": 2, "n_kv_heads": 1, "ffn": "gelu", "d_ff": 512, "head": "tied"},
  "large vocabulary": {"d_model": 128, "n_heads": 2, "n_kv_heads": 2, "vocab_size": 4000},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seq_len", [64, 512])
def test_training_flops_are_those_that_xla_counts(shape, seq_len):
  # One layer, one chunk of the loss: XLA counts the body of a loop once.
  model = model_config(**SHAPES[shape], n_layers=1, attention_impl="plain")
  cfg = TrainConfig(batch_size=2, seq_len=seq_len, model=model)
  mesh = mesh_of("one")
  graphdef, params = abstract_params(model, mesh)
  spec = loss_spec(model, 2 * seq_len, 0.0)

  def loss(params, batch):
    return next_token_loss(spec, nnx.merge(graphdef, params), batch)[0]

  with jax.set_mesh(mesh):
    lowered = jax.jit(jax.value_and_grad(loss)).lower(params, abstract_batch(cfg, mesh))
  n_params = sum(count_parameters(params).values())
  ours = 2 * seq_len * flops_per_token(model, seq_len, n_params, causal=False)
  assert ours == pytest.approx(lowered.cost_analysis()["flops"], rel=0.05)


def test_parameters_by_part_are_those_of_the_arrays():
  cfg = model_config(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, vocab_size=300)
  parts = count_parameters(abstract_params(cfg, mesh_of("one"))[1])
  assert parts == {"embedding": 384 * 32, "head": 384 * 32,  # 300 is padded to 384.
                   "ffn": 2 * 3 * 32 * 48, "attention": 2 * (2 * 32 * 32 + 2 * 32 * 16),
                   "norm": (2 * 2 + 1) * 32}


def test_flops_by_hand():
  cfg = model_config(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, vocab_size=300)
  matmul = 2 * (3 * 32 * 48 + 2 * 32 * 32 + 2 * 32 * 16) + 384 * 32
  n_params = matmul + 384 * 32
  assert flops_per_token(cfg, 5, n_params) == 6 * matmul + 2 * 12 * 32 * (1 + 2 + 3 + 4 + 5) / 5
  assert flops_per_token(cfg, 5, n_params, causal=False) == 6 * matmul + 2 * 12 * 32 * 5
  local = model_config(d_model=32, n_layers=2, head_dim=8, d_ff=48, window=2,
                       layer_pattern=("local", "global"))
  assert flops_per_token(local, 5, n_params) == 6 * matmul + 12 * 32 * ((1 + 2 + 2 + 2 + 2) + 15) / 5


@pytest.mark.parametrize("d_model", [256, 512])
def test_attention_pairs_outweigh_the_matmuls_only_beyond_six_widths(d_model):
  """Of a layer with d_ff = 4 d_model: 24 d^2 against 4 T d a token, forward; half of it if causal."""
  cfg = model_config(d_model=d_model, n_layers=1, n_heads=d_model // 64, n_kv_heads=d_model // 64, ffn="gelu",
                     d_ff=4 * d_model)
  layer = 12 * d_model**2
  n_params = layer + 2 * cfg.padded_vocab_size * d_model
  head = 6 * cfg.padded_vocab_size * d_model
  pairs = lambda T, causal: flops_per_token(cfg, T, n_params, causal=causal) - 6 * layer - head
  assert pairs(6 * d_model, False) == 6 * layer
  assert pairs(12 * d_model, True) == pytest.approx(6 * layer, rel=1e-3)


def test_cache_bytes_are_those_of_the_cache():
  for changes in ({}, {"window": 5, "layer_pattern": ("local", "global"), "precision": "bf16"}):
    cfg = model_config(**changes)
    with jax.set_mesh(mesh_of("one")):
      caches = init_paged_cache(cfg, 1, 4, 4)
    assert cache_bytes(cfg, 16) == sum(a.nbytes for a in jax.tree.leaves(caches))
  assert read_bytes(cfg, 16) == cache_bytes(cfg, 16) * (5 + 16) / 32
  n_params = 1000 + cfg.padded_vocab_size * cfg.d_model
  np.testing.assert_allclose(decode_bytes_per_token(cfg, n_params, 4, 16),
                             1000 * 2 / 4 + read_bytes(cfg, 16))

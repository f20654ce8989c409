"""Latent attention: meshes, the cache, and decoding that never makes a key. Its formula is in
tests/test_definition.py."""
import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from infer.engine import Engine
from infer.sampling import Sampling
from model.cache import init_paged_cache
from model.count import cache_bytes, flops_per_token
from model.sharding import make_mesh
from tests.tiny import MLA, YARN, make_params, mesh_of, model_config, packed_batch, put
from train.losses import loss_spec, next_token_loss

CFG = model_config(**MLA, n_layers=1, rope_scaling=YARN, init="fan_in", attention_impl="chunked")


@functools.cache
def loss_and_gradient(cfg, *sizes):
  """Of the packed rows, on the host."""
  mesh = make_mesh(**dict(sizes)) if sizes else mesh_of("one")
  with jax.set_mesh(mesh):
    graphdef, params = make_params(cfg, mesh)
    spec = loss_spec(cfg, 64, 0.0)
    loss = lambda params, batch: next_token_loss(spec, nnx.merge(graphdef, params), batch)[0]
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, put(cfg, mesh, packed_batch())))


@pytest.mark.parametrize("sizes, changes", [
  (dict(fsdp=4, tensor=2), dict(attention_impl="dot_product")),
  pytest.param(dict(fsdp=2, seq=2, tensor=2), dict(context="ring"), marks=pytest.mark.slow)])
def test_every_mesh_computes_the_same(sizes, changes):
  """Heads over "tensor", ranks over "fsdp", keys and values of unequal widths round the ring."""
  loss, gradient = loss_and_gradient(CFG)
  got, got_gradient = loss_and_gradient(dataclasses.replace(CFG, **changes), *sizes.items())
  assert got == pytest.approx(loss, rel=1e-6)
  paths = jax.tree_util.tree_flatten_with_path(gradient)[0]
  for (path, want), found in zip(paths, jax.tree.leaves(got_gradient)):
    np.testing.assert_allclose(found, want, atol=2e-5 * np.abs(want).max(), err_msg=str(path))


def test_the_cache_is_the_latents():
  """Bytes of the arrays that there are: R + r numbers a token and layer, where all heads have N (H + V)."""
  for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
    cfg = dataclasses.replace(CFG, compute_dtype=dtype)
    with jax.set_mesh(mesh_of("one")):
      held = sum(a.nbytes for a in jax.tree.leaves(init_paged_cache(cfg, 1, 3 * 4, 16)))
    assert held == 3 * 64 * cfg.n_layers * (16 + 4) * itemsize == 3 * cache_bytes(cfg, 64)
  deepseek = dataclasses.replace(cfg, kv_lora_rank=512, qk_rope_head_dim=64, n_layers=61)
  assert cache_bytes(deepseek, 1) == 61 * (512 + 64) * 2


def test_pairs_cost_what_keys_and_values_are_wide():
  """4 heads of 10 numbers with values of 8: 2 FLOPs each forward, twice that backward; 3 keys a query."""
  assert flops_per_token(CFG, 5, CFG.padded_vocab_size * CFG.d_model) == 3 * 2 * 4 * (10 + 8) * 3


@pytest.mark.slow
def test_sharded_decode_equals_one_device():
  rng = np.random.default_rng(0)
  prompts = [rng.integers(3, 300, n).tolist() for n in (40, 3, 17, 1)]
  made = []
  for mesh in (mesh_of("one"), make_mesh(fsdp=4, tensor=2)):
    with jax.set_mesh(mesh):
      _, params = make_params(CFG, mesh)
    engine = Engine(CFG, params, mesh, prefill_chunk=32, max_length=64)
    made.append(list(engine.generate(prompts, Sampling(temperature=0.0, max_tokens=12))))
  one, sharded = (sorted(tokens, key=lambda token: token.request) for tokens in made)
  assert [(t.request, t.id, t.finish) for t in one] == [(t.request, t.id, t.finish) for t in sharded]
  np.testing.assert_allclose([t.logprob for t in one], [t.logprob for t in sharded], atol=1e-5)

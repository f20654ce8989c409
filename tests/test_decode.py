"""Decode is the model that was trained: every variant, through pages. tests/test_engine.py has the rest."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.load import cast_params
from model.attention import ATTENTION
from tests.tiny import MOE, decode_logits, make_params, mesh_of, model_config, tiny, variants, with_attention

S, CUT = 48, 24


def random_tokens(n=2, seed=2):
  return np.random.default_rng(seed).integers(0, 300, (n, S)).astype(np.int32)


# Pages are attended to in one way, whatever the kernel of the forward pass.
DECODED = [n for n in variants() if not n.startswith(("attention_impl", "window")) or n == "window,plain"]


@pytest.mark.parametrize("name", DECODED)
def test_every_variant_decodes_as_it_reads(name):
  """In chunks and token by token, against the forward pass."""
  cfg, mesh, _, params, logits = tiny(name)
  tokens_BS = random_tokens(8)
  pos_BS = np.arange(S, dtype=np.int32)[None].repeat(8, 0)
  wanted_BSV = logits(params, {"tokens": tokens_BS, "positions": pos_BS, "segments": np.ones_like(pos_BS)})
  got_2SV = decode_logits(cfg, mesh, params, tokens_BS[:2], cut=CUT)
  np.testing.assert_allclose(got_2SV, wanted_BSV[:2], atol=1e-5, rtol=0)


def with_another(cfg, mesh, params):
  """The logits of two sequences, before and after the other one than i is replaced; for i of 0 and 1."""
  tokens_2S = random_tokens()
  before_2SV = decode_logits(cfg, mesh, params, tokens_2S, cut=CUT)
  for i in range(2):
    other_2S = tokens_2S.copy()
    other_2S[1 - i] = random_tokens(1, seed=3)
    yield before_2SV, decode_logits(cfg, mesh, params, other_2S, cut=CUT)


@pytest.mark.parametrize("name", ["window,plain", "attention=mla"])
def test_another_sequence_changes_no_bit(name):
  cfg, mesh, _, params, _ = tiny(name)
  for i, (before_2SV, after_2SV) in enumerate(with_another(cfg, mesh, params)):
    np.testing.assert_array_equal(after_2SV[i], before_2SV[i])
    assert (after_2SV[1 - i] != before_2SV[1 - i]).any()


def test_which_tokens_are_read_together_decides_nothing_about_experts():
  """A model that was trained with room for so many tokens decodes without a limit."""
  cfg, mesh = model_config(**MOE, dispatch="capacity", capacity_factor=0.5), mesh_of("one")
  params = make_params(cfg, mesh)[1]
  for i, (before_2SV, after_2SV) in enumerate(with_another(cfg, mesh, params)):
    np.testing.assert_allclose(after_2SV[i], before_2SV[i], atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
def test_casting_weights_once_changes_no_bit(attention):
  """bf16: what is cast ahead is exactly what the forward pass casts at each use."""
  more = {} if attention == "mla" else dict(qk_norm="rmsnorm", qk_norm_over="all", qkv_bias=True)
  cfg = model_config(precision="bf16", norm="layernorm", ffn_bias=True, out_bias=True,
                     **with_attention(attention), **more)
  mesh, rng = mesh_of("one"), np.random.default_rng(0)
  noisy = lambda a: (a + 0.1 * rng.normal(size=a.shape)).astype(np.float32)
  params = jax.tree.map(noisy, jax.device_get(make_params(cfg, mesh)[1]))
  with jax.set_mesh(mesh):
    cast = cast_params(cfg, params)
  assert cast["embed"].dtype == jnp.bfloat16 and cast["final_norm"]["scale"].dtype == jnp.float32
  both = [decode_logits(cfg, mesh, p, random_tokens(), cut=CUT) for p in (params, cast)]
  np.testing.assert_array_equal(*both)

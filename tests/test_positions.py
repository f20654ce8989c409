"""RoPE scalings against closed forms and transformers' own formulas; what turning must keep."""
import math

import jax.numpy as jnp
import numpy as np
import pytest

from model.config import RopeScaling
from model.positions import SCALING, magnitude, none, rope, sin_cos, turn
from tests.tiny import MLA, YARN, model_config

DIM, THETA, LENGTH = 16, 10_000.0, 64
SHORT, LONG = tuple(1 + i / 8 for i in range(8)), tuple(2.0**i for i in range(8))
scaled = lambda kind, factor, **more: RopeScaling(kind=kind, factor=factor, original_length=LENGTH, **more)
CASES = {
  "linear": RopeScaling(kind="linear", factor=4.0),
  "dynamic beyond": scaled("dynamic", 2.0, length=3 * LENGTH),
  "dynamic within": scaled("dynamic", 2.0, length=9),
  "yarn": scaled("yarn", 4.0),
  "yarn of DeepSeek": RopeScaling(kind="yarn", factor=40.0, original_length=4096, beta_fast=20.0,
                                  beta_slow=2.0, mscale=1.0, mscale_all_dim=0.7),
  "yarn between dims": scaled("yarn", 8.0, truncate=False, attention_factor=1.2),
  "llama3": scaled("llama3", 8.0, low_freq_factor=1.5),
  "longrope within": scaled("longrope", 4.0, length=LENGTH, short_factors=SHORT, long_factors=LONG),
  "longrope beyond": scaled("longrope", 4.0, short_factors=SHORT, long_factors=LONG),
}
THEIRS = {"original_length": "original_max_position_embeddings", "short_factors": "short_factor",
          "long_factors": "long_factor"}
NAMES = ("factor", "original_length", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim",
         "attention_factor", "low_freq_factor", "high_freq_factor", "short_factors", "long_factors")
INVERSE = THETA ** (-2 * np.arange(DIM // 2) / DIM)


def test_every_scaling_has_a_case():
  assert {scaling.kind for scaling in CASES.values()} == SCALING.keys() - {"none"}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name, monkeypatch):
  """Their formulas in float64: in float32 the two differ by rounding, which is seen too."""
  torch = pytest.importorskip("torch", reason="the oracle is torch's and transformers'")
  transformers = pytest.importorskip("transformers", reason="the oracle is transformers'")
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
  scaling = CASES[name]
  theirs = {THEIRS.get(n, n): getattr(scaling, n) for n in NAMES if getattr(scaling, n) is not None}
  cfg = transformers.LlamaConfig(
      hidden_size=4 * DIM, num_attention_heads=4, head_dim=DIM, rope_parameters=theirs | {
        "rope_type": scaling.kind, "rope_theta": THETA},
      max_position_embeddings=LENGTH if scaling.kind == "dynamic" else int(LENGTH * scaling.factor))
  length = scaling.length or (scaling.original_length or LENGTH) * scaling.factor
  freq, factor = SCALING[scaling.kind](scaling, THETA, DIM)
  single, _ = ROPE_INIT_FUNCTIONS[scaling.kind](cfg, "cpu", seq_len=int(length))
  np.testing.assert_allclose(freq, single.numpy(), rtol=2e-6)
  for name in ("float", "float32"):
    monkeypatch.setattr(torch, name, torch.float64)
  monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
  want, want_factor = ROPE_INIT_FUNCTIONS[scaling.kind](cfg, "cpu", seq_len=int(length))
  assert want.dtype == torch.float64
  np.testing.assert_allclose(freq, want.numpy(), rtol=1e-12)
  assert factor == pytest.approx(want_factor, rel=1e-12)


def test_closed_forms():
  """Each scaling's promise, of a factor that makes a row of LENGTH tokens as long as factor * LENGTH."""
  kind = lambda name: SCALING[CASES[name].kind](CASES[name], THETA, DIM)[0] / INVERSE
  np.testing.assert_allclose(none(None, THETA, DIM)[0], INVERSE, rtol=1e-6)
  np.testing.assert_allclose(kind("linear"), 1 / 4, rtol=1e-12)
  np.testing.assert_allclose(kind("dynamic within"), 1, rtol=1e-12)
  # The slowest pair turns in `length` tokens, at factor (length - original) + original, as far as it did.
  np.testing.assert_allclose(kind("dynamic beyond")[[0, -1]], [1, 1 / (2 * 3 - 1)], rtol=1e-12)
  turns = LENGTH * INVERSE / (2 * math.pi)
  yarn = kind("yarn")
  assert (yarn[turns > 32] == 1).all() and np.allclose(yarn[turns < 1][1:], 1 / 4)
  assert (np.diff(yarn) <= 0).all()
  llama = kind("llama3")
  np.testing.assert_allclose(llama[turns > 4], 1)
  np.testing.assert_allclose(llama[turns < 1.5], 1 / 8)
  np.testing.assert_allclose(kind("longrope within"), 1 / np.array(SHORT))
  np.testing.assert_allclose(kind("longrope beyond"), 1 / np.array(LONG))
  assert magnitude(1.0, 1.0) == 1.0 and magnitude(math.e**10, 0.5) == 1.5


@pytest.mark.parametrize("name", ["none", *CASES])
def test_products_depend_on_distance_only(name):
  """And are the closed form; past the original length too, as well as float32 knows an angle there."""
  freq, factor = SCALING["none" if name == "none" else CASES[name].kind](CASES.get(name), THETA, DIM)
  q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 3, DIM)).astype(np.float32)
  at = lambda x, p: rope(x, *sin_cos(jnp.full((1, 1), p, jnp.int32), freq, factor))
  product = lambda m, n: np.asarray(jnp.sum(at(q, m) * at(k, n), -1))
  exact = sum((q[..., i] * k[..., i] + q[..., i + 8] * k[..., i + 8]) * np.cos(4 * np.float64(freq[i]))
              + (q[..., i + 8] * k[..., i] - q[..., i] * k[..., i + 8]) * -np.sin(4 * np.float64(freq[i]))
              for i in range(8)) * factor**2
  for n, atol in ((3, 2e-5), (500, 3e-4), (100_003, 5e-2)):
    np.testing.assert_allclose(product(n + 4, n), exact, atol=atol)
  assert np.abs(product(8, 3) - product(7, 3)).max() > 1e-3


def test_what_turns_and_by_which_base():
  x = np.random.default_rng(0).normal(size=(1, 4, 2, 8)).astype(np.float32)
  pos = np.array([[0, 1, 5, 90]], np.int32)
  part = model_config(rotary_dim=6, rope_scaling=YARN)
  got = np.asarray(turn(part, None, x, pos))
  assert np.array_equal(got[..., 6:], x[..., 6:])
  assert not np.isclose(got[:, 1:, :, :6], x[:, 1:, :, :6]).all(-1).any()
  both = model_config(window=5, layer_pattern=("local", "global"), rope_theta_local=100.0, rope_scaling=YARN)
  base = rope(x, *sin_cos(pos, none(None, 100.0, 8)[0]))
  assert np.array_equal(turn(both, 5, x, pos), base)
  assert not np.array_equal(turn(both, None, x, pos), base)
  assert np.array_equal(turn(model_config(positions="none"), None, x, pos), x)


def test_the_scale_of_the_logits():
  assert model_config(head_dim=16).scale == 0.25 and model_config(attention_scale=0.3).scale == 0.3
  latent = model_config(**MLA, rope_scaling=YARN)
  assert latent.head_dim == 10 and latent.scale == pytest.approx(10**-0.5 * (0.07 * math.log(4) + 1) ** 2)

"""infer/sampling.py: filters against Hugging Face's written out in NumPy, draws against the distribution."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.sampling import Sampling, filter_logits, penalise, stack_settings
from infer.sampling import sample as sample_eagerly

V = 64
sample = jax.jit(sample_eagerly)


# What transformers' logits processors do, for one row, with their order of operations.

def softmax(x):
  e = np.exp((x - x.max()).astype(np.float64))
  return e / e.sum()


def warp(logits_V, seen, s: Sampling):
  x = logits_V.astype(np.float64)
  if s.repetition_penalty is not None:
    for t in seen:
      x[t] = x[t] * s.repetition_penalty if x[t] < 0 else x[t] / s.repetition_penalty
  if s.temperature == 0:
    return x
  x = x / np.float64(np.float32(s.temperature))
  if s.top_k is not None:
    kth = sorted(x, reverse=True)[min(s.top_k, len(x)) - 1]
    x = np.array([v if v >= kth else -np.inf for v in x])
  if s.top_p is not None and s.top_p < 1:
    order = sorted(range(len(x)), key=lambda i: (x[i], i))  # Ascending, as torch.sort; ties by id.
    mass, probs = 0.0, softmax(x)
    for i in order[:-1]:
      mass += probs[i]
      if mass <= 1 - s.top_p:
        x[i] = -np.inf
  if s.min_p is not None:
    probs = softmax(x)
    x = np.where(probs < s.min_p * probs.max(), -np.inf, x)
  return x


SETTINGS = {
  "none": Sampling(),
  "temperature": Sampling(temperature=0.3),
  "top_k": Sampling(top_k=7),
  "top_k_1": Sampling(top_k=1),
  "top_k_over": Sampling(top_k=10_000),
  "top_p": Sampling(top_p=0.8),
  "top_p_tiny": Sampling(top_p=1e-6),
  "top_p_1": Sampling(top_p=1.0),
  "min_p": Sampling(min_p=0.1),
  "min_p_1": Sampling(min_p=1.0),
  "penalty": Sampling(repetition_penalty=1.7),
  "penalty_below_1": Sampling(repetition_penalty=0.6),
  "all": Sampling(temperature=1.4, top_k=20, top_p=0.93, min_p=0.03, repetition_penalty=1.2),
}
LOGITS = {
  "random": lambda rng: rng.normal(size=V) * 2,
  "ties": lambda rng: np.round(rng.normal(size=V) * 2),  # Most values several times.
  "flat": lambda rng: np.zeros(V),
  "peaked": lambda rng: np.where(np.arange(V) == 5, 60.0, rng.normal(size=V)),
}


def warp_ours(logits_BV, seen_BV, settings):
  stacked = stack_settings(settings)
  scores_BV = penalise(logits_BV, seen_BV, stacked.penalty_B) / stacked.temperature_B[:, None]
  return np.asarray(jax.jit(filter_logits)(scores_BV, stacked))


@pytest.mark.parametrize("kind", LOGITS)
def test_filters_equal_hugging_faces(kind):
  """One batch holds every setting, 16 times."""
  rng = np.random.default_rng(0)
  settings = [s for s in SETTINGS.values() for _ in range(16)]
  logits_BV = np.stack([LOGITS[kind](rng) for _ in settings]).astype(np.float32)
  seen_BV = rng.random(logits_BV.shape) < 0.3
  ours_BV = warp_ours(logits_BV, seen_BV, settings)
  for i, s in enumerate(settings):
    theirs_V = warp(logits_BV[i], np.flatnonzero(seen_BV[i]), s)
    np.testing.assert_array_equal(np.isfinite(ours_BV[i]), np.isfinite(theirs_V), err_msg=str(s))
    np.testing.assert_allclose(ours_BV[i], theirs_V, rtol=1e-6, atol=1e-6, err_msg=str(s))


def test_top_p_is_the_smallest_set_and_keeps_the_top():
  probs = np.array([[0.5, 0.25, 0.125, 0.125]])
  logits_BV, seen_BV = np.log(probs).astype(np.float32), np.zeros((1, 4), bool)
  kept = lambda p: np.flatnonzero(np.isfinite(warp_ours(logits_BV, seen_BV, [Sampling(top_p=p)])[0])).tolist()
  assert kept(0.4) == kept(1e-9) == [0]
  assert kept(0.7) == [0, 1]
  assert kept(0.8) == [0, 1, 3]  # Of the two that tie, the lower id goes: as torch's ascending sort.
  assert kept(0.9) == [0, 1, 2, 3]
  logits_BV = np.zeros((1, 4), np.float32)
  assert kept(0.5) == [2, 3]  # Exactly p is enough.


@pytest.mark.parametrize("name", ["none", "temperature", "top_k", "top_p", "min_p", "all"])
def test_draws_follow_the_filtered_softmax(name):
  """Chi-square of 100,000 draws, each at a position of its own."""
  n, setting = 100_000, dataclasses.replace(SETTINGS[name], seed=11)
  rng = np.random.default_rng(1)
  logits_V = rng.normal(size=V).astype(np.float32)
  seen = np.arange(0, V, 3)
  stacked = jax.tree.map(lambda a: jnp.broadcast_to(a, (n,)), stack_settings([setting]))
  seen_BV = jnp.broadcast_to(jnp.zeros(V, bool).at[seen].set(True), (n, V))
  token_B, _ = sample(jnp.broadcast_to(logits_V, (n, V)), seen_BV, jnp.arange(n), stacked)
  probs_V = softmax(warp(logits_V, seen, setting))
  count_V = np.bincount(np.asarray(token_B), minlength=V)
  assert count_V[probs_V == 0].sum() == 0
  live = probs_V > 0
  chi2 = ((count_V - n * probs_V)[live] ** 2 / (n * probs_V[live])).sum()
  freedom = live.sum() - 1
  assert chi2 < freedom + 4 * np.sqrt(2 * freedom), (chi2, freedom)  # 4 sigma of the chi-square.


def test_a_row_does_not_depend_on_the_others():
  """The same request alone, and among 31 others whose settings switch every stage on: the same token."""
  rng = np.random.default_rng(2)
  logits_BV = rng.normal(size=(32, V)).astype(np.float32)
  seen_BV = rng.random((32, V)) < 0.3
  kinds = list(SETTINGS.values())
  settings = [dataclasses.replace(kinds[i % len(kinds)], seed=i) for i in range(32)]
  for i in range(3, 32, 4):
    settings[i] = Sampling(temperature=0.0, seed=3)
  pos_B = np.arange(32, dtype=np.int32)
  run = lambda rows: sample(logits_BV[rows], seen_BV[rows], pos_B[rows],
                            stack_settings([settings[i] for i in rows]))
  token_B, logprob_B = run(np.arange(32))
  for i in range(32):
    alone = run(np.array([i]))
    assert int(alone[0][0]) == int(token_B[i]), settings[i]
    np.testing.assert_allclose(alone[1][0], logprob_B[i], rtol=1e-6)


def test_seed_and_position_alone_make_the_draw():
  logits_BV = np.zeros((200, V), np.float32)
  draw = lambda seed, pos_B: np.asarray(sample(logits_BV, np.zeros((200, V), bool), pos_B,
                                               stack_settings([Sampling(seed=seed)] * 200))[0])
  pos_B = np.arange(200, dtype=np.int32)
  np.testing.assert_array_equal(draw(1, pos_B), draw(1, pos_B))
  np.testing.assert_array_equal(draw(1, pos_B)[50:], draw(1, pos_B + 50)[:150])
  assert (draw(1, pos_B) != draw(2, pos_B)).mean() > 0.9
  assert len(np.unique(draw(1, pos_B))) > V / 2


def test_greedy_takes_the_top_after_the_penalty_and_reports_the_models_logprob():
  logits_BV = np.array([[2.0, 1.9, -1e30, -1.0]], np.float32)
  seen_BV = np.array([[True, False, False, False]])
  pos_B = np.zeros(1, np.int32)
  for penalty, token in ((None, 0), (1.01, 0), (1.5, 1)):
    s = Sampling(temperature=0.0, repetition_penalty=penalty, top_k=3, top_p=0.5)
    token_B, logprob_B = sample(logits_BV, seen_BV, pos_B, stack_settings([s]))
    assert int(token_B[0]) == token
    assert float(logprob_B[0]) == pytest.approx(np.log(softmax(logits_BV[0])[token]), abs=1e-6)


def test_padding_of_the_vocabulary_is_never_drawn():
  """Entries at -1e30, under settings that pull every logit together, or keep all."""
  logits_BV = np.full((4096, V), -1e30, np.float32)
  logits_BV[:, :3] = 0.0
  seen_BV = np.ones((4096, V), bool)
  pos_B = np.arange(4096, dtype=np.int32)
  for s in (Sampling(temperature=1e6), Sampling(temperature=1e-12), Sampling(temperature=0.0),
            Sampling(top_k=V), Sampling(top_p=1.0), Sampling(min_p=0.0), Sampling(repetition_penalty=1e3)):
    token_B, logprob_B = sample(logits_BV, seen_BV, pos_B, stack_settings([s] * 4096))
    assert np.asarray(token_B).max() < 3, s
    assert np.isfinite(np.asarray(logprob_B)).all()


@pytest.mark.parametrize("name, value", [
  ("max_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_k", 0), ("top_k", 1.5),
  ("top_p", 0.0), ("top_p", 1.01), ("min_p", -0.1), ("repetition_penalty", 0.0), ("stop", ("a", "")),
  ("seed", -1), ("seed", 2**32)])
def test_settings_out_of_range_are_named(name, value):
  with pytest.raises(ValueError, match=f"{name}="):
    dataclasses.replace(Sampling(), **{name: value}).validate()

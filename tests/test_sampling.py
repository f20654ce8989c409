"""infer/sampling.py: filters against Hugging Face's (written out in NumPy, and its own), penalties against
OpenAI's formula, draws against the distribution."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.sampling import (
    Sampling,
    _settings_row,
    adjust,
    draw_from,
    filter_logits,
    measure,
    penalise,
    stack_settings,
)
from infer.sampling import sample as sample_eagerly

V = 64
ALL = np.uint32(0xFFFFFFFF)
sample_jit = jax.jit(sample_eagerly, static_argnames="n_top")


def all_of(shape):
  return np.full((shape[0], -(-shape[1] // 32)), ALL)


def sample(logits_BV, seen_BV, pos_B, settings):
  """With no grammar, and what was seen in the prompt -> (token_B, logprob_B)."""
  counts_BV = jnp.asarray(seen_BV, jnp.int32)
  drawn = sample_jit(logits_BV, counts_BV, all_of(logits_BV.shape), pos_B, settings, n_top=0)
  return drawn.token_B, drawn.logprob_B


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


def draw_many(n, logits_V, counts_V, mask_W, setting, rows=10_000):
  """n tokens, each at a position of its own, and their log-probabilities."""
  logits_BV, counts_BV, mask_BW = (np.stack([a] * rows) for a in (logits_V, counts_V, mask_W))
  settings, made = stack_settings([setting] * rows), []
  for first in range(0, n, rows):
    pos_B = first + np.arange(rows, dtype=np.int32)
    drawn = sample_jit(logits_BV, counts_BV, mask_BW, pos_B, settings, n_top=0)
    made.append((drawn.token_B, drawn.logprob_B))
  return tuple(np.concatenate(parts) for parts in zip(*made))


@pytest.mark.parametrize("name", ["none", "temperature", "top_k", "top_p", "min_p", "all"])
def test_draws_follow_the_filtered_softmax(name):
  """Chi-square of 100,000 draws, each at a position of its own."""
  n, setting = 100_000, dataclasses.replace(SETTINGS[name], seed=11)
  rng = np.random.default_rng(1)
  logits_V = rng.normal(size=V).astype(np.float32)
  seen = np.arange(0, V, 3)
  counts_V = np.isin(np.arange(V), seen).astype(np.int32)
  token_B, _ = draw_many(n, logits_V, counts_V, all_of((1, V))[0], setting)
  probs_V = softmax(warp(logits_V, seen, setting))
  count_V = np.bincount(token_B, minlength=V)
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


def test_nothing_that_others_ask_for_changes_a_row():
  """Bias, penalties, masks, stop ids and log-probabilities, some asked for by each of 24 rows."""
  rng, B = np.random.default_rng(8), 24
  logits_BV, _, _, counts_BV = random_batch(rng, B)
  kinds = [Sampling(), Sampling(presence_penalty=1.5, top_k=40), Sampling(logit_bias=((3, 9.0),), logprobs=4),
           Sampling(min_tokens=9, stop_ids=(3, 4), frequency_penalty=0.5), Sampling(top_p=0.7, logprobs=20)]
  requests = [dataclasses.replace(kinds[i % 5], seed=i) for i in range(B)]
  mask_BW = rng.integers(0, 2**32, (B, 2), np.uint32)
  mask_BW[::2] = ALL
  pos_B = np.arange(B, dtype=np.int32)
  run = lambda rows: sample_jit(logits_BV[rows], counts_BV[rows], mask_BW[rows], pos_B[rows], stack_settings(
      [requests[i] for i in rows], [0] * len(rows), (5,)), n_top=20)
  together = run(np.arange(B))
  for i in range(B):
    for one, all_B in zip(jax.tree.leaves(run(np.array([i]))), jax.tree.leaves(together)):
      np.testing.assert_allclose(one[0], all_B[i], rtol=1e-5, err_msg=str(requests[i]))


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
  ("seed", -1), ("seed", 2**32), ("temperature", 1e-13), ("temperature", 1.1e6), ("max_tokens", 2**31),
  ("max_tokens", True), ("repetition_penalty", 1e-4), ("repetition_penalty", 1001), ("top_p", float("nan")),
  ("presence_penalty", 2.01), ("presence_penalty", float("nan")), ("frequency_penalty", -2.01),
  ("logit_bias", ((64, 1.0),)), ("logit_bias", ((-1, 1.0),)), ("logit_bias", ((1, 101.0),)),
  ("logit_bias", ((1, float("nan")),)), ("logit_bias", ((1, 1.0), (1, 1.0))), ("logit_bias", ((1.5, 1.0),)),
  ("logit_bias", tuple((i, 1.0) for i in range(301))), ("stop_ids", (64,)), ("stop_ids", (-1,)),
  ("stop_ids", (1, 2, 3, 4, 5)), ("min_tokens", -1), ("min_tokens", 129), ("logprobs", 21), ("logprobs", -1),
  ("logprobs", 1.5), ("prompt_logprobs", 21)])
def test_settings_out_of_range_are_named(name, value):
  with pytest.raises(ValueError, match=f"{name}="):
    dataclasses.replace(Sampling(), **{name: value}).validate(vocab_size=64)


def test_settings_at_their_limits_are_taken():
  Sampling(max_tokens=0, prompt_logprobs=0).validate()
  with pytest.raises(ValueError, match="max_tokens=0"):
    Sampling(max_tokens=0, logprobs=1).validate()
  Sampling(temperature=1e-12, min_tokens=128, logprobs=20, prompt_logprobs=20, stop_ids=(0, 1, 2, 63),
           logit_bias=tuple((i, (-1) ** i * 100.0) for i in range(64)), presence_penalty=-2,
           frequency_penalty=2).validate(64)
  Sampling(logit_bias=tuple((i, 1.0) for i in range(300))).validate()


# Filters against transformers itself.

@pytest.mark.parametrize("kind", LOGITS)
def test_filters_equal_transformers_own(kind):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  rng = np.random.default_rng(7)
  settings = [Sampling(temperature=0.7), Sampling(top_k=9), Sampling(top_p=0.63), Sampling(min_p=0.2),
              Sampling(repetition_penalty=1.9),
              Sampling(temperature=1.3, top_k=30, top_p=0.87, min_p=0.02, repetition_penalty=0.8)]
  settings = [s for s in settings for _ in range(20)]
  logits_BV = np.stack([LOGITS[kind](rng) for _ in settings]).astype(np.float32)
  seen_BV = rng.random(logits_BV.shape) < 0.3
  ours_BV = warp_ours(logits_BV, seen_BV, settings)
  for i, s in enumerate(settings):
    ids, scores = torch.tensor(np.flatnonzero(seen_BV[i])[None]), torch.tensor(logits_BV[i][None])
    for name, value in (
        ("RepetitionPenaltyLogitsProcessor", s.repetition_penalty),
        ("TemperatureLogitsWarper", s.temperature), ("TopKLogitsWarper", s.top_k),
        ("TopPLogitsWarper", s.top_p), ("MinPLogitsWarper", s.min_p)):
      if value is not None:
        scores = getattr(transformers, name)(value)(ids, scores)
    theirs_V = scores[0].numpy()
    if s.top_p and kind in ("ties", "flat"):  # torch.sort orders what ties as it likes: their number is sure.
      ours_kept, theirs_kept = np.isfinite(ours_BV[i]), np.isfinite(theirs_V)
      np.testing.assert_allclose(np.sort(ours_BV[i][ours_kept]), np.sort(theirs_V[theirs_kept]), rtol=2e-6)
    else:
      np.testing.assert_allclose(ours_BV[i], theirs_V, rtol=2e-6, atol=1e-6, err_msg=str(s))


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_bisection_keeps_what_sorting_keeps(scale):
  """A vocabulary of 5,000 with 0 and -0, padding, what a grammar forbids, and groups that tie."""
  n, rng = 5000, np.random.default_rng(int(scale * 100))
  logits_V = (rng.normal(size=n) * scale).astype(np.float32)
  logits_V[rng.integers(0, n, 900)] = rng.choice([0.0, -0.0, 0.25 * scale, -scale], 900)
  logits_V[4990:], logits_V[:10] = -1e30, -np.inf
  settings = [Sampling(top_k=int(k)) for k in (1, 2, 50, 4000, 4989)]
  settings += [Sampling(top_p=p) for p in (1e-9, 1e-3, 0.1, 0.5, 0.77, 0.95, 0.999, 1 - 1e-6)]
  settings += [Sampling(top_k=300, top_p=0.6), Sampling(top_p=0.9, min_p=0.3), Sampling()]
  kept_BV = warp_ours(np.stack([logits_V] * len(settings)), np.zeros((len(settings), n), bool), settings)
  order = np.lexsort((np.arange(n), logits_V))  # Ascending; of what ties, the lower id first.
  for s, ours_V in zip(settings, kept_BV):
    up = logits_V[order].astype(np.float64)
    up[up < up[-min(s.top_k or n, n)]] = -np.inf
    mass = np.cumsum(softmax(up))
    keep = mass > 1 - np.float64(np.float32(s.top_p or 1)) if (s.top_p or 1) < 1 else up > -np.inf
    keep[-1] = True
    probs = softmax(np.where(keep, up, -np.inf))
    keep &= probs >= (s.min_p or 0) * probs.max()
    doubt = np.abs(mass - (1 - (s.top_p or 1))) < 3e-7  # Where float32 may decide otherwise.
    differ = keep[:, None] != np.isfinite(ours_V[order])[:, None]
    assert not (differ[:, 0] & ~doubt).any(), s
    assert differ.sum() <= doubt.sum()


def test_no_sort_is_left():
  """XLA:CPU takes a quarter of a second to sort the vocabulary for ten rows."""
  arrays = (jnp.zeros((2, V)), jnp.zeros((2, V), jnp.int32), all_of((2, V)), jnp.zeros(2, jnp.int32))
  program = sample_jit.lower(*arrays, stack_settings([Sampling()] * 2), n_top=0).as_text()
  assert "stablehlo.sort" not in program


# Bias, penalties, masks.

def random_batch(rng, B):
  logits_BV = rng.normal(size=(B, V)).astype(np.float32) * 3
  n_made_BV = rng.integers(0, 4, (B, V)) * (rng.random((B, V)) < 0.4)
  in_prompt_BV = rng.random((B, V)) < 0.3
  return logits_BV, n_made_BV, in_prompt_BV, (2 * n_made_BV + in_prompt_BV).astype(np.int32)


def test_bias_and_penalties_are_openais_formula():
  """mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence, over what was generated; before it the
  repetition penalty, over the prompt too; before both the bias."""
  rng = np.random.default_rng(3)
  settings = [Sampling(), Sampling(presence_penalty=0.7), Sampling(frequency_penalty=-0.4),
              Sampling(presence_penalty=-2, frequency_penalty=2, repetition_penalty=1.3),
              Sampling(logit_bias=((0, 100.0), (63, -100.0), (7, 1.5))),
              Sampling(logit_bias=((5, -2.5),), repetition_penalty=1.6, frequency_penalty=0.1)] * 4
  logits_BV, n_made_BV, in_prompt_BV, counts_BV = random_batch(rng, len(settings))
  pos_B = np.zeros(len(settings), np.int32)
  ours_BV = jax.jit(adjust)(logits_BV, counts_BV, all_of(logits_BV.shape), pos_B, stack_settings(settings))
  for i, s in enumerate(settings):
    mu = logits_BV[i].astype(np.float64)
    for token, value in s.logit_bias:
      mu[token] += value
    for j in range(V):
      if s.repetition_penalty and (n_made_BV[i, j] or in_prompt_BV[i, j]):
        mu[j] = mu[j] * s.repetition_penalty if mu[j] < 0 else mu[j] / s.repetition_penalty
      c = n_made_BV[i, j]
      mu[j] = mu[j] - c * s.frequency_penalty - float(c > 0) * s.presence_penalty
    np.testing.assert_allclose(ours_BV[i], mu, rtol=1e-6, atol=1e-5, err_msg=str(s))
  np.testing.assert_array_equal(ours_BV[0], logits_BV[0])


def test_only_what_the_mask_allows_is_drawn_with_renormalised_probabilities():
  rng, n = np.random.default_rng(4), 60_000
  logits_V = rng.normal(size=50).astype(np.float32)  # No multiple of 32.
  allowed = np.array([0, 3, 31, 32, 49])
  mask_W = np.zeros(2, np.uint32)
  for i in allowed:
    mask_W[i // 32] |= np.uint32(1 << i % 32)
  token_B, logprob_B = draw_many(n, logits_V, np.zeros(50, np.int32), mask_W, Sampling(seed=5))
  count_V = np.bincount(token_B, minlength=50)
  probs_V = np.where(np.isin(np.arange(50), allowed), np.exp(logits_V.astype(np.float64)), 0)
  probs_V /= probs_V.sum()
  assert count_V.sum() == count_V[allowed].sum() == n
  chi2 = ((count_V - n * probs_V)[allowed] ** 2 / (n * probs_V[allowed])).sum()
  assert chi2 < 4 + 4 * np.sqrt(8)
  wanted_V = logits_V - np.log(np.exp(logits_V.astype(np.float64)).sum())  # The model's own.
  np.testing.assert_allclose(logprob_B, wanted_V[token_B], atol=1e-5)


def test_the_mask_comes_before_the_filters():
  """The likeliest is forbidden: top-k 1 keeps the likeliest that is not, and greedy takes it."""
  logits_BV = np.array([[5.0, 1.0, 4.0, 0.0]] * 2, np.float32)
  settings = stack_settings([Sampling(top_k=1), Sampling(temperature=0.0)])
  mask_BW = np.array([[0b1010], [0b1100]], np.uint32)
  drawn = sample_jit(logits_BV, np.zeros((2, 4), np.int32), mask_BW, np.zeros(2, np.int32), settings, n_top=0)
  assert drawn.token_B.tolist() == [1, 2]
  with pytest.raises(ValueError, match="a bit for each of 4 logits"):
    adjust(jnp.asarray(logits_BV), jnp.zeros((2, 4), jnp.int32), np.zeros((2, 2), np.uint32),
           jnp.zeros(2, jnp.int32), settings)


def test_no_stop_id_before_min_tokens():
  """Prompts of 10: the engine's stop id 3 and the request's 2 only from position 10 + min_tokens on."""
  logits_V = np.array([0.0, 1.0, 9.0, 10.0] + [-5.0] * (V - 5) + [2.0], np.float32)
  requests = [Sampling(temperature=0.0, min_tokens=n, stop_ids=ids) for n, ids in (
      (0, ()), (2, ()), (2, (2,)), (2, (2,)), (2, (2,)), (3, (2, 63)))]
  pos_B = np.array([10, 10, 10, 11, 12, 12], np.int32)
  settings = stack_settings(requests, [10] * 6, stop_ids=(3,))
  run = lambda mask_BW: sample_jit(np.stack([logits_V] * 6), np.zeros((6, V), np.int32), mask_BW, pos_B,
                                   settings, n_top=0).token_B.tolist()
  assert run(all_of((6, V))) == [3, 2, 63, 63, 3, 1]
  mask_BW = all_of((6, V))
  mask_BW[:] = [[0b1100, 0]]  # A grammar at its end allows nothing else: then it ends.
  assert run(mask_BW) == [3, 2, 3, 3, 3, 3]
  with pytest.raises(ValueError, match="at most 4"):
    stack_settings(requests, stop_ids=(1, 2, 3, 4, 5))


# Log-probabilities.

def test_top_logprobs_are_the_models_own_and_only_where_asked():
  rng = np.random.default_rng(9)
  logits_BV = np.round(rng.normal(size=(4, V)) * 3).astype(np.float32)  # With ties.
  requests = [Sampling(logprobs=n, temperature=0.0, logit_bias=((1, 100.0),)) for n in (20, 3, None, 0)]
  zeros_B, counts_BV = np.zeros(4, np.int32), np.zeros((4, V), np.int32)
  settings = stack_settings(requests)
  drawn = sample_jit(logits_BV, counts_BV, all_of((4, V)), zeros_B, settings, n_top=20)
  assert drawn.token_B.tolist() == [1] * 4
  logprob_BV = logits_BV - np.log(np.exp(logits_BV.astype(np.float64)).sum(1, keepdims=True))
  for i, n in enumerate((20, 3, 0, 0)):
    order = np.lexsort((np.arange(V), -logits_BV[i]))[:n]
    assert drawn.top_id_Bn[i, :n].tolist() == order.tolist()
    np.testing.assert_allclose(drawn.top_logprob_Bn[i, :n], logprob_BV[i, order], atol=1e-5)
    assert not np.any(drawn.top_id_Bn[i, n:]) and not np.any(drawn.top_logprob_Bn[i, n:])
    assert float(drawn.logprob_B[i]) == pytest.approx(logprob_BV[i, 1], abs=1e-5)
  token_B = np.array([5, 0, 63, 2], np.int32)
  told = measure(logits_BV, token_B, np.array([2, 0, 0, 0]), n_top=2)  # As for the tokens of a prompt.
  np.testing.assert_allclose(told[0], logprob_BV[np.arange(4), token_B], atol=1e-5)
  assert told[1][0].tolist() == drawn.top_id_Bn[0, :2].tolist()


# The draw.

def keys(n):
  return jax.random.split(jax.random.key(1), n)


def test_a_draw_is_never_of_mass_zero():
  """With blocks and places that hold nothing, and next to nothing."""
  n, rng = 700, np.random.default_rng(5)
  scores_BV = np.full((400, n), -np.inf, np.float32)
  for i in range(400):
    live = rng.choice(n, rng.integers(1, 6), replace=False)
    scores_BV[i, live] = rng.normal(size=len(live)) * 30
  token_B = np.asarray(jax.jit(draw_from)(scores_BV, keys(400)))
  assert np.isfinite(scores_BV[np.arange(400), token_B]).all()


def test_the_shortest_time_is_no_win_for_what_is_unlikely(monkeypatch):
  """Where the random number is 0, as once in 2**23 times."""
  some_0 = lambda key, shape: jnp.ones(shape).at[jnp.array([1, 5])].set(0)
  monkeypatch.setattr(jax.random, "exponential", some_0)
  scores_V = np.where(np.arange(512) == 0, 0.0, -25.0).astype(np.float32)  # Token 0 has all but 1e-8.
  assert draw_from(scores_V[None], keys(1)).tolist() == [0]


def test_logits_that_differ_by_rounding_draw_the_same():
  """As those of one prompt do that was read by two programs."""
  n, count, rng = 49_152, 2000, np.random.default_rng(7)
  scores_V = rng.normal(size=n).astype(np.float32)
  noise_BV = np.asarray(rng.normal(size=(8, n)) * 1e-5, np.float32)
  draw = jax.jit(lambda scores_V: jax.lax.map(
    lambda key: draw_from(scores_V[None], key[None])[0], keys(count), batch_size=50))
  wanted = np.asarray(draw(scores_V))
  differ = sum((np.asarray(draw(scores_V + noise)) != wanted).sum() for noise in noise_BV)
  assert differ <= 3 and len(set(wanted.tolist())) > 1800, differ


def test_draws_follow_the_softmax_across_blocks():
  """Chi-square of 200,000 draws from 1,000 tokens, sums of ten of them."""
  n, count = 1000, 200_000
  scores_V = np.random.default_rng(6).normal(size=n).astype(np.float32) * 2
  tokens = jax.lax.map(lambda key: draw_from(scores_V[None], key[None])[0], keys(count), batch_size=1000)
  wanted = softmax(scores_V).reshape(-1, 10).sum(1) * count
  got = np.bincount(np.asarray(tokens), minlength=n).reshape(-1, 10).sum(1)
  chi2 = ((got - wanted) ** 2 / wanted).sum()
  assert chi2 < 99 + 4 * np.sqrt(2 * 99), chi2


def test_rows_of_settings_are_made_once():
  """The engine stacks them every step."""
  s = Sampling(logit_bias=tuple((i, 1.0) for i in range(300)))
  assert _settings_row(s, (1,)) is _settings_row(dataclasses.replace(s), (1,))
  stacked = stack_settings([s, Sampling(seed=2**32 - 1, top_k=10**12)], [5, 6])
  assert stacked.bias_BI.shape == (2, 300) and stacked.bias_BI[0].sum() == 300
  assert stacked.seed_B.tolist() == [0, 2**32 - 1] and stacked.top_k_B.tolist() == [2**31 - 1] * 2

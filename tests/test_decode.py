"""Decode is the model that was trained: caches against the forward pass, batches against single requests."""
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from infer.decode import Generator, Stats, cast_params, draw_any
from infer.sampling import Sampling, stack_settings
from model.attention import ATTENTION
from model.cache import init_cache
from model.config import ModelConfig
from model.kernels.attention import KERNEL, UNALIGNED
from model.sharding import make_mesh, place
from model.transformer import init_params
from tests.tiny import MOE, experiment_classes, mesh_of, tiny, variants, with_attention
from tests.tiny import put as put_batch

T = 144  # More than a block of keys of the chunked kernel, and many windows.
CHUNK = 8
LENGTHS = (T, 100, 37)  # Of the rows of a ragged batch.
CACHES = {
  "dense": {},
  "ring": {"window": 5},  # Shorter than a chunk of prefill.
  "mixed": {"window": 12, "layer_pattern": ("local", "global")},
}
PLANS = {  # How many tokens each call adds.
  "whole": [T],
  "chunks": [CHUNK] * (T // CHUNK),
  "chunk, then tokens": [CHUNK] + [1] * (T - CHUNK),
}
GREEDY = Sampling(temperature=0.0, max_tokens=20)


def make_config(**kwargs):
  base = {"vocab_size": 300, "n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "init": "fan_in",
          "precision": "fp32"}  # fan_in: logits of order 1, so that a tolerance means something.
  return ModelConfig(**base | kwargs).validate()


def one_device():
  return mesh_of("one")


@functools.cache
def make_params(cfg):
  with jax.set_mesh(one_device()):
    return init_params(cfg, one_device(), jax.random.key(0))


@functools.cache
def make_generator(cfg, mesh=None, **kwargs):
  """Shared by the tests, with what it has compiled."""
  return Generator(cfg, make_params(cfg)[1], mesh or one_device(), **{"prefill_chunk": 32} | kwargs)


def random_prompts(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(3, 300, n).tolist() for n in lengths]


def collect(generator, prompts, settings):
  """[(ids, logprobs, finish)] of each request."""
  made = [([], [], []) for _ in prompts]
  for token in generator.generate(prompts, settings):
    for column, value in zip(made[token.request], (token.id, token.logprob, token.finish)):
      column.append(value)
  return made


# Teacher-forced: the caches against the forward pass.

def put(rows):
  return jax.device_put(rows, place(one_device(), jax.P(("data", "fsdp", "expert"), None)))


def forward_logits(graphdef, params, tokens_BT):
  pos_BT = np.arange(T)[None].repeat(len(tokens_BT), 0)
  return np.asarray(_forward(graphdef, params, put(tokens_BT), put(pos_BT)))


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, params, tokens_BT, pos_BT):
  model = nnx.merge(graphdef, params)
  return model.logits(model(tokens_BT, pos_BT, jnp.ones_like(pos_BT))[0])


@functools.partial(jax.jit, static_argnums=0)
def extend_logits(graphdef, params, tokens_BT, pos_BT, segment_BT, caches):
  model = nnx.merge(graphdef, params)
  x_BTD, caches = model.extend(tokens_BT, pos_BT, segment_BT, caches)
  return model.logits(x_BTD), caches


def forced_logits(cfg, graphdef, params, tokens_BT, plan, lengths=LENGTHS):
  """[B, T, V] through caches, rows ending at their lengths."""
  caches, done, out = init_cache(cfg, len(tokens_BT), T), 0, []
  for n in plan:
    pos_BT = np.broadcast_to(np.arange(done, done + n, dtype=np.int32), (len(tokens_BT), n))
    segment_BT = (pos_BT < np.array(lengths)[:, None]).astype(np.int32)
    rows = put((tokens_BT[:, done:done + n], pos_BT, segment_BT))
    logits_BTV, caches = extend_logits(graphdef, params, *rows, caches)
    out.append(np.asarray(logits_BTV))
    done += n
  return np.concatenate(out, axis=1)


# What another serves in decode is interpreted in the forward pass, slowly: once.
DECODED = [case for case in itertools.product([*ATTENTION, *experiment_classes("Attention")], KERNEL, CACHES)
           if case[1] not in UNALIGNED and (case[0] != "mla" or case[1:] in (("plain", "mixed"),
                                                                             ("chunked", "dense")))]


@pytest.mark.parametrize("attention, impl, cache", [*DECODED, *(("gqa", impl, "ring") for impl in UNALIGNED)])
def test_decode_equals_the_forward_pass(attention, impl, cache):
  """However calls cut a row, at every position, past windows and blocks; and rows do not see each other."""
  cfg = make_config(**with_attention(attention), attention_impl=impl, **CACHES[cache])
  graphdef, params = make_params(cfg)
  rng = np.random.default_rng(1)
  tokens_BT = rng.integers(0, 300, (len(LENGTHS), T)).astype(np.int32)
  with jax.set_mesh(one_device()):
    wanted_BTV = forward_logits(graphdef, params, tokens_BT)[..., :300]
    assert wanted_BTV.std() > 0.3
    for name, plan in PLANS.items():
      got_BTV = forced_logits(cfg, graphdef, params, tokens_BT, plan)[..., :300]
      for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(got_BTV[row, :length], wanted_BTV[row, :length], atol=1e-5, err_msg=name)
    # Other rows and all padding changed: not one bit of row 1 moves.
    other_BT = rng.integers(0, 300, tokens_BT.shape).astype(np.int32)
    other_BT[1, :LENGTHS[1]] = tokens_BT[1, :LENGTHS[1]]
    moved_BTV = forced_logits(cfg, graphdef, params, other_BT, plan, lengths=(50, LENGTHS[1], T))[..., :300]
    np.testing.assert_array_equal(moved_BTV[1, :LENGTHS[1]], got_BTV[1, :LENGTHS[1]])


@pytest.mark.parametrize("name", [n for n in variants() if not n.startswith(("attention", "window"))])
def test_every_variant_decodes_as_it_reads(name):
  """Prefill in chunks against the forward pass, for what else the tables and experiments/ offer."""
  cfg, mesh, graphdef, params, logits = tiny(name)
  B, S = 8, 48
  tokens_BS = np.random.default_rng(2).integers(0, 300, (B, S)).astype(np.int32)
  pos_BS = np.arange(S, dtype=np.int32)[None].repeat(B, 0)
  batch = {"tokens": tokens_BS, "positions": pos_BS, "segments": np.ones_like(pos_BS)}
  wanted_BSV = logits(params, batch)
  with jax.set_mesh(mesh):
    caches = init_cache(cfg, B, S)
    for start in range(0, S, 12):
      part = put_batch(cfg, mesh, {key: a[:, start:start + 12] for key, a in batch.items()})
      got_BTV, caches = extend_logits(graphdef, params, *part.values(), caches)
      np.testing.assert_allclose(got_BTV[..., :300], wanted_BSV[:, start:start + 12], atol=1e-5, rtol=0)


@pytest.mark.parametrize("cache, slots", [("dense", 2 * 64), ("ring", 2 * 5), ("mixed", 12 + 64)])
def test_caches_hold_what_they_must_and_no_more(cache, slots):
  cfg = make_config(**CACHES[cache])
  with jax.set_mesh(one_device()):
    caches = jax.eval_shape(lambda: init_cache(cfg, 3, 64))
  kv = [a for a in jax.tree.leaves(caches) if a.ndim == 4]
  assert sum(math.prod(a.shape) for a in kv) == 2 * 3 * slots * cfg.n_kv_heads * cfg.head_dim


# The generator.

@pytest.mark.parametrize("cache", CACHES)
def test_generated_tokens_are_drawn_from_the_forward_pass(cache):
  """Each token again, from the logits of the sequence read as one row without a cache."""
  cfg = make_config(**CACHES[cache])
  prompts = random_prompts([100, 1, 30])
  settings = [GREEDY, Sampling(top_p=0.9, repetition_penalty=1.5, seed=7, max_tokens=20),
              dataclasses.replace(GREEDY, repetition_penalty=2.0)]
  made = collect(make_generator(cfg), prompts, settings)
  rows = [prompt + ids for prompt, (ids, _, _) in zip(prompts, made)]
  rows_BT = np.array([row + [0] * (T - len(row)) for row in rows], np.int32)
  with jax.set_mesh(one_device()):
    logits_BTV = forward_logits(*make_params(cfg), rows_BT)
  for i, (ids, logprobs, finish) in enumerate(made):
    logits_TV, row, prompt, setting = logits_BTV[i], rows[i], prompts[i], settings[i]
    pos_T = np.arange(len(prompt), len(row), dtype=np.int32)
    counts_TV = np.zeros((len(ids), logits_TV.shape[-1]), np.int32)
    for counts_V, pos in zip(counts_TV, pos_T):
      counts_V[prompt] = 1
      np.add.at(counts_V, row[len(prompt):pos], 2)
    stacked = stack_settings([setting] * 20)
    token_T, logprob_T = jax.jit(draw_any)(logits_TV[pos_T - 1], counts_TV, pos_T, stacked)
    np.testing.assert_array_equal(ids, token_T)
    np.testing.assert_allclose(logprobs, logprob_T, atol=1e-5)
    assert finish == [None] * 19 + ["length"]


@pytest.mark.slow  # Of the engine, which takes its place: tests/test_engine.py.
def test_a_batch_gives_what_each_request_gives_alone():
  """32 ragged requests with settings of every kind, over chunk and window borders: token for token."""
  cfg = make_config(**CACHES["mixed"])
  rng = np.random.default_rng(3)
  prompts = random_prompts(rng.integers(1, 90, 32))
  kinds = [GREEDY, Sampling(), Sampling(top_k=9, temperature=0.7), Sampling(min_p=0.1),
           Sampling(top_p=0.8, repetition_penalty=1.3)]
  n_tokens = rng.integers(1, 30, 32).tolist()
  settings = [dataclasses.replace(kinds[i % 5], seed=i, max_tokens=n_tokens[i]) for i in range(32)]
  generator = make_generator(cfg)
  together = collect(generator, prompts, settings)
  in_fours = collect(make_generator(cfg, batch_size=4, steps_per_call=3), prompts, settings)
  for i in range(32):
    assert together[i][0] == in_fours[i][0] and together[i][2] == in_fours[i][2], i
    assert len(together[i][0]) == settings[i].max_tokens
  for i in range(0, 32, 5):
    (ids, logprobs, _), = collect(generator, [prompts[i]], settings[i])
    assert ids == together[i][0], i
    np.testing.assert_allclose(logprobs, together[i][1], atol=1e-5)


def test_another_row_changes_nothing_exactly():
  cfg = make_config(**CACHES["mixed"])
  generator, settings = make_generator(cfg), [Sampling(seed=i, max_tokens=20) for i in range(2)]
  mine, one, other = random_prompts([30, 25, 7])
  first = collect(generator, [mine, one], settings)
  settings[1] = dataclasses.replace(GREEDY, max_tokens=3)
  second = collect(generator, [mine, other], settings)
  assert first[0] == second[0]


@pytest.mark.parametrize("sizes, changes", [
  pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, {}, marks=pytest.mark.slow),
  ({"fsdp": 2, "tensor": 4}, {}),  # 4 devices for 2 kv heads.
  pytest.param({"expert": 2, "stage": 2, "seq": 2}, MOE | dict(n_kv_heads=1, n_layers=8, pipeline_repeats=2),
               marks=pytest.mark.slow)])
def test_sharded_decode_equals_one_device(sizes, changes):
  """The parameters come as training holds them: split over "fsdp" and "stage" too."""
  cfg, mesh = make_config(**CACHES["mixed"] | changes), make_mesh(**sizes)
  with jax.set_mesh(mesh):
    _, params = init_params(cfg, mesh, jax.random.key(0))
  prompts = random_prompts([40, 3, 17, 1, 60])
  settings = [dataclasses.replace(GREEDY, max_tokens=9)]
  settings += [Sampling(top_k=50, seed=i, max_tokens=18) for i in range(4)]
  wanted = collect(make_generator(cfg), prompts, settings)
  got = collect(Generator(cfg, params, mesh, prefill_chunk=32), prompts, settings)
  for (ids, logprobs, finish), (ids_, logprobs_, finish_) in zip(wanted, got):
    assert ids == ids_ and finish == finish_
    np.testing.assert_allclose(logprobs, logprobs_, atol=1e-5)


def test_each_program_compiles_once():
  """New prompts, lengths within the bucket, and settings compile nothing, not even one small operation."""
  compiled = []
  listen = lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
  generator = make_generator(make_config(**CACHES["mixed"]), stop_ids=(2,))
  collect(generator, random_prompts([40, 20, 3]), GREEDY)
  assert sorted(generator.programs) == [
      ("decode", (4, 64)), ("prefill", (4, 64, 16)), ("prefill", (4, 64, 32)), ("start", (4, 64))]
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    settings = Sampling(top_p=0.5, repetition_penalty=1.1, max_tokens=9)
    collect(generator, random_prompts([41, 33, 1, 2], seed=1), settings)
    assert not compiled
    collect(generator, random_prompts([70], seed=1), GREEDY)  # Another bucket: the listener does listen.
    assert compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("cache", CACHES)
def test_caches_are_updated_in_place(cache):
  """Donated buffers are reused, and none is copied as it lies; XLA:CPU may still transpose one to read it."""
  cfg = make_config(**CACHES[cache])
  generator = make_generator(cfg)
  collect(generator, random_prompts([20, 30]), GREEDY)
  with jax.set_mesh(one_device()):
    caches = jax.eval_shape(lambda: init_cache(cfg, 2, 64))
  n_bytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(caches))
  for (name, (B, *_)), program in generator.programs.items():
    if name != "start" and B == 2:
      assert program.memory_analysis().alias_size_in_bytes >= n_bytes, name
  text = generator.programs["decode", (2, 64)].as_text()
  big = {",".join(map(str, a.shape)) for a in jax.tree.leaves((caches, generator._weights)) if a.size >= 1024}
  copies = [line for line in text.splitlines() if " copy(" in line and any(f"[{s}]" in line for s in big)]
  assert not copies


def test_stop_ids_end_a_text_and_are_reported():
  cfg = make_config()
  prompt, = random_prompts([10])
  (ids, _, _), = collect(make_generator(cfg), [prompt], GREEDY)
  at = next(i for i in range(9, 20) if ids[i] not in ids[:i])  # Beyond the first call's tokens.
  (cut, _, finish), = collect(make_generator(cfg, stop_ids=(299, ids[at])), [prompt], GREEDY)
  assert cut == ids[:at + 1]
  assert finish == [None] * at + ["stop"]


def test_a_cancelled_request_gets_no_more_tokens(monkeypatch):
  prompts, cancelled, count, done = random_prompts([10, 12]), set(), [0, 0], []
  generator = make_generator(make_config(), steps_per_call=4)
  stats = generator.stats = Stats()
  call = generator._call

  def watch(name, *args):
    result = call(name, *args)
    done.extend([np.asarray(result[0].done_B).tolist()] if name == "decode" else [])
    return result

  monkeypatch.setattr(generator, "_call", watch)
  for token in generator.generate(prompts, dataclasses.replace(GREEDY, max_tokens=50), cancelled=cancelled):
    count[token.request] += 1
    if token.request == 0 and count[0] == 6:
      cancelled.add(0)
  assert count == [6, 50]
  assert stats.decode_tokens == 56 and stats.prefill_tokens == 22
  assert done[3] == [True, False]  # On the device too: told in the call after the one in flight.


@pytest.mark.parametrize("attention, ffn", [(a, "swiglu") for a in ATTENTION])
def test_casting_weights_once_changes_no_bit(attention, ffn):
  """bf16: what is cast ahead is exactly what the forward pass casts at each use."""
  more = {} if attention == "mla" else dict(qk_norm="rmsnorm", qk_norm_over="all", qkv_bias=True)
  cfg = make_config(precision="bf16", ffn=ffn, norm="layernorm", ffn_bias=True, out_bias=True,
                    **with_attention(attention), **more)
  graphdef, params = make_params(cfg)
  rng = np.random.default_rng(0)
  noisy = lambda a: (a + 0.1 * rng.normal(size=a.shape)).astype(np.float32)
  params = jax.tree.map(noisy, jax.device_get(params))
  tokens_BT = rng.integers(0, 300, (len(LENGTHS), T)).astype(np.int32)
  with jax.set_mesh(one_device()):
    cast = cast_params(cfg, params)
    assert cast["embed"].dtype == jnp.bfloat16 and cast["final_norm"]["scale"].dtype == jnp.float32
    both = [forced_logits(cfg, graphdef, p, tokens_BT, [CHUNK, CHUNK]) for p in (params, cast)]
  np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("prompts, settings, words", [
  ([[1], []], GREEDY, "prompt 1 is empty"),
  ([[1, 300]], GREEDY, "token 300 is outside the vocabulary of 300"),
  ([[1]], [GREEDY, GREEDY], "2 settings for 1 prompts"),
  ([[1]], Sampling(top_p=2.0), "top_p=2.0")])
def test_mistakes_are_named_before_anything_runs(prompts, settings, words):
  with pytest.raises(ValueError, match=words):
    make_generator(make_config()).generate(prompts, settings)


def test_a_text_longer_than_the_table_of_positions_is_refused():
  generator = make_generator(make_config(n_layers=1, positions="learned", max_length=30))
  with pytest.raises(ValueError, match="prompt 0.*max_tokens=20.*model.max_length=30.*nearest valid.*: 5"):
    generator.generate([[1] * 25], GREEDY)


def test_which_requests_share_a_batch_decides_nothing_about_experts():
  """A model trained with room for so many tokens decodes without a limit: alone or beside another row."""
  cfg = make_config(**MOE | dict(dispatch="capacity", capacity_factor=0.5))
  mine, other = random_prompts([20, 30])
  alone = collect(make_generator(cfg), [mine], [GREEDY])
  beside = collect(make_generator(cfg), [mine, other], [GREEDY, GREEDY])
  assert alone[0][0] == beside[0][0]
  np.testing.assert_allclose(alone[0][1], beside[0][1], atol=1e-5)

"""The engine: every token is the model's, whatever else runs, wherever pages, chunks and meshes cut."""
import dataclasses
import functools
import math
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from infer.beam import BeamSearch
from infer.engine import Engine, Request, Scored
from infer.sampling import Sampling, sample, stack_settings
from model.config import ModelConfig
from model.hub.orbax import Unread
from model.sharding import make_mesh
from tests.tiny import MLA, MOE, make_params, mesh_of

V = 20  # So few that the twenty likeliest are all.
CASES = {
  "gqa": {},
  "mixed windows": {"window": 12, "layer_pattern": ("local", "global"), "attention_softcap": 5.0},
  "mla": MLA,
  "moe": {**MOE, "qk_norm": "rmsnorm"},
  "repeats": {**MOE, "n_kv_heads": 1, "n_layers": 8, "pipeline_repeats": 2},
}


def make_config(**changes):
  base = {"vocab_size": V, "n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "init": "fan_in",
          "precision": "fp32"}  # fan_in: logits of order 1, so that a tolerance means something.
  return ModelConfig(**base | changes).validate()


@functools.cache
def params_of(case, mesh=None):
  """As training holds them, split over all axes."""
  cfg, mesh = make_config(**CASES[case]), mesh or mesh_of("one")
  return cfg, *make_params(cfg, mesh)


@functools.cache
def make_engine(case, mesh=None, **settings):
  """Shared by the tests, with what it has compiled."""
  cfg, _, params = params_of(case, mesh)
  return Engine(cfg, params, mesh or mesh_of("one"),
                **{"slots": 4, "page_size": 4, "max_length": 200, "prefill_chunk": 16,
                   "row_buckets": (4,)} | settings)


@functools.cache
def _forward(case):
  cfg, graphdef, _ = params_of(case)

  def run(params, tokens_BT):
    model = nnx.merge(graphdef, params)
    pos_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return model.logits(model(tokens_BT, pos_BT, jnp.ones_like(pos_BT))[0])[..., :V]

  return jax.jit(run)


def forward_logprobs(case, tokens):
  """[T, V] of the training forward pass."""
  logits_TV = forward_logits(case, tokens).astype(np.float64)
  return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))


def forward_logits(case, tokens):
  mesh, rows = mesh_of("one"), np.zeros((1, 200), np.int32)
  rows[0, :len(tokens)] = tokens
  with jax.set_mesh(mesh):
    put = jax.device_put(rows, jax.NamedSharding(mesh, jax.P(("data", "fsdp", "expert"), None)))
    return np.asarray(_forward(case)(params_of(case)[2], put))[0, :len(tokens)]


def plain_beams(case, prompt, width, n):
  """[(tokens, sum)] by the forward pass over whole texts; nothing ends before n tokens."""
  texts = [([], 0.0)]
  for _ in range(n):
    texts = [([*tokens, token], total + logprob) for tokens, total in texts
             for token, logprob in enumerate(forward_logprobs(case, prompt + tokens)[-1].tolist())]
    texts = sorted(texts, key=lambda text: -text[1])[:width]
  return texts


class Forced:
  """A grammar of one text: so the log-probabilities of a given text are seen, made token by token."""

  def __init__(self, tokens):
    self.left, self.done = list(tokens), False

  def mask(self):
    return np.array([1 << self.left[0]], np.uint32)

  def push(self, token):
    assert token == self.left.pop(0)


def run(engine, requests):
  """(events of each request, in order)."""
  events = {engine.submit(r): [] for r in requests}
  while engine.has_work:
    for event in engine.step():
      events[event.request].append(event)
  assert engine.gauges()["pages_used"] == 0
  return list(events.values())


def spread(top):
  """((id, logprob), ...) of all tokens -> [V]."""
  out = np.full(V, np.nan)
  for id, logprob in top:
    out[id] = logprob
  return out


def forced_logprobs(engine, texts):
  """[T - 1, V] of each (tokens, length of the prompt): the prompt's are scored, the others made."""
  requests = [Request(prompt=tokens[:n], grammar=Forced(tokens[n:]), sampling=Sampling(
    max_tokens=len(tokens) - n, logprobs=V, prompt_logprobs=V)) for tokens, n in texts]
  found = []
  for (tokens, n), events in zip(texts, run(engine, requests)):
    out, made = np.full((len(tokens), V), np.nan), n
    for e in events:
      if isinstance(e, Scored):
        for i, top in enumerate(e.top):
          out[e.start + i - 1] = spread(top)
        np.testing.assert_array_equal(e.logprobs, [out[e.start + i - 1, tokens[e.start + i]]
                                                   for i in range(len(e.logprobs))])
      else:
        out[made - 1] = spread(e.top)
        assert e.id == tokens[made] and e.logprob == out[made - 1, e.id]
        made += 1
    assert made == len(tokens) and events[-1].finish == "length"
    found.append(out[:-1])
  return found


def texts_of(*lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [(rng.integers(0, V, n).tolist(), at) for n, at in lengths]


LENGTHS = ((150, 145), (60, 33), (21, 1), (16, 15), (40, 16))  # Past many pages, chunks and a block of keys.


@pytest.mark.parametrize("case, settings", [
  ("mixed windows", {}), ("mla", {}), ("moe", {"prefill_chunk": 64}),
  pytest.param("gqa", {}, marks=pytest.mark.slow)])
def test_every_token_is_the_forward_pass(case, settings):
  """Prefill in chunks and decode, in pages, five requests together. A chunk of 64 tokens is read alone."""
  engine, texts = make_engine(case, **settings), texts_of(*LENGTHS)
  for (tokens, _), got in zip(texts, forced_logprobs(engine, texts)):
    np.testing.assert_allclose(got, forward_logprobs(case, tokens)[:-1], atol=1e-4)
  if settings:
    assert set(engine.programs) == {(4, 0), (3, 32), (0, 64)}


@pytest.mark.parametrize("case, sizes", [
  ("gqa", dict(tensor=2, data=2)),
  pytest.param("mla", dict(tensor=2, fsdp=2), marks=pytest.mark.slow),
  pytest.param("moe", dict(expert=2, tensor=2), marks=pytest.mark.slow),
  pytest.param("repeats", dict(expert=2, stage=2, seq=2), marks=pytest.mark.slow),
  pytest.param("mixed windows", dict(tensor=4), marks=pytest.mark.slow)])  # Two kv heads on four devices.
def test_on_a_mesh_too(case, sizes):
  n = np.prod(list(sizes.values()))
  mesh, texts = make_mesh(**sizes, devices=jax.devices()[:n]), texts_of(*LENGTHS)
  for (tokens, _), got in zip(texts, forced_logprobs(make_engine(case, mesh), texts)):
    np.testing.assert_allclose(got, forward_logprobs(case, tokens)[:-1], atol=1e-4)
  prompts = [texts[4][0][:n] for n in (7, 12, 13)]
  for prompt, (found,) in zip(prompts, run(make_engine(case, mesh), [Request(
      prompt=p, beams=BeamSearch(width=2, n=2), sampling=Sampling(max_tokens=6)) for p in prompts])):
    assert [list(text.tokens) for text in found.texts] == [t for t, _ in plain_beams(case, prompt, 2, 6)]


def test_a_way_reads_a_prompt_while_another_is_full():
  engine = make_engine("gqa", mesh_of("all"), row_buckets=(1,))
  ways, each = engine.n_ways, engine.slots
  alone = make_engine("gqa")
  make = lambda i: Request(prompt=[1 + i, 2, 3], sampling=Sampling(temperature=0.0, max_tokens=12))
  texts, ids = {}, [engine.submit(make(i)) for i in range(ways * each - 1)]
  for step in range(200):
    if step == 6:  # All others make tokens.
      ids.append(engine.submit(make(len(ids))))
    for token in engine.step():
      texts.setdefault(token.request, []).append(token.id)
    if step > 6 and not engine.has_work:
      break
  assert ways > 1 and len(texts) == ways * each
  for i, id in enumerate(ids):
    assert texts[id] == [t.id for t in alone.generate([make(i).prompt], make(i).sampling)]


def test_after_prefix_hits_eviction_and_preemption():
  """In so few pages that requests take each other's, twice over, so that the second time begins with hits."""
  engine = make_engine("gqa", n_pages=44)
  texts = [(tokens[:n], at) for tokens, at in texts_of((150, 131), (150, 100)) for n in (150, 140)]
  texts += texts_of((90, 10), (90, 10), (90, 10), (90, 10), seed=1)
  requests = [(tokens, max(at - 30, 1)) for tokens, at in texts]
  before = dict(engine.counters)
  for _ in range(2):
    for (tokens, at), events in zip(requests, run(engine, [
        Request(prompt=tokens[:at], grammar=Forced(tokens[at:]), sampling=Sampling(
          max_tokens=len(tokens) - at, logprobs=V)) for tokens, at in requests])):
      want = forward_logprobs("gqa", tokens)
      got = np.array([spread(e.top) for e in events])
      np.testing.assert_allclose(got, want[at - 1:-1], atol=1e-4)
  more = {k: engine.counters[k] - before.get(k, 0) for k in engine.counters}
  assert more["preemptions"] > 5 and more["prefix_hit_tokens"] > 200


def test_layers_with_a_window_keep_what_it_needs():
  """Their pages are used again and again, by rows and by chunks."""
  engine, texts = make_engine("mixed windows", ring_windows=True), texts_of(*LENGTHS)
  sizes = {cache.n_ring: cache.kv_WPcKAH.shape[1] for cache in engine._state.caches}
  assert sizes == {8: 1 + 4 * 8, None: engine.n_pages}  # 12 + 15 tokens lie in at most 8 pages of 4.
  for _ in range(2):  # The second time in pages that hold others' tokens.
    for (tokens, _), got in zip(texts, forced_logprobs(engine, texts)):
      np.testing.assert_allclose(got, forward_logprobs("mixed windows", tokens)[:-1], atol=1e-4)
  assert engine.counters["prefix_hit_tokens"] == 0
  with pytest.raises(ValueError, match="ring_windows"):
    engine.submit(Request(prompt=[1], beams=BeamSearch(width=2, n=1), sampling=Sampling(max_tokens=3)))
  with pytest.raises(ValueError, match="no layer of the model has a window"):
    make_engine("gqa", ring_windows=True)


def test_a_prompt_is_scored_once_though_its_pages_were_lost():
  engine = make_engine("gqa", n_pages=44, keep_prefixes=False)
  events = run(engine, [Request(prompt=tokens, sampling=Sampling(
    max_tokens=30, temperature=0.0, prompt_logprobs=0)) for tokens, _ in texts_of(*[(60, 60)] * 4)])
  assert engine.counters["preemptions"] > 0
  for each in events:
    scored = [pos for e in each if isinstance(e, Scored) for pos in range(e.start, e.start + len(e.logprobs))]
    assert scored == list(range(1, 60))


def test_choices_after_one_context_read_it_once():
  """Each with the scores that the forward pass gives, and that it gets where all of it is scored."""
  engine, rng = make_engine("gqa"), np.random.default_rng(7)
  context = rng.integers(0, V, 45).tolist()
  texts = [context + rng.integers(0, V, n).tolist() for n in (3, 1, 20, 2)]
  before, hits = dict(engine.counters), []
  for score_from in (45, 1, 44):
    got = run(engine, [Request(prompt=t, score_from=score_from, sampling=Sampling(
      max_tokens=0, prompt_logprobs=1)) for t in texts])
    hits.append(engine.counters["prefix_hit_tokens"] - before.get("prefix_hit_tokens", 0))
    for tokens, events in zip(texts, got):
      want = forward_logprobs("gqa", tokens)[score_from - 1:-1]
      assert events[0].start == score_from and [e.finish for e in events] == [None] * (len(events) - 1) + [
        "length"]
      np.testing.assert_allclose([p for e in events for p in e.logprobs],
                                 want[range(len(want)), tokens[score_from:]], atol=1e-4)
      assert [top[0][0] for e in events for top in e.top] == want.argmax(-1).tolist()
  assert hits == [3 * 44, 3 * 44, 3 * 44 + 4 * 40]


def test_int8_pages_are_near_and_do_not_depend_on_company():
  texts = texts_of(*LENGTHS)
  engine = make_engine("gqa", cache_dtype="int8")
  together = forced_logprobs(engine, texts)
  for (tokens, at), got in zip(texts, together):
    want = forward_logprobs("gqa", tokens)[:-1]
    assert 1e-6 < np.abs(got - want).max() < 0.05
    np.testing.assert_allclose(forced_logprobs(engine, [(tokens, at)])[0], got, atol=1e-4)
  prompt = texts[0][0][:10]
  (found,), = run(engine, [Request(prompt=prompt, beams=BeamSearch(width=3, n=3),
                                   sampling=Sampling(max_tokens=8))])
  for text in found.texts:  # A page is copied with its scales.
    got = forced_logprobs(engine, [(prompt + [*text.tokens], 10)])[0]
    np.testing.assert_allclose(text.logprobs, got[range(9, 17), text.tokens], atol=1e-4)


def mixed_requests(n, seed=0):
  """Of all lengths and settings; many begin alike."""
  rng = np.random.default_rng(seed)
  begins = [rng.integers(0, V, k).tolist() for k in (8, 24, 50)]
  out = []
  for i in range(n):
    pick = lambda *values: values[rng.integers(len(values))]
    prompt = [*pick(*begins)[:rng.integers(0, 51)], *rng.integers(0, V, rng.integers(1, 30)).tolist()]
    out.append(Request(prompt=prompt, user=pick("a", "b"), sampling=Sampling(
      max_tokens=int(rng.integers(1, 25)), temperature=pick(0.0, 0.7, 1.0), top_k=pick(None, 5),
      top_p=pick(None, 0.8), min_p=pick(None, 0.02), repetition_penalty=pick(None, 1.3),
      logprobs=pick(None, 3), seed=i,
      presence_penalty=pick(0.0, 0.5), frequency_penalty=pick(0.0, -0.3), stop_ids=pick((), (3,)))))
  return out


def test_what_a_request_gets_does_not_depend_on_company():
  """Forty together, in few pages and known late, against each alone; ten are cancelled on the way."""
  engine = make_engine("gqa", n_pages=30, stop_ids=(7,))
  requests = mixed_requests(40)
  alone = [[(t.id, t.logprob, t.top, t.finish) for t in run(engine, [r])[0]] for r in requests]
  got, steps, rng = {}, 0, np.random.default_rng(1)
  ids = [engine.submit(r) for r in requests]
  cancel = {id: int(rng.integers(0, 120)) for id in rng.choice(ids, 10, replace=False)}
  ended = set()
  while engine.has_work:
    for id, at in cancel.items():
      if at == steps and id not in ended:
        engine.cancel(id)
        ended.add(id)
    for t in engine.step():
      assert t.request not in ended
      got.setdefault(t.request, []).append((t.id, t.logprob, t.top, t.finish))
      if t.finish:
        ended.add(t.request)
    assert sum(map(engine.is_waiting, ids)) == engine.gauges()["waiting"]
    steps += 1
  assert engine.gauges() == {"running": 0, "waiting": 0, "pages_used": 0, "pages_total": 30}
  assert engine.counters["preemptions"] > 0
  for id, want in zip(ids, alone):
    made = got.get(id, [])
    assert len(made) == len(want) or id in cancel
    for (token, logprob, top, finish), other in zip(made, want):
      assert (token, finish) == (other[0], other[3]) and [i for i, _ in top] == [i for i, _ in other[2]]
      np.testing.assert_allclose([logprob, *(x for _, x in top)],
                                 [other[1], *(x for _, x in other[2])], atol=1e-5)


_sample = jax.jit(functools.partial(sample, n_top=0))


def drawn_alone(request, stop_ids):
  """(tokens, finish), each token drawn by infer.sampling after a forward pass over the whole text."""
  s, n, made = request.sampling, len(request.prompt), []
  settings, any_token = stack_settings([s], n, stop_ids), np.full((1, 1), 0xffffffff, np.uint32)
  while len(made) < s.max_tokens:
    logits_1V = forward_logits("gqa", [*request.prompt, *made])[-1:]
    counts_V = 2 * np.bincount(made, minlength=V) + np.isin(np.arange(V), request.prompt)
    counts_1V = counts_V[None].astype(np.int32)
    drawn = _sample(logits_1V, counts_1V, any_token, np.array([n + len(made)]), settings)
    made.append(int(drawn.token_B[0]))
    if made[-1] in (*stop_ids, *s.stop_ids):
      return made, "stop"
  return made, "length"


def test_each_is_drawn_by_its_settings_from_the_forward_pass():
  """With slots and pages that others had, and pages that are lost on the way."""
  engine = make_engine("gqa", n_pages=30, stop_ids=(7,))
  requests = [dataclasses.replace(r, sampling=dataclasses.replace(
    r.sampling, min_tokens=min(i % 8, r.sampling.max_tokens), logit_bias=((i % V, 3.0),)))
    for i, r in enumerate(mixed_requests(20, seed=5))]
  before = engine.counters.get("preemptions", 0)
  for request, events in zip(requests, run(engine, requests)):
    assert ([t.id for t in events], events[-1].finish) == drawn_alone(request, (7,))
  assert engine.counters["preemptions"] > before


def test_a_chunk_is_padded_past_the_last_page():
  texts = texts_of((200, 199))
  np.testing.assert_allclose(forced_logprobs(make_engine("gqa"), texts)[0],
                             forward_logprobs("gqa", texts[0][0])[:-1], atol=1e-4)


def test_what_others_left_in_pages_reaches_nothing():
  engine, texts = make_engine("gqa", n_pages=44, keep_prefixes=False), texts_of((150, 131), (21, 3))
  caches = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), engine._state.caches)
  engine._state = dataclasses.replace(engine._state, caches=caches)
  for (tokens, _), got in zip(texts, forced_logprobs(engine, texts)):
    np.testing.assert_allclose(got, forward_logprobs("gqa", tokens)[:-1], atol=1e-4)


@pytest.mark.parametrize("n", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_compiles_after_warm_up(n):
  """Not even one small operation."""
  compiled = []
  listen = lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
  engine = Engine(*params_of("gqa")[::2], mesh_of("one"), slots=3, page_size=4, max_length=100,
                  prefill_chunk=16)
  engine.warm_up()
  before = engine.counters["compiles"]
  assert before == len(engine.programs) == len(engine.row_buckets) + len(engine.chunk_sizes) + 1
  searches = [Request(prompt=[i] * 9, beams=BeamSearch(width=3), sampling=Sampling(max_tokens=9))
              for i in range(3)]
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    run(engine, mixed_requests(n, seed=3) + searches)
    assert not compiled
    jax.jit(lambda x: x + len(compiled))(1.0)  # The listener does listen.
    assert compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert engine.counters["compiles"] == before and engine.counters["steps"] > 50


def test_compiled_programs_serve_before_they_ran():
  """What ran for a request is not run on nothing any more, and the texts are as after `warm_up`."""
  make = lambda: Engine(*params_of("gqa")[::2], mesh_of("one"), slots=4, page_size=4, max_length=200,
                        prefill_chunk=16, row_buckets=(1, 4))
  texts, engine, warm = texts_of((30, 20), (9, 1)), make(), make()
  engine.compile_all()
  warm.warm_up()
  assert not warm.run_first() and set(engine._unrun) == set(engine.programs) == set(warm.programs)
  for got, wanted in zip(forced_logprobs(engine, texts), forced_logprobs(warm, texts)):
    np.testing.assert_array_equal(got, wanted)
  n = len(engine._unrun)
  assert 0 < n < len(engine.programs)
  assert [engine.run_first() for _ in range(n + 1)] == [True] * n + [False]
  assert engine.counters["compiles"] == warm.counters["compiles"] == len(engine.programs)


def test_weights_are_read_while_programs_are_compiled(monkeypatch):
  """And what goes wrong then comes out: of warm_up, or of the first step."""
  cfg, _, params = params_of("gqa")
  unread, lowered = Unread(jax.tree.map(jax.typeof, params), None, "params"), threading.Event()
  make = lambda: Engine(cfg, unread, mesh_of("one"), slots=4, page_size=4, max_length=200, prefill_chunk=16,
                        row_buckets=(4,))
  there = make_engine("gqa")
  there.warm_up()
  monkeypatch.setattr("infer.engine.read_weights", lambda *_: lowered.wait(60) and there._weights)
  engine = make()
  lower = engine._lower
  monkeypatch.setattr(engine, "_lower", lambda *args: (lower(*args), lowered.set())[0])
  engine.warm_up()
  texts, n = texts_of((30, 20), (9, 1)), engine.counters["compiles"]
  for got, wanted in zip(forced_logprobs(engine, texts), forced_logprobs(there, texts)):
    np.testing.assert_array_equal(got, wanted)
  assert n == engine.counters["compiles"] == len(engine.programs)

  def fail(*_):
    raise OSError("the disk is gone")

  monkeypatch.setattr("infer.engine.read_weights", fail)
  with pytest.raises(OSError, match="the disk is gone"):
    make().warm_up()
  engine = make()
  engine.submit(Request(prompt=[1], sampling=Sampling()))
  with pytest.raises(OSError, match="the disk is gone"):
    engine.step()


@pytest.mark.parametrize("prompt, changes, wrong", [
  ([], {}, "the prompt is empty"),
  ([1, V], {}, f"token {V} is outside the vocabulary of {V}"),
  ([1] * 150, {"max_tokens": 60}, "nearest valid max_tokens: 50"),
  ([1], {"temperature": -1.0}, "temperature=-1"),
  ([1, 2], {"score_from": 2}, "score_from=2 goes with prompt_logprobs"),
  ([1, 2], {"score_from": 3, "prompt_logprobs": 0}, r"score_from=3 must be in \[1, 2\]"),
])
def test_what_cannot_be_served_is_refused(prompt, changes, wrong):
  engine = make_engine("gqa")
  with pytest.raises(ValueError, match=wrong):
    changes = dict(changes)
    engine.submit(Request(prompt=prompt, score_from=changes.pop("score_from", 1),
                          sampling=Sampling(**changes)))
  assert not engine.has_work


# Lists of prompts.

def collect(engine, prompts, settings, **kwargs):
  """The Tokens of each prompt."""
  made = [[] for _ in prompts]
  for token in engine.generate(prompts, settings, **kwargs):
    made[token.request].append(token)
  return made


def random_prompts(*lengths, seed=4):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, V, n).tolist() for n in lengths]


def test_a_cancelled_prompt_gets_no_more_tokens():
  engine, cancelled, count = make_engine("gqa"), set(), [0, 0]
  for token in engine.generate(random_prompts(10, 12), Sampling(max_tokens=50), cancelled=cancelled):
    count[token.request] += 1
    if count[0] == 6:
      cancelled.add(0)
  assert count == [6, 50] and engine.gauges()["pages_used"] == 0
  tokens = engine.generate(random_prompts(10, 12), Sampling(max_tokens=50))
  next(tokens)
  tokens.close()  # Who asked has gone.
  half = 4 * 200 // 4 // 2  # Of the pages of 4 that 4 texts of 200 fill.
  assert engine.gauges() == {"running": 0, "waiting": 0, "pages_used": 0, "pages_total": half}


@pytest.mark.parametrize("slots, rows, full", [(1, (1,), 1), (3, (1, 3), 2), (20, (1, 8, 16, 20), 10)])
def test_what_there_is_by_default(slots, rows, full):
  """Programs for few rows and many, and pages for half the slots; a text as long as can be fits always."""
  engine = make_engine("gqa", slots=slots, row_buckets=None)
  assert engine.row_buckets == rows and engine.gauges()["pages_total"] == full * 200 // 4
  engine.cancel(engine.submit(Request(prompt=[1], sampling=Sampling(max_tokens=199))))


@pytest.mark.parametrize("case", ("gqa", "moe"))
def test_one_device_exchanges_nothing(case):
  """XLA:CPU keeps a collective of one device, and runs it."""
  engine = make_engine(case)
  collect(engine, random_prompts(20), Sampling(max_tokens=2))
  for program in engine.programs.values():
    assert not re.search(r"(all-|reduce-scatter|collective-)[a-z-]*\(", program.as_text())


def test_seconds_are_told_apart():
  engine = make_engine("gqa")
  collect(engine, random_prompts(60, 60), Sampling(max_tokens=8))  # What is compiled is compiled.
  before = engine.counters
  collect(engine, random_prompts(60, 60, seed=5), Sampling(max_tokens=8))
  more = engine.counters - before
  assert more["compile_s"] == 0 < more["prefill_s"] and more["decode_s"] > 0
  assert more["prompt_tokens"] == 120 and more["generated_tokens"] == 16
  assert more["decode_tokens"] == 16 - 1 - 4 - 1  # Four steps read the second prompt beside the first text.


@pytest.mark.parametrize("prompts, settings, wrong", [
  ([[1], []], Sampling(), "prompt 1: the prompt is empty"),
  ([[1]], [Sampling(), Sampling()], "2 settings for 1 prompts"),
  ([[1]], Sampling(top_p=2.0), "top_p=2.0")])
def test_mistakes_are_named_before_anything_runs(prompts, settings, wrong):
  engine = make_engine("gqa")
  with pytest.raises(ValueError, match=wrong):
    engine.generate(prompts, settings)
  assert not engine.has_work or not engine.gauges()["running"]


@pytest.mark.parametrize("case", ["mixed windows", "mla"])
def test_pages_are_updated_in_place(case):
  """Donated buffers are reused, and none is copied as it lies."""
  engine = make_engine(case)
  collect(engine, random_prompts(20, 30), Sampling(max_tokens=4))
  caches = jax.tree.leaves(engine._state.caches)
  n_bytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in caches)
  big = {",".join(map(str, a.shape[i:])) for a in caches for i in (0, 1)}
  big |= {",".join(map(str, a.shape)) for a in jax.tree.leaves(engine._weights) if a.size >= 1024}
  for program in engine.programs.values():
    assert program.memory_analysis().alias_size_in_bytes >= n_bytes
    copies = [line for line in program.as_text().splitlines()
              if " copy(" in line and any(f"[{s}]" in line for s in big)]
    assert not copies

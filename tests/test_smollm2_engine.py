"""The engine on real weights and real text: hundreds of requests together, each as if it were alone."""
import collections
import dataclasses
import functools
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from infer.engine import Engine, Request, Scored
from infer.grammar import GrammarCompiler
from infer.load import decode_config, load_params, open_run
from infer.sampling import Sampling, sample, stack_settings
from model.transformer import abstract_params
from tests.smollm2 import run_folder
from tests.tiny import mesh_of

pytestmark = pytest.mark.slow
LENGTH = 128  # Most tokens of a prompt and its text.
NEAR = 2e-4  # What is near enough to be rounding: of a logit, in nats.
REGEXES = "[0-9]{2,3}( [a-z]{2,5})?", "(yes|no|perhaps)[.!]"


@functools.cache
def smollm2_model():
  """(run, config, parameters)."""
  run, mesh = open_run(run_folder(), "--model"), mesh_of("one")
  cfg = decode_config(dataclasses.replace(run.model, compute_dtype="float32"), mesh)
  with jax.set_mesh(mesh):
    return run, cfg, load_params(run, cfg, mesh)[0]


def make_engine(cfg, params, tokenizer, **settings):
  return Engine(cfg, params, mesh_of("one"), stop_ids=(tokenizer.eos_id,), max_length=LENGTH, **settings)


def mixed_requests(n, tokenizer, seed=0):
  """(Request, regex or None) of lengths 1 to 120, of all settings; half begin with what others begin with."""
  rng, words = np.random.default_rng(seed), " ".join(topics[name] for name in sorted(topics)).split()
  span = lambda n: words[(at := int(rng.integers(0, len(words) - n))):at + n]
  pick = lambda *values: values[rng.integers(len(values))]
  begins, out = [tokenizer.encode(" ".join(span(150))) for _ in range(4)], []
  for i in range(n):
    grows = i < 24  # A few words that become many: they take each other's pages.
    n_prompt = int(np.exp(rng.uniform(0, np.log(4 if grows else 120))))
    prompt = tokenizer.encode(" ".join(span(n_prompt)))
    if i % 2 and not grows:
      prompt = pick(*begins)[:int(rng.integers(8, 80))] + prompt[:20]
    out.append((Request(prompt=prompt[:120], user=pick("a", "b"), sampling=Sampling(
      max_tokens=32 if grows else pick(1, 1, 2, 3, 5), temperature=pick(0.0, 0.7, 1.0, 1.5),
      top_k=pick(None, 5, 40), top_p=pick(None, 0.8), min_p=pick(None, 0.02), seed=int(rng.integers(2**32)),
      repetition_penalty=pick(None, 1.3), presence_penalty=pick(0.0, 0.5), frequency_penalty=pick(0.0, -0.3),
      logit_bias=pick((), ((28, 2.0), (198, -5.0))), logprobs=pick(None, 3), stop_ids=pick((), (30,)),
      prompt_logprobs=pick(None, None, None, 2))), REGEXES[i % 2] if i % 20 == 7 else None))
  return out


def submit(engine, compiler, request, regex):
  grammar = compiler.compile("regex", regex) if regex else None
  return engine.submit(dataclasses.replace(request, grammar=grammar))


def drive(engine, ids, cancel):
  """Tokens of each; `cancel`: id -> the step after which nobody wants it any more."""
  got, ended, steps = collections.defaultdict(list), set(), 0
  while engine.has_work:
    for id in [id for id, at in cancel.items() if at <= steps and id not in ended]:
      engine.cancel(id)
      ended.add(id)
    for event in engine.step():
      assert event.request not in ended
      got[event.request].append(event)
      if event.finish:
        ended.add(event.request)
    steps += 1
  return [got[id] for id in ids]


@functools.cache
def _forward(graphdef):
  def run(params, tokens_BT, n):
    model = nnx.merge(graphdef, params)
    pos_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    x_BTD = model(tokens_BT, pos_BT, (pos_BT < n).astype(jnp.int32))[0]
    return model.logits(jax.lax.dynamic_slice_in_dim(x_BTD, n - 1, 1, axis=1))[:, 0]

  return jax.jit(run)


def is_near_tie(cfg, params, compiler, stop_ids, request, regex, made, token, other):
  """Whether rounding decides between two tokens after `made`: the forward pass makes the one, and the other
  where no logit is changed by more than NEAR."""
  mesh, tokens = mesh_of("one"), [*request.prompt, *made]
  row = np.zeros((1, LENGTH), np.int32)
  row[0, :len(tokens)] = tokens
  with jax.set_mesh(mesh):
    graphdef, _ = abstract_params(cfg, mesh)
    logits_V = np.asarray(_forward(graphdef)(params, row, len(tokens)))[0]
  V = len(logits_V)
  grammar = compiler.compile("regex", regex) if regex else None
  for id in made if grammar else ():
    grammar.push(id)
  mask_w = np.full(-(-V // 32), 0xffffffff, np.uint32)
  if grammar:
    mask_w[:] = 0
    words = grammar.mask()
    mask_w[:len(words)] = words
  counts_V = np.zeros(V, np.int32)
  np.add.at(counts_V, made, 2)
  counts_V[request.prompt] |= 1
  rng, index, changes = np.random.default_rng(0), np.arange(V), [np.zeros(V)]
  low, high = sorted((token, other))
  for size in (NEAR / 4, NEAR):
    for sign in (1, -1):
      changes += [sign * size * (index == token), sign * size * (index == other),
                  sign * size * np.where(index <= low, 1, -1), sign * size * np.where(index < high, 1, -1)]
    changes += [size * rng.uniform(-1, 1, V) for _ in range(16)]
  B = len(changes)
  settings = stack_settings([request.sampling] * B, [len(request.prompt)] * B, stop_ids)
  tile = lambda a: np.broadcast_to(a, (B, len(a)))
  drawn = jax.jit(functools.partial(sample, n_top=0))(
    (logits_V + np.array(changes)).astype(np.float32), tile(counts_V), tile(mask_w),
    np.full(B, len(tokens), np.int32), settings).token_B.tolist()
  return token in drawn and other in drawn


def split(events):
  """(tokens, log-probabilities of the prompt)."""
  return ([e for e in events if not isinstance(e, Scored)],
          [p for e in events if isinstance(e, Scored) for p in e.logprobs])


def check_same(events, alone, is_cancelled, excuse):
  """Whether they are the same, but for the tie that `excuse` (made so far, token, other) says it is."""
  (made, part), (made_alone, whole) = map(split, (events, alone))
  np.testing.assert_allclose(part, whole[:len(part)], atol=2e-3)
  assert is_cancelled or len(part) == len(whole)
  for k, (token, other) in enumerate(zip(made, made_alone)):
    if token.id != other.id:
      assert excuse([t.id for t in made[:k]], other.id, token.id), (k, token, other)
      return False
    assert token.finish == other.finish
    np.testing.assert_allclose([token.logprob, *(p for _, p in token.top)],
                               [other.logprob, *(p for _, p in other.top)], atol=2e-3)
  assert is_cancelled or len(made) == len(made_alone)
  return True


def run_mixed(cfg, params, tokenizer, n, **settings):
  """n requests together and each alone; prints what there was of all."""
  compiler = GrammarCompiler(tokenizer, cfg.padded_vocab_size, [tokenizer.eos_id])
  engine = make_engine(cfg, params, tokenizer, prefill_chunk=64, **settings)
  lone = make_engine(cfg, params, tokenizer, prefill_chunk=128, slots=1, row_buckets=(2,),
                     keep_prefixes=False)
  engine.warm_up()
  compiles = engine.counters["compiles"]
  requests, rng = mixed_requests(n, tokenizer), np.random.default_rng(1)
  ids = [submit(engine, compiler, *each) for each in requests]
  cancel = {id: int(rng.integers(0, 3 * n)) for id in rng.choice(ids, n // 8, replace=False).tolist()}
  together = drive(engine, ids, cancel)
  assert not any(engine.gauges()[name] for name in ("running", "waiting", "pages_used"))
  counters = collections.Counter(engine.counters)
  assert counters["compiles"] == compiles
  assert counters["preemptions"] > n // 100 and counters["prefix_hit_tokens"] > n
  n_cut = ties = 0
  for id, each, events in zip(ids, requests, together):
    alone, = drive(lone, [submit(lone, compiler, *each)], {})
    is_cut = id in cancel and not (events and events[-1].finish)
    excuse = functools.partial(is_near_tie, cfg, params, compiler, lone.stop_ids, *each)
    ties += not check_same(events, alone, is_cut, excuse)
    n_cut += is_cut
  n_tokens = sum(len(events) for events in together)
  print(f"{n} requests, {n_tokens} events, {n_cut} cancelled, {counters['preemptions']} preemptions, "
        f"{counters['prefix_hit_tokens']} tokens found; {ties} near-ties fell the other way")
  assert n_cut > n // 50 and ties <= n // 100 and lone.gauges()["pages_used"] == 0


def test_five_hundred_mixed_requests_are_each_as_if_alone():
  """In so few pages that they take each other's; nothing is held in the end, nothing compiled on the way."""
  run, cfg, params = smollm2_model()
  run_mixed(cfg, params, run.tokenizer, 500, slots=8, page_size=4, n_pages=32, row_buckets=(8,))

"""Beam search: the search itself against enumeration and transformers', and in the engine against both."""
import collections
import dataclasses
import functools
import itertools
import json
import pathlib
import tempfile

import jax
import numpy as np
import pytest

from infer.beam import BeamSearch, Search
from infer.engine import Engine, Found, Request
from infer.sampling import Sampling
from model.hub.convert import read_model
from model.hub.orbax import restore_params
from model.transformer import abstract_params
from tests.test_engine import V, make_engine, mixed_requests, plain_beams, run
from tests.tiny import mesh_of


def search_over(logprobs_after, settings, sampling, stop_ids, n_top):
  """The search without an engine. `logprobs_after`: tokens of each text so far -> [texts, V]."""
  search, beams = Search(settings, sampling, stop_ids), [()]
  while beams is not None:
    logprob_BV = logprobs_after([text.tokens for text in search.running])
    best_Bn = np.argsort(-logprob_BV, axis=1, kind="stable")[:, :n_top]
    beams = search.push([[(int(i), float(logprob_V[i])) for i in best_n]
                         for logprob_V, best_n in zip(logprob_BV, best_Bn)])
  return search.ended[:settings.n]


@pytest.mark.parametrize("length_penalty, early_stopping", [(1.0, "never"), (2.5, "never"), (0.0, False)])
def test_a_search_that_is_wide_enough_finds_the_best_of_all_texts(length_penalty, early_stopping):
  words, longest, stop = 4, 4, 2
  rng = np.random.default_rng(0)
  table = {text: np.log(rng.dirichlet(np.ones(words))) for n in range(longest)
           for text in itertools.product(range(words), repeat=n)}

  def score(text):
    return sum(table[text[:i]][token] for i, token in enumerate(text)) / len(text) ** length_penalty

  texts = [text for n in range(1, longest + 1) for text in itertools.product(range(words), repeat=n)
           if stop not in text[:-1] and (text[-1] == stop or n == longest)]
  want = sorted(texts, key=score, reverse=True)[:5]
  settings = BeamSearch(width=words**longest, n=5, length_penalty=length_penalty,
                        early_stopping=early_stopping)
  got = search_over(lambda texts: np.array([table[text] for text in texts]), settings,
                    Sampling(max_tokens=longest), [stop], words)
  assert [text.tokens for text in got] == want
  np.testing.assert_allclose([text.score for text in got], [score(text) for text in want])


# transformers.

@functools.cache
def their_model():
  torch = pytest.importorskip("torch", reason="the oracle is transformers'")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  return transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    initializer_range=0.4)).eval()


def their_search(prompt, settings, sampling, stop_ids):
  """[(tokens, score)] of the n best."""
  import torch
  out = their_model().generate(
    torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
    num_beams=settings.width, num_return_sequences=settings.n, length_penalty=settings.length_penalty,
    early_stopping=settings.early_stopping, max_new_tokens=sampling.max_tokens,
    min_new_tokens=sampling.min_tokens or None, eos_token_id=list(stop_ids), pad_token_id=-1,
    return_dict_in_generate=True, output_scores=True)
  texts = out.sequences[:, len(prompt):].tolist()
  return [tuple(token for token in text if token >= 0) for text in texts], out.sequences_scores.numpy()


PROMPTS = [[1, 5, 9, 30], [1, *range(3, 20)]]
SEARCHES = [  # width, n, length_penalty, early_stopping, stop_ids, max_tokens, min_tokens
  (2, 2, 1.0, False, (2,), 14, 0), (4, 3, 1.0, True, (2, 9), 20, 0), (5, 5, 2.0, "never", (2, 9, 14), 16, 0),
  (3, 1, -1.0, False, (2, 9, 14, 25), 12, 0), (6, 6, 0.0, False, (2, 9), 10, 4),
  (7, 4, 1.5, True, (2, 9, 14, 25), 18, 3), (9, 9, 1.0, "never", (2,), 8, 0),
  (2, 2, 1.0, "never", (2, 9), 12, 0)]


def make_search(width, n, length_penalty, early_stopping, stop_ids, max_tokens, min_tokens):
  return (BeamSearch(width=width, n=n, length_penalty=length_penalty, early_stopping=early_stopping),
          Sampling(max_tokens=max_tokens, min_tokens=min_tokens), stop_ids)


def assert_same(texts, want):
  tokens, scores = want
  assert [text.tokens for text in texts] == tokens
  np.testing.assert_allclose([text.score for text in texts], scores, rtol=2e-5)
  for text in texts:
    assert len(text.logprobs) == len(text.tokens)


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_the_search_is_transformers(search):
  model = their_model()
  import torch
  settings, sampling, stop_ids = make_search(*search)
  for prompt in PROMPTS:
    def logprobs_after(texts):
      with torch.no_grad():
        tokens_BT = torch.tensor([[*prompt, *text] for text in texts])
        return torch.log_softmax(model(tokens_BT).logits[:, -1].float(), -1).numpy()

    got = search_over(logprobs_after, settings, sampling, stop_ids, settings.width + len(stop_ids))
    assert_same(got, their_search(prompt, settings, sampling, stop_ids))


# The engine.

@functools.cache
def folder_of():
  from tests.hub_cases import import_folder
  root = pathlib.Path(tempfile.mkdtemp(prefix="beam-"))
  their_model().save_pretrained(root / "theirs")
  return import_folder(root / "theirs", root / "ours")


def ordinary(n, seed=0):
  return [Request(prompt=r.prompt, sampling=r.sampling) for r in mixed_requests(n, seed)]


def test_the_engine_is_transformers():
  """Token for token, all searches at once, and other requests beside them."""
  their_model()
  run_folder = folder_of()
  cfg, mesh = read_model(json.loads((run_folder / "config.json").read_text())["config"]), mesh_of("one")
  with jax.set_mesh(mesh):
    params, _, _ = restore_params(run_folder, abstract_params(cfg, mesh)[1])
  engine = Engine(cfg, params, mesh, slots=12, page_size=4, max_length=64, prefill_chunk=16,
                  row_buckets=(12,), n_pages=70)
  asked = [(prompt, *make_search(*search)) for search in SEARCHES for prompt in PROMPTS]
  requests = [Request(prompt=prompt, beams=settings, sampling=dataclasses.replace(sampling, stop_ids=ids))
              for prompt, settings, sampling, ids in asked]
  others = [r for r in ordinary(20) if len(r.prompt) + r.sampling.max_tokens <= 64]
  found = run(engine, [r for pair in itertools.zip_longest(requests, others) for r in pair if r])
  texts = {events[0].request: events[0].texts for events in found if isinstance(events[0], Found)}
  assert len(texts) == len(asked) and engine.counters["prefix_hit_tokens"] > 0
  for got, one in zip(texts.values(), asked):  # In the order of their submission.
    assert_same(got, their_search(*one))


def test_beside_others_in_few_pages():
  """Searches that take each other's pages and begin again, some of them cancelled, against each alone."""
  engine, rng = make_engine("gqa", n_pages=25), np.random.default_rng(5)
  begin = rng.integers(0, V, 14).tolist()
  searches = [Request(prompt=begin + rng.integers(0, V, n).tolist(), beams=BeamSearch(width=width, n=width),
                      sampling=Sampling(max_tokens=18, stop_ids=(3, 11)))
              for n, width in ((3, 3), (1, 4), (9, 2), (4, 1), (2, 3), (1, 2))]
  others = [r for r in ordinary(16, seed=9) if len(r.prompt) + r.sampling.max_tokens <= 60]
  alone = [run(engine, [r])[0] for r in searches + others]
  before = engine.counters.get("preemptions", 0)
  ids = [engine.submit(r) for r in searches + others]
  cancelled, got = {ids[1]: 14, ids[4]: 40, ids[8]: 3}, collections.defaultdict(list)
  for step in itertools.count():
    for id in [id for id, at in cancelled.items() if at == step]:
      engine.cancel(id)
    if not engine.has_work:
      break
    for event in engine.step():
      got[event.request].append(event)
  assert engine.gauges()["pages_used"] == 0 and engine.counters["preemptions"] > before
  for id, want in zip(ids, alone):
    if id in cancelled:
      continue
    if isinstance(want[0], Found):
      assert [text.tokens for text in got[id][0].texts] == [text.tokens for text in want[0].texts]
      np.testing.assert_allclose([text.score for text in got[id][0].texts],
                                 [text.score for text in want[0].texts], atol=1e-5)
    else:
      assert [t.id for t in got[id]] == [t.id for t in want]


def test_the_engine_is_the_forward_pass_and_one_beam_is_greedy():
  engine, prompt = make_engine("gqa"), [3, 1, 4, 1, 5, 9, 2]
  sampling = Sampling(max_tokens=10, temperature=0.0)
  wide, narrow, greedy = run(engine, [
    Request(prompt=prompt, sampling=sampling, beams=BeamSearch(width=4, n=4, length_penalty=0.0)),
    Request(prompt=prompt, sampling=sampling, beams=BeamSearch(width=1)),
    Request(prompt=prompt, sampling=sampling)])
  want = plain_beams("gqa", prompt, 4, 10)
  assert [list(text.tokens) for text in wide[0].texts] == [tokens for tokens, _ in want]
  np.testing.assert_allclose([text.score for text in wide[0].texts], [total for _, total in want], atol=1e-4)
  assert list(narrow[0].texts[0].tokens) == [t.id for t in greedy]
  assert narrow[0].finish == "length" and narrow[0].texts[0].logprobs == tuple(t.logprob for t in greedy)


@pytest.mark.parametrize("beams, changes, wrong", [
  ({"width": 5}, {}, r"width=5 of a beam search must be a whole number in \[1, 4\]: there are 4 slots"),
  ({"width": 0}, {}, "width=0"), ({"width": True}, {}, "width=True"),
  ({"width": 2, "n": 3}, {}, r"n=3 of a beam search must be in \[1, width=2\]"),
  ({"width": 2, "length_penalty": float("nan")}, {}, "length_penalty=nan"),
  ({"width": 2, "early_stopping": "always"}, {}, "early_stopping=always"),
  ({"width": 2}, {"top_k": 5}, "top_k=5 has no meaning in a beam search"),
  ({"width": 2}, {"temperature": 0.7}, "temperature=0.7 has no meaning"),
  ({"width": 2}, {"prompt_logprobs": 1}, "prompt_logprobs=1 has no meaning"),
  ({"width": 2}, {"stop": ("a",)}, "stop="),
])
def test_what_cannot_be_searched_is_refused(beams, changes, wrong):
  engine = make_engine("gqa")
  with pytest.raises(ValueError, match=wrong):
    engine.submit(Request(prompt=[1], sampling=Sampling(**changes), beams=BeamSearch(**beams)))
  assert not engine.has_work

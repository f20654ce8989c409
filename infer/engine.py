"""The engine: requests in, tokens out, one compiled step at a time. infer.scheduler says what a step does.

What a request gets does not depend on what runs beside it, but for rounding: matrix products of other sizes
add in other orders.

The device keeps the pages of all caches, and each slot's last token and what was seen of it: a step needs
nothing that the step before made, so it is dispatched before that is read. Shapes are few: R sequences that
feed their last token, and a chunk of C tokens of prompts. After `compile_all` nothing is compiled.
"""
import collections
import concurrent.futures
import dataclasses
import functools
import time

import jax
import numpy as np

from infer.beam import BeamSearch, Hypothesis, Search
from infer.compile_cache import many_frees
from infer.load import cast_params, decode_config
from infer.sampling import MOST_STOP_IDS, MOST_TOP, Sampling
from infer.scheduler import PAGE_SIZE, Scheduler
from infer.step import (
  SCORED_TOGETHER,
  Inputs,
  empty_inputs,
  empty_state,
  fork,
  made_like,
  run_step,
  stack_inputs,
)
from infer.traced import Traced
from infer.weights import read_weights
from model.config import ModelConfig
from model.hub.orbax import Unread
from model.sharding import place, ways
from model.transformer import abstract_params, make_unstack, turn_weights


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
  prompt: list[int]
  sampling: Sampling
  grammar: object = None  # infer.grammar.Grammar: what the text must be.
  user: str = ""  # Those that wait take turns by user.
  score_from: int = 1  # With sampling.prompt_logprobs: the first position whose token is scored.
  beams: BeamSearch | None = None  # Nothing is drawn; most of `sampling` must be left out.


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
  """One made token."""
  request: int  # What `submit` returned.
  id: int
  logprob: float  # The model's own, whatever the settings.
  top: tuple[tuple[int, float], ...]  # The likeliest (id, logprob), sampling.logprobs of them.
  finish: str | None  # On the last: "stop" (it is a stop id, or the grammar's end) or "length".


@dataclasses.dataclass(frozen=True, slots=True)
class Scored:
  """Tokens of a prompt, where sampling.prompt_logprobs is not None."""
  request: int
  start: int  # Position of the first of them; the first of all has no probability.
  logprobs: list[float]
  top: list[tuple[tuple[int, float], ...]]
  finish: str | None  # "length" where the prompt ends here and no token is made.


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
  """All that is told of a beam search."""
  request: int
  texts: list[Hypothesis]  # The best first.
  finish: str  # Of the best.


class Engine:
  """Serves many requests together, each as if it were alone.

  Usage:
    engine = Engine(cfg, params, mesh, stop_ids=[tokenizer.eos_id])
    engine.submit(Request(prompt=[1, 5, 7], sampling=Sampling(max_tokens=20)))
    while engine.has_work:
      for event in engine.step(): ...

  Attributes:
    programs: (R, C) -> the compiled step, and "fork"; nothing else is ever compiled.
    counters: prompt_tokens, prefix_hit_tokens, generated_tokens, preemptions, steps, compiles; compile_s, and
      without it prefill_s, of the steps that fed a prompt, and decode_s, of the others, which made
      decode_tokens.
  """

  def __init__(self, cfg: ModelConfig, params, mesh, *, stop_ids=(), slots: int = 16,
               page_size: int = PAGE_SIZE, n_pages: int | None = None, max_length: int | None = None,
               prefill_chunk: int = 256, row_buckets: tuple[int, ...] | None = None,
               cache_dtype: str | None = None, keep_prefixes: bool = True, ring_windows: bool = False,
               keep_traced: bool = False):
    """Args:
      cfg: of any rules; those of DECODE are used.
      params: of `model.transformer`, sharded anyhow. They are copied: cast, and one tree a layer. Or Unread:
        they are read while programs are compiled, and what goes wrong comes out of what needs them first.
      stop_ids: tokens that end a text.
      slots: most requests that run together; a multiple of the ways of the batch.
      n_pages: of all pools together; None: what half the slots need for requests of max_length, as most texts
        end long before. A search whose beams could need more than all is refused.
      max_length: most tokens of a prompt and its text; None: the model's, or 2048.
      prefill_chunk: most tokens of prompts that are fed in a step; fewer while others make tokens, as these
        wait for it.
      row_buckets: for how many requests that make a token, of one way, there are programs; None: 1, 8,
        16, 32, ... and as many as there are slots.
      cache_dtype: "int8", or the compute dtype.
      ring_windows: layers with a window keep no more than that needs, for each slot. Then no prefix is found
        again, and there are no beams.
      keep_traced: programs, as they were traced, for the next start (infer.traced).

    Raises:
      ValueError: the model cannot be split over the mesh, or one of these is out of range.
    """
    self.cfg, self.mesh = decode_config(cfg, mesh), mesh
    if len(stop_ids) > MOST_STOP_IDS:
      raise ValueError(f"stop_ids={tuple(stop_ids)}: at most {MOST_STOP_IDS} end every text")
    if prefill_chunk % SCORED_TOGETHER and prefill_chunk > SCORED_TOGETHER:
      raise ValueError(f"prefill_chunk={prefill_chunk} must be a multiple of {SCORED_TOGETHER}, or less")
    if ring_windows and not any(self.cfg.windows):
      raise ValueError("ring_windows=True: no layer of the model has a window")
    self.max_length = min(max_length or 2048, self.cfg.max_length or max_length or 2048)
    self.page_size, self.stop_ids, self._ring_windows = page_size, tuple(stop_ids), ring_windows
    self.n_ways = ways(mesh, self.cfg.rules.batch)
    self.slots = -(-slots // self.n_ways)
    self._pages_each = -(-self.max_length // page_size)
    self.n_pages = 1 + (-(-self.slots // 2) * self._pages_each if n_pages is None else
                        -(-n_pages // self.n_ways))
    self.row_buckets = row_buckets or _row_buckets(self.slots)
    self.chunk_sizes = _chunk_sizes(prefill_chunk)
    # Chunk -> rows: one less than there are slots, as a prompt has one, where all are of one way. The longest
    # is a program for prompts alone, which may take its time.
    self._chunks = dict.fromkeys(self.chunk_sizes, self.row_buckets[-1] - (self.n_ways == 1)) | (
        {prefill_chunk: 0} if len(self.chunk_sizes) > 1 else {})
    self._most_parts = min(MOST_PARTS, self.slots)
    self.schedulers = [Scheduler(
      slots=self.slots, n_pages=self.n_pages, page_size=page_size, chunks=self.chunk_sizes,
      most_parts=self._most_parts, most_pages=self._pages_each,
      keep_prefixes=keep_prefixes and not ring_windows) for _ in range(self.n_ways)]
    self.programs, self._there, self._counters = {}, {}, collections.Counter()
    self._traced = Traced(self.cfg, mesh) if keep_traced else None
    self._unrun = []  # Of the programs, those that never ran.
    self._requests, self._next_id = {}, 0  # id -> _Running.
    self._unread = collections.deque()  # (plans, what the device made of them).
    self._begin_to_load(params, cache_dtype, prefill_chunk if ring_windows else None)

  def _begin_to_load(self, params, cache_dtype, ring_chunk):
    """The shapes of weights and state are known at once; the weights are there when `_loaded` is done."""
    with jax.set_mesh(self.mesh):
      graphdef, abstract = abstract_params(self.cfg, self.mesh)
      turns = None
      if self.mesh.devices.flat[0].platform == "cpu":
        graphdef, turns = turn_weights(self.cfg, graphdef, abstract)
      self._one_step = functools.partial(run_step, graphdef)
      places = jax.tree.map(lambda a: a.sharding, abstract)
      unstack = make_unstack(self.cfg, turns)
      make_weights = lambda params: unstack(cast_params(self.cfg, params))
      self._state, self._make_state = None, functools.partial(
        empty_state, self.cfg, self.n_ways, self.slots, self.n_pages, self.page_size, cache_dtype, ring_chunk)
      is_unread = isinstance(params, Unread)
      stacked = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
                             params.abstract if is_unread else params, places)
      shapes = jax.eval_shape(make_weights, stacked)
      self._shapes = shapes, jax.eval_shape(self._make_state)

    def load():
      with jax.set_mesh(self.mesh):
        self._weights = (read_weights(self.cfg, self.mesh, params, shapes, turns) if is_unread else
                         make_weights(jax.device_put(params, places)))
        jax.block_until_ready(self._weights)  # What was read makes room for the caches.

    loader = concurrent.futures.ThreadPoolExecutor(1)
    self._loaded = loader.submit(load)
    loader.shutdown(wait=False)
    if not is_unread:
      self._prepare()

  def _prepare(self):
    """Waits for the weights, and makes the state where there is none."""
    self._loaded.result()
    if self._state is None:
      with jax.set_mesh(self.mesh):
        self._state = jax.jit(self._make_state)()

  # What others see.

  @property
  def has_work(self) -> bool:
    return bool(self._requests or self._unread)

  @property
  def counters(self) -> collections.Counter:
    total = collections.Counter(self._counters)
    for scheduler in self.schedulers:
      total.update(scheduler.counters)
    return total

  def gauges(self) -> dict[str, float]:
    total = lambda read: sum(map(read, self.schedulers))
    return {"running": total(lambda s: s.n_running), "waiting": total(lambda s: s.n_waiting),
            "pages_used": total(lambda s: s.pages.held), "pages_total": total(lambda s: s.pages.total)}

  def check(self, request: Request) -> None:
    """Raises ValueError: an empty prompt, an id outside the vocabulary, too many tokens, a setting out of
    range."""
    prompt, sampling = request.prompt, request.sampling.validate(self.cfg.vocab_size)
    if not len(prompt):
      raise ValueError("the prompt is empty: start it with the tokenizer's bos_id")
    if bad := [t for t in prompt if not 0 <= t < self.cfg.vocab_size]:
      raise ValueError(f"the prompt's token {bad[0]} is outside the vocabulary of {self.cfg.vocab_size}")
    if len(prompt) + sampling.max_tokens > self.max_length:
      raise ValueError(f"the prompt's {len(prompt)} tokens and max_tokens={sampling.max_tokens} are more "
                       f"than the {self.max_length} positions of a sequence; nearest valid max_tokens: "
                       f"{max(self.max_length - len(prompt), 0)}")
    scores, k = sampling.prompt_logprobs is not None, request.score_from
    if not 1 <= k <= (len(prompt) if scores else 1):
      raise ValueError(f"score_from={k} must be in [1, {len(prompt)}], the prompt's tokens" if scores else
                       f"score_from={k} goes with prompt_logprobs")
    if request.beams is not None:
      if request.grammar is not None:
        raise ValueError("a beam search follows no grammar: leave out one of them")
      if self._ring_windows:
        raise ValueError("a beam search shares pages, and those of ring_windows=True are a slot's own")
      request.beams.validate(sampling, self.stop_ids, self.slots)

  def submit(self, request: Request) -> int:
    """Raises ValueError: as `check`."""
    self.check(request)
    sampling, k, id = request.sampling, request.score_from, self._next_id
    self._next_id += 1
    scheduler = min(self.schedulers, key=lambda s: s.n_running + s.n_waiting)
    scheduler.add(id, request.prompt, sampling.max_tokens, user=request.user,
                  one_by_one=request.grammar is not None,
                  n_findable=None if sampling.prompt_logprobs is None else k - 1,
                  n_beams=request.beams and request.beams.width)
    self._requests[id] = _Running(request, scheduler, n_scored=k - 1)
    return id

  def cancel(self, request: int) -> None:
    """No event of it comes any more."""
    if (running := self._requests.pop(request, None)) is not None:
      running.scheduler.end(request)

  def is_waiting(self, request: int) -> bool:
    """Whether it has no slot yet, or has lost it; False of one that has ended."""
    return (running := self._requests.get(request)) is not None and running.scheduler.is_waiting(request)

  def generate(self, prompts: list[list[int]], settings: Sampling | list[Sampling], *, cancelled=frozenset()):
    """Yields a Token for each token made, `request` the index of its prompt; in order within a request.

    Args:
      prompts: token ids, at least one each.
      settings: of all prompts, or one each. Stop strings are text: see infer.text.
      cancelled: a set that the caller may add indices to while iterating; they get no more tokens.

    Raises:
      ValueError: as `check`, for any of them.
    """
    if isinstance(settings, Sampling):
      settings = [settings] * len(prompts)
    if len(settings) != len(prompts):
      raise ValueError(f"{len(settings)} settings for {len(prompts)} prompts: give one, or one each")
    requests = [Request(prompt=prompt, sampling=s) for prompt, s in zip(prompts, settings)]
    for i, request in enumerate(requests):
      try:
        self.check(request)
      except ValueError as e:
        raise ValueError(f"prompt {i}: {e}") from None
    return self._follow(requests, cancelled)

  def _follow(self, requests, cancelled):
    left = {self.submit(request): i for i, request in enumerate(requests)}
    try:
      while left:
        for event in self.step():
          if (i := left.get(event.request)) is None:
            continue
          if i in cancelled or event.finish is not None:
            del left[event.request]
          if i in cancelled:
            self.cancel(event.request)
          else:
            yield dataclasses.replace(event, request=i)
    finally:
      for id in left:
        self.cancel(id)

  def warm_up(self) -> None:
    """Compiles every program, and runs it once."""
    self.compile_all()
    while self.run_first():
      pass

  def compile_all(self) -> None:
    """Compiles every program, some while the next is traced; the weights are read then. Requests may come
    after it: nothing is compiled for them."""
    began = time.perf_counter()
    shapes = [(R, 0) for R in self.row_buckets] + [(R, C) for C, R in self._chunks.items()]
    new = [key for key in ("fork", *reversed(shapes)) if key not in self.programs]
    weights, state = self._shapes
    with many_frees(), concurrent.futures.ThreadPoolExecutor(2) as compilers:
      compiled = {}
      for key in new:
        if self._loaded.done():
          self._loaded.result()  # Nothing is compiled for weights that cannot be read.
        if key == "fork":
          lowered = self._lower(key, state, *self._put_forks([]))
        else:
          lowered = self._lower(key, weights, self._put_changed([], *key), state)
        compiled[key] = compilers.submit(lowered.compile)
      self.programs |= {key: program.result() for key, program in compiled.items()}
    self._unrun += new
    self._loaded.result()
    if self.mesh.devices.flat[0].platform != "cpu":  # There zeros take their time; others may lack room.
      self._prepare()
    self._counters["compiles"] += len(new)
    self._counters["compile_s"] += time.perf_counter() - began

  def run_first(self) -> bool:
    """Runs, on nothing, a program that never ran: XLA:CPU makes some of it (YNNPACK's operators) only then.
    False: all have run."""
    if not self._unrun:
      return False
    if (key := self._unrun[-1]) == "fork":
      self._fork([])
    else:
      self._run([], *key)
    jax.block_until_ready(self._state)
    return True

  def step(self) -> list[Token | Scored | Found]:
    """Dispatches what can be done, and returns what the step before made."""
    began, compiled = time.perf_counter(), self._counters["compile_s"]
    made_before = self._counters["generated_tokens"]
    alone, events = not any(scheduler.makes_tokens for scheduler in self.schedulers), []
    plans = [scheduler.plan(alone) for scheduler in self.schedulers]
    if is_ahead := any(plans):
      self._dispatch(plans)
    if len(self._unread) > is_ahead:
      plans, made = self._unread.popleft()
      events = self._read(plans, made)
    seconds = time.perf_counter() - began - (self._counters["compile_s"] - compiled)
    if any(p and p.chunk for p in plans):
      self._counters["prefill_s"] += seconds
    else:
      self._counters["decode_s"] += seconds
      self._counters["decode_tokens"] += self._counters["generated_tokens"] - made_before
    return events

  def _dispatch(self, plans):
    C = max(p.n_chunk for p in plans if p)
    C = next(c for c in (0, *self.chunk_sizes) if c >= C)
    R = max(len(p.rows) for p in plans if p)
    R = self._chunks[C] if C else next(r for r in self.row_buckets if r >= R)
    if any(row.token is not None for p in plans if p for row in p.rows):
      self._fork(plans)
    made = self._run(plans, R, C)
    for a in jax.tree.leaves(made):
      a.copy_to_host_async()
    self._unread.append((plans, made))
    self._counters["steps"] += 1

  # From plans to arrays, and back to events.

  def _make_inputs(self, plans, R, C) -> Inputs:
    W, M = self.n_ways, max(R + (self.n_ways == 1), self._most_parts) if C else R
    inputs = empty_inputs(W, R, C, M, G=self._most_parts, L=self._pages_each, S=self.slots,
                          V=self.cfg.padded_vocab_size)
    samplings, starts = [_OFF] * (W * M), [0] * (W * M)
    for w, plan in enumerate(plans):
      if plan is None:
        continue
      for r, row in enumerate(plan.rows):
        inputs.slot_WR[w, r], inputs.pos_WR[w, r] = row.slot, row.position
        inputs.page_WRL[w, r, :len(row.pages)] = row.pages
      lasts = [*range(len(plan.rows))]
      if plan.chunk:
        lasts += [R + at - 1 for at in self._fill_chunk(inputs.chunk, w, plan.chunk)]
      for m, (part, last) in enumerate(zip([*plan.rows, *plan.chunk], lasts)):
        if not part.makes_token:
          continue
        running = self._requests[part.sequence.id]
        inputs.slot_WM[w, m], inputs.last_WM[w, m] = part.slot, last
        samplings[w * M + m], starts[w * M + m] = running.sampling, len(running.request.prompt)
        if running.request.beams is not None:
          samplings[w * M + m] = _BEAM
        if running.request.grammar is not None:
          words = running.request.grammar.mask()
          inputs.mask_WMw[w, m] = 0
          inputs.mask_WMw[w, m, :len(words)] = words
    return dataclasses.replace(inputs, settings=stack_inputs(samplings, starts, self.stop_ids, W))

  def _fill_chunk(self, inputs, w, parts):
    """Where each part ends."""
    at, first, ends = 0, 0, []
    for g, part in enumerate(parts):
      s, end = part.sequence, part.start + len(part.tokens)
      running, here = self._requests[s.id], slice(at, at + len(part.tokens))
      inputs.token_WC[w, here], inputs.part_WC[w, here] = part.tokens, g
      inputs.pos_WC[w, here] = np.arange(part.start, end)
      after = s.tokens[part.start + 1:end + 1]
      inputs.next_WC[w, at:at + len(after)] = after
      if running.sampling.prompt_logprobs is not None and end >= running.request.score_from:
        inputs.n_top_WC[w, here] = running.sampling.prompt_logprobs
      pages = part.pages[:-(-end // self.page_size)]
      inputs.page_WL[w, first:first + len(pages)] = pages
      inputs.first_WG[w, g], inputs.slot_WG[w, g], inputs.is_first_WG[w, g] = first, part.slot, part.is_first
      if part.is_first:
        prompt, made = s.tokens[:len(running.request.prompt)], s.tokens[len(running.request.prompt):]
        np.add.at(inputs.counts_WGV[w, g], made, 2)
        inputs.counts_WGV[w, g, prompt] |= 1
      at, first = here.stop, first + len(pages)
      ends.append(at)
    inputs.n_W[w] = at
    return ends

  def _fork(self, plans):
    """The texts of searches go on with the tokens that were chosen, in pages of their own."""
    forks = self._put_forks(plans)
    run = self._program("fork", self._shapes[1], *forks)
    self._state, = run(self._state, *forks)

  def _put_forks(self, plans):
    slot_WN = np.full((self.n_ways, self.slots), self.slots, np.int32)
    token_WN, from_WN, to_WN = np.zeros((3, *slot_WN.shape), np.int32)
    for w, plan in enumerate(plans):
      for n, row in enumerate(row for row in (plan.rows if plan else ()) if row.token is not None):
        slot_WN[w, n], token_WN[w, n] = row.slot, row.token
        if row.copied is not None:
          from_WN[w, n], to_WN[w, n] = row.copied, row.pages[row.position // self.page_size]
    return self._put([slot_WN, token_WN, from_WN, to_WN])

  def _run(self, plans, R, C):
    inputs, (weights, state) = self._put_changed(plans, R, C), self._shapes
    run = self._program((R, C), weights, inputs, state)
    self._state, made = run(self._weights, inputs, self._state)
    return made

  def _program(self, key, *shapes):
    """To be run at once; if it is not there it is compiled, while the weights are read."""
    if key not in self.programs:
      began = time.perf_counter()
      self.programs[key] = self._lower(key, *shapes).compile()
      self._counters["compiles"] += 1
      self._counters["compile_s"] += time.perf_counter() - began
    elif key in self._unrun:
      self._unrun.remove(key)
    self._prepare()
    return self.programs[key]

  def _lower(self, key, *args):
    function, state_at = (fork, 0) if key == "fork" else (self._one_step, 2)
    with jax.set_mesh(self.mesh):
      if self._traced is None:
        return jax.jit(function, donate_argnums=state_at).lower(*args)
      made = () if key == "fork" else (made_like(has_chunk=key[1] > 0),)
      return self._traced.lower(function, state_at, args, result=(args[state_at], *made))

  def _put_changed(self, plans, R, C) -> Inputs:
    """On the devices; what is as in the last step of this shape is there already."""
    new, tree = jax.tree.flatten(self._make_inputs(plans, R, C))
    old, there = self._there.get((R, C)) or ([None] * len(new), [None] * len(new))
    changed = [i for i, (a, b) in enumerate(zip(new, old)) if b is None or not np.array_equal(a, b)]
    there = list(there)
    for i, a in zip(changed, self._put([new[i] for i in changed])):
      there[i] = a
    self._there[R, C] = new, there
    return tree.unflatten(there)

  def _put(self, arrays):
    places = [place(self.mesh, self.cfg.rules("batch", *[None] * (a.ndim - 1))) for a in arrays]
    return jax.device_put(arrays, places)

  def _read(self, plans, made) -> list[Token | Scored]:
    made, events = jax.tree.map(np.asarray, made), []
    tops = collections.defaultdict(list)  # Of searches: what is likeliest after each text.
    for w, plan in enumerate(plans):
      if plan is None:
        continue
      at = 0
      for part in plan.chunk:
        here, at = slice(at, at + len(part.tokens)), at + len(part.tokens)
        events += self._read_scores(part, *(a[w, here] for a in made.scored_WC))
      for m, part in enumerate([*plan.rows, *plan.chunk]):
        id, drawn = part.sequence.id, [a[w, m] for a in made.drawn_WM]
        if not part.makes_token or id not in self._requests:
          continue  # It had ended.
        if (beams := self._requests[id].request.beams) is None:
          events += self._read_token(id, *drawn)
          continue
        if m >= len(plan.rows):
          self._requests[id].search = Search(beams, self._requests[id].sampling, self.stop_ids)
        tops[id].append([each for each in _pairs(*drawn[2:]) if each[0] < self.cfg.vocab_size])
    for id, top in tops.items():
      events += self._read_beams(id, top)
    return events

  def _read_beams(self, id, tops):
    running = self._requests[id]
    if (beams := running.search.push(tops)) is not None:
      running.scheduler.fork(id, beams)
      return []
    self.cancel(id)
    texts = running.search.ended[:running.request.beams.n]
    self._counters["generated_tokens"] += sum(len(text.tokens) for text in texts)
    return [Found(id, texts, texts[0].finish)]

  def _read_token(self, id, token, logprob, top_id_n, top_logprob_n):
    running = self._requests[id]
    token, running.n_made = int(token), running.n_made + 1
    finish = None
    if token in self.stop_ids or token in running.sampling.stop_ids:
      finish = "stop"
    elif (grammar := running.request.grammar) is not None:
      grammar.push(token)
      finish = "stop" if grammar.done else None
    if finish is None and running.n_made == running.sampling.max_tokens:
      finish = "length"
    self._counters["generated_tokens"] += 1
    if finish is None:
      running.scheduler.read(id, token)
    else:
      self.cancel(id)
    n = running.sampling.logprobs or 0
    return [Token(id, token, float(logprob), _pairs(top_id_n[:n], top_logprob_n[:n]), finish)]

  def _read_scores(self, part, logprob_C, top_id_Cn, top_logprob_Cn):
    id = part.sequence.id
    running = self._requests.get(id)
    if running is None or running.sampling.prompt_logprobs is None:
      return []
    n_prompt, n = len(running.request.prompt), running.sampling.prompt_logprobs
    first, last = max(part.start, running.n_scored), min(part.start + len(part.tokens), n_prompt - 1)
    ends = part.start + len(part.tokens) == n_prompt and not running.sampling.max_tokens
    if ends:
      self.cancel(id)
    elif last <= first:
      return []  # Nothing yet; or it had lost its pages, and is read again.
    new = slice(first - part.start, max(last, first) - part.start)
    running.n_scored = max(last, first)
    top = [_pairs(ids[:n], logprobs[:n]) for ids, logprobs in zip(top_id_Cn[new], top_logprob_Cn[new])]
    return [Scored(id, first + 1, logprob_C[new].tolist(), top, "length" if ends else None)]


@dataclasses.dataclass(slots=True)
class _Running:
  request: Request
  scheduler: Scheduler
  n_made: int = 0  # Tokens that were read.
  n_scored: int = 0  # Of the prompt, those whose next token was scored, or is not to be.
  search: Search | None = None

  @property
  def sampling(self) -> Sampling:
    return self.request.sampling


MOST_PARTS = 4  # Prompts of a chunk.
_OFF, _BEAM = Sampling(temperature=0.0), Sampling(temperature=0.0, logprobs=MOST_TOP)


def _pairs(ids, logprobs):
  return tuple(zip(ids.tolist(), logprobs.tolist()))


def _chunk_sizes(most: int) -> tuple[int, ...]:
  """The shortest, a quarter of the longest, and that."""
  least = min(SCORED_TOGETHER, most)
  return tuple(sorted({least, max(most // 4 // least * least, least), most}))


def _row_buckets(most: int) -> tuple[int, ...]:
  """1, 8, 16, 32, ... and most: of fewer than 8 rows most of a step is the reading of weights."""
  return (*(n for n in (1, *(8 * 2**i for i in range(16))) if n < most), most)

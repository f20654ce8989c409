"""The scheduler against a device that is a dictionary: each token's keys lie where it says."""
import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.scheduler import TRASH, Pages, Scheduler

NO_SEARCH = {"user": "a", "one_by_one": False, "n_findable": None, "n_beams": None}


def next_token(tokens):
  """Of the made-up model: a function of all tokens before."""
  return hash(tuple(tokens)) % 50


def next_beams(texts, width):
  """(which text, by which token) of each that a made-up search goes on with."""
  n = hash(tuple(texts))
  return [((n >> 3 * i) % len(texts), (n >> 5 * i) % 50) for i in range(1 + n % width)]


class Device:
  """Pages that remember what was written: of each token all that came before it, as keys and values do. It
  refuses to make a token of anything else."""

  def __init__(self, scheduler):
    self.scheduler, self.written, self.last, self.begun = scheduler, {}, {}, {}
    self.fed = collections.defaultdict(set)  # id -> positions.

  def run(self, plan):
    """id -> the token made; of a search, what came before each of its tokens."""
    made, A = {}, self.scheduler.page_size
    touched = collections.Counter()

    def feed(pages, start, tokens):
      before = self.written[pages[(start - 1) // A], (start - 1) % A] if start else ()
      for i, token in enumerate(tokens, start):
        touched[pages[i // A], i % A] += 1
        before = self.written[pages[i // A], i % A] = (*before, token)

    def look(pages, n):
      seen = [self.written[pages[i // A], i % A] for i in range(n)]
      assert all(each == seen[-1][:i + 1] for i, each in enumerate(seen))
      return seen[-1]

    copies = {(row.pages[row.position // A], i): self.written.get((row.copied, i))
              for row in plan.rows if row.copied is not None for i in range(A)}
    assert len(copies) == A * sum(row.copied is not None for row in plan.rows)
    self.written |= copies
    for row in plan.rows:
      assert row.sequence.n_unknown == 1 or not row.sequence.one_by_one
      assert (row.token is not None) == bool(row.sequence.n_beams)
      if row.token is not None:
        self.last[row.slot] = row.token
      feed(row.pages, row.position, [self.last[row.slot]])
    assert plan.n_chunk <= self.scheduler.chunks[-1] and len(plan.chunk) <= self.scheduler.most_parts
    n_pages = [-(-(c.start + len(c.tokens)) // A) for c in plan.chunk]
    assert len(plan.chunk) < 2 or sum(n_pages) <= self.scheduler.most_pages
    for c in plan.chunk:
      assert c.tokens and c.is_first == (self.begun.get(c.slot) != (c.sequence.id, c.start))
      self.begun[c.slot] = c.sequence.id, c.start + len(c.tokens)
      feed(c.pages, c.start, c.tokens)
      self.fed[c.sequence.id] |= set(range(c.start, c.start + len(c.tokens)))
    searched = collections.defaultdict(list)
    made_by = [(row, row.position + 1) for row in plan.rows]
    made_by += [(c, c.start + len(c.tokens)) for c in plan.chunk if c.makes_token]
    for part, n in made_by:
      text = look(part.pages, n)
      if part.sequence.n_beams:
        searched[part.sequence.id].append(text)
        self.last[part.slot] = None
      else:
        made[part.sequence.id] = part.slot, next_token(text)
    assert not touched or max(touched.values()) == 1 and all(page != TRASH for page, _ in touched)
    slots = [part.slot for part in (*plan.rows, *plan.chunk)]
    assert len(set(slots)) == len(slots)
    for slot, token in made.values():
      self.last[slot] = token
    return {id: token for id, (_, token) in made.items()} | searched


def alone(prompt, max_tokens):
  tokens = list(prompt)
  for _ in range(max_tokens):
    tokens.append(next_token(tokens))
  return tokens[len(prompt):]


def search_alone(prompt, max_tokens, width):
  texts = [tuple(prompt)]
  for _ in range(max_tokens):
    texts = [(*texts[i], token) for i, token in next_beams(texts, width)]
  return texts


def run_all(scheduler, requests, *, late=1, cancel=()):
  """What each request got; tokens are known `late` steps after they were made."""
  device, unread, out, ended = Device(scheduler), collections.deque(), collections.defaultdict(list), set()
  arrivals, n = sorted(requests, key=lambda r: r["at"]), 0
  for step in range(10_000):
    while arrivals and arrivals[0]["at"] <= step:
      r = arrivals.pop(0)
      if r["id"] not in ended:
        scheduler.add(r["id"], r["prompt"], r["max_tokens"], user=r["user"], one_by_one=r["one_by_one"],
                      n_findable=r["n_findable"], n_beams=r["n_beams"])
    for id in [id for id, at in cancel if at == step]:
      scheduler.end(id)
      ended.add(id)
    plan = scheduler.plan(alone := not scheduler.makes_tokens)
    check_chunk(scheduler, plan, alone)
    n += plan is not None
    unread.append(device.run(plan) if plan else {})
    while len(unread) > late or (unread and plan is None):
      for id, token in unread.popleft().items():
        if isinstance(token, list):
          r = next(r for r in requests if r["id"] == id)
          beams = next_beams(token, r["n_beams"])
          scheduler.fork(id, beams)
          if id not in ended and len(token[0]) + 1 == len(r["prompt"]) + r["max_tokens"]:
            out[id] = [(*token[i], new) for i, new in beams]
            scheduler.end(id)
            ended.add(id)
          continue
        scheduler.read(id, token)
        if id in ended:
          continue
        out[id].append(token)
        if len(out[id]) == next(r["max_tokens"] for r in requests if r["id"] == id):
          scheduler.end(id)
          ended.add(id)
    if not arrivals and not scheduler.n_running and not scheduler.n_waiting and not any(unread):
      for r in requests:
        own = set(range(r["n_findable"], len(r["prompt"]))) if r["n_findable"] is not None else set()
        assert own <= device.fed[r["id"]] or r["id"] in dict(cancel)
      return out, n
  raise AssertionError("it never ended")


def check_chunk(scheduler, plan, alone):
  """As long as it may be, and no longer than its program; the longest never beside those that wait for it."""
  if plan is None or not plan.chunk:
    return
  sizes, n, last = scheduler.chunks, plan.n_chunk, plan.chunk[-1]
  size = next(size for size in sizes if size >= n)
  if size == sizes[-1] and len(sizes) > 1:
    assert alone and not plan.rows
  assert all(part.start + len(part.tokens) == part.sequence.n_read for part in plan.chunk[:-1])
  left = n + last.sequence.n_read - last.start - len(last.tokens)
  assert n in (size, left) and (n >= 3 / 4 * size or size == sizes[0])
  longer = [s for s in (sizes if alone or len(sizes) == 1 else sizes[:-1]) if s > size]
  assert not longer or left in (n, *range(int(3 / 4 * longer[0] + 0.99)))


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=40)  # Few letters: many begin alike.
chunk_sizes = st.sets(st.integers(1, 17), min_size=1, max_size=3).map(sorted).map(tuple)
bounds = st.fixed_dictionaries({"most_parts": st.integers(1, 4), "most_pages": st.integers(1, 12)})
ONE = {"most_parts": 1, "most_pages": 9}
a_request = st.fixed_dictionaries({
  "prompt": prompts, "max_tokens": st.integers(1, 12), "at": st.integers(0, 30),
  "user": st.sampled_from("ab"), "one_by_one": st.booleans(),
  "n_findable": st.none() | st.integers(0, 40), "n_beams": st.none()})


@settings(max_examples=300, deadline=None)
@given(st.lists(a_request, min_size=1, max_size=12), st.integers(1, 5), st.integers(14, 40),
       chunk_sizes, bounds, st.booleans(), st.integers(1, 3),
       st.sets(st.tuples(st.integers(0, 11), st.integers(0, 60)), max_size=3))
def test_every_request_gets_what_it_would_get_alone(requests, slots, n_pages, chunks, most, keep, late,
                                                    cancel):
  requests = [{**r, "id": i} for i, r in enumerate(requests)]
  scheduler = Scheduler(slots=slots, n_pages=n_pages, page_size=4, chunks=chunks, **most, keep_prefixes=keep)
  out, _ = run_all(scheduler, requests, late=late, cancel=cancel)
  cancelled = {id for id, _ in cancel}
  for r in requests:
    want = alone(r["prompt"], r["max_tokens"])
    assert out[r["id"]] == want or r["id"] in cancelled and out[r["id"]] == want[:len(out[r["id"]])]
  assert scheduler.pages.held == 0 and scheduler.pages.available == n_pages - 1


@settings(max_examples=200, deadline=None)
@given(st.lists(a_request, max_size=4), st.lists(st.tuples(prompts, st.integers(1, 9), st.integers(0, 20),
                                                           st.integers(1, 4)), min_size=1, max_size=4),
       st.integers(4, 8), st.integers(0, 12), chunk_sizes, bounds, st.booleans(), st.integers(1, 3),
       st.sets(st.tuples(st.integers(0, 7), st.integers(0, 60)), max_size=2))
def test_every_search_gets_what_it_would_get_alone(requests, searches, slots, n_spare, chunks, most, keep,
                                                   late, cancel):
  """Its texts go on from what they went on from, whatever is shared, copied and lost."""
  requests = requests + [{**NO_SEARCH, "prompt": prompt, "max_tokens": n, "at": at, "n_beams": width}
                         for prompt, n, at, width in searches]
  requests = [{**r, "id": i} for i, r in enumerate(requests)]
  n_needed = lambda r: len(r["prompt"]) // 4 + (r["n_beams"] or 1) * (
    -(-(len(r["prompt"]) + r["max_tokens"]) // 4) - len(r["prompt"]) // 4)
  scheduler = Scheduler(slots=slots, n_pages=max(map(n_needed, requests)) + n_spare + 1, page_size=4,
                        chunks=chunks, **most, keep_prefixes=keep)
  out, _ = run_all(scheduler, requests, late=late, cancel=cancel)
  for r in requests:
    if r["id"] not in dict(cancel):
      args = r["prompt"], r["max_tokens"]
      assert out[r["id"]] == (search_alone(*args, r["n_beams"]) if r["n_beams"] else alone(*args))
  assert scheduler.pages.held == 0 and not any(scheduler.pages._holders)
  assert len(scheduler._free_slots) == slots


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "release", "hold", "keep", "find"]), st.integers(0, 30)),
                max_size=2000))
def test_no_page_is_lost_or_had_twice(moves):
  pages, held, kept = Pages(9), [], {}
  for move, i in moves:
    if move == "take" and pages.available:
      page = pages.take()
      assert page not in held and page != TRASH
      kept = {k: p for k, p in kept.items() if p != page}
      held.append(page)
    elif move == "take":
      with pytest.raises(IndexError):
        pages.take()
    elif move == "release" and held:
      pages.release(held.pop(i % len(held)))
    elif move == "hold" and held:
      pages.hold(held[i % len(held)])
      held.append(held[i % len(held)])
    elif move == "keep" and held:
      page, key = held[i % len(held)], bytes([i])
      if key not in kept and page not in kept.values():
        kept[key] = page
      pages.keep(page, key)
    elif move == "find":
      assert pages.find([bytes([i])]) == ([kept[bytes([i])]] if bytes([i]) in kept else [])
      for page in pages.find([bytes([i])]):
        pages.hold(page)
        held.append(page)
    assert pages.held == len(set(held)) and all(pages._holders[p] == held.count(p) for p in range(1, 9))


def test_a_search_needs_pages_for_all_its_texts():
  scheduler = Scheduler(slots=3, n_pages=12, page_size=4, chunks=(8,), **ONE)
  with pytest.raises(ValueError, match="12 in 3 beams need 13 pages.*nearest valid max_tokens: 11"):
    scheduler.add(0, [0] * 6, 12, n_beams=3)
  scheduler.add(0, [0] * 6, 11, n_beams=3)


def test_users_take_turns():
  scheduler = Scheduler(slots=1, n_pages=20, page_size=4, chunks=(8,), **ONE)
  for id, user in enumerate("aaaab"):
    scheduler.add(id, [1, 2], 1, user=user)
  order = []
  while (plan := scheduler.plan(True)) is not None:
    order.append(plan.chunk[0].sequence.id)
    scheduler.end(order[-1])
  assert order == [0, 4, 1, 2, 3]


@pytest.mark.parametrize("most_parts, most_pages, together", [
  (4, 12, [0, 1, 2]), (2, 12, [0, 1]), (4, 4, [0, 1]), (4, 1, [0])])
def test_short_prompts_share_a_chunk(most_parts, most_pages, together):
  scheduler = Scheduler(slots=4, n_pages=20, page_size=4, chunks=(16,), most_parts=most_parts,
                        most_pages=most_pages)
  for id in range(4):
    scheduler.add(id, [id] * 5, 2)
  chunk = scheduler.plan(True).chunk
  whole = [part.sequence.id for part in chunk if part.makes_token]
  assert whole == together and all(part.tokens == [part.sequence.id] * len(part.tokens) for part in chunk)


def test_one_that_lost_its_pages_comes_back_when_its_tokens_are_known():
  """Even where there is room for it at once."""
  scheduler = Scheduler(slots=2, n_pages=7, page_size=4, chunks=(8,), **ONE)
  scheduler.add(0, [0] * 7, 12)
  scheduler.add(1, [1] * 7, 12)
  preempted = False
  for _ in range(30):
    plan = scheduler.plan(True)
    if scheduler.counters["preemptions"] and not preempted:
      preempted = True
      assert scheduler.is_waiting(1) and not scheduler.is_waiting(0)
      scheduler.end(0)  # Its pages are free.
      assert scheduler.plan(True) is None
      scheduler.read(1, 5)  # All tokens but the first were unknown until now.
      while scheduler._known[1].n_unknown:
        scheduler.read(1, 5)
      chunk, = scheduler.plan(True).chunk
      assert chunk.sequence.id == 1 and len(chunk.sequence.tokens) > 8
      assert not scheduler.is_waiting(1) and not scheduler.is_waiting(0)  # It runs; it has ended.
      return
    if plan is None:
      break
  raise AssertionError("nothing was preempted")


def test_a_page_is_found_by_all_that_stands_before_it():
  scheduler = Scheduler(slots=1, n_pages=9, page_size=4, chunks=(16,), **ONE)
  hits = []
  for id, prompt in enumerate(([0] * 4 + [1] * 5, [2] * 4 + [1] * 5, [0] * 4 + [1] * 5)):
    scheduler.add(id, prompt, 1)
    hits.append(scheduler.plan(True).chunk[0].start)
    scheduler.end(id)
  assert hits == [0, 0, 8]


def test_tokens_that_are_to_be_fed_are_not_found():
  scheduler = Scheduler(slots=1, n_pages=9, page_size=4, chunks=(16,), **ONE)
  starts = []
  for id, n_findable in enumerate((0, None, 12, 11, 8, 3)):
    scheduler.add(id, list(range(14)), 0, n_findable=n_findable)
    starts.append(scheduler.plan(True).chunk[0].start)
    scheduler.end(id)
  assert starts == [0, 12, 12, 8, 8, 0] and scheduler.counters["prefix_hit_tokens"] == sum(starts)


def test_what_is_taken_again_is_found_no_more():
  pages = Pages(2)
  page = pages.take()
  pages.keep(page, b"a")
  pages.release(page)
  assert pages.find([b"a"]) == [page] and pages.take() == page and pages.find([b"a"]) == []

"""Which request gets which slot, which pages and which turn. Plain Python: no array and no device.

A step of the engine feeds the last token of every running request, and beside them a chunk: tokens of a few
prompts (chunked prefill, arXiv:2308.16369). Keys and values lie in pages of A tokens (arXiv:2309.06180); page
0 takes what nobody reads. Full pages are kept by the hash of all tokens up to their end, for the next request
that begins with the same.
"""
import array
import collections
import dataclasses
import hashlib
import itertools

PAGE_SIZE = 32  # Tokens a page, where no one says another number.
TRASH = 0  # The page of rows without a request.


class Pages:
  """The pages of one pool: free, held by requests, or idle (held by none, and still worth finding).

  Attributes:
    total: how many can be held.
  """

  def __init__(self, n_pages: int):
    self.total = n_pages - 1
    self._free = list(range(n_pages - 1, TRASH, -1))
    self._holders = [0] * n_pages
    self._key, self._page = {}, {}  # Page -> the hash it is kept by, and back.
    self._idle = collections.OrderedDict()  # The one that was let go first leaves first.

  @property
  def held(self) -> int:
    return self.total - self.available

  @property
  def available(self) -> int:
    return len(self._free) + len(self._idle)

  def take(self) -> int:
    """A page whose content is of no use any more. IndexError: none is available."""
    if self._free:
      page = self._free.pop()
    elif self._idle:
      page, _ = self._idle.popitem(last=False)
      del self._page[self._key.pop(page)]
    else:
      raise IndexError("no page is available")
    self._holders[page] = 1
    return page

  def find(self, keys: list[bytes]) -> list[int]:
    """The pages of as many of the first keys as are there. They are not held yet."""
    found = []
    for key in keys:
      if (page := self._page.get(key)) is None:
        break
      found.append(page)
    return found

  def hold(self, page: int) -> None:
    """One holder more, of a page that has one or is idle."""
    self._idle.pop(page, None)
    self._holders[page] += 1

  def is_shared(self, page: int) -> bool:
    return self._holders[page] > 1

  def release(self, page: int) -> None:
    assert self._holders[page] > 0, f"page {page} is held by none"
    self._holders[page] -= 1
    if self._holders[page]:
      return
    if page in self._key:
      self._idle[page] = None
    else:
      self._free.append(page)

  def keep(self, page: int, key: bytes) -> None:
    """From now on `find` knows it by this key, unless another page is known by it."""
    if key not in self._page and page not in self._key:
      self._page[key], self._key[page] = page, key


def hash_page(before: bytes, tokens: list[int]) -> bytes:
  """The key of a page: it says all tokens from the first to its last."""
  return hashlib.blake2b(before + array.array("q", tokens).tobytes(), digest_size=16).digest()


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
  """A request as the scheduler sees it. Its first `n_read` tokens are fed in chunks, each later one by
  itself, as the last that was made."""
  id: int
  user: str
  tokens: list[int]  # Of the prompt, and those made that are known.
  max_tokens: int
  one_by_one: bool  # A token is made only when the one before is known.
  n_findable: int  # So many tokens of the prompt need not be fed, where pages with them are known.
  n_beams: int | None  # Most texts of its search, all of one length; None: it is none.
  slots: list[int] = dataclasses.field(default_factory=list)  # As many, or one, while it runs.
  tables: list[list[int]] = dataclasses.field(default_factory=list)  # The pages of each of its texts.
  given: list[int] = dataclasses.field(default_factory=list)  # The last tokens of a search's texts.
  keys: list[bytes] = dataclasses.field(default_factory=list)  # Of the full pages of `tokens`.
  n_found: int = 0  # Tokens in pages that were there already.
  n_read: int = 0
  n_fed: int = 0  # Tokens whose keys and values the steps planned so far write.
  n_made: int = 0  # Tokens that the steps planned so far make.
  n_unknown: int = 0  # Of them, those that `Scheduler.read` or `fork` was not told.

  @property
  def n_slots(self) -> int:
    return self.n_beams or 1


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
  """A running request, or a text of its search, makes a token: its last one is fed at `position`."""
  sequence: Sequence
  slot: int
  position: int
  pages: list[int]
  token: int | None = None  # The last one, where it is not what was made in this slot.
  copied: int | None = None  # The page that the position is in first becomes a copy of this one.
  makes_token = True


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
  """Of a chunk: tokens of a prompt are fed from position `start`; after the last of them a token is made."""
  sequence: Sequence
  slot: int
  start: int
  tokens: list[int]
  pages: list[int]
  is_first: bool  # Since the request has this slot.
  makes_token: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
  rows: list[Row]
  chunk: list[Part]

  @property
  def n_chunk(self) -> int:
    """Tokens."""
    return sum(len(part.tokens) for part in self.chunk)


class Scheduler:
  """Continuous batching (Orca, OSDI '22) over the slots and pages of one pool.

  Requests that wait take turns by user, and first come first served within one. One that lost its pages to
  another is the first to get some again.

  Attributes:
    chunks: sizes, the shortest first.
    most_parts, most_pages: of a chunk.
    counters: prompt_tokens, prefix_hit_tokens, preemptions: sums since the start.
  """

  def __init__(self, *, slots: int, n_pages: int, page_size: int, chunks: tuple[int, ...],
               most_parts: int, most_pages: int, keep_prefixes: bool = True):
    """most_pages: of all parts together, but for the first, which has what it needs."""
    self.pages, self.page_size, self.chunks = Pages(n_pages), page_size, chunks
    self.most_parts, self.most_pages = most_parts, most_pages
    self.counters = collections.Counter()
    self._keep_prefixes = keep_prefixes
    self._free_slots = list(range(slots - 1, -1, -1))
    self._running = {}  # id -> Sequence, in the order of their admission.
    self._waiting = collections.OrderedDict()  # User -> requests; the user whose turn it is comes first.
    self._preempted = collections.deque()
    self._known = {}

  @property
  def n_running(self) -> int:
    return len(self._running)

  @property
  def n_waiting(self) -> int:
    return len(self._known) - len(self._running)

  def add(self, id: int, prompt: list[int], max_tokens: int, *, user: str = "", one_by_one: bool = False,
          n_findable: int | None = None, n_beams: int | None = None) -> None:
    """Args:
      n_findable: so many tokens of the prompt need not be fed, where pages with them are known; None: all.
      n_beams: most texts of a search, of which `fork` tells what goes on; one that loses its pages begins
        again.

    Raises:
      ValueError: it is longer than all pages together.
    """
    n_shared = len(prompt) // self.page_size
    each = self._n_pages(len(prompt) + max(max_tokens - 1, 0)) - n_shared
    needed = n_shared + each * (n_beams or 1)
    if needed > self.pages.total:
      room = n_shared + max(self.pages.total - n_shared, 0) // (n_beams or 1)
      most = max(room * self.page_size - len(prompt) + 1, 0)
      beams = f" in {n_beams} beams" if n_beams else ""
      raise ValueError(f"{len(prompt)} tokens of prompt and max_tokens={max_tokens}{beams} need {needed} "
                       f"pages of {self.page_size} tokens, and there are {self.pages.total}; nearest valid "
                       f"max_tokens: {most}")
    n_findable = len(prompt) if n_findable is None else n_findable
    sequence = Sequence(id, user, list(prompt), max_tokens, one_by_one or bool(n_beams), n_findable, n_beams)
    self._known[id] = sequence
    self._waiting.setdefault(user, collections.deque()).append(sequence)

  def is_waiting(self, id: int) -> bool:
    """Whether it has no slot yet, or none any more."""
    return id in self._known and not self._known[id].slots

  def end(self, id: int) -> None:
    """It is finished, or nobody wants it any more. The next step may have its slot and pages: what a step
    before that still writes there is written before."""
    if (s := self._known.pop(id, None)) is None:
      return
    if s.slots:
      self._leave(s)
    elif s in self._preempted:
      self._preempted.remove(s)
    else:
      self._waiting[s.user].remove(s)
      if not self._waiting[s.user]:
        del self._waiting[s.user]

  def read(self, id: int, token: int) -> None:
    """A token that a planned step has made is known."""
    if (s := self._known.get(id)) is not None:
      s.tokens.append(token)
      s.n_unknown -= 1
      self._keep_full_pages(s)

  def fork(self, id: int, beams: list[tuple[int, int]]) -> None:
    """A planned step has made tokens of a search's texts, and (which of them, by which token) go on. They
    share the pages of what they go on from; the last one, if it is not full, until it is written to."""
    if (s := self._known.get(id)) is None:
      return
    s.n_unknown -= 1
    if not s.slots:
      return  # It has lost its pages since.
    before, s.tables = s.tables, [s.tables[parent] for parent, _ in beams]
    s.given = [token for _, token in beams]
    for page in itertools.chain(*s.tables):
      self.pages.hold(page)
    for page in itertools.chain(*before):
      self.pages.release(page)

  @property
  def makes_tokens(self) -> bool:
    """Whether any request's next step is to make a token."""
    return any(self._can_make(s) for s in self._running.values())

  def plan(self, alone: bool) -> Plan | None:
    """What the next step does, taken as done. None: there is nothing to do before a token is known.

    Args:
      alone: nobody makes a token, here or in another pool: a chunk may be of the longest size.
    """
    rows = [(s, copied) for s in list(self._running.values())
            if self._can_make(s) and (copied := self._grow(s)) is not None]
    chunk = self._plan_chunk(self.chunks if alone else self.chunks[:-1] or self.chunks)
    rows = [row for s, copied in rows for row in self._feed(s, copied)]
    return Plan(rows, chunk) if rows or chunk else None

  def _can_make(self, s):
    """Its own turn; not of one that lost its slot in this plan to a request before it."""
    return (s.slots and s.n_fed >= s.n_read and s.n_made < s.max_tokens
            and not (s.one_by_one and s.n_unknown))

  def _feed(self, s, copied):
    given = s.given or [None]
    rows = [Row(s, slot, s.n_fed, *each) for slot, *each in zip(s.slots, s.tables, given, copied)]
    s.n_fed, s.n_made, s.n_unknown = s.n_fed + 1, s.n_made + 1, s.n_unknown + 1
    return rows

  def _plan_chunk(self, sizes):
    wanted = self._want_parts(sizes[-1])
    n = sum(n for _, n in wanted)
    # A step's time is that of its tokens: no more than a quarter of a chunk is padding, but of the shortest.
    room, chunk = max((size for size in sizes if 3 * size <= 4 * n), default=sizes[0]), []
    for s, n in wanted:
      if (n := min(n, room)) > 0:
        chunk.append(self._feed_part(s, n))
        room -= n
    return chunk

  def _want_parts(self, most):
    """(sequence, tokens of its prompt) of those that come next, `most` tokens together."""
    wanted, n_pages = [], 0
    begun = iter([s for s in self._running.values() if s.n_fed < s.n_read])
    while most and len(wanted) < self.most_parts and (s := next(begun, None) or self._admit()) is not None:
      n = min(most, s.n_read - s.n_fed)
      n_pages += self._n_pages(s.n_fed + n)
      if wanted and n_pages > self.most_pages:
        break
      wanted.append((s, n))
      most -= n
    return wanted

  def _feed_part(self, s, n):
    start = s.n_fed
    s.n_fed += n
    makes = s.n_fed == s.n_read and s.n_made < s.max_tokens
    if makes:
      s.n_made, s.n_unknown = s.n_made + 1, s.n_unknown + 1
    self._keep_full_pages(s)
    return Part(s, s.slots[0], start, s.tokens[start:s.n_fed], s.tables[0], start == s.n_found, makes)

  def _admit(self):
    """The next request gets a slot, and pages for all its tokens; None: there is none, or no room."""
    if self._preempted:
      s = self._preempted[0]
    elif self._waiting:
      s = next(iter(self._waiting.values()))[0]
    else:
      return None
    if len(self._free_slots) < s.n_slots or s.n_unknown:
      return None
    self._add_keys(s)
    most = len(s.tokens) if s.n_made else s.n_findable  # What was to be fed for its own sake was fed.
    found = self.pages.find(s.keys[:min(len(s.tokens) - 1, most) // self.page_size])  # At least one is fed.
    for page in found:
      self.pages.hold(page)
    n_new = self._n_pages(len(s.tokens)) - len(found)
    n_next = sum(r.n_slots for r in self._running.values())  # One each is left for those that run.
    if n_new + n_next > self.pages.available:
      for page in found:
        self.pages.release(page)
      return None
    s.slots = [self._free_slots.pop() for _ in range(s.n_slots)]
    s.tables, s.given = [found + [self.pages.take() for _ in range(n_new)]], []
    s.n_read, s.n_found = len(s.tokens), len(found) * self.page_size
    s.n_fed = s.n_found
    if self._preempted:
      self._preempted.popleft()
    else:
      self.counters["prompt_tokens"] += s.n_read
      self.counters["prefix_hit_tokens"] += s.n_found
      self._pass_turn(s.user)
    self._running[s.id] = s
    return s

  def _pass_turn(self, user):
    self._waiting[user].popleft()
    if self._waiting[user]:
      self._waiting.move_to_end(user)
    else:
      del self._waiting[user]

  def _grow(self, s):
    """Gives each of its texts a page of its own for the next token, if need be that of the request that was
    admitted last. Returns of which page each of them is to become a copy; None: it is itself the last."""
    at, copied = s.n_fed // self.page_size, [None] * len(s.tables)
    for i, table in enumerate(s.tables):
      if at < len(table) and not self.pages.is_shared(table[at]):
        continue
      while not self.pages.available:
        last = next(reversed(self._running.values()))
        self._leave(last)
        self._preempted.appendleft(last)
        self.counters["preemptions"] += 1
        if last is s:
          return None
      s.tables[i] = [*table[:at], self.pages.take()]
      if at < len(table):
        copied[i] = table[at]
        self.pages.release(table[at])
    return copied

  def _leave(self, s):
    for page in itertools.chain(*s.tables):
      self.pages.release(page)
    self._free_slots += s.slots
    del self._running[s.id]
    s.slots, s.tables, s.n_fed, s.n_read = [], [], 0, 0
    if s.n_beams:
      s.n_made = 0

  def _add_keys(self, s):
    while (len(s.keys) + 1) * self.page_size <= len(s.tokens) and self._keep_prefixes:
      first = len(s.keys) * self.page_size
      s.keys.append(hash_page(s.keys[-1] if s.keys else b"", s.tokens[first:first + self.page_size]))

  def _keep_full_pages(self, s):
    self._add_keys(s)
    for page, key in zip(next(iter(s.tables), [])[:s.n_fed // self.page_size], s.keys):
      self.pages.keep(page, key)

  def _n_pages(self, n_tokens):
    return -(-n_tokens // self.page_size)

"""Which token comes next: logits -> ids, each request of a batch by its own settings.

The order is Hugging Face's: logit bias -> repetition penalty -> presence and frequency penalties -> what the
grammar and min_tokens forbid -> temperature -> top-k -> top-p -> min-p -> draw. Settings are arrays, so one
compiled program serves every mixture of them, and what no request of the batch asks for is skipped when it
runs. Nothing sorts the vocabulary: the borders of top-k and top-p are found by bisection, in one pass over
the logits for each bit of a float.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

MOST_TOP = 20  # Log-probabilities of other tokens that a request may ask for.
MOST_BIAS = 300  # Ids that a request may favour or forbid.
MOST_STOP_IDS = 4  # Of a request; as many again are the engine's.
NEVER = -1e20  # Below it is what cannot be drawn: padding of the vocabulary is at -1e30, whatever scales it.
BLOCK = 256  # Tokens that race as one before one of them is drawn.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
  """What one request asks for; None is off."""
  max_tokens: int = 128  # Generated ones; the prompt does not count. 0 only scores the prompt.
  temperature: float = 1.0  # 0 is greedy.
  top_k: int | None = None  # Only the k likeliest (all that tie with the last of them).
  top_p: float | None = None  # Only the smallest set of likeliest tokens whose mass is at least p.
  min_p: float | None = None  # Only tokens at least this share as likely as the likeliest.
  repetition_penalty: float | None = None  # Of tokens in the prompt or the text so far; above 1 discourages.
  presence_penalty: float = 0.0  # Taken from the logit of each token generated so far (OpenAI's).
  frequency_penalty: float = 0.0  # The same, once for each time it was generated.
  logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit).
  stop: tuple[str, ...] = ()  # The text ends before the one that is complete first.
  stop_ids: tuple[int, ...] = ()  # Tokens that end the text, beside the engine's.
  min_tokens: int = 0  # Before so many are generated, no stop id is drawn.
  logprobs: int | None = None  # So many of the likeliest tokens are told with each token.
  prompt_logprobs: int | None = None  # The same for the tokens of the prompt.
  seed: int = 0

  def validate(self, vocab_size: int | None = None) -> "Sampling":
    """Raises ValueError with the name, the value and what is valid.

    Args:
      vocab_size: what the ids must be below, where it is known.
    """
    for name in ("max_tokens", "top_k", "min_tokens", "logprobs", "prompt_logprobs", "seed"):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int | None):
        raise ValueError(f"{name}={value!r} must be a whole number")
    least = 1 if self.prompt_logprobs is None else 0
    bias = dict(self.logit_bias)
    most = 2**31 if vocab_size is None else vocab_size
    known = lambda ids: all(isinstance(i, int) and 0 <= i < most for i in ids)
    id_valid = "token ids" if vocab_size is None else f"token ids below {vocab_size}"
    for name, holds, valid in (
        ("max_tokens", least <= self.max_tokens < 2**31, "at least 1, or 0 where prompt_logprobs is set"),
        ("temperature", self.temperature == 0 or 1e-12 <= self.temperature <= 1e6,
         "0 (which is greedy), or in [1e-12, 1e6]"),
        ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None for off"),
        ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or None for off"),
        ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1], or None for off"),
        ("repetition_penalty", self.repetition_penalty is None or 1e-3 <= self.repetition_penalty <= 1e3,
         "in [0.001, 1000], or None for off"),
        ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
        ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
        ("logit_bias", len(bias) == len(self.logit_bias) <= MOST_BIAS and known(bias)
         and all(-100 <= value <= 100 for value in bias.values()),
         f"of at most {MOST_BIAS} different {id_valid}, each with a number in [-100, 100]"),
        ("stop", all(self.stop), "of strings that are not empty"),
        ("stop_ids", len(self.stop_ids) <= MOST_STOP_IDS and known(self.stop_ids),
         f"of at most {MOST_STOP_IDS} {id_valid}"),
        ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"in [0, max_tokens={self.max_tokens}]"),
        ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MOST_TOP, f"in [0, {MOST_TOP}]"),
        ("prompt_logprobs", self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MOST_TOP,
         f"in [0, {MOST_TOP}]"),
        ("seed", 0 <= self.seed < 2**32, "in [0, 2**32)")):
      if not holds:
        raise ValueError(f"{name}={str(getattr(self, name))[:100]} must be {valid}")
    return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of a batch, as `sample` reads them."""
  temperature_B: jax.Array
  top_k_B: jax.Array  # Off: V or more.
  top_p_B: jax.Array  # Off: 1.
  min_p_B: jax.Array  # Off: 0.
  penalty_B: jax.Array  # Off: 1.
  presence_B: jax.Array
  frequency_B: jax.Array
  bias_id_BI: jax.Array  # [B, MOST_BIAS]; -1 is none.
  bias_BI: jax.Array
  stop_id_BS: jax.Array  # [B, 2 * MOST_STOP_IDS]; -1 is none.
  min_pos_B: jax.Array  # Before this position no stop id is drawn.
  n_top_B: jax.Array
  seed_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
  """What `sample` made. The log-probabilities are the model's own: before all that the settings do."""
  token_B: jax.Array
  logprob_B: jax.Array
  top_id_Bn: jax.Array  # The likeliest first; of those that tie, the lower id. Zeros beyond the row's n_top.
  top_logprob_Bn: jax.Array


_ROW = np.dtype([
    ("temperature_B", "f4"), ("top_k_B", "i4"), ("top_p_B", "f4"), ("min_p_B", "f4"), ("penalty_B", "f4"),
    ("presence_B", "f4"), ("frequency_B", "f4"), ("bias_id_BI", "i4", MOST_BIAS),
    ("bias_BI", "f4", MOST_BIAS), ("stop_id_BS", "i4", 2 * MOST_STOP_IDS), ("min_pos_B", "i4"),
    ("n_top_B", "i4"), ("seed_B", "u4")])


@functools.lru_cache(maxsize=4096)
def _settings_row(s: Sampling, stop_ids: tuple[int, ...]) -> bytes:
  if len(stop_ids) > MOST_STOP_IDS:
    raise ValueError(f"stop_ids={stop_ids} must be at most {MOST_STOP_IDS}")
  off = lambda value, instead: instead if value is None else value
  pad = lambda values, n, fill: np.array([*values, *[fill] * (n - len(values))])
  ids, values = [i for i, _ in s.logit_bias], [value for _, value in s.logit_bias]
  row = np.zeros((), _ROW)
  row["temperature_B"], row["top_p_B"], row["min_p_B"] = s.temperature, off(s.top_p, 1), off(s.min_p, 0)
  row["top_k_B"] = min(off(s.top_k, 2**31 - 1), 2**31 - 1)
  row["penalty_B"] = off(s.repetition_penalty, 1)
  row["presence_B"], row["frequency_B"] = s.presence_penalty, s.frequency_penalty
  row["bias_id_BI"], row["bias_BI"] = pad(ids, MOST_BIAS, -1), pad(values, MOST_BIAS, 0)
  row["stop_id_BS"] = pad((*stop_ids, *s.stop_ids), 2 * MOST_STOP_IDS, -1)
  row["min_pos_B"], row["n_top_B"], row["seed_B"] = s.min_tokens, off(s.logprobs, 0), s.seed
  return row.tobytes()


def stack_settings(settings: list[Sampling], starts=0, stop_ids: tuple[int, ...] = ()) -> Settings:
  """NumPy arrays, one entry a request; those of one Sampling are made once.

  Args:
    starts: the lengths of the prompts, which min_tokens counts from.
    stop_ids: of every request beside its own; at most MOST_STOP_IDS.
  """
  stop_ids = tuple(stop_ids)
  rows_B = np.frombuffer(b"".join([_settings_row(s, stop_ids) for s in settings]), _ROW)
  arrays = {name: np.ascontiguousarray(rows_B[name]) for name in _ROW.names}
  min_tokens_B = arrays["min_pos_B"]
  arrays["min_pos_B"] = np.where(min_tokens_B > 0, min_tokens_B + np.asarray(starts, np.int32), 0)
  return Settings(**arrays)


def sample(logits_BV, counts_BV, mask_BW, pos_B, settings: Settings, *, n_top: int) -> Drawn:
  """Draws one token a row. Rows do not touch each other, so it may run on any split of the batch.

  Args:
    logits_BV: float32; what can never be drawn is at -1e30 or below.
    counts_BV: int32, twice the times that the token was generated, and 1 more if it is in the prompt.
    mask_BW: uint32 [B, ceil(V / 32)]: token i may be drawn where bit i % 32 of word i // 32 is set.
    pos_B: int32, where the token will stand. It and the seed are all that the draw depends on beside the
      logits: the rest of the batch, and how the text came to be, change nothing.
    n_top: most log-probabilities that a row can ask for (settings.n_top_B); 0 leaves them out.
  """
  greedy = settings.temperature_B <= 0
  scores_BV = adjust(logits_BV, counts_BV, mask_BW, pos_B, settings)
  greedy_B = jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)

  def draw(scores_BV):
    scores_BV = scores_BV / jnp.where(greedy, 1, settings.temperature_B)[:, None]
    filters = (settings.top_k_B < scores_BV.shape[1]) | (settings.top_p_B < 1) | (settings.min_p_B > 0)
    scores_BV = _where_asked(filters, lambda x: filter_logits(x, settings), scores_BV)
    make_key = lambda seed, pos: jax.random.fold_in(jax.random.key(seed), pos)
    drawn_B = draw_from(scores_BV, jax.vmap(make_key)(settings.seed_B, pos_B))
    return jnp.where(greedy, greedy_B, drawn_B)

  token_B = jax.lax.cond(jnp.all(greedy), lambda _: greedy_B, draw, scores_BV)
  return Drawn(token_B, *measure(logits_BV, token_B, settings.n_top_B, n_top=n_top))


def measure(logits_BV, token_B, n_top_B, *, n_top: int):
  """How likely the model holds the tokens, and which it holds likeliest.

  Returns:
    (logprob_B, top_id_Bn, top_logprob_Bn) as in Drawn; the last two are made only where a row asks.
  """
  total_B = jax.nn.logsumexp(logits_BV, axis=-1)
  logprob_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0] - total_B

  def find(logits_BV):
    top_Bn, id_Bn = jax.lax.top_k(logits_BV, n_top)
    asked_Bn = jnp.arange(n_top)[None] < n_top_B[:, None]
    return jnp.where(asked_Bn, id_Bn, 0), jnp.where(asked_Bn, top_Bn - total_B[:, None], 0)

  B = logits_BV.shape[0]
  nothing = lambda _: (jnp.zeros((B, n_top), jnp.int32), jnp.zeros((B, n_top), logits_BV.dtype))
  return logprob_B, *jax.lax.cond(jnp.any(n_top_B > 0) & (n_top > 0), find, nothing, logits_BV)


def _where_asked(asked_B, change, scores_BV):
  """change(scores_BV) where a row asks for it, when it runs."""
  return jax.lax.cond(jnp.any(asked_B), change, lambda scores_BV: scores_BV, scores_BV)


# What comes before the temperature.

def adjust(logits_BV, counts_BV, mask_BW, pos_B, settings: Settings):
  """Bias and penalties; then what the grammar, and stop ids before their time, forbid is at -inf."""
  B, V = logits_BV.shape
  if mask_BW.shape != (B, -(-V // 32)):
    raise ValueError(f"mask_BW{mask_BW.shape} must be {(B, -(-V // 32))}: a bit for each of {V} logits")
  biased_B = jnp.any(settings.bias_BI != 0, axis=1)
  penalised_B = settings.penalty_B != 1
  counted_B = (settings.presence_B != 0) | (settings.frequency_B != 0)
  masked_B = jnp.any(mask_BW != jnp.uint32(0xFFFFFFFF), axis=1)
  early_B = pos_B < settings.min_pos_B
  row_B1 = jnp.arange(B)[:, None]
  inside = lambda id_BI: jnp.where(id_BI < 0, V, id_BI)  # A negative index would count from the end.

  def bias(x_BV):
    return x_BV.at[row_B1, inside(settings.bias_id_BI)].add(settings.bias_BI, mode="drop")

  def mask(x_BV):
    bit_BWb = mask_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None] & 1
    return jnp.where(bit_BWb.reshape(B, -1)[:, :V] > 0, x_BV, -jnp.inf)

  def forbid_stops(x_BV):
    id_BS = jnp.where(early_B[:, None], inside(settings.stop_id_BS), V)
    without_BV = x_BV.at[row_B1, id_BS].set(-jnp.inf, mode="drop")
    ends_B = without_BV.max(axis=1) < NEVER  # The grammar leaves nothing but the end.
    return jnp.where(ends_B[:, None], x_BV, without_BV)

  def change(x_BV):
    x_BV = _where_asked(biased_B, bias, x_BV)
    x_BV = _where_asked(penalised_B, lambda x: penalise(x, counts_BV != 0, settings.penalty_B), x_BV)
    x_BV = _where_asked(counted_B, lambda x: discourage(x, counts_BV >> 1, settings), x_BV)
    x_BV = _where_asked(masked_B, mask, x_BV)
    return _where_asked(early_B, forbid_stops, x_BV)

  return _where_asked(biased_B | penalised_B | counted_B | masked_B | early_B, change, logits_BV)


def penalise(logits_BV, seen_BV, penalty_B):
  """Divides positive and multiplies negative logits of what was seen (CTRL, arXiv:1909.05858)."""
  penalty_B1 = penalty_B[:, None]
  penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
  return jnp.where(seen_BV, penalised_BV, logits_BV)


def discourage(logits_BV, n_made_BV, settings: Settings):
  """OpenAI's: presence is taken once from what was generated, frequency as often as it was."""
  presence_BV = jnp.where(n_made_BV > 0, settings.presence_B[:, None], 0)
  return logits_BV - n_made_BV.astype(logits_BV.dtype) * settings.frequency_B[:, None] - presence_BV


# Filters, and the draw.

def filter_logits(scores_BV, settings: Settings):
  """Puts at -inf what top-k, then top-p of the rest, then min-p take away. The likeliest token always stays.

  Ties are as in Hugging Face's warpers: top-k keeps all that tie with the k-th; of those that tie at its
  border, top-p takes away the lower ids.
  """
  fewer_B = settings.top_k_B < scores_BV.shape[1]
  scores_BV = _where_asked(fewer_B, lambda x: _top_k(x, settings.top_k_B), scores_BV)
  scores_BV = _where_asked(settings.top_p_B < 1, lambda x: _top_p(x, settings.top_p_B), scores_BV)
  return _where_asked(settings.min_p_B > 0, lambda x: _min_p(x, settings.min_p_B), scores_BV)


def _top_k(scores_BV, top_k_B):
  key_BV = _ordered(scores_BV)
  k_B = jnp.minimum(top_k_B, scores_BV.shape[1])
  kth_B = _largest(lambda key_B: jnp.sum(key_BV >= key_B[:, None], axis=1) >= k_B, top_k_B.shape)
  return jnp.where(key_BV >= kth_B[:, None], scores_BV, -jnp.inf)


def _top_p(scores_BV, top_p_B):
  """Takes away as many of the least likely as hold a mass of at most 1 - p together."""
  V = scores_BV.shape[1]
  key_BV, probs_BV = _ordered(scores_BV), jax.nn.softmax(scores_BV, axis=-1)
  below = lambda key_B: jnp.sum(jnp.where(key_BV < key_B[:, None], probs_BV, 0), axis=1)
  spare_B = 1 - top_p_B
  border_B = _largest(lambda key_B: below(key_B) <= spare_B, top_p_B.shape)
  border_B = jnp.minimum(border_B, key_BV.max(axis=1))  # The likeliest stays though p be tiny.
  tie_BV = key_BV == border_B[:, None]
  each_B = jnp.max(jnp.where(tie_BV, probs_BV, 0), axis=1)
  n_off_B = jnp.floor((spare_B - below(border_B)) / each_B)  # Of those that tie at the border.
  n_off_B = jnp.where(top_p_B < 1, jnp.clip(n_off_B, 0, jnp.sum(tie_BV, axis=1) - 1), 0).astype(jnp.int32)

  def find_id(_):
    id_V = jnp.arange(V, dtype=jnp.int32)
    n_before = lambda id_B: jnp.sum(tie_BV & (id_V[None] < id_B[:, None]), axis=1)
    return _largest(lambda id_B: n_before(id_B) <= n_off_B, top_p_B.shape)

  first_B = jax.lax.cond(jnp.any(n_off_B > 0), find_id, jnp.zeros_like, n_off_B)
  keep_BV = (key_BV > border_B[:, None]) | (tie_BV & (jnp.arange(V)[None] >= first_B[:, None]))
  return jnp.where(keep_BV | (top_p_B >= 1)[:, None], scores_BV, -jnp.inf)


def _min_p(scores_BV, min_p_B):
  probs_BV = jax.nn.softmax(scores_BV, axis=-1)
  keep_BV = probs_BV >= min_p_B[:, None] * probs_BV.max(axis=-1, keepdims=True)
  return jnp.where(keep_BV, scores_BV, -jnp.inf)


def _ordered(x):
  """float32 -> int32 in the same order; what is equal stays equal (0 and -0)."""
  bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _largest(holds, shape):
  """The largest int32 for which `holds`, which is true of the least and false from some point on."""
  def bit(n, found_B):
    try_B = found_B + jax.lax.shift_left(jnp.int32(1), 31 - n)  # The first step wraps around, to 0.
    return jnp.where(holds(try_B), try_B, found_B)

  return jax.lax.fori_loop(0, 32, bit, jnp.full(shape, -2**31, jnp.int32))


def draw_from(scores_BV, key_B):
  """A token of the softmax, never one of mass 0: the first in a race, where it takes a time E / mass and E is
  exponential (the Gumbel-max trick).

  Blocks of b tokens race first, then those of one: a random number for each of 50,000 tokens takes a CPU too
  long. Logits that differ by rounding draw the same, however flat they are; where a random number falls in a
  running sum of flat ones, rounding decides once in a thousand times.
  """
  B, V = scores_BV.shape
  mass_BV = jnp.exp(scores_BV - scores_BV.max(axis=1, keepdims=True))
  mass_BCb = jnp.pad(mass_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
  C = mass_BCb.shape[1]
  draw = lambda key: jnp.maximum(jax.random.exponential(key, (C + BLOCK,)), 2.0**-24)  # It may be 0.
  exponential_Bn = jax.vmap(draw)(key_B)

  def first(mass_BN, e_BN):
    return jnp.argmax(jnp.where(mass_BN > 0, mass_BN / e_BN, -1), axis=1).astype(jnp.int32)

  block_B = first(mass_BCb.sum(axis=2), exponential_Bn[:, :C])
  mass_Bb = jnp.take_along_axis(mass_BCb, block_B[:, None, None], axis=1)[:, 0]
  return block_B * BLOCK + first(mass_Bb, exponential_Bn[:, C:])

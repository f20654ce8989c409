"""Which token comes next: logits -> ids, each request of a batch by its own settings.

The order is Hugging Face's: repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw. Settings
are arrays, so one compiled program serves every mixture of them, and what no request of the batch asks for is
skipped when it runs.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
  """What one request asks for; None is off."""
  max_tokens: int = 128  # Generated ones; the prompt does not count.
  temperature: float = 1.0  # 0 is greedy.
  top_k: int | None = None  # Only the k likeliest (all that tie with the last of them).
  top_p: float | None = None  # Only the smallest set of likeliest tokens whose mass is at least p.
  min_p: float | None = None  # Only tokens at least this share as likely as the likeliest.
  repetition_penalty: float | None = None  # Of tokens in the prompt or the text so far; above 1 discourages.
  stop: tuple[str, ...] = ()  # The text ends before the one that is complete first.
  seed: int = 0

  def validate(self) -> "Sampling":
    """Raises ValueError with the name, the value and what is valid."""
    for name in ("max_tokens", "top_k", "seed"):
      if not isinstance(getattr(self, name), int | None):
        raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number")
    for name, holds, valid in (
        ("max_tokens", self.max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= self.temperature < np.inf, "at least 0 (which is greedy)"),
        ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None for off"),
        ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or None for off"),
        ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1], or None for off"),
        ("repetition_penalty", self.repetition_penalty is None or 0 < self.repetition_penalty < np.inf,
         "above 0, or None for off"),
        ("stop", all(self.stop), "of strings that are not empty"),
        ("seed", 0 <= self.seed < 2**32, "in [0, 2**32)")):
      if not holds:
        raise ValueError(f"{name}={getattr(self, name)!r} must be {valid}")
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
  seed_B: jax.Array


def stack_settings(settings: list[Sampling]) -> Settings:
  """NumPy arrays, one entry a request."""
  column = lambda name, off, dtype: np.array(
    [off if (value := getattr(s, name)) is None else value for s in settings], dtype)
  top_k_B = np.minimum(column("top_k", 2**31 - 1, np.int64), 2**31 - 1).astype(np.int32)
  return Settings(column("temperature", 1, np.float32), top_k_B, column("top_p", 1, np.float32),
                  column("min_p", 0, np.float32), column("repetition_penalty", 1, np.float32),
                  column("seed", 0, np.uint32))


def sample(logits_BV, seen_BV, pos_B, settings: Settings):
  """Draws one token a row. Rows do not touch each other, so it may run on any split of the batch.

  Args:
    logits_BV: float32; what can never be drawn is at -1e30 or below.
    seen_BV: bool, the tokens that the repetition penalty is about.
    pos_B: int32, where the token will stand. It and the seed are all that the draw depends on beside the
      logits: the rest of the batch, and how the text came to be, change nothing.

  Returns:
    (token_B int32, logprob_B float32). The log-probability is the model's own: before penalty, temperature
    and filters.
  """
  skip = lambda logits_BV: logits_BV
  scores_BV = jax.lax.cond(jnp.any(settings.penalty_B != 1),
                           lambda x: penalise(x, seen_BV, settings.penalty_B), skip, logits_BV)
  greedy_B = jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)

  def draw(scores_BV):
    drawn_B = settings.temperature_B > 0
    scores_BV = scores_BV / jnp.where(drawn_B, settings.temperature_B, 1)[:, None]
    filters = (settings.top_k_B < scores_BV.shape[1]) | (settings.top_p_B < 1) | (settings.min_p_B > 0)
    scores_BV = jax.lax.cond(jnp.any(filters), lambda x: filter_logits(x, settings), skip, scores_BV)
    keys_B = jax.vmap(lambda seed, pos: jax.random.fold_in(jax.random.key(seed), pos))(settings.seed_B, pos_B)
    token_B = jax.vmap(jax.random.categorical)(keys_B, scores_BV).astype(jnp.int32)
    return jnp.where(drawn_B, token_B, greedy_B)

  token_B = jax.lax.cond(jnp.any(settings.temperature_B > 0), draw, lambda _: greedy_B, scores_BV)
  chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
  return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def penalise(logits_BV, seen_BV, penalty_B):
  """Divides positive and multiplies negative logits of what was seen (CTRL, arXiv:1909.05858)."""
  penalty_B1 = penalty_B[:, None]
  penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
  return jnp.where(seen_BV, penalised_BV, logits_BV)


def filter_logits(scores_BV, settings: Settings):
  """Puts at -inf what top-k, then top-p of the rest, then min-p take away. The likeliest token always stays.

  Ties are as in Hugging Face's warpers: top-k keeps all that tie with the k-th; of those that tie at its
  border, top-p takes away the lower ids.
  """
  B, V = scores_BV.shape
  id_BV = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32)[None], (B, V))
  up_BV, id_up_BV = jax.lax.sort((scores_BV, id_BV), dimension=1, is_stable=True, num_keys=1)
  at = lambda x_BV, rank_B: jnp.take_along_axis(x_BV, rank_B[:, None], axis=1)

  top_k_B1 = at(up_BV, V - jnp.minimum(settings.top_k_B, V))
  up_BV = jnp.where(up_BV >= top_k_B1, up_BV, -jnp.inf)

  mass_BV = jnp.cumsum(jax.nn.softmax(up_BV, axis=-1), axis=-1)
  removed_B = jnp.sum(mass_BV <= 1 - settings.top_p_B[:, None], axis=-1)
  removed_B = jnp.where(settings.top_p_B < 1, jnp.minimum(removed_B, V - 1), 0)
  border_B1, border_id_B1 = at(up_BV, removed_B), at(id_up_BV, removed_B)
  keep_BV = (scores_BV > border_B1) | ((scores_BV == border_B1) & (id_BV >= border_id_B1))
  keep_BV = (keep_BV | (settings.top_p_B[:, None] >= 1)) & (scores_BV >= top_k_B1)
  scores_BV = jnp.where(keep_BV, scores_BV, -jnp.inf)

  probs_BV = jax.nn.softmax(scores_BV, axis=-1)
  keep_BV = probs_BV >= settings.min_p_B[:, None] * probs_BV.max(axis=-1, keepdims=True)
  return jnp.where(keep_BV, scores_BV, -jnp.inf)

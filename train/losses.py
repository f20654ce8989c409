"""Next-token cross-entropy that never holds the [B, T, V] logits."""
import functools
import typing

import jax
import jax.numpy as jnp

from model.context import zigzag_order
from model.kernels.attention import HIDDEN
from model.layers import several, token_axes
from model.sharding import ways


class LossSpec(typing.NamedTuple):
  """What the loss is, as a hashable constant of the program."""
  chunk: int  # Tokens per device whose logits exist at one time.
  vocab_size: int
  softcap: float | None
  z_loss: float
  batch_axes: tuple[str, ...]  # Mesh axes that split the rows,
  length_axes: tuple[str, ...]  # their tokens,
  vocab_axes: tuple[str, ...]  # and the vocabulary;
  embed_axes: tuple[str, ...]  # those of the tokens' axes over which the head's other dim is split.


def loss_spec(cfg, chunk: int, z_loss: float) -> LossSpec:
  rules = cfg.rules
  return LossSpec(chunk, cfg.vocab_size, cfg.logit_softcap, z_loss, rules.batch, rules.loss_length,
                  rules.vocab, token_axes(rules))


def cross_entropy(spec, x_BTD, head_DV, targets_BT, weights_BT):
  """Sums, not means: the caller divides by the tokens of all micro-batches and all devices.

  Chunks of tokens go through the head one after the other. Under `jax.grad` each chunk's gradient is taken
  while its logits are at hand, so nothing is computed twice (the trick of Liger Kernel, arXiv:2410.10989).

  Args:
    x_BTD, head_DV: in the compute dtype; logits and sums are float32. The head is split over spec.embed_axes
      and spec.vocab_axes.
    weights_BT: float32, 0 where there is nothing to predict.

  Returns:
    (loss, (nll_B, z)): the weighted sum of nll + z_loss * logsumexp^2 over all tokens; and, for the eye only,
    the nll of each row and the sum of logsumexp^2.
  """
  bt = jax.P(spec.batch_axes or None, spec.length_axes or None)
  x_BTD, targets_BT, weights_BT = (
      jax.sharding.reshard(a, jax.P(*bt, *[None] * (a.ndim - 2))) for a in (x_BTD, targets_BT, weights_BT))
  return _cross_entropy(spec, x_BTD, head_DV, targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(spec, x_BTD, head_DV, targets_BT, weights_BT):
  return _over_devices(spec, False, x_BTD, head_DV, targets_BT, weights_BT)[:2]


def _forward(spec, x_BTD, head_DV, targets_BT, weights_BT):
  loss, aux, *grads = _over_devices(spec, True, x_BTD, head_DV, targets_BT, weights_BT)
  return (loss, aux), grads


def _backward(spec, grads, cotangent):
  scale, _ = cotangent
  dx_BTD, dhead_DV = grads
  return (dx_BTD * scale).astype(dx_BTD.dtype), (dhead_DV * scale).astype(dhead_DV.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)


def _over_devices(spec, with_grads, x_BTD, head_DV, targets_BT, weights_BT):
  """Runs `_on_device` on each device's tokens and slice of the vocabulary. The collectives are in there, by
  hand: the head is gathered once a call and its gradient summed once, not once a chunk, and no device keeps
  more of either than its slice."""
  batch, length, vocab = (axes or None for axes in (spec.batch_axes, spec.length_axes, spec.vocab_axes))
  bt, btd, b = jax.P(batch, length), jax.P(batch, length, None), jax.P(batch)
  dv = jax.P(spec.embed_axes or None, vocab)
  out = (jax.P(), (b, jax.P())) + ((btd, dv) if with_grads else ())
  local = functools.partial(_on_device, spec, with_grads)
  return jax.shard_map(local, in_specs=(btd, dv, bt, bt), out_specs=out, check_vma=False)(
      x_BTD, head_DV, targets_BT, weights_BT)


def _on_device(spec, with_grads, x_btD, head_dv, targets_bt, weights_bt):
  gather = functools.partial(jax.lax.all_gather, axis=0, tiled=True)
  embed_axes = several(spec.embed_axes)
  head_Dv = _reduce(gather, head_dv, embed_axes)
  b, t, _ = x_btD.shape
  n_chunks = -(-b * t // spec.chunk)
  size = -(-b * t // n_chunks)  # The last chunk is filled with tokens of weight 0.

  def split(a):
    flat = a.reshape(b * t, *a.shape[2:])
    return jnp.pad(flat, [(0, n_chunks * size - b * t)] + [(0, 0)] * (flat.ndim - 1)).reshape(
        n_chunks, size, *a.shape[2:])

  def join(a):
    return a.reshape(n_chunks * size, *a.shape[2:])[:b * t].reshape(b, t, *a.shape[2:])

  v = head_Dv.shape[1]
  first = jax.lax.axis_index(spec.vocab_axes) * v if spec.vocab_axes else 0
  ids_v = first + jnp.arange(v)

  def one_chunk(dhead_Dv, chunk):
    x_cD, target_c, weight_c = chunk
    raw_cv = jnp.einsum("cD,Dv->cv", x_cD, head_Dv, preferred_element_type=jnp.float32)
    capped_cv = raw_cv if spec.softcap is None else spec.softcap * jnp.tanh(raw_cv / spec.softcap)
    logits_cv = jnp.where(ids_v[None] < spec.vocab_size, capped_cv, HIDDEN)
    hit_cv = target_c[:, None] == ids_v[None]
    top_c = _reduce(jax.lax.pmax, logits_cv.max(-1), spec.vocab_axes)
    exp_cv = jnp.exp(logits_cv - top_c[:, None])
    total_c = _reduce(jax.lax.psum, exp_cv.sum(-1), spec.vocab_axes)
    hit_c = _reduce(jax.lax.psum, jnp.where(hit_cv, logits_cv, 0.0).sum(-1), spec.vocab_axes)
    lse_c = top_c + jnp.log(total_c)
    nll_c = (lse_c - hit_c) * weight_c
    z_c = lse_c**2 * weight_c
    if not with_grads:
      return dhead_Dv, (nll_c, z_c)
    # d(nll + z_loss lse^2) / d logits = softmax (1 + 2 z_loss lse) - one_hot.
    share_c = weight_c * (1 + 2 * spec.z_loss * lse_c) / total_c
    dlogits_cv = exp_cv * share_c[:, None] - jnp.where(hit_cv, weight_c[:, None], 0.0)
    if spec.softcap is not None:
      dlogits_cv *= 1 - (capped_cv / spec.softcap) ** 2
    dlogits_cv = dlogits_cv.astype(x_cD.dtype)
    dx_cD = jnp.einsum("cv,Dv->cD", dlogits_cv, head_Dv, preferred_element_type=jnp.float32)
    dhead_Dv += jnp.einsum("cD,cv->Dv", x_cD, dlogits_cv, preferred_element_type=jnp.float32)
    return dhead_Dv, (nll_c, z_c, dx_cD)

  zeros_Dv = jnp.zeros(head_Dv.shape, jnp.float32) if with_grads else None
  dhead_Dv, (nll, z, *dx) = jax.lax.scan(
      one_chunk, zeros_Dv, (split(x_btD), split(targets_bt), split(weights_bt)))
  axes = spec.batch_axes + spec.length_axes
  loss = _reduce(jax.lax.psum, nll.sum() + spec.z_loss * z.sum(), axes)
  aux = _reduce(jax.lax.psum, join(nll).sum(1), spec.length_axes), _reduce(jax.lax.psum, z.sum(), axes)
  if not with_grads:
    return loss, aux
  dx_btD = _reduce(jax.lax.psum, join(dx[0]), spec.vocab_axes).astype(x_btD.dtype)
  scatter = functools.partial(jax.lax.psum_scatter, scatter_dimension=0, tiled=True)
  dhead_dv = _reduce(scatter, dhead_Dv, embed_axes)
  dhead_dv = _reduce(jax.lax.psum, dhead_dv, tuple(a for a in axes if a not in spec.embed_axes))
  # Nothing of the backward pass waits for the head's gradient, which would be whole on each device until the
  # end: XLA:TPU put off the sum.
  return loss, aux, *jax.lax.optimization_barrier((dx_btD, dhead_dv.astype(head_dv.dtype)))


def _reduce(collective, x, axes):
  return collective(x, axes) if axes else x


def in_order(cfg, batch):
  """The tokens of each row as cfg.context wants them: with zigzag, a device that holds a part of a row holds
  an early and a late one. Nothing of a token is lost by it: its position and segment go along."""
  n_devices = ways(jax.sharding.get_abstract_mesh(), cfg.rules.length)
  if cfg.context != "zigzag" or n_devices == 1:
    return batch
  order_T = zigzag_order(batch["tokens"].shape[1], n_devices)
  return {name: a[:, order_T] for name, a in batch.items()}


def next_token_loss(spec, model, batch, key=None):
  """The language model's part of the loss; what a router adds is train.balance.

  Args:
    model: the merged Transformer.
    batch: tokens, targets, positions, segments [B, T] int32; weights [B, T] float32.

  Returns:
    (loss, aux): the sum over tokens; aux has nll_B, z, and "layers": what the blocks said (Transformer).
  """
  batch = in_order(model.cfg, batch)
  x_BTD, layers = model(batch["tokens"], batch["positions"], batch["segments"], key=key)
  loss, (nll_B, z) = cross_entropy(spec, x_BTD, model.head_shards(), batch["targets"], batch["weights"])
  return loss, {"nll_B": nll_B, "z": z, "layers": layers}

"""Decoder-only transformer: embed, scan over stacked groups of blocks, norm, head.
The one forward definition."""
import jax
import jax.numpy as jnp
from flax import nnx

from model.attention import ATTENTION
from model.config import ModelConfig
from model.ffn import FFN
from model.kernels.attention import HIDDEN, KERNEL
from model.layers import INIT, NORM, dropout, lift, read, softcap, weight
from model.lookup import lookup
from model.sharding import place

_saveable = jax.checkpoint_policies
# What the backward pass finds in memory; it computes the rest again. From most memory to least.
REMAT = {
  "none": None,
  "dots": _saveable.dots_with_no_batch_dims_saveable,
  "outputs": _saveable.save_only_these_names("attention_out", "ffn_out"),
  "full": _saveable.nothing_saveable,
  "offload": _saveable.save_and_offload_only_these_names(
      names_which_can_be_saved=[], names_which_can_be_offloaded=["attention_out", "ffn_out"],
      offload_src="device", offload_dst="pinned_host"),
}

NORM_POSITION = {
  "pre": lambda x, f, before, after: x + f(before(x)),
  "post": lambda x, f, before, after: after(x + f(x)),
  "both": lambda x, f, before, after: x + after(f(before(x))),
}
HEAD = ("untied", "tied")


def check_names(cfg: ModelConfig) -> None:
  """Every name of the config is in its table. No device is touched.

  Raises:
    ValueError: naming the field, its value and the valid names.
  """
  for field, table in (("attention", ATTENTION), ("attention_impl", KERNEL), ("ffn", FFN), ("norm", NORM),
                       ("norm_position", NORM_POSITION), ("init", INIT), ("remat", REMAT),
                       ("head", dict.fromkeys(HEAD))):
    lookup(table, getattr(cfg, field), f"model.{field}")
  if cfg.qk_norm is not None:
    lookup(NORM, cfg.qk_norm, "model.qk_norm")
  if cfg.attention_softcap is not None and cfg.attention_impl == "dot_product":
    raise ValueError(f"model.attention_softcap={cfg.attention_softcap}: model.attention_impl='dot_product' "
                     "has no soft cap; nearest valid: 'chunked' or 'plain'")


class Block(nnx.Module):
  def __init__(self, cfg, window, *, rngs):
    self.cfg = cfg
    norm = lookup(NORM, cfg.norm)
    if cfg.norm_position != "post":
      self.attention_norm, self.ffn_norm = norm(cfg, cfg.d_model), norm(cfg, cfg.d_model)
    if cfg.norm_position != "pre":
      self.attention_post_norm, self.ffn_post_norm = norm(cfg, cfg.d_model), norm(cfg, cfg.d_model)
    self.attention = lookup(ATTENTION, cfg.attention)(cfg, window, rngs=rngs)
    self.ffn = lookup(FFN, cfg.ffn)(cfg, rngs=rngs)

  def __call__(self, x_BTD, pos_BT, segment_BT, cache=None, key=None):
    residual = NORM_POSITION[self.cfg.norm_position]
    keys = (None, None) if key is None else jax.random.split(key)
    new_cache, aux = None, {}

    def attention(x_BTD):
      nonlocal new_cache
      out_BTD, new_cache = self.attention(x_BTD, pos_BT, segment_BT, cache)
      return dropout(out_BTD, self.cfg.dropout, keys[0])

    def ffn(x_BTD):
      nonlocal aux
      out_BTD, aux = self.ffn(x_BTD)
      return dropout(out_BTD, self.cfg.dropout, keys[1])

    norms = lambda name: (getattr(self, f"{name}_norm", None), getattr(self, f"{name}_post_norm", None))
    x_BTD = residual(x_BTD, attention, *norms("attention"))
    x_BTD = residual(x_BTD, ffn, *norms("ffn"))
    return x_BTD, new_cache, aux


class Transformer(nnx.Module):
  """Layers are stacked in groups, one group a repetition of cfg.layer_pattern: every leaf of blocks[i] leads
  with the number of groups."""

  def __init__(self, cfg, *, rngs):
    self.cfg = cfg
    V, D = cfg.padded_vocab_size, cfg.d_model
    self.embed = weight(cfg, (V, D), ("vocab", "embed"), rngs, fan_in=D if cfg.head == "tied" else 1)
    n_groups = cfg.n_layers // len(cfg.windows)
    self.blocks = nnx.Dict()
    for i, window in enumerate(cfg.windows):
      self.blocks[str(i)] = _stack(cfg, window, jax.random.split(rngs.params(), n_groups))
    if cfg.norm_position != "post":  # There the last block ends with its norm.
      self.final_norm = lookup(NORM, cfg.norm)(cfg, D)
    if cfg.head == "untied":
      self.unembed = weight(cfg, (D, V), ("embed", "vocab"), rngs, fan_in=D)

  def __call__(self, tokens_BT, pos_BT, segment_BT, *, key=None):
    """The hidden states of whole rows.

    Args:
      tokens_BT, pos_BT, segment_BT: int32; positions restart in each segment, segment 0 is padding.
      key: of the dropout masks; None is evaluation.

    Returns:
      (x_BTD before the head, aux: dict of scalars, the mean over the layers).
    """
    keys = None if key is None else jax.random.split(key, self.cfg.n_layers + 1)
    x_BTD = dropout(self._embed(tokens_BT), self.cfg.dropout, None if key is None else keys[0])
    n_in_group = len(self.cfg.windows)
    graphdefs, stacked = zip(*(nnx.split(self.blocks[str(i)]) for i in range(n_in_group)))
    group_keys = None if key is None else keys[1:].reshape(-1, n_in_group)

    def group(x_BTD, layers):
      states, keys = layers
      all_aux = []
      for i, (graphdef, state) in enumerate(zip(graphdefs, states)):
        block = nnx.merge(graphdef, state)
        x_BTD, _, aux = block(x_BTD, pos_BT, segment_BT, key=None if keys is None else keys[i])
        all_aux.append(aux)
      return x_BTD, jax.tree.map(lambda *a: sum(a) / len(a), *all_aux)

    if self.cfg.remat != "none":
      group = jax.checkpoint(group, policy=REMAT[self.cfg.remat], prevent_cse=False)
    x_BTD, aux = jax.lax.scan(group, x_BTD, (stacked, group_keys), unroll=self.cfg.unroll)
    return self._final(x_BTD), jax.tree.map(lambda a: a.mean(0), aux)

  def extend(self, tokens_BT, pos_BT, segment_BT, caches, layers=None):
    """The same forward for tokens that continue what the caches hold: prefill and decode.

    Args:
      segment_BT: 1, or 0 for padding, which is neither written nor seen.
      caches: of model.cache.init_cache.
      layers: of `unstack`, or None to slice the stacked blocks here (slower).

    Returns:
      (x_BTD before the head, caches).
    """
    x_BTD = self._embed(tokens_BT)
    n_in_group, new_caches = len(self.cfg.windows), []
    for n, cache in enumerate(caches):
      graphdef, state = nnx.split(self.blocks[str(n % n_in_group)])
      state = layers[n] if layers else jax.tree.map(lambda a, g=n // n_in_group: a[g], state)
      x_BTD, cache, _ = nnx.merge(graphdef, state)(x_BTD, pos_BT, segment_BT, cache)
      new_caches.append(cache)
    return self._final(x_BTD), tuple(new_caches)

  def _embed(self, tokens_BT):
    table_VD = jax.sharding.reshard(self.embed[...].astype(self.cfg.compute_dtype),
                                    self.cfg.rules(None, None))
    x_BTD = table_VD.at[tokens_BT].get(out_sharding=self.cfg.rules("batch", None, None))
    return x_BTD if self.cfg.embed_scale is None else x_BTD * jnp.asarray(self.cfg.embed_scale, x_BTD.dtype)

  def _final(self, x_BTD):
    return self.final_norm(x_BTD) if self.cfg.norm_position != "post" else x_BTD

  def head_DV(self):
    """The output matrix in the compute dtype, split over "vocab" only."""
    return read(self.cfg, self.unembed) if self.cfg.head == "untied" else read(self.cfg, self.embed).T

  def logits(self, x_BTD):
    """float32 [B, T, padded V], split over "vocab"; what pads the vocabulary has no mass."""
    logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, self.head_DV(), preferred_element_type=jnp.float32)
    real_V = jnp.arange(logits_BTV.shape[-1]) < self.cfg.vocab_size
    return jnp.where(lift(real_V, 3), softcap(logits_BTV, self.cfg.logit_softcap), HIDDEN)


def _stack(cfg, window, keys):
  return nnx.vmap(lambda key: Block(cfg, window, rngs=nnx.Rngs(key)))(keys)


def abstract_params(cfg, mesh):
  """(graphdef, params): nested dicts of sharded ShapeDtypeStructs. `mesh` may be an AbstractMesh: no device
  is needed."""
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0))))

  def one(param):
    value, axes = param.get_value(), param.get_metadata()["axes"]
    stacked = (None,) * (value.ndim - len(axes))  # The dim of the groups leads and is never split.
    spec = jax.P(*stacked, *cfg.rules(*axes))
    return param.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place(mesh, spec)))

  is_param = lambda x: isinstance(x, nnx.Variable)
  return graphdef, nnx.to_pure_dict(jax.tree.map(one, state, is_leaf=is_param))


def init_params(cfg, mesh, key):
  """(graphdef, params), born sharded: no device ever holds the whole model."""
  graphdef, abstract = abstract_params(cfg, mesh)
  init = lambda key: nnx.to_pure_dict(nnx.state(Transformer(cfg, rngs=nnx.Rngs(key))))
  return graphdef, jax.jit(init, out_shardings=jax.tree.map(lambda a: a.sharding, abstract))(key)


def unstack(cfg, params):
  """(params without the blocks' arrays, one tree of arrays a layer): decode reads each layer's weights where
  they lie, instead of a slice of the stack."""
  n_in_group = len(cfg.windows)
  slice_all = jax.jit(lambda blocks: [
      jax.tree.map(lambda a, g=n // n_in_group: a[g], blocks[str(n % n_in_group)])
      for n in range(cfg.n_layers)])
  layers = slice_all(params["blocks"])
  return {**params, "blocks": jax.tree.map(lambda a: jnp.zeros(()), params["blocks"])}, layers

"""Decoder-only transformer: embed, scan over stacked groups of blocks, norm, head.
The one forward definition."""
import dataclasses
import functools
import os
import typing

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention import ATTENTION, GQAttention
from model.config import ModelConfig
from model.context import CONTEXT
from model.exchange import EXCHANGE
from model.ffn import FFN
from model.kernels.attention import HIDDEN, KERNEL
from model.kernels.grouped import GROUPED
from model.kernels.platform import AUTO
from model.layers import (
  INIT,
  NORM,
  dropout,
  embed_shards,
  lift,
  read,
  several,
  softcap,
  sum_over,
  token_axes,
  weight,
)
from model.lookup import check_choice, lookup
from model.moe import DISPATCH, ROUTER
from model.parametrization import PARAMETRIZATION, init_factor
from model.pipeline import pipeline
from model.positions import make_sines
from model.products import multiply, turn, turned
from model.sharding import fit, on_devices, place, ways

_saveable = jax.checkpoint_policies


def _all_but_gathered(primitive, *_, **__):
  """What was gathered from other devices is gathered again: saved, the layers' weights would be whole on
  each."""
  return primitive.name not in ("reshard", "all_gather", "all_gather_invariant")


# What the backward pass finds in memory; it computes the rest again. From most memory to least.
REMAT = {
  "none": _all_but_gathered,
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
  "branch": lambda x, f, before, after: x + after(f(x)),
}
HEAD = ("untied", "tied")


def check_names(cfg: ModelConfig) -> None:
  """Every name of the config is in its table. No device is touched.

  Raises:
    ValueError: naming the field, its value and the valid names.
  """
  for field, table in (("context", CONTEXT), ("attention", ATTENTION),
                       ("attention_impl", {AUTO: None, **KERNEL}),
                       ("ffn", FFN), ("norm", NORM), ("norm_position", NORM_POSITION), ("init", INIT),
                       ("remat", REMAT), ("parametrization", PARAMETRIZATION),
                       ("head", dict.fromkeys(HEAD))):
    lookup(table, getattr(cfg, field), f"model.{field}")
  if cfg.ffn == "moe":
    for field, table in (("router", ROUTER), ("dispatch", DISPATCH), ("exchange", EXCHANGE)):
      check_choice(f"model.{field}", getattr(cfg, field), table)
    lookup({AUTO: None, **GROUPED}, cfg.grouped_impl, "model.grouped_impl")
  if cfg.qk_norm is not None:
    lookup(NORM, cfg.qk_norm, "model.qk_norm")
  if cfg.attention_softcap is not None and cfg.attention_impl == "dot_product":
    raise ValueError(f"model.attention_softcap={cfg.attention_softcap}: model.attention_impl='dot_product' "
                     "has no soft cap; nearest valid: 'chunked' or 'plain'")


class Block(nnx.Module):
  def __init__(self, cfg, window, ffn, *, rngs):
    self.cfg = cfg
    norm = lookup(NORM, cfg.norm)
    if cfg.norm_position in ("pre", "both"):
      self.attention_norm, self.ffn_norm = norm(cfg, cfg.d_model), norm(cfg, cfg.d_model)
    if cfg.norm_position != "pre":
      self.attention_post_norm, self.ffn_post_norm = norm(cfg, cfg.d_model), norm(cfg, cfg.d_model)
    self.attention = lookup(ATTENTION, cfg.attention)(cfg, window, rngs=rngs)
    self.ffn = lookup(FFN, ffn)(cfg, rngs=rngs)

  def __call__(self, x_BTD, pos_BT, segment_BT, cache=None, key=None):
    """Returns (x_BTD, cache, aux): aux a dict of arrays, what the feed-forward has to say."""
    residual, rules = NORM_POSITION[self.cfg.norm_position], self.cfg.rules
    keys = (None, None) if key is None else jax.random.split(key)
    new_cache, aux = None, {}

    def attention(x_BTD):
      nonlocal new_cache
      # Where the residual stream is split finer than the length (sequence parallelism), this gathers it.
      x_BTD = jax.sharding.reshard(x_BTD, rules("batch", "length", None))
      out_BTD, new_cache = self.attention(x_BTD, pos_BT, segment_BT, cache)
      return dropout(out_BTD, self.cfg.dropout, keys[0])

    def ffn(x_BTD):
      nonlocal aux
      x_BTD = jax.sharding.reshard(x_BTD, rules("batch", "length", None))
      out_BTD, aux = self.ffn(x_BTD, segment_BT)
      return dropout(out_BTD, self.cfg.dropout, keys[1])

    norms = lambda name: (getattr(self, f"{name}_norm", None), getattr(self, f"{name}_post_norm", None))
    x_BTD = residual(x_BTD, attention, *norms("attention"))
    x_BTD = residual(x_BTD, ffn, *norms("ffn"))
    return x_BTD, new_cache, aux


class Transformer(nnx.Module):
  """Layers are stacked in groups, one group a repetition of cfg.layer_pattern: every leaf of blocks[i] leads
  with the number of groups, or with [repeats, groups / repeats] in a circular pipeline.

  The first cfg.n_dense_layers are stacked apart, in first_blocks.
  """

  def __init__(self, cfg, *, rngs):
    self.cfg = cfg
    V, D = cfg.padded_vocab_size, cfg.d_model
    self.embed = weight(cfg, (V, D), ("vocab", "embed"), rngs, fan_in=D if cfg.head == "tied" else 1)
    if cfg.positions == "learned":
      self.position_embed = weight(cfg, (cfg.max_length, D), (None, "embed"), rngs, fan_in=1)
    n_dense = cfg.n_dense_layers
    if n_dense:
      self.first_blocks = _stacks(cfg, n_dense, "swiglu", rngs)
    self.blocks = _stacks(cfg, cfg.n_layers - n_dense, cfg.ffn, rngs)
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
      (x_BTD before the head, aux: i -> what block i of each group says, every array leading with the groups).
    """
    cfg = self.cfg
    tokens_BT, pos_BT, segment_BT = self._split(tokens_BT, pos_BT, segment_BT)
    keys = None if key is None else jax.random.split(key, cfg.n_layers + 1)
    x_BTD = dropout(self._embed(tokens_BT, pos_BT), cfg.dropout, None if key is None else keys[0])
    if cfg.n_dense_layers:
      first_keys = None if key is None else keys[1:cfg.n_dense_layers + 1]
      x_BTD, _ = self._scan(self.first_blocks, x_BTD, pos_BT, segment_BT, first_keys)
    keys = None if key is None else keys[1 + cfg.n_dense_layers:]
    n_stages = ways(jax.sharding.get_abstract_mesh(), cfg.rules.layers)
    if n_stages == 1:
      x_BTD, aux = self._scan(self.blocks, x_BTD, pos_BT, segment_BT, keys)
    else:
      group, stacked = self._group(self.blocks)

      def stage(layers, x_BTD, *rest):
        step = lambda x_BTD, layer: group(x_BTD, *rest, layer, None)
        return jax.lax.scan(step, x_BTD, layers, unroll=cfg.unroll)

      x_BTD, aux = pipeline(
          stage, stacked, x_BTD, (pos_BT, segment_BT), n_stages=n_stages, repeats=cfg.pipeline_repeats,
          n_micro=cfg.pipeline_microbatches or n_stages, rules=cfg.rules)
    return self._final(x_BTD), aux

  def _scan(self, blocks, x_BTD, pos_BT, segment_BT, keys):
    group, stacked = self._group(blocks)
    if blocks is self.blocks and self.cfg.pipeline_repeats > 1:
      stacked = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stacked)
    keys = None if keys is None else keys.reshape(-1, len(self.cfg.windows))
    step = lambda x_BTD, layers: group(x_BTD, pos_BT, segment_BT, *layers)
    return jax.lax.scan(step, x_BTD, (stacked, keys), unroll=self.cfg.unroll)

  def _group(self, blocks):
    """(one repetition of the pattern as a function of its layers' arrays, the arrays of all)."""
    graphdefs, stacked = zip(*(nnx.split(blocks[str(i)]) for i in range(len(self.cfg.windows))))

    def group(x_BTD, pos_BT, segment_BT, states, keys):
      aux = {}
      for i, (graphdef, state) in enumerate(zip(graphdefs, states)):
        block = nnx.merge(graphdef, state)
        key = None if keys is None else keys[i]
        x_BTD, _, aux[str(i)] = block(x_BTD, pos_BT, segment_BT, key=key)
      return x_BTD, aux

    return jax.checkpoint(group, policy=REMAT[self.cfg.remat], prevent_cse=False), stacked

  def extend(self, tokens_BT, pos_BT, segment_BT, caches, layers=None):
    """The same forward for tokens that continue what the caches hold: prefill and decode.

    Args:
      segment_BT: 1, or 0 for padding, which is neither written nor seen.
      caches: of model.cache.init_paged_cache, which are told where these tokens stand.
      layers: of `unstack`, or None to slice the stacked blocks here (slower).

    Returns:
      (x_BTD before the head, caches).
    """
    tokens_BT, pos_BT, segment_BT = self._split(tokens_BT, pos_BT, segment_BT)
    x_BTD, sines = self._embed(tokens_BT, pos_BT), make_sines(self.cfg, pos_BT)
    new_caches, stacks = [], {}
    for n, cache in enumerate(caches):
      blocks, i, pick = layer_place(self.cfg, n)
      if (blocks, i) not in stacks:
        stacks[blocks, i] = nnx.split(getattr(self, blocks)[i])
      graphdef, stack = stacks[blocks, i]
      state = layers[n] if layers else nnx.to_pure_dict(jax.tree.map(pick, stack))
      x_BTD, cache = _extend_block(graphdef, state, x_BTD, sines, segment_BT, cache)
      new_caches.append(cache)
    return self._final(x_BTD), tuple(new_caches)

  def _split(self, *arrays_BT):
    return (jax.sharding.reshard(a, self.cfg.rules("batch", "length")) for a in arrays_BT)

  def _embed(self, tokens_BT, pos_BT):
    """Each device looks up what its slice of the vocabulary has; the sum over the slices has it all.

    Under FSDP a device has some of the columns of all rows. It looks those up for the tokens of all devices,
    and an all-to-all brings each token's columns together: tokens travel, not the table, nor its gradient,
    which is summed in the dtype of the parameters.
    """
    cfg, rules = self.cfg, self.cfg.rules
    spec = dataclasses.replace(rules, embed=token_axes(rules))("vocab", "embed")

    def local(table_vd, tokens_bt):
      over = several(token_axes(rules))
      if over:
        tokens_bt = jax.lax.all_gather(tokens_bt, over).reshape(-1, tokens_bt.shape[-1])
      if not rules.vocab:
        x_btd = table_vd[tokens_bt].astype(cfg.compute_dtype)
      else:
        v = table_vd.shape[0]
        row_bt = tokens_bt - jax.lax.axis_index(rules.vocab) * v
        there_bt1 = ((row_bt >= 0) & (row_bt < v))[..., None]
        x_btd = jnp.where(there_bt1, table_vd[jnp.clip(row_bt, 0, v - 1)], 0).astype(cfg.compute_dtype)
        x_btd = sum_over(x_btd, rules.vocab)
      return jax.lax.all_to_all(x_btd, over, split_axis=0, concat_axis=2, tiled=True) if over else x_btd

    x_BTD = on_devices(local, (spec, rules("batch", "length")), rules("batch", "length", None))(
        jax.sharding.reshard(self.embed[...], spec), tokens_BT)
    x_BTD = jax.sharding.reshard(x_BTD, rules("batch", "residual", None))
    if cfg.embed_scale is not None:
      x_BTD = x_BTD * jnp.asarray(cfg.embed_scale, x_BTD.dtype)
    if cfg.positions != "learned":
      return x_BTD
    look_up = lambda table_PD, pos_bt: jnp.take(table_PD, pos_bt, axis=0, mode="clip")
    spec = rules("batch", "length")
    more_BTD = on_devices(look_up, (jax.P(), spec), rules("batch", "length", None))(
        read(cfg, self.position_embed), pos_BT)
    return x_BTD + jax.sharding.reshard(more_BTD, rules("batch", "residual", None))

  def _final(self, x_BTD):
    return self.final_norm(x_BTD) if self.cfg.norm_position != "post" else x_BTD

  def head_shards(self):
    """The output matrix [D, V] in the compute dtype, split over "vocab" and as the loss gathers it."""
    w, _ = embed_shards(self.cfg, self._head)
    return w.T if self._vocab_first else w

  @property
  def _head(self):
    return self.embed if self.cfg.head == "tied" else self.unembed

  @property
  def _vocab_first(self):
    return self.cfg.head == "tied" or turned(self._head) > 0

  def logits(self, x_BTD):
    """float32 [B, T, padded V], split over "vocab"; what pads the vocabulary has no mass."""
    rules, head, vocab_first = self.cfg.rules, self._head, self._vocab_first
    dims, axes = ("VD", ("vocab", None)) if vocab_first else ("DV", (None, "vocab"))

    def local(x_btD, w):
      logits_cv = multiply(f"CD,{dims}->CV", x_btD.reshape(-1, x_btD.shape[2]), w, turned(head),
                           preferred_element_type=jnp.float32)
      return logits_cv.reshape(*x_btD.shape[:2], -1)

    w, _ = embed_shards(self.cfg, head)
    logits_BTV = on_devices(local, (rules("batch", "length", None), rules(*axes)),
                            rules("batch", "length", "vocab"))(
        jax.sharding.reshard(x_BTD, rules("batch", "length", None)), jax.sharding.reshard(w, rules(*axes)))
    real_V = jnp.arange(logits_BTV.shape[-1]) < self.cfg.vocab_size
    return jnp.where(lift(real_V, 3), softcap(logits_BTV, self.cfg.logit_softcap), HIDDEN)


@functools.partial(jax.jit, static_argnums=0)
def _extend_block(graphdef, state, x_BTD, sines, segment_BT, cache):
  """A layer of `Transformer.extend`. Layers that are alike are traced once: that was most of a warm start."""
  x_BTD, cache, _ = nnx.merge(graphdef, state)(x_BTD, sines, segment_BT, cache)
  return x_BTD, cache


def _stacks(cfg, n_layers, ffn, rngs):
  """str(i) -> the blocks at place i of the pattern, stacked."""
  stacks, n_groups = nnx.Dict(), n_layers // len(cfg.windows)
  for i, window in enumerate(cfg.windows):
    stacks[str(i)] = _stack(cfg, window, ffn, jax.random.split(rngs.params(), n_groups))
  return stacks


def _stack(cfg, window, ffn, keys):
  return nnx.vmap(lambda key: Block(cfg, window, ffn, rngs=nnx.Rngs(key)))(keys)


def layer_place(cfg, n: int):
  """Where layer n is: ("first_blocks" or "blocks", place in the pattern, what slices it from the stack)."""
  first = n < cfg.n_dense_layers
  group, i = divmod(n if first else n - cfg.n_dense_layers, len(cfg.windows))
  if first or cfg.pipeline_repeats == 1:
    return "first_blocks" if first else "blocks", str(i), lambda a: a[group]
  n_groups = (cfg.n_layers - cfg.n_dense_layers) // len(cfg.windows) // cfg.pipeline_repeats
  return "blocks", str(i), lambda a: a[group // n_groups, group % n_groups]


def stack_dims(cfg, path: str) -> int:
  """How many dims of stacked layers lead a parameter: path as "blocks/0/attention/wq"."""
  if path.startswith("first_blocks/"):
    return 1
  return 0 if not path.startswith("blocks/") else 1 if cfg.pipeline_repeats == 1 else 2


@functools.lru_cache(maxsize=1)  # Who reads a model asks, and then who runs it.
def abstract_params(cfg, mesh):
  """(graphdef, params): nested dicts of sharded ShapeDtypeStructs. `mesh` may be an AbstractMesh: no device
  is needed."""
  cfg = fit(cfg, mesh)
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0))))
  repeat = _repeat(cfg)

  def one(path, param):
    name = "/".join(map(str, path))
    value, axes = param.get_value(), param.get_metadata()["axes"]
    value = jax.eval_shape(lambda a: repeat(name, a), value)
    n_stack = stack_dims(cfg, name)  # The last of these dims is split over the stages of a pipeline.
    stacked = (None,) * (n_stack - 1) + ("layers" if name.startswith("blocks/") else None,) * bool(n_stack)
    spec = cfg.rules(*stacked, *axes)
    return path, param.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place(mesh, spec)))

  leaves = [one(path, param) for path, param in nnx.to_flat_state(state)]
  return graphdef, nnx.to_pure_dict(nnx.from_flat_state(leaves))


def init_params(cfg, mesh, key):
  """(graphdef, params), born sharded: no device ever holds the whole model."""
  graphdef, abstract = abstract_params(cfg, mesh)
  places = jax.tree.map(lambda a: a.sharding, abstract)
  draw = jax.jit(functools.partial(draw_params, cfg), out_shardings=places, compiler_options=_once(mesh))
  return graphdef, draw(key)


def draw_params(cfg, key):
  """The parameters of init_params on one device."""
  repeat = _repeat(cfg)

  def one(name, param):
    value, factor = repeat(name, param.get_value()), init_factor(cfg, name)
    return param.replace(value if factor == 1.0 else (value * factor).astype(value.dtype))

  flat = nnx.to_flat_state(nnx.state(Transformer(cfg, rngs=nnx.Rngs(key))))
  return nnx.to_pure_dict(nnx.from_flat_state([(path, one("/".join(map(str, path)), param))
                                               for path, param in flat]))


def _once(mesh):
  """Compiler options for a program that runs once. On a CPU LLVM was half of the start of a small run;
  at this level it takes half as long, for the same numbers."""
  level = "xla_backend_optimization_level"
  quick = mesh.devices.flat[0].platform == "cpu" and level not in os.environ.get("XLA_FLAGS", "")
  return {level: 1} if quick else {}


def _repeat(cfg):
  """(path, array) -> the array, its groups as [repeats, groups / repeats] in a circular pipeline."""
  v = cfg.pipeline_repeats
  return lambda path, a: a.reshape(v, -1, *a.shape[1:]) if stack_dims(cfg, path) == 2 else a


def make_unstack(cfg, turns=None):
  """params -> (params without the blocks' arrays, one tree of arrays a layer), traced once: decode reads each
  layer's weights where they lie, instead of a slice of the stack. With `turns`, of `turn_weights`, they are
  turned, in one copy."""
  def join(layer, beside):
    if not (turns and turns.are_joined):
      return layer
    attention = dict(layer["attention"])
    return {**layer, "attention": attention | {"wq": beside([attention.pop(name) for name in JOINED])}}

  @jax.jit
  def slice_all(stacks, heads):
    turn_one = lambda n, a: jnp.moveaxis(a, range(n), range(-n, 0))
    layers = []
    for n in range(cfg.n_layers):
      blocks, i, pick = layer_place(cfg, n)
      layer = join(jax.tree.map(pick, stacks[blocks][i]), lambda parts: jnp.concatenate(parts, axis=1))
      layers.append(jax.tree.map(turn_one, turns.layers[n], layer) if turns else layer)
    return layers, {name: turn_one(1, a) for name, a in heads.items()}

  def unstack(params):
    stacks = {name: params[name] for name in ("first_blocks", "blocks") if name in params}
    layers, heads = slice_all(stacks, {name: params[name] for name in (turns.heads if turns else ())})
    stubs = jax.tree.map(lambda a: jnp.zeros(()), stacks)
    stubs = {name: {i: join(layer, lambda parts: parts[0]) for i, layer in stack.items()}
             for name, stack in stubs.items()}
    return {**params, **stubs, **heads}, layers

  return unstack


JOINED = "wq", "wk", "wv"


class Turns(typing.NamedTuple):
  """Which weights of `make_unstack` are turned."""
  layers: list  # For each layer's arrays: how many dims, as model.products has it.
  heads: tuple[str, ...]  # Parameters beside them, by one dim.
  are_joined: bool  # JOINED of each layer's attention are one array, "wq", before that.


def turn_weights(cfg, graphdef, params):
  """(graphdef, Turns) of weights as a CPU multiplies few tokens fastest (model.products); `params` may be
  abstract. Where no heads are split, their three products are one: a small one has a single thread."""
  model = nnx.merge(graphdef, params)
  outputs = {"unembed": model.unembed} if cfg.head == "untied" else {}
  stacks = {name: getattr(model, name) for name in ("first_blocks", "blocks") if hasattr(model, name)}
  is_param = lambda x: isinstance(x, nnx.Variable)
  for param in jax.tree.leaves((nnx.state(nnx.Dict(stacks)), outputs), is_leaf=is_param):
    turn(param)
  if cfg.head == "tied":
    model.embed.set_metadata(n_turned=1)  # It lies so.

  blocks = [stacks[name][i] for name, i, _ in (layer_place(cfg, n) for n in range(cfg.n_layers))]
  heads = cfg.rules.heads
  are_joined = (heads == cfg.rules.kv_heads and ways(jax.sharding.get_abstract_mesh(), heads) == 1
                and all(type(block.attention) is GQAttention for block in blocks))
  for stack in stacks.values() if are_joined else ():
    for block in stack.values():
      block.attention.join()
  turned_dims = lambda state: jax.tree.map(lambda p: p.replace(turned(p)), state, is_leaf=is_param)
  n_turned = [nnx.to_pure_dict(turned_dims(nnx.state(block))) for block in blocks]
  return nnx.split(model)[0], Turns(n_turned, tuple(outputs), are_joined)

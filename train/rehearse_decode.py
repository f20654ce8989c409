"""The decode step of train.rehearse: how many sequences fit beside the weights, what reading them costs."""
import dataclasses
import functools
import math

import jax

from infer.load import cast_params, decode_config
from infer.sampling import Sampling
from infer.scheduler import PAGE_SIZE
from infer.step import empty_inputs, empty_state, run_step, stack_inputs
from model.cache import init_paged_cache
from model.count import active_parameters, cache_bytes, decode_bytes_per_token, read_bytes
from model.sharding import ways
from model.transformer import abstract_params, make_unstack

ROOM = 0.9  # Of HBM: what weights and caches may take; activations and the program need the rest.


def plan_decode(cfg, target, context: int) -> dict:
  """Arithmetic: the largest batch of sequences of `context` tokens, the longest context of one a device, and
  tokens/s if nothing but the memory's bandwidth counted.

  Raises:
    ValueError: the model cannot be split over the mesh.
  """
  model = decode_config(cfg.model, target.mesh)
  weights = abstract_weights(model, target.mesh)
  held = sum(_bytes(a) for a in jax.tree.leaves(weights))
  rows = ways(target.mesh, model.rules.batch)
  one = _cache_bytes(model, target.mesh, rows, context)
  free = ROOM * target.chip.hbm_bytes - held
  each = max(0, int(free // one))
  longest = _longest(model, target.mesh, rows, free)
  plan = {"context": context, "batch": each * rows, "weights_bytes": held, "cache_bytes": each * one,
          "longest_context": longest, "least_batch": rows, "topology": target.topology,
          "chips": target.mesh.size}
  if each == 0:
    return plan | {"needs_bytes": held + one, "hbm_bytes": target.chip.hbm_bytes,
                   "error": "the weights and one sequence: split the weights further, e.g. mesh.tensor"}
  params = abstract_params(model, target.mesh)[1]
  n_read = (sum(math.prod(a.shape) for a in jax.tree.leaves(params)) if model.ffn == "moe" and each > 8
            else active_parameters(model, params))  # A batch meets all experts.
  # A device reads its own weights and caches for its part of each token.
  read = one * read_bytes(model, context) / cache_bytes(model, context)
  step_s = (held + each * read) / target.chip.hbm_bandwidth
  return plan | {"bytes_per_token": decode_bytes_per_token(model, n_read, each * rows, context),
                 "bandwidth_step_s": step_s, "bandwidth_tokens_per_s": each * rows / step_s}


def abstract_weights(model, mesh):
  """What a step takes, as ShapeDtypeStructs: in the compute dtype, one tree a layer."""
  _, params = abstract_params(model, mesh)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    made = jax.eval_shape(lambda params: make_unstack(model)(cast_params(model, params)), params)
  return _placed(made, mesh)


def lower_decode(cfg, mesh, batch: int, context: int):
  """The engine's step in which all of a batch make a token, with its state donated."""
  model = decode_config(cfg.model, mesh)
  graphdef, _ = abstract_params(model, mesh)
  W = ways(mesh, model.rules.batch)
  S, L = batch // W, -(-context // PAGE_SIZE)
  by_way = lambda a: jax.NamedSharding(mesh, model.rules("batch", *[None] * (a.ndim - 1)))
  inputs = dataclasses.replace(empty_inputs(W, S, 0, S, G=0, L=L, S=S, V=model.padded_vocab_size),
                               settings=stack_inputs([Sampling()] * batch, [0] * batch, (), W))
  inputs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=by_way(a)), inputs)
  weights = abstract_weights(model, mesh)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    state = jax.eval_shape(lambda: empty_state(model, W, S, S * L + 1, PAGE_SIZE, None))
  with jax.set_mesh(mesh):
    step = jax.jit(functools.partial(run_step, graphdef), donate_argnums=2)
    return step.trace(weights, inputs, _placed(state, mesh)).lower(lowering_platforms=("tpu",))


def _placed(tree, mesh):
  def one(a):  # eval_shape names an abstract mesh, and none at all for scalars.
    spec = a.sharding.spec if a.sharding is not None else jax.P()
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec))

  return jax.tree.map(one, tree)


def _bytes(a):
  return math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize


def _cache_bytes(model, mesh, rows, context):
  """Of one sequence a group of devices, on one of them."""
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    caches = jax.eval_shape(lambda: init_paged_cache(model, rows, -(-context // PAGE_SIZE), PAGE_SIZE))
  return sum(_bytes(a) for a in jax.tree.leaves(_placed(caches, mesh)))


def _longest(model, mesh, rows, free):
  """Tokens of one sequence a group of devices, in steps of 1024."""
  low, high = 0, 2**14
  while low < high:
    middle = (low + high + 1) // 2
    fits = _cache_bytes(model, mesh, rows, middle * 1024) <= free
    low, high = (middle, high) if fits else (low, middle - 1)
  return low * 1024

"""Optimizers, schedules and per-parameter rules. All of the mathematics is optax's; this file puts it in
order."""
import functools
import re
import typing

import jax
import jax.numpy as jnp
import optax
from optax import contrib
from optax.contrib._muon import scale_by_shape

from model.lookup import lookup
from model.parametrization import rate_factor
from model.sharding import abstract_mesh
from model.transformer import abstract_params, stack_dims


def _adam(o, model=None):
  return optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps)


def _adafactor(o, model):
  """Factored second moments (arXiv:1804.04235) without relative steps: the schedule is the step size."""
  return optax.chain(optax.scale_by_factored_rms(epsilon=o.eps), optax.clip_by_block_rms(1.0))


def _lion(o, model):
  return optax.scale_by_lion(b1=o.b1, b2=o.b2)


def _sgd(o, model):
  return optax.trace(decay=o.momentum)


def _muon(o, model):
  """Muon (Jordan et al. 2024) at Adam's RMS (arXiv:2502.16982) for the blocks' matrices, Adam for the
  rest."""
  matrix = functools.partial(_matrix, model)
  matrices = functools.partial(jax.tree_util.tree_map_with_path, matrix)
  muon = optax.chain(contrib.scale_by_muon(beta=o.momentum, weight_dimension_numbers=matrices),
                     scale_by_shape(weight_dimension_numbers=matrices, consistent_rms=0.2))
  kind = lambda path, param: "adam" if matrix(path, param) is None else "muon"
  both = {"muon": _replicated(muon), "adam": _adam(o)}
  return optax.partition(both, lambda params: jax.tree_util.tree_map_with_path(kind, params))


def _matrix(model, path, param) -> contrib.MuonDimensionNumbers | None:
  """Rows and columns of a parameter of a block. Layers and experts are stacks of matrices; heads belong to
  their side; a router is none."""
  name, ndim = path_name(path), len(param.shape)
  first = stack_dims(model, name)  # The dim of the rows.
  if first == 0 or ndim - first < 2 or name.endswith(("bias", "_norm/scale", "/w_router")):
    return None
  if ndim - first == 3 and re.search(r"/w_(gate|up|down)$", name):  # [E, D, F].
    first += 1
  # wo is [N, H, D]; the others lead with what they sum over.
  last = ndim - 1 if name.endswith("/wo") else first + 1
  return contrib.MuonDimensionNumbers(tuple(range(first, last)), tuple(range(last, ndim)))


def _replicated(tx):
  """Runs `tx` where XLA places the arrays: orthogonalisation multiplies matrices by their own transpose,
  which explicit sharding would have us annotate inside optax. What goes in and out keeps its sharding."""
  def update(updates, state, params=None):
    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, (updates, state))
    return jax.sharding.auto_axes(lambda u, s: tx.update(u, s), out_sharding=specs)(updates, state)

  return optax.GradientTransformation(tx.init, update)


# name -> (optim config, model config) -> optax transformation.
OPTIMIZER = {"adamw": _adam, "adafactor": _adafactor, "lion": _lion, "muon": _muon, "sgd": _sgd}


def _progress(step, first, last):
  """0 up to `first`, 1 from `last`."""
  return jnp.clip((step - first) / max(last - first, 1), 0.0, 1.0)


# name -> (step, warm-up steps, steps, optim config) -> factor of the peak, after the warm-up.
SCHEDULE = {
  "constant": lambda s, w, n, o: 1.0,
  "linear": lambda s, w, n, o: 1 - (1 - o.final_lr_fraction) * _progress(s, w, n - 1),
  "cosine": lambda s, w, n, o: (o.final_lr_fraction + (1 - o.final_lr_fraction)
                                * 0.5 * (1 + jnp.cos(jnp.pi * _progress(s, w, n - 1)))),
  "inverse_sqrt": lambda s, w, n, o: jnp.sqrt(max(w, 1) / jnp.maximum(s, max(w, 1))),
  # Constant, then 1 - sqrt over the last decay_fraction of the steps (arXiv:2405.18392).
  "wsd": lambda s, w, n, o: (1 - (1 - o.final_lr_fraction)
                             * jnp.sqrt(_progress(s, n - 1 - round(o.decay_fraction * n), n - 1))),
}


def learning_rate(cfg) -> typing.Callable:
  """The learning rate as a pure function of the step: linear from lr / warmup_steps, then the schedule."""
  optim, steps = cfg.optim, cfg.steps
  after = lookup(SCHEDULE, optim.schedule, "optim.schedule")

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    warmup = jnp.minimum((step + 1) / max(optim.warmup_steps, 1), 1.0)
    return (optim.lr * warmup * after(step, optim.warmup_steps, steps, optim)).astype(jnp.float32)

  return schedule


def path_name(path) -> str:
  """blocks/0/attention/wq."""
  return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def match(field, rules, params):
  """A tree of values like `params`: of each parameter, that of the first pattern found in its path.

  Raises:
    ValueError: a parameter that nothing matches, or a pattern that decides for no parameter.
  """
  used = set()

  def one(path, _):
    name = path_name(path)
    for i, (pattern, value) in enumerate(rules):
      if re.search(pattern, name):
        used.add(i)
        return value
    raise ValueError(f"optim.{field}: no pattern of {[p for p, _ in rules]} matches parameter {name}; "
                     "add ('.*', value)")

  tree = jax.tree_util.tree_map_with_path(one, params)
  if idle := [rules[i][0] for i in range(len(rules)) if i not in used and rules[i][0] != ".*"]:
    names = [path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    raise ValueError(f"optim.{field}: patterns {idle} decide for no parameter; parameters are {names}")
  return tree


def make_optimizer(cfg, params) -> optax.GradientTransformation:
  """clip -> optimizer -> rates of the parametrization -> decoupled decay -> per-parameter scale, for the
  parameters that are not frozen. So the decay of a parameter is that of all widths.

  What comes out is the direction: the step subtracts it times the learning rate, which is a function of the
  step alone.

  Args:
    params: a tree of arrays or ShapeDtypeStructs.

  Raises:
    ValueError: a rule that misses a parameter, or that no parameter meets.
  """
  optim = cfg.optim
  decay, scale, frozen = (match(f, getattr(optim, f), params) for f in ("decay_scale", "lr_scale", "freeze"))
  if cfg.model.router_bias:  # Moved by train.balance.
    frozen = jax.tree_util.tree_map_with_path(
        lambda path, skip: skip or path_name(path).endswith("/balance_bias"), frozen)
  trained = lambda tree: jax.tree.map(lambda value, skip: optax.MaskedNode() if skip else value, tree, frozen)
  parts = [lookup(OPTIMIZER, optim.name, "optim.name")(optim, cfg.model)]
  if optim.grad_clip is not None:
    parts.insert(0, optax.clip_by_global_norm(optim.grad_clip))
  rates = jax.tree_util.tree_map_with_path(lambda path, _: rate_factor(cfg.model, path_name(path)), params)
  if any(rate != 1.0 for rate in jax.tree.leaves(rates)):
    parts.append(_per_parameter(lambda u, p, rate: u * rate, trained(rates)))
  if optim.weight_decay:
    parts.append(_per_parameter(lambda u, p, d: u + optim.weight_decay * d * p if d else u, trained(decay)))
  if any(s != 1.0 for s in jax.tree.leaves(scale)):
    parts.append(_per_parameter(lambda u, p, s: u * s, trained(scale)))
  tx = optax.chain(*parts)
  if not any(jax.tree.leaves(frozen)):
    return tx
  kinds = jax.tree.map(lambda skip: "frozen" if skip else "trained", frozen)
  return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, kinds)


def check_optimizer(cfg) -> None:
  """The optimizer's name is known and its patterns meet the parameters of cfg.model; for flags.load(checks=).

  Raises:
    ValueError: as `make_optimizer`. No device is touched.
  """
  _, params = abstract_params(cfg.model, abstract_mesh(data=1))
  jax.eval_shape(make_optimizer(cfg, params).init, params)


def _per_parameter(f, values):
  return optax.stateless(lambda updates, params: jax.tree.map(f, updates, params, values))

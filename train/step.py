"""One optimizer step: gradient over micro-batches, guard, update. Pure functions of (state, batch)."""
import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from model.hub.orbax import restore_params
from model.transformer import abstract_params, init_params
from train.balance import balance_losses, router_metrics, router_sums, update_biases, weigh
from train.losses import in_order, loss_spec, next_token_loss
from train.optim import learning_rate, make_optimizer

GUARD_DECAY = 0.98  # Of the running mean and variance of the loss.
GUARD_STEPS = 30  # Accepted steps before a spike can be told from the fall of the first ones.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Guard:
  """What the spike detector remembers. Part of the checkpoint, so a resumed run skips what it would have
  skipped."""
  mean: jax.Array  # Of the loss.
  variance: jax.Array
  accepted: jax.Array  # Steps so far.
  skipped: jax.Array  # Steps in a row.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  step: jax.Array  # int32: steps done, which is also the position in the data.
  params: dict
  opt_state: optax.OptState
  ema: dict | None
  guard: Guard


def init_state(cfg, mesh):
  """(graphdef, TrainState), each array born in its shards. Moments take their parameter's sharding, with
  "embed" as the rules' "moment". The parameters are drawn, or those of cfg.init_from.

  Raises:
    ValueError, model.hub.orbax.CheckpointError: those are of another shape, or damaged.
  """
  with jax.set_mesh(mesh):
    if cfg.init_from is None:
      graphdef, params = init_params(cfg.model, mesh, _first_key(cfg))
    else:
      graphdef, abstract = abstract_params(cfg.model, mesh)
      params, _, _ = restore_params(cfg.init_from, abstract)
    tx = make_optimizer(cfg, params)
    return graphdef, jax.jit(lambda params: _new_state(cfg, tx, params))(params)


def _first_key(cfg):
  """Of the first weights. init_seed=0 leaves the key of the seed as it is."""
  key = jax.random.key(cfg.seed)
  return jax.random.fold_in(key, cfg.init_seed) if cfg.init_seed else key


def abstract_state(cfg, mesh):
  """The same as ShapeDtypeStructs: what a checkpoint is restored into. `mesh` may be an AbstractMesh."""
  graphdef, params = abstract_params(cfg.model, mesh)
  tx = make_optimizer(cfg, params)
  with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
    state = jax.eval_shape(lambda params: _new_state(cfg, tx, params), params)

  def place(a):  # eval_shape names an abstract mesh, and none at all for scalars.
    spec = a.sharding.spec if a.sharding is not None else jax.P()
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec))

  return graphdef, jax.tree.map(place, state)


def abstract_batch(cfg, mesh):
  """A batch of the run as ShapeDtypeStructs."""
  number = lambda dtype: jax.ShapeDtypeStruct(
      (cfg.batch_size, cfg.seq_len), dtype, sharding=jax.NamedSharding(mesh, cfg.model.rules("batch", None)))
  return {name: number(jnp.float32 if name == "weights" else jnp.int32)
          for name in ("tokens", "targets", "weights", "positions", "segments")}


def _new_state(cfg, tx, params):
  number = lambda dtype: jnp.zeros((), dtype, out_sharding=jax.P())
  guard = Guard(number(jnp.float32), number(jnp.float32), number(jnp.int32), number(jnp.int32))
  # In float32, whatever the parameters are.
  moved = _shard(jax.tree.map(lambda p: p.astype(jnp.float32), params), _specs(cfg, params, "moment"))
  ema = None if cfg.optim.ema is None else moved
  return TrainState(number(jnp.int32), params, tx.init(moved), ema, guard)


def _specs(cfg, params, field):
  """The specs of the parameters ("embed"), of their gradients or of their moments, of which the rules say how
  "embed" is split. ZeRO (arXiv:1910.02054): stage 1 splits the moments, 2 the gradients too, 3 all."""
  mesh, rules = jax.sharding.get_abstract_mesh(), cfg.model.rules
  if getattr(rules, field) == rules.embed:
    return jax.tree.map(lambda a: jax.typeof(a).sharding.spec, params)
  rules = dataclasses.replace(rules, embed=getattr(rules, field))
  _, abstract = abstract_params(dataclasses.replace(cfg.model, rules=rules), mesh)
  return jax.tree.map(lambda a: a.sharding.spec, abstract)


def _shard(tree, specs):
  return jax.tree.map(jax.sharding.reshard, tree, specs)


def make_train_step(cfg, graphdef, params):
  """(state, batch) -> (state, metrics), to be jitted with the state donated.

  Args:
    params: arrays or ShapeDtypeStructs, for the optimizer's rules.

  Metrics are float32 scalars, but nll_B and weight_B: the loss of each row, from which a skipped step is
  explained.
  """
  tx, schedule = make_optimizer(cfg, params), learning_rate(cfg)

  def train_step(state, batch):
    lr = schedule(state.step)
    key = None if cfg.model.dropout == 0.0 else jax.random.fold_in(jax.random.key(cfg.seed), state.step)
    tokens = jnp.maximum(batch["weights"].sum(), 1.0)
    (loss, aux), grads = _accumulate(cfg, graphdef, state.params, batch, key)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    loss = loss / tokens
    grad_norm = optax.global_norm(grads)
    good, guard, sigmas = _watch(cfg.optim, state.guard, loss, grad_norm)

    # Each device updates its slice of the moments, and of the parameters, which are then put together again.
    specs, moment_specs = _specs(cfg, state.params, "embed"), _specs(cfg, state.params, "moment")
    old = _shard(state.params, moment_specs)
    updates, opt_state = tx.update(_shard(grads, moment_specs), state.opt_state, old)
    params = jax.tree.map(lambda p, u: (p - lr * u).astype(p.dtype), old, updates)
    sums = aux.pop("router")
    params = update_biases(cfg, state.step, params, {i: s["load_E"] for i, s in sums.items()})
    ema = state.ema
    if ema is not None:
      ema = jax.tree.map(
          lambda e, p: e * cfg.optim.ema + (1 - cfg.optim.ema) * p.astype(e.dtype), ema, params)
    new, old = (params, opt_state, ema), (old, state.opt_state, state.ema)
    params, opt_state, ema = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    everywhere = lambda a: jax.sharding.reshard(a, jax.P())  # So that each process can read it.
    metrics = aux | {"loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": batch["weights"].sum(),
                     "sigmas": sigmas, "skipped": guard.skipped, "nll_B": everywhere(aux["nll_B"]),
                     "weight_B": everywhere(batch["weights"].sum(1))}
    metrics |= router_metrics(cfg.model, sums) if sums else {}
    return TrainState(state.step + 1, _shard(params, specs), opt_state, ema, guard), metrics

  return train_step


def make_gradient(cfg, graphdef):
  """(params, batch) -> the gradient of a step, in nats per token, before it is clipped. No dropout."""
  def gradient(params, batch):
    tokens = jnp.maximum(batch["weights"].sum(), 1.0)
    return jax.tree.map(lambda g: g / tokens, _accumulate(cfg, graphdef, params, batch, None)[1])

  return gradient


def _accumulate(cfg, graphdef, params, batch, key):
  """Loss and gradient summed over the micro-batches; rows i, i + k, i + 2k, ... make one, so every device
  takes part.

  Returns:
    ((loss, aux), grads): the loss without what the routers add, which the gradient has; aux has nll_B, z, the
    routers' losses, and "router": their sums (train.balance).
  """
  spec, k = loss_spec(cfg.model, cfg.loss_chunk, cfg.z_loss), cfg.accum_steps
  gradient_specs = _specs(cfg, params, "gradient")
  tokens, routed = batch["weights"].sum(), jnp.maximum((batch["segments"] > 0).sum().astype(jnp.float32), 1.0)
  key_of = lambda index: None if key is None else jax.random.fold_in(key, index) if k > 1 else key
  micros = (jnp.arange(k), _split(cfg, batch))
  loads = None
  if k > 1 and cfg.balance.loss:  # The balance of all micro-batches, before any gradient.
    loads = _loads(graphdef, params, micros, key_of)

  def gradient(batch, key):
    def total(params):
      loss, aux = next_token_loss(spec, nnx.merge(graphdef, params), batch, key)
      sums = router_sums(aux.pop("layers"))
      if not sums:
        return loss, (loss, aux, {})
      counted = loads or {i: s["load_E"] for i, s in sums.items()}
      losses = balance_losses(cfg.model, sums, counted, routed)
      return loss + tokens * weigh(cfg.balance, losses), (loss, aux, {"router": sums, **losses})

    grads, (loss, aux, routers) = jax.grad(total, has_aux=True)(params)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    return (loss, _shard(grads, gradient_specs), routers), aux

  if k == 1:
    (loss, grads, routers), aux = gradient(batch, key)
  else:
    def add(total, micro):
      index, batch = micro
      new, aux = gradient(batch, key_of(index))
      return jax.tree.map(jnp.add, total, new), aux

    types, _ = jax.eval_shape(gradient, jax.tree.map(lambda a: a[0], micros[1]), key)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, out_sharding=a.sharding.spec), types)
    (loss, grads, routers), aux = jax.lax.scan(add, zeros, micros)
    aux = {"nll_B": aux["nll_B"].T.reshape(-1, out_sharding=cfg.model.rules("batch")), "z": aux["z"].sum()}
  return (loss, {"router": {}, **aux, **routers}), grads


def _loads(graphdef, params, micros, key_of):
  """How often each expert is chosen in the whole batch: one more forward pass, which the gradient of a
  balance over all micro-batches takes."""
  def count(micro):
    index, batch = micro
    model = nnx.merge(graphdef, params)
    batch = in_order(model.cfg, batch)
    _, layers = model(batch["tokens"], batch["positions"], batch["segments"], key=key_of(index))
    return {i: s["load_E"] for i, s in router_sums(layers).items()}

  return jax.tree.map(lambda a: a.sum(0), jax.lax.map(count, micros))


def _watch(optim, guard, loss, grad_norm):
  """Whether the step counts, the detector after it, and how many standard deviations the loss is above its
  mean.

  A skipped loss moves the mean and the spread too, by no more than the limit: a single spike stays out, but a
  lasting rise (another source, say) is accepted after a few steps instead of ending the run.
  """
  deviation = jnp.maximum(jnp.sqrt(guard.variance), 0.01 * jnp.abs(guard.mean) + 1e-6)
  sigmas = jnp.where(guard.accepted < GUARD_STEPS, 0.0, (loss - guard.mean) / deviation)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  good, change = finite, loss - guard.mean
  if optim.spike_sigma is not None:
    good &= sigmas < optim.spike_sigma
    change = jnp.where(
        guard.accepted < GUARD_STEPS, change, jnp.minimum(change, optim.spike_sigma * deviation))
  decay = jnp.minimum(GUARD_DECAY, guard.accepted / (guard.accepted + 1.0))  # A plain mean at first.
  mean = guard.mean + (1 - decay) * change
  variance = decay * (guard.variance + (1 - decay) * change**2)
  return good, Guard(jnp.where(finite, mean, guard.mean), jnp.where(finite, variance, guard.variance),
                     guard.accepted + good, jnp.where(good, 0, guard.skipped + 1)), sigmas


def make_eval_step(cfg, graphdef):
  """(params, batch with bytes_B) -> sums over the batch: nll in nats, tokens, bytes. Never through dropout.

  In as many micro-batches as training, so that what trains can be evaluated.
  """
  spec = loss_spec(cfg.model, cfg.loss_chunk, 0.0)

  def eval_step(params, batch):
    rows = {name: a for name, a in batch.items() if name != "bytes"}
    nll = jax.lax.map(
        lambda micro: next_token_loss(spec, nnx.merge(graphdef, params), micro)[0], _split(cfg, rows))
    return {"nll": nll.sum(), "tokens": batch["weights"].sum(), "bytes": batch["bytes"].sum()}

  return eval_step


def _split(cfg, batch):
  """[B, T] -> [k, B / k, T]: rows i, i + k, i + 2k, ... make a micro-batch, so every device takes part in
  each."""
  def one(a):
    rows = a.reshape(-1, cfg.accum_steps, *a.shape[1:], out_sharding=cfg.model.rules("batch", None, None))
    return jnp.swapaxes(rows, 0, 1)

  return jax.tree.map(one, batch)

"""One optimizer step: gradient over micro-batches, guard, update. Pure functions of (state, batch)."""
import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from model.transformer import abstract_params, init_params
from train.losses import loss_spec, next_token_loss
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
  """(graphdef, TrainState), each array born in its shards. Moments take their parameter's sharding."""
  tx = make_optimizer(cfg, abstract_params(cfg.model, mesh)[1])
  with jax.set_mesh(mesh):
    graphdef, params = init_params(cfg.model, mesh, jax.random.key(cfg.seed))
    return graphdef, jax.jit(lambda params: _new_state(cfg, tx, params))(params)


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


def _new_state(cfg, tx, params):
  number = lambda dtype: jnp.zeros((), dtype, out_sharding=jax.P())
  guard = Guard(number(jnp.float32), number(jnp.float32), number(jnp.int32), number(jnp.int32))
  # Whatever the parameters are.
  as_float32 = lambda tree: jax.tree.map(lambda p: p.astype(jnp.float32), tree)
  ema = None if cfg.optim.ema is None else as_float32(params)
  return TrainState(number(jnp.int32), params, tx.init(as_float32(params)), ema, guard)


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
    (loss, aux), grads = _accumulate(cfg, graphdef, state.params, batch, key)
    tokens = batch["weights"].sum()
    grads = jax.tree.map(lambda g: g / jnp.maximum(tokens, 1.0), grads)
    loss = loss / jnp.maximum(tokens, 1.0)
    grad_norm = optax.global_norm(grads)
    good, guard, sigmas = _watch(cfg.optim, state.guard, loss, grad_norm)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: (p - lr * u).astype(p.dtype), state.params, updates)
    ema = state.ema
    if ema is not None:
      ema = jax.tree.map(
          lambda e, p: e * cfg.optim.ema + (1 - cfg.optim.ema) * p.astype(e.dtype), ema, params)
    new = (params, opt_state, ema)
    old = (state.params, state.opt_state, state.ema)
    params, opt_state, ema = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    everywhere = lambda a: jax.sharding.reshard(a, jax.P())  # So that each process can read it.
    metrics = aux | {"loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": tokens, "sigmas": sigmas,
                     "skipped": guard.skipped, "nll_B": everywhere(aux["nll_B"]),
                     "weight_B": everywhere(batch["weights"].sum(1))}
    return TrainState(state.step + 1, params, opt_state, ema, guard), metrics

  return train_step


def _accumulate(cfg, graphdef, params, batch, key):
  """Loss and gradient summed over the micro-batches; rows i, i + k, i + 2k, ... make one, so every device
  takes part."""
  spec = loss_spec(cfg.model, cfg.loss_chunk, cfg.z_loss)

  def gradient(batch, key):
    loss = lambda params: next_token_loss(spec, nnx.merge(graphdef, params), batch, key)
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return (value, aux), jax.tree.map(lambda g: g.astype(jnp.float32), grads)

  k = cfg.accum_steps
  if k == 1:
    return gradient(batch, key)

  def add(total, micro):
    index, batch = micro
    (loss, aux), grads = gradient(batch, None if key is None else jax.random.fold_in(key, index))
    return jax.tree.map(jnp.add, total, (loss, grads)), aux

  zeros = jax.tree.map(
      lambda p: jnp.zeros(p.shape, jnp.float32, out_sharding=jax.typeof(p).sharding.spec), params)
  (loss, grads), aux = jax.lax.scan(add, (jnp.zeros(()), zeros), (jnp.arange(k), _split(cfg, batch)))
  nll_B = aux.pop("nll_B").T.reshape(-1, out_sharding=cfg.model.rules("batch"))
  z = aux.pop("z").sum()
  return (loss, {"nll_B": nll_B, "z": z, **jax.tree.map(lambda a: a.mean(0), aux)}), grads


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

"""The training loop: restore, rows, step, metrics one step late, evaluate, save.
Read `train` from top to bottom."""
import collections
import contextlib
import dataclasses
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from data.flags import as_json, git_state, versions, write_config_json
from data.pipeline import Rows, make_batches, val_batches
from data.prepare import prepare
from infer.load import keep_tokenizer
from model.count import flops_per_token
from model.sharding import make_mesh
from train.checkpoint import Checkpointer
from train.host import CompileCache, StopSignal, peak_memory
from train.metrics import MetricsWriter, Progress, describe_mfu, mfu, peak_flops
from train.optim import path_name
from train.profile import top_operations
from train.step import abstract_state, init_state, make_eval_step, make_train_step


def train(cfg, workdir, *, overrides=(), stop: StopSignal, profile: bool = False) -> int:
  """Trains, or goes on training, in `workdir`.

  Returns:
    The exit code: 0 when all steps are done, 143 or 130 when a signal stopped the run after saving.

  Raises:
    ValueError: the user's mistake. CheckpointError, RuntimeError: a failure, by name.
  """
  workdir, primary, clock = pathlib.Path(workdir), jax.process_index() == 0, Stopwatch()
  mesh = make_mesh(**dataclasses.asdict(cfg.mesh))
  progress = Progress(cfg.steps, primary=primary)
  cache = CompileCache(pathlib.Path(cfg.data.cache_path) / "jax")
  with clock.within("preparing data"):
    prepared = _prepare(cfg, progress.note)
  rows = Rows(prepared, cfg.data, seq_len=cfg.seq_len, batch_size=cfg.batch_size, seed=cfg.seed,
              steps=cfg.steps)
  feed = Feed(cfg, mesh)
  evaluate = Evaluation(cfg, prepared, feed, clock)
  meta = {"config": as_json(cfg), "data": prepared.content_hash,
          "versions": versions(["jax", "flax", "orbax-checkpoint"]), "git": git_state(), "tokens": 0}
  if primary:
    write_config_json(workdir / "config.json", cfg, overrides)
    keep_tokenizer(prepared.tokenizer_path, cfg.data.tokenizer.kind, workdir)

  checkpoints = Checkpointer(workdir / "checkpoints", cfg.checkpoint)
  with jax.set_mesh(mesh), MetricsWriter(workdir, cfg.log, primary=primary) as writer, progress, \
      contextlib.ExitStack() as at_exit:
    at_exit.callback(checkpoints.wait)  # A save that is under way is finished whatever happens here.
    graphdef, abstract = abstract_state(cfg, mesh)
    state = _restore(checkpoints, abstract, meta, writer, progress)
    stop.at_once = False  # From here on there is something to save.
    with clock.within("compiling"):
      step_fn, evaluate.step_fn = _compile(cfg, graphdef, abstract, feed, cache, progress)
    if fresh := state is None:
      state = init_state(cfg, mesh)[1]
    step = int(state.step)
    log = StepLog(cfg, workdir, rows, writer, progress, meta, abstract, lambda: state.params)

    def save():
      with clock.within("saving"):
        checkpoints.save(step, state, meta, evaluate.last)

    if fresh:  # What evaluation and saving need in memory and on disk is known before hours are spent.
      evaluate(step, state, log, stop)
      save()
      progress.note(f"memory: {peak_memory()} at most, with evaluation and saving")
    elif evaluate.is_due(step) and not evaluate.is_recorded(writer.path, step):
      evaluate(step, state, log, stop)  # The signal that stopped the last run came in the middle of it.

    batches = feed.batches(make_batches(
        rows, start_step=step, slots=feed.slots, prefetch=cfg.data.prefetch), log, clock)
    trace = Trace(workdir / "profile", step + 3, cfg.log.profile_steps, progress) if profile else None
    clock.enter("training")
    while step < cfg.steps and not stop.requested(step):
      checkpoints.check()
      batch = next(batches)
      with trace.at(step) if trace else contextlib.nullcontext(), jax.transfer_guard("disallow"):
        state, metrics = step_fn(state, batch)
      step += 1
      log.later(step, metrics)
      last = step == cfg.steps
      if evaluate.is_due(step):
        log.flush()
        evaluate(step, state, log, stop)
      if last or cfg.checkpoint.every and step % cfg.checkpoint.every == 0:
        log.flush()
        save()
    log.flush()
    if step < cfg.steps:
      save()
      progress.note(f"stopped by {stop.received.name} after step {step}, saved; the same command goes on")
      return stop.exit_code
    with clock.within("saving"):
      checkpoints.wait()
    progress.note(f"memory: {peak_memory()} at most")
    progress.note(clock.describe())
  return 0


def _prepare(cfg, note):
  """Tokenised shards, made by the first process; the others wait for them."""
  if jax.process_index() == 0:
    prepared = prepare(cfg.data, log=note)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("data is prepared")
    prepared = prepare(cfg.data, log=lambda *_: None)
  if (found := prepared.tokenizer.vocab_size) != cfg.model.vocab_size:
    raise ValueError(f"model.vocab_size={cfg.model.vocab_size} but the tokenizer has {found}: "
                     f"set it to {found} or None")
  return prepared


def _restore(checkpoints, abstract, meta, writer, progress):
  """The newest good state, or None for a new run; the record of later steps is dropped."""
  restored = checkpoints.restore(abstract)
  if restored is None:
    writer.truncate_after(-1)
    return None
  for step, reason in restored.rejected:
    progress.note(f"WARNING: checkpoint {step} is damaged and left aside: {reason}", style="yellow")
  if restored.meta["data"] != meta["data"]:
    raise ValueError(f"the data has changed since step {restored.step}: content "
                     f"{restored.meta['data'][:12]} then, {meta['data'][:12]} now; its rows would not be "
                     "the same. Give another --workdir")
  writer.truncate_after(restored.step)
  meta["tokens"] = restored.meta["tokens"]
  progress.note(f"resuming from step {restored.step}")
  return restored.state


def _compile(cfg, graphdef, abstract, feed, cache, progress):
  """Both programs, ahead of time: nothing compiles after this."""
  progress.note(_describe_dtypes(cfg, abstract))
  start = time.perf_counter()
  train_step = jax.jit(make_train_step(cfg, graphdef, abstract.params), donate_argnums=0)
  step_fn = train_step.lower(abstract, feed.abstract).compile()
  n_bytes = jax.ShapeDtypeStruct((cfg.batch_size,), jnp.int32, sharding=feed.per_row)
  eval_step = jax.jit(make_eval_step(cfg, graphdef))
  eval_fn = eval_step.lower(abstract.ema or abstract.params, feed.abstract | {"bytes": n_bytes}).compile()
  memory = step_fn.memory_analysis()
  total = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30
  progress.note(f"compile: {time.perf_counter() - start:.1f} s, {cache.describe()}")
  progress.note(f"memory: the step needs {total:.2f} GiB a device, by the compiler")
  return step_fn, eval_fn


def _describe_dtypes(cfg, abstract):
  kinds = lambda tree: "+".join(sorted({str(a.dtype) for a in jax.tree.leaves(tree)
                                        if jnp.issubdtype(a.dtype, jnp.floating)}))
  return (f"precision {cfg.model.precision}: parameters {kinds(abstract.params)}, "
          f"compute {cfg.model.compute_dtype}, optimizer {kinds(abstract.opt_state) or 'none'}, "
          "gradients and their sum float32, norms, rotary angles, softmax, logits and loss float32")


class Feed:
  """Rows of the host -> arrays of the mesh. Each process makes only the rows that its devices hold."""

  def __init__(self, cfg, mesh):
    self.sharding = jax.NamedSharding(mesh, cfg.model.rules("batch", None))
    self.per_row = jax.NamedSharding(mesh, cfg.model.rules("batch"))
    self.shape = (cfg.batch_size, cfg.seq_len)
    held = self.sharding.addressable_devices_indices_map(self.shape).values()
    self.slots = sorted({slot for rows, _ in held for slot in range(*rows.indices(cfg.batch_size))})
    number = lambda dtype: jax.ShapeDtypeStruct(self.shape, dtype, sharding=self.sharding)
    self.abstract = {name: number(jnp.float32 if name == "weights" else jnp.int32)
                     for name in ("tokens", "targets", "weights", "positions", "segments")}

  def put(self, batch):
    def one(a):
      pick = lambda index: a[np.searchsorted(self.slots, np.arange(*index[0].indices(self.shape[0])))]
      sharding = self.sharding if a.ndim == 2 else self.per_row
      return jax.make_array_from_callback((self.shape[0], *a.shape[1:]), sharding, pick)

    return {name: one(a) for name, a in batch.items()}

  def batches(self, batches, log, clock):
    """Waits for the next rows, and says how long."""
    while True:
      start = time.perf_counter()
      with clock.within("waiting for data"):
        batch = next(batches)
      log.data_wait_s += time.perf_counter() - start
      yield self.put(batch)


class Evaluation:
  """Loss and bits per byte of the validation rows, in order, on the averaged weights if there are any."""

  def __init__(self, cfg, prepared, feed, clock):
    self.cfg, self.feed, self.clock, self.last, self.step_fn = cfg, feed, clock, {}, None
    self.rows = None
    if prepared.count("val", "tokens"):
      self.rows = Rows(prepared, cfg.data, seq_len=cfg.seq_len, batch_size=cfg.batch_size, split="val")

  def is_due(self, step):
    every = self.cfg.eval.every
    return self.rows is not None and (step in (0, self.cfg.steps) or every is not None and step % every == 0)

  def is_recorded(self, path, step):
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return any(line["step"] == step and "eval/val/loss" in line for line in lines)

  def __call__(self, step, state, log, stop):
    """Writes and returns the metrics. A signal to stop leaves it: the resumed run does it again."""
    start, total = time.perf_counter(), collections.Counter()
    params = state.params if state.ema is None else state.ema
    with self.clock.within("evaluation"):
      for batch in self._batches():
        if jax.process_count() == 1 and stop.received:
          return
        sums = jax.device_get(self.step_fn(params, self.feed.put(batch)))
        total.update({name: value.item() for name, value in sums.items()})
    if total["tokens"]:
      self.last = {"eval/val/loss": total["nll"] / total["tokens"],
                   "eval/val/bpb": total["nll"] / math.log(2) / total["bytes"]}
      log.write(step, {**self.last, "eval/val/tokens": total["tokens"],
                       "eval/val/s": time.perf_counter() - start})
    log.pause(time.perf_counter() - start)

  def _batches(self):
    if self.rows is None:
      return []
    return val_batches(self.rows, slots=self.feed.slots, limit=self.cfg.eval.rows)


class StepLog:
  """Metrics of a step are read when the next one is under way, so the device never waits for the host."""

  def __init__(self, cfg, workdir, rows, writer, progress, meta, abstract, params):
    self.cfg, self.workdir, self.rows = cfg, workdir, rows
    self.writer, self.progress, self.meta = writer, progress, meta
    self.params, self.pending = params, None  # `params()`: the newest.
    self.read = time.perf_counter()
    self.data_wait_s = 0.0
    n_params = sum(math.prod(a.shape) for a in jax.tree.leaves(abstract.params))
    self.flops_per_token = flops_per_token(cfg.model, cfg.seq_len, n_params)
    self.peak, source = peak_flops(jax.devices())
    progress.note(f"model: {n_params / 1e6:.1f}M parameters, {self.flops_per_token / 1e6:.1f} MFLOP a token; "
                  f"{describe_mfu(source)}")

  def later(self, step, metrics):
    """Queues this step's metrics and writes those of the step before."""
    before, self.pending = self.pending, (step, metrics, self.data_wait_s)
    self.data_wait_s = 0.0
    self._write(before)

  def flush(self):
    before, self.pending = self.pending, None
    self._write(before)

  def pause(self, seconds):
    """Time that was not spent on steps."""
    self.read += seconds

  def write(self, step, values):
    self.writer.write(step, values)
    self.progress.update(step, values)

  def _write(self, queued):
    if queued is None:
      return
    step, metrics, data_wait_s = queued
    metrics = jax.device_get(metrics)
    now = time.perf_counter()
    seconds, self.read = now - self.read, now
    tokens = float(metrics["tokens"])
    if not metrics["skipped"]:
      self.meta["tokens"] += int(tokens)
    first = ("loss", "grad_norm", "lr")
    rest = sorted(k for k, v in metrics.items()
                  if np.ndim(v) == 0 and k not in (*first, "tokens", "sigmas", "z"))
    shown = {k: float(metrics[k]) for k in (*first, *rest)}
    values = {**shown, "tokens": self.meta["tokens"], "tokens_per_s": tokens / seconds,
              "mfu": mfu(tokens / seconds * self.flops_per_token, self.peak),
              "data_wait_ms": 1e3 * data_wait_s, "step_ms": 1e3 * seconds}
    if step % self.cfg.log.every == 0 or metrics["skipped"]:
      self.write(step, values)
    if metrics["skipped"]:
      self._explain(step, metrics)

  def _explain(self, step, metrics):
    """A skipped step: its rows, the worst first, in a file; too many in a row end the run."""
    loss_B = np.asarray(metrics["nll_B"]) / np.maximum(metrics["weight_B"], 1)
    worst = np.argsort(np.where(np.isfinite(loss_B), -loss_B, -np.inf), kind="stable").tolist()
    numbers = {name: str(metrics[name]) for name in ("loss", "grad_norm", "sigmas")}
    rows = [{"slot": slot, "loss": str(loss_B[slot]),
             "pieces": [p._asdict() for p in self.rows.address(step - 1, slot)]}
            for slot in worst]
    bad = [path_name(path) for path, a in jax.tree_util.tree_flatten_with_path(self.params())[0]
           if not jnp.isfinite(a).all()]
    report = {"step": step, **numbers, "non_finite_parameters": bad, "rows": rows}
    path = self.workdir / "skipped" / f"{step}.json"
    if jax.process_index() == 0:
      path.parent.mkdir(exist_ok=True)
      path.write_text(json.dumps(report, indent=1) + "\n")
    self.progress.note(f"WARNING: step {step} skipped: loss {metrics['loss']:.4g}, "
                       f"gradient norm {metrics['grad_norm']:.4g}, {metrics['sigmas']:.1f} standard "
                       f"deviations above the mean; its rows are in {path}", style="yellow")
    if metrics["skipped"] > self.cfg.optim.max_skips:
      raise RuntimeError(f"{int(metrics['skipped'])} steps skipped in a row, more than optim.max_skips="
                         f"{self.cfg.optim.max_skips}; non-finite parameters: {bad[:3] or 'none'}; "
                         f"rows in {path.parent}")


class Stopwatch:
  """Where the wall time goes: always in exactly one phase, so the phases sum to the whole."""

  def __init__(self):
    self.seconds, self.phase, self.since = collections.Counter(), "start", time.perf_counter()

  def enter(self, phase):
    """Ends the phase that runs and begins another; returns the one that ended."""
    now = time.perf_counter()
    self.seconds[self.phase] += now - self.since
    before, self.phase, self.since = self.phase, phase, now
    return before

  @contextlib.contextmanager
  def within(self, phase):
    before = self.enter(phase)
    try:
      yield
    finally:
      self.enter(before)

  def describe(self) -> str:
    self.enter(self.phase)
    total = sum(self.seconds.values())
    parts = ", ".join(f"{name} {s:.1f} s ({s / total:.0%})" for name, s in self.seconds.most_common())
    return f"time: {total:.1f} s: {parts}"


class Trace:
  """Records `n` steps from `first` on, then writes what took the time."""

  def __init__(self, path, first, n, progress):
    self.path, self.first, self.last, self.progress = path, first, first + n - 1, progress

  @contextlib.contextmanager
  def at(self, step):
    if step == self.first:
      jax.profiler.start_trace(self.path)
    yield
    if step == self.last:
      jax.profiler.stop_trace()
      table = top_operations(self.path)
      (self.path / "top_operations.txt").write_text(table)
      self.progress.note(table)
      self.progress.note(f"profile: {self.path}")

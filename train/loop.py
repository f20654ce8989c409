"""The training loop: restore, rows, step, metrics one step late, evaluate, save.
Read `train` from top to bottom."""
import concurrent.futures
import contextlib
import dataclasses
import pathlib
import time
import typing

import jax
import jax.numpy as jnp

from data.flags import as_json, git_state, versions, write_config_json
from data.pipeline import Rows, make_batches
from data.prepare import Prepared, prepare
from infer.compile_cache import CompileCache
from infer.load import keep_tokenizer
from model.kernels.platform import platform
from model.sharding import fit, make_mesh
from train.checkpoint import Checkpointer, Refused, refuse_changes
from train.dry_run import Forecast
from train.evaluate import Evaluation
from train.feed import Feed
from train.host import StopSignal, Stopwatch, peak_memory
from train.initial import check_initial
from train.log import StepLog
from train.metrics import MetricsWriter, Progress, peak_flops, read_metrics
from train.profile import StepTrace
from train.step import abstract_state, init_state, make_eval_step, make_train_step
from train.together import agree


class Run(typing.NamedTuple):
  """What stands before the first array is made."""
  mesh: jax.sharding.Mesh
  prepared: Prepared
  rows: Rows
  progress: Progress
  cache: CompileCache
  clock: Stopwatch
  peak: tuple[float | None, str]  # FLOP/s of all devices, and where the number is from.


def prepare_run(cfg, clock: Stopwatch) -> Run:
  """The mesh and the data.

  Raises:
    ValueError: the user's mistake: the settings against the devices, or against the data.
  """
  with clock.within("devices"):
    cfg.validate(jax.device_count())
  progress = Progress(cfg.steps, primary=jax.process_index() == 0)
  cache = CompileCache()
  mesh = make_mesh(**dataclasses.asdict(cfg.mesh))
  if cfg.init_from is not None:
    check_initial(cfg, mesh, progress.note)
  with clock.within("preparing data"):
    prepared = _prepare(cfg, progress.note, clock)
  rows = Rows(prepared, cfg.data, seq_len=cfg.seq_len, batch_size=cfg.batch_size, seed=cfg.seed,
              steps=cfg.steps)
  with clock.within("peak"):
    peak = peak_flops(jax.devices())
  return Run(mesh, prepared, rows, progress, cache, clock, peak)


def train(cfg, workdir, run: Run, *, overrides=(), allowed=(), stop: StopSignal,
          profile: bool = False) -> int:
  """Trains, or goes on training, in `workdir`.

  Args:
    allowed: settings that may differ from those of the checkpoint, though they change the numbers.

  Returns:
    The exit code: 0 when all steps are done, 143 or 130 when a signal stopped the run after saving.

  Raises:
    Refused, train.log.TooManySkips, model.hub.orbax.CheckpointError, OSError: by name. Others are bugs.
  """
  workdir, (mesh, prepared, rows, progress, cache, clock, peak) = pathlib.Path(workdir), run
  feed, forecast = Feed(cfg, mesh), Forecast(cfg, jax.devices(), peak[0])
  evaluation = Evaluation(cfg, prepared, feed, clock)
  meta = {"config": as_json(cfg), "data": prepared.content_hash, "git": git_state(),
          "versions": versions(["jax", "flax", "orbax-checkpoint"])}
  checkpoints = Checkpointer(workdir / "checkpoints", cfg.checkpoint, clock)
  with jax.set_mesh(mesh), \
      MetricsWriter(workdir, cfg.log, primary=jax.process_index() == 0) as writer, progress, \
      contextlib.ExitStack() as at_exit:
    at_exit.callback(cache.close)
    at_exit.callback(checkpoints.wait)  # A save that is under way is finished whatever happens here.
    graphdef, abstract = abstract_state(cfg, mesh)
    progress.note(forecast.describe(abstract))
    with clock.within("restoring"):
      state, tokens = _restore(checkpoints, abstract, meta, allowed, writer, progress)
    if jax.process_index() == 0:
      write_config_json(workdir / "config.json", cfg, overrides, prepared.content_hash)
      keep_tokenizer(prepared.tokenizer_path, cfg.data.tokenizer.kind, workdir)
    stop.at_once = False  # From here on there is something to save.
    fresh = state is None
    step_fn, eval_fn, state = _compile(cfg, run, graphdef, abstract, feed, state)
    step = clock.step = int(state.step)
    first = step + 1
    log = StepLog(cfg, workdir, rows, writer, progress, tokens)
    log.describe(state.params, *peak)

    def save():
      with clock.within("saving"):
        checkpoints.save(step, state, {**meta, "tokens": log.tokens}, evaluation.at(step))

    def evaluate():
      log.flush(state.params)
      done = evaluation(step, state, eval_fn, log.write, stop)
      log.pause(evaluation.seconds)
      return done

    complete = True  # Whether the last evaluation that was due is done.
    # New, or the signal that stopped the last run came in its middle.
    if evaluation.is_pending(step, writer.path):
      complete = evaluate()
      if not fresh and complete:
        checkpoints.annotate(step, evaluation.at(step))
    if fresh:  # What saving needs in memory and on disk is known before hours are spent.
      save()
      progress.note(f"memory: {peak_memory()} at most, with evaluation and saving")

    batches = feed.batches(make_batches(
        rows, start_step=step, slots=feed.slots, prefetch=cfg.data.prefetch), clock)
    trace = (StepTrace(workdir / "profile", step_fn, step, cfg.steps, cfg.log.profile_steps)
             if profile else None)
    clock.enter("training")
    while step < cfg.steps and not stop.requested(step):
      checkpoints.check()
      batch = next(batches)
      with jax.transfer_guard("disallow"):
        state, metrics = step_fn(state, batch)
      step = clock.step = step + 1
      log.later(step, metrics, state.params, feed.wait_s)
      if trace and (table := trace.after(step, state)):
        progress.note(table)
      if step == first:
        jax.block_until_ready(metrics)
        progress.note(clock.describe_start())
      if evaluation.is_due(step):
        complete = evaluate()
      if step == cfg.steps or cfg.checkpoint.every and step % cfg.checkpoint.every == 0:
        log.flush(state.params)
        save()
    log.flush(state.params)
    if stop.requested(step, now=True) and (step < cfg.steps or not complete):
      save()
      progress.note(f"stopped by {stop.received.name} after step {step}, saved; the same command goes on")
      return stop.exit_code
    with clock.within("saving"):
      checkpoints.wait()
    progress.note(f"memory: {peak_memory()} at most")
    if jax.process_index() == 0:
      progress.note(forecast.compare(read_metrics(writer.path), step_bytes(step_fn), peak_memory()))
    progress.note(clock.describe())
  return 0


def _prepare(cfg, note, clock):
  """Tokenised shards, made by the first process; the others wait for them, as long as it says something."""
  error = None

  def log(*what):
    clock.notes += 1
    note(*what)

  if jax.process_index() == 0:
    try:
      prepared = prepare(cfg.data, log=log)
    except (ValueError, OSError, RuntimeError) as e:
      error = e
  if agree("data", clock, error is not None)[0] and jax.process_index() != 0:
    raise error or ValueError("process 0 could not prepare the data: see its message")
  if error is not None:
    raise error
  if jax.process_index() != 0:
    prepared = prepare(cfg.data, log=lambda *_: None)
  if (found := prepared.tokenizer.vocab_size) != cfg.model.vocab_size:
    raise ValueError(f"model.vocab_size={cfg.model.vocab_size} but the tokenizer has {found}: "
                     f"set it to {found} or None")
  return prepared


def _restore(checkpoints, abstract, meta, allowed, writer, progress):
  """(the newest good state or None, tokens trained on); the record of later steps is dropped.

  Raises:
    Refused: settings or data that would change the numbers of what is there.
  """
  def check(saved):
    refuse_changes(checkpoints.root.parent, saved["config"], meta["config"], list(allowed))
    if saved["data"] != meta["data"]:
      raise Refused(f"the data has changed since step {saved['step']}: content {saved['data'][:12]} then, "
                    f"{meta['data'][:12]} now; its rows would not be the same. Give another --workdir")

  for name in checkpoints.leftovers:
    progress.note(f"removed checkpoints/{name}, which a stopped run left unfinished")
  restored = checkpoints.restore(abstract, check)
  if restored is None:
    writer.truncate_after(-1)
    return None, 0
  for step, reason in restored.rejected:
    progress.note(f"WARNING: checkpoint {step} is damaged and left aside: {reason}", style="yellow")
  writer.truncate_after(restored.step)
  progress.note(f"resuming from step {restored.step}")
  return restored.state, restored.meta["tokens"]


def _compile(cfg, run, graphdef, abstract, feed, state):
  """(train step, evaluation step, state): both programs, ahead of time and side by side, and in the meantime
  the first state, unless there is one. Nothing compiles after this."""
  cache, clock, note = run.cache, run.clock, run.progress.note
  note(_describe_dtypes(cfg, abstract))
  note(_describe_kernels(fit(cfg.model, run.mesh)))
  train_step = jax.jit(make_train_step(cfg, graphdef, abstract.params), donate_argnums=0)
  eval_step = jax.jit(make_eval_step(cfg, graphdef))
  start = time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    with clock.within("tracing"):
      step_fn = pool.submit(train_step.lower(abstract, feed.abstract).compile)
      eval_fn = pool.submit(eval_step.lower(
          abstract.ema or abstract.params, feed.abstract | {"bytes": feed.abstract_bytes}).compile)
    with clock.within("initialising"):
      state = state or init_state(cfg, run.mesh)[1]
    with clock.within("compiling"):
      step_fn, eval_fn = step_fn.result(), eval_fn.result()
  note(f"compile: {time.perf_counter() - start:.1f} s, {cache.describe()}")
  cache.settle(["train_step", "eval_step"], is_late=lambda: clock.phase != "saving")  # That slices shards.
  note(f"memory: the step needs {step_bytes(step_fn) / 2**30:.2f} GiB a device, by the compiler")
  return step_fn, eval_fn, state


def _describe_kernels(model):
  experts = f", experts {model.grouped_impl}" if model.ffn == "moe" and model.dispatch == "dropless" else ""
  return f"kernels on {platform()}: attention {model.attention_impl}{experts}"


def step_bytes(step_fn) -> int:
  """What a compiled step needs of a device, by the compiler."""
  memory = step_fn.memory_analysis()
  if platform() == "tpu":  # Elsewhere the peak is without temporaries; there, they are counted twice.
    return memory.peak_memory_in_bytes
  return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def _describe_dtypes(cfg, abstract):
  kinds = lambda tree: "+".join(sorted({str(a.dtype) for a in jax.tree.leaves(tree)
                                        if jnp.issubdtype(a.dtype, jnp.floating)}))
  return (f"precision {cfg.model.precision}: parameters {kinds(abstract.params)}, compute and gradients of "
          f"matrices {cfg.model.compute_dtype}, their sum over micro-batches float32, optimizer "
          f"{kinds(abstract.opt_state) or 'none'}, norms, rotary angles, softmax, logits and loss float32")

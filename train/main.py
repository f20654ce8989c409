"""python -m train.main --config=configs/quickstart.py [--config.a.b=value ...] [--workdir=DIR]

Trains what the config says, or goes on where DIR was left: the same command does both. Exit codes: 0 done,
2 a mistake in the settings (nothing was touched), 143 stopped by SIGTERM after saving, 1 a failure, named.
"""
import argparse
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shlex
import sys
import time
import traceback

from data.flags import as_json, leaves, load

EPILOG = """examples:
  python -m train.main --config=configs/quickstart.py                        train; run it again to go on
  python -m train.main --config=configs/quickstart.py --config.optim.lr=1e-3 change a setting
  python -m train.main --config=configs/quickstart.py --print_config         see every setting
  python -m train.main --config=configs/dense_8b.py --dry_run --chip=v5e --n=256   does it fit? how fast?
  JAX_NUM_CPU_DEVICES=8 JAX_PLATFORMS=cpu python -m train.main --config=configs/tiny.py --config.mesh.tensor=2
"""


def parse(argv=None):
  parser = argparse.ArgumentParser(prog="train.main", description=__doc__, epilog=EPILOG,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", help="where everything is written; default: runs/CONFIG-HASH")
  parser.add_argument("--allow_change", action="append", default=[], metavar="SETTING",
                      help="let a resumed run change this setting, though it changes the numbers; repeatable")
  parser.add_argument("--profile", action="store_true",
                      help="trace a few steps: DIR/profile and a table of the top operations")
  parser.add_argument("--dry_run", action="store_true",
                      help="train nothing: print memory, speed and cost on --n devices of --chip")
  parser.add_argument("--chip", help="with --dry_run: v5e, v5p, ...: a row of python -m train.chips")
  parser.add_argument("--n", type=int, help="with --dry_run: devices; default: what the mesh has")
  parser.add_argument("--price_per_chip_hour", type=float, help="with --dry_run, in any currency")
  return load(parser, argv, checks=(check_run,))


def check_run(cfg):
  """What only the code knows: the tables behind the names, and the vocabulary of a tokenizer that is a
  file."""
  from model.transformer import check_names
  from train.metrics import check_log
  from train.optim import check_optimizer
  if cfg.model.vocab_size is None:
    from data.tokenizer import load_tokenizer
    cfg.model.vocab_size = load_tokenizer(cfg.data.tokenizer.path, cfg.data.tokenizer.kind).vocab_size
  check_names(cfg.model)
  check_log(cfg)
  check_optimizer(cfg)


def check_resume(cfg, workdir, allowed):
  """Refuses, before a device is touched, to go on with settings that would change the numbers.

  Raises:
    Refused: with each setting's old and new value.
  """
  from model.hub.orbax import find_steps, read_meta
  from train.checkpoint import refuse_changes
  steps = find_steps(workdir / "checkpoints") if (workdir / "checkpoints").exists() else []
  if not steps:
    return
  try:
    old = read_meta(workdir / "checkpoints" / str(max(steps)))["config"]
  except (OSError, ValueError, KeyError):
    return  # A damaged checkpoint: restoring says so, and checks against the one that it uses.
  refuse_changes(workdir, old, as_json(cfg), allowed)


def default_workdir(cfg, config_path) -> pathlib.Path:
  """runs/NAME-HASH, the hash of the settings that change the numbers: the same command finds its run
  again."""
  from train.checkpoint import FREE_TO_CHANGE
  bare = lambda name: re.sub(r"\[\d+\]", "", name)
  free = lambda name: any(bare(name) == f or bare(name).startswith(f + ".") for f in FREE_TO_CHANGE)
  text = json.dumps({name: repr(value) for name, value in leaves(cfg).items() if not free(name)},
                    sort_keys=True)
  stem = pathlib.Path(config_path.split(":")[0]).stem
  return pathlib.Path("runs") / f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def lock(workdir):
  """Holds the workdir until the process ends.

  Raises:
    ValueError: another run holds it.
  """
  file = open(workdir / "lock", "a+")  # noqa: SIM115
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    raise ValueError(f"--workdir={workdir} is in use by process {file.read().strip()}") from None
  file.truncate(0)
  file.write(str(os.getpid()))
  file.flush()
  return file


def check_shared(workdir, clock):
  """Raises ValueError, in all processes, if one does not see in `workdir` what process 0 writes there."""
  import jax
  import numpy as np

  from train.together import agree
  if jax.process_count() == 1:
    return
  token = agree("start", clock, np.int32(time.time_ns() % 2**31))[0]
  mark = workdir / f".shared-{token}"  # A new name: no file system remembers that it was not there.
  if jax.process_index() == 0:
    mark.touch()
  agree("workdir", clock, 0)
  sees_it = mark.exists()
  blind = np.flatnonzero(~agree("workdir", clock, sees_it)).tolist()
  if jax.process_index() == 0:
    mark.unlink()
  if blind:
    raise ValueError(f"--workdir={workdir} is not shared: process {', '.join(map(str, blind))} of "
                     f"{jax.process_count()} does not see what process 0 writes there; give one that all "
                     "hosts see")


def dry_run(cfg, args) -> int:
  from train.dry_run import describe
  try:
    print(describe(cfg, args.chip, args.n, args.price_per_chip_hour, args.config))
  except ValueError as e:
    print(f"train.main: error: {e}", file=sys.stderr)
    return 2
  return 0


def main(argv=None) -> int:
  cfg, args = parse(argv)
  if args.dry_run:
    return dry_run(cfg, args)
  from train.host import Stopwatch, is_cpu_host, keep_memory, process_age, start_distributed
  from train.together import Apart, Watch
  clock = Stopwatch("imports", process_age())
  workdir = pathlib.Path(args.workdir) if args.workdir else default_workdir(cfg, args.config)
  try:
    check_resume(cfg, workdir, args.allow_change)
    workdir.mkdir(parents=True, exist_ok=True)
    if is_cpu_host():
      keep_memory()
    with clock.within("joining"):
      start_distributed(cfg.stall_s)
  except (ValueError, PermissionError) as e:
    print(f"train.main: error: {e}", file=sys.stderr)
    return 2
  except Apart as e:
    print(f"train.main: failed: {e}", file=sys.stderr)
    return 1
  watch = Watch(clock, cfg.stall_s)
  try:
    code = run(cfg, args, workdir, clock, watch)
    watch.close()
    return code
  except Failed as e:
    print(f"train.main: {e}", file=sys.stderr)
    return watch.leave(e.code, str(e))
  except Exception as e:
    if watch.alone:
      raise
    traceback.print_exc()
    return watch.leave(1, f"{type(e).__name__}: {str(e)[:200]}")


class Failed(Exception):
  """What the user is told in one line, and the exit code."""

  def __init__(self, code, text):
    super().__init__(text)
    self.code = code


def run(cfg, args, workdir, clock, watch) -> int:
  """Raises Failed."""
  import jax

  from model.hub.orbax import CheckpointError
  from train.checkpoint import Refused
  from train.host import StopSignal
  from train.log import LostLoss, TooManySkips
  from train.loop import prepare_run, train
  from train.report import write_report
  stop = StopSignal(clock, watch)
  try:
    check_shared(workdir, clock)
    holder = lock(workdir) if jax.process_index() == 0 else None  # Held as long as it is referred to.
    prepared = prepare_run(cfg, clock)
  except (ValueError, PermissionError) as e:
    raise Failed(2, f"error: {e}") from e
  command = shlex.join(["python", "-m", "train.main", f"--config={args.config}",
                        *(f"--config.{o}" for o in args.overrides), f"--workdir={workdir}"])
  try:
    code = train(cfg, workdir, prepared, overrides=args.overrides, allowed=args.allow_change, stop=stop,
                 profile=args.profile)
    stop.at_once = True  # All is saved.
    if code == 0:
      write_report(cfg, workdir, prepared, command)
    return code
  except Refused as e:
    raise Failed(2, f"error: {e}") from e
  except (CheckpointError, LostLoss, TooManySkips, OSError) as e:
    raise Failed(1, f"failed: {type(e).__name__}: {e}") from e
  finally:
    if holder is not None:
      holder.close()


if __name__ == "__main__":
  sys.exit(main())

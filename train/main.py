"""python -m train.main --config=configs/quickstart.py [--config.a.b=value ...] [--workdir=DIR]

Trains what the config says, or goes on where DIR was left: the same command does both. Exit codes: 0 done,
2 a mistake in the settings (nothing was touched), 143 stopped by SIGTERM after saving, 1 a failure, named.
"""
import argparse
import json
import pathlib
import sys

from data.flags import as_json, config_hash, load

EPILOG = """examples:
  python -m train.main --config=configs/quickstart.py                        train; run it again to go on
  python -m train.main --config=configs/quickstart.py --config.optim.lr=1e-3 change a setting
  python -m train.main --config=configs/quickstart.py --print_config         see every setting
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
  return load(parser, argv, checks=(_find_names,))


def _find_names(cfg):
  """What only the code knows: the tables behind the names, and the vocabulary of a tokenizer that is a
  file."""
  from model.transformer import check_names
  from train.metrics import check_log
  if cfg.model.vocab_size is None:
    from data.tokenizer import load_tokenizer
    cfg.model.vocab_size = load_tokenizer(cfg.data.tokenizer.path, cfg.data.tokenizer.kind).vocab_size
  check_names(cfg.model)
  check_log(cfg)


def check_resume(cfg, workdir, allowed):
  """Refuses, before a device is touched, to go on with settings that would change the numbers.

  Raises:
    ValueError: with each setting's old and new value.
  """
  from train.checkpoint import changed_settings
  path = workdir / "config.json"
  if not path.exists() or not (workdir / "checkpoints").exists():
    return
  old = json.loads(path.read_text())["config"]
  if changes := changed_settings(old, as_json(cfg), allowed):
    lines = [f"  {leaf}: {was} there, {now} here; to allow it: --allow_change={leaf}"
             for leaf, was, now in changes]
    raise ValueError("\n".join([f"{workdir} was begun with other settings (or give another --workdir):",
                                *lines]))


def main(argv=None) -> int:
  cfg, args = parse(argv)
  name = pathlib.Path(args.config.split(":")[0]).stem
  workdir = pathlib.Path(args.workdir or f"runs/{name}-{config_hash(cfg).removeprefix('sha256:')[:8]}")
  try:
    check_resume(cfg, workdir, args.allow_change)
    workdir.mkdir(parents=True, exist_ok=True)
  except (ValueError, OSError) as e:
    print(f"train.main: error: {e}", file=sys.stderr)
    return 2
  from train.host import StopSignal, start_distributed
  stop = StopSignal()
  start_distributed()
  from model.hub.orbax import CheckpointError
  from train.loop import train
  from train.report import write_report
  try:
    code = train(cfg, workdir, overrides=args.overrides, stop=stop, profile=args.profile)
    stop.at_once = True  # All is saved.
    if code == 0:
      write_report(cfg, workdir, command=f"python -m train.main --config={args.config} --workdir={workdir}")
    return code
  except ValueError as e:
    print(f"train.main: error: {e}", file=sys.stderr)
    return 2
  except (CheckpointError, RuntimeError, OSError) as e:
    print(f"train.main: failed: {type(e).__name__}: {e}", file=sys.stderr)
    return 1


if __name__ == "__main__":
  sys.exit(main())

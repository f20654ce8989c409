"""A run's folder -> what decoding needs: the model's config, the tokenizer, the parameters."""
import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp

from data.flags import from_json, nearest
from data.tokenizer import Tokenizer, load_tokenizer
from model.config import ModelConfig
from model.hub.orbax import find_checkpoints, find_steps, restore_params
from model.transformer import abstract_params, check_names

WEIGHTS = ("params", "ema")
TOKENIZERS = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}  # In the run's folder.


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
  path: pathlib.Path
  model: ModelConfig
  tokenizer: Tokenizer
  seq_len: int  # Of training.
  has_ema: bool


def open_run(path) -> Run:
  """Reads the small files of a run; no device is touched.

  Raises:
    ValueError: it is no run, has no checkpoint, or its tokenizer is missing or of another size.
  """
  path = pathlib.Path(path)
  if not (path / "config.json").is_file():
    there = [p.parent.name for p in path.parent.glob("*/config.json")]
    near = nearest(path.name, there) or sorted(there)[:5]
    hint = f"; in {path.parent} there is {', '.join(near)}" if near else ""
    raise ValueError(f"--run={path} is no run: {path / 'config.json'} does not exist{hint}")
  if not find_steps(path / "checkpoints"):
    raise ValueError(f"--run={path} has no finished checkpoint yet")
  config = json.loads((path / "config.json").read_text())["config"]
  model = from_json(ModelConfig, config["model"], "model.")
  check_names(model)
  tokenizer = _find_tokenizer(path, config["data"]["tokenizer"])
  if tokenizer.vocab_size != model.vocab_size:
    raise ValueError(f"--run={path}: model.vocab_size={model.vocab_size}, but its tokenizer has "
                     f"{tokenizer.vocab_size} tokens: it is not the one of the run")
  return Run(path, model, tokenizer, config["seq_len"], config["optim"]["ema"] is not None)


def load_params(run: Run, cfg: ModelConfig, mesh, *, weights: str | None = None, step: int | None = None):
  """Reads the parameters of the newest good checkpoint, or of one step, straight into their shards.

  Args:
    cfg: the run's, under the rules to shard by: infer.decode.decode_config(run.model, mesh).
    weights: of WEIGHTS; None is "ema" if the run keeps one.

  Returns:
    (params, step, weights, rejected): `rejected` the newer, damaged (step, reason)s.

  Raises:
    ValueError: no such step, or no such weights.
    model.hub.orbax.CheckpointError: what is there is damaged.
  """
  weights = weights or ("ema" if run.has_ema else "params")
  if weights == "ema" and not run.has_ema:
    raise ValueError(f"--weights=ema: {run.path} keeps no moving average (optim.ema=None); valid: params")
  path = run.path
  if step is not None:
    root = find_checkpoints(run.path)
    if step not in (steps := find_steps(root)):
      raise ValueError(f"--step={step} was not saved; saved: {', '.join(map(str, steps))}")
    path = root / str(step)
  _, abstract = abstract_params(cfg, mesh)
  if weights == "ema":  # Always kept in float32.
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32, sharding=a.sharding), abstract)
  params, meta, rejected = restore_params(path, abstract, weights)
  return params, meta["step"], weights, rejected


def keep_tokenizer(tokenizer_path, kind: str, run_path) -> None:
  """Copies a tokenizer into a run's folder, where `open_run` looks: the cache may go, the run still talks."""
  source, target = pathlib.Path(tokenizer_path), pathlib.Path(run_path) / TOKENIZERS[kind]
  shutil.copyfile(source, target)
  beside = source.with_name("tokenizer_config.json")  # Names the special tokens of a tokenizer.json.
  if kind == "huggingface" and beside.is_file():
    shutil.copyfile(beside, target.with_name(beside.name))


def _find_tokenizer(path, config):
  kept = path / TOKENIZERS[config["kind"]]
  if kept.is_file():
    return load_tokenizer(kept, config["kind"])
  if config["path"] is None:
    raise ValueError(f"--run={path} has no tokenizer: {kept} does not exist")
  return load_tokenizer(config["path"], config["kind"])

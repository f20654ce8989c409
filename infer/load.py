"""A run's folder -> what decoding needs: the model's config, the tokenizer, the parameters."""
import dataclasses
import json
import math
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
from flax import nnx

from data.chat import Chat, find_template
from data.flags import from_json, nearest
from data.tokenizer import Tokenizer, load_tokenizer
from infer.compile_cache import CompileCache
from model.config import ModelConfig
from model.hub.orbax import find_checkpoints, find_params, find_steps
from model.sharding import DECODE, fit, make_mesh, ways
from model.transformer import Transformer, abstract_params, check_names

WEIGHTS = ("params", "ema")
TOKENIZERS = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json",
              "gguf": "tokenizer_gguf.json"}  # In the run's folder.
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
          "generation_config.json")  # What says more of an imported tokenizer.


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
  path: pathlib.Path
  model: ModelConfig
  tokenizer: Tokenizer
  seq_len: int  # Of training.
  has_ema: bool


def open_run(path, flag: str = "--run") -> Run:
  """Reads the small files of a run, or of an imported model (`flag` "--model"); no device is touched.

  Raises:
    ValueError: it is no run, has no checkpoint, or its tokenizer is missing or of another size.
  """
  path = pathlib.Path(path)
  if not (path / "config.json").is_file():
    there = [p.parent.name for p in path.parent.glob("*/config.json")]
    near = nearest(path.name, there) or sorted(there)[:5]
    hint = f"; in {path.parent} there is {', '.join(near)}" if near else ""
    what = "run" if flag == "--run" else "imported model"
    raise ValueError(f"{flag}={path} is no {what}: {path / 'config.json'} does not exist{hint}")
  if not find_steps(path / "checkpoints"):
    if flag == "--model":
      raise ValueError(f"--model={path} has no checkpoints of ours: python -m model.hub import {path} DIR "
                       "makes a folder that has")
    raise ValueError(f"--run={path} has no finished checkpoint yet")
  config = json.loads((path / "config.json").read_text())["config"]
  model = from_json(ModelConfig, config["model"], "model.")
  check_names(model)
  tokenizer = _find_tokenizer(path, config["data"]["tokenizer"], flag)
  if tokenizer.vocab_size != model.vocab_size:
    if config["data"]["tokenizer"]["kind"] == "sentencepiece" and tokenizer.vocab_size < model.vocab_size:
      raise ValueError(f"{flag}={path}: model.vocab_size={model.vocab_size}, but its tokenizer has "
                       f"{tokenizer.vocab_size} tokens: it is not the one of the run")
    try:  # Published models have rows that no token uses (Qwen), or tokens without a row (Gemma 3).
      tokenizer = tokenizer.resized(model.vocab_size)
    except ValueError as e:
      raise ValueError(f"{flag}={path}: {e}: it is not the one of the run") from None
  return Run(path, model, tokenizer, config["seq_len"], config["optim"]["ema"] is not None)


def load_params(run: Run, cfg: ModelConfig, mesh, *, weights: str | None = None, step: int | None = None):
  """Reads the parameters of a checkpoint straight into their shards: (params, step, weights, rejected).

  Arguments, the other results and errors are those of `_find_params`.
  """
  found, *more = _find_params(run, cfg, mesh, weights=weights, step=step)
  return found.read(), *more


def _find_params(run, cfg, mesh, *, weights, step):
  """The parameters of the newest good checkpoint, or of one step.

  Args:
    cfg: the run's, under the rules to shard by: decode_config(run.model, mesh).
    weights: of WEIGHTS; None is "ema" if the run keeps one.

  Returns:
    (Unread, step, weights, rejected): `rejected` the newer, damaged (step, reason)s.

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

  def make_abstract():
    _, abstract = abstract_params(cfg, mesh)
    if weights != "ema":
      return abstract
    kept = lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32, sharding=a.sharding)  # Always in float32.
    return jax.tree.map(kept, abstract)

  found, meta, rejected = find_params(path, make_abstract, weights)
  return found, meta["step"], weights, rejected


def decode_config(cfg: ModelConfig, mesh) -> ModelConfig:
  """The config under the DECODE rules, for this mesh.

  Raises:
    ValueError: a dim of the weights is no multiple of the devices that it is split over.
  """
  for name, rule in (("n_heads", "heads"), ("d_ff", "mlp"), ("d_expert", "mlp"), ("n_experts", "experts"),
                     ("padded_vocab_size", "vocab")):
    value, axes = getattr(cfg, name) or 0, getattr(DECODE, rule)
    if value % ways(mesh, axes):
      axis = "*".join(f"mesh.{a}" for a in axes)
      raise ValueError(f"model.{name}={value} is not a multiple of {axis}={ways(mesh, axes)}; nearest valid "
                       f"{axis}: {math.gcd(value, ways(mesh, axes))}")
  if cfg.dispatch == "capacity":  # Which requests share a batch must not decide what is dropped.
    cfg = dataclasses.replace(cfg, dispatch="dropless", exchange="gather")
  return fit(dataclasses.replace(cfg, rules=DECODE), mesh)


def cast_params(cfg: ModelConfig, params):
  """The parameters as the forward pass reads them, so that no step of decode casts them again.

  What has a logical axis is read in the compute dtype (model.layers.read); norms are float32 as they are.
  """
  if cfg.compute_dtype == cfg.param_dtype:
    return params
  declared = nnx.state(nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0))))
  is_param = lambda x: isinstance(x, nnx.Variable)
  is_read = jax.tree.map(lambda p: p.replace(any(p.get_metadata()["axes"])), declared, is_leaf=is_param)
  cast = lambda read, a: a.astype(cfg.compute_dtype) if read else a
  return jax.jit(lambda params: jax.tree.map(cast, nnx.to_pure_dict(is_read), params))(params)


def load_model(run: Run, *, compute_dtype: str | None, weights: str | None, step: int | None, tensor: int):
  """(config, Unread params, mesh) for decoding on all devices, `tensor` of which share each layer; says on
  stderr what they are.

  Args:
    compute_dtype: None: the run's.

  Raises:
    ValueError, model.hub.orbax.CheckpointError: as load_params; or the model cannot be split so.
  """
  CompileCache()
  mesh = make_mesh(data=-1, tensor=tensor)
  cfg = dataclasses.replace(run.model, compute_dtype=compute_dtype or run.model.compute_dtype)
  cfg = decode_config(cfg, mesh)
  params, step, weights, rejected = _find_params(run, cfg, mesh, weights=weights, step=step)
  for bad, reason in rejected:
    print(f"checkpoint {bad} is damaged and passed over: {reason}", file=sys.stderr)
  n_params = sum(math.prod(a.shape) for a in jax.tree.leaves(params.abstract))
  print(f"{run.path} at step {step}: {weights}, {n_params / 1e6:.1f}M parameters, computing in "
        f"{cfg.compute_dtype} on {mesh.size} {jax.devices()[0].device_kind}", file=sys.stderr, flush=True)
  return cfg, params, mesh


def keep_tokenizer(tokenizer_path, kind: str, run_path) -> None:
  """Copies a tokenizer into a run's folder, where `open_run` looks: the cache may go, the run still talks."""
  source, target = pathlib.Path(tokenizer_path), pathlib.Path(run_path) / TOKENIZERS[kind]
  shutil.copyfile(source, target)
  for beside in map(source.with_name, BESIDE):
    if beside.is_file() and beside.parent.resolve() != target.parent.resolve():
      shutil.copyfile(beside, target.with_name(beside.name))


def open_chat(run: Run) -> Chat | None:
  """The model's chat template with its tokenizer; None if the folder holds none.

  Raises:
    ValueError: the template is broken.
  """
  template = find_template(run.path)
  return None if template is None else Chat(run.tokenizer, template)


def find_ends(run: Run, chat: Chat | None = None) -> tuple[int, ...]:
  """The ids that end a text: the tokenizer's, those of generation_config.json, the template's end of turn."""
  found = {run.tokenizer.eos_id, *(chat.end_ids if chat else ())}
  file = run.path / "generation_config.json"
  try:
    named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
  except (ValueError, AttributeError) as e:
    raise ValueError(f"{file} cannot be read: {e}") from None
  named = named if isinstance(named, list) else [named]
  return tuple(sorted(found | {i for i in named if isinstance(i, int) and 0 <= i < run.model.vocab_size}))


def _find_tokenizer(path, config, flag):
  kept = path / TOKENIZERS[config["kind"]]
  if kept.is_file():
    return load_tokenizer(kept, config["kind"])
  if config["path"] is None:
    raise ValueError(f"{flag}={path} has no tokenizer: {kept} does not exist")
  return load_tokenizer(config["path"], config["kind"])

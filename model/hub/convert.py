"""Import, export and check: a folder or file of others -> a run's folder of ours, and back.

A folder that was imported is one that infer.load.open_run reads: config.json, checkpoints/0, the tokenizer.
"""
import dataclasses
import json
import pathlib
import re
import shutil
import time

import ml_dtypes
import numpy as np

from model.config import ModelConfig, RopeScaling
from model.hub import folder, gguf_file, gguf_names
from model.hub.errors import HubError
from model.hub.families import FAMILIES, find_family, find_lost, match_family
from model.hub.orbax import (
  META,
  STATE,
  find_checkpoints,
  find_newest_good,
  read_meta,
  read_tree,
  sync_folder,
  write_manifest,
)
from model.hub.plan import NEVER_CAST, compare, export_rows, import_tensor, make_plan
from model.hub.safetensors_file import write_safetensors
from model.hub.store import StateReader, StateWriter
from model.lookup import check_choice
from model.sharding import AxisRules

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {"float32", "float16", "bfloat16", "float64"}
SHOWN = 12  # Lines of a list of tensors.
GGUF_TOKENIZER = "tokenizer_gguf.json"
# Of their config, what export must not bring back: where it came from, or what would run or change it.
NOT_KEPT = {"auto_map", "quantization_config", "_name_or_path", "transformers_version", "torch_dtype",
            "rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern",
            "_sliding_window_pattern", "custom_pipelines", "partial_rotary_factor"}


@dataclasses.dataclass(frozen=True)
class Source:
  """What is to be imported, known by its headers alone."""
  path: pathlib.Path
  family: object
  config: dict
  tensors: dict
  model: ModelConfig
  plan: object
  notes: list
  tokenizer: dict  # The fields of a GGUF file; {} of a folder, whose files are copied.


def open_source(path, *, param_dtype: str | None = None, length: int | None = None) -> Source:
  """Reads config and headers, and compares every tensor's name and shape with the family's.

  Args:
    param_dtype: float32 | bfloat16; None: bfloat16 where all of theirs is, else float32.
    length: tokens that the model will be used for: dynamic and longrope scaling choose by it.

  Raises:
    HubError: it is not a model that is known here, or not whole.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    config, tokenizer = folder.read_config(path), {}
    notes = folder.find_ignored(path, config)
    family = find_family(config)
    if "quantization_config" in config:
      raise HubError(f"{path}/config.json: quantization_config: quantised weights are read from GGUF files "
                     "only")
    tensors = {family.rename(name): tensor for name, tensor in folder.read_tensors(path).items()}
  elif gguf_file.is_gguf(path):
    fields, tensors = gguf_file.read_gguf(path)
    config, tensors = gguf_names.as_folder(path, fields, tensors)
    tokenizer = {name: value for name, value in fields.items() if name.startswith("tokenizer.")}
    notes, family = [], find_family(config)
  else:
    raise HubError(f"{path} is neither a folder with a config.json nor a GGUF file")
  kept = {name: t for name, t in tensors.items() if not _ignored(family, config, name)}
  if wrong := [name for name, t in kept.items() if t.dtype.name not in FLOATS]:
    raise HubError(f"{wrong[0]} is of {kept[wrong[0]].dtype}; valid: {', '.join(sorted(FLOATS))}")
  param_dtype = param_dtype or _pick_dtype(kept)
  check_choice("--param_dtype", param_dtype, ("float32", "bfloat16"))
  model = family.to_model(config, precision="fp32" if param_dtype == "float32" else "pure_bf16")
  if length is not None:
    model.rope_scaling = dataclasses.replace(model.rope_scaling, length=length)
  plan = make_plan(family, model)
  tied = "lm_head.weight" if model.head == "tied" else None
  if wrong := compare(plan, kept, tied=tied):
    more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    raise HubError("\n  ".join([f"{path} is not the {family.name} that its settings say:",
                                *wrong[:SHOWN], *more]))
  if tied in kept:
    _check_tied(plan, kept, tied)
    notes.append(f"{tied} is the embedding again: ignored")
  if len(kept) < len(tensors):
    notes.append(f"tensors without parameters of the model: {len(tensors) - len(kept)} ignored, as "
                 f"{sorted(tensors.keys() - kept.keys())[0]}")
  return Source(path, family, config, kept, model, plan, notes, tokenizer)


def _ignored(family, config, name):
  """Buffers, and the layers that predict further tokens (DeepSeek V3), which come after the last."""
  extra = re.match(r"model\.layers\.(\d{1,5})\.", name)
  beyond = extra and config.get("num_nextn_predict_layers") and (
      int(extra[1]) >= config.get("num_hidden_layers", 0))
  return bool(beyond) or any(re.fullmatch(pattern, name) for pattern in family.ignored)


def _pick_dtype(tensors):
  """Routers and the biases of balancing are float32 here in any case."""
  own = [t.dtype for name, t in tensors.items()
         if not name.endswith(("gate.weight", "e_score_correction_bias"))]
  return "bfloat16" if own and all(dtype == BF16 for dtype in own) else "float32"


def _check_tied(plan, tensors, tied):
  embed = tensors[next(name for name, parts in plan.tensors.items() if parts[0].leaf == "embed")]
  same = embed.shape == tensors[tied].shape and all(
      np.array_equal(embed.read(i, min(i + 1024, embed.shape[0])), tensors[tied].read(
          i, min(i + 1024, embed.shape[0]))) for i in range(0, embed.shape[0], 1024))
  if not same:
    raise HubError(f"{tied} is there and is not the embedding, but config.json says tie_word_embeddings")


def import_model(source: Source, target, progress=lambda done, total: None) -> pathlib.Path:
  """Writes a run's folder; it appears with its config.json, last.

  Args:
    target: a path that does not exist, or an empty folder.
    progress: called with tensors done and all.

  Raises:
    HubError: there is something at `target`.
  """
  target = _claim(target)
  part = target / "checkpoints" / "0.saving"
  try:
    plan = source.plan
    leaves = {f"params/{name}": (leaf, plan.chunks[name]) for name, leaf in plan.leaves.items()}
    part.mkdir(parents=True)
    with StateWriter(part / STATE, leaves) as state:
      write = lambda leaf, index, values: state.write(f"params/{leaf}", index, values)
      for done, name in enumerate(plan.tensors):
        import_tensor(plan, name, source.tensors[name], write)
        progress(done + 1, len(plan.tensors))
    config = _describe(source, _copy_tokenizer(source, target))
    (part / META).write_text(json.dumps({**config, "step": 0, "time": time.time(), "metrics": {}}, indent=1))
    write_manifest(part)
    part.rename(part.with_name("0"))
    sync_folder(target / "checkpoints")
    (target / "config.json").write_text(json.dumps(config, indent=1))
  except BaseException:  # Ctrl-C included: half a model must not look like one.
    shutil.rmtree(target, ignore_errors=True)
    raise
  return target


def _claim(target):
  target = pathlib.Path(target)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise HubError(f"{target} is there and not empty: give a new folder")
  target.mkdir(parents=True, exist_ok=True)
  return target


def _copy_tokenizer(source, target) -> str:
  """Byte for byte; returns the kind of tokenizer that data.tokenizer will find."""
  if source.tokenizer:
    (target / GGUF_TOKENIZER).write_text(json.dumps(source.tokenizer))
    return "gguf"
  for name in folder.TOKENIZER_FILES:
    if (source.path / name).is_file():
      shutil.copyfile(folder.inside(source.path, name), target / name)
  only_pieces = (target / "tokenizer.model").is_file() and not (target / "tokenizer.json").is_file()
  return "sentencepiece" if only_pieces else "huggingface"


def _describe(source, tokenizer_kind):
  """config.json of the run, and most of meta.json: the model, what inference reads, where it came from."""
  longest = source.config.get("max_position_embeddings") or source.config.get("n_positions") or 2048
  config = {"model": dataclasses.asdict(source.model), "seq_len": longest, "steps": 0, "optim": {"ema": None},
            "data": {"tokenizer": {"kind": tokenizer_kind, "path": None}}}
  return {"config": config, "hub": {"family": source.family.name, "config": source.config}}


# Back.

def read_model(config: dict) -> ModelConfig:
  """The ModelConfig of a run's config.json."""
  nested = {"rules": AxisRules, "rope_scaling": RopeScaling}
  try:
    tuples = lambda v: tuple(v) if isinstance(v, list) else v
    values = {name: tuples(value) for name, value in config["model"].items()}
    for name, kind in nested.items():
      values[name] = kind(**{key: tuples(value) for key, value in values[name].items()})
    return ModelConfig(**values).validate()
  except (KeyError, TypeError, AttributeError) as e:
    raise HubError(f"its config.json is not one of this version ({type(e).__name__}: {e})") from None


def open_run(run) -> tuple[dict, pathlib.Path]:
  """(config.json, the newest good checkpoint) of a run's folder. Every byte is compared with its manifest."""
  run = pathlib.Path(run)
  if not (run / "config.json").is_file():
    raise HubError(f"{run} is no run: {run / 'config.json'} does not exist")
  config = folder.read_json(run / "config.json")
  if not isinstance(config, dict) or "model" not in (config.get("config") or {}):
    raise HubError(f"{run}/config.json is not of a run of ours: what is exported is what was imported or "
                   "trained here")
  step_dir, _ = find_newest_good(find_checkpoints(run))
  if step_dir is None:
    raise HubError(f"{run} has no finished checkpoint")
  return config, step_dir


def export_model(run, target, *, family: str | None = None, shard_bytes: int = 5_000_000_000,
                 progress=lambda done, total: None) -> pathlib.Path:
  """Writes what transformers loads: config.json, safetensors in shards, the tokenizer's files.

  Args:
    run: a run's folder.
    family: a name of FAMILIES; None: that of the import, or the first that can say all of the model.

  Raises:
    HubError: no family can say what the model is.
  """
  saved, step_dir = open_run(run)
  config, hub = saved["config"], saved.get("hub") or read_meta(step_dir).get("hub") or {}
  cfg = read_model(config)
  family = _choose_family(cfg, family or hub.get("family"))
  plan = make_plan(family, cfg)
  which = "params" if (config.get("optim") or {}).get("ema") is None else "ema"
  there = read_tree(step_dir)
  for name, leaf in plan.leaves.items():
    if f"{which}/{name}" not in there or tuple(there[f"{which}/{name}"].shape) != leaf.shape:
      raise HubError(f"{step_dir} has no {which}/{name} of shape {list(leaf.shape)}: it is not of its config")
  target = _claim(target)
  try:
    theirs = {key: v for key, v in hub.get("config", {}).items() if key not in NOT_KEPT}
    theirs = {"max_position_embeddings": config["seq_len"], **theirs, **family.to_theirs(cfg)}
    _write_shards(plan, cfg, StateReader(step_dir / STATE), which, target, shard_bytes, progress)
    for name in folder.TOKENIZER_FILES:
      if (pathlib.Path(run) / name).is_file():
        shutil.copyfile(pathlib.Path(run) / name, target / name)
    (target / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
  except BaseException:  # Ctrl-C included: half a model must not look like one.
    shutil.rmtree(target, ignore_errors=True)
    raise
  return target


def _choose_family(cfg, name):
  if name is None:
    return match_family(cfg)
  try:
    check_choice("--family", name, FAMILIES)
  except ValueError as e:
    raise HubError(str(e)) from None
  if lost := find_lost(FAMILIES[name], cfg):
    raise HubError(f"{name} cannot say all of this model's config: {', '.join(lost[:6])}")
  return FAMILIES[name]


def _write_shards(plan, cfg, reader, which, target, shard_bytes, progress):
  dtype = lambda name: np.dtype("float32") if plan.tensors[name][0].leaf.endswith(NEVER_CAST) else (
      BF16 if cfg.param_dtype == "bfloat16" else np.dtype("float32"))
  shards, used = [{}], 0
  for name in plan.tensors:
    size = int(np.prod(plan.shape(name))) * dtype(name).itemsize
    if shards[-1] and used + size > shard_bytes:
      shards.append({})
      used = 0
    shards[-1][name] = plan.shape(name), dtype(name)
    used += size
  read, done = lambda leaf, index: reader.read(f"{which}/{leaf}", index), 0

  def rows(name):
    nonlocal done
    yield from export_rows(plan, name, read)
    done += 1
    progress(done, len(plan.tensors))

  file = lambda i: folder.SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
  for i, shard in enumerate(shards):
    write_safetensors(target / file(i), shard, rows)
  if len(shards) > 1:
    total = sum(int(np.prod(shape)) * kind.itemsize for shard in shards for shape, kind in shard.values())
    places = {name: file(i) for i, shard in enumerate(shards) for name in shard}
    (target / folder.INDEX).write_text(json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n")

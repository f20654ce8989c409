"""The schema is pinned, contradictions are named before a device is touched, and what validates is sound.

After an intended change: python -m tests.test_config rewrites tests/config_fields.txt and tests/golden/.
"""
import argparse
import dataclasses
import math
import pathlib

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from data import flags
from model.sharding import MESH_AXES
from train.config import MeshConfig, TrainConfig

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("[!_]*.py"))
FIELDS = ROOT / "tests" / "config_fields.txt"
GOLDEN = ROOT / "tests" / "golden"
REWRITE = "if that is intended, run `python -m tests.test_config` and look at the diff"

# Overrides of configs/tiny.py -> what the one line on stderr must hold. The tests have 8 devices.
CONTRADICTIONS = [
  (["batch_size=6", "mesh.data=4", "mesh.fsdp=2"],
   ["batch_size=6", "data*fsdp*expert=8", "nearest valid batch_size: 8"]),
  (["batch_size=12", "accum_steps=8"], ["batch_size=12", "accum_steps=8", "nearest valid batch_size: 8, 16"]),
  (["batch_size=8", "accum_steps=2", "mesh.data=8"], ["batch_size=8", "8 times accum_steps=2", ": 16"]),
  (["batch_size=0"], ["batch_size=0", "at least 1"]),
  (["mesh.data=3"], ["'data': 3", "3 devices", "8"]),
  (["mesh.data=-1"], ["only one axis may be -1"]),
  (["mesh.tensor=0"], ["'tensor': 0", "at least 1"]),
  (["mesh.tensor=8", "mesh.fsdp=1"], ["n_heads=4", "mesh.tensor=8", "nearest valid mesh.tensor: 4"]),
  (["mesh.tensor=-1", "mesh.fsdp=1"], ["n_heads=4", "mesh.tensor=8"]),
  (["mesh.expert=2"], ["mesh.expert=2", "nearest valid: 1"]),
  (["model.n_kv_heads=3"], ["model.n_heads=4", "model.n_kv_heads=3", "nearest valid n_kv_heads: 2, 4"]),
  (["model.n_heads=5", "model.n_kv_heads=5"], ["model.d_model=64", "model.n_heads=5", "4, 8"]),
  (["model.head_dim=7"], ["model.head_dim=7", "even", "6, 8"]),
  (["model.n_layers=0"], ["model.n_layers=0", "at least 1"]),
  (["model.n_layers=3", "model.window=8", "model.layer_pattern=('local', 'global')"],
   ["model.n_layers=3", "nearest valid: 2, 4"]),
  (["model.layer_pattern=('local',)"], ["model.window=None", "model.layer_pattern=('local',)"]),
  (["model.layer_pattern=('near',)"], ["model.layer_pattern=('near',)", "'local' and 'global'"]),
  (["model.precision=fp16"], ["model.precision='fp16'", "'bf16'", "'fp32'"]),
  (["model.dropout=1.0"], ["model.dropout=1.0", "[0, 1)"]),
  (["model.n_experts=4"], ["model.n_experts=4", "model.ffn='swiglu'"]),
  (["optim.warmup_steps=40"], ["optim.warmup_steps=40", "steps=40", "nearest valid: 39"]),
  (["optim.schedule=cosin"], ["optim.schedule='cosin'", "'cosine'"]),
  (["optim.name=adam"], ["optim.name='adam'", "'adamw'"]),
  (["optim.name=sgd", "optim.b2=0.9"], ["optim.b2=0.9", "optim.name='sgd'", "momentum"]),
  (["optim.lr=-1"], ["optim.lr=-1.0"]),
  (["optim.grad_clip=0"], ["optim.grad_clip=0.0", "None for off"]),
  (["eval.every=0"], ["eval.every=0", "at least 1"]),
  (["log.wandb=yes"], ["log.wandb='yes'", "'offline', 'online'"]),
  (["data.packing=best"], ["data.packing='best'", "'best_fit'"]),
  (["data.val_fraction=1"], ["data.val_fraction=1.0", "[0, 1)"]),
  (["data.tokenizer.kind=huggingface"], ["data.tokenizer.path=None", "tokenizer.json"]),
  (["data.sources[0].weight=-1"], ["data.sources[0].weight=-1.0"]),
  (["data.weights_from_step=((5, (1.0, 2.0)),)"], ["data.weights_from_step", "1 sources"]),
]


def field_names() -> list[str]:
  return sorted(name.replace("[0]", "[]") for name in flags.leaves(TrainConfig()))


def golden(config: str) -> str:
  """What --print_config prints for a shipped config."""
  resolved = flags.read_config(str(ROOT / "configs" / f"{config}.py")).validate()
  lines = [f"{k} = {v!r}" for k, v in sorted(flags.leaves(resolved).items())]
  return "\n".join([*lines, f"hash {flags.config_hash(resolved)}", ""])


def test_the_set_of_fields_is_pinned():
  assert FIELDS.read_text().split() == field_names(), f"fields were added or removed: {REWRITE}"


@pytest.mark.parametrize("config", CONFIGS)
def test_resolved_config_equals_its_golden(config):
  path = GOLDEN / f"{config}.txt"
  assert path.exists(), f"no golden for configs/{config}.py: {REWRITE}"
  assert path.read_text() == golden(config), f"configs/{config}.py or a default has changed: {REWRITE}"


def test_every_golden_has_its_config():
  assert sorted(p.stem for p in GOLDEN.glob("*.txt")) == CONFIGS, REWRITE


@pytest.mark.parametrize("config", CONFIGS)
def test_print_config_prints_the_golden(config, capsys):
  with pytest.raises(SystemExit) as exit_:
    flags.load(argparse.ArgumentParser("prog"), [f"--config={ROOT}/configs/{config}.py", "--print_config"])
  assert exit_.value.code == 0 and capsys.readouterr().out == (GOLDEN / f"{config}.txt").read_text()


@pytest.mark.parametrize("overrides, fragments", CONTRADICTIONS, ids=[" ".join(c[0]) for c in CONTRADICTIONS])
def test_contradictions_exit_2_with_names_and_values(overrides, fragments, capsys):
  argv = [f"--config={ROOT}/configs/tiny.py", *(f"--config.{o}" for o in overrides)]
  with pytest.raises(SystemExit) as exit_:
    flags.load(argparse.ArgumentParser("prog"), argv)
  message = capsys.readouterr().err
  assert exit_.value.code == 2 and message.count("\n") == 1
  assert all(f in message for f in fragments), message


def unresolved(**fields) -> TrainConfig:
  config = TrainConfig(**fields)
  config.data.sources[0].kind = "synthetic"
  return config


@pytest.mark.parametrize("n_devices, mesh, words", [
  (3, {"tensor": 3}, "model.padded_vocab_size=8192 is not a multiple of mesh.tensor=3"),
  (3, {"tensor": -1, "fsdp": 1}, "model.padded_vocab_size=8192 is not a multiple of mesh.tensor=3"),
  (5, {"fsdp": 5}, "model.d_model=48 is not a multiple of mesh.fsdp=5"),
  (4, {"data": 4, "fsdp": 1, "tensor": 2}, "needs 8 devices or a multiple; this run has 4"),
])
def test_contradictions_with_the_number_of_devices(n_devices, mesh, words):
  config = unresolved(batch_size=60, mesh=MeshConfig(**mesh))
  config.model.n_heads, config.model.d_model, config.model.d_ff = 6, 48, 96
  with pytest.raises(ValueError) as error:
    config.validate(n_devices=n_devices)
  assert words in str(error.value)


def test_validate_leaves_no_derived_field_open_and_is_idempotent():
  once = unresolved().validate()
  for name in ("vocab_size", "n_kv_heads", "head_dim", "d_ff", "layer_pattern", "param_dtype"):
    assert getattr(once.model, name) is not None, name
  before = flags.config_hash(once)
  assert flags.config_hash(once.validate()) == before


SIZE = st.sampled_from([-1, 1, 1, 1, 1, 1, 2, 3])
MESH = {"data": SIZE, "fsdp": SIZE, "tensor": SIZE, "stage": st.sampled_from([1] * 9 + [2])}
MODEL = {
  "n_heads": st.sampled_from([0, 1, 2, 3, 4, 6, 6, 6, 8, 12]),
  "n_kv_heads": st.sampled_from([None, None, None, 0, 1, 2, 2, 3, 4, 6]),
  "head_dim": st.sampled_from([None, 0, 5, 8, 8, 8, 8]),
  "d_model": st.sampled_from([6, 48, 48, 64, 64]),
  "n_layers": st.sampled_from([0, 1, 2, 2, 2, 2]),
  "d_ff": st.sampled_from([None, 96, 96, 100]),
}


@settings(max_examples=500, deadline=None)
@given(mesh=st.fixed_dictionaries(MESH), model=st.fixed_dictionaries(MODEL),
       accum=st.sampled_from([0, 1, 1, 1, 2, 3]), batch=st.sampled_from([0, 6, 7, 8, 12, 72, 72, 72]),
       rest=st.sampled_from([None, 1, 2, 2, 2, 5]))
def test_validate_refuses_or_the_arithmetic_holds(mesh, model, accum, batch, rest):
  """`rest` is what an axis of size -1 gets."""
  n_devices = rest and math.prod(s for s in mesh.values() if s > 0) * (rest if -1 in mesh.values() else 1)
  config = unresolved(batch_size=batch, accum_steps=accum, mesh=MeshConfig(**mesh))
  for name, value in model.items():
    setattr(config.model, name, value)
  try:
    config.validate(n_devices=n_devices)
  except ValueError as e:
    event("refused")
    assert "=" in str(e) or "mesh" in str(e), e
    return
  event("validated")
  model, sizes = config.model, dataclasses.asdict(config.mesh)
  assert model.n_heads % model.n_kv_heads == 0 and model.head_dim % 2 == 0 and model.n_layers > 0
  assert batch % accum == 0
  if n_devices is not None:
    fixed = math.prod(s for s in sizes.values() if s > 0)
    sizes = {axis: n_devices // fixed if s == -1 else s for axis, s in sizes.items()}
    assert math.prod(sizes[axis] for axis in MESH_AXES) == n_devices
    assert batch // accum % (sizes["data"] * sizes["fsdp"]) == 0
    split = (model.n_heads, model.n_kv_heads, model.d_ff, model.padded_vocab_size)
    assert not any(n % sizes["tensor"] for n in split)
    assert model.d_model % sizes["fsdp"] == 0


def main():
  FIELDS.write_text("\n".join(field_names()) + "\n")
  GOLDEN.mkdir(exist_ok=True)
  for path in GOLDEN.glob("*.txt"):
    path.unlink()
  for config in CONFIGS:
    (GOLDEN / f"{config}.txt").write_text(golden(config))


if __name__ == "__main__":
  main()

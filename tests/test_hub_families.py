"""Every family against transformers: the same logits, in and out again. transformers and torch are test-only.

python -m tests.test_hub_families [FILE] writes the table of families.
"""
import dataclasses
import functools
import json
import math
import pathlib
import sys
import tempfile
import warnings

import jax
import numpy as np
import pytest
from flax import nnx

from model.hub.convert import export_model, open_source, read_model
from model.hub.families import find_family, find_lost
from model.hub.orbax import read_array, read_tree, restore_params
from model.transformer import abstract_params
from tests.hub_cases import CASES, import_folder, settings, transformers_model, write_folder
from tests.tiny import decode_logits, mesh_of

T = 64
FIRST = dict(reversed({CASES[case][0]: case for case in reversed(CASES)}.items()))  # Family -> its first.
ATOL = 1e-4


def tokens_of(case):
  return np.random.default_rng(5).integers(0, settings(case)["vocab_size"], (2, T)).astype(np.int32)


@functools.cache
def folder_of(case):
  """(folder that transformers wrote, run's folder imported from it)."""
  root = pathlib.Path(tempfile.mkdtemp(prefix="hub-"))
  transformers_model(case).save_pretrained(root / "theirs")
  return root / "theirs", import_folder(root / "theirs", root / "ours", length=_length(case))


def _length(case):
  """Dynamic and longrope scaling choose by the length of use: here of the rows."""
  kind = settings(case).get("rope_parameters", {}).get("rope_type")
  return T if kind in ("dynamic", "longrope") else None


def theirs(model, tokens_BT):
  import torch
  with torch.no_grad():
    return model(torch.tensor(tokens_BT, dtype=torch.long)).logits.float().numpy()


@functools.cache
def program(run, mesh_name="one"):
  """(cfg, mesh, graphdef, params, jitted forward)."""
  cfg, mesh = read_model(json.loads((run / "config.json").read_text())["config"]), mesh_of(mesh_name)
  with jax.set_mesh(mesh):
    graphdef, abstract = abstract_params(cfg, mesh)
    params, _, _ = restore_params(run, abstract)

  @jax.jit
  def forward(params, tokens_BT, pos_BT, segment_BT):
    model = nnx.merge(graphdef, params)
    return model.logits(model(tokens_BT, pos_BT, segment_BT)[0])

  return cfg, mesh, graphdef, params, forward


def ours(run, tokens_BT, mesh_name="one", pos_BT=None, segment_BT=None):
  cfg, mesh, _, params, forward = program(run, mesh_name)
  n = 1 if mesh_name == "one" else 4  # Rows are split over the mesh: the same ones again.
  pos_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape) if pos_BT is None else pos_BT
  segment_BT = np.ones_like(tokens_BT) if segment_BT is None else segment_BT
  with jax.set_mesh(mesh):
    put = lambda a: jax.device_put(np.tile(a, (n, 1)).astype(np.int32),
                                   jax.NamedSharding(mesh, cfg.rules("batch", None)))
    logits = np.asarray(forward(params, put(tokens_BT), put(pos_BT), put(segment_BT)))
  return logits[:len(tokens_BT), :, :cfg.vocab_size]


def largest(a, b):
  return float(np.abs(a - b).max())


def need_transformers():
  pytest.importorskip("torch", reason="transformers is the oracle, and needs torch")
  pytest.importorskip("transformers", reason="transformers is the oracle")


def parameters(case):
  """One family by default; all of them with -m slow."""
  return case if case == "Llama 3, SmolLM2" else pytest.param(case, marks=pytest.mark.slow)


every_case = pytest.mark.parametrize("case", list(map(parameters, CASES)))


@every_case
def test_logits_are_those_of_transformers(case):
  need_transformers()
  source, run = folder_of(case)
  tokens_BT = tokens_of(case)
  expected = theirs(transformers_model(case), tokens_BT)
  assert np.ptp(expected) > 1  # Logits that a tolerance means something for.
  assert largest(ours(run, tokens_BT), expected) < ATOL
  plan = open_source(source).plan
  n = sum(math.prod(plan.shape(name)) for name in plan.tensors if not name.endswith("correction_bias"))
  assert n == transformers_model(case).num_parameters()


@every_case
def test_packed_rows_are_their_documents(case):
  """Two documents in each row: each as alone, in both programs."""
  need_transformers()
  tokens_BT, cut = tokens_of(case), 27
  segment_BT = np.broadcast_to(np.where(np.arange(T) < cut, 1, 2), tokens_BT.shape)
  pos_BT = np.broadcast_to(np.where(np.arange(T) < cut, np.arange(T), np.arange(T) - cut), tokens_BT.shape)
  packed = ours(folder_of(case)[1], tokens_BT, pos_BT=pos_BT, segment_BT=segment_BT)
  if _length(case) is None:
    alone = [theirs(transformers_model(case), part) for part in (tokens_BT[:, :cut], tokens_BT[:, cut:])]
  else:  # Where transformers chooses other frequencies for a short row, ours go by rope_scaling.length.
    alone = [ours(folder_of(case)[1], part) for part in (tokens_BT[:, :cut], tokens_BT[:, cut:])]
  assert largest(packed, np.concatenate(alone, axis=1)) < ATOL


@every_case
def test_decode_is_the_forward(case):
  """Through pages: half of one row as a prompt, then token by token, beside the other."""
  need_transformers()
  run, tokens_BT = folder_of(case)[1], tokens_of(case)
  cfg, mesh, _, params, _ = program(run)
  assert largest(decode_logits(cfg, mesh, params, tokens_BT, cut=40), ours(run, tokens_BT)) < ATOL


@every_case
def test_transformers_loads_what_is_exported(case, tmp_path):
  """Without a warning, to the same bits; and imported again it is the same bits."""
  need_transformers()
  import transformers
  source, run = folder_of(case)
  out = export_model(run, tmp_path / "out", shard_bytes=50_000)
  assert len(list(out.glob("*.safetensors"))) > 1
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, attn_implementation="eager", output_loading_info=True)
  assert not any(info.values()), info
  tokens_BT = tokens_of(case)
  assert largest(theirs(model.eval(), tokens_BT), theirs(transformers_model(case), tokens_BT)) == 0
  before, after = open_source(source), open_source(out)
  assert before.tensors.keys() == after.tensors.keys()
  for name, tensor in before.tensors.items():
    assert np.array_equal(tensor.read(), after.tensors[name].read()), name
  again = import_folder(out, tmp_path / "again", length=_length(case))
  assert_same_leaves(run, again)


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST.values())
def test_logits_on_a_mesh(case):
  need_transformers()
  run, tokens_BT = folder_of(case)[1], tokens_of(case)
  assert largest(ours(run, tokens_BT, "fsdp_tensor"), theirs(transformers_model(case), tokens_BT)) < ATOL


def assert_same_leaves(one, other):
  a, b = (run / "checkpoints" / "0" for run in (one, other))
  assert read_tree(a).keys() == read_tree(b).keys()
  for name in read_tree(a):
    assert np.array_equal(read_array(a, name), read_array(b, name)), name
  configs = [read_model(json.loads((run / "config.json").read_text())["config"]) for run in (one, other)]
  assert dataclasses.asdict(configs[0]) == dataclasses.asdict(configs[1])


# Without torch.

@pytest.mark.parametrize("case", CASES)
def test_settings_go_out_as_they_came_in(case):
  family = find_family(settings(case))
  model = family.to_model(settings(case))
  assert family.to_model(json.loads(json.dumps(family.to_theirs(model)))) == model
  model.rope_scaling = dataclasses.replace(model.rope_scaling, length=77)  # Of use: not theirs to say.
  assert not find_lost(family, model)


@pytest.mark.parametrize("case", FIRST.values())
def test_round_trip(case, tmp_path):
  """Their folder -> ours -> theirs -> ours: every tensor and leaf bit for bit."""
  tensors = write_folder(tmp_path / "theirs", settings(case))
  run = import_folder(tmp_path / "theirs", tmp_path / "ours")
  out = open_source(export_model(run, tmp_path / "out"))
  assert out.tensors.keys() == tensors.keys()
  for name, tensor in tensors.items():
    assert np.array_equal(out.tensors[name].read(), tensor), name
  assert_same_leaves(run, import_folder(tmp_path / "out", tmp_path / "again"))


def table() -> str:
  lines = ["| family | max abs. difference of logits | on fsdp 4 x tensor 2 |", "|---|---|---|"]
  for case in FIRST.values():
    run, tokens_BT = folder_of(case)[1], tokens_of(case)
    expected = theirs(transformers_model(case), tokens_BT)
    deltas = [largest(ours(run, tokens_BT, mesh), expected) for mesh in ("one", "fsdp_tensor")]
    lines.append("| " + " | ".join([case, *(f"{d:.1e}" for d in deltas)]) + " |")
    print(lines[-1], file=sys.stderr, flush=True)
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  import tests.conftest  # noqa: F401  The fake devices.
  text = table()
  if len(sys.argv) > 1:
    pathlib.Path(sys.argv[1]).write_text(text)
  print(text)

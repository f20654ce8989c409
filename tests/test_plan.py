"""The planner: what it finds is valid, fits, and is the fastest of what it could have found."""
import contextlib
import itertools
import json
import types

import pytest

from configs import dense_8b
from data.flags import override
from tests.anchors import ANCHORS
from tests.test_roofline import MAXTEXT_OVERLAPS
from train import plan
from train.chips import CHIP
from train.config import MeshConfig
from train.memory import estimate_memory
from train.plan import REMATS, describe, search
from train.roofline import WEIGHT_AXES, estimate_step

V5P, N = CHIP["v5p"], 4


def config():
  cfg = dense_8b.get_config()
  cfg.batch_size, cfg.mesh = 32, MeshConfig()
  return cfg


@pytest.fixture(scope="module")
def found():
  return search(config().validate(), V5P, N)


def test_no_setting_is_faster_that_fits(found):
  """Every mesh of data, fsdp and tensor, remat and number of micro-batches, tried one by one."""
  fastest = []
  for data, tensor in itertools.product((1, 2, 4), repeat=2):
    if N % (data * tensor):
      continue
    for remat, accum in itertools.product(REMATS, (1, 2, 4, 8, 16)):
      cfg = config()
      cfg.mesh, cfg.model.remat, cfg.accum_steps = MeshConfig(data=data, tensor=tensor), remat, accum
      with contextlib.suppress(ValueError):  # The batch is not divided.
        if cfg.validate(N) and estimate_memory(cfg, N).peak <= V5P.hbm_bytes:
          fastest.append(estimate_step(cfg, V5P, N).step_s)
  best = [p for p in found.best if p.sizes["stage"] == p.sizes["seq"] == 1]
  assert best[0].step.step_s == pytest.approx(min(fastest), rel=2 * plan.SAME)


def test_what_is_to_be_pasted_is_what_was_planned(found):
  for p in found.best[:5]:
    cfg = override(config(), list(p.overrides)).validate(N)
    assert estimate_step(cfg, V5P, N).step_s == pytest.approx(p.step.step_s)
    assert estimate_memory(cfg, N).peak == pytest.approx(p.peak) and p.peak <= V5P.hbm_bytes
  steps = [p.step.step_s for p in found.best]
  assert all(b >= a * (1 - plan.SAME) for a, b in itertools.pairwise(steps))


def test_losers_are_told_why(found):
  text = describe("x", found, "v5p", V5P, N, 1, 3)
  assert "1x2x2" in text and "modelled, nothing was compiled or run" in text
  assert "with tensor:" in text and "slower, most by " in text
  assert "--config.mesh.fsdp=" in text


def test_what_goes_over_the_slow_network():
  """Copies over the slices send gradients once a step; FSDP over them gathers every layer's weights too."""
  found = search(config().validate(), V5P, 8, slices=2)
  slow = {p.cfg.mesh.slice_axis: p.step.wire_s[p.cfg.mesh.slice_axis] for p in reversed(found.best)}
  assert 0 < slow["data"] < slow["fsdp"] and all(p.cfg.mesh.slices == 2 for p in found.best)
  assert "over the slow network: " in describe("x", found, "v5p", V5P, 8, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ANCHORS)
def test_published_meshes_are_among_the_first_three(name):
  """Of meshes with "tensor" where its collectives run beside the work, as in MaxText, whose they are; of the
  others as our own step does it, which waits for them. Were they free everywhere, the planner would
  rather have "tensor" on v5e, which nobody published."""
  anchor = ANCHORS[name]
  overlapped = MAXTEXT_OVERLAPS if anchor.mesh.get("tensor", 1) > 1 else WEIGHT_AXES
  found = search(anchor.config(), CHIP[anchor.chip], anchor.n, overlapped=overlapped)
  assert dict.fromkeys(found.best[0].sizes, 1) | anchor.mesh in [p.sizes for p in found.best[:3]]


def test_a_mesh_of_the_config_does_not_matter(capsys):
  """dense_8b is for 256 chips, which 64 rows do not divide."""
  assert plan.main(["--config=configs/dense_8b.py", "--config.batch_size=64", "--chip=v5e", "--n=4"]) == 1
  assert "Nothing fits 15.75 GiB" in capsys.readouterr().out


@pytest.mark.parametrize("args, said", [
  (["--chip=v5p"], "--chip and --n say for which devices"), (["--chip=v8", "--n=4"], "known: v4, v5e"),
  (["--chip=v5p", "--n=48"], "nearest valid: 32, 64"),
  (["--chip=v5p", "--n=8", "--slices=3"], "nearest valid --n: 6, 9"),
  (["--chip=v5p", "--n=8", "--precision=fp16"], "--precision=fp16: known: fp32"),
  (["--chip=H100", "--n=8", "--compile=1"], "nearest valid: 0")])
def test_mistakes_exit_with_2(args, said, capsys):
  assert plan.main(["--config=configs/dense_8b.py", *args]) == 2
  assert said in capsys.readouterr().err


def test_the_compiler_is_asked_for_the_same_run(found, monkeypatch):
  asked = []

  def run(command, **_):
    asked.append(command)
    report = {"fits": True, "step_s": 2.5, "memory": {"peak_memory": 2**30}}
    said = {"reports": [report]} if len(asked) == 1 else {}
    return types.SimpleNamespace(stdout=json.dumps(said), stderr="no")

  monkeypatch.setattr(plan.subprocess, "run", run)
  args = types.SimpleNamespace(config="x.py", overrides=["seed=1"], chip="v5p", n=N, slices=1, compile=2)
  lines = plan.compile_best(args, found, V5P)
  assert "1.0 GiB (modelled" in lines[1] and "step 2.500 s" in lines[1] and lines[2].endswith(": no")
  assert "--topology=v5p:1x2x2" in asked[0]
  assert asked[0][-len(found.best[0].overrides):] == [f"--config.{o}" for o in found.best[0].overrides]

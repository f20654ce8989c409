"""The planner: what it finds is valid, fits, and is the fastest of what it could have found."""
import itertools

import pytest

from configs import dense_8b, mixtral_8x7b
from data.flags import override
from tests.anchors import ANCHORS
from tests.test_roofline import MAXTEXT_OVERLAPS
from train import plan
from train.chips import CHIP
from train.config import MeshConfig
from train.memory import estimate_memory
from train.plan import ACCUM_STEPS, REMATS, describe, search
from train.roofline import estimate_step

V5P, N = CHIP["v5p"], 4


@pytest.fixture(scope="module")
def found():
  return search(dense_8b.get_config().validate(), V5P, N)


def test_no_setting_is_faster_that_fits(found):
  """Every mesh of data, fsdp and tensor, remat and number of micro-batches, tried one by one."""
  fastest = []
  for data, tensor in itertools.product((1, 2, 4), repeat=2):
    if N % (data * tensor):
      continue
    for remat, accum in itertools.product(REMATS, ACCUM_STEPS):
      cfg = dense_8b.get_config()
      cfg.mesh, cfg.model.remat, cfg.accum_steps = MeshConfig(data=data, tensor=tensor), remat, accum
      if cfg.validate(N) and estimate_memory(cfg, N).peak <= V5P.hbm_bytes:
        fastest.append(estimate_step(cfg, V5P, N).step_s)
  best = [p for p in found.best if p.sizes["stage"] == p.sizes["seq"] == 1]
  assert best[0].step.step_s == pytest.approx(min(fastest), rel=2 * plan.SAME)


def test_what_is_to_be_pasted_is_what_was_planned(found):
  for p in found.best[:5]:
    cfg = override(dense_8b.get_config(), list(p.overrides)).validate(N)
    assert estimate_step(cfg, V5P, N).step_s == pytest.approx(p.step.step_s)
    assert estimate_memory(cfg, N).peak == pytest.approx(p.peak) and p.peak <= V5P.hbm_bytes
  steps = [p.step.step_s for p in found.best]
  assert all(b >= a * (1 - plan.SAME) for a, b in itertools.pairwise(steps))


def test_losers_are_told_why(found):
  text = describe("x", found, "v5p", V5P, N, 1, 3)
  assert "1x2x2" in text and "modelled, nothing was compiled or run" in text
  assert "with tensor:" in text and "slower, most by " in text
  assert "--config.mesh.fsdp=" in text
  nothing = search(mixtral_8x7b.get_config().validate(), CHIP["v5e"], 4)
  assert not nothing.best and "Nothing fits 15.75 GiB. The smallest" in describe(
      "x", nothing, "v5e", CHIP["v5e"], 4, 1, 3)


def test_what_goes_over_the_slow_network():
  """Copies over the slices send once a step; FSDP over them would gather every layer's weights."""
  cfg = dense_8b.get_config()
  cfg.batch_size = 64
  found = search(cfg.validate(), CHIP["v5e"], 64, slices=2)
  assert found.best[0].cfg.mesh.slice_axis == "data" and found.best[0].cfg.mesh.slices == 2
  assert "over the slow network: data" in describe("x", found, "v5e", CHIP["v5e"], 64, 2, 3)


def test_published_meshes_are_among_the_first_three():
  """TODO"""
  for name, anchor in ANCHORS.items():
    found = search(anchor.config(), CHIP[anchor.chip], anchor.n, overlapped=MAXTEXT_OVERLAPS)
    want = dict.fromkeys(found.best[0].sizes, 1) | anchor.mesh
    assert want in [p.sizes for p in found.best[:3]], name


@pytest.mark.parametrize("args, said", [
  (["--chip=v5p"], "--chip and --n say for which devices"), (["--chip=v8", "--n=4"], "known: v4, v5e"),
  (["--chip=v5p", "--n=48"], "nearest valid: 32, 64"),
  (["--chip=v5p", "--n=8", "--slices=3"], "nearest valid --n: 6, 9"),
  (["--chip=v5p", "--n=8", "--precision=fp16"], "--precision=fp16: known: fp32"),
  (["--chip=H100", "--n=8", "--compile=1"], "nearest valid: 0")])
def test_mistakes_exit_with_2(args, said, capsys):
  assert plan.main(["--config=configs/dense_8b.py", *args]) == 2
  assert said in capsys.readouterr().err

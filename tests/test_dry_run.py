"""The dry run: what it says of planted mistakes, of every config and variant; that it touches no device."""
import math
import os
import re
import subprocess
import sys

import pytest

from data.flags import override, read_config
from model.sharding import MESH_AXES
from model.transformer import check_names
from tests.test_memory import LLAMA, base
from tests.tiny import ROOT, variants
from train.chips import CHIP
from train.dry_run import describe, find_fixes, fits, look_ahead
from train.memory import estimate_memory

CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")
V5E = CHIP["v5e"]


def llama(n, *changes):
  return override(base(), [*LLAMA, "data.tokenizer.vocab_size=128256", "seq_len=8192", f"batch_size={n}",
                           *changes]).validate(n)


@pytest.mark.parametrize("changes, first", [
  (("batch_size=512",), r"accum_steps=\d+"),  # 8 rows a device.
  (("model.rules.embed=()", "batch_size=64"), r"model.rules.embed=\('fsdp',\)"),
  (("model.remat=none",), r"model.remat=\w+"),
])
def test_a_planted_mistake_is_found_with_the_right_first_fix(changes, first):
  """An 8B model on 64 chips that fits: with too large a batch, replicated parameters, or without remat it
  does not, and the first of the fixes takes just that back."""
  assert fits(estimate_memory(llama(64), 64), V5E)
  cfg = llama(64, *changes)
  assert not fits(estimate_memory(cfg, 64), V5E)
  fixes = find_fixes(cfg, V5E, 64)
  assert len(fixes) == 3
  assert len(fixes[0].overrides) == 1 and re.fullmatch(first, fixes[0].overrides[0]), fixes[0].overrides
  speeds = [fix.outlook.step.tokens_per_s for fix in fixes if not fix.overrides[-1].startswith("batch_size")]
  assert len(speeds) >= 2 and speeds == sorted(speeds, reverse=True)  # Another batch is the last resort.
  for fix in fixes:  # What is printed can be pasted.
    fixed = override(llama(64, *changes), list(fix.overrides)).validate(64)
    assert look_ahead(fixed, V5E, 64) == fix.outlook and fits(fix.outlook.memory, V5E)
  text = describe(cfg, "v5e", 64)
  assert "fits: no" in text and f"--config.{fixes[0].overrides[0].partition('=')[0]}=" in text


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config(name):
  cfg = read_config(f"configs/{name}.py")
  check_names(cfg.validate().model)
  n = max(1, -math.prod(getattr(cfg.mesh, a) for a in MESH_AXES))
  text = describe(cfg, "v5p", None if cfg.mesh.fsdp > 0 else n, 2.0)
  assert re.search(r"fits: (yes|no)", text) and "MFU" in text and "chip-hours" in text
  assert "nan" not in text and "-" not in re.findall(r"total +(\S+)", text)[0]


MESHES = {"all": dict(data=2, fsdp=2, tensor=2), "one": {}, "stages": dict(stage=2, expert=2, seq=2)}
CASES = [(name, "all") for name in variants()]
CASES += [(name, mesh) for name in ("ffn=moe", "repeats", "dispatch=capacity") for mesh in ("one", "stages")]


@pytest.mark.parametrize("name, mesh", CASES)
def test_every_variant_on_meshes(name, mesh):
  """No combination that is valid is beyond it."""
  changes = {"context": "ulysses"} | variants()[name]
  if "kv_lora_rank" in changes:
    changes["n_kv_heads"] = None
  if "max_length" in changes:
    changes["max_length"] = 2048
  cfg = base()
  for field, value in changes.items():
    setattr(cfg.model, field, value)
  override(cfg, [f"mesh.{axis}={MESHES[mesh].get(axis, 1)}" for axis in MESH_AXES])
  n = math.prod(MESHES[mesh].values())
  cfg.batch_size = 32
  look = look_ahead(cfg.validate(n), CHIP["v5p"], n)
  sizes = [size for moment in look.memory.moments.values() for size in moment.values()]
  assert all(size >= 0 and math.isfinite(size) for size in (*sizes, *look.memory.arguments.values()))
  assert 0 < look.step.step_s < math.inf


def run(*flags, **env):
  command = [sys.executable, "-m", "train.main", "--config=configs/dense_8b.py", "--dry_run", *flags]
  return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120)


def test_the_command_touches_no_device_and_is_quick():
  """JAX would fail at the first use of a platform that does not exist."""
  start = os.times().children_user
  done = run("--chip=v5e", "--n=256", "--price_per_chip_hour=1.2", JAX_PLATFORMS="nowhere")
  assert done.returncode == 0, done.stderr
  assert "fits: yes" in done.stdout and "at 1.2 a chip-hour" in done.stdout
  assert os.times().children_user - start < 20


@pytest.mark.parametrize("flags, words", [
  (("--chip=v5", "--n=256"), "did you mean v5e or v5p?"),
  (("--chip=v5e", "--n=96"), "mesh"),
  (("--n=256",), "--dry_run needs --chip"),
])
def test_a_mistake_exits_2(flags, words, capsys):
  from train.main import main
  assert main(["--config=configs/dense_8b.py", "--dry_run", *flags]) == 2
  assert words in capsys.readouterr().err

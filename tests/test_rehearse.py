"""What train.rehearse refuses, keeps and says. What needs the TPU compiler is slow, or skipped."""
import collections
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest

from configs.tiny import get_config
from data.flags import override
from model.sharding import abstract_mesh
from model.transformer import abstract_params
from tests.tiny import ROOT
from train import rehearse
from train.rehearsals import render, render_side_by_side, row

COMPILER = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                              reason='needs libtpu, the TPU compiler: pip install -e ".[rehearse]"')
GIB = 2**30
REPORT = dict(
  topology="v5p:2x4x4", chips=32, slices=1, mesh={"fsdp": 32}, fits=True,
  versions={"jax": "1", "libtpu": "2"}, hbm_bytes=95 * GIB,
  what="train step", compile_s=100.0, compiler_bytes=2 * GIB, cached=False, flags={},
  memory=dict(argument_size=3 * GIB, output_size=3 * GIB, alias_size=3 * GIB, temp_size=7 * GIB,
              generated_code_size=0, peak_memory=10 * GIB),
  flops=5e14, core_s=1.5, exposed_s=0.2, kernels_s=0.3, kernel_runs=128, step_s=2.0, clock_hz=1.75e9,
  tokens_per_s_per_chip=4096.0, mfu=0.5, useful_flops=4.5e14,
  transfers=[dict(kind="all-gather", axes=["fsdp"], asynchronous=False, source="model/layers.py:1",
                  what="bf16[8]", times=32, wire_bytes=3e9, wire_s=0.2, exposed_s=0.2, overlap_s=0.0)],
  buffers=[dict(bytes=2 * GIB, shape="f32[9]", source="train/losses.py:5", op_name="x", op="fusion.1")] * 2,
  findings=[dict(kind="padding", text="f32[1,1] takes 9 MiB", source="model/moe.py:7")])


def test_a_report_says_what_holds_memory_and_what_waits():
  text = render(REPORT)
  for words in ("fits: yes, 10.00 of 95.00 GiB", "4.00 GiB  2 x f32[9]", "train/losses.py:5",
                "step       2.000 s", "MFU 50.0%", "waited for", "libtpu 2",
                "padding: f32[1,1] takes 9 MiB (model/moe.py:7)"):
    assert words in text
  assert "| yes | 3.00 | 10.00 | 1.50 | 0.20 | 0.30 | 2.00 | 3.0 | 4,096 | 100 |" in row("c.py", REPORT)


def test_flag_sets_stand_side_by_side_and_the_fastest_is_shown():
  text = render_side_by_side([REPORT, REPORT | dict(flags={"xla_a": "true"}, step_s=1.0)])
  assert "none" in text and "LIBTPU_INIT_ARGS='--xla_a=true'" in text and "step       1.000 s" in text


@pytest.mark.parametrize("f, argument, words", [
    (rehearse.read_flags, "--a=b c", "'c' is not of the form --name=value"),
    (rehearse.chips_in, "v5p-32", "nearest valid: v5p:4x4x4"),
    (rehearse.declared_topology, str(ROOT / "configs/tiny.py"), "declares no TOPOLOGY")])
def test_mistakes_are_named(f, argument, words):
  with pytest.raises(ValueError, match=words):
    f(argument)


def test_flags_and_chips():
  assert rehearse.read_flags("--xla_a=1 --xla_b") == {"xla_a": "1", "xla_b": "true"}
  assert rehearse.chips_in("v5p:2x4x4") == 32


def test_without_the_compiler_the_extra_is_named(monkeypatch, capsys):
  for name in rehearse.ENVIRONMENT:
    monkeypatch.setenv(name, rehearse.ENVIRONMENT[name])
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert rehearse.main(["--config=configs/tiny.py"]) == 2
  assert ".[rehearse]" in capsys.readouterr().err


class Lowered:
  """Stands for jax's: counts compilations."""

  def __init__(self, text, error=None):
    self.text, self.error, self.compiled = text, error, 0

  def as_text(self):
    return self.text

  def compile(self, compiler_options):
    self.compiled += 1
    os.write(2, b"Failed to find host bounds for accelerator type\nsomething else\n")
    if self.error:
      raise RuntimeError(self.error)
    return self

  def memory_analysis(self):
    return type("Stats", (), {f"{n}_in_bytes": 1 for n in (
        "argument_size", "output_size", "alias_size", "temp_size", "generated_code_size", "peak_memory")})


def test_a_program_is_compiled_once(tmp_path):
  """By its text, the flags and the topology."""
  first, again, other = Lowered("a"), Lowered("a"), Lowered("b")
  compile_ = lambda lowered, flags=None: rehearse.compile_cached(lowered, flags or {}, "v5e:2x2", tmp_path)
  one, two = compile_(first), compile_(again)
  assert (first.compiled, again.compiled) == (1, 0) and (one.cached, two.cached) == (False, True)
  assert one.text == two.text == "a" and one.memory == two.memory
  assert one.stderr == "something else\n", "the harmless lines are left out"
  compile_(other), compile_(again, {"xla_a": "1"})
  assert (other.compiled, again.compiled) == (1, 1)


EXHAUSTED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 17.37G of 15.75G hbm. Exceeded hbm capacity by 1.62G.

Total hbm usage >= 17.62G:
    reserved        258.00M
    program          17.37G
    arguments            0B

  Largest program allocations in hbm:

  1. Size: 16.00G
     Operator: op_name="jit(train_step)/sin" source_file="a.py" source_line=9
     Shape: f32[131072,32768]{1,0:T(8,128)}
     Unpadded size: 16.00G
     XLA label: fusion = fusion(param.1)
     Allocation type: HLO temp
     ==========================
"""


BEFORE_LAYOUT = ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
                 "temporaries (48.49G) exceeds available HBM (15.75G).")


def test_what_does_not_fit_is_a_result(tmp_path):
  made = rehearse.compile_cached(Lowered("a", EXHAUSTED), {}, "v5e:2x2", tmp_path)
  assert made.text is None
  said = rehearse.read_exhausted(made.error)
  report = REPORT | said | dict(fits=False, hbm_bytes=15.75 * GIB)
  assert "fits: no, needs at least 17.37 of 15.75 GiB" in render(report)
  assert "16.00 GiB  1 x f32[131072,32768]" in render(report)
  assert "**no**: needs at least 17.37 of 15.75 GiB" in row("c.py", report)
  report = REPORT | rehearse.read_exhausted(BEFORE_LAYOUT) | dict(fits=False)
  assert "needs at least 48.49 of" in render(report)


def command(*args):
  return subprocess.run([sys.executable, "-m", "train.rehearse", *args], cwd=ROOT, capture_output=True,
                        text=True, timeout=1200)


@pytest.mark.slow
@COMPILER
def test_the_step_of_a_run_is_compiled_for_tpus(tmp_path):
  args = ("--config=configs/tiny.py", "--topology=v5e:2x4", "--config.model.precision=bf16",
          f"--config.data.cache_path={tmp_path}", "--json")
  done = command(*args)
  assert done.returncode == 0 and done.stderr == "", done.stderr
  [report] = json.loads(done.stdout)["reports"]
  assert report["fits"] and report["mesh"] == {"fsdp": 8} and report["flops"] > 0 < report["core_s"]
  assert {"all-gather"} <= {t["kind"] for t in report["transfers"]}
  assert all(t["axes"] == ["fsdp"] for t in report["transfers"])
  assert any("model/" in b["source"] for b in report["buffers"])
  assert json.loads(command(*args).stdout)["reports"][0]["cached"]
  done = command(*args, "--config.batch_size=4194304")
  assert done.returncode == 1 and not json.loads(done.stdout)["reports"][0]["fits"]


@pytest.mark.slow
@COMPILER
def test_the_engines_step_is_compiled_for_tpus(tmp_path):
  sizes = dict(n_layers=2, d_model=1024, head_dim=128, n_heads=16, n_kv_heads=16, precision="bf16")
  done = command("--config=configs/tiny.py", "--topology=v5e:2x2", "--decode", "--context=32768", "--json",
                 "--config.mesh.fsdp=2", "--config.mesh.tensor=2", f"--config.data.cache_path={tmp_path}",
                 *(f"--config.model.{name}={size}" for name, size in sizes.items()))
  assert done.returncode == 0, done.stderr
  [report] = json.loads(done.stdout)["reports"]
  assert report["fits"] and report["kernel_runs"] == 2 and report["batch"] % 2 == 0 < report["batch"]
  assert {"all-reduce"} <= {t["kind"] for t in report["transfers"]}
  assert report["memory"]["alias_size"] > report["cache_bytes"]  # Pages stay where they are.


@pytest.mark.slow
@COMPILER
@pytest.mark.parametrize("args, words", [
    (["--topology=v5e:3x7"], "v5e:3x7"), (["--topology=v9:2x2"], "known: tpu7x, v4, v5e, v5p, v6e"),
    (["--topology=v5e:2x4", "--config.mesh.tensor=3"], "mesh"),
    (["--topology=v5e:2x4", "--xla_flags=--xla_nonsense=1"], "xla_nonsense")])
def test_mistakes_exit_2_in_one_line(args, words):
  done = command("--config=configs/tiny.py", *args)
  assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.slow
@COMPILER
def test_what_goes_between_slices_is_seen(tmp_path):
  sizes = dict(d_model=512, n_heads=4, d_ff=1024)  # Their slices fill tiles.
  done = command("--config=configs/tiny.py", "--topology=v5e:2x2", "--slices=2", "--config.mesh.data=2",
                 "--config.mesh.fsdp=4", f"--config.data.cache_path={tmp_path}", "--json",
                 *(f"--config.model.{name}={size}" for name, size in sizes.items()))
  [report] = json.loads(done.stdout)["reports"]
  sent = collections.Counter()
  for t in report["transfers"]:
    sent[t["kind"], *t["axes"]] += t["wire_bytes"]
  cfg = override(get_config(), [f"model.{name}={size}" for name, size in sizes.items()]).validate()
  leaves = jax.tree.leaves(abstract_params(cfg.model, abstract_mesh(fsdp=4))[1])
  held = sum(math.prod(a.sharding.shard_shape(a.shape)) for a in leaves)
  assert sent["all-reduce", "data"] == pytest.approx(4 * held, rel=0.02)  # A device's part of the gradients.
  assert report["chips"] == 8 and report["slices"] == 2


@pytest.mark.slow
@COMPILER
def test_what_is_allocated_is_the_peak_and_not_temp_size(tmp_path):
  """Against the compiler's own list of allocations, for a gradient that overwrites its parameters."""
  code = f"""
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices[:1]
place = jax.NamedSharding(jax.sharding.Mesh(np.array(devices), "x"), jax.P())
array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
step = lambda w, x: w - jax.grad(lambda w: jax.lax.scan(layer, x, w)[0].sum())(w)
low = jax.jit(step, donate_argnums=0).trace(array(4, 4096, 4096), array(4096, 4096)).lower(
    lowering_platforms=("tpu",))
m = low.compile(compiler_options={{"xla_dump_to": {str(tmp_path)!r}}}).memory_analysis()
print(m.peak_memory_in_bytes - m.argument_size_in_bytes, m.temp_size_in_bytes)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                        env=os.environ | rehearse.ENVIRONMENT)
  ours, temp_size = map(int, done.stdout.split())
  [dump] = tmp_path.glob("*buffer-assignment.txt")
  sizes = re.findall(r"^allocation \d+: size (\d+), preallocated-temp", dump.read_text(), re.M)
  allocated = sum(map(int, sizes))
  assert ours == pytest.approx(allocated, rel=0.01) and temp_size > 1.1 * allocated

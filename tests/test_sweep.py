"""Sweeps: what a cell is, that each runs once whatever is killed, what is refused, what it will cost."""
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
import types

import pytest

from data import flags
from experiments import cells, estimate, local, sweep
from experiments.cells import Outcome, read_experiment, read_outcome
from train.chips import get_chip
from train.main import parse
from train.roofline import estimate_step

ROOT = pathlib.Path(__file__).parents[1]
FAKE = """from experiments import local, sweep
local.PROGRAM = "tests.fake_run"
raise SystemExit(sweep.main())"""


@pytest.fixture
def experiment(monkeypatch):
  """make(text) -> the name of a module of that text."""
  def make(text, name="made_up"):
    module = types.ModuleType(name)
    exec(textwrap.dedent(text), module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    return name
  return make


def write(tmp_path, text):
  """(the name of a module of that text, the environment in which it is found)."""
  name = f"grid_{tmp_path.name}"  # Of this test alone: an imported module stays.
  (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
  return name, {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}


SIX = '''
  """Six fake runs."""
  BASE = "configs/tiny.py"
  SEEDS = (0, 1)
  def runs():
    for lr in (0.1, 0.2, %s):
      yield {"optim.lr": lr, "log.profile_steps": %d}  # The stand-in's hundredths of a second a step.
'''


@pytest.mark.parametrize("overrides", [
  {"optim.lr": 3e-4}, {"model.window": 8, "model.layer_pattern": ("local", "global")},
  {"model.qk_norm": None}, {"model.qk_norm": "rmsnorm"}, {"optim.decay_scale": (("norm", 0.0), (".*", 1.0))},
  {"data.sources[0].path": "1e-3", "data.sources[0].kind": "text"}, {"log.wandb_project": "None"},
  {"log.wandb_project": "a 'b' \"c\""}, {"log.tensorboard": True}, {"optim.spike_sigma": float("inf")},
])
def test_the_command_line_of_a_cell_says_what_the_cell_says(overrides):
  config = flags.override(flags.read_config("configs/tiny.py"), cells.as_flags(overrides))
  found = flags.leaves(config)
  assert {key: found[key] for key in overrides} == overrides


def test_a_cell_is_known_by_its_resolved_settings(experiment):
  text = '''
    """Q?"""
    BASE = "configs/tiny.py"
    def runs():
      yield {}
      yield {"optim.lr": %s}
      yield "wide/r!", {"model.d_model": 128}
      yield {"config": "configs/moe_tiny.py", "steps": 30}
  '''
  found, _ = read_experiment(experiment(text % 1e-3))
  assert [c.name for c in found.cells] == ["base", "lr=0.001", "wide/r!", "steps=30"]
  assert found.baseline == found.cells[0].id and len({c.id for c in found.cells}) == 4
  assert all("/" not in c.id and c.id.rpartition("-")[0] for c in found.cells)
  again, _ = read_experiment(experiment(text % 0.001))
  assert [c.id for c in again.cells] == [c.id for c in found.cells]
  other, _ = read_experiment(experiment(text % 2e-3))
  assert [a.id == b.id for a, b in zip(other.cells, found.cells)] == [True, False, True, True]
  run = cells.find_runs(found, "runs/x")[3]
  parsed, args = parse(run.command)
  assert parsed == flags.resolve("configs/moe_tiny.py", ["steps=30", "seed=0"])[0]
  assert args.workdir == f"runs/x/{found.cells[3].id}/seed=0"


@pytest.mark.parametrize("text, said", [
  ('runs = lambda: [{"optim.lrr": 1e-3}]', r"cell 'lrr=0.001': unknown key.* did you mean optim.lr\?"),
  ('runs = lambda: [{}, {"model.n_kv_heads": 3}]', "cell 'n_kv_heads=3': model.n_heads=4 is not a multiple"),
  ('runs = lambda: [{}, {"optim.name": "adamv"}]', "cell 'name=adamv': .*did you mean 'adamw'"),
  ('runs = lambda: [{}, ("same", {})]', "cells 'base' .* and 'same' .* have the same settings"),
  ('runs = lambda: [("a", {}), ("a", {"steps": 30})]', "have the same name"),
  ('runs = lambda: [{"steps": 30, "seed": 3}]', "seed=3 is set by SEEDS"),
  ("runs = lambda: []", "yields no cell"),
  ('SEED = 3\nruns = lambda: [{}]', r"SEED is read by nobody; did you mean SEEDS\?"),
  ("SEEDS = (1, 1)\nruns = lambda: [{}]", r"SEEDS=\(1, 1\) must be different numbers"),
  ("SEEDS = ()\nruns = lambda: [{}]", "SEEDS"), ("BUDGET = -1\nruns = lambda: [{}]", "BUDGET=-1"),
  ('BASELINE = "bese"\nruns = lambda: [{}]', "BASELINE='bese' is no cell; nearest valid: 'base'"),
  ('METRIC = "eval/val/los"\nruns = lambda: [{}]', r"METRIC='eval/val/los': did you mean 'eval/val/loss'\?"),
  ("runs = lambda: [3]", r"runs\(\) yields 3; a cell is a dict of settings"),
  ("runs = lambda: [{}, {}['x']]", r"made_up.runs\(\) \(<string>:\d+\) raised KeyError: 'x'"),
  ("x = 1", r"must have runs\(\) or suggest\(trial\)"),
  ('runs = lambda: [{"data.val_fraction": 0.0, "eval.every": 250, "eval.rows": 256}]', "needs documents"),
  ('BASE = "configs/tny.py"\nruns = lambda: [{}]', "did you mean configs/tiny.py"),
])
def test_a_mistake_is_found_before_the_first_run(experiment, text, said, tmp_path, capsys, monkeypatch):
  base = "" if "BASE = " in text else 'BASE = "configs/tiny.py"\n'
  monkeypatch.setattr(local, "run_local", lambda *_: pytest.fail("it started"))
  assert sweep.main([experiment(f'"""Q?"""\n{base}{text}'), f"--out={tmp_path}/out"]) == 2
  error = capsys.readouterr().err
  assert error.startswith("experiments.sweep: error: ") and error.count("\n") == 1
  assert re.search(said, error), error
  assert not (tmp_path / "out").exists()


def test_a_misspelt_experiment_is_met_with_the_nearest(capsys):
  assert sweep.main(["experiments.qk_nrom"]) == 2
  assert "did you mean experiments.qk_norm?" in capsys.readouterr().err
  assert "experiments.qk_norm" in cells.shipped() and "experiments.cells" not in cells.shipped()


def test_killed_twice_each_run_is_done_once_and_no_step_twice(tmp_path, monkeypatch, capsys):
  """The stand-in for train.main keeps every step, so that one done twice would show."""
  (name, env), rng = write(tmp_path, SIX % (0.3, 5)), random.Random(7)
  command = [sys.executable, "-c", FAKE, name, f"--out={tmp_path}/out", "--jobs=2"]
  for _ in range(2):
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline().startswith("Six fake runs")  # It has been read and checked.
    time.sleep(0.3 + rng.random())
    process.kill()
    process.wait()
  done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  folders = sorted((tmp_path / "out").glob("*/seed=*"))
  assert len(folders) == 6
  half = 0
  for folder in folders:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert read_outcome(folder).status == "done"
    half += len((folder / "starts.log").read_text().splitlines()) > 1
  assert half, "nothing was half done when it was killed"
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setattr(local, "run_local", lambda *_: pytest.fail("it started one again"))
  assert sweep.main([name, f"--out={tmp_path}/out"]) == 0
  assert "0 of them missing" in capsys.readouterr().out


def test_a_run_that_fails_is_told_and_tried_again_and_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
  name, _ = write(tmp_path, SIX % (5.0, 1))
  monkeypatch.setattr(local, "PROGRAM", "tests.fake_run")
  monkeypatch.syspath_prepend(str(tmp_path))
  assert sweep.main([name, f"--out={tmp_path}/out"]) == 1
  out, err = capfd.readouterr()
  assert "[6/6]" in out and "4 of 6 runs are done" in out
  assert err.count("fake_run: failed: the rate is too high") == 2
  failed = [read_outcome(f) for f in (tmp_path / "out").glob("lr=5*/seed=*")]
  assert {(o.status, o.exit_code, o.error) for o in failed} == {
    ("failed", 1, "fake_run: failed: the rate is too high")}
  assert sweep.main([name, f"--out={tmp_path}/out", "--only=lr=5*"]) == 1  # Tried again.
  assert {len((f / "starts.log").read_text().splitlines()) for f in (tmp_path / "out").glob("lr=5*/*")} == {2}
  assert {len((f / "starts.log").read_text().splitlines()) for f in (tmp_path / "out").glob("lr=0*/*")} == {1}
  assert sweep.main([name, f"--out={tmp_path}/out", "--only=lr=6*"]) == 2
  assert "--only=lr=6* matches no cell; nearest valid: " in capfd.readouterr().err


def test_told_to_stop_it_lets_the_runs_save_and_says_how_to_go_on(tmp_path):
  name, env = write(tmp_path, SIX % (0.3, 30))
  command = [sys.executable, "-c", FAKE, name, f"--out={tmp_path}/out", "--jobs=2"]
  process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, cwd=ROOT)
  while len(list((tmp_path / "out").glob("*/*/metrics.jsonl"))) < 2:
    time.sleep(0.05)
    assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=30)
  assert process.returncode == 143 and "stopped with 6 of 6 runs to go; the same command goes on" in out
  folders = [p.parent for p in (tmp_path / "out").glob("*/*/starts.log")]
  assert len(folders) == 2 and not any((f / "outcome.json").exists() for f in folders)


def test_jobs_share_no_core_and_there_are_no_more_than_cores(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 6, 7, 8})
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  monkeypatch.setenv("JAX_PLATFORMS", "")
  monkeypatch.setattr(local.glob, "glob", lambda pattern: [])
  assert [place.cores for place in local.split_machine(3)] == [(0, 1), (2, 3), (6, 7, 8)]
  assert local.split_machine(1)[0].cores == (0, 1, 2, 3, 6, 7, 8)
  with pytest.raises(ValueError, match="each run has a core of its own, and there are 7"):
    local.split_machine(8)
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7,9")
  assert [p.env["CUDA_VISIBLE_DEVICES"] for p in local.split_machine(2)] == ["3,5", "7,9"]
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
  monkeypatch.setattr(local.glob, "glob", lambda pattern: ["/dev/accel0", "/dev/accel1"] * ("acc" in pattern))
  assert [p.env["TPU_VISIBLE_CHIPS"] for p in local.split_machine(2)] == ["0", "1"]
  with pytest.raises(ValueError, match="each run has a TPU chip of its own, and there are 2"):
    local.split_machine(3)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # Runs that use no chip need none each.
  assert [place.env for place in local.split_machine(3)] == [{}, {}, {}]


# What it costs.

def test_the_last_run_ends_when_it_should():
  assert estimate.makespan([3.0, 1.0, 1.0, 1.0], 2) == 3.0
  assert estimate.makespan([1.0, 1.0, 1.0, 3.0], 2) == 4.0
  assert estimate.makespan([2.0] * 5, 1) == 10.0 and estimate.makespan([], 3) == 0.0


def test_a_cell_is_priced_from_what_was_measured(experiment):
  """A cell that was tried costs its steps, evaluations and start; one of another size in proportion."""
  found, _ = read_experiment(experiment('''
    """Q?"""
    BASE = "configs/tiny.py"
    def runs():
      yield {}
      yield {"steps": 400, "eval.every": 100}
      yield {"model.d_model": 128}
      yield {"model.d_model": 256}
  '''))
  base, long, wide, wider = found.cells
  first = estimate.modelled(base).step_s
  one = [(first, estimate.Sample(step=0.02, evaluation=0.5, rest=7.0))]
  assert estimate.expected(base, one) == pytest.approx(40 * 0.02 + 3 * 0.5 + 7.0)
  assert estimate.expected(long, one) == pytest.approx(400 * 0.02 + 5 * 0.5 + 7.0)
  times = estimate.modelled(wide).step_s / first
  assert times > 1.5 and estimate.expected(wide, one) == pytest.approx(40 * 0.02 * times + 3 * 0.5 + 7.0)
  last = estimate.modelled(wider).step_s
  two = [*one, (last, estimate.Sample(step=0.2, evaluation=1.5, rest=17.0))]
  assert estimate.expected(base, two) == pytest.approx(estimate.expected(base, one))
  assert estimate.expected(wider, two) == pytest.approx(40 * 0.2 + 3 * 1.5 + 17.0)
  assert estimate.expected(base, two) < estimate.expected(wide, two) < estimate.expected(wider, two)


def test_a_sample_is_what_a_finished_run_took(tmp_path):
  lines = [{"step": 0, "eval/val/loss": 3.0, "eval/val/s": 0.5}, {"step": 1, "loss": 3.0, "step_ms": 900.0},
           *({"step": i, "loss": 3.0, "step_ms": 100.0} for i in (2, 3)),
           {"step": 3, "eval/val/loss": 2.0, "eval/val/s": 0.7}]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert estimate.sample(tmp_path) is None
  for outcome, expected in ((Outcome("done", 0, 10.0), (0.1, 0.6, 10 - 1.1 - 1.2)),
                            (Outcome("done", 0, 1.0), None), (Outcome("failed", 1, 10.0), None)):
    (tmp_path / "outcome.json").write_text(json.dumps(outcome._asdict()))
    found = estimate.sample(tmp_path)
    assert found == (expected and pytest.approx(expected))


def test_on_a_chip_it_costs_what_the_model_of_a_step_says(experiment, capsys, tmp_path):
  name = experiment('"""Q?"""\nBASE = "configs/dense_8b.py"\nSEEDS = (0, 1)\nBUDGET = 1e9\n'
                    'runs = lambda: [{"data.val_fraction": 0.1, "mesh.fsdp": -1}]')
  args = [name, f"--out={tmp_path}/out", "--dry_run", "--chip=v5p", "--n=64"]
  assert sweep.main(args) == 0
  out = capsys.readouterr().out
  cfg = read_experiment(name)[0].cells[0].resolved.validate(64)
  hours = 2 * cfg.steps * estimate_step(cfg, get_chip("v5p"), 64).step_s * 64 / 3600
  assert f"{hours:.3g} chip-hours" in out and "1 cells x 2 seeds = 2 runs, 2 of them missing" in out
  assert not (tmp_path / "out").exists()
  sys.modules[name].BUDGET = hours / 2
  assert sweep.main(args) == 0
  assert "WARNING: what is missing costs" in capsys.readouterr().out
  assert sweep.main([a for a in args if a != "--dry_run"]) == 2
  assert f"more than made_up.BUDGET={hours / 2:g}" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_flops_are_those_of_the_count(experiment):
  from model.count import active_parameters, flops_per_token
  from model.sharding import abstract_mesh
  from model.transformer import abstract_params
  found, _ = read_experiment(experiment('"""Q?"""\nBASE = "configs/moe_tiny.py"\nruns = lambda: [{}]'))
  cfg = found.cells[0].resolved
  _, params = abstract_params(cfg.model, abstract_mesh(data=1))
  tokens = cfg.steps * cfg.batch_size * cfg.seq_len
  flops = tokens * flops_per_token(cfg.model, cfg.seq_len, active_parameters(cfg.model, params))
  figures = estimate.count(found)[found.cells[0].id]
  assert figures["tokens"] == tokens and figures["flops"] == pytest.approx(flops, rel=0.01)


def test_a_hundred_cells_are_read_in_seconds(experiment):
  begin = time.process_time()
  found, _ = read_experiment(experiment('''
    """Q?"""
    BASE = "configs/tiny.py"
    def runs():
      for i in range(100):
        yield {"optim.lr": 1e-3 + 1e-6 * i}
  '''))
  assert len(found.cells) == 100 and time.process_time() - begin < 10


def test_a_new_field_changes_no_cell_and_a_new_default_is_told(experiment, tmp_path, monkeypatch):
  """The code under a sweep may grow; what is done stays done, unless it would come out otherwise now."""
  name = experiment('"""Q?"""\nBASE = "configs/tiny.py"\nruns = lambda: [{"optim.lr": 1e-2}]')
  found, _ = read_experiment(name)
  run = cells.find_runs(found, tmp_path)[0]
  run.workdir.mkdir(parents=True)
  flags.write_config_json(run.workdir / "config.json", run.cell.resolved, [])
  cells.check_unchanged([run])
  record = json.loads((run.workdir / "config.json").read_text())
  del record["config"]["model"]["logit_softcap"]  # As if it had come since.
  (run.workdir / "config.json").write_text(json.dumps(record))
  cells.check_unchanged([run])
  record["config"]["z_loss"] = 1e-4  # As if that had been the default.
  (run.workdir / "config.json").write_text(json.dumps(record))
  with pytest.raises(ValueError, match=r"made with other settings .* z_loss=0.0 \(0.0001 there\); give"):
    cells.check_unchanged([run])
  fresh = type(run.cell.resolved)
  fields = {**fresh.__dataclass_fields__}
  monkeypatch.setattr(fresh, "__dataclass_fields__", {k: v for k, v in fields.items() if k != "init_seed"})
  assert read_experiment(name)[0].cells[0].id == run.cell.id


def test_what_a_flag_is_not_read_by_is_said(experiment, capsys, tmp_path):
  name = experiment('"""Q?"""\nBASE = "configs/tiny.py"\nruns = lambda: [{}]')
  for args, said in ((["--price_per_chip_hour=1"], "is of --chip, which is not given"),
                     (["--on=ray", "--jobs=2"], "--jobs=2 is of this machine"), (["--n=4"], "is of --chip")):
    with pytest.raises(SystemExit, match="2"):
      sweep.main([name, f"--out={tmp_path}/out", *args])
    assert said in capsys.readouterr().err
  assert sweep.main([name, f"--out={tmp_path}/out", "--dry_run", "--chip=v5e"]) == 2
  assert "--chip needs --n, as mesh.fsdp=-1 of cell 'base' takes what is there" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()

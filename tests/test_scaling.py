"""The grid spends what it says; from the files of made-up runs their law is found, and the size held out."""
import functools
import json
import re

import jax
import numpy as np
import pytest

from data.flags import as_json, config_hash, override, read_config
from experiments import scaling
from experiments.cells import as_flags
from experiments.law import Law, fit_law, read_fit
from model.count import flops_per_token
from model.sharding import abstract_mesh
from model.transformer import abstract_params
from tests.tiny import ROOT

TRUE = Law(E=1.2, A=60.0, B=300.0, alpha=0.35, beta=0.4)


@pytest.fixture(scope="module")
def cells():
  """name -> (config validated, overrides)."""
  found = {}
  for name, overrides in scaling.runs():
    overrides = dict(overrides)
    cfg = read_config(str(ROOT / overrides.pop("config")))
    found[name] = override(cfg, as_flags(overrides)).validate(1), overrides
  return found


def make_sweep(folder, cells, noise=0.002):
  """What experiments.sweep leaves, of runs whose losses TRUE gives."""
  rng, listed = np.random.default_rng(0), []
  for name, (cfg, overrides) in cells.items():
    workdir = folder / name / "seed=0"
    workdir.mkdir(parents=True)
    n, tokens = scaling.matrix_parameters(cfg.model), cfg.steps * cfg.batch_size * cfg.seq_len
    loss = float(TRUE.loss(n, tokens) * np.exp(rng.normal(0, noise)))
    lines = [{"step": 0, "eval/val/loss": 9.0}, {"step": cfg.steps, "loss": 1.0, "tokens": tokens},
             {"step": cfg.steps, "eval/val/loss": loss}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "config.json").write_text(json.dumps({"config": as_json(cfg), "hash": config_hash(cfg)}))
    (workdir / "outcome.json").write_text(json.dumps(
      {"status": "done", "exit_code": 0, "seconds": 1.0, "error": None}))
    listed.append({"id": name, "name": name, "config": "", "overrides": overrides})
  (folder / "sweep.json").write_text(json.dumps(
    {"metric": "eval/val/loss", "seeds": [0], "cells": listed, "experiment": "experiments.scaling"}))
  return folder


def test_each_cell_spends_its_budget(cells):
  """By what the project itself counts, less attention; and reads no text twice."""
  for name, (cfg, _) in cells.items():
    budget = float(re.search(r"C=(.+)", name)[1])
    m = cfg.model
    tokens = cfg.steps * cfg.batch_size * cfg.seq_len
    n = scaling.matrix_parameters(m)
    assert 6 * n * tokens == pytest.approx(budget, rel=0.02)
    with_attention = flops_per_token(m, cfg.seq_len, n + m.padded_vocab_size * m.d_model) * tokens
    assert budget < with_attention < 1.2 * budget
    assert 1.5e6 < tokens < 12.5e6 and cfg.data.sources[0].max_epochs == 1


def test_parameters_that_multiply_are_all_but_norms_and_the_embedding(cells):
  m = cells["s2,C=4.0e+11"][0].model
  leaves = jax.tree_util.tree_flatten_with_path(abstract_params(m, abstract_mesh(fsdp=1))[1])[0]
  matrices = sum(np.prod(leaf.shape) for path, leaf in leaves if "norm" not in str(path))
  assert scaling.matrix_parameters(m) == matrices - m.padded_vocab_size * m.d_model


def test_the_size_held_out_is_predicted(cells, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(scaling, "fit_law", functools.partial(fit_law, resamples=40))
  folder = make_sweep(tmp_path / "scaling", cells)
  assert scaling.main([f"--out={folder}"]) == 0
  said = capsys.readouterr().out
  points, missing = scaling.read_points(folder)
  fitted, held = scaling.split(points)
  assert not missing and len(fitted) >= 12 and len({p.n for p in fitted}) >= 5
  assert [p.n for p in held] == [max(scaling.matrix_parameters(cfg.model) for cfg, _ in cells.values())]
  fit = read_fit(folder / "fit.json")
  assert len(fit.rows) == len(fitted) and max(fit.rows[:, 0]) < held[0].n
  loss, low, high = fit.predict(held[0].n, held[0].d)
  assert loss == pytest.approx(TRUE.loss(held[0].n, held[0].d), rel=0.01) and low < loss < high
  line = next(line for line in said.splitlines() if line.startswith(held[0].name))
  assert f"{held[0].loss:.4f}" in line and f"interval {low:.4f} to {high:.4f}" in line
  low, high = fit.interval(lambda law: law.exponent)
  assert low < TRUE.exponent < high
  assert "held out, 1.58 times the largest size fitted and 1 times the largest budget" in said
  assert (folder / "scaling.png").stat().st_size > 30_000


def test_what_is_not_done_is_left_out_and_named(cells, tmp_path, capsys):
  folder = make_sweep(tmp_path / "scaling", cells)
  first, second, *_ = cells
  (folder / first / "seed=0/outcome.json").unlink()
  failed = {"status": "failed", "exit_code": 1, "seconds": 1.0, "error": "x"}
  (folder / second / "seed=0/outcome.json").write_text(json.dumps(failed))
  points, missing = scaling.read_points(folder)
  assert missing == [f"{first} seed 0: not finished", f"{second} seed 0: failed"]
  assert len(points) == len(cells) - 2
  few = dict(list(cells.items())[:4])
  assert scaling.main([f"--out={make_sweep(tmp_path / 'few', few)}"]) == 2
  assert "cannot tell the 5 constants apart" in capsys.readouterr().err
  assert scaling.main([f"--out={tmp_path}"]) == 2
  assert "is no sweep: it has no sweep.json" in capsys.readouterr().err

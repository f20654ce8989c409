"""Folders as experiments.sweep leaves them, of runs that were never made."""
import json

import numpy as np

NAMES = {"model.qk_norm": ["rmsnorm", "l2"], "optim.lr": [0.001, 0.003, 0.01, 0.03],
         "model.n_heads": [4, 8, 16], "optim.name": ["adamw", "muon"],
         "model.ffn": ["swiglu", "geglu", "relu2"], "z_loss": [0.0, 1e-4]}


METRIC = "eval/val/loss"


def overrides_of(i: int) -> dict:
  """Different for each i."""
  chosen = {}
  for key, values in NAMES.items():
    i, k = divmod(i, len(values) + 1)
    if k:
      chosen[key] = values[k - 1]
  return chosen | ({"init_seed": i} if i else {})


def make_sweep(folder, n_cells=6, seeds=(0, 1, 2), *, steps=60, difference=None, noise=0.01, rng=0,
               status=None, names=None, errors=None, question=None, seconds=20.0, sha="0123abcd" * 5):
  """
  Args:
    difference: cell's place -> what is added to its metric.
    status: (cell's place, seed) -> "failed", "diverged", "pruned", "unfinished" or "missing".
    errors, names: in place of the made-up ones, by the cell's place.

  Returns:
    The metric of each cell and seed, NaN where a run is not done: [cells, seeds].
  """
  rng, status, table = np.random.default_rng(rng), status or {}, np.full((n_cells, len(seeds)), np.nan)
  seed_effect, cells = rng.normal(0, 10 * noise, len(seeds)), []
  for a in range(n_cells):
    overrides = overrides_of(a)
    label = ",".join(f"{k.rpartition('.')[2]}={v}" for k, v in overrides.items() if k != "init_seed")
    name = (names or {}).get(a) or label or "base"
    cells.append({"id": f"cell-{a:03}", "name": name, "config": "configs/tiny.py", "overrides": overrides,
                  "flops": 1.2e12 * (1 + a % 3), "tokens": 20480})
    for s, seed in enumerate(seeds):
      state = status.get((a, seed), "done")
      if state == "missing":
        continue
      run = folder / f"cell-{a:03}" / f"seed={seed}"
      run.mkdir(parents=True)
      last = 3.2 + (difference or {}).get(a, 0) + seed_effect[s] + noise * rng.normal()
      _write_run(run, last, steps, state, overrides, seed, sha, rng)
      if state == "done":
        table[a, s] = last
      if state != "unfinished":
        failed = state in ("failed", "diverged")
        (run / "outcome.json").write_text(json.dumps({
          "status": "failed" if failed else state, "exit_code": int(failed), "seconds": seconds + a + 0.5 * s,
          "error": (errors or {}).get(a, f"{state}: it ended early") if failed else None}))
  (folder / "sweep.json").write_text(json.dumps({
    "experiment": "experiments.made_up", "metric": METRIC, "higher_is_better": False, "baseline": "cell-000",
    "question": question or "Does any of this help a small model?\n\nOr is it noise, as so much is?",
    "seeds": list(seeds), "cells": cells}))
  return table


def _write_run(run, last, steps, state, overrides, seed, sha, rng):
  nested = {"seed": seed, "steps": steps, "z_loss": 0.0, "init_seed": 0,
            "model": {"d_model": 64, "qk_norm": None, "n_heads": 4, "ffn": "swiglu"},
            "optim": {"lr": 0.003, "name": "adamw"}}
  for key, value in overrides.items():
    *sections, leaf = key.split(".")
    at = nested
    for section in sections:
      at = at[section]
    at[leaf] = value
  (run / "config.json").write_text(json.dumps({
    "config": nested, "hash": "sha256:0", "overrides": [], "versions": {"jax": "0.10.2", "python": "3.11.7"},
    "git": {"sha": sha, "dirty": False, "diff": None}, "data": "sha256:feed"}))
  end = steps if state == "done" else steps // 2
  lines = []
  for step in range(1, end + 1):
    loss = last + 2.8 * np.exp(-6 * step / steps) + 0.04 * rng.normal()
    lines.append({"step": step, "loss": loss, "skipped": 0.0})
    if step % (steps // 5) == 0:
      lines.append({"step": step, METRIC: last if step == steps else last + 2.6 * np.exp(-6 * step / steps)})
  if state == "diverged":
    lines[-1] = {"step": end, "loss": "NaN", "skipped": 6.0}
  (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  (run / "output.log").write_text("what the run printed\n")
  if state == "done":
    (run / "report.md").write_text("# a run\n")

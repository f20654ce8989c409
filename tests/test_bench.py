"""The bench: its lines, its statistics, and that both sides of the comparison are the same model."""
import argparse
import importlib.util
import json

import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench.case import compile_step, make_rows, train_config
from tests.tiny import mesh_of

SMALL = dict(n_layers=2, d_model=64, n_heads=4, d_ff=96, vocab_size=512, unroll=1)


def small_config(**changes):
  cfg = train_config(**SMALL, **changes)
  cfg.batch_size, cfg.seq_len = 2, 32
  return cfg


@pytest.mark.skipif(importlib.util.find_spec("torch") is None,
                    reason="the yardstick needs torch: pip install torch==2.13.0")
def test_pytorch_and_we_take_the_same_steps():
  from experiments.bench.torch_eager import make_step
  cfg = small_config(init_std=0.2)  # Weights so large that attention is far from even, and positions matter.
  step, params, _ = compile_step(cfg, mesh_of("one"))
  optim = cfg.optim
  settings = dict(rope_theta=cfg.model.rope_theta, norm_eps=cfg.model.norm_eps,
                  lr=optim.lr, b1=optim.b1, b2=optim.b2, eps=optim.eps,
                  weight_decay=optim.weight_decay, grad_clip=optim.grad_clip)
  theirs = make_step({**make_rows(cfg), **settings, **{f"params/{name}": a for name, a in params.items()}})
  for _ in range(3):
    a, b = step(), theirs()
    np.testing.assert_allclose([a["loss"], a["grad_norm"]], [b["loss"], b["grad_norm"]], rtol=2e-5)


def test_the_case_is_the_one_that_was_agreed():
  cfg = train_config()
  m = cfg.model
  assert (m.d_model, m.n_layers, m.n_heads, m.head_dim, m.n_kv_heads, m.d_ff) == (512, 8, 8, 64, 8, 1408)
  assert (m.vocab_size, m.head, m.ffn, m.compute_dtype, m.remat) == (
      32_000, "untied", "swiglu", "float32", "none")
  assert (cfg.batch_size, cfg.seq_len, cfg.accum_steps, cfg.optim.name) == (8, 512, 1, "adamw")


def test_the_ratio_is_above_one_when_we_are_faster():
  same = {"loss": 10.0, "grad_norm": 2.0}
  ours = [1.0, 1.1, 0.9, 1.0, 1.2, 1.0, 0.8, 1.0, 1.1, 1.0]
  found = bench._compare(ours, [1.5 * s for s in ours], same, same)
  assert found["ratio"] == 1.5 and found["rounds"] == 10
  assert found["interval_95"][0] <= 1.5 <= found["interval_95"][1]
  with pytest.raises(RuntimeError, match="not the same model: grad_norm"):
    bench._compare(ours, ours, same, {"loss": 10.0, "grad_norm": 2.1})


def test_speed_is_of_the_median_step():
  gemms = [{"numpy": 50.0, "xla": 10.0}, {"numpy": 20.0, "xla": 80.0}, {"numpy": 60.0, "xla": 10.0}]
  speed = bench._speed([1.0, 2.0, 9.0], 100, gemms, 40.0)
  assert (speed["step_ms"], speed["tokens_per_s"], speed["flops_per_s"]) == (2000.0, 50.0, 20)
  assert (speed["fraction_of_gemm_peak"], speed["gemm_median_flops_per_s"]) == (0.25, 60)
  assert speed["gemm_by_library"] == {"numpy": 60, "xla": 80}  # The peak is the best of all.


def test_lines_of_decode_and_data(monkeypatch):
  monkeypatch.setattr("experiments.bench.case.train_config", lambda: train_config(**SMALL))
  monkeypatch.setattr(bench, "measure_gemm", lambda *_: {"numpy": 1e9})
  line = bench.decode(argparse.Namespace(rounds=1, batch=[8]))
  assert line["batch"] == 8 and line["tokens_per_s"] > 0 and line["prefill_tokens_per_s"] > 0
  line = bench.data(argparse.Namespace(rounds=10, rows=80))
  assert line["tokens_per_s"] == pytest.approx(512 * line["rows_per_s"], rel=0.01)
  json.dumps(line)


def test_few_rounds_are_refused(capsys):
  assert bench.main(["train", "--rounds=3"]) == 2
  assert "--rounds=3 must be at least 10" in capsys.readouterr().err

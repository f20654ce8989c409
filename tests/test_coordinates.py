"""The coordinate check: flat under muP and steep without (at the widths of the check, slow), and a fault of
muP is seen by a small one."""
import jax
import numpy as np
import pytest

from experiments import coordinates
from model.parametrization import PARAMETRIZATION, Powers
from tests.test_step import run_config
from tests.tiny import mesh_of, model_config, packed_batch, put, tiny

GROW = ("attention", "feed-forward", "residual", "logits")  # Under the standard parametrization.


def test_slopes_are_those_of_power_laws():
  widths = (64, 128, 256, 512)
  powers = {"attention": -0.5, "logits": 1.0, "residual": 0.0}
  changes = {w: {kind: [3 * w**p, w**p / 5] for kind, p in powers.items()} for w in widths}
  assert coordinates.slopes(changes) == pytest.approx(powers, abs=1e-9)


def test_a_wider_model_has_more_heads_of_the_same_size():
  small = model_config(d_model=64, n_heads=4, n_kv_heads=2, d_ff=176)
  wide = coordinates.widen(small, 256)
  assert (wide.n_heads, wide.n_kv_heads, wide.head_dim, wide.d_ff) == (16, 8, 16, 704)
  with pytest.raises(ValueError, match="--widths=48 is not a multiple of 32.*nearest valid: 32, 64"):
    coordinates.widen(small, 48)


def test_activations_are_those_of_the_forward_pass():
  cfg, mesh, graphdef, params, logits = tiny("norm_position=both")
  batch = packed_batch()
  with jax.set_mesh(mesh):
    found = jax.jit(lambda p, b: coordinates.activations(graphdef, p, b))(params, put(cfg, mesh, batch))
  np.testing.assert_allclose(found["logits"][0, ..., :cfg.vocab_size], logits(params, batch), atol=1e-5)
  assert found["attention logits"].shape == (2, 8, 4, 48, 48) and found["attention"].shape == (2, 8, 48, 32)
  assert set(found) == set(coordinates.KINDS)


def small_check():
  """slopes() of one layer, from its base width of 32 to 128: too small to be flat, as what the first weights
  of the head add fades with the width."""
  mesh, changes = mesh_of("one"), {}
  cfg = run_config(model=dict(n_layers=1, parametrization="mup", mup_base_width=32))
  cfg.optim.lr = 1e-3
  batches = [put(cfg.model, mesh, packed_batch(i)) for i in range(4)]
  for width in (32, 128):
    cfgs = [coordinates.at_width(cfg, width, seed, 4) for seed in range(2)]
    changes[width] = coordinates.measure(cfgs, mesh, batches)
  return coordinates.slopes(changes)


@pytest.mark.slow
def test_a_fault_of_mup_is_seen(monkeypatch):
  """A head that learns as if it were as wide as at the base."""
  right = small_check()
  monkeypatch.setitem(PARAMETRIZATION["mup"], "output", Powers(-1.0, 0.0))
  faulty = small_check()
  assert faulty["logits"] > right["logits"] + 0.5
  assert all(abs(slope) < 0.5 for slope in right.values()), right


@pytest.mark.slow
def test_flat_under_mup_and_steep_without(capsys, tmp_path):
  """From 64 to 512, within 0.1 and beyond 0.3."""
  command = ["--config=configs/tiny.py", "--seeds=4", "--config.optim.lr=2e-3",
             f"--config.data.cache_path={tmp_path / 'cache'}", f"--config.mesh.fsdp={jax.device_count()}"]
  mup = ["--config.model.parametrization=mup", "--config.model.mup_base_width=64"]
  assert coordinates.main([*command, *mup, f"--out={tmp_path / 'mup.png'}"]) == 0, capsys.readouterr().out
  assert (tmp_path / "mup.png").stat().st_size > 10_000
  capsys.readouterr()
  assert coordinates.main(command) == 1
  lines = {line[:18].strip(): line for line in capsys.readouterr().out.splitlines()}
  assert all(float(lines[kind].split("beyond")[0].split()[-1]) > 0.3 for kind in GROW), lines


@pytest.mark.parametrize("words, flags", [
  ("--widths=64,x is to be numbers", ["--widths=64,x"]), ("nearest valid: 64,128", ["--widths=64"]),
  ("--widths=40 is not a multiple of 32", ["--widths=40,64"]), ("--steps=0 must be", ["--steps=0"])])
def test_mistakes_are_told_before_anything_runs(words, flags, capsys):
  assert coordinates.main(["--config=configs/tiny.py", *flags]) == 2
  assert words in capsys.readouterr().err

"""The table of chips: what jax calls them, the slices they come in, and a row that is measured."""
import math

import pytest

from train import chips
from train.chips import CHIP, find_chip, get_chip, torus, wraps


@pytest.mark.parametrize("kind, peak", [
  ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12), ("TPU v9", None),
  ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-40GB", 312e12),
  ("NVIDIA H200", 989e12), ("NVIDIA GeForce", None),
])
def test_peaks_by_device_kind(kind, peak):
  chip = find_chip(kind)
  assert (chip and chip.flops["bfloat16"]) == peak


@pytest.mark.parametrize("name, n, shape", [
  ("v5e", 256, (16, 16)), ("v5e", 32, (4, 8)), ("v5p", 8, (2, 2, 2)), ("v5p", 32, (2, 4, 4)),
  ("v5p", 64, (4, 4, 4)), ("v5p", 128, (4, 4, 8)), ("v5p", 256, (4, 8, 8)), ("v5p", 4096, (16, 16, 16)),
  ("v5p", 6144, (16, 16, 24)), ("v7x", 128, (4, 4, 4)), ("v6e", 1, (1, 1)), ("H100", 64, ()),
])
def test_slices_are_those_that_are_rented(name, n, shape):
  """Google's tables of shapes; two devices share a chip of v7x."""
  assert torus(CHIP[name], n) == shape


def test_no_slice_has_so_many():
  with pytest.raises(ValueError, match="--n=48: no slice has so many; nearest valid: 32, 64"):
    torus(CHIP["v5e"], 48)
  with pytest.raises(ValueError, match="known: v4, v5e"):
    get_chip("v8")


def test_what_is_a_ring():
  assert wraps(CHIP["v5e"], (16, 16), 16) and not wraps(CHIP["v5e"], (8, 16), 8)
  assert wraps(CHIP["v5p"], (4, 4, 8), 4) and not wraps(CHIP["v5p"], (2, 4, 4), 4)


def test_links_add_up_to_the_makers_figure():
  """Bytes/s of a chip over all its links, both ways, as Google's pages give it."""
  for name, gigabytes in dict(v5e=400, v5p=1200, v6e=800, v7x=1200).items():
    chip = CHIP[name]
    assert 2 * 2 * chip.dims * chip.link_bandwidth * chip.per_chip == gigabytes * 1e9, name


def test_every_row_says_where_it_is_from():
  for name, chip in CHIP.items():
    if chip is not None:
      assert len(chip.source) > 15 and chip.flops["bfloat16"] > 1e14 and chip.hbm_bytes > 1e10, name
      assert chip.hbm_bandwidth > chip.link_bandwidth > chip.dcn_bandwidth, name


def test_this_machine_is_measured(monkeypatch):
  assert min(chips.measure_gemm(0.05, 256).values()) > 1e6
  assert 1e8 < chips.measure_copy(0.05, 2**24) < 1e13
  monkeypatch.setattr(chips, "measure_gemm", lambda: {"numpy": 1e9, "xla": 2e9})
  monkeypatch.setattr(chips, "measure_copy", lambda: 1e10)
  chips.measure_cpu.cache_clear()
  chip = get_chip("cpu")
  chips.measure_cpu.cache_clear()
  assert chip.flops["float32"] == 2e9 and chip.hbm_bandwidth == 1e10 and math.isfinite(chip.hbm_bytes)


def test_command_prints_the_table(capsys):
  assert chips.main([]) == 0
  text = capsys.readouterr().out
  assert all(name in text for name in CHIP if name != "cpu") and "docs.cloud.google.com" in text
  assert chips.main(["--chip=v55"]) == 2

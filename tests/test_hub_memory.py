"""Importing and exporting hold little of a model at a time: measured, in a process of its own."""
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from model.hub.families import find_family
from model.hub.plan import make_plan
from model.hub.safetensors_file import write_safetensors
from tests.hub_cases import settings
from tests.tiny import ROOT

# VmHWM and not ru_maxrss, which begins with what the process that started it held.
PROGRAM = """
import pathlib, re, sys
from model.hub.__main__ import main
code = main(sys.argv[1:])
print("PEAK", re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""


def peak_of(*argv):
  done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, argv)], cwd=ROOT, capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stderr
  return int(done.stdout.split("PEAK")[1]) * 1024


@pytest.mark.slow
def test_two_gigabytes(tmp_path):
  """A bfloat16 model whose embedding is a quarter of it, in two files."""
  config = settings("Llama 2") | dict(
    vocab_size=65_500, hidden_size=2048, intermediate_size=8192, num_hidden_layers=12, num_attention_heads=16,
    num_key_value_heads=4, attention_bias=False, tie_word_embeddings=False)
  family = find_family(config)
  plan = make_plan(family, family.to_model(config, precision="pure_bf16"))
  (tmp_path / "theirs").mkdir()
  (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
  block = np.random.default_rng(0).standard_normal(1 << 20).astype(ml_dtypes.bfloat16)

  def rows(name):
    n = int(np.prod(plan.shape(name)))
    for at in range(0, n, len(block)):
      yield block[:n - at]

  names = list(plan.tensors)
  places = {}
  for i, group in enumerate((names[::2], names[1::2])):
    file = f"model-{i}.safetensors"
    write_safetensors(tmp_path / "theirs" / file, {n: (plan.shape(n), block.dtype) for n in group}, rows)
    places |= dict.fromkeys(group, file)
  (tmp_path / "theirs" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
  total = sum(f.stat().st_size for f in (tmp_path / "theirs").glob("*.safetensors"))
  largest = max(2 * int(np.prod(plan.shape(n))) for n in names)
  peaks = {"import": peak_of("import", tmp_path / "theirs", tmp_path / "run"),
           "export": peak_of("export", tmp_path / "run", tmp_path / "out")}
  print({"total_MB": total / 1e6, "largest_MB": largest / 1e6, **{k: v / 1e6 for k, v in peaks.items()}})
  assert total > 1.9e9
  for name, peak in peaks.items():
    assert peak < 1.3 * largest + 500e6, name

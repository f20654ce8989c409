"""A real model of others is trained on: it begins with the loss that transformers gives its weights."""
import os
import subprocess
import sys

import numpy as np
import pytest

from configs.quickstart import get_config
from data.pipeline import Rows
from data.prepare import prepare
from tests.test_hub_real import models
from tests.tiny import ROOT
from train.metrics import read_metrics

SIZES = ["--config.batch_size=4", "--config.seq_len=128", "--config.steps=8", "--config.optim.warmup_steps=1",
         "--config.eval.every=8", "--config.eval.rows=4", "--config.mesh.fsdp=2", "--config.mesh.tensor=2",
         "--config.model.rules.heads=()", "--config.model.rules.kv_heads=()"]  # It has 9 heads.


@pytest.mark.slow
def test_smollm2_goes_on_from_its_loss(tmp_path):
  """On fsdp 2 x tensor 2; packed rows against each document alone."""
  model, theirs = models("SmolLM2-135M-Instruct")
  workdir, cache = tmp_path / "run", tmp_path / "cache"
  subprocess.run([sys.executable, "-m", "train.main", f"--config=configs/quickstart.py:{model}", *SIZES,
                  f"--workdir={workdir}", f"--config.data.cache_path={cache}"],
                 cwd=ROOT, check=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"})
  lines = read_metrics(workdir / "metrics.jsonl")
  first = next(line["loss"] for line in lines if "loss" in line)
  before, after = (line["eval/val/loss"] for line in lines if "eval/val/loss" in line)
  assert first == pytest.approx(loss_of_first_rows(theirs, str(model), cache), rel=1e-4)
  assert after < before - 0.05


def loss_of_first_rows(theirs, model, cache):
  import torch
  cfg = get_config(model)
  cfg.data.cache_path = str(cache)
  prepared = prepare(cfg.data.validate(), log=lambda *_: None)
  rows = Rows(prepared, cfg.data, seq_len=128, batch_size=4, seed=cfg.seed)
  number = lambda a: torch.tensor(a.astype(np.int64))
  nll = tokens = 0.0
  for row in (rows.row(0, slot) for slot in range(4)):
    for document in range(1, row["segments"].max() + 1):
      inside = row["segments"] == document
      with torch.no_grad():
        logits = theirs(number(row["tokens"][inside])[None]).logits[0]
      log_p = torch.log_softmax(logits, -1).gather(1, number(row["targets"][inside])[:, None])
      nll -= float((log_p[:, 0].numpy() * row["weights"][inside]).sum())
      tokens += float(row["weights"][inside].sum())
  return nll / tokens

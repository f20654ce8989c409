"""The one dial: what it derives against the counted model and the papers' laws, and what it refuses."""
import itertools
import math

import pytest

from configs import dense
from data import flags
from model.count import count_parameters
from model.sharding import abstract_mesh
from model.transformer import abstract_params, check_names
from tests.tiny import ROOT

DIALS = [f"{letter}{n}" for letter in dense.LADDERS for n in (1, 2, 3, 5, 7, 12, 15, 16, 17, 24, 40)]


def blocks(arg):
  """(the config, the parameters of its blocks but norms, counted)."""
  cfg = dense.get_config(arg).validate()
  check_names(cfg.model)
  counts = count_parameters(abstract_params(cfg.model, abstract_mesh(data=1))[1])
  return cfg, counts["attention"] + counts["ffn"]


@pytest.mark.parametrize("arg", ["d1", "d12", "d17", "s2", "s7"])
def test_what_is_derived_holds_for_the_model_that_is_made(arg):
  cfg, n = blocks(arg)
  if cfg.model.qk_norm:
    n -= 2 * cfg.model.n_layers * cfg.model.head_dim
  tokens, rows = cfg.steps * cfg.batch_size * cfg.seq_len, cfg.batch_size * cfg.seq_len
  assert abs(tokens - 20 * n) <= rows / 2 and abs(cfg.optim.warmup_steps * rows - n) <= rows / 2
  budget = math.log10(6 * n) + math.log10(20 * n)
  assert math.log10(cfg.optim.lr) == pytest.approx(math.log10(0.3118) - 0.125 * budget, abs=0.003)
  wanted = math.log10(0.292) + 0.3271 * budget
  if cfg.batch_size > 1:
    assert abs(math.log2(rows) - wanted / math.log10(2)) <= 0.5
  assert cfg.model.n_heads * cfg.model.head_dim == cfg.model.d_model


def test_known_sizes():
  """GPT-2 small has 85M parameters in its 12 blocks; the small ladder spans 30 times of what a CPU trains."""
  assert dense.get_config("d12").model.d_model == 768 and blocks("d12")[1] == pytest.approx(85e6, rel=0.01)
  small = [blocks(f"s{n}")[1] for n in range(2, 8)]
  assert small[0] < 30e3 and small[-1] > 1e6 and small[-1] / small[0] > 30


def test_every_dial_is_valid_and_turns_one_way():
  for letter in dense.LADDERS:
    found = [dense.get_config(arg).validate() for arg in DIALS if arg[0] == letter]
    for small, large in itertools.pairwise(found):
      assert small.steps * small.batch_size < large.steps * large.batch_size
      assert small.batch_size <= large.batch_size and small.optim.lr > large.optim.lr
      assert small.data == large.data and small.seq_len == large.seq_len


@pytest.mark.parametrize("arg, near", [
  ("d0", "d1"), ("12", "d12, configs/dense.py:s12"), ("dx", "d12"), ("d129", "d128"), ("s", "s12"),
  ("x3", "d3, configs/dense.py:s3"), ("d012", "d12"), ("d-4", "d4"), ("d٣", "d3")])
def test_what_is_no_dial_is_refused_with_the_nearest(arg, near):
  with pytest.raises(ValueError) as error:
    flags.read_config(f"{ROOT}/configs/dense.py:{arg}")
  assert f"arg={arg!r}" in str(error.value) and f"nearest valid: configs/dense.py:{near}" in str(error.value)


def test_every_derived_value_is_printed_with_its_rule_once(capsys):
  cfg = dense.get_config("s11")  # Of no other test here.
  flags.read_config(f"{ROOT}/configs/dense.py:s11")
  flags.read_config(f"{ROOT}/configs/dense.py:s11")
  out, err = capsys.readouterr()
  assert out == "" and err.count("configs/dense.py:s11: ") == 1 and len(dense.RULES) == 8
  values = flags.leaves(cfg)
  for name, rule in dense.RULES.items():
    assert [line.split(None, 2) for line in err.splitlines() if f" {name} " in line] == [
        [name, str(values[name]), rule]]

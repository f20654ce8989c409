"""Every check of a trial holds for a sound run, and fails on the fault that it is there for."""
import collections
import dataclasses
import json
import math
import types

import jax
import numpy as np
import pytest

from configs.tiny import get_config
from data.pipeline import Rows
from data.prepare import prepare
from tests.tiny import mesh_of, packed_batch, put
from train import trial
from train.checkpoint import Checkpointer
from train.host import Stopwatch
from train.step import abstract_state
from train.trial import (
  Times,
  check_checkpoint,
  check_data,
  check_gradients,
  check_loss,
  check_memory,
  estimate,
  make_gradient_norms,
  unigram_entropy,
)

GIB = 2**30


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  cfg = get_config().validate()
  cfg.data.cache_path = str(tmp_path_factory.mktemp("cache"))
  return cfg, prepare(cfg.data, log=lambda *_: None)


def test_memory_is_held_against_the_plan_and_the_device():
  assert check_memory(10 * GIB, 10 * GIB, 16 * GIB, "tpu").ok
  assert check_memory(5 * GIB, 10 * GIB, 16 * GIB, "tpu").ok
  assert not check_memory(12 * GIB, 10 * GIB, 16 * GIB, "tpu").ok and check_memory(
    12 * GIB, 10 * GIB, 16 * GIB, "gpu").ok
  for measured, planned in ((17 * GIB, 16 * GIB), (15 * GIB, 17 * GIB)):
    assert "does not fit" in check_memory(measured, planned, 16 * GIB, "tpu").text


def test_gradients_that_are_dead_or_lost_are_named_with_their_layer():
  cfg, mesh = get_config(), mesh_of("one")
  cfg.model, cfg.seq_len = dataclasses.replace(cfg.model, n_layers=3), 32
  cfg.validate(1)
  graphdef, abstract = abstract_state(cfg, mesh)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda a: jax.device_put(
    rng.normal(0.5 if a.ndim == 1 else 0.0, 0.1, a.shape).astype(a.dtype), a.sharding), abstract.params)
  with jax.set_mesh(mesh):
    norms = make_gradient_norms(cfg, graphdef)
    batch = put(cfg.model, mesh, packed_batch(vocab=cfg.model.vocab_size, t=cfg.seq_len, b=cfg.batch_size))
    ask = lambda params: check_gradients(jax.device_get(norms(params, batch)))
    check = ask(params)
    assert check.ok and f"all {len(jax.tree.leaves(params))} parameters" in check.text
    name = next(p for p, a in jax.tree_util.tree_flatten_with_path(params)[0]
                if jax.tree_util.keystr(p).count("wo"))
    change = lambda f: jax.tree_util.tree_map_with_path(lambda p, a: f(a) if p == name else a, params)
    dead = ask(change(lambda a: a.at[1].set(0.0)))  # Then nothing reaches what comes before.
    assert not dead.ok and all(f"attention/{w}, layer 1: zero" in dead.text for w in ("wk", "wq", "wv"))
    lost = ask(change(lambda a: a.at[2].set(np.nan)))
    assert not lost.ok and "not finite" in lost.text and "more" in lost.text


def test_the_loss_is_held_against_the_entropy_of_the_tokens(prepared):
  cfg, data = prepared
  rows = Rows(data, cfg.data, seq_len=cfg.seq_len, batch_size=cfg.batch_size, seed=0, steps=cfg.steps)
  counts = collections.Counter(
    int(token) for step in range(7) for slot in range(cfg.batch_size) for row in [rows.row(step, slot)]
    for token, weight in zip(row["targets"], row["weights"]) if weight)
  total = sum(counts.values())
  wanted = sum(n / total * math.log(total / n) for n in counts.values())
  assert unigram_entropy(rows, 7) == pytest.approx(wanted, rel=1e-12) and 3 < wanted < math.log(300)
  assert check_loss([5.9] * 10 + [wanted - 0.1] * 5, wanted).ok
  assert check_loss([5.9] * 10 + [wanted - 0.1] * 4 + [9.0], wanted).ok  # One spike.
  assert not check_loss([5.9] * 10 + [wanted + 0.1] * 5, wanted).ok
  assert not check_loss([5.9] * 10 + [math.nan] * 5, wanted).ok


def test_a_checkpoint_is_compared_to_the_bit():
  before = {"a": [np.array([1.0, 0.0, np.nan], np.float32)], "b": [np.arange(4)]}
  copy = lambda: {name: [a.copy() for a in arrays] for name, arrays in before.items()}
  assert check_checkpoint(before, copy()).ok
  for name, index, value in (("a", 0, np.nextafter(np.float32(1), 2)), ("a", 1, -0.0), ("b", 3, 4)):
    after = copy()
    after[name][0][index] = value
    check = check_checkpoint(before, after)
    assert not check.ok and f"1 of 2 arrays differ, e.g. {name}" in check.text
  assert not check_checkpoint(before, copy() | {"b": [np.arange(4, dtype=np.int32)]}).ok


def test_a_restore_that_is_not_what_was_saved_is_seen(tmp_path, monkeypatch):
  cfg, mesh = get_config().validate(1), mesh_of("one")
  state = jax.device_put({"step": np.int32(3), "w": np.arange(6.0)}, jax.NamedSharding(mesh, jax.P()))
  abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
  check, _ = trial._round_trip(cfg, tmp_path / "good", abstract, state, 3, Stopwatch())
  assert check.ok, check.text
  restore = Checkpointer.restore

  def wrong(self, *args):
    found = restore(self, *args)
    return found._replace(state=found.state | {"step": found.state["step"] + 1})

  monkeypatch.setattr(Checkpointer, "restore", wrong)
  check, _ = trial._round_trip(cfg, tmp_path / "bad", abstract, state, 3, Stopwatch())
  assert not check.ok and "1 of 2 arrays differ, e.g. step" in check.text


def test_data_that_is_not_what_was_prepared_is_seen(prepared, monkeypatch):
  monkeypatch.setattr("data.prepare.VERIFY_BYTES", 0)  # As if there were more than is hashed at each start.
  _, data = prepared
  check = check_data(data, True)
  assert check.ok and f"{data.count('train', 'tokens'):,} tokens to train on" in check.text
  folder = data.sources[0].folder
  manifest, shard = folder / "manifest.json", next(folder.glob("*.train.array_record"))

  def spoiled(path, spoil):
    whole = path.read_bytes()
    spoil(path, whole)
    try:
      return check_data(data, True)
    finally:
      path.write_bytes(whole)

  missing = spoiled(manifest, lambda path, whole: path.unlink())
  assert not missing.ok and "No such file" in missing.text
  changed = spoiled(manifest, lambda path, whole: path.write_bytes(whole.replace(b'"kept"', b'"kepd"')))
  assert not changed.ok and "expected sha256" in changed.text
  flipped = spoiled(shard, lambda path, whole: path.write_bytes(
    whole[:-1] + bytes([whole[-1] ^ 1])))
  assert not flipped.ok and "expected sha256" in flipped.text and shard.name in flipped.text
  assert check_data(data, True).ok
  source = data.sources[0]
  other = json.loads(json.dumps(source.manifest))
  other["splits"]["train"]["tokens"] += 1
  fake = types.SimpleNamespace(
    sources=[types.SimpleNamespace(
      name="x", folder=folder, verify=lambda: None, lengths=source.lengths,
      count=lambda split, what: other["splits"][split][what])], count=data.count, content_hash="0")
  assert "tokens of train by" in check_data(fake, True).text and not check_data(fake, True).ok
  empty = types.SimpleNamespace(sources=[], content_hash="0",
                                count=lambda split, what: {"train": 5, "val": 0}[split])
  assert not check_data(empty, True).ok and check_data(empty, False).ok


@pytest.mark.parametrize("steps, every, saves", [(40, 20, 20), (41, 20, 7), (40, 50, None), (40, None, 40)])
def test_the_whole_run_is_summed_up_as_the_loop_does_it(steps, every, saves):
  cfg = get_config()
  cfg.steps, cfg.eval.every, cfg.checkpoint.every = steps, every, saves
  cfg.validate()
  evaluations = sum(step in (0, steps) or every is not None and step % every == 0
                    for step in range(steps + 1))
  saved = 1 + sum(step == steps or saves is not None and step % saves == 0 for step in range(1, steps + 1))
  wanted = 100 + steps * 3 + evaluations * 7 + saved * 11
  assert estimate(cfg, Times(100, 3, 7, 11)) == wanted
  assert estimate(cfg, Times(100, 3, 0.0, 11)) == wanted - evaluations * 7


def flags(cfg, *more):
  return ["--config=configs/tiny.py", f"--config.data.cache_path={cfg.data.cache_path}", *more]


@pytest.mark.slow
def test_the_command(prepared, monkeypatch, capsys):
  cfg, _ = prepared
  monkeypatch.setattr(trial, "keep_memory", lambda: None)
  assert trial.main(flags(cfg, "--share=0.5")) == 0
  out = capsys.readouterr().out
  assert [line.split()[:2] for line in out.splitlines()[-6:-1]] == [
    ["ok", name] for name in ("memory", "gradients", "loss", "checkpoint", "data")], out
  assert out.splitlines()[-1].startswith("the whole run: ") and "40 steps of" in out
  # What a step needs where its batch is eight times that of the plan.
  planned = trial.estimate_memory(cfg, 8, on="cpu").peak
  monkeypatch.setattr(trial, "step_bytes", lambda step_fn: 8 * planned)
  assert trial.main(flags(cfg)) == 1
  out = capsys.readouterr().out
  assert "FAILED memory" in out and "loss        not looked at" in out and "the whole run" not in out


def test_the_command_where_the_data_has_changed(prepared, monkeypatch, capsys):
  cfg, data = prepared
  monkeypatch.setattr(trial, "keep_memory", lambda: None)
  manifest = data.sources[0].folder / "manifest.json"
  whole = manifest.read_text()
  manifest.write_text(whole.replace('"kept"', '"kepd"'))
  assert trial.main(flags(cfg)) == 1
  manifest.write_text(whole)
  out = capsys.readouterr().out
  assert "FAILED data        " in out and "expected sha256" in out and "memory      not looked at" in out
  assert trial.main(flags(cfg, "--share=0")) == 2
  assert "--share=0.0 must be in (0, 1]" in capsys.readouterr().err

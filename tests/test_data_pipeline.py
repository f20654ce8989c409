import collections
import dataclasses
import itertools
import random

import numpy as np
import pytest

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.packing import PACKING
from data.pipeline import Rows, make_batches, val_batches
from data.prepare import documents, prepare
from data.sources import make_text
from tests.test_data_sources import KINDS, TEXTS, write

T, B = 32, 8
silent = lambda line: None


@pytest.fixture(scope="module", params=sorted(PACKING))
def data(request, tmp_path_factory):
  """(prepared, config) of two sources, the second a third of the rows."""
  folder = tmp_path_factory.mktemp("data")
  for i in range(1000, 1040):
    (folder / f"{i}.txt").write_text(make_text(i))
  cfg = DataConfig(
    sources=[
      SourceConfig(name="made", kind="synthetic", documents=150, weight=2.0),
      SourceConfig(name="files", path=f"{folder}/*.txt", weight=1.0),
    ],
    tokenizer=TokenizerConfig(vocab_size=400),
    val_fraction=0.1,
    packing=request.param,
    cache_path=str(folder / "cache"),
  ).validate()
  return prepare(cfg, log=silent), cfg


@pytest.fixture(scope="module")
def rows(data):
  prepared, cfg = data
  return Rows(prepared, cfg, seq_len=T, batch_size=B, seed=1)


def take(iterator, n):
  return list(itertools.islice(iterator, n))


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name])
      assert x[name].dtype == y[name].dtype


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_any_number_of_hosts_sees_the_same_batches(rows, hosts):
  whole = take(make_batches(rows, start_step=0, slots=range(B), prefetch=2), 30)
  each = B // hosts
  parts = [
    take(make_batches(rows, start_step=0, slots=range(h * each, (h + 1) * each), prefetch=2), 30)
    for h in range(hosts)
  ]
  together = [
    {name: np.concatenate([p[name] for p in step]) for name in step[0]} for step in zip(*parts)
  ]
  assert_same(together, whole)


def test_slots_may_come_in_any_order(rows):
  slots = [5, 0, 3]
  batch = next(make_batches(rows, start_step=4, slots=slots, prefetch=1))
  for i, slot in enumerate(slots):
    np.testing.assert_array_equal(batch["tokens"][i], rows.row(4, slot)["tokens"])


def test_a_restart_at_any_step_gives_the_same_batches(data, rows):
  prepared, cfg = data
  whole = take(make_batches(rows, start_step=0, slots=range(B), prefetch=2), 100)
  for step in random.Random(0).sample(range(97), 20):
    fresh = Rows(prepared, cfg, seq_len=T, batch_size=B, seed=1)
    assert_same(
      take(make_batches(fresh, start_step=step, slots=range(B), prefetch=2), 3),
      whole[step : step + 3],
    )


def test_the_seed_changes_the_rows(data, rows):
  prepared, cfg = data
  other = Rows(prepared, cfg, seq_len=T, batch_size=B, seed=2)
  assert [other.address(0, s) for s in range(B)] != [rows.address(0, s) for s in range(B)]


def test_an_address_is_where_the_tokens_come_from(data, rows):
  """Each row, rebuilt from the texts by its address alone."""
  prepared, _ = data
  texts = {(source, key): text for source, key, text in documents(prepared, "train")}
  tokenizer = prepared.tokenizer
  for step, slot in itertools.product(range(0, 60, 7), range(B)):
    row, at = rows.row(step, slot), 0
    for segment, (source, key, start, stop) in enumerate(rows.address(step, slot), start=1):
      ids = [tokenizer.bos_id, *tokenizer.encode(texts[source, key]), tokenizer.eos_id]
      here = slice(at, at + stop - start)
      assert row["tokens"][here].tolist() == ids[start:stop]
      assert row["targets"][here].tolist() == ids[start + 1:stop + 1]
      assert row["positions"][here].tolist() == list(range(stop - start))
      assert set(row["segments"][here]) == {segment} and set(row["weights"][here]) == {1}
      at += stop - start
    assert not row["segments"][at:].any() and not row["weights"][at:].any()


def test_an_epoch_trains_every_token_but_the_first_of_each_document_once(data, rows):
  prepared, _ = data
  epochs = {name: e.n_rows for name, e in zip(rows.names, rows.sources)}
  want = {
    name: collections.Counter(
      (d, i) for d, n in enumerate(e.source.lengths("train")) for i in range(1, n)
    )
    for name, e in zip(rows.names, rows.sources)
  }
  seen, orders = (
    collections.defaultdict(lambda: collections.defaultdict(list)),
    collections.defaultdict(list),
  )
  for number in range(3 * sum(epochs.values())):
    i, n = rows.mixture.locate(number)
    name = rows.names[i]
    pieces = rows.sources[i].pieces(n)
    seen[name][n // epochs[name]] += [
      (d, j + 1) for d, start, length in pieces for j in range(start, start + length)
    ]
    orders[name, n // epochs[name]].append(tuple(pieces))
  for name in rows.names:
    for epoch in (0, 1):  # Both are complete for both sources.
      assert collections.Counter(seen[name][epoch]) == want[name]
    assert orders[name, 0] != orders[name, 1]
    assert set(orders[name, 0]) != set(orders[name, 1])  # Documents meet others.


def test_sources_take_turns_by_weight(rows):
  drawn = collections.Counter(
    rows.address(step, slot)[0].source for step in range(500) for slot in range(B)
  )
  assert abs(drawn["made"] / (500 * B) - 2 / 3) < 0.005


def test_temperature(data):
  prepared, cfg = data
  cfg = dataclasses.replace(cfg, sources=[dataclasses.replace(s, weight=None) for s in cfg.sources])
  sizes = np.array([s.count("train", "tokens") for s in prepared.sources], float)
  for temperature in (1.0, 2.0, 1e9):
    shares = (
      Rows(prepared, dataclasses.replace(cfg, temperature=temperature), seq_len=T, batch_size=B)
      .mixture.stages[0]
      .shares
    )
    np.testing.assert_allclose(shares, sizes**(1 / temperature) / (sizes**(1 / temperature)).sum())


def test_weights_change_at_a_step(data):
  prepared, cfg = data
  cfg = dataclasses.replace(cfg, weights_from_step=((3, (0.0, 1.0)), (5, (1.0, 0.0))))
  rows = Rows(prepared, cfg, seq_len=T, batch_size=B)
  names = [{rows.address(step, slot)[0].source for slot in range(B)} for step in range(7)]
  assert names[3:] == [{"files"}, {"files"}, {"made"}, {"made"}] and "made" in names[2]


def test_max_epochs_is_refused_before_the_run(data, rows):
  prepared, cfg = data
  limited = dataclasses.replace(
    cfg, sources=[cfg.sources[0], dataclasses.replace(cfg.sources[1], max_epochs=2.0)]
  )
  n_rows = rows.sources[1].n_rows
  with pytest.raises(
    ValueError, match=f"files: max_epochs=2.0 of its {n_rows} rows .* nearest valid steps: "
  ) as error:
    Rows(prepared, limited, seq_len=T, batch_size=B, seed=1, steps=10_000)
  nearest = int(str(error.value).rpartition(" ")[2])
  Rows(prepared, limited, seq_len=T, batch_size=B, seed=1, steps=nearest)
  with pytest.raises(ValueError, match="max_epochs"):
    Rows(prepared, limited, seq_len=T, batch_size=B, seed=1, steps=nearest + 1)
  assert (
    rows.mixture.counts(nearest * B)[1] <= 2 * n_rows < rows.mixture.counts((nearest + 1) * B)[1]
  )


def test_validation_counts_the_bytes_of_the_text(data):
  prepared, cfg = data
  rows = Rows(prepared, cfg, seq_len=T, batch_size=B, split="val")
  batches = list(val_batches(rows, slots=range(B)))
  assert sum(int(b["bytes"].sum()) for b in batches) == prepared.count("val", "bytes")
  assert sum(b["weights"].sum() for b in batches) == (prepared.count("val", "tokens")
                                                      - prepared.count("val", "documents"))
  assert len(batches) == -(-len(rows) // B) and {b["tokens"].shape for b in batches} == {(B, T)}
  train = {text for _, _, text in documents(prepared, "train")}
  assert not [text for _, _, text in documents(prepared, "val") if text in train]


def test_validation_is_the_same_for_all_hosts_seeds_and_batch_sizes(data):
  prepared, cfg = data
  one = Rows(prepared, cfg, seq_len=T, batch_size=B, split="val", seed=0)
  two = Rows(prepared, cfg, seq_len=T, batch_size=4, split="val", seed=5)
  in_order = lambda batches: [
    row for b in batches for row in b["tokens"][b["weights"].any(1)].tolist()
  ]
  for limit in (None, 1, 13):
    whole = list(val_batches(one, slots=range(B), limit=limit))
    halves = zip(
      val_batches(one, slots=range(4), limit=limit),
      val_batches(one, slots=range(4, B), limit=limit),
    )
    assert_same(
      [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in halves], whole
    )
    assert in_order(whole) == in_order(val_batches(two, slots=range(4), limit=limit))
    assert len(in_order(whole)) == (limit or len(one))


def test_an_empty_split_is_refused(data):
  prepared, cfg = data
  cfg = dataclasses.replace(cfg, val_fraction=0.0)
  with pytest.raises(ValueError, match="val split has no documents"):
    Rows(prepare(cfg, log=silent), cfg, seq_len=T, batch_size=B, split="val")
  with pytest.raises(ValueError, match="slot 8 is not in"):
    Rows(prepared, cfg, seq_len=T, batch_size=B).row(0, 8)


def test_every_kind_of_source_gives_the_same_rows(tmp_path):
  """The same texts, stored in every way: equal bytes of every row."""
  cfg = DataConfig(sources=[SourceConfig(name="text", **write("text", tmp_path, TEXTS))],
                   tokenizer=TokenizerConfig(vocab_size=350), cache_path=str(tmp_path / "cache"))
  cfg.tokenizer.path = prepare(cfg, log=silent).tokenizer_path
  batches = {}
  for kind in KINDS:
    (tmp_path / kind).mkdir()
    cfg.sources = [SourceConfig(name="text", **write(kind, tmp_path / kind, TEXTS))]
    rows = Rows(prepare(cfg, log=silent), cfg, seq_len=T, batch_size=B)
    batches[kind] = take(make_batches(rows, start_step=0, slots=range(B), prefetch=2), 20)
  for kind in KINDS:
    assert_same(batches[kind], batches["text"])

"""metrics.jsonl to the last bit, what follows it (W&B, TensorBoard), the live display, MFU."""
import importlib.util
import io
import json
import math
import os
import struct
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig
from model.count import flops_per_token
from train import metrics
from train.config import LogConfig, TrainConfig
from train.metrics import MetricsWriter, Progress, read_metrics

FAKE_WANDB = '''
import json, os, time
BEHAVIOUR = os.environ["FAKE_WANDB"]
class Run:
  def __init__(self, **settings):
    self.out = open(os.path.join(settings["dir"], "fake.jsonl"), "a")
    self.write(settings)
  def write(self, thing):
    print(json.dumps(thing), file=self.out, flush=True)
  def define_metric(self, *args, **kwargs): pass
  def log(self, values): self.write(values)
  def finish(self): self.write("finish")
def init(**settings):
  if BEHAVIOUR == "raise":
    raise ConnectionError("no route to host")
  if BEHAVIOUR == "hang":
    time.sleep(60)
  return Run(**settings)
'''


def lines_of(first, last):
  for step in range(first, last + 1):
    yield step, {"loss": math.sin(step) / 3, "lr": 1e-3 / step, "data_wait_ms": 0.1}
    if step % 5 == 0:
      yield step, {"eval/val/loss": math.cos(step), "eval/val/bpb": 1 / 3}


def write(run_dir, lines, log=None, truncate=None):
  with MetricsWriter(run_dir, log or LogConfig()) as writer:
    if truncate is not None:
      writer.truncate_after(truncate)
    for step, values in lines:
      writer.write(step, values)
  return (run_dir / "metrics.jsonl").read_bytes()


def test_floats_keep_every_bit_and_the_file_is_strict_json(tmp_path):
  values = {"loss": 0.1 + 0.2, "f32": np.float32(0.1), "jax": jnp.float32(1 / 3), "n": np.int64(7),
            "inf": -math.inf, "big": math.inf, "nan": jnp.nan * jnp.ones(()), "none": None, "text": "a",
            "tiny": 5e-324}
  text = write(tmp_path, [(np.int32(3), values)])

  def refuse(name):
    raise AssertionError(f"{name} is not JSON")
  raw = json.loads(text, parse_constant=refuse)
  assert (raw["inf"], raw["big"], raw["nan"]) == ("-Infinity", "Infinity", "NaN")
  line, = read_metrics(tmp_path / "metrics.jsonl")
  assert line["step"] == 3 and line["loss"] == 0.1 + 0.2 and line["tiny"] == 5e-324 and line["n"] == 7
  assert np.float32(line["f32"]) == np.float32(0.1) and np.float32(line["jax"]) == np.float32(1 / 3)
  assert line["inf"] == -math.inf and line["big"] == math.inf and math.isnan(line["nan"])
  assert line["none"] is None and line["text"] == "a"


def test_every_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
  writer = MetricsWriter(tmp_path, LogConfig())
  for n, (step, values) in enumerate(lines_of(1, 7), 1):
    writer.write(step, values)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == n
  writer.close()


@pytest.mark.parametrize("restored", [0, 4, 5, 9])
@pytest.mark.parametrize("torn", [b"", b'{"step": 10, "lo', b'{"step": 3, "loss": 0.1}'])
def test_a_resumed_file_equals_an_uninterrupted_one(restored, torn, tmp_path):
  whole = write(tmp_path / "whole", lines_of(1, 12))
  killed = tmp_path / "killed"
  write(killed, lines_of(1, 9))
  with open(killed / "metrics.jsonl", "ab") as f:
    f.write(torn)
  assert write(killed, lines_of(restored + 1, 12), truncate=restored) == whole
  assert os.listdir(killed) == ["metrics.jsonl"]


def test_opening_a_torn_file_does_not_glue_lines_together(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
  assert [line["step"] for line in read_metrics(path)] == [1]
  write(tmp_path, [(2, {"loss": 1.0})])
  assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_a_kill_while_truncating_leaves_the_old_file(tmp_path, monkeypatch):
  before = write(tmp_path, lines_of(1, 9))
  monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
  with pytest.raises(KeyboardInterrupt):
    MetricsWriter(tmp_path, LogConfig()).truncate_after(3)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1]\n", b'{"loss": 1}\n'])
def test_a_line_that_is_not_metrics_is_named(line, tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1}\n' + line)
  with pytest.raises(ValueError, match="metrics.jsonl:2 is not a line of metrics"):
    read_metrics(path)


def test_other_processes_write_nothing(tmp_path, capsys):
  with MetricsWriter(tmp_path, LogConfig(), primary=False) as writer, Progress(2, primary=False) as progress:
    writer.truncate_after(0)
    writer.write(1, {"loss": 1.0})
    progress.update(1, {"loss": 1.0, "eval/val/loss": 1.0})
    progress.note("x")
  assert not os.listdir(tmp_path) and capsys.readouterr().out == ""


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
  folder = tmp_path / "modules"
  folder.mkdir()
  (folder / "wandb.py").write_text(FAKE_WANDB)
  monkeypatch.setenv("PYTHONPATH", str(folder))
  return lambda behaviour: monkeypatch.setenv("FAKE_WANDB", behaviour)


def test_wandb_gets_every_line_once_over_two_runs(tmp_path, fake_wandb):
  fake_wandb("work")
  run_dir = tmp_path / "run"
  run_dir.mkdir()
  (run_dir / "config.json").write_text(json.dumps({"config": {"steps": 3}}))
  log = LogConfig(wandb="online", wandb_project="p")
  write(run_dir, [*lines_of(1, 6), (7, {"loss": math.nan, "mfu": None})], log)
  write(run_dir, lines_of(6, 8), log, truncate=5)
  first, *rest = [json.loads(line) for line in (run_dir / "fake.jsonl").read_text().splitlines()]
  assert [first[k] for k in ("project", "name", "mode", "config")] == ["p", "run", "online", {"steps": 3}]
  end = rest.index("finish")
  again = rest[end + 1]
  assert again["id"] == first["id"] and again["resume"] == "allow" and rest[-1] == "finish"
  assert [line["step"] for line in rest[:end]] == [1, 2, 3, 4, 5, 5, 6, 7]
  assert math.isnan(rest[end - 1]["loss"]) and "mfu" not in rest[end - 1]
  assert [line["step"] for line in rest[end + 2:-1]] == [6, 7, 8]
  assert rest[1] == {"step": 2, **dict(lines_of(2, 2))[2]}


def test_a_failing_wandb_is_said_once_and_stops_nothing(tmp_path, fake_wandb, capfd):
  fake_wandb("raise")
  with MetricsWriter(tmp_path, LogConfig(wandb="online")) as writer:
    writer.write(1, {"loss": 1.0})
    writer._wandb.wait(timeout=30)
    for step in range(2, 6):
      writer.write(step, {"loss": 1.0})
  error = capfd.readouterr().err
  assert error.count("WARNING: wandb has stopped: ConnectionError: no route to host") == 1
  assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5


def test_a_hanging_wandb_slows_no_step_and_not_the_end(tmp_path, fake_wandb, capfd, monkeypatch):
  fake_wandb("hang")
  monkeypatch.setattr(metrics, "WANDB_WAIT_S", 0.2)
  writer = MetricsWriter(tmp_path, LogConfig(wandb="online"))
  writer.write(1, {"loss": 1.0})
  child, slowest = writer._wandb, 0
  for step in range(2, 200):
    start = time.perf_counter()
    writer.write(step, {"loss": 1.0})
    slowest = max(slowest, time.perf_counter() - start)
  start = time.perf_counter()
  writer.close()
  assert slowest < 0.5 and time.perf_counter() - start < 2
  assert "wandb sync" in capfd.readouterr().err
  child.kill()
  child.wait()


def test_the_real_wandb_works_offline(tmp_path):
  write(tmp_path / "run", lines_of(1, 6), LogConfig(wandb="offline"))
  record, = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
  assert b"eval/val/bpb" in record.read_bytes()


def test_tensorboard_gets_the_numbers(tmp_path):
  from tensorboardX.proto import event_pb2
  write(tmp_path, lines_of(1, 5), LogConfig(tensorboard=True))
  write(tmp_path, [(4, {"loss": 9.0, "text": "x", "none": None})], LogConfig(tensorboard=True), truncate=3)
  found, purged = [], []
  for path in sorted((tmp_path / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime):
    data, at = path.read_bytes(), 0
    while at < len(data):  # Records: length, its check sum, an event, its check sum.
      length, = struct.unpack("<Q", data[at:at + 8])
      event = event_pb2.Event.FromString(data[at + 12:at + 12 + length])
      at += 16 + length
      found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
      purged += [event.step] if event.HasField("session_log") else []
  expected = [(s, k, v) for s, values in [*lines_of(1, 5), (4, {"loss": 9.0})] for k, v in values.items()]
  assert sorted((s, k) for s, k, _ in found) == sorted((s, k) for s, k, _ in expected)
  np.testing.assert_allclose(sorted(v for *_, v in found), sorted(v for *_, v in expected), rtol=1e-6)
  assert purged == [4]


def test_loggers_that_are_not_installed_are_named_before_the_run(monkeypatch):
  config = TrainConfig(log=LogConfig(tensorboard=True, wandb="offline"))
  metrics.check_log(config)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r'pip install -e "\.\[tensorboard\]"'):
    metrics.check_log(config)
  config.log.tensorboard = False
  with pytest.raises(ValueError, match="log.wandb='offline' needs wandb"):
    metrics.check_log(config)


# The live display.

class Terminal(io.StringIO):
  def isatty(self):
    return True


def show(stream, steps=120, wait_ms=0.5, **settings):
  with Progress(steps, stream=stream, **settings) as progress:
    for step in range(1, steps + 1):
      progress.update(step, {"loss": 2.0, "tokens_per_s": 45_200, "mfu": 0.41, "step_ms": 10.0,
                             "data_wait_ms": wait_ms})
      if step == 60:
        progress.update(step, {"eval/val/loss": 2.5, "eval/val/bpb": 1.25})
  return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal():
  lines = show(io.StringIO(), wait_ms=0.25).splitlines()
  assert lines[0] == "step 1/120  loss 2.0000  45.2k tokens/s  mfu 41.0%  data wait 2.5%  left 1s"
  assert lines[1] == "step 60  eval/val/loss 2.5000  eval/val/bpb 1.2500"
  assert lines[2:] == ["step 120/120  loss 2.0000  45.2k tokens/s  mfu 41.0%  data wait 2.5%  left 0s"]
  assert len(show(io.StringIO(), every_s=0).splitlines()) == 121


def test_an_interrupted_run_shows_its_last_step():
  stream = io.StringIO()
  with Progress(100, stream=stream) as progress:
    for step in (1, 2, 3):
      progress.update(step, {"loss": 2.0, "mfu": None, "step_ms": 3_725_000 / 97})
  last = stream.getvalue().splitlines()[-1]
  assert "step 3/100" in last and "mfu n/a" in last and "left 1h02m" in last


def test_a_bar_on_a_terminal():
  text = show(Terminal())
  for part in ("━", "step 120/120", "loss", "45.2k tokens/s", "mfu 41.0%", "data wait 5.0%",
               "last evaluation  val/loss 2.5000  val/bpb 1.2500"):
    assert part in text, part


@pytest.mark.parametrize("steps, wait_ms, warnings", [
  (49, 5.0, 0), (60, 0.5, 0), (60, 0.6, 1), (1040, 5.0, 1), (1050, 5.0, 2)])
def test_a_slow_loader_is_named(steps, wait_ms, warnings):
  text = show(io.StringIO(), steps=steps, wait_ms=wait_ms)
  assert text.count("WARNING: the loader is the bottleneck") == warnings


# MFU.

SHAPES = [
  {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2},
  {"d_model": 96, "n_heads": 3, "n_layers": 1, "ffn": "gelu"},
  {"d_model": 128, "n_heads": 8, "n_kv_heads": 1, "n_layers": 3, "d_ff": 200},
  {"d_model": 64, "n_heads": 2, "head_dim": 48},
  {"d_model": 64, "n_heads": 4, "window": 16, "layer_pattern": ("local", "global")},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flops_are_those_that_xla_counts_in_the_matrix_products(shape):
  """Of a decoder written out here; XLA counts masked pairs too, so the attention is compared apart."""
  m = ModelConfig(vocab_size=1000, **shape).validate()
  seq_len = 256
  gated = m.ffn == "swiglu"
  d, n, k, h, f = m.d_model, m.n_heads, m.n_kv_heads, m.head_dim, m.d_ff
  weights = {"q": (d, n * h), "k": (d, k * h), "v": (d, k * h), "o": (n * h, d), "up": (d, f), "down": (f, d)}
  weights |= {"gate": (d, f)} if gated else {}

  def products(x_TD, w, head_DV):
    for _ in range(m.n_layers):
      x_TD = (x_TD @ w["q"] + 0 * (x_TD @ w["k"]).sum() + 0 * (x_TD @ w["v"]).sum()) @ w["o"]
      up = x_TD @ w["up"] + (x_TD @ w["gate"] if gated else 0)
      x_TD = up @ w["down"]
    return x_TD @ head_DV

  def pairs(q_TNH):
    return jnp.einsum("NTS,SNH->TNH", jnp.einsum("TNH,SNH->NTS", q_TNH, q_TNH), q_TNH)

  def count(f, *shapes):
    is_shape = lambda s: isinstance(s, tuple) and isinstance(s[0], int)
    arrays = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=is_shape)
    return jax.jit(f).lower(*arrays).cost_analysis()["flops"]
  dense = count(products, (seq_len, d), weights, (d, m.padded_vocab_size))
  allowed = sum(min(t, w or seq_len) for w in m.windows for t in range(1, seq_len + 1)) / len(m.windows)
  attention = m.n_layers * count(pairs, (seq_len, n, h)) * allowed / seq_len ** 2
  n_params = m.n_layers * sum(a * b for a, b in weights.values()) + 2 * m.padded_vocab_size * d
  ours = flops_per_token(m, seq_len, n_params) * seq_len
  assert ours == pytest.approx(3 * (dense + attention), rel=0.02)
  m.head = "tied"
  tied = flops_per_token(m, seq_len, n_params - m.padded_vocab_size * d) * seq_len
  assert tied == ours


def test_mfu_says_its_convention_and_its_peak():
  class Device:
    device_kind, platform, process_index = "TPU v4", "tpu", 0
  peak, source = metrics.peak_flops([Device()] * 4)
  assert peak == 4 * 275e12 and source == "4 x TPU v4 at 275 TFLOP/s (bf16, data sheet)"
  assert metrics.mfu(550e12, peak) == 0.5
  Device.device_kind = "TPU v9"
  peak, source = metrics.peak_flops([Device()])
  assert metrics.mfu(1e12, peak) is None and "unknown peak for 'TPU v9'" in source
  assert metrics.describe_mfu("x") == f"mfu(convention={metrics.MFU_CONVENTION!r}, peak=x)"


def test_the_cpu_peak_is_one_machine_whatever_the_number_of_devices():
  peak, source = metrics.peak_flops(jax.devices("cpu"))
  assert 1e8 < peak < 1e14 and source.startswith("1 x CPU at")

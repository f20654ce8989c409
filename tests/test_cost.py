"""What it costs: the sums by hand, and the machine's own limits."""
import re

import pytest

from configs import dense_8b
from experiments import cost
from experiments.cost import bill, break_even, serve
from model.count import cache_bytes
from train.chips import CHIP
from train.roofline import EFFICIENCY, estimate_step

V5E, EIGHT_B = CHIP["v5e"], "--config=configs/dense_8b.py"


def said(capsys, *args):
  assert cost.main(list(args)) == 0
  return capsys.readouterr().out


def test_a_worked_example(capsys):
  """0.027 a request of an API, 720 a month for a machine of one's own."""
  assert round(break_even(720, 0.027)) == 26_667
  text = said(capsys, "serve", "--config=configs/tiny.py", "--chip=v5e", "--n=1", "--price_per_chip_hour=1",
              "--api_price_per_request=0.027")
  assert "an API at 0.027 a request costs as much at 26,667 requests a month\n" in text


def test_a_million_requests_cost_what_one_costs_a_million_times(capsys):
  """1000 tokens in at 3 a million, 1600 out at 15: 0.027."""
  text = said(capsys, "serve", "--config=configs/tiny.py", "--chip=v5e", "--n=1", "--price_per_chip_hour=1",
              "--prompt=1000", "--output=1600", "--api_input=3", "--api_output=15")
  assert "an API at 0.027 a request costs as much at 26,667 requests" in text


def test_energy_is_chip_hours_times_watts_times_pue():
  assert bill(1000, 2.0, 500, 1.2) == (1000, 2000, 600)
  assert bill(1000, None, None, 1.1) == (1000, None, None)


def test_training_costs_what_the_dry_run_says(capsys):
  args = "train", EIGHT_B, "--chip=v5p", "--n=64", "--config.mesh.fsdp=64", "--config.steps=3000"
  cfg = dense_8b.get_config()
  cfg.mesh.fsdp, cfg.steps = 64, 3000
  step = estimate_step(cfg.validate(64), CHIP["v5p"], 64)
  hours = step.step_s * 3000 * 64 / 3600
  text = said(capsys, *args, "--price_per_chip_hour=4", "--watts=500", "--pue=1")
  found = [float(x.replace(",", "")) for x in re.search(
    r"([\d.,]+) chip-hours, ([\d.,]+) in money, ([\d.,]+) kWh", text).groups()]
  assert found == pytest.approx([hours, hours * 4, hours * 0.5], rel=1e-3)
  half = said(capsys, *args, f"--mfu={step.mfu / 2}")
  chip_hours = re.search(r"([\d.,]+) chip-hours", half)[1].replace(",", "")
  assert float(chip_hours) == pytest.approx(2 * hours, rel=1e-3)
  assert "does NOT fit" in said(capsys, "train", EIGHT_B, "--chip=v5e", "--n=64", "--config.mesh.fsdp=64")
  assert "energy: not known without --watts" in half


def test_a_copy_of_the_weights_is_served_at_the_chips_limits():
  cfg = dense_8b.get_config().validate()
  found = serve(cfg, V5E, 4, prompt=1000, output=200, batch=1)
  assert found.weights == pytest.approx(2 * 8.03e9, rel=0.01)
  assert found.request == cache_bytes(cfg.model, 1200) == 1200 * 32 * 2 * 8 * 128 * 2
  read = found.weights - 2 * cfg.model.padded_vocab_size * cfg.model.d_model + cache_bytes(cfg.model, 1100)
  assert found.output_rate == pytest.approx(4 * EFFICIENCY * V5E.hbm_bandwidth / read)
  assert found.input_rate == pytest.approx(4 * EFFICIENCY * 197e12 / 2 / 7.5e9, rel=0.05)
  many = serve(cfg, V5E, 4, prompt=1000, output=200, batch=None)
  assert many.batch == 64 and 30 * found.output_rate < many.output_rate < 64 * found.output_rate
  most = int((4 * V5E.hbm_bytes - found.weights) / found.request)
  serve(cfg, V5E, 4, prompt=1000, output=200, batch=most)
  with pytest.raises(ValueError, match="nearest valid: --n=5"):
    serve(cfg, V5E, 4, prompt=1000, output=200, batch=most + 1)


def test_measured_rates_are_taken(capsys):
  text = said(capsys, "serve", EIGHT_B, "--chip=v5e", "--n=4", "--price_per_chip_hour=1.2", "--watts=200",
              "--output_tokens_per_s=1000", "--input_tokens_per_s=1e4", "--pue=1.5")
  assert "output: 1,000 tokens/s, 250 a chip (given)" in text
  assert "1M tokens: 1.111 chip-hours, 1.333 in money, 0.3333 kWh" in text
  assert "a request: 300 ms of the machine" in text and "for up to 8,640,000 requests" in text
  dear = said(capsys, "serve", EIGHT_B, "--chip=v5e", "--n=4", "--price_per_chip_hour=1.2",
              "--output_tokens_per_s=1000", "--input_tokens_per_s=1e4", "--api_price_per_request=0.0001")
  assert "34,560,000 requests a month, more than this machine answers: the API is cheaper by 4 times" in dear


@pytest.mark.parametrize("args, words", [
  (["train", "--n=4"], "--chip and --n say on what"), (["train", "--chip=v8", "--n=4"], "known: v4"),
  (["train", "--chip=v5e", "--n=4", "--mfu=40"], "share of the peak"),
  (["train", "--chip=v5e", "--n=4", "--watts=-3"], "--watts=-3 must be a number above 0"),
  (["serve", "--chip=v5e", "--n=4", "--api_input=1", "--price_per_chip_hour=1"], "of 1M tokens"),
  (["serve", "--chip=v5e", "--n=4", "--api_price_per_request=1"], "give --price_per_chip_hour")])
def test_mistakes_exit_with_2(args, words, capsys):
  assert cost.main([args[0], "--config=configs/tiny.py", *args[1:]]) == 2
  assert words in capsys.readouterr().err

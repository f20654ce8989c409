"""Whatever is combined is refused by name, or the train step traces."""
import dataclasses
import math
import random

import pytest

from model.sharding import TRAIN, abstract_mesh
from model.transformer import check_names
from tests.parallel import factorisations
from tests.tiny import trace_step
from train.config import MeshConfig, TrainConfig

SETTINGS = {  # Setting -> what it may be; some are often wrong together.
  "batch_size": (8, 12, 16, 32, 32, 32), "seq_len": (24, 48, 64, 64, 64), "accum_steps": (1, 1, 1, 1, 2),
  "data.tokenizer.vocab_size": (256, 300), "model.n_heads": (2, 4, 8, 8, 8, 16, 6),
  "model.n_kv_heads": (None, None, 1, 2, 4), "model.head_dim": (None, 8),
  "model.d_model": (32, 64, 64, 64, 96), "model.n_layers": (2, 4, 8, 8, 8, 6),
  "model.window": (None, None, 5, 9), "model.attention_impl": ("plain", "dot_product", *["chunked"] * 4),
  "model.context": ("gather", "gather", "ring", "zigzag", "ulysses"),
  "model.remat": ("none", "full", "dots", "outputs"), "model.ffn": ("swiglu", "gelu", "moe", "moe"),
  "model.head": ("untied", "tied"), "model.norm_position": ("pre", "post", "both"),
  "model.pipeline_microbatches": (None, None, 2, 4), "model.pipeline_repeats": (1, 1, 1, 1, 2),
}
MIXTURE = {
  "model.n_experts": (4, 8, 8, 8), "model.n_experts_per_token": (1, 2, 2), "model.d_expert": (None, 16, 32),
  "model.n_shared_experts": (0, 1), "model.n_dense_layers": (0, 0, 0, 2),
  "model.router": ("softmax", "sigmoid"), "model.router_bias": (False, True),
  "model.dispatch": ("dropless", "dropless", "capacity", "dense"),
  "model.exchange": ("gather", "gather", "ragged", "all_to_all"), "model.n_expert_groups": (None, None, 2),
}
RULES = {
  "residual": ("seq", "tensor"), "embed": (), "gradient": (), "moment": (), "loss_length": ("seq",),
  "batch": ("data", "fsdp"), "vocab": (), "experts": ("expert", "tensor"), "mlp": (), "heads": (),
  "kv_heads": (),
}
MESHES = [sizes for n in (1, 2, 4, 8, 16) for sizes in factorisations(n)]


def draw(seed) -> tuple[TrainConfig, dict]:
  """(a run's config, its mesh)."""
  rng = random.Random(seed)
  cfg, sizes = TrainConfig(steps=3, loss_chunk=32), rng.choice(MESHES)
  cfg.optim.warmup_steps, cfg.data.sources[0].kind, cfg.model.precision = 1, "synthetic", "fp32"
  cfg.mesh = MeshConfig(**({"fsdp": 1} | sizes))

  def choose(settings):
    for name, values in settings.items():
      *path, last = name.split(".")
      place = cfg
      for part in path:
        place = getattr(place, part)
      setattr(place, last, rng.choice(values))

  choose(SETTINGS)
  m = cfg.model
  m.layer_pattern = ("local", "global") if m.window and rng.random() < 0.5 else None
  if m.ffn == "moe":
    choose(MIXTURE)
    m.n_groups_per_token = m.n_expert_groups and rng.choice((1, 2))
  m.rules = dataclasses.replace(TRAIN, **{name: axes for name, axes in RULES.items() if rng.random() < 0.04})
  return cfg, sizes


def check(seed) -> bool:
  """Whether it was refused."""
  cfg, sizes = draw(seed)
  try:
    cfg.validate(math.prod(sizes.values()))
    check_names(cfg.model)
  except ValueError as e:
    assert "nearest valid" in str(e) and "=" in str(e), e
    return True
  _, (_, metrics) = trace_step(cfg, abstract_mesh(**sizes))
  assert metrics["loss"].shape == ()
  return False


def test_some_combinations():
  refused = [check(seed) for seed in range(24)]
  assert 6 < sum(refused) < 18  # Both happen.


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24, 424, 40))
def test_many_combinations(seed):
  for one in range(seed, seed + 40):
    check(one)

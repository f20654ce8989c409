"""The shapes of configs/named.py against the numbers of parameters that their authors' checkpoints have."""
import math

import jax
import pytest

from configs.named import NAMED, get_config
from model.sharding import abstract_mesh
from model.transformer import abstract_params, check_names

PARAMETERS = {
  "smollm2-135m": 134_515_008, "llama-2-7b": 6_738_415_616, "llama-3.1-8b": 8_030_261_248,
  "llama-3.1-70b": 70_553_706_496, "mistral-7b": 7_241_732_096, "qwen2-7b": 7_615_616_512,
  "qwen3-8b": 8_190_735_360, "qwen3-30b-a3b": 30_532_122_624, "gemma-2-9b": 9_241_705_984,
  "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952, "olmo-2-7b": 7_298_617_344, "gpt2": 124_439_808,
  "phi-3-mini": 3_821_079_552, "mixtral-8x7b": 46_702_792_704, "deepseek-v2-lite": 15_706_484_224,
  "deepseek-v3": 671_026_419_200,
}


@pytest.mark.parametrize("name", NAMED)
def test_parameters(name):
  cfg = get_config(name).validate().model
  check_names(cfg)
  _, params = abstract_params(cfg, abstract_mesh(data=1))
  tables = 1 if cfg.head == "tied" else 2
  padding = (cfg.padded_vocab_size - cfg.vocab_size) * cfg.d_model * tables
  assert sum(math.prod(a.shape) for a in jax.tree.leaves(params)) - padding == PARAMETERS[name]


def test_an_unknown_name_lists_them():
  with pytest.raises(ValueError, match="configs/named.py:qwen3-8b"):
    get_config("qwen")

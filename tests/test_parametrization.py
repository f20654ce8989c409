"""muP against Table 3 of Tensor Programs V (arXiv:2203.03466), written out by which dims grow. What it
is for, activations that do not depend on the width: tests/test_coordinates.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.hub.families import FAMILIES, find_lost
from model.parametrization import init_factor, kind_of
from model.sharding import abstract_mesh
from model.transformer import abstract_params, init_params
from tests.tiny import MOE, mesh_of, model_config
from train.config import OptimConfig, TrainConfig
from train.optim import make_optimizer, path_name

MODELS = {
  "dense": dict(qkv_bias=True, out_bias=True, ffn_bias=True, norm="layernorm", qk_norm="rmsnorm"),
  "mixture": MOE | dict(router_bias=True, n_shared_experts=1, n_dense_layers=1, n_layers=3, d_expert=None),
  "learned": dict(positions="learned", max_length=64, ffn="gelu", norm_position="both"),
  "gated": dict(attention="experiments.gated_attention:GatedAttention"),
}
BASE = dict(d_model=16, n_heads=4, n_kv_heads=4, d_ff=32)


def wide(times, **changes):
  """The tiny model, `times` as wide, with more heads of the same size."""
  sizes = {name: size * times for name, size in BASE.items()}
  return model_config(**{**sizes, "head_dim": 4, **changes})


def shapes(cfg):
  tree = abstract_params(cfg, abstract_mesh(data=1))[1]
  return {path_name(path): a.shape for path, a in jax.tree_util.tree_flatten_with_path(tree)[0]}


def table_3(small, large, name):
  """(power of the first standard deviation, of Adam's rate) from which of the dims of a parameter grow."""
  grows = [a != b for a, b in zip(small[name], large[name])]
  if sum(grows) > 1:  # Hidden: variance 1 / fan_in, rate 1 / fan_in.
    return -0.5, -1.0
  vector = len(grows) == 1 + name.startswith(("blocks", "first_blocks")) or name.endswith("bias")
  if not any(grows) or vector or grows[-1]:  # Input and biases: constant.
    return 0.0, 0.0
  return -1.0, -1.0  # Output: variance 1 / fan_in^2, rate 1 / fan_in.


@pytest.mark.parametrize("model", MODELS)
def test_kinds_are_by_the_dims_that_grow(model):
  small, large = (shapes(wide(times, **MODELS[model])) for times in (1, 2))
  powers = {"input": (0.0, 0.0), "vector": (0.0, 0.0), "hidden": (-0.5, -1.0), "output": (-1.0, -1.0)}
  for name in small:
    assert powers[kind_of(name)] == table_3(small, large, name), name


@pytest.mark.parametrize("init", ["normal", "fan_in"])
def test_first_weights_and_rates_are_those_of_table_3(init):
  """From the base to four times its width: what is drawn, and what an optimizer makes of it."""
  mup = dict(MOE, init=init, parametrization="mup", mup_base_width=BASE["d_model"], d_expert=None)
  small, large = wide(1, **mup), wide(4, **mup)
  base, sizes = shapes(small), shapes(large)
  cfg = TrainConfig(model=large, optim=OptimConfig(weight_decay=0.5, grad_clip=None).validate())
  ones = jax.tree.map(lambda a: jnp.ones(a.shape), abstract_params(large, abstract_mesh(data=1))[1])
  tx = make_optimizer(cfg, ones)
  moved = flat(tx.update(ones, tx.init(ones), ones)[0])
  for name in base:
    std, rate = table_3(base, sizes, name)
    drawn = init_factor(large, name) * (4**-0.5 if init == "fan_in" and std else 1.0)  # By what INIT does.
    assert init_factor(small, name) == 1.0 and drawn == pytest.approx(4**std), name
    decay = 0.0 if "norm" in name else 0.5  # Of all widths the same.
    np.testing.assert_allclose(moved[name], 4**rate + decay, rtol=1e-5, err_msg=name)


def flat(tree):
  return {path_name(path): np.asarray(a) for path, a in jax.tree_util.tree_flatten_with_path(tree)[0]}


def draw(**changes):
  cfg = wide(2, n_layers=1, **changes)
  with jax.set_mesh(mesh_of("one")):
    return cfg, flat(init_params(cfg, mesh_of("one"), jax.random.key(0))[1])


def test_what_is_drawn_is_the_standard_times_the_factor():
  _, standard = draw()
  cfg, params = draw(parametrization="mup", mup_base_width=BASE["d_model"] / 2)
  for name, a in standard.items():
    np.testing.assert_allclose(params[name], a * init_factor(cfg, name), rtol=1e-6, err_msg=name)


def test_at_the_base_width_nothing_is_added():
  mup = dict(parametrization="mup", mup_base_width=2 * BASE["d_model"])
  params = {"unembed": jnp.ones((4, 8)), "final_norm": {"scale": jnp.ones(4)}}
  states = [make_optimizer(TrainConfig(model=m, optim=OptimConfig().validate()), params).init(params)
            for m in (wide(2), wide(2, **mup))]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
  assert len(make_optimizer(TrainConfig(model=wide(4, **mup), optim=OptimConfig().validate()), params).init(
      params)) == len(states[0]) + 1


@pytest.mark.parametrize("base_head, scale", [(None, 64**-0.5), (64, 64**-0.5), (16, 4 / 64)])
def test_attention_divides_by_the_size_of_a_head(base_head, scale):
  """Relative to the base, so 1 / sqrt where heads are as large as there."""
  cfg = wide(1, head_dim=64, parametrization="mup", mup_base_width=64, mup_base_head_dim=base_head)
  assert cfg.scale == pytest.approx(scale) and cfg.validate().scale == pytest.approx(scale)
  assert find_lost(FAMILIES["llama"], cfg) == ([] if base_head != 16 else [
      "model.attention_scale=0.0625"]), "what others would compute otherwise is not exported"



"""What goes over the wire: the kinds, numbers and sizes of the collectives of the compiled train step.

XLA:CPU compiles them; collectives among one device alone, which other back ends drop, are not counted.
"""
import collections
import dataclasses
import functools
import math

import jax
import pytest

from model.sharding import TRAIN, make_mesh
from tests.test_step import run_config
from tests.tiny import MOE, T, abstract_batch
from train.config import MeshConfig
from train.hlo import collectives
from train.step import abstract_state, init_state, make_train_step

D, F = 32, 128  # Widths of the tiny model.


def train_step(mesh, model=None):
  cfg = run_config(model=dict(n_layers=4) | (model or {}))
  cfg.mesh = MeshConfig(**{"fsdp": 1} | mesh)
  return cfg.validate(8), make_mesh(**mesh)


@functools.cache
def compiled(name):
  cfg, mesh = train_step(*CASES[name])
  graphdef, state = abstract_state(cfg, mesh)
  with jax.set_mesh(mesh):
    step = jax.jit(make_train_step(cfg, graphdef, state.params), donate_argnums=0)
    return step.lower(state, abstract_batch(cfg, mesh)).compile().as_text()


SPLIT_RESIDUAL = dataclasses.replace(TRAIN, residual=("seq", "tensor"))
CASES = {
  "data": (dict(data=8),),
  "fsdp": (dict(fsdp=4, data=2),),
  "tensor": (dict(tensor=4, data=2), dict(n_kv_heads=4)),
  "sequence": (dict(tensor=4, data=2), dict(n_kv_heads=4, rules=SPLIT_RESIDUAL)),
  "ring": (dict(seq=4, data=2), dict(context="ring", attention_impl="chunked", remat="full")),
  "expert": (dict(expert=4, data=2), MOE | dict(dispatch="capacity", exchange="all_to_all", remat="full")),
  "stage": (dict(stage=4, data=2), dict(remat="full")),
}


MATRICES = 7  # Of a layer.
# (kind, whether it is in a loop over the layers) -> how many. "once" means once a step: the tables, the loss,
# the gradient norm, and each row's loss for the log (2 all-gathers of a batch of numbers).
EXPECTED = {
  # All gradients of a layer together, in the backward loop.
  "data": {("all-reduce", "loop"): 1, ("all-reduce", "once"): 1, ("all-gather", "once"): 2},
  # Forward and backward gather each matrix; its gradient is scattered, the slices summed over "data". Norms.
  # Once: the head, gathered and scattered; tokens to the columns of the embedding, what was found there back,
  # and its gradient.
  "fsdp": {("all-gather", "loop"): 2 * MATRICES, ("reduce-scatter", "loop"): MATRICES,
           ("all-reduce", "loop"): 2, ("all-gather", "once"): 1 + 1 + 2, ("reduce-scatter", "once"): 1,
           ("all-to-all", "once"): 2, ("all-reduce", "once"): 3},
  # 2 forward, 2 backward (of the inputs of q, k, v together, and of gate and up), the gradients over "data";
  # the maximum and the sum of the vocabulary-parallel loss.
  "tensor": {("all-reduce", "loop"): 4 + 1 + 2, ("all-reduce", "once"): 5, ("all-gather", "once"): 2},
  # The 2 of the forward pass are halves: scatter after, gather before; and the gathers again backward.
  "sequence": {("reduce-scatter", "loop"): 2, ("all-gather", "loop"): 4,
               ("all-reduce", "loop"): 2 + 1 + 1 + 2, ("all-gather", "once"): 4, ("all-reduce", "once"): 6},
  # Keys, values, positions, segments in each of 3 runs; backward, keys and values take their gradients along.
  "ring": {("collective-permute", "loop"): 22, ("collective-permute", "once"): 2,
           ("all-reduce", "loop"): 3, ("all-gather", "once"): 2, ("all-reduce", "once"): 3},
  # There and back: forward, forward again (remat), backward.
  "expert": {("all-to-all", "loop"): 2 * 3, ("all-reduce", "loop"): 3, ("all-gather", "once"): 2,
             ("all-reduce", "once"): 4},
  # Tokens, positions and segments forward, the gradient of the tokens backward.
  "stage": {("collective-permute", "loop"): 3 + 1, ("all-reduce", "loop"): 1, ("all-gather", "once"): 2 + 1,
            ("all-reduce", "once"): 5},
}


@pytest.mark.parametrize("name", CASES)
def test_kinds_and_numbers(name, capfd):
  found = collectives(compiled(name))
  assert "Involuntary full rematerialization" not in capfd.readouterr().err
  assert collections.Counter((c.kind, "loop" if c.in_loop else "once") for c in found) == EXPECTED[name]


@pytest.mark.parametrize("name", CASES)
def test_no_gather_is_larger_than_one_layers_matrix_or_a_table(name):
  """A gather of the whole stack of layers is what FSDP must never do; without FSDP no parameter is
  gathered."""
  for c in collectives(compiled(name)):
    if c.kind == "all-gather":
      matrices = {(D, 4, 8), (D, 2, 8), (4, 8, D), (D, F), (F, D), (D, 384), (384, D)}
      tokens = [shape for shape in c.shapes if shape[-1:] == (D,) and shape[-2:-1] == (T,)]
      small = [shape for shape in c.shapes if math.prod(shape) <= 8 or c.arrays[0].dtype == "s32"]
      allowed = tokens + small + (list(matrices) if name == "fsdp" else [])
      assert set(c.shapes) <= set(allowed), c


def test_gradients_are_scattered_before_they_are_summed():
  """FSDP inside "data": what goes over the slow axis is a slice."""
  loop = [c for c in collectives(compiled("fsdp")) if c.in_loop]
  assert max(c.largest for c in loop if c.kind == "reduce-scatter") == D * F // 4
  assert max(c.largest for c in loop if c.kind == "all-reduce") == D * F // 4


def test_experts_stay_where_they_are():
  """Tokens travel, by capacity; the experts' matrices are in no collective but the sum of their gradients."""
  for c in collectives(compiled("expert")):
    if any(shape[-2:] in ((D, 24), (24, D)) for shape in c.shapes):
      assert c.kind == "all-reduce" and "psum" in c.name, c


# ZeRO: the bytes that each device holds, against the formula.

ZERO = {0: dict(embed=(), gradient=(), moment=()), 1: dict(embed=(), gradient=()), 2: dict(embed=()), 3: {}}


@pytest.mark.parametrize("stage, rules", ZERO.items())
def test_bytes_of_each_zero_stage(stage, rules):
  cfg, mesh = train_step(dict(fsdp=8), dict(rules=dataclasses.replace(TRAIN, **rules)))
  _, state = init_state(cfg, mesh)
  held = lambda tree: {
      sum(shard.data.nbytes for a in jax.tree.leaves(tree) for shard in a.addressable_shards
          if shard.device == device) for device in jax.devices()}
  whole = sum(a.nbytes for a in jax.tree.leaves(state.params))
  leaves = jax.tree_util.tree_leaves_with_path(state.params)
  norms = sum(a.nbytes for path, a in leaves if "norm" in str(path))
  split = norms + (whole - norms) // 8
  counts = 2 * 4  # Adam's count of steps, and of clipping none: int32.
  assert held(state.params) == {split if stage == 3 else whole}
  moments = 2 * (whole if stage == 0 else split)
  assert all(0 <= n - moments <= counts for n in held(state.opt_state))


@pytest.mark.parametrize("stage, rules", [(stage, ZERO[stage]) for stage in (1, 2)])
def test_zero_gathers_what_it_updated_and_nothing_in_a_layer(stage, rules):
  CASES[f"zero{stage}"] = (dict(fsdp=8), dict(rules=dataclasses.replace(TRAIN, **rules)))
  try:
    found = collectives(compiled(f"zero{stage}"))
  finally:
    del CASES[f"zero{stage}"]
  assert not [c for c in found if c.kind == "all-gather" and c.in_loop]
  gathered = [shape for c in found if c.kind == "all-gather" for shape in c.shapes if math.prod(shape) > 8]
  assert len(gathered) == MATRICES + 2, gathered  # The stacks of new parameters and two tables.

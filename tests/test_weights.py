"""Weights read straight to where decode has them are those of a checkpoint read whole, cast and unstacked."""
import dataclasses
import functools

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from infer.load import cast_params, decode_config
from infer.weights import read_weights
from model.hub.orbax import STATE, CheckpointError, Unread, restore_arrays
from model.transformer import abstract_params, make_unstack, turn_weights
from tests.test_engine import CASES, make_config, params_of
from tests.tiny import MOE, make_params, mesh_of

MORE = {"dense first": {**MOE, "n_layers": 3, "n_dense_layers": 1, "head": "untied"}}


@functools.cache
def saved(case, folder):
  """A checkpoint's folder, with another moving average."""
  params = (make_params(make_config(**MORE[case]), mesh_of("one"))[1] if case in MORE else params_of(case)[2])
  tree = {"params": params, "ema": jax.tree.map(lambda a: a + 1, params)}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as writer:
    writer.save(folder / case / STATE, args=ocp.args.PyTreeSave(tree))
  return folder / case


@pytest.mark.parametrize("case, mesh, which, compute_dtype", [
  *((case, "one", "params", "float32") for case in (*CASES, *MORE)),
  *((case, "all", "params", "float32") for case in ("gqa", "repeats", "dense first")),
  ("dense first", "one", "ema", "bfloat16"), ("moe", "all", "ema", "bfloat16"),
])
@pytest.mark.parametrize("are_turned", [True, False])
def test_weights_are_those_of_the_whole_checkpoint(case, mesh, which, compute_dtype, are_turned,
                                                   tmp_path_factory):
  folder = saved(case, tmp_path_factory.getbasetemp() / "weights")
  mesh, changes = mesh_of(mesh), (CASES | MORE)[case]
  cfg = decode_config(dataclasses.replace(make_config(**changes), compute_dtype=compute_dtype), mesh)
  with jax.set_mesh(mesh):
    graphdef, abstract = abstract_params(cfg, mesh)
    turns = turn_weights(cfg, graphdef, abstract)[1] if are_turned else None
    params = restore_arrays(folder, {which: abstract}, partial=True)[which]
    wanted = make_unstack(cfg, turns)(cast_params(cfg, params))
    shapes = jax.eval_shape(lambda params: make_unstack(cfg, turns)(cast_params(cfg, params)), abstract)
    got = read_weights(cfg, mesh, Unread(abstract, folder, which), shapes, turns)
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(got)):
    assert (a.shape, a.dtype) == (b.shape, b.dtype), path
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim), path
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


def test_what_is_missing_is_an_error(tmp_path):
  """Not zeros: a chunk that is not there would read as those."""
  folder = saved("gqa", tmp_path)
  mesh, cfg = mesh_of("one"), decode_config(make_config(), mesh_of("one"))
  with jax.set_mesh(mesh):
    _, abstract = abstract_params(cfg, mesh)
    shapes = jax.eval_shape(make_unstack(cfg), abstract)
    for file in (folder / STATE).rglob("d/*"):
      file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{folder} cannot be read"):
      read_weights(cfg, mesh, Unread(abstract, folder, "params"), shapes, None)

"""The pipeline against the same layers one after the other, for GPipe and circular schedules."""
import re

import jax
import numpy as np
import pytest
from flax import nnx

from model.pipeline import iterations
from model.sharding import make_mesh
from tests.tiny import make_params, mesh_of, model_config, packed_batch, put
from train.losses import loss_spec, next_token_loss

SCHEDULES = [(2, 4, 1), (4, 4, 1), (4, 8, 2), (8, 8, 1)]  # Stages, micro-batches, repeats.


def gradient_of(repeats, micro, mesh):
  cfg = model_config(n_layers=8, pipeline_repeats=repeats, pipeline_microbatches=micro, remat="full")
  with jax.set_mesh(mesh):
    graphdef, params = make_params(cfg, mesh)
    batch = put(cfg, mesh, packed_batch(b=16))
  spec = loss_spec(cfg, 64, 1e-3)
  loss = lambda params, batch: next_token_loss(spec, nnx.merge(graphdef, params), batch)[0]
  return jax.value_and_grad(loss), params, batch


def lengths_of_scans(jaxpr):
  found = set()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "scan":
      found.add(eqn.params["length"])
    for sub in jax.core.jaxprs_in_params(eqn.params):
      found |= lengths_of_scans(sub)
  return found


@pytest.mark.parametrize("p, m, v", [
  pytest.param(*one, marks=() if one in ((2, 4, 1), (4, 8, 2)) else pytest.mark.slow) for one in SCHEDULES])
def test_equals_the_layers_in_order(p, m, v):
  f, params, batch = gradient_of(v, None, mesh_of("one"))
  with jax.set_mesh(mesh_of("one")):
    want, want_grads = jax.jit(f)(params, batch)
  mesh = make_mesh(stage=p, tensor=2 if (p, m) == (4, 8) else 1, data=-1)
  f, params, batch = gradient_of(v, m, mesh)
  with jax.set_mesh(mesh):
    compiled = jax.jit(f).lower(params, batch).compile()
    got, grads = compiled(params, batch)
    scans = lengths_of_scans(jax.make_jaxpr(f)(params, batch).jaxpr)
  assert float(got) == pytest.approx(float(want), rel=1e-5)
  for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(want_grads)[0], jax.tree.leaves(grads)):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max(), err_msg=str(path))
  assert m * v + p - 1 in scans and iterations(p, m, v) == m * v + p - 1
  check_hops(compiled.as_text(), mesh)


def check_hops(text, mesh):
  """Whatever is sent goes from a stage to the next one, forward or, for gradients, back."""
  hops = re.findall(r"collective-permute[^\n]*source_target_pairs=\{(\{[^=]*?\})\}", text)
  assert hops
  stage = np.empty(mesh.devices.size, int)
  p = mesh.shape["stage"]
  for s, devices in enumerate(mesh.devices.reshape(p, -1)):
    for device in devices:
      stage[device.id] = s
  # XLA numbers devices by their place in the mesh.
  order = [device.id for device in mesh.devices.reshape(-1)]
  for pairs in hops:
    steps = {(stage[order[int(b)]] - stage[order[int(a)]]) % p
             for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs)}
    assert steps in ({1}, {p - 1}), pairs


def test_each_stage_holds_its_own_layers():
  """Of p stages each holds 1 / p of the layers' parameters: by chunks dealt out in turns when they repeat."""
  mesh = make_mesh(stage=4, data=2)
  _, params, _ = gradient_of(2, 4, mesh)
  wq = params["blocks"]["0"]["attention"]["wq"]
  one = gradient_of(2, None, mesh_of("one"))[1]["blocks"]["0"]["attention"]["wq"]
  assert wq.shape[:2] == (2, 4) and np.array_equal(wq, one)
  for shard in wq.addressable_shards:
    stage = shard.index[1].start
    np.testing.assert_array_equal(shard.data[:, 0], np.asarray(one)[:, stage])

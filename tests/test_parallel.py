"""Every mesh computes the same numbers: all factorisations of 8 devices, times four models.

The quick subset runs with the other tests. The whole, and the table in the README:

  python -m tests.test_parallel [--model=dense] [--mesh=fsdp=2,seq=4] [--readme]

A killed run goes on where it was, as long as the sources of the step are the same; several processes, each
with its --model, may share the work.
"""
import argparse
import dataclasses
import itertools
import time

import jax
import numpy as np
import pytest

from model import layers, moe
from model.sharding import MESH_AXES, abstract_mesh
from tests import conftest  # noqa: F401 - 8 devices, for the command too.
from tests.parallel import (
    LIMITS,
    MODELS,
    REPRESENTATIVE,
    STEPS,
    Results,
    cell,
    factorisations,
    faults,
    flat,
    mesh_name,
    one_device,
    parse_mesh,
    run_config,
    same_as,
    short,
    table,
    write_readme,
)
from train import losses
from train.step import abstract_state

# Every axis, every pair of axes, every model, and an axis of 4.
QUICK = (
  ("dense", "data=2,fsdp=2,tensor=2"),
  ("dense", "stage=2,fsdp=2,seq=2"),
  ("windowed + GQA", "stage=2,data=2,seq=2"),
  ("MoE softmax", "data=2,fsdp=2,expert=2"),
  ("MoE softmax", "expert=2,seq=2,tensor=2"),
  ("MoE sigmoid", "stage=2,expert=2,tensor=2"),
  ("MoE sigmoid", "expert=4,seq=2"),
)
ALL = [(model, mesh_name(sizes)) for sizes in factorisations() for model in MODELS
       if not same_as(model, sizes)]


def check(model, mesh):
  measures = cell(model, parse_mesh(mesh))
  assert not faults(measures), "; ".join(faults(measures))


@pytest.mark.parametrize("model, mesh", QUICK)
def test_some_meshes_compute_the_same_numbers(model, mesh):
  check(model, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("model, mesh", [one for one in ALL if one not in QUICK])
def test_every_mesh_computes_the_same_numbers(model, mesh):
  check(model, mesh)


def test_the_quick_subset_covers_models_axes_and_their_pairs():
  assert len(factorisations()) == 56 and set(QUICK) <= set(ALL)
  pairs = {pair for _, mesh in QUICK for pair in itertools.combinations(parse_mesh(mesh), 2)}
  assert pairs == set(itertools.combinations(MESH_AXES, 2))
  assert {model for model, _ in QUICK} == set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_there_is_something_to_compare(model):
  """Every array has a gradient, and moves by far more than the limit; every router's bias moves."""
  state, numbers = one_device(model)
  assert numbers.gradient.keys() == numbers.parameters.keys()
  assert all(np.linalg.norm(g) > 0 for g in numbers.gradient.values())
  assert all(len(values) in (0, STEPS) for values in numbers.loss.values())
  norm = lambda a: max(np.linalg.norm(a), 1e-30)
  after = numbers.parameters | numbers.bias
  for name, old in flat(state.params).items():
    assert norm(after[name] - old) > 50 * LIMITS["parameters"] * norm(old), name


@pytest.mark.parametrize("model", MODELS)
def test_meshes_are_left_out_for_a_reason(model):
  """Where "expert" splits the batch only, and that always together with "data"; one such mesh is run."""
  left_out = [sizes for sizes in factorisations() if same_as(model, sizes)]
  assert len(left_out) == (0 if "MoE" in model else 20)
  sizes = REPRESENTATIVE
  cfg = run_config(model, sizes)
  _, state = abstract_state(cfg, abstract_mesh(**sizes))
  by_expert = [a for a in jax.tree.leaves(state) if "expert" in str(a.sharding.spec)]
  assert bool(by_expert) == (not left_out)
  rules = dataclasses.asdict(cfg.model.rules)
  assert all(("data" in axes) == ("expert" in axes) for name, axes in rules.items() if name != "experts")
  for sizes in left_out:
    assert (model, mesh_name(same_as(model, sizes))) in ALL and (model, mesh_name(sizes)) not in ALL


def test_results_and_their_table(tmp_path):
  """What was run is not run again; what is wrong, or refused, is seen."""
  results, good = Results(), dict.fromkeys(LIMITS, (1e-7, "x")) | {"bias": (0.0, "x")}
  results.path = tmp_path / "results.jsonl"
  assert results.read() == {}
  results.add("dense", "data=8", good)
  results.add("MoE softmax", "data=8", good | {"gradient": (0.5, "embed")})
  results.add("dense", "fsdp=8", good | {"loss": (float("nan"), "loss of step 0")})
  results.add("dense", "seq=8", {"refused": "not so"})
  assert set(results.read()) == {("dense", "data=8"), ("MoE softmax", "data=8"), ("dense", "fsdp=8"),
                                 ("dense", "seq=8")}
  text = table(results.read())
  assert "4 programs on 8 devices against one, 3 wrong or refused" in text
  assert "| data=8 | 1e-7 |  | **gradient 5.0e-01 > 2e-05 (embed)** |  |" in text
  readme = tmp_path / "README.md"
  readme.write_text("before\n<!-- meshes -->\nold\n<!-- /meshes -->\nafter\n")
  write_readme(text, readme)
  assert readme.read_text() == f"before\n<!-- meshes -->\n{text}\n<!-- /meshes -->\nafter\n"
  assert "| fsdp=8 | **loss nan > 5e-06 (loss of step 0)** |" in text and "| **refused: not so** |" in text


# Faults of the kinds that the projects of the field have had, planted. name -> (model, mesh, plant(patch),
# what it breaks: a measure and the least that it must be, or the words of an error).


def _gradient_not_summed(patch):
  """The head's gradient is that of the device's own tokens."""
  reduce = losses._reduce
  patch.setattr(losses, "_reduce", lambda f, x, axes: x if x.ndim == 2 else reduce(f, x, axes))


def _lookup_not_summed(patch):
  """The embedding is that of the device's own slice of the vocabulary."""
  psum = jax.lax.psum
  patch.setattr(jax.lax, "psum", lambda x, axes: x if x.ndim == 3 else psum(x, axes))


def _loads_not_summed(patch):
  """The loads of the experts are those of the device's own tokens."""
  whole = moe._sum
  patch.setattr(moe, "_sum", lambda x, axes: x if x.ndim == 1 else whole(x, axes))


def _twice(w):
  return 2 * w - jax.lax.stop_gradient(w)


def _gathered_twice(patch):
  """The gradient of what is gathered over "fsdp" is doubled, which changes no loss, and nothing in AdamW."""
  gather = layers.gather_embed

  def twice(rules, w, spec, dim):
    whole = gather(rules, w, spec, dim)
    return whole if whole.shape == w.shape else _twice(whole)

  patch.setattr(layers, "gather_embed", twice)


def _experts_twice(patch):
  """The gradient of experts on other devices is doubled (pytorch#160285)."""
  dispatch = moe.dropless

  def twice(cfg, experts, *args, **more):
    return dispatch(cfg, tuple(_twice(w) if w.shape[0] < 8 else w for w in experts), *args, **more)

  patch.setitem(moe.DISPATCH, "dropless", twice)


def _mean_of_means(patch):
  """Each device divides by its own number of tokens."""
  on_device = losses._on_device

  def local(spec, with_grads, x_btD, head_Dv, targets_bt, weights_bt):
    own, axes = weights_bt.sum(), spec.batch_axes + spec.length_axes
    weights_bt = weights_bt * jax.lax.pmean(own, axes) / own
    return on_device(spec, with_grads, x_btD, head_Dv, targets_bt, weights_bt)

  patch.setattr(losses, "_on_device", local)


def _mean_of_loads(patch):
  """The balance of the router is that of a device's mean load."""
  whole = moe._sum
  patch.setattr(moe, "_sum", lambda x, axes: (jax.lax.pmean if x.ndim == 1 else whole)(x, axes))


PLANTED = {
  "missing sum, gradient": ("dense", "data=8", _gradient_not_summed, ("gradient", 0.1)),
  "missing sum, lookup": ("dense", "tensor=8", _lookup_not_summed, "out_specs"),
  "missing sum, loads": ("MoE softmax", "data=8", _loads_not_summed, "out_specs"),
  "doubled gradient": ("dense", "fsdp=8", _gathered_twice, ("gradient", 0.5)),
  "doubled gradient, experts": ("MoE softmax", "expert=8", _experts_twice, ("gradient", 0.5)),
  "mean of local means": ("dense", "data=8", _mean_of_means, ("loss", 1e-4)),
  "mean of local loads": ("MoE softmax", "data=8", _mean_of_loads, ("loss", 1e-4)),
}
QUICK_FAULTS = ("missing sum, gradient", "missing sum, lookup", "doubled gradient", "mean of local means")


@pytest.mark.parametrize("name", [
  pytest.param(name, marks=() if name in QUICK_FAULTS else pytest.mark.slow) for name in PLANTED])
def test_a_planted_fault_is_found(name, monkeypatch):
  model, mesh, plant, broken = PLANTED[name]
  one_device(model)
  jax.clear_caches()  # Of what was traced without the fault; and below, with it.
  plant(monkeypatch)
  try:
    if isinstance(broken, str):
      with pytest.raises(ValueError, match=broken) as error:
        cell(model, parse_mesh(mesh))
      print(f"{name}: {' '.join(str(error.value).split())}")
    else:
      measures = cell(model, parse_mesh(mesh))
      print(f"{name}: {'; '.join(faults(measures))}")
      measure, least = broken
      assert faults(measures) and measures[measure][0] > least
  finally:
    monkeypatch.undo()
    jax.clear_caches()


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", choices=MODELS)
  parser.add_argument("--mesh", help="fsdp=2,seq=4")
  parser.add_argument("--readme", action="store_true", help="rewrite the table there")
  args = parser.parse_args()
  jax.config.update("jax_enable_compilation_cache", False)  # Each program is compiled once.
  mesh = args.mesh and mesh_name(parse_mesh(args.mesh))
  wanted = [(m, n) for m, n in ALL if args.model in (None, m) and mesh in (None, n)]
  results = Results()
  for i, (model, name) in enumerate(wanted):
    start = time.monotonic()
    if (model, name) not in results.read():
      try:
        results.add(model, name, cell(model, parse_mesh(name)))
      except Exception as e:  # A program that cannot be made is a result too.
        results.add(model, name, {"error": f"{type(e).__name__}: {' '.join(str(e).split())}"})
      jax.clear_caches()
    print(f"{i + 1}/{len(wanted)} {model}, {name}: {short(results.read()[model, name])} "
          f"({time.monotonic() - start:.0f} s)", flush=True)
  found = {one: measures for one, measures in results.read().items() if one in wanted}
  text = table(found)
  print(text)
  if args.readme:
    missing = [one for one in ALL if one not in found]
    if missing:
      raise SystemExit(f"--readme wants the whole matrix; {len(missing)} are missing, as {missing[0]}")
    write_readme(text)
  raise SystemExit(1 if any(faults(measures) for measures in found.values()) else 0)


if __name__ == "__main__":
  main()

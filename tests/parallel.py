"""What one train step computes on a mesh against what it computes on one device: models, meshes, measures.

tests/test_parallel.py runs it.
"""
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import pathlib
import sys

import jax
import numpy as np
import optax

from model.sharding import MESH_AXES, TRAIN, make_mesh
from tests.tiny import ROOT, T, mesh_of, model_config, packed_batch, put
from train.config import BalanceConfig, MeshConfig, OptimConfig, TrainConfig
from train.optim import path_name
from train.step import abstract_state, make_train_step

STEPS = 3
# Relative to one device: of every loss that a step reports; of the norm of the difference, leaf by leaf, of
# the gradients of the first step and of the parameters after the last; biases of routers must be equal.
LIMITS = {"loss": 5e-6, "grad_norm": 2e-5, "gradient": 2e-5, "parameters": 2e-5, "bias": 0.0}
COMPILER = {"xla_backend_optimization_level": 0}  # LLVM's, after all that concerns devices: compiles in half.
LOSSES = ("loss", "z", "balance_loss", "sequence_loss", "router_z_loss")

_TINY = dict(n_heads=8, n_kv_heads=8)  # d_model 32. As many layers as 8 stages divide.
_MOE = dict(ffn="moe", d_expert=16, n_experts=8, n_experts_per_token=2)
MODELS = {
  "dense": (dict(**_TINY, n_layers=8, context="zigzag", attention_impl="chunked",
                 rules=dataclasses.replace(TRAIN, residual=("seq", "tensor"))), {}),
  "windowed + GQA": (dict(
      n_heads=8, n_kv_heads=2, n_layers=16, layer_pattern=("local", "global"), window=9, qk_norm="rmsnorm",
      attention_softcap=20.0, logit_softcap=30.0, context="ring", attention_impl="chunked"), {}),
  "MoE softmax": (dict(
      **_TINY, **_MOE, n_layers=8, router="softmax", context="ulysses", exchange="gather",
      parametrization="mup", mup_base_width=16, mup_base_head_dim=2), dict(z_loss=1e-3)),
  "MoE sigmoid": (dict(
      **_TINY, **_MOE, n_layers=9, n_dense_layers=1, router="sigmoid", router_bias=True, n_shared_experts=1,
      n_expert_groups=4, n_groups_per_token=2, routed_scale=2.5, context="gather", exchange="ragged"),
      dict(sequence_loss=1e-4)),
}


def factorisations(n=8) -> list[dict]:
  """Every mesh of n devices: axis -> size, sizes of 1 left out; one axis first."""
  divisors = [d for d in range(1, n + 1) if n % d == 0]
  found = [{axis: size for axis, size in zip(MESH_AXES, sizes) if size > 1}
           for sizes in itertools.product(divisors, repeat=len(MESH_AXES)) if math.prod(sizes) == n]
  return sorted(found, key=lambda mesh: (len(mesh), [MESH_AXES.index(axis) for axis in mesh]))


def mesh_name(sizes) -> str:
  return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def parse_mesh(name) -> dict:
  """ "fsdp=2,seq=4" -> {"fsdp": 2, "seq": 4} in the order of the axes."""
  sizes = {axis: int(size) for axis, size in (one.split("=") for one in name.split(","))}
  return {axis: sizes[axis] for axis in MESH_AXES if axis in sizes}


REPRESENTATIVE = dict(fsdp=2, expert=2, tensor=2)  # Of the meshes that `same_as` leaves out.


def same_as(model, sizes) -> dict | None:
  """The mesh that is run instead of this one, and splits every array as it does: without experts no array has
  a dim on "expert" but the batch, which it splits as "data" does."""
  if MODELS[model][0].get("ffn") == "moe" or "expert" not in sizes or sizes == REPRESENTATIVE:
    return None
  merged = sizes | {"data": sizes.get("data", 1) * sizes["expert"]}
  return {axis: merged[axis] for axis in MESH_AXES if axis in merged and axis != "expert"}


def run_config(model, sizes) -> TrainConfig:
  """Validated. The learning rate is constant from the first step on, so that all of them move the parameters.
  """
  changes, balance = MODELS[model]
  cfg = TrainConfig(
      steps=STEPS, batch_size=8, seq_len=T, loss_chunk=32, model=model_config(**changes),
      balance=BalanceConfig(**balance), mesh=MeshConfig(**({"fsdp": 1} | sizes)),
      optim=OptimConfig(lr=1e-3, warmup_steps=0, schedule="constant", grad_clip=None))
  cfg.data.sources[0].kind, cfg.data.tokenizer.vocab_size = "synthetic", cfg.model.vocab_size
  return cfg.validate(math.prod(sizes.values()))


@dataclasses.dataclass
class Numbers:
  """Of a few steps. Trees as path -> array."""
  loss: dict  # name -> a value a step.
  grad_norm: list
  gradient: dict  # Of the first step.
  parameters: dict
  bias: dict


def steps(model, sizes, mesh, state) -> Numbers:
  """STEPS steps from `state`, which may lie anywhere, by one program."""
  cfg = run_config(model, sizes)
  graphdef, types = abstract_state(cfg, mesh)
  state = jax.tree.map(lambda a, like: jax.device_put(np.asarray(a), like.sharding), state, types)
  losses, norms, gradient = {name: [] for name in LOSSES}, [], None
  with jax.set_mesh(mesh):
    step = jax.jit(make_train_step(cfg, graphdef, types.params), donate_argnums=0, compiler_options=COMPILER)
    for i in range(STEPS):
      state, metrics = step(state, put(cfg.model, mesh, packed_batch(i)))
      norms.append(float(metrics["grad_norm"]))
      for name in LOSSES:
        losses[name] += [float(metrics[name])] if name in metrics else []
      assert int(metrics["skipped"]) == 0
      if i == 0:  # AdamW's first moment is (1 - b1) times the gradient.
        moment = flat(optax.tree_utils.tree_get(state.opt_state, "mu"))
        gradient = {name: a / (1 - cfg.optim.b1) for name, a in moment.items()}
  assert step._cache_size() == 1
  params = flat(state.params)
  bias = {name: params.pop(name) for name in list(params) if name.endswith("balance_bias")}
  return Numbers(losses, norms, gradient, params, bias)


def flat(tree) -> dict:
  return {path_name(path): np.asarray(a) for path, a in jax.tree_util.tree_flatten_with_path(tree)[0]}


@functools.cache
def one_device(model) -> tuple:
  """(the state before, Numbers)."""
  mesh, rng = mesh_of("one"), np.random.default_rng(0)
  state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract_state(run_config(model, {}), mesh)[1])

  def draw(path, a):  # Here, as no initialiser has to be compiled for it.
    centre = 1.0 if path_name(path).endswith("scale") else 0.0
    return (centre + 0.1 * rng.standard_normal(a.shape)).astype(a.dtype)

  state.params = jax.tree_util.tree_map_with_path(draw, state.params)
  return state, steps(model, {}, mesh, state)


def measure(got: Numbers, want: Numbers) -> dict:
  """measure -> (worst value, where)."""
  relative = lambda a, b: abs(a - b) / max(abs(b), 1e-30)
  norm = lambda a: float(np.linalg.norm(a.astype(np.float64)))
  leaf = lambda a, b: norm(a - b) / max(norm(b), 1e-30) if norm(a) or norm(b) else 0.0
  size = lambda pair: math.inf if math.isnan(pair[0]) else pair[0]
  worst = lambda pairs: max(pairs, key=size, default=(0.0, "-"))

  def tree(name, measure):
    a, b = getattr(got, name), getattr(want, name)
    assert a.keys() == b.keys()
    return worst([(measure(a[leaf], b[leaf]), leaf) for leaf in b])

  losses = [(relative(a, b), f"{name} of step {i}") for name in LOSSES
            for i, (a, b) in enumerate(zip(got.loss[name], want.loss[name], strict=True))]
  norms = [(relative(a, b), f"step {i}") for i, (a, b) in enumerate(zip(got.grad_norm, want.grad_norm))]
  return {"loss": worst(losses), "grad_norm": worst(norms), "gradient": tree("gradient", leaf),
          "parameters": tree("parameters", leaf), "bias": tree("bias", lambda a, b: float(abs(a - b).max()))}


def cell(model, sizes) -> dict:
  """The measures of a model on a mesh: measure -> (value, where); or {"refused": what validate() said}."""
  try:
    run_config(model, sizes)
  except ValueError as e:
    return {"refused": str(e)}
  state, want = one_device(model)
  return measure(steps(model, sizes, make_mesh(**sizes), state), want)


def faults(measures) -> list[str]:
  """Which limits are broken; NaN breaks all."""
  if said := [f"{kind}: {measures[kind]}" for kind in ("refused", "error") if kind in measures]:
    return said
  return [f"{name} {measures[name][0]:.1e} > {limit:.0e} ({measures[name][1]})"
          for name, limit in LIMITS.items() if not measures[name][0] <= limit]


def short(measures) -> str:
  """The worst measure, or what is wrong."""
  if wrong := faults(measures):
    return f"**{'; '.join(wrong)}**"
  return digit(max(value for value, _ in measures.values()))


def digit(value) -> str:
  return f"{value:.0e}".replace("e-0", "e-")


class Results:
  """What cells gave, as lines in a file that is of the sources of the step, so that a new run goes on."""

  def __init__(self):
    files = [m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
    sources = sorted({f for f in files for folder in ("model", "train") if f.startswith(f"{ROOT / folder}/")})
    text = b"".join(pathlib.Path(f).read_bytes() for f in [*sources, __file__, ROOT / "tests/tiny.py"])
    self.path = ROOT / ".cache" / f"parallel-{hashlib.sha256(text).hexdigest()[:12]}.jsonl"
    self.path.parent.mkdir(exist_ok=True)

  def read(self) -> dict:
    """(model, mesh) -> measures."""
    if not self.path.exists():
      return {}
    lines = [json.loads(line) for line in self.path.read_text().splitlines()]
    return {(line["model"], line["mesh"]): line["measures"] for line in lines}

  def add(self, model, mesh, measures):
    with self.path.open("a") as f:
      f.write(json.dumps(dict(model=model, mesh=mesh, measures=measures)) + "\n")


def table(found: dict) -> str:
  """Markdown, of (model, mesh) -> measures."""
  rows = []
  for sizes in factorisations():
    cells = []
    for model in MODELS:
      same = same_as(model, sizes)
      cells.append(f"as {mesh_name(same)}" if same else short(found[model, mesh_name(sizes)])
                   if (model, mesh_name(sizes)) in found else "")
    if any(cell and not cell.startswith("as ") for cell in cells):
      rows.append(f"| {mesh_name(sizes)} | {' | '.join(cells)} |")
  worst = {name: max((m[name] for m in found.values() if name in m), default=(0.0, "-")) for name in LIMITS}
  said = "; ".join(f"{name.replace('_', ' ')} {digit(value)} (limit {digit(LIMITS[name])})"
                   for name, (value, _) in worst.items() if name != "bias")
  wrong = sum(bool(faults(m)) for m in found.values())
  return "\n".join([
    "<details>",
    f"<summary>{len(found)} programs on 8 devices against one, {wrong} wrong or refused. "
    f"Worst: {said}; biases of routers {'differ' if worst['bias'][0] else 'equal'}.</summary>", "",
    "The worst of four relative errors in float32: of every loss of 3 steps, of the gradients' norm, of each "
    "array's gradient, and of each array after 3 steps of AdamW. Without experts, `expert` splits the rows "
    "of a batch as `data` does and nothing else, so the mesh named is run in its place; one of these is run "
    "all the same.", "",
    f"| mesh | {' | '.join(MODELS)} |", "|---" * (1 + len(MODELS)) + "|", *rows, "", "</details>"])


def write_readme(text, path=ROOT / "README.md"):
  """Between its two marks."""
  whole, start, end = path.read_text(), "<!-- meshes -->\n", "<!-- /meshes -->"
  if start not in whole or end not in whole:
    raise ValueError(f"{path} has no place for the table: {start.strip()} and {end} on lines of their own")
  path.write_text(f"{whole.split(start)[0]}{start}{text}\n{end}{whole.split(end)[1]}")

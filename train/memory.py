"""What a train step holds in the memory of one device, by arithmetic: nothing is compiled, no device needed.

Its arguments are there all the time: parameters, optimizer state, a batch. What comes and goes besides is
largest at one of three moments: in the loss, in the backward pass through a layer, or when all gradients are
there. What is counted at each is what XLA:TPU was seen to hold there; tests/test_memory.py compares the two.
"""
import collections
import dataclasses
import itertools
import math
import typing

import jax
import jax.numpy as jnp

from model.count import cache_bytes
from model.sharding import MESH_AXES, abstract_mesh, fit, mesh_shape
from train.step import abstract_state

LANES = 128  # A row of a TPU's tile: the last dim of an array is padded to it.
VMEM = 64 * 2**20  # Of a layer's arrays the compiler keeps about so much beside the HBM.
BATCH = 5  # Arrays of 4-byte numbers: tokens, targets, weights, positions, segments.


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
  """Bytes of one device, by name."""
  arguments: dict[str, float]
  moments: dict[str, dict[str, float]]  # moment -> what is there besides.
  checkpoint: int  # Bytes of the whole state, on disk.
  cache: int  # Of keys and values that decoding one row of seq_len tokens needs, on all its devices together.

  @property
  def moment(self) -> str:
    """When most is held."""
    return max(self.moments, key=lambda name: sum(self.moments[name].values()))

  @property
  def terms(self) -> dict[str, float]:
    """What is held at that moment, arguments included."""
    return self.arguments | {k: v for k, v in self.moments[self.moment].items() if v}

  @property
  def peak(self) -> float:
    return sum(self.terms.values())


def estimate_memory(cfg, n: int, state=None, *, on: str = "tpu", hoists: bool = True) -> Memory:
  """
  Args:
    cfg: a TrainConfig that was validated for `n` devices.
    state: of `abstract_state` on their mesh, where it is at hand.
    on: cpu | gpu | tpu, where a kernel is chosen by that.
    hoists: the compiler casts the weights of all layers before it loops over them, as XLA does at its usual
      effort. At its least it does not, but copies wq, wk and wv.
  """
  sizes = dict(zip(MESH_AXES, mesh_shape({a: getattr(cfg.mesh, a) for a in MESH_AXES}, n)))
  model = fit(cfg.model, abstract_mesh(on=on, **sizes))
  leaves = _state(cfg, model, sizes, state)
  local = _Local(cfg, model, sizes, leaves)
  held = collections.Counter()
  for leaf in leaves:
    held[leaf.part] += leaf.padded
  held["batch"] = BATCH * 4 * cfg.batch_size // local.ways("batch") * cfg.seq_len
  whole = sum(math.prod(leaf.shape) * leaf.itemsize for leaf in leaves)
  return Memory(dict(held), _moments(cfg, local, hoists), whole, cache_bytes(cfg.model, cfg.seq_len))


# The arguments.

class _Leaf(typing.NamedTuple):
  part: str  # parameters | optimizer state | moving average | counters
  path: tuple[str, ...]
  shape: tuple[int, ...]
  local: tuple[int, ...]  # Its shape on one device.
  itemsize: int
  gathers: int  # Over how many devices its "embed" is split, which a layer puts together.

  @property
  def padded(self) -> int:
    """Bytes in a TPU's memory: one dim fills rows of 128, another tiles of up to 8 rows. Of the ways to lay
    the dims out, the one that wastes least."""
    if len(self.local) < 2:
      size = _up(self.local[0] if self.local else 1, LANES)
      return (_up(size, 1024) if size > 1024 else size) * self.itemsize
    rows = lambda d: _up(d, min(8, 2 ** math.ceil(math.log2(d))))
    size = math.prod(self.local)
    return self.itemsize * min(size // (d * r) * _up(d, LANES) * rows(r)
                               for d, r in itertools.permutations(self.local, 2))


def _up(value, step):
  return -(-value // step) * step


_PARTS = {"params": "parameters", "opt_state": "optimizer state", "ema": "moving average"}
_TREES = {}  # Of each model and optimizer, once: (part, path, shape, itemsize, spec) of every array.


def _state(cfg, model, sizes, state):
  """Every array of the train state. Where its dims live does not depend on the sizes of the mesh's axes, so
  it is asked once for all of them."""
  model = dataclasses.replace(  # Nothing that only the forward pass reads.
      model, remat="full", unroll=1, attention_impl="plain", grouped_impl="ragged_dot")
  key = repr((model, cfg.optim, sizes["stage"]))
  if key not in _TREES:
    if state is None:
      _, state = abstract_state(dataclasses.replace(cfg, model=model), abstract_mesh(stage=sizes["stage"]))
    _TREES[key] = [
        (_PARTS.get(path[0].name, "counters"), tuple(str(getattr(p, "key", p)) for p in path[1:]), a.shape,
         a.dtype.itemsize, tuple(a.sharding.spec) + (None,) * (len(a.shape) - len(a.sharding.spec)))
        for path, a in jax.tree_util.tree_flatten_with_path(state)[0]]
  axes = lambda entry: () if entry is None else (entry,) if isinstance(entry, str) else entry
  over = lambda spec: [math.prod(sizes[a] for a in axes(entry)) for entry in spec]
  split = model.rules.embed
  return [_Leaf(part, path, shape, tuple(d // w for d, w in zip(shape, over(spec))), itemsize,
                math.prod(over(entry for entry in spec if axes(entry) == split)))
          for part, path, shape, itemsize, spec in _TREES[key]]


# What comes and goes.

class _Local:
  """One device's part of the work, in bytes unless it says otherwise.

  Attributes:
    tokens: how many of one micro-batch are in one layer; rows: of how many rows.
    x, q, kv, h: an array of the residual stream, of the queries, of the keys (or values: their mean), of a
      hidden layer of the feed-forward.
    out: of attention's results; latent: of what latent attention makes those of.
  """

  def __init__(self, cfg, model, sizes, leaves):
    m = model
    self.cfg, self.model, self.sizes = cfg, m, sizes
    self.c = jnp.dtype(m.compute_dtype).itemsize
    self.stages = self.ways("layers")
    self.micro = (m.pipeline_microbatches or self.stages) if self.stages > 1 else 1
    self.rows = cfg.batch_size / cfg.accum_steps / self.ways("batch") / self.micro
    self.tokens = self.rows * cfg.seq_len / self.ways("length")
    self.x = self.rows * cfg.seq_len / self.ways("residual") * m.d_model * self.c
    self.q = self.tokens * m.n_heads / self.ways("heads") * m.head_dim * self.c
    widths = (m.head_dim + m.value_dim) / 2
    self.kv = self.tokens * m.n_kv_heads / self.ways("kv_heads") * widths * self.c
    self.out = self.q * m.value_dim / m.head_dim
    made_of = (m.q_lora_rank or 0) + m.kv_lora_rank + m.qk_rope_head_dim if m.latent else 0
    self.latent = self.tokens * made_of * self.c
    self.params = [leaf for leaf in leaves if leaf.part == "parameters"]
    self.blocks = [leaf for leaf in self.params if leaf.path[0] in ("blocks", "first_blocks")]
    self.layers = m.n_layers / self.stages
    # Three matrices make two hidden layers, with a gate.
    self.h = self.pairs * self._width() * self.c

  def ways(self, rule):
    return math.prod(self.sizes[axis] for axis in getattr(self.model.rules, rule))

  def finer(self, rule):
    """How much finer "embed" is split by another rule."""
    return self.ways(rule) / self.ways("embed")

  @property
  def pairs(self):
    """Rows that go through a feed-forward: of a mixture (token, choice) pairs, with room for those of other
    devices."""
    m = self.model
    if m.ffn != "moe":
      return self.tokens
    k = m.n_experts_per_token
    if m.dispatch == "dense":
      return self.tokens * m.n_experts / self.ways("experts")
    if m.dispatch == "capacity":
      return self.tokens * min(m.capacity_factor * k, m.n_experts)
    return self.tokens * k * self.ways("experts")

  def _width(self):
    """Hidden width of one expert, or of the feed-forward, on this device."""
    m = self.model
    if m.ffn == "moe":
      return m.d_expert / self.ways("mlp")
    return self.weights("ffn", gathered=True) / self.c / m.d_model / (2 if m.ffn in ("gelu", "relu") else 3)

  def weights(self, word, *, gathered):
    """The matrices of one layer's attention or ffn in the compute dtype."""
    chosen = [leaf for leaf in self.blocks if word in leaf.path and _is_matrix(leaf)]
    return sum(math.prod(leaf.local) * (leaf.gathers if gathered else 1) for leaf in chosen
               ) / self.layers * self.c

  def saved(self):
    """What one layer leaves for its backward pass, by model.remat."""
    m, c = self.model, self.c
    if m.remat in ("full", "offload"):
      return self.x
    if m.remat == "outputs":
      return 2 * self.x
    flat = self.tokens * m.d_model * c
    hidden = 2 * self.h if m.ffn != "moe" else self.tokens * m.n_experts * 4
    if m.remat == "dots":
      copies = self.q * m.qk_rope_head_dim / m.head_dim if m.latent else 0  # No product made those.
      return self.x + self.q + 2 * self.kv - copies + self.latent + flat + hidden
    pairs = 2 * self.pairs * m.d_model * c + 2 * flat if m.ffn == "moe" else 0
    attention = 2 * self.q + self.out + 2 * self.kv + 3 * self.latent
    return 4 * self.x * 4 / c + 2 * flat + attention + 6 * self.h + pairs  # none.

  def attention(self):
    """Of one layer's backward pass."""
    m = self.model
    heads = m.n_heads / self.ways("heads")
    total = 2 * self.q + self.out + 2 * self.kv + 2 * self.latent
    if m.attention_impl == "splash":
      total += self.tokens * heads * LANES * 4  # Its normalisers, a row of lanes each.
    if m.attention_impl in ("dot_product", "plain"):
      total += self.tokens * heads * self.cfg.seq_len * 4
    return total


def _is_matrix(leaf):
  name = leaf.path[-1]
  return len(leaf.shape) > 2 and name not in ("w_router", "scale") and not name.endswith("bias")


def _moments(cfg, local, hoists):
  m, c = local.model, local.c
  size = lambda leaves: sum(math.prod(leaf.local) * leaf.itemsize for leaf in leaves)
  whole = 4 * sum(math.prod(leaf.local) for leaf in local.params)
  cast = [leaf for leaf in local.blocks if _is_matrix(leaf) and leaf.itemsize != c]
  if not hoists:
    cast = [leaf for leaf in cast if leaf.path[-1] in ("wq", "wk", "wv") or m.remat == "none"]
  V = m.padded_vocab_size / local.ways("vocab")
  chunk = min(cfg.loss_chunk, local.tokens * local.micro * local.ways("length") / local.ways("loss_length"))
  steps = local.micro * m.pipeline_repeats + local.stages - 1 if local.stages > 1 else 1
  every = {
    "copies of the layers": sum(math.prod(leaf.local) for leaf in cast) * (
      c if hoists or m.remat == "none" else 4),
    "saved activations": local.layers / m.pipeline_repeats * steps * local.saved(),
    "pipeline buffers": (3 * local.micro + 2) * local.x if local.stages > 1 else 0,
    # Over micro-batches, and over the visits of a stage.
    "sum of gradients": (whole / local.finer("gradient") * (cfg.accum_steps > 1)
                         + size(local.blocks) * (local.stages > 1)),
  }
  loss = {
    "gradient of the head": m.d_model * V * 4,  # Afterwards a slice, with FSDP.
    "head": m.d_model * V * c,
    "logits": chunk * V * 4,
    "residual stream": 3 * local.x * local.micro,
  }
  ffn, attention = (local.weights(word, gathered=True) for word in ("ffn", "attention"))
  split = local.ways("embed") > 1
  rows = 4 * local.pairs * m.d_model * c if m.ffn == "moe" else 0
  hidden = 2 if m.remat in ("none", "dots") else 4  # What is not computed again is read where it was saved.
  gathered = local.tokens * m.d_model * c  # As attention and the feed-forward take the residual stream.
  work = local.attention() + local.x + 3 * gathered + hidden * local.h + rows
  backward = {
    "gradients": size(local.blocks) + m.d_model * V * c / local.ways("embed"),
    "one layer's activations": max(work - VMEM, 0),
    "one layer's weights": 4 / 3 * ffn + attention if split else 2 / 3 * ffn,
  }
  update = {"gradients": whole,
            "sum of gradients": every["sum of gradients"]}
  return {"loss": every | loss, "backward": every | backward, "update": update}

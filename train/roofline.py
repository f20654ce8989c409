"""How long a train step takes, by arithmetic: FLOPs, bytes of HBM and bytes on the wire, each over its rate
in the chip table. Nothing runs, and nothing is compiled: what it says is modelled.

step = products and attention (each the longer of its FLOPs and its HBM bytes)
     + what is between products, and the optimizer (HBM bytes)
     + the wire that is waited for + the pipeline's bubble
Gathers and sums of weights run beside the layers' work, and cost only what is longer than that. All other
collectives are waited for. Rates are EFFICIENCY times the table's. Not modelled: latencies, VMEM, the host
(remat "offload"), unevenly loaded experts, an attention that is not "gqa".

Letters as in the model; bytes and FLOPs are of one device and one step unless said otherwise.
"""
import collections
import dataclasses
import itertools
import math

from model.count import flops_per_token, looked_up
from model.kernels.platform import choose
from model.pipeline import iterations
from model.sharding import MESH_AXES, mesh_shape
from train.chips import torus, wraps

# The share of a data sheet's rate that products, passes over memory and collectives reach: one number for all
# of them, from the middle of the published runs in tests/anchors.py, never one for a run.
EFFICIENCY = 0.78
TILE = 1024  # A product is made in squares of so many results (4 MiB of float32 in VMEM), each read for anew.
SOFTMAX_OPS = 10  # On the vector unit, for a score: mask, maximum, exponential, sum, casts; as many backward.
WHOLE_SCORES = ("dot_product", "plain")  # Kernels of model.kernels.attention that write B N T T scores.
# remat -> the products that the backward pass computes again, as it needs what they made. What w_down made it
# does not, but of experts, for the gradient of the router's weights.
RECOMPUTED = {
  "none": (), "dots": ("scores",), "outputs": ("qkv", "scores", "ffn_in"),
  "offload": ("qkv", "scores", "ffn_in"),
  "full": ("qkv", "scores", "out", "ffn_in"),
}
WEIGHT_AXES = ("data", "fsdp")  # Their collectives are of weights, and run beside the work.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
  model_flops: float  # Of all devices, by the convention of model.count; remat does not count.
  hardware_flops: float  # With remat, the attention kernel's own recomputation, and the bubble.
  hbm_bytes: float
  wire_bytes: dict[tuple[str, str], float]  # (mesh axis, kind of collective) -> bytes that a device receives.
  wire_s: dict[str, float]  # Mesh axis -> seconds of its collectives, waited for or not.
  seconds: dict[str, float]  # Term -> seconds; their sum is step_s.
  slow_axis: str | None  # That goes over the network between slices or hosts.
  step_s: float
  tokens_per_s: float  # Of all devices.
  mfu: float  # Against the bfloat16 peak.

  @property
  def bound(self) -> str:
    """The term that takes longest beside the products."""
    return max((s, term) for term, s in self.seconds.items() if term != "products")[1]


def estimate_step(cfg, chip, n: int, *, recompute=None, overlapped=WEIGHT_AXES,
                  efficiency: float = EFFICIENCY) -> Estimate:
  """
  Args:
    cfg: a validated TrainConfig.
    chip: of train.chips.
    n: jax devices, of all slices together.
    recompute: the products that remat computes again, where it is not one of ours; None: by cfg.model.remat.
    overlapped: mesh axes whose collectives run beside the work.

  Raises:
    ValueError: the mesh, or the chip, has no such number of devices.
  """
  work = _Work(cfg, chip, n, efficiency)
  again = RECOMPUTED[cfg.model.remat] if recompute is None else recompute
  if cfg.model.ffn == "moe" and "ffn_in" in again:
    again = (*again, "ffn_out")
  layers, once = _Cost(), _Cost()
  for kind, count in work.layers.items():
    one = _Cost()
    for product in _products(work, kind):
      _add_product(one, work, product, passes=3 + (product.part in again))
    _add_attention(one, work, "scores" in again)
    _add_elementwise(one, work, kind, bool(again))
    _add_layer_wire(one, work, kind, again)
    layers.add(one, count * work.executions)
  _add_head(once, work)
  _add_ends_wire(once, work)
  _add_optimizer(once, work)
  return _sum_up(work, layers, once, overlapped)


def _sum_up(work, layers, once, overlapped):
  cfg, chip = work.cfg, work.chip
  bubble = 1 - work.useful
  seconds = {term: layers.seconds.get(term, 0.0) * work.useful + once.seconds.get(term, 0.0)
             for term in ("products", "attention", "elementwise", "optimizer")}
  wire_s = collections.Counter(layers.wire_s)
  wire_s.update(once.wire_s)
  beside = sum(wire_s[axis] for axis in overlapped)
  hidden = min(beside, sum(layers.seconds.values()))
  for axis in MESH_AXES:
    if wire_s[axis]:
      left = (wire_s[axis] * (1 - hidden / beside) if axis in overlapped
              else layers.wire_s[axis] * work.useful + once.wire_s[axis])
      seconds[f"wire {axis}"] = left
  if bubble:
    waited = sum(layers.wire_s[axis] for axis in MESH_AXES if axis not in overlapped)
    seconds["bubble"] = bubble * (sum(layers.seconds.values()) + waited)
  step_s = sum(seconds.values())
  tokens = cfg.batch_size * cfg.seq_len
  model_flops = tokens * work.model_flops_per_token
  wire = collections.Counter(layers.wire)
  wire.update(once.wire)
  return Estimate(
    model_flops=model_flops, hardware_flops=layers.flops + once.flops, hbm_bytes=layers.bytes + once.bytes,
    wire_bytes=dict(wire), wire_s=dict(wire_s), seconds=seconds, slow_axis=work.network.slow_axis,
    step_s=step_s, tokens_per_s=tokens / step_s, mfu=model_flops / step_s / work.n / chip.flops["bfloat16"])


class _Cost:
  """What is done: FLOPs, HBM bytes, seconds by term, the wire by axis."""

  def __init__(self):
    self.flops, self.bytes = 0.0, 0.0
    self.seconds, self.wire_s, self.wire = (collections.Counter() for _ in range(3))

  def add(self, other, times=1.0):
    self.flops += other.flops * times
    self.bytes += other.bytes * times
    for mine, theirs in ((self.seconds, other.seconds), (self.wire_s, other.wire_s), (self.wire, other.wire)):
      for name, value in theirs.items():
        mine[name] += value * times


class _Work:
  """The sizes of one device's share."""

  def __init__(self, cfg, chip, n, efficiency):
    self.cfg, self.chip, self.n = cfg, chip, n
    self.sizes = dict(zip(MESH_AXES, mesh_shape({a: getattr(cfg.mesh, a) for a in MESH_AXES}, n)))
    self.rules = cfg.model.rules
    m = self.model = choose(cfg.model, chip.platform, self.ways("length"))
    self.network = Network(chip, self.sizes, n, cfg.mesh.slices, cfg.mesh.slice_axis, efficiency)
    self.peak = efficiency * chip.flops.get(m.compute_dtype, chip.flops["bfloat16"])
    self.memory, self.vector = efficiency * chip.hbm_bandwidth, efficiency * chip.vector
    self.width = 4 if m.compute_dtype == "float32" else 2  # Bytes of a number in flight,
    self.param_width = 4 if m.param_dtype == "float32" else 2  # and of a parameter.
    self.tensor, self.expert = self.ways("mlp"), self.ways("experts") if m.ffn == "moe" else 1
    self.heads = self.ways("heads")
    self.kv = self.heads if m.n_kv_heads % self.heads == 0 and m.rules.kv_heads == m.rules.heads else 1
    p, v = self.ways("layers"), m.pipeline_repeats
    micro = (m.pipeline_microbatches or p) if p > 1 else 1
    steps = iterations(p, micro, v) if p > 1 else v
    self.stages, self.useful = p, micro * v / steps
    # How often a device runs each of its layers, and on how many tokens, of rows/ways.
    self.executions = cfg.accum_steps * steps / v
    self.rows = cfg.batch_size / self.ways("batch") / cfg.accum_steps / micro
    self.tokens = self.rows * cfg.seq_len / self.ways("length")
    self.step_tokens = cfg.batch_size * cfg.seq_len / self.ways("batch") / self.ways("length")
    moe = m.ffn == "moe"
    self.layers = {"moe" if moe else m.ffn: (m.n_layers - m.n_dense_layers) / p}
    if m.n_dense_layers:
      self.layers["swiglu"] = m.n_dense_layers * cfg.accum_steps / self.executions * micro
    self.pairs_flops = flops_per_token(m, cfg.seq_len, looked_up(m))  # Of attention, both ways.
    self.model_flops_per_token = self.pairs_flops + 6 * matrix_parameters(m)

  def ways(self, rule):
    return math.prod(self.sizes[axis] for axis in getattr(self.rules, rule))

  def split(self, axes):
    return tuple(axis for axis in axes if self.sizes[axis] > 1)

  @property
  def gathered(self):
    """Axes over which a layer's weights are gathered, and the others that sum their gradients."""
    return self.split(self.rules.embed)

  @property
  def summed(self):
    return self.split(a for a in self.rules.batch + self.rules.length if a not in self.rules.embed)


def matrix_parameters(m) -> int:
  """Parameters that one token meets in products: all but norms, biases and the look-up."""
  D, H = m.d_model, m.head_dim
  attention = D * H * (2 * m.n_heads + 2 * m.n_kv_heads)
  if m.latent:
    attention = sum(inner * outer * (m.n_heads if split else 1) for inner, outer, split in _latent(m))
    attention += m.n_heads * m.v_head_dim * D
  gated = 3 if m.ffn in ("swiglu", "geglu", "moe") else 2
  dense = gated * D * m.d_ff
  layers = m.n_layers * attention
  if m.ffn == "moe":
    one = 3 * D * m.d_expert
    sparse = D * m.n_experts + one * (m.n_experts_per_token + m.n_shared_experts)
    layers += (m.n_layers - m.n_dense_layers) * sparse + m.n_dense_layers * dense
  else:
    layers += m.n_layers * dense
  return layers + D * m.padded_vocab_size


def _latent(m):
  """(inner, outer, whether each head has its own) of the products that make queries, keys and values."""
  D, H, Q, R = m.d_model, m.head_dim, m.q_lora_rank, m.kv_lora_rank
  queries = [(D, H, True)] if Q is None else [(D, Q, False), (Q, H, True)]
  keys, values = (R, m.qk_nope_head_dim, True), (R, m.v_head_dim, True)
  return [*queries, (D, R + m.qk_rope_head_dim, False), keys, values]


# What a layer computes.

@dataclasses.dataclass(frozen=True, slots=True)
class Product:
  """[rows, inner] x [inner, outer], `groups` times, each with its own matrix; on one device."""
  part: str  # qkv | out | ffn_in | ffn_out | router | head.
  rows: float
  inner: float
  outer: float
  groups: float = 1
  routed: bool = False  # Of the experts that lie on different devices.

  @property
  def size(self):
    """Parameters of its matrices."""
    return self.inner * self.outer * self.groups


def _products(work, kind):
  m, t = work.model, work.tokens
  D, H = m.d_model, m.head_dim
  if m.latent:
    for inner, outer, split in _latent(m):
      yield Product("qkv", t, inner, outer * (m.n_heads / work.heads if split else 1))
  else:
    yield Product("qkv", t, D, (m.n_heads / work.heads + 2 * m.n_kv_heads / work.kv) * H)
  yield Product("out", t, m.n_heads * m.value_dim / work.heads, D)
  if kind != "moe":
    gated = 2 if kind in ("swiglu", "geglu") else 1
    yield Product("ffn_in", t, D, gated * m.d_ff / work.tensor)
    yield Product("ffn_out", t, m.d_ff / work.tensor, D)
    return
  yield Product("router", t, D, m.n_experts)
  F, local = m.d_expert / work.tensor, m.n_experts / work.expert
  rows = _expert_rows(work) / local
  yield Product("ffn_in", rows, D, 2 * F, local, True)
  yield Product("ffn_out", rows, F, D, local, True)
  if m.n_shared_experts:
    F *= m.n_shared_experts
    yield Product("ffn_in", t, D, 2 * F)
    yield Product("ffn_out", t, F, D)


def _expert_rows(work):
  """Rows that the experts of a device compute, evenly loaded."""
  m, t = work.model, work.tokens
  if m.dispatch == "dense":
    return t * m.n_experts
  return t * m.n_experts_per_token * (m.capacity_factor if m.dispatch == "capacity" else 1)


def _add_product(cost, work, p, passes):
  """Forward, the gradients of both factors, and what remat computes again. A square of results reads a stripe
  of either factor, so that a product cannot have more than TILE / 2 FLOPs a byte of bfloat16."""
  flops = 2 * p.rows * p.inner * p.outer * p.groups
  stripes = lambda d: math.ceil(d / TILE)
  n_bytes = work.width * p.groups * (
      p.inner * (p.rows * stripes(p.outer) + p.outer * stripes(p.rows)) + p.rows * p.outer)
  side = work.chip.mxu
  filled = math.prod(d / (math.ceil(d / side) * side) for d in (p.inner, p.outer))
  cost.flops += passes * flops
  cost.bytes += passes * n_bytes
  cost.seconds["products"] += passes * max(flops / work.peak / filled, n_bytes / work.memory)


def _add_attention(cost, work, again):
  """Two products forward; backward five, as scores are not kept. Blocks that the mask hides are skipped."""
  m, cfg = work.model, work.cfg
  seen = work.pairs_flops / 12 / m.n_layers * (2 / work.heads)  # FLOPs forward are 4 a pair and head dim.
  whole = m.attention_impl in WHOLE_SCORES
  if whole:
    seen = m.n_heads * (m.head_dim + m.value_dim) * cfg.seq_len / work.heads
  passes = 1 + (2 if whole else 2.5) + again
  flops = 2 * seen * work.tokens * passes
  heads = m.n_heads / work.heads
  widths = m.head_dim + m.value_dim
  n_bytes = work.width * work.tokens * widths * (heads + m.n_kv_heads / work.kv) * passes
  if whole:  # Scores are written and read: by the softmax, and by the product with the values.
    n_bytes += 4 * 4 * work.tokens * heads * cfg.seq_len * passes
  filled = m.head_dim / (math.ceil(m.head_dim / work.chip.mxu) * work.chip.mxu)
  cost.flops += flops
  cost.bytes += n_bytes
  vector = SOFTMAX_OPS * seen / widths * work.tokens * (2 + again) / work.vector
  cost.seconds["attention"] += max(flops / work.peak / filled, n_bytes / work.memory, vector)


def _add_elementwise(cost, work, kind, again):
  """What is read and written between products: two norms and sums (3 D each), positions of q and k, the gate.
  Twice that backward."""
  m, t = work.model, work.tokens
  finer = work.ways("residual") / work.ways("length")
  numbers = 6 * m.d_model * t / finer + 2 * m.head_dim * (m.n_heads / work.heads + m.n_kv_heads / work.kv) * t
  if m.latent:  # Their norms.
    numbers += 2 * (m.kv_lora_rank + (m.q_lora_rank or 0)) * t
  gate = 3 if kind in ("swiglu", "geglu", "moe") else 2
  if kind == "moe":  # Rows are dealt out and put together.
    rows = _expert_rows(work)
    numbers += gate * rows * m.d_expert / work.tensor + 4 * rows * m.d_model
    numbers += gate * t * m.n_shared_experts * m.d_expert / work.tensor
  else:
    numbers += gate * t * m.d_ff / work.tensor
  n_bytes = numbers * work.width * (3 + again)
  cost.bytes += n_bytes
  cost.seconds["elementwise"] += n_bytes / work.memory


def _add_head(cost, work):
  """The chunked loss: logits, and both gradients while they are at hand. They are float32."""
  m = work.model
  tokens = work.step_tokens / (work.ways("loss_length") / work.ways("length"))
  p = Product("head", tokens, m.d_model, m.padded_vocab_size / work.ways("vocab"))
  _add_product(cost, work, p, passes=3)
  n_bytes = 4 * 4 * tokens * p.outer
  cost.bytes += n_bytes
  cost.seconds["elementwise"] += n_bytes / work.memory


def held_parameters(work) -> float:
  """Matrix parameters that lie on a device before FSDP splits them: its stage's, tensor's, expert's part."""
  layers = sum(count * sum(p.size for p in _products(work, kind)) for kind, count in work.layers.items())
  tables = 1 if work.model.head == "tied" else 2
  return layers + tables * work.model.d_model * work.model.padded_vocab_size / work.ways("vocab")


def _add_optimizer(cost, work):
  """AdamW reads the gradient, the parameter and two moments and writes three, each device its slice."""
  numbers = held_parameters(work) / work.ways("moment")
  n_bytes = numbers * (4 + 6 * work.param_width)
  cost.bytes += n_bytes
  cost.seconds["optimizer"] += n_bytes / work.memory


# What a layer sends: as model.layers, model.moe, model.exchange and model.context say.

def _add_layer_wire(cost, work, kind, again):
  net, c, m = work.network, work.width, work.model
  fsdp = math.prod(work.sizes[a] for a in work.gathered)
  for routed in (False, True):
    size = c * sum(p.size for p in _products(work, kind) if p.part != "router" and p.routed == routed)
    for axis in work.gathered:
      net.send(cost, axis, "all-gather", 2 * size)  # Forward, and again backward.
      net.send(cost, axis, "reduce-scatter", size)
    net.reduce(cost, [a for a in work.summed if not (routed and a in work.rules.experts)], size / fsdp)
  x = c * work.tokens * m.d_model
  _add_tensor_wire(cost, work, kind, x, again)
  if work.ways("length") > 1:
    _add_context_wire(cost, work, "scores" in again)
  if kind == "moe" and work.expert > 1:
    _add_expert_wire(cost, work, x, "ffn_in" in again)
  for axis in work.split(work.rules.layers):  # Once an iteration of the pipeline, and back.
    net.send(cost, axis, "collective-permute", 2 * x * work.stages * m.pipeline_repeats / m.n_layers)


def _add_tensor_wire(cost, work, kind, x, again):
  """Row-parallel products end in a sum. Backward, so does what each column-parallel product has for the
  gradient of its input: one sum each of q, k and v, of gate and up; of latents where those are its input."""
  net, rules, m = work.network, work.rules, work.model
  readers = {"heads": 3, "mlp": 1 if kind in ("gelu", "relu", "moe") else 2}
  for rule, n in readers.items():
    for axis in work.split(getattr(rules, rule)):
      numbers = n * m.d_model
      if rule == "heads" and m.latent:
        numbers = (m.q_lora_rank or m.d_model) + 2 * m.kv_lora_rank + m.qk_rope_head_dim
      net.send(cost, axis, "all-reduce", numbers / m.d_model * x)
      if axis in rules.residual:  # Sequence parallel: half of the sum, and half before what reads it.
        net.send(cost, axis, "reduce-scatter", x)
        net.send(cost, axis, "all-gather", 2 * x)
      else:
        net.send(cost, axis, "all-reduce", x)
      if rule == "heads" and "out" in again:
        net.send(cost, axis, "all-reduce", x)


def _add_context_wire(cost, work, again):
  m, net = work.model, work.network
  both = work.width * (m.head_dim + m.value_dim) * work.tokens  # Of keys and values, of queries and results.
  kv, q = (both * heads for heads in (m.n_kv_heads / work.kv, m.n_heads / work.heads))
  for axis in work.split(work.rules.length):
    ways = work.sizes[axis]
    if m.context == "gather":
      net.send(cost, axis, "all-gather", (1 + again) * ways * kv)
      net.send(cost, axis, "reduce-scatter", ways * kv)
    elif m.context == "ulysses":
      net.send(cost, axis, "all-to-all", (2 + again) * (kv + q))
    else:  # Rings: keys and values go round; backward their float32 gradients go with them.
      hops = ways - 1
      net.send(cost, axis, "collective-permute", hops * kv * (2 + again + 4 / work.width))


def _add_expert_wire(cost, work, x, again):
  m, net = work.model, work.network
  for axis in work.split(work.rules.experts):
    ways = work.sizes[axis]
    if m.exchange == "gather":
      net.send(cost, axis, "all-gather", (2 + again) * ways * x)
      net.send(cost, axis, "reduce-scatter", 2 * ways * x)
    else:
      rows = work.width * _expert_rows(work) * m.d_model
      net.send(cost, axis, "all-to-all", 2 * (2 + again) * rows)


def _add_ends_wire(cost, work):
  """The embedding and the head: once a step, or once a micro-batch of the step (accum_steps)."""
  m, net, c = work.model, work.network, work.width
  table, k = m.d_model * m.padded_vocab_size / work.ways("vocab"), work.cfg.accum_steps
  fsdp = math.prod(work.sizes[a] for a in work.gathered)
  x = c * work.step_tokens * m.d_model
  others = lambda axes: [a for a in work.split(axes) if a not in work.gathered]
  for axis in work.gathered:
    net.send(cost, axis, "all-gather", k * c * table)  # The head, whose gradient is float32.
    net.send(cost, axis, "reduce-scatter", k * 4 * table)
    net.send(cost, axis, "all-to-all", 2 * x)  # Columns of the embedding, and their gradients.
  # By all that have tokens of the loss, or look any up.
  net.reduce(cost, others(work.rules.batch + work.rules.loss_length), k * 4 * table / fsdp)
  net.reduce(cost, others(work.rules.batch + work.rules.length), k * work.param_width * table / fsdp)
  for axis in work.split(work.rules.vocab):
    net.send(cost, axis, "all-reduce", x + x * 4 / c)  # What was looked up, and the gradient before the head.
    if axis in work.rules.residual:
      net.send(cost, axis, "all-gather", 2 * x)
  for axis in work.split(work.rules.layers):
    net.send(cost, axis, "all-reduce", 2 * x)
    net.send(cost, axis, "all-gather", x)
  if work.ways("moment") > fsdp:  # ZeRO-1 and -2 put the new parameters together.
    for axis in work.split(work.rules.moment):
      net.send(cost, axis, "all-gather", work.param_width * held_parameters(work))


class Network:
  """Which links the collectives of a mesh axis may use.

  The fastest axis (the last of the mesh) takes whole dims of the torus first, the most of them whose product
  is its size, as jax.make_mesh does; what does not divide so takes parts of dims, which are no rings. Of
  slices, and of hosts of GPUs, the outer part of one axis goes over the slow network.
  """

  def __init__(self, chip, sizes, n, slices=1, slice_axis="data", efficiency=1.0):
    self.chip, self.efficiency, self.slow_axis = chip, efficiency, slice_axis if slices > 1 else None
    self.outer = {axis: slices if slices > 1 and axis == slice_axis else 1 for axis in sizes}
    self.links, self.longest, self.inner = {}, {}, {}
    if chip.dims == 0:
      self._fill_hosts(sizes)
      return
    shape = torus(chip, n // slices)
    left = dict(enumerate(shape))
    share = chip.per_chip  # Devices of one chip are the innermost neighbours.
    for axis in reversed(list(sizes)):
      size = self.inner[axis] = sizes[axis] // self.outer[axis]
      near = math.gcd(size, share)
      share //= near
      self._take(axis, size // near, shape, left)

  def _take(self, axis, size, shape, left):
    whole = [i for i in left if left[i] == shape[i] > 1]
    picks = [pick for r in range(len(whole), 0, -1) for pick in itertools.combinations(whole, r)
             if math.prod(shape[i] for i in pick) == size]
    links, longest = 0, 1
    for i in picks[0] if picks else sorted(left, key=lambda i: -left[i]):
      part = math.gcd(size, left[i])
      if part > 1:
        ring = part == shape[i] and wraps(self.chip, shape, part) and part > 2
        links += 2 if ring else 1
        longest = max(longest, part if ring else 2 * part)
        left[i] //= part
        size //= part
    self.links[axis], self.longest[axis] = max(links, 1), longest

  def _fill_hosts(self, sizes):
    room = self.chip.domain
    for axis in reversed(list(sizes)):
      self.inner[axis] = math.gcd(sizes[axis], room)
      room //= self.inner[axis]
      self.outer[axis] = sizes[axis] // self.inner[axis]
      self.links[axis], self.longest[axis] = 1, 0
      if self.outer[axis] > 1:
        self.slow_axis = axis

  def send(self, cost, axis, kind, size):
    """Adds a collective over an axis.

    Args:
      size: bytes; of all-gather and reduce-scatter the whole, of the others what a device holds.
    """
    near, far = self.inner[axis], self.outer[axis]
    ways = near * far
    times = {"all-reduce": 2, "collective-permute": ways / (ways - 1)}.get(kind, 1)
    cost.wire[axis, kind] += times * size * (ways - 1) / ways
    cost.wire_s[axis] += self.seconds(axis, kind, size)

  def reduce(self, cost, axes, size):
    """Adds an all-reduce over several axes, the fast ones first: the slower have only a share left."""
    for axis in reversed(axes):
      self.send(cost, axis, "all-reduce", size)
      size /= self.inner[axis] * self.outer[axis]

  def seconds(self, axis, kind, size) -> float:
    link, near, far = self.chip.link_bandwidth, self.inner[axis], self.outer[axis]
    times = 2 if kind == "all-reduce" else 1
    if kind == "collective-permute":
      return size / (link if near > 1 else self.chip.dcn_bandwidth) / self.efficiency
    if kind == "all-to-all" and self.longest[axis] and near > 1:  # Half of all goes through the middle links.
      fast = size * self.longest[axis] / 8 / link
    else:
      fast = times * size * (near - 1) / near / link / self.links[axis]
    slow = times * size / (1 if kind == "all-to-all" else near) * (far - 1) / far / self.chip.dcn_bandwidth
    return (fast + slow) / self.efficiency


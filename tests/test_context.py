"""Attention over rows that are split over devices, against plain attention on one."""
import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import context
from model.config import ModelConfig
from model.context import CONTEXT, check_context, work, zigzag_order
from model.kernels.attention import KERNEL, Mask
from model.sharding import make_mesh, on_devices, staged
from tests.tiny import packed_batch

B, T, H = 4, 64, 8
HEADS = {2: 4, 4: 12, 8: 8}
AXES = {2: dict(seq=2), 4: dict(fsdp=2, seq=2), 8: dict(seq=8)}
CASES = {  # Kv heads, window, cap. Neither kv heads nor the devices of a row divide the other, or they do.
  "causal": lambda N: (N // 2, None, None),
  "window": lambda N: (N // 4, 11, None),
  "window, cap, one kv head": lambda N: (1, 37, 2.0),
}


def inputs(N, K, *, t=T, dtype=np.float32, stages=None):
  """(q, k, v, cotangent, positions, segments), of one row that is one document, and packed ones that end in
  padding, which the cotangent leaves out."""
  rng = np.random.default_rng(N + K)
  lead = () if stages is None else (stages,)
  packed = [packed_batch(seed, b=B, t=t) for seed in range(stages or 1)]
  pos, segment = (np.stack([p[name] for p in packed]) for name in ("positions", "segments"))
  pos[:, 0], segment[:, 0] = np.arange(t), 1
  pos, segment = pos.reshape(*lead, B, t), segment.reshape(*lead, B, t)
  q, k, v, cotangent = (rng.normal(size=(*lead, B, t, n, H)).astype(np.float32) for n in (N, K, K, N))
  cotangent *= (segment > 0)[..., None, None]
  return *(jnp.asarray(x, dtype) for x in (q, k, v)), cotangent, pos, segment


def output_and_gradients(attend, q, k, v, cotangent, pos, segment):
  def loss(q, k, v):
    out = attend(q, k, v, pos, segment)
    return jnp.sum(out.astype(jnp.float32) * cotangent), out

  grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
  return jnp.where(segment[..., None, None] > 0, out, 0), *grads


def whole(window, cap, kernel="plain"):
  """On one device."""
  return lambda q, k, v, pos, segment: KERNEL[kernel](
      q, k, v, Mask(pos, segment, pos, segment, window, aligned=True), scale=H**-0.5, cap=cap)


def split(name, window, cap, axes=("seq",)):
  """The same with each row over `axes`."""
  f = functools.partial(CONTEXT[name], axes, KERNEL["chunked"], window=window, scale=H**-0.5, cap=cap)
  local = lambda *args: f(*args)
  four, two = jax.P("data", axes, None, None), jax.P("data", axes)
  return on_devices(local, (four, four, four, two, two), four, check_vma=False)


def placed(mesh, arrays, name, ways, axes="seq", dim=1):
  """On the mesh, in the order that the context wants."""
  order = zigzag_order(arrays[0].shape[dim], ways) if name == "zigzag" else slice(None)
  spec = jax.P(*["stage"] * (dim - 1), "data", axes)
  return [jax.device_put(np.asarray(a)[(slice(None),) * dim + (order,)], jax.NamedSharding(mesh, spec))
          for a in arrays]


def back(a, name, ways, dim=1):
  """NumPy, in the order of the row."""
  order = np.argsort(zigzag_order(a.shape[dim], ways)) if name == "zigzag" else slice(None)
  return np.asarray(a, np.float32)[(slice(None),) * dim + (order,)]


def check_equal(got, want, name, ways, dim=1, atol=1e-5):
  for part, a, b in zip(("out", "dq", "dk", "dv"), got, want):
    np.testing.assert_allclose(back(a, name, ways, dim), np.asarray(b, np.float32), atol=atol, rtol=atol,
                               err_msg=f"{name} {part}")


@pytest.mark.parametrize("ways", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_context_is_plain_attention(ways):
  """Output and gradients, in one program."""
  cases = {case: make(HEADS[ways]) for case, make in CASES.items()}
  data = {case: inputs(HEADS[ways], K) for case, (K, _, _) in cases.items()}
  want = jax.jit(lambda data: {case: output_and_gradients(whole(*cases[case][1:]), *args)
                               for case, args in data.items()})(data)
  axes = tuple(AXES[ways])
  with jax.set_mesh(mesh := make_mesh(data=-1, **AXES[ways])):
    got = jax.jit(lambda data: {
        (name, case): output_and_gradients(split(name, *cases[case][1:], axes), *args)
        for (name, case), args in data.items()})(
            {(name, case): placed(mesh, data[case], name, ways, axes) for name in CONTEXT for case in cases})
  for (name, case), arrays in got.items():
    check_equal(arrays, want[case], name, ways)


@pytest.mark.slow
def test_chunks_of_many_blocks_in_bf16():
  """With no larger an error than `chunked` on one device has."""
  data = inputs(2, 2, t=1200, dtype=jnp.bfloat16)
  exact = jax.jit(lambda *a: output_and_gradients(whole(700, None), *a))(
      *(x.astype(jnp.float32) for x in data[:3]), *data[3:])
  one = jax.jit(lambda *a: output_and_gradients(whole(700, None, "chunked"), *a))(*data)
  with jax.set_mesh(mesh := make_mesh(seq=2, data=4)):
    got = jax.jit(lambda data: {name: output_and_gradients(split(name, 700, None), *args)
                                for name, args in data.items()})(
        {name: placed(mesh, data, name, 2) for name in ("ring", "zigzag")})
  for name, arrays in got.items():
    for a, b, c in zip(arrays, one, exact):
      error = lambda a: np.abs(np.asarray(a, np.float32) - np.asarray(c)).max()
      assert a.dtype == jnp.bfloat16 and error(back(a, name, 2)) < 1.2 * error(b)


def test_in_a_pipeline_what_is_hidden_is_not_computed(monkeypatch):
  """Two stages of four devices: each is right, and executes exactly the pairs that `work` counts."""
  ways, stages, window, size = 4, 2, 13, dict(ring=T // 4, zigzag=T // 8)
  data, executed = inputs(4, 4, stages=stages), collections.Counter()
  want = jax.jit(lambda *data: output_and_gradients(jax.vmap(whole(window, 2.0)), *data))(*data)

  def counted(name, f):
    def g(*args):
      count = lambda rank: executed.update([(name, f.__name__, int(rank))])
      jax.debug.callback(count, jax.lax.axis_index("seq"))
      return f(*args)
    return g

  def attend(name):
    def run(*args):
      with monkeypatch.context() as m, staged():
        for f in (context.blockwise, context.blockwise_gradient):
          m.setattr(context, f.__name__, counted(name, f))
        return output_and_gradients(jax.vmap(split(name, window, 2.0)), *args)
    return run

  with jax.set_mesh(mesh := make_mesh(stage=stages, seq=ways)):
    got = jax.jit(lambda data: {name: attend(name)(*args) for name, args in data.items()})(
        {name: placed(mesh, data, name, ways, dim=2) for name in CONTEXT})
    jax.block_until_ready(got)
    jax.effects_barrier()
  for name, arrays in got.items():
    check_equal(arrays, want, name, ways, dim=2)
  for name, chunks in (("ring", 1), ("zigzag", 2)):
    pairs = work(ways, size[name], chunks, window)[:, 1:].sum(1) // size[name]**2 + 1  # Its own are one.
    assert pairs.max() < ways * chunks
    for f in ("blockwise", "blockwise_gradient"):
      assert [executed[name, f, rank] for rank in range(ways)] == list(stages * pairs), (name, f)


def test_the_ring_moves_what_it_must_and_gathers_nothing():
  """Bytes that a device sends: forward (P - 1) / P of the row's K, V, positions and segments; backward the
  same again, and the float32 gradients of K and V all the way around."""
  ways, N, K = 4, 4, 2
  q, k, v, cotangent, *places = inputs(N, K)
  with jax.set_mesh(mesh := make_mesh(seq=ways, data=2)):
    q, k, v, cotangent, *places = placed(mesh, (q, k, v, cotangent, *places), "ring", ways)
    forward = jax.jit(lambda q, k, v: jax.vjp(lambda *qkv: split("ring", None, None)(*qkv, *places), q, k, v))
    backward = jax.jit(lambda pull, cotangent: pull(cotangent)).lower(forward(q, k, v)[1], cotangent)
    gather = jax.jit(split("gather", None, None)).lower(q, k, v, *places)
    forward, backward, gather = (
        program.compile().as_text() for program in (forward.lower(q, k, v), backward, gather))
  kv, others = (2 * B // 2 * T * n * 4 for n in (K * H, 1))
  once = (kv + others) * (ways - 1) // ways
  assert sent(forward, "collective-permute") == once
  assert sent(backward, "collective-permute") == once + kv
  assert "all-gather" not in forward + backward and "all-to-all" not in forward + backward
  assert "all-gather" in gather and "collective-permute" not in gather


def test_the_ring_stops_where_no_window_reaches():
  data = inputs(4, 2)
  want = jax.jit(lambda *data: output_and_gradients(whole(1, None), *data))(*data)
  with jax.set_mesh(mesh := make_mesh(seq=4, data=2)):
    data = placed(mesh, data, "ring", 4)
    run = jax.jit(lambda *data: output_and_gradients(split("ring", 1, None), *data)).lower(*data).compile()
    check_equal(run(*data), want, "ring", 4)
  assert "collective-permute" not in run.as_text()


def sent(hlo, collective):
  """Bytes that a collective returns, the body of a loop counted as often as it runs."""
  computations, name = collections.defaultdict(list), None
  for line in hlo.splitlines():
    if line and not line[0].isspace():
      name = "ENTRY" if line.startswith("ENTRY") else line.split()[0].lstrip("%")
    computations[name].append(line)

  def of(name):
    total = 0
    for line in computations[name]:
      if found := re.search(rf"= (.*) {collective}(-start)?\(", line):
        assert not found[2], line
        total += sum(4 * math.prod(map(int, dims.split(",")))
                     for dims in re.findall(r"[fs]32\[([\d,]+)\]", found[1]))
      elif loop := re.search(r" while\(.*body=%?([\w.-]+).*known_trip_count\D*(\d+)", line):
        total += int(loop[2]) * of(loop[1])
      else:
        assert " while(" not in line, line
        total += sum(map(of, re.findall(r"(?:calls|to_apply|computation)=%?([\w.-]+)", line)))
    return total

  return of("ENTRY")


@pytest.mark.parametrize("ways", HEADS)
def test_zigzag_gives_all_as_much_to_do(ways):
  ring, zigzag = work(ways, 6, 1, None), work(ways, 3, 2, None)
  assert ring.sum() == zigzag.sum() == 6 * ways * (6 * ways + 1) // 2  # All that is visible, and no more.
  slowest = lambda pairs: pairs.max() / pairs.mean()
  assert slowest(ring.sum(1)) == pytest.approx(2 - 1 / ways, abs=0.1)
  assert slowest(zigzag.sum(1)) <= 1.05
  assert (zigzag == zigzag[:1]).all()  # At every step, each of which waits for the slowest.


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 6, 8, 9, 10])
def test_what_is_skipped_is_hidden(window, chunks):
  """Each pair of chunks is computed if and only if one token of one sees one of the other."""
  ways, size = 4, 8 // chunks
  order = zigzag_order(32, ways) if chunks == 2 else np.arange(32)
  assert sorted(order) == list(range(32))
  held = order.reshape(ways, chunks, size)
  pairs = np.zeros((ways, ways), np.int64)
  for rank, step in np.ndindex(ways, ways):
    for mine, theirs in np.ndindex(chunks, chunks):
      query, key = held[rank, mine], held[(rank - step) % ways, theirs]
      distance = query[:, None] - key[None]
      if ((distance >= 0) & (distance < (window or 32))).any():
        pairs[rank, step] += size * (size + 1) // 2 if query[0] == key[0] else size**2
  assert np.array_equal(work(ways, size, chunks, window), pairs)


@pytest.mark.parametrize("changes, ways, heads_ways, seq_len, words", [
    (dict(context="ring", attention_impl="plain"), 2, 1, 64, "='plain'; nearest .*attention_impl='chunked'"),
    (dict(context="zigzag", attention_impl="plain"), 2, 1, 64, "='plain'; nearest valid"),
    (dict(context="zigzag", attention_impl="chunked"), 4, 1, 60, "seq_len=60 .* valid seq_len: 56, 64$"),
    (dict(context="zigzag", attention_impl="chunked"), 4, 1, 6, "seq_len=6 .* valid seq_len: 8$"),
    (dict(attention_impl="splash"), 2, 1, 64, "='ulysses', or model.attention_impl='chunked'$"),
    (dict(context="ulysses", n_heads=12), 4, 2, 64, "6 heads .*=12 .* a row over 2, or model.n_heads=8, 16$"),
])
def test_what_a_context_cannot_do_is_refused(changes, ways, heads_ways, seq_len, words):
  cfg = ModelConfig(d_model=48, **changes)
  check_context(cfg, ways=1, heads_ways=heads_ways, seq_len=seq_len)
  with pytest.raises(ValueError, match=words):
    check_context(cfg, ways=ways, heads_ways=heads_ways, seq_len=seq_len)


def test_what_a_context_can_do_is_not():
  for changes in (dict(context="gather"), dict(context="ring"), dict(context="zigzag"),
                  dict(context="ring", attention_impl="chunked"),
                  dict(context="ulysses", n_heads=8, attention_impl="splash")):
    check_context(ModelConfig(d_model=48, **changes), ways=4, heads_ways=2, seq_len=64)
    check_context(ModelConfig(d_model=48, **changes), ways=4, heads_ways=2, seq_len=None)

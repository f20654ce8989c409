"""The Pallas kernels: interpreted they are the plain definitions, and XLA:TPU compiles them into our step."""
import dataclasses
import functools
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from configs.tiny import get_config
from infer.load import decode_config
from infer.sampling import Sampling
from infer.step import empty_inputs, empty_state, run_step, stack_inputs
from model.cache import init_paged_cache
from model.config import ModelConfig
from model.kernels.attention import KERNEL, Mask
from model.kernels.grouped import GROUPED
from model.kernels.paged import Where, by_sequence, paged
from model.kernels.platform import choose
from model.sharding import MESH_AXES, abstract_mesh, fit, make_mesh, on_devices, place
from model.transformer import abstract_params, make_unstack
from tests.tiny import MOE, abstract_batch, model_config, packed_batch, trace_step
from train.step import abstract_state, make_train_step


@pytest.mark.parametrize("t, n, k, h, window, cap", [
  (128, 4, 2, 16, None, None),  # Grouped.
  (150, 4, 1, 10, 37, 2.0),  # One kv head, an odd width, padded rows.
])
def test_splash_is_plain_attention(t, n, k, h, window, cap):
  """Output and gradients, of packed rows that end in padding, which is finite."""
  rng = np.random.default_rng(n)
  q, keys, v, cotangent = (rng.normal(size=(2, t, heads, h)).astype(np.float32) for heads in (n, k, k, n))
  batch = packed_batch(t=t, b=2)
  pos, segment = batch["positions"], batch["segments"]
  cotangent *= (segment > 0)[..., None, None]
  mask = Mask(pos, segment, pos, segment, window, aligned=True)

  @functools.partial(jax.jit, static_argnums=0)
  def run(name, q, keys, v):
    out, pull = jax.vjp(lambda *qkv: KERNEL[name](*qkv, mask, scale=h**-0.5, cap=cap), q, keys, v)
    return out, *pull(jnp.asarray(cotangent))

  (got, *grads), (want, *wanted) = run("splash", q, keys, v), run("plain", q, keys, v)
  assert np.isfinite(got).all()
  for a, b in zip((np.where(segment[..., None, None] > 0, got - want, 0), *grads), (0 * got, *wanted)):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_products_are_a_loop_over_groups(name):
  """With gradients, on each device of a mesh that splits rows and columns; some groups are empty, and the
  last rows are of none: they are NaN, and reach nothing."""
  rng, P = np.random.default_rng(0), jax.P
  x, w, cotangent = (rng.normal(size=s).astype(np.float32) / 4 for s in ((400, 24), (3, 24, 136), (400, 136)))
  sizes = np.array([[10, 0, 137], [0, 51, 0]], np.int32)
  last = np.concatenate([np.arange(200) >= n for n in sizes.sum(1)])
  x[last] = cotangent[last] = np.nan

  def loop(x, w, sizes):
    ends = np.cumsum(sizes)
    parts = [jnp.dot(x[end - size:end], w[i]) for i, (end, size) in enumerate(zip(ends, sizes))]
    return jnp.concatenate([*parts, jnp.zeros((len(x) - ends[-1], w.shape[2]))])

  loops = lambda x, w: jnp.concatenate([loop(x[:200], w, sizes[0]), loop(x[200:], w, sizes[1])])
  want, pull = jax.vjp(loops, x, w)
  wanted = pull(jnp.where(last[:, None], 0, cotangent))
  specs = P("fsdp", None), P(None, None, "tensor"), P("fsdp", None)

  def local(x, w, sizes):
    return GROUPED[name](x, jax.lax.pcast(w, "fsdp", to="varying"), sizes[0])

  with jax.set_mesh(mesh := make_mesh(fsdp=2, tensor=2, data=2)):
    placed = [jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in zip(
        (x, w, sizes, cotangent), (*specs, P("fsdp", "tensor")))]

    @jax.jit
    def run(x, w, sizes, cotangent):
      out, pull = jax.vjp(lambda x, w: on_devices(local, specs, P("fsdp", "tensor"))(x, w, sizes), x, w)
      return out, *pull(cotangent)

    got, dx, dw = map(np.asarray, run(*placed))
  for a, b in ((got[~last], want[~last]), (dx[~last], wanted[0][~last]), (dw, wanted[1])):
    np.testing.assert_allclose(a, b, atol=1e-5)


def paged_inputs(n=4, k=2, h=16, *, page=4):
  """Three sequences that feed one token each, one without a request, and a chunk: three tokens of one, one of
  another and two of padding; in pages of which nothing else is a number."""
  rng = np.random.default_rng(0)
  kv = np.full((16, page, 2 * k, h), np.nan, np.float32)
  lengths, pages = [9, 5, 12, 0, 11, 6], np.zeros((6, 5), np.int32)
  free = iter(1 + rng.permutation(15))
  kv[0] = 1.0
  for row, length in enumerate(lengths):
    for i in range(-(-length // page)):
      pages[row, i] = at = next(free)
      kv[at, :length - i * page] = rng.normal(size=kv[at, :length - i * page].shape)
  where = Where(np.array([8, 4, 11, 0, 8, 9, 10, 5, 9, 0], np.int32), pages[:4],
                np.array([*pages[4, :3], *pages[5, :2]]), np.array([0, 3, 5], np.int32),
                np.array([0, 0, 0, 1, 1, 0]), np.int32(4))
  return rng.normal(size=(10, n, h)).astype(np.float32), jnp.asarray(kv), where, lengths, pages


OF = [0, 1, 2, 3, 4, 4, 4, 5]  # The sequence of each of its tokens.


@pytest.mark.parametrize("together", [(1, 4), (2, 2), (8, 8)])
@pytest.mark.parametrize("window, cap", [(None, None), (4, 2.0)])
def test_paged_is_plain_attention_to_each_sequence(window, cap, together, monkeypatch):
  monkeypatch.setattr("model.kernels.paged.TOGETHER_ON_CPU", together)  # Pages.
  q, kv, where, lengths, pages = paged_inputs()

  def run(q, kv, where):
    def read(page_B):
      return tuple(jnp.swapaxes(kv[page_B][:, :, i::2], 1, 2) for i in (0, 1))

    return paged(q, read, where, page_size=4, window=window, scale=0.25, cap=cap)

  got = jax.jit(run)(q, kv, where)
  assert np.isfinite(got).all()
  for token, (row, pos) in enumerate(zip(OF, where.pos_T)):
    length = lengths[row]
    if not length:
      continue
    keys, values = (kv[pages[row]].reshape(-1, *kv.shape[2:])[None, :length, i::2] for i in (0, 1))
    all_pos, one = np.arange(length)[None], np.ones((1, 1), np.int32)
    mask = Mask(np.array([[pos]]), one, all_pos, np.ones_like(all_pos), window, aligned=False)
    want = KERNEL["plain"](q[None, token:token + 1], keys, values, mask, scale=0.25, cap=cap)[0, 0]
    np.testing.assert_allclose(got[token], want, atol=1e-5)


def test_the_kernel_is_told_of_each_sequence():
  """Each token's sequence, its length and its pages, as a TPU has them."""
  *_, where, lengths, pages = paged_inputs()
  length_M, page_ML, start_M, n = map(np.asarray, jax.jit(by_sequence)(where))
  assert n == 6 and len(length_M) == len(page_ML) == len(start_M) - 1 == 7
  for i in range(n):
    assert [*range(start_M[i], start_M[i + 1])] == [t for t, row in enumerate(OF) if row == i]
    assert length_M[i] == max(lengths[i], 1)
    used = -(-lengths[i] // 4)
    np.testing.assert_array_equal(page_ML[i, :used], pages[i, :used])


@pytest.mark.parametrize("on, H, dtype, by_kernel", [
  ("tpu", 128, None, True), ("tpu", 64, None, False), ("tpu", 128, "int8", False), ("cpu", 128, None, False),
  ("gpu", 128, None, False)])
def test_pages_go_to_the_kernel_where_it_can_read_them(on, H, dtype, by_kernel):
  """On TPU it takes heads of whole lanes."""
  cfg = ModelConfig(vocab_size=64, n_layers=1, d_model=64, n_heads=4, n_kv_heads=2, head_dim=H).validate()

  def run(q_1TNH, k_1TKH):
    zeros = lambda *shape: jnp.zeros((1, *shape), jnp.int32)
    where = Where(zeros(4), zeros(2, 8), zeros(8), zeros(2), zeros(2), zeros())
    cache = dataclasses.replace(init_paged_cache(cfg, 1, 9, 16, dtype)[0], where=where)
    attend = lambda q, k, cache: cache.attend(q, k, k, own_heads=lambda x: x, latent=None, window=None,
                                              scale=1.0, cap=None)[0]
    return jax.shard_map(attend, out_specs=jax.P(), check_vma=False)(q_1TNH, k_1TKH, cache)

  with jax.sharding.use_abstract_mesh(abstract_mesh(on=on)):
    jaxpr = jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct((1, 4, n, H), "float32") for n in (4, 2)))
  assert ("ragged_paged_attention" in str(jaxpr)) == by_kernel


@pytest.mark.parametrize("changes, seq, tpu, others", [
  ({}, 1, "splash", "dot_product"),
  (dict(attention_softcap=5.0), 1, "splash", "chunked"),
  (dict(context="gather"), 2, "chunked", "dot_product"),
  (dict(context="ulysses"), 2, "splash", "dot_product"),
  (dict(context="ring"), 2, "chunked", "chunked"),
  (dict(context="ring"), 1, "splash", "dot_product"),
  (dict(attention_impl="plain"), 1, "plain", "plain"),
])
def test_auto_is_what_can_serve_it_there(changes, seq, tpu, others):
  cfg = ModelConfig(vocab_size=100, **MOE | changes).validate()
  chosen = [fit(cfg, mesh) for mesh in (abstract_mesh(on="tpu", seq=seq), make_mesh(seq=seq, data=-1),
                                        abstract_mesh(seq=seq))]
  assert [c.attention_impl for c in chosen] == [tpu, others, others]
  assert [c.grouped_impl for c in chosen] == ["megablox", "ragged_dot", "ragged_dot"]
  assert all(choose(c, "cpu", seq) == c for c in chosen)  # A name stays.


def test_kernels_trace_in_a_pipeline():
  """Where each device runs its own stage, and shard_map checks what varies over which axes."""
  cfg = get_config()
  cfg.model = model_config(**MOE, context="ulysses", exchange="ragged")
  cfg.data.tokenizer.vocab_size = cfg.model.vocab_size
  cfg.mesh = dataclasses.replace(cfg.mesh, fsdp=1, stage=2, expert=2, seq=2)
  _, jaxpr = trace_step(cfg.validate(8), abstract_mesh(on="tpu", stage=2, expert=2, seq=2), closed=True)
  text = str(jaxpr)
  assert all(name in text for name in ("splash_mha_dkv", "tgmm", "ragged_all_to_all"))


# Compiled by XLA:TPU for chips that are not here.

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
pod = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the wheel libtpu")


def tpu_mesh(name, monkeypatch, **sizes):
  for key, value in dict(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true").items():
    monkeypatch.setitem(os.environ, key, value)
  devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[name]).devices
  shape = [sizes.get(axis, 1) for axis in MESH_AXES]
  return jax.sharding.Mesh(np.array(devices).reshape(shape), MESH_AXES,
                           axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def compiled_text(f, *args):
  return jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).compile().as_text()


def kernels_of(text):
  return set(re.findall(r"%([\w-]+?)[.\d]* = .*tpu_custom_call", text))


@pod
@pytest.mark.slow
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_our_step_compiles_with_the_kernels(name, monkeypatch):
  """bf16, two windows, a soft cap, grouped heads of 64, experts on four devices that exchange tokens."""
  cfg, mesh = get_config(), tpu_mesh(name, monkeypatch, expert=4)
  cfg.mesh = dataclasses.replace(cfg.mesh, fsdp=1, expert=4)
  cfg.batch_size, cfg.seq_len = 4, 256
  cfg.model = ModelConfig(
      vocab_size=384, n_layers=2, d_model=128, n_heads=4, n_kv_heads=2, head_dim=64, remat="full",
      window=100, layer_pattern=("local", "global"), attention_softcap=20.0, exchange="ragged",
      **MOE | dict(d_expert=128))
  graphdef, state = abstract_state(cfg.validate(4), mesh)
  with jax.set_mesh(mesh):
    text = compiled_text(make_train_step(cfg, graphdef, state.params), state, abstract_batch(cfg, mesh))
  assert kernels_of(text) >= {"splash_mha_fwd_segmented_residuals", "splash_mha_dq_segmented_no_residuals",
                              "splash_mha_dkv_segmented_no_residuals", "gmm", "tgmm"}
  assert "ragged-all-to-all" in text


@pod
@pytest.mark.slow
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_engines_step_compiles(name, monkeypatch):
  """bf16, heads over two devices and requests over two, rows and a chunk, global and windowed layers."""
  mesh = tpu_mesh(name, monkeypatch, tensor=2, data=2)
  cfg = ModelConfig(vocab_size=384, n_layers=2, d_model=256, n_heads=4, n_kv_heads=2, head_dim=128,
                    window=100, layer_pattern=("local", "global"), attention_softcap=20.0).validate()
  cfg = decode_config(cfg, mesh)
  graphdef, params = abstract_params(cfg, mesh)
  with jax.set_mesh(mesh):
    weights = jax.eval_shape(make_unstack(cfg), params)
    state = jax.eval_shape(lambda: empty_state(cfg, 2, 16, 100, 16, None))
    inputs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place(
      mesh, cfg.rules("batch", *[None] * (a.ndim - 1)))), dataclasses.replace(
        empty_inputs(2, 7, 64, 8, G=4, L=16, S=16, V=384),
        settings=stack_inputs([Sampling()] * 16, [0] * 16, (), 2)))
    text = compiled_text(functools.partial(run_step, graphdef), weights, inputs, state)
  assert "ragged_paged_attention_kernel" in kernels_of(text)

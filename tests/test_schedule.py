"""What train.hlo, train.schedule, train.buffers and train.findings read from programs: small ones written by
hand, whose numbers are known, and real ones of XLA:CPU."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.buffers import live_at_peak
from train.findings import find
from train.hlo import ROOT, Program, product_flops, read_groups, read_shapes
from train.schedule import Wire, read_timeline

CLOCK = 1e9  # So 1000 cycles are a microsecond.
WIRE = Wire({"data": 2, "fsdp": 4}, 1e9)  # 1000 bytes are a microsecond.
TABLES = f"""
FileNames
1 "{ROOT}/model/layers.py"
2 "/elsewhere/library.py"

FunctionNames
1 "linear"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=52 end_line=52 column=1 end_column=2}}
2 {{file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}

"""
CYCLES = lambda n: f'backend_config={{"window_config":{{"estimated_cycles":"{n}"}}}}'
GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"


def program(entry, *computations, head=""):
  body = "\n\n".join([*computations, f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{entry}\n}}"])
  return Program(f"HloModule test, is_scheduled=true{head}\n{TABLES}{body}\n")


def loop(name, trips, body):
  return f"""%{name}_condition (c: (s32[], f32[8])) -> pred[] {{
  %limit = s32[] constant({trips})
  %c = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}

%{name}_body (b: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %b = (s32[], f32[8]) parameter(0)
{body}
  ROOT %out = (s32[], f32[8]) tuple(%b)
}}"""


def entry_loop(name, more=""):
  return f"""  %p = f32[8] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]) tuple(%zero, %p)
{more}
  %run = (s32[], f32[8]) while(%start), condition=%{name}_condition, body=%{name}_body
  ROOT %end = f32[8] get-tuple-element(%run), index=1"""


FUSED = """%fused (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  ROOT %n = f32[8] negate(%a)
}"""


def test_cycles_of_nested_loops():
  """3 x (100 + 5 x 7) + 11."""
  work = lambda name, n: f"  %{name} = f32[8] fusion(%b), kind=kLoop, calls=%fused, {CYCLES(n)}"
  inner = loop("inner", 5, work("w", 7))
  outer = loop("outer", 3, work("x", 100) + """
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]) tuple(%zero, %b)
  %again = (s32[], f32[8]) while(%start), condition=%inner_condition, body=%inner_body""")
  once = f"  %once = f32[8] fusion(%p), kind=kLoop, calls=%fused, {CYCLES(11)}"
  timeline = read_timeline(program(entry_loop("outer", once), FUSED, inner, outer), WIRE, CLOCK)
  assert timeline.cycles == 3 * (100 + 5 * 7) + 11
  assert timeline.exposed_s == 0 and not timeline.endless


def test_a_limit_that_is_carried_and_a_start_that_is_not_0():
  text = loop("l", 0, f"  %w = f32[8] fusion(%b), kind=kLoop, calls=%fused, {CYCLES(10)}").replace(
      "%limit = s32[] constant(0)\n", "").replace(
      "%i = s32[] get-tuple-element(%c), index=0",
      "%i = s32[] get-tuple-element(%c), index=0\n  %limit = s32[] get-tuple-element(%c), index=1")
  entry = """  %p = f32[8] parameter(0)
  %two = s32[] constant(2)
  %nine = s32[] constant(9)
  %copied = s32[] copy(%nine)
  %start = (s32[], s32[], f32[8]) tuple(%two, %copied, %p)
  %run = (s32[], s32[], f32[8]) while(%start), condition=%l_condition, body=%l_body
  ROOT %end = f32[8] get-tuple-element(%run), index=2"""
  assert read_timeline(program(entry, FUSED, text), WIRE, CLOCK).cycles == 7 * 10


def test_a_loop_without_a_number_is_said_and_counted_once():
  text = loop("l", 4, f"  %w = f32[8] fusion(%b), kind=kLoop, calls=%fused, {CYCLES(10)}").replace(
      "%limit = s32[] constant(4)", "%limit = s32[] custom-call()")
  timeline = read_timeline(program(entry_loop("l"), FUSED, text), WIRE, CLOCK)
  assert timeline.cycles == 10 and len(timeline.endless) == 1


def test_a_synchronous_collective_is_waited_for():
  """Of 4 devices each sends 3 / 4 of the 4096 bytes that come out, in each of 5 runs."""
  body = f"""  %g = f32[1024] all-gather(%b), {GROUPS}, dimensions={{0}}, metadata={{stack_frame_id=2}}
  %w = f32[8] fusion(%g), kind=kLoop, calls=%fused, {CYCLES(1000)}"""
  timeline = read_timeline(program(entry_loop("l"), FUSED, loop("l", 5, body)), WIRE, CLOCK)
  [t] = timeline.transfers
  assert (t.kind, t.axes, t.times, t.asynchronous) == ("all-gather", ("fsdp",), 5, False)
  assert t.wire_bytes == 5 * 3072
  assert timeline.exposed_s == pytest.approx(5 * 3.072e-6) == t.exposed_s
  assert t.source == "model/layers.py:52", "the innermost line of ours, not the library's"


@pytest.mark.parametrize("cycles, waited", [(1000, 2.072e-6), (3072, 0.0), (9000, 0.0)])
@pytest.mark.parametrize("form", ["pair", "fusion", "async"])
def test_an_asynchronous_one_is_waited_for_as_far_as_nothing_hides_it(form, cycles, waited):
  gather = f"all-gather(%p), channel_id=3, {GROUPS}, dimensions={{0}}"
  inside = lambda name: (f"%{name} (p: f32[256]) -> f32[1024] {{\n  %p = f32[256] parameter(0)\n"
                         f"  ROOT %g = f32[1024] {gather}\n}}")
  start, end, more = {
      "pair": (f"(f32[256], f32[1024]) {gather.replace('gather(', 'gather-start(')}",
               "f32[1024] all-gather-done(%s)", ()),
      "fusion": ("(f32[256], f32[1024]) fusion(%p), kind=kCustom, calls=%begin",
                 "f32[1024] fusion(%w), kind=kCustom, calls=%finish", (inside("begin"), inside("finish"))),
      "async": ("((f32[256]), f32[1024]) async-start(%p), calls=%begin", "f32[1024] async-done(%s)",
                (inside("begin"),))}[form]
  names = {"pair": ("s", "d"), "fusion": ("async-collective-start.1", "async-collective-done.1"),
           "async": ("s", "d")}[form]
  compute = "async_collective_fusion.1" if form == "fusion" else "fused"
  entry = f"""  %p = f32[8] parameter(0)
  %{names[0]} = {start}
  %w = f32[8] fusion(%p), kind=kLoop, calls=%{compute}, {CYCLES(cycles)}
  ROOT %{names[1]} = {end}"""
  timeline = read_timeline(program(entry, FUSED, inside("async_collective_fusion.1"), *more), WIRE, CLOCK)
  [t] = timeline.transfers
  assert t.asynchronous and t.axes == ("fsdp",) and t.wire_bytes == 3072
  assert timeline.cycles == cycles
  assert timeline.exposed_s == pytest.approx(waited)
  assert t.overlap_s == pytest.approx(cycles / CLOCK)


def test_the_wire_carries_one_at_a_time():
  """Two pairs started together: the second is through after both."""
  pairs = "source_target_pairs={{0,4},{4,0}}"
  entry = "\n".join([
      "  %p = f32[8] parameter(0)",
      *(f"  %s{i} = (f32[250], f32[250], u32[], u32[]) collective-permute-start(%p), {pairs}"
        for i in (1, 2)),
      f"  %w = f32[8] fusion(%p), kind=kLoop, calls=%fused, {CYCLES(1500)}",
      *(f"  %d{i} = f32[250] collective-permute-done(%s{i})" for i in (1, 2)),
      "  ROOT %e = f32[8] negate(%w)"])
  timeline = read_timeline(program(entry, FUSED), WIRE, CLOCK)
  assert [t.axes for t in timeline.transfers] == [("data",)] * 2
  assert [t.exposed_s for t in timeline.transfers] == pytest.approx([0.0, 0.5e-6])


@pytest.mark.parametrize("cycles, waited", [(1_000_000, 3096e-6), (9_000_000, 0.0)])
def test_between_slices_it_is_the_slow_network(cycles, waited):
  """As XLA:TPU writes it: a send and a recv of one name, the links free meanwhile. Both devices of 2 slices
  send half of 4096 bytes twice."""
  name = ('frontend_attributes={_xla_host_transfer_rendezvous="psum.3_0",'
          '_xla_megascale_transfer_type="ALL_REDUCE"}')
  entry = f"""  %p = f32[1024] parameter(0)
  %first = token[] after-all()
  %s = (f32[1024], u32[], token[]) send(%p, %first), channel_id=3, is_host_transfer=true, {name}
  %r = (f32[1024], u32[], token[]) recv(%first), channel_id=2, is_host_transfer=true, {name}
  %g = f32[1024] all-gather(%p), {GROUPS}, dimensions={{0}}
  %w = f32[8] fusion(%g), kind=kLoop, calls=%fused, {CYCLES(cycles)}
  %sd = token[] send-done(%s), channel_id=3, is_host_transfer=true
  %rd = (f32[1024], token[]) recv-done(%r), channel_id=2, is_host_transfer=true
  ROOT %out = f32[1024] get-tuple-element(%rd), index=0"""
  slow = Wire({"data": 2, "fsdp": 4}, 1e9, 2, "data", 1e6)
  timeline = read_timeline(program(entry, FUSED), slow, CLOCK)
  between, links = timeline.transfers
  assert (between.kind, between.axes, between.asynchronous) == ("all-reduce", ("data",), True)
  assert between.wire_bytes == 4096 and between.wire_s == pytest.approx(4096e-6)
  assert between.exposed_s == pytest.approx(max(waited - 3.072e-6, 0))
  assert links.exposed_s == pytest.approx(3.072e-6) and links.axes == ("fsdp",)


@pytest.mark.parametrize("text, want", [
    ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=2,'b'=3] {'a'}", [[0, 3], [1, 4], [2, 5]]),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]), ("dimensions={0}", None)])
def test_groups_in_every_notation(text, want):
  got = read_groups(f"channel_id=1, {text}, use_global_device_ids=true")
  assert got is None and want is None or got.tolist() == want


def test_shapes_and_their_padding():
  a, b, c = read_shapes("(bf16[5,200]{1,0:T(8,128)(2,1)}, /*index=1*/f32[]{:T(128)}, "
                        "s8[3,4]{0,1:T(4,128)(4,1)S(1)})")
  assert (a.bytes, a.padded_bytes, a.space) == (2 * 1000, 2 * 8 * 256, 0)
  assert (b.bytes, b.padded_bytes) == (4, 512)
  assert (c.bytes, c.padded_bytes, c.space) == (12, 4 * 128, 1)


def test_products_of_real_programs():
  """FLOPs, trips and lines of a scan in a scan, as XLA:CPU compiles it."""
  @jax.jit
  def f(x, w):
    again = lambda x, _: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)
    return jax.lax.scan(again, x, None, length=3)[0]

  compiled = f.lower(jnp.ones((4, 16)), jnp.ones((16, 16))).compile()
  timeline = read_timeline(Program(compiled.as_text()), WIRE, CLOCK)
  assert timeline.flops == 3 * 5 * 2 * 4 * 16 * 16 and not timeline.endless


@pytest.mark.parametrize("window, labels, shapes, want", [
    ("", "bf_io->bf", ("bf16[64,32]", "bf16[32,16]", "bf16[64,16]"), 2 * 64 * 32 * 16),
    # How XLA:TPU writes BD,DNH->BNH: the heads are places of which each meets one tap.
    ("window={size=4 pad=3_3 rhs_reversal=1}, ", "bf0_i0o->b0f",
     ("bf16[64,32,1]", "bf16[32,4,16]", "bf16[64,4,16]"), 2 * 64 * 32 * 4 * 16),
    # and BNH,NHD->BD: they are summed over.
    ("window={size=4}, ", "b0f_0io->bf0", ("bf16[64,4,16]", "bf16[4,16,32]", "bf16[64,32,1]"),
     2 * 64 * 4 * 16 * 32),
    # A picture, 3 x 3, stride 2, padded: of the taps of each side one of 3 + 3 misses.
    ("window={size=3x3 stride=2x2 pad=1_0x1_0}, ", "b01f_01io->b01f",
     ("f32[2,4,4,8]", "f32[3,3,8,5]", "f32[2,2,2,5]"), 2 * 2 * 8 * 5 * 5 * 5)])
def test_flops_of_convolutions(window, labels, shapes, want):
  left, right, out = shapes
  ops = program(f"""  %p = {left} parameter(0)
  %q = {right} parameter(1)
  ROOT %c = {out} convolution(%p, %q), {window}dim_labels={labels}""").computations["main"]
  assert product_flops(ops, ops["c"]) == want


def test_what_lives_at_the_peak():
  """The two large ones, not the one made after the first is dead, nor what lies in the core's memory."""
  big = lambda n, space="": f"f32[{n},1024]{{1,0:T(8,128){space}}}"
  op = lambda name, type_, *args: (f"  %{name} = {type_} negate({', '.join('%' + a for a in args)}), "
                                   'metadata={op_name="' + name + '" stack_frame_id=1}')
  entry = "\n".join([f"  %p = {big(8)} parameter(0)", op("a", big(64), "p"), op("b", big(32), "a"),
                     op("v", big(512, "S(1)"), "b"), op("c", big(48), "v"),
                     op("d", big(8), "b", "c").replace("%d", "ROOT %d")])
  live = live_at_peak(program(entry))
  assert [(b.op, b.bytes) for b in live] == [("a", 64 * 4096), ("b", 32 * 4096), ("p", 8 * 4096)]
  assert live[0].source == "model/layers.py:52"


def test_findings():
  wide = "bf16[2048,32768]{1,0:T(8,128)(2,1)}"
  entry = f"""  %p = f32[8,8] parameter(0)
  %g = {wide} all-gather(%p), {GROUPS}, dimensions={{0}}
  %r = {wide} all-reduce(%g), {GROUPS}, to_apply=%add
  %c = {wide} copy(%r)
  %n = f32[4194304,8]{{1,0:T(8,128)}} negate(%p)
  ROOT %f = f32[8,8] fusion(%p, %p), kind=kOutput, calls=%product"""
  product = """%product (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8] parameter(0)
  %b = f32[8,8] parameter(1)
  ROOT %dot = f32[8,8] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}"""
  p = program(entry, product)
  timeline = read_timeline(p, WIRE, CLOCK)
  said = "x.cc:1] [SPMD] Involuntary full rematerialization. The compiler cannot go from ...\nfine\n"
  kinds = [f.kind for f in find(p, timeline, said, compute_dtype="bfloat16")]
  assert kinds == ["rematerialised", "float32 product", "layout copy", "padding", "all-reduce",
                   "gathered whole"]
  assert "float32 product" not in [f.kind for f in find(p, timeline, "", compute_dtype="float32")]
  assert timeline.flops == 2 * 8 * 8 * 8


def test_collectives_by_axis_of_a_real_program():
  mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
  f = jax.shard_map(lambda x: jax.lax.psum(jax.lax.all_gather(x, "fsdp", tiled=True), "data"),
                    in_specs=jax.P(("data", "fsdp")), out_specs=jax.P("fsdp"), check_vma=False)
  with jax.set_mesh(mesh):
    x = jax.device_put(np.ones(8 * 16, np.float32), jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    text = jax.jit(f).lower(x).compile().as_text()
  found = {(t.kind, t.axes): t.wire_bytes for t in read_timeline(Program(text), WIRE, CLOCK).transfers}
  whole = 4 * 16 * 4  # Bytes of what 4 devices have together.
  assert found == {("all-gather", ("fsdp",)): whole * 3 / 4, ("all-reduce", ("data",)): 2 * whole / 2}


def test_a_computation_of_another_core_ends_where_it_ends():
  text = """HloModule m

%on_sparse (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p)
}, execution_thread="sparsecore"

%after (q: f32[8]) -> f32[8] {
  ROOT %q = f32[8]{0} parameter(0)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0)
}
"""
  assert {name: list(ops) for name, ops in Program(text).computations.items()} == {
    "on_sparse": ["p", "n"], "after": ["q"], "main": ["x"]}

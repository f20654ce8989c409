"""python -m train.rehearse --config=configs/dense_8b.py --topology=v5p:4x8x8 [--config.a.b=value ...]

Compiles the train step of the run with the real TPU compiler, on this machine, for TPUs that are not here:
does it fit, how long does it take, what waits for what. Nothing runs; times are the compiler's own estimates
and the table of chips (train/chips.py). Needs no TPU: pip install -e ".[rehearse]".
Exit codes: 0 it fits, 1 it does not, 2 a mistake in the settings.
"""
import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import resource
import sys
import tempfile
import time

from data.flags import ROOT, load, versions

EPILOG = """examples:
  python -m train.rehearse --config=configs/dense_8b.py      for the topology that the config declares
  ... --decode --context=8192                                the decode step instead
  ... --xla_flags="--xla_a=true --xla_b=1"                   without and with flags, side by side
  python -m train.rehearse --all                             writes configs/REHEARSALS.md
"""
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
CHIPS = {"tpu7x": "v7x"}  # Topology names of chips that train/chips.py calls otherwise.
# The clock behind "estimated_cycles": peak FLOP/s over 2 x side^2 of the matrix units (v5p: 8 of 128), which
# are assumed.
CLOCK_HZ = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "v7x": 2.2e9}
HARMLESS = ("host bounds for accelerator type", "Logging before InitGoogle", "worker hostname",
            "Source Location Trace", "libtpu_init_utils.cc")
GIB = 2**30


@dataclasses.dataclass(slots=True)
class Compiled:
  """What is kept of a compilation; text is the scheduled program, None where it does not fit."""
  text: str | None
  error: str
  memory: dict
  stderr: str
  seconds: float
  compiler_bytes: int  # The most that this process has used.
  cached: bool


def main(argv=None) -> int:
  for name, value in ENVIRONMENT.items():
    os.environ[name] = value  # Before jax starts: a TPU host would else wait for its TPU.
  if importlib.util.find_spec("libtpu") is None:
    print('train.rehearse: error: libtpu, the TPU compiler, is not installed: pip install -e ".[rehearse]"',
          file=sys.stderr)
    return 2
  argv = sys.argv[1:] if argv is None else argv
  if "--all" in argv:
    from train.rehearsals import write_all
    return write_all(ROOT / "configs" / "REHEARSALS.md")
  parser = argparse.ArgumentParser(prog="train.rehearse", description=__doc__, epilog=EPILOG,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology", help="chip and torus, as v5p:4x4x4; default: what the config declares")
  parser.add_argument("--xla_flags", action="append", default=[], metavar='"--a=b --c=d"',
                      help="compile with these flags too, side by side; repeatable")
  parser.add_argument("--decode", action="store_true", help="the decode step instead of the train step")
  parser.add_argument("--context", type=int, help="with --decode: tokens of a sequence (default: seq_len)")
  parser.add_argument("--slices", type=int, help="mesh.slices, for short")
  parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
  parser.add_argument("--all", action="store_true", help="every config that declares a topology")
  cfg, args = load(parser, argv, elsewhere=True)
  from train.rehearsals import render, render_side_by_side
  try:
    if args.slices is not None:
      cfg.mesh.slices = args.slices
    topology = args.topology or declared_topology(args.config)
    target = find_target(cfg, topology)
    if args.decode:
      reports = [rehearse_decode(cfg, target, args.context or cfg.seq_len, read_flags(f))
                 for f in ["", *args.xla_flags]]
    else:
      reports = [rehearse(cfg, target, read_flags(f)) for f in ["", *args.xla_flags]]
  except ValueError as e:
    print(f"train.rehearse: error: {e}", file=sys.stderr)
    return 2
  if args.json:
    print(json.dumps({"config": args.config, "reports": reports}, indent=1))
  else:
    print(f"{args.config} on {topology}: compiled by XLA:TPU, never run")
    print(render(reports[0]) if len(reports) == 1 else render_side_by_side(reports), end="")
  return 0 if all(r["fits"] for r in reports) else 1


def declared_topology(config: str) -> str:
  """Of "configs/x.py:arg", whose TOPOLOGY says for each arg the topology that it is made for.

  Raises:
    ValueError: it says none.
  """
  file, _, arg = config.partition(":")
  declared = read_topologies(file)
  if arg not in declared:
    raise ValueError(f"--config={config} declares no TOPOLOGY: give one, as --topology=v5p:4x4x4")
  return declared[arg]


def read_topologies(file) -> dict[str, str]:
  spec = importlib.util.spec_from_file_location(f"topologies_{pathlib.Path(file).stem}", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return getattr(module, "TOPOLOGY", {})


def shipped() -> dict[str, str]:
  """"configs/x.py:arg" -> topology, of all that declare one."""
  return {f"configs/{path.name}" + (f":{arg}" if arg else ""): topology
          for path in sorted((ROOT / "configs").glob("[!_]*.py"))
          for arg, topology in read_topologies(path).items()}


def read_flags(text: str) -> dict[str, str]:
  """"--a=b --c" -> {"a": "b", "c": "true"}."""
  words = text.split()
  if bad := [w for w in words if not re.fullmatch(r"--\w+(=\S+)?", w)]:
    raise ValueError(f"--xla_flags: {bad[0]!r} is not of the form --name=value")
  return {name: value or "true" for name, _, value in (w[2:].partition("=") for w in words)}


# The machine.

@dataclasses.dataclass(frozen=True, slots=True)
class Target:
  """A topology and the run's mesh on it."""
  topology: str
  name: str  # Of its chip in train/chips.py.
  chip: object
  mesh: object


def chips_in(topology: str) -> int:
  """v5p:2x4x4 -> 32 chips of each slice."""
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
  if match is None:
    raise ValueError(f"--topology={topology} is not a chip and its torus; nearest valid: v5p:4x4x4")
  n = 1
  for side in match[2].split("x"):
    n *= int(side)
  return n


def find_target(cfg, topology: str) -> Target:
  """Raises ValueError: an unknown chip, a torus that it does not come in, a mesh of another number of
  devices or slices."""
  from train.chips import CHIP
  chips_in(topology)
  prefix = topology.partition(":")[0]
  name = CHIPS.get(prefix, prefix)
  if name not in CLOCK_HZ:
    raise ValueError(f"--topology={topology}: no such TPU; known: "
                     f"{', '.join(sorted({*CLOCK_HZ, *CHIPS} - set(CHIPS.values())))}")
  from jax.experimental import topologies

  from model.sharding import make_mesh
  more = {"num_slices": cfg.mesh.slices} if cfg.mesh.slices > 1 else {}
  try:
    with quiet():
      devices = topologies.get_topology_desc(topology, "tpu", **more).devices
  except Exception as e:
    raise ValueError(f"--topology={topology}: {str(e)[:300]}") from None
  cfg.validate(len(devices))
  mesh = make_mesh(devices=devices, **dataclasses.asdict(cfg.mesh))
  return Target(topology, name, CHIP[name], mesh)


@contextlib.contextmanager
def quiet():
  """Yields a function that returns what was written to stderr since, by C++ too; libtpu's harmless lines are
  left out."""
  sys.stderr.flush()
  saved, file = os.dup(2), tempfile.TemporaryFile("w+b")  # noqa: SIM115
  text = lambda: "".join(line for line in _lines(file) if not any(word in line for word in HARMLESS))
  os.dup2(file.fileno(), 2)
  try:
    yield text
  finally:
    sys.stderr.flush()
    os.dup2(saved, 2)
    os.close(saved)


def _lines(file):
  file.seek(0)
  return file.read().decode(errors="replace").splitlines(keepends=True)


# Programs.

def lower_train_step(cfg, mesh):
  """The very step of the run, on abstract arrays, with its state donated."""
  import jax

  from train.step import abstract_batch, abstract_state, make_train_step
  graphdef, state = abstract_state(cfg, mesh)
  with jax.set_mesh(mesh):
    step = jax.jit(make_train_step(cfg, graphdef, state.params), donate_argnums=0)
    return step.trace(state, abstract_batch(cfg, mesh)).lower(lowering_platforms=("tpu",))


def compile_cached(lowered, flags: dict, topology: str, folder: pathlib.Path) -> Compiled:
  """Compiles, or reads what an earlier run compiled: of the same program, flags, topology and compiler. The
  names of source lines may be those of that run."""
  about = json.dumps([flags, topology, versions(("jax", "libtpu"))])
  key = hashlib.sha256((lowered.as_text() + about).encode()).hexdigest()[:20]
  path = folder / f"{key}.json.gz"
  if path.exists():
    return Compiled(**json.loads(gzip.decompress(path.read_bytes())) | {"cached": True})
  started = time.perf_counter()
  with quiet() as said:
    try:
      program = lowered.compile(compiler_options=flags or None)
      text, error, stats = program.as_text(), "", program.memory_analysis()
      memory = {name: getattr(stats, f"{name}_in_bytes") for name in (
          "argument_size", "output_size", "alias_size", "temp_size", "generated_code_size", "peak_memory")}
    except Exception as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        if "No such compile option" in str(e) or "INVALID_ARGUMENT" in str(e):
          raise ValueError(f"the compiler refuses: {str(e)[:300]}") from None
        raise RuntimeError(f"{e}\n{said()}") from e
      text, error, memory = None, str(e), {}
    stderr = said()
  compiled = Compiled(text, error, memory, stderr[-20_000:], time.perf_counter() - started,
                      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, False)
  folder.mkdir(parents=True, exist_ok=True)
  path.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(compiled)).encode()))
  return compiled


# Reports.

def rehearse(cfg, target: Target, flags: dict) -> dict:
  """The report of a train step, as JSON has it."""
  from model.count import active_parameters, flops_per_token
  from train.step import abstract_state
  compiled = compile_cached(lower_train_step(cfg, target.mesh), flags, target.topology, _folder(cfg))
  report = describe(cfg, target, compiled) | {"flags": flags, "what": "train step"}
  if not report["fits"]:
    return report
  params = abstract_state(cfg, target.mesh)[1].params
  tokens = cfg.batch_size * cfg.seq_len
  useful = tokens * flops_per_token(cfg.model, cfg.seq_len, active_parameters(cfg.model, params))
  n, step_s = target.mesh.size, report["step_s"]
  return report | {
      "tokens_per_s_per_chip": tokens / step_s / n, "mfu": useful / n / step_s / _peak_flops(cfg, target),
      "useful_flops": useful / n}


def rehearse_decode(cfg, target: Target, context: int, flags: dict) -> dict:
  """The report of one decode step with the largest batch of `context` tokens that is said to fit."""
  from train.rehearse_decode import lower_decode, plan_decode
  plan = plan_decode(cfg, target, context)
  if plan["batch"] == 0:
    return plan | {"fits": False, "what": "decode step", "flags": flags}
  compiled = compile_cached(lower_decode(cfg, target.mesh, plan["batch"], context), flags, target.topology,
                            _folder(cfg))
  return describe(cfg, target, compiled) | plan | {"flags": flags, "what": "decode step"}


def describe(cfg, target: Target, compiled: Compiled) -> dict:
  """What the compiled program says: memory, time, collectives, buffers, findings."""
  from train.buffers import live_at_peak
  from train.findings import find
  from train.hlo import Program
  from train.schedule import Wire, read_timeline
  chip, clock = target.chip, CLOCK_HZ[target.name]
  report = {
      "topology": target.topology, "chips": target.mesh.size, "slices": cfg.mesh.slices,
      "mesh": {a: n for a, n in target.mesh.shape.items() if n > 1},
      "versions": versions(("jax", "libtpu")), "fits": compiled.text is not None, "hbm_bytes": chip.hbm_bytes,
      "memory": compiled.memory, "compile_s": compiled.seconds, "compiler_bytes": compiled.compiler_bytes,
      "cached": compiled.cached}
  if compiled.text is None:
    return report | read_exhausted(compiled.error)
  program = Program(compiled.text)
  wire = Wire(dict(target.mesh.shape), 2 * chip.link_bandwidth, cfg.mesh.slices, cfg.mesh.slice_axis,
              chip.dcn_bandwidth)
  pairs = [min(w or cfg.seq_len, cfg.seq_len) / cfg.seq_len for w in cfg.model.windows]
  visible = sum(w - w * w / 2 for w in pairs) / len(pairs)
  timeline = read_timeline(program, wire, clock, visible=visible)
  findings = find(program, timeline, compiled.stderr, compute_dtype=cfg.model.compute_dtype)
  core_s, kernels_s = timeline.cycles / clock, timeline.kernel_flops / _peak_flops(cfg, target)
  return report | {
      "flops": timeline.flops, "core_s": core_s, "exposed_s": timeline.exposed_s, "kernels_s": kernels_s,
      "kernel_runs": sum(times for _, times in timeline.kernels),
      "step_s": core_s + kernels_s + timeline.exposed_s, "clock_hz": clock,
      "transfers": [dataclasses.asdict(t) for t in timeline.transfers],
      "buffers": [dataclasses.asdict(b) for b in live_at_peak(program)[:40]],
      "findings": [f._asdict() for f in findings]}


def read_exhausted(error: str) -> dict:
  """What the compiler says of a program that does not fit."""
  size = r"([\d.]+)([KMGT]?)"
  unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  bytes_of = lambda number, letter: float(number) * unit[letter]
  used = (re.search(rf"Used {size}B? of {size}B? hbm", error)
          or re.search(rf"required for HLO temporaries \({size}B?\) exceeds", error))
  buffers = [
      {"bytes": bytes_of(m[1], m[2]), "shape": (re.search(r"Shape: (\w+\[[\d,]*\])", m[3]) or ["", ""])[1],
       "op_name": (re.search(r'op_name="([^"]*)"', m[3]) or ["", ""])[1], "source": "", "op": ""}
      for m in re.finditer(rf"Size: {size}B?\n(.*?)={{5,}}", error, re.S)]
  return {"needs_bytes": bytes_of(used[1], used[2]) if used else None, "buffers": buffers,
          "error": error[:300]}


def _peak_flops(cfg, target):
  return target.chip.flops.get(cfg.model.compute_dtype, target.chip.flops["bfloat16"])


def _folder(cfg):
  return pathlib.Path(cfg.data.cache_path) / "rehearse"


if __name__ == "__main__":
  sys.exit(main())

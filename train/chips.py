"""python -m train.chips [--chip=v5p]: the table of chips, or this machine's own row, measured here.

  python -m train.chips               the table, and where each number is from
  python -m train.chips --chip=cpu    measures this machine for about 3 seconds

Everything is of one jax device: TPU7x has two a chip, all others one. Numbers are the makers', but the HBM of
TPUs, which is what the compiler says it may use.
"""
import argparse
import dataclasses
import functools
import math
import sys
import time

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
  kinds: tuple[str, ...]  # jax's device_kind; NVIDIA's go on ("NVIDIA H100 80GB HBM3").
  flops: dict[str, float]  # By dtype of the factors, dense. On TPUs jax multiplies float32 as bfloat16.
  hbm_bytes: float  # That a program may use.
  hbm_bandwidth: float  # Bytes/s.
  link_bandwidth: float  # Bytes/s, one way of one ICI link; of GPUs: into the NVLink switch.
  dims: int  # Of the torus, two links each; 0: a switch that joins `domain` devices.
  domain: int  # Devices that one fast network joins: a TPU pod, the GPUs of one host.
  dcn_bandwidth: float  # Bytes/s, one way, to devices of other slices or hosts.
  per_chip: int = 1  # jax devices a chip.
  mxu: int = 128  # Side of the matrix unit: smaller dims waste it.
  vector: float = math.inf  # Operations/s of the vector unit; inf: the matrix unit is what limits.
  source: str

  @property
  def platform(self) -> str:
    """As jax calls it."""
    return {"TPU": "tpu", "NVIDIA": "gpu"}.get(self.kinds[0].split()[0] if self.kinds else "", "cpu")


_TPU_DOCS = "docs.cloud.google.com/tpu/docs/"
# Lanes x sublanes x ALUs of a TensorCore. Its clock is peak / (2 x cells of its MXUs); v7x's is a guess.
_VECTOR = 128 * 8 * 4
_CUBES = "; a torus where all dims are multiples of 4"
_H100 = Chip(
  kinds=("NVIDIA H100",), flops={"bfloat16": 989e12, "float8": 1979e12, "float32": 495e12}, hbm_bytes=80e9,
  hbm_bandwidth=3.35e12, link_bandwidth=450e9, dims=0, domain=8, dcn_bandwidth=50e9,
  source="NVIDIA H100 data sheet (SXM; float32 is TF32); DGX H100: 8 x 400 Gb/s a host")
CHIP = {
  "v4": Chip(
    kinds=("TPU v4",), flops={"bfloat16": 275e12, "int8": 275e12}, hbm_bytes=30.75 * GIB,
    hbm_bandwidth=1.2e12, link_bandwidth=50e9, dims=3, domain=4096, dcn_bandwidth=6.25e9,
    vector=2 * _VECTOR * 1.05e9,
    source=_TPU_DOCS + "v4; links: arXiv:2304.01433; DCN: jax-ml.github.io/scaling-book (a host's over 4)"
           + _CUBES),
  "v5e": Chip(
    kinds=("TPU v5 lite", "TPU v5e"), flops={"bfloat16": 197e12, "int8": 393e12}, hbm_bytes=15.75 * GIB,
    hbm_bandwidth=8.19e11, link_bandwidth=50e9, dims=2, domain=256, dcn_bandwidth=3.125e9,
    vector=_VECTOR * 1.5e9,
    source=_TPU_DOCS + "v5e (400 GB/s both ways over 4 links; 6.4 Tb/s DCN a pod); a dim wraps at 16"),
  "v5p": Chip(
    kinds=("TPU v5", "TPU v5p"), flops={"bfloat16": 459e12, "int8": 918e12}, hbm_bytes=95.74 * GIB,
    hbm_bandwidth=2.765e12, link_bandwidth=100e9, dims=3, domain=8960, dcn_bandwidth=6.25e9,
    vector=2 * _VECTOR * 1.75e9,
    source=_TPU_DOCS + "v5p (1,200 GB/s both ways over 6 links; 50 Gb/s DCN)" + _CUBES),
  "v6e": Chip(
    kinds=("TPU v6 lite", "TPU v6e"), flops={"bfloat16": 918e12, "int8": 1836e12}, hbm_bytes=31.25 * GIB,
    hbm_bandwidth=1.638e12, link_bandwidth=100e9, dims=2, domain=256, dcn_bandwidth=12.5e9, mxu=256,
    vector=_VECTOR * 1.75e9,
    source=_TPU_DOCS + "v6e (800 GB/s both ways over 4 links), tpu7x (100 Gb/s DCN); a dim wraps at 16"),
  "v7x": Chip(
    kinds=("TPU7x",), flops={"bfloat16": 1153.5e12, "float8": 2307e12}, hbm_bytes=94.75 * GIB,
    hbm_bandwidth=3.69e12, link_bandwidth=50e9, dims=3, domain=18_432, dcn_bandwidth=6.25e9, per_chip=2,
    mxu=256, vector=_VECTOR * 2.2e9,
    source=_TPU_DOCS + "tpu7x, halved: two devices a chip (1,200 GB/s, 100 Gb/s DCN)" + _CUBES),
  "A100": Chip(
    kinds=("NVIDIA A100",), flops={"bfloat16": 312e12, "int8": 624e12, "float32": 156e12}, hbm_bytes=40e9,
    hbm_bandwidth=1.555e12, link_bandwidth=300e9, dims=0, domain=8, dcn_bandwidth=25e9,
    source="NVIDIA A100 data sheet (SXM, 40 GB; 80 GB has 2.04 TB/s); DGX A100: 8 x 200 Gb/s a host"),
  "H100": _H100,
  "H100-NVL": dataclasses.replace(
    _H100, kinds=("NVIDIA H100 NVL",), flops={"bfloat16": 835e12, "float8": 1671e12, "float32": 418e12},
    hbm_bytes=94e9, hbm_bandwidth=3.9e12, link_bandwidth=300e9, domain=2,
    source="NVIDIA H100 NVL data sheet"),
  "H100-PCIe": dataclasses.replace(
    _H100, kinds=("NVIDIA H100 PCIe",), flops={"bfloat16": 756e12, "float8": 1513e12, "float32": 378e12},
    hbm_bandwidth=2e12, link_bandwidth=64e9, domain=8, source="NVIDIA H100 PCIe data sheet (PCIe 5)"),
  "H200": dataclasses.replace(
    _H100, kinds=("NVIDIA H200",), hbm_bytes=141e9, hbm_bandwidth=4.8e12,
    source="NVIDIA H200 data sheet (SXM)"),
  "H200-NVL": dataclasses.replace(
    _H100, kinds=("NVIDIA H200 NVL",), flops={"bfloat16": 836e12, "float8": 1671e12, "float32": 418e12},
    hbm_bytes=141e9, hbm_bandwidth=4.8e12, domain=4, source="NVIDIA H200 NVL data sheet"),
  "cpu": None,  # Every machine its own: `get_chip` measures it.
}


def get_chip(name: str) -> Chip:
  """The row of the table; of "cpu" a measured one.

  Raises:
    ValueError: no such row.
  """
  if name not in CHIP:
    raise ValueError(f"--chip={name}: not in the table; known: {', '.join(CHIP)}")
  return measure_cpu() if name == "cpu" else CHIP[name]


def find_chip(kind: str) -> Chip | None:
  """By jax's device_kind: of NVIDIA's the longest that `kind` begins with. None: unknown."""
  rows = {k: chip for chip in CHIP.values() if chip for k in chip.kinds}
  if kind.startswith("NVIDIA"):
    kind = max((k for k in rows if kind.startswith(k)), key=len, default=None)
  return rows.get(kind)


def torus(chip: Chip, n: int) -> tuple[int, ...]:
  """The shape of the slice that is rented by this number of devices, as cubic as can be, smallest dim first;
  () of a switch.

  Raises:
    ValueError: no slice has so many, with the nearest numbers.
  """
  if chip.dims == 0:
    return ()
  if n == 1:
    return (1,) * chip.dims
  if n % chip.per_chip:
    raise ValueError(f"--n={n} devices: two share a chip; nearest valid: {n - 1}, {n + 1}")
  sizes = _slices(chip)
  chips = n // chip.per_chip
  if chips not in sizes:
    near = sorted(sizes, key=lambda m: abs(math.log(m / chips)))[:2]
    raise ValueError(f"--n={n}: no slice has so many; nearest valid: "
                     f"{', '.join(str(m * chip.per_chip) for m in sorted(near))}")
  return sizes[chips]


@functools.cache
def _shapes(dims, domain):
  small = {2: [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)],
           3: [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4)]}[dims]
  sizes = {math.prod(shape): shape for shape in small}
  if dims == 3:  # Cubes of 4 x 4 x 4.
    ways = [4 * i for i in range(1, 17)]
    cubes = [(a, b, c) for a in ways for b in ways for c in ways if a <= b <= c and a * b * c <= domain]
    for shape in sorted(cubes, key=lambda s: -s[-1]):  # The most cubic is last.
      sizes[math.prod(shape)] = shape
  return sizes


def _slices(chip):
  return _shapes(chip.dims, chip.domain // chip.per_chip)


def wraps(chip: Chip, shape: tuple[int, ...], size: int) -> bool:
  """Whether a dim of `size` of a slice of this shape is a ring, not a line."""
  return size == 16 if chip.dims == 2 else all(side % 4 == 0 for side in shape)


# This machine.

def measure_gemm(seconds: float = 1.0, n: int = 1536) -> dict[str, float]:
  """FLOP/s of the fastest float32 product of n by n matrices in `seconds`, all cores, by NumPy's BLAS and by
  XLA.

  The peak is the better one: where OpenBLAS does not know the CPU it reaches half of what XLA does, and
  elsewhere it is ahead.
  """
  import jax
  import numpy as np
  a = np.random.default_rng(0).standard_normal((n, n), np.float32)
  out, on_device = np.empty_like(a), jax.device_put(a, jax.local_devices()[0])
  products = {"numpy": lambda: np.matmul(a, a, out=out),
              "xla": lambda: jax.block_until_ready(jax.numpy.matmul(on_device, on_device))}
  return {name: 2 * n**3 / min(_times(product, seconds / 2)) for name, product in products.items()}


def measure_copy(seconds: float = 1.0, n_bytes: int = 2**28) -> float:
  """Bytes/s, read and written together, of the fastest pass over an array by XLA in `seconds`, all cores."""
  import jax
  x = jax.device_put(jax.numpy.zeros((n_bytes // 4,), "float32"), jax.local_devices()[0])
  add = jax.jit(lambda x: x + 1, donate_argnums=0)  # Into memory that is there: no page faults.

  def once():
    nonlocal x
    x = jax.block_until_ready(add(x))

  return 2 * n_bytes / min(_times(once, seconds))


def _times(f, seconds):
  f()  # Compiles.
  times, end = [], time.perf_counter() + seconds
  while not times or time.perf_counter() < end:
    start = time.perf_counter()
    f()
    times.append(time.perf_counter() - start)
  return times


@functools.cache
def measure_cpu() -> Chip:
  """This machine as one device. bfloat16 is widened by XLA:CPU, so it has float32's peak at best. Other
  devices of it share its memory, so what they send is copied."""
  import os
  peak, bandwidth = max(measure_gemm().values()), measure_copy()
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return Chip(
    kinds=("cpu",), flops={"float32": peak, "bfloat16": peak}, hbm_bytes=memory, hbm_bandwidth=bandwidth,
    link_bandwidth=bandwidth / 2, dims=0, domain=2**20, dcn_bandwidth=bandwidth / 2, mxu=1,
    source="measured just now: float32 GEMM (the better of NumPy's and XLA's), copy")


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog="train.chips", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--chip", help=f"one row: {', '.join(CHIP)}")
  args = parser.parse_args(argv)
  try:
    rows = {args.chip: get_chip(args.chip)} if args.chip else {k: c for k, c in CHIP.items() if c}
  except ValueError as e:
    print(f"train.chips: error: {e}", file=sys.stderr)
    return 2
  print(f"{'of a device':10} {'TFLOP/s':>30} {'HBM GiB':>8} {'HBM GB/s':>9} {'link GB/s':>9} {'dims':>4} "
        f"{'DCN GB/s':>8}  source")
  for name, chip in rows.items():
    flops = ", ".join(f"{dtype} {peak / 1e12:.4g}" for dtype, peak in chip.flops.items())
    print(f"{name:10} {flops:>31} {chip.hbm_bytes / GIB:8.2f} {chip.hbm_bandwidth / 1e9:9.4g} "
          f"{chip.link_bandwidth / 1e9:9.4g} {chip.dims:4} {chip.dcn_bandwidth / 1e9:8.4g}  {chip.source}")
  return 0


if __name__ == "__main__":
  sys.exit(main())

"""Reports of train.rehearse as text, and configs/REHEARSALS.md."""
import collections
import datetime
import subprocess
import sys

GIB, GB = 2**30, 1e9


def render(r: dict) -> str:
  lines = [_fits(r)]
  if "weights_bytes" in r:
    lines.append(_decode(r))
  if not r["fits"]:
    return "\n".join(lines + _largest(r) + [_compiler(r)]) + "\n"
  m = r["memory"]
  outputs = m["output_size"] - m["alias_size"]
  # temp_size counts what lies in the outputs' memory again: not what is allocated (tests/test_rehearse.py).
  temporaries = m["peak_memory"] - m["argument_size"] - outputs
  lines.append(f"memory     arguments {_gib(m['argument_size'])}, temporaries {_gib(temporaries)}, "
               f"new outputs {_gib(outputs)}, program {_gib(m['generated_code_size'])} GiB")
  lines += _largest(r)
  lines.append(f"step       {r['step_s']:.3f} s: on the core {r['core_s']:.3f}, waiting for the wire "
               f"{r['exposed_s']:.3f}, attention kernels {r['kernels_s']:.3f} if at the peak "
               f"({r['kernel_runs']} runs of kernels, which the compiler does not estimate)")
  lines.append(f"           a model: the compiler's estimated_cycles at {r['clock_hz'] / 1e9:.2f} GHz, the "
               "links of train/chips.py")
  if "mfu" in r:
    lines.append(f"           {r['tokens_per_s_per_chip']:,.0f} tokens/s a chip, MFU {r['mfu']:.1%} at most; "
                 f"{r['flops'] / 1e12:.1f} TFLOP a chip, {r['useful_flops'] / 1e12:.1f} of them useful")
  lines += ["collectives of a step, on one chip", *_collectives(r)]
  lines += ["findings", *_findings(r)] if r["findings"] else ["findings   none"]
  return "\n".join([*lines, _compiler(r)]) + "\n"


def render_side_by_side(reports: list[dict]) -> str:
  """One row a set of flags, then the whole report of the fastest that fits."""
  rows = [f"{'peak GiB':>9} {'core s':>7} {'wire s':>7} {'step s':>7} {'compile s':>9}  flags"]
  for r in reports:
    flags = " ".join(f"--{name}={value}" for name, value in r["flags"].items()) or "none"
    if r["fits"]:
      rows.append(f"{r['memory']['peak_memory'] / GIB:9.2f} {r['core_s']:7.3f} {r['exposed_s']:7.3f} "
                  f"{r['step_s']:7.3f} {r['compile_s']:9.0f}  {flags}")
    else:
      rows.append(f"{'no fit':>9} {'':7} {'':7} {'':7} {r.get('compile_s', 0):9.0f}  {flags}")
  fitting = [r for r in reports if r["fits"]]
  best = min(fitting, key=lambda r: r["step_s"]) if fitting else reports[0]
  flags = " ".join(f"--{name}={value}" for name, value in best["flags"].items())
  rows += ["", "the fastest:" if fitting else "the first:", render(best).rstrip()]
  rows += [f"to run with them: LIBTPU_INIT_ARGS='{flags}'"] if flags else []
  return "\n".join(rows) + "\n"


def _gib(n):
  return f"{n / GIB:.2f}"


def _fits(r):
  if r["fits"]:
    peak = r["memory"]["peak_memory"]
    return (f"fits: yes, {_gib(peak)} of {_gib(r['hbm_bytes'])} GiB on each of {r['chips']} chips "
            f"({r['what']})")
  needs = f"needs at least {_gib(r['needs_bytes'])} of" if r.get("needs_bytes") else "needs more than"
  why = r["error"].splitlines()[0]
  return f"fits: no, {needs} {_gib(r['hbm_bytes'])} GiB on each of {r['chips']} chips: {why}"


def _decode(r):
  if not r["batch"]:
    return f"decode     weights {_gib(r['weights_bytes'])} GiB a chip"
  return (f"decode     {r['batch']} sequences of {r['context']} tokens: weights {_gib(r['weights_bytes'])}, "
          f"caches {_gib(r['cache_bytes'])} GiB a chip; at batch {r['least_batch']} up to "
          f"{r['longest_context']:,} tokens fit\n"
          f"           {r['bytes_per_token'] / 1e6:,.1f} MB read a token; by bandwidth alone "
          f"{r['bandwidth_tokens_per_s']:,.0f} tokens/s of all chips, {r['bandwidth_step_s'] * 1e3:.1f} ms a "
          "token of each sequence")


def _largest(r, most=8):
  """The arrays that live at the peak: those of one source and shape together."""
  groups = collections.defaultdict(list)
  for b in r.get("buffers", []):
    if not b["op"].startswith("param"):
      groups[b["shape"], b["source"] or b["op_name"][-60:]].append(b["bytes"])
  rows = sorted(groups.items(), key=lambda item: -sum(item[1]))[:most]
  return ["largest arrays at the peak, besides the arguments"] * bool(rows) + [
      f"  {sum(sizes) / GIB:7.2f} GiB  {len(sizes)} x {shape:28} {source}" for (shape, source), sizes in rows]


def _collectives(r):
  groups = {}
  for t in r["transfers"]:
    key = t["kind"], "*".join(t["axes"]), "beside compute" if t["asynchronous"] else "waited for"
    total = groups.setdefault(key, collections.Counter())
    total.update({name: t[name] for name in ("times", "wire_bytes", "wire_s", "exposed_s", "overlap_s")})
  rows = [f"  {'kind':18} {'axis':12} {'':14} {'number':>7} {'GB sent':>8} {'wire s':>7} {'waited s':>8}"]
  for (kind, axes, how), t in sorted(groups.items(), key=lambda item: -item[1]["exposed_s"]):
    rows.append(f"  {kind:18} {axes:12} {how:14} {t['times']:7} {t['wire_bytes'] / GB:8.2f} "
                f"{t['wire_s']:7.3f} {t['exposed_s']:8.3f}")
  longest = max(r["transfers"], key=lambda t: t["exposed_s"], default=None)
  if longest is not None:
    rows.append(f"  the longest wait: {longest['exposed_s']:.3f} s, {longest['kind']} of {longest['what']} "
                f"{longest['source']}")
  return rows if groups else ["  none"]


def _findings(r, most=12):
  where = lambda f: f" ({f['source']})" if f["source"] else ""
  lines = [f"  {f['kind']}: {f['text']}{where(f)}" for f in r["findings"]]
  return lines[:most] + ([f"  and {len(lines) - most} more (--json has them)"] if len(lines) > most else [])


def _compiler(r):
  if "compile_s" not in r:
    return "compiler   not started"
  cached = ", read from the cache" if r["cached"] else ""
  return (f"compiler   {r['compile_s']:.0f} s, {_gib(r['compiler_bytes'])} GiB of this machine, "
          + ", ".join(f"{name} {v}" for name, v in r["versions"].items()) + cached)


HEAD = """# Rehearsals: compiled, never run

The train step of each pod config, compiled by XLA:TPU on a machine without a TPU, for the topology that the
config declares. Nothing here was run: memory is the compiler's own account, times are a model (the compiler's
estimated cycles at an assumed clock; waits by the links of train/chips.py; attention kernels, which the
compiler does not estimate, at the chip's peak). Written by `python -m train.rehearse --all`; {versions};
{date}.

| config | topology | fits | arguments GiB | peak GiB | core s | waits s | kernels s | step s | GB sent | \
tokens/s/chip | compile s |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def write_all(path, timeout_s: float = 3600.0) -> int:
  """Each config in a process of its own: a compiler that dies is a row, not the end."""
  import json

  from train.rehearse import shipped
  rows, head = [], ""
  for config, topology in shipped().items():
    command = [sys.executable, "-m", "train.rehearse", f"--config={config}", "--json"]
    try:
      done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
      report = json.loads(done.stdout)["reports"][0]
      versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
      head = HEAD.format(versions=versions, date=datetime.date.today().isoformat())
      rows.append(row(config, report))
    except (subprocess.TimeoutExpired, ValueError, KeyError) as e:
      said = done.stderr.strip().splitlines() if not isinstance(e, subprocess.TimeoutExpired) else []
      why = said[-1][:200] if said else f"not within {timeout_s:.0f} s"
      rows.append(f"| {config} | {topology} | not compiled: {why} |" + " |" * 9)
    print(rows[-1], flush=True)
    path.write_text(head + "\n".join(rows) + "\n")
  return 0


def row(config: str, r: dict) -> str:
  if not r["fits"]:
    needs = "no"
    if r.get("needs_bytes"):
      needs = f"needs at least {_gib(r['needs_bytes'])} of {_gib(r['hbm_bytes'])} GiB"
    return f"| {config} | {r['topology']} | **no**: {needs} |" + " |" * 8 + f" {r['compile_s']:.0f} |"
  sent = sum(t["wire_bytes"] for t in r["transfers"]) / GB
  m = r["memory"]
  return (f"| {config} | {r['topology']} | yes | {_gib(m['argument_size'])} | {_gib(m['peak_memory'])} | "
          f"{r['core_s']:.2f} | {r['exposed_s']:.2f} | {r['kernels_s']:.2f} | {r['step_s']:.2f} | "
          f"{sent:.1f} | {r['tokens_per_s_per_chip']:,.0f} | {r['compile_s']:.0f} |")

"""The runs of a sweep as files for a scheduler: python -m experiments.sweep experiments.NAME --render=slurm

slurm: a script for an array of jobs, one a run. `bash FILE` submits what is not done; a job that comes to its
time limit, or is preempted, saves and is queued again.
jobset: JobSets for TPU slices on GKE, one a run, for `kubectl apply -f FILE`.
Both start experiments.task, which leaves the same folders behind as runs on this machine.
"""
import copy
import dataclasses
import hashlib
import math
import pathlib
import re
import shlex

import yaml

from data.flags import leaves, nearest, override
from train.chips import CHIP

SAVE_S = 300  # From the signal to the end: how long a run may take to save.
MARGIN, START_S = 1.5, 1200  # The time limit is the estimate by the first, and the second.

# Chip -> what GKE calls its slices. Source: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
ACCELERATORS = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice",
                "v6e": "tpu-v6e-slice", "v7x": "tpu7x"}
CHIPS_PER_HOST = 4  # Of those; slices of fewer chips have one host.


@dataclasses.dataclass(kw_only=True, slots=True)
class Slurm:
  """Jobs of SLURM. None: what the cluster does by itself."""
  nodes: int = 1  # A run.
  gpus_per_node: int = 0
  cpus_per_task: int | None = None
  memory: str | None = None  # Of a node: 64G.
  partition: str | None = None
  account: str | None = None
  time: str | None = None  # D-HH:MM:SS; None: half as much again as the estimate, where there is one.
  at_a_time: int | None = None  # Runs.
  options: tuple[str, ...] = ()  # More of sbatch's: "--constraint=a100".
  checkout: str | None = None  # Where this code is, there; None: where sbatch is called.
  python: str = ".venv/bin/python"
  setup: str = ""  # Shell, before each run: "module load cuda".


@dataclasses.dataclass(kw_only=True, slots=True)
class JobSet:
  """TPU slices on GKE; the cluster has the JobSet API."""
  image: str = ""  # With this code and its packages. Must be given, like the next three.
  chip: str = ""  # v4, v5e, v5p, v6e, v7x
  topology: str = ""  # Of a slice, in chips: 2x4.
  claim: str = ""  # A PersistentVolumeClaim that all hosts mount: runs and prepared data are there.
  mount: str = "/shared"  # Where.
  slices: int = 1  # A run.
  chips_per_host: int | None = None  # None: 4, or all of a smaller slice.
  namespace: str | None = None
  queue: str | None = None  # Of Kueue, which starts as many as there are slices for.
  spot: bool = False
  max_restarts: int = 10  # Of a run, after preemptions and failures.
  checkout: str | None = None  # Where the code is in the image; None: its working directory.
  python: str = "python"


def read_settings(kind: str, texts=()):
  """
  Args:
    kind: a key of RENDER.
    texts: "name=value" each.

  Raises:
    ValueError: an unknown kind or name, a value of the wrong type.
  """
  if kind not in RENDER:
    near = nearest(kind, RENDER)
    said = f"did you mean {near[0]}?" if near else f"known: {', '.join(RENDER)}"
    raise ValueError(f"--render={kind}: {said}")
  return override(RENDER[kind][0](), list(texts))


def render(kind: str, name: str, runs, settings, folder, seconds: dict | None = None) -> dict[str, str]:
  """File name -> text.

  Args:
    name: of the experiment's module.
    runs: experiments.cells.Run; their workdirs are under `folder`.
    seconds: a run's workdir -> how long it is expected to take.

  Raises:
    ValueError: a setting that must be given, a value out of range, a mesh that is not of so many devices.
  """
  for field, value in leaves(settings).items():
    if type(value) is int and value < (0 if field in ("gpus_per_node", "max_restarts") else 1):
      raise ValueError(f"{kind}.{field}={value} must be at least 1; nearest valid: 1")
  return RENDER[kind][1](name, runs, settings, pathlib.Path(folder), seconds or {})


def write(kind: str, texts, name: str, runs, folder, seconds: dict | None = None) -> list[pathlib.Path]:
  """What `render` gives, into `folder`; `texts` as of `read_settings`. Raises as both do."""
  settings, paths = read_settings(kind, texts), []
  for file, text in render(kind, name, runs, settings, folder, seconds).items():
    paths.append(pathlib.Path(folder) / file)
    paths[-1].parent.mkdir(parents=True, exist_ok=True)
    paths[-1].write_text(text)
  return paths


def _check_meshes(runs, n, where):
  for run in runs:
    try:
      copy.deepcopy(run.cell.resolved).validate_mesh(n)
    except ValueError as e:
      raise ValueError(f"cell {run.cell.name!r} on the {n} devices of {where}: {e}") from None


# SLURM.

SCRIPT = """\
#!/bin/bash
# {n} runs of {name}. Written by python -m experiments.sweep {name} --render=slurm
#   bash {file}     submits those that are not done; do it again for those that failed
{options}
set -u
script=$(realpath "$0")
{enter}choose() {{
  case $1 in
{cases}
  esac
}}

if [ -z "${{SLURM_ARRAY_TASK_ID:-}}" ]; then  # Not in a job.
  missing=$(for i in $(seq 0 {last}); do
    choose "$i"
    grep -Eqs '"status": *"(done|pruned)"' "${{run[-1]#--workdir=}}/outcome.json" || echo "$i"
  done | paste -sd,)
  [ -n "$missing" ] || {{ echo "all {n} runs are done"; exit 0; }}
  mkdir -p {folder}
  exec sbatch --array="$missing{at_a_time}" "$script"
fi

{setup}choose "$SLURM_ARRAY_TASK_ID"
me=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID  # The last of an array has the job id of the array itself.
limit="" caught=""
trap 'limit=1 caught=1; scancel --signal=TERM "$me"' USR1  # To the run, not to this script.
trap 'caught=1' TERM  # The run has it too.
srun --kill-on-bad-exit=0 {cpus}{python} -m experiments.task "${{run[@]}}" &
step=$!
while :; do
  caught=""
  wait "$step"
  code=$?
  [ -n "$caught" ] || break  # Else it was the signal that ended the waiting.
done
if [ "$code" -eq 143 ] && [ -n "$limit" ]; then  # Saved. What scancel stops is not queued again.
  scontrol requeue "$me"
fi
exit "$code"
"""


def render_slurm(name, runs, settings, folder, seconds) -> dict[str, str]:
  s, short = settings, name.rpartition(".")[2]
  if s.gpus_per_node:
    _check_meshes(runs, s.nodes * s.gpus_per_node, "slurm.nodes x slurm.gpus_per_node")
  elif s.nodes > 1:
    _check_meshes(runs, s.nodes, "slurm.nodes")
  if s.time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", s.time):
    raise ValueError(f"slurm.time={s.time} must be D-HH:MM:SS; nearest valid: 04:00:00")
  at_a_time = f"%{s.at_a_time}" if s.at_a_time else ""
  times = [seconds[run.workdir] for run in runs if run.workdir in seconds]
  limit = s.time or (_duration(MARGIN * max(times) + START_S) if len(times) == len(runs) else None)
  options = {
    "job-name": short, "array": f"0-{len(runs) - 1}{at_a_time}", "nodes": s.nodes,
    # JAX takes one GPU a process where there are several nodes, and all of the node where there is one.
    "ntasks-per-node": s.gpus_per_node if s.nodes > 1 and s.gpus_per_node else 1,
    "gpus-per-node": s.gpus_per_node or None, "cpus-per-task": s.cpus_per_task, "mem": s.memory,
    "partition": s.partition, "account": s.account, "time": limit, "signal": f"B:USR1@{SAVE_S}",
    "open-mode": "append", "output": f"{folder}/slurm-%A_%a.log", "chdir": s.checkout}
  lines = [f"--{key}={value}" for key, value in options.items() if value is not None]
  cases = [f"  {i}) run=({shlex.join(run.command)}) ;;" for i, run in enumerate(runs)]
  text = SCRIPT.format(
    n=len(runs), last=len(runs) - 1, name=name, file=shlex.quote(f"{folder}/{short}.sbatch"),
    folder=shlex.quote(str(folder)), cases="\n".join(cases), at_a_time=at_a_time,
    python=shlex.quote(s.python),
    options="\n".join(f"#SBATCH {line}" for line in (*lines, "--requeue", *s.options)),
    enter=f"cd {shlex.quote(s.checkout)} || exit 2\n" if s.checkout else "",
    # srun does not take it from sbatch.
    cpus=f"--cpus-per-task={s.cpus_per_task} " if s.cpus_per_task else "",
    setup=f"{s.setup}\n" if s.setup else "")
  return {f"{short}.sbatch": text}


def _duration(seconds):
  """D-HH:MM:SS, in whole tens of minutes."""
  minutes = math.ceil(seconds / 600) * 10
  return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00"


# GKE.

def render_jobset(name, runs, settings, folder, seconds) -> dict[str, str]:
  s, short = settings, name.rpartition(".")[2]
  for field, example in (("image", "REGION-docker.pkg.dev/PROJECT/REPO/assay:TAG"), ("chip", "v5e"),
                         ("topology", "2x4"), ("claim", "the name of a PersistentVolumeClaim")):
    if not getattr(s, field):
      raise ValueError(f"jobset.{field} must be given, e.g. {field}={example}")
  if s.chip not in ACCELERATORS:
    near = nearest(s.chip, ACCELERATORS) or ACCELERATORS
    raise ValueError(f"jobset.chip={s.chip}: nearest valid: {', '.join(near)}")
  dims = CHIP[s.chip].dims
  if not re.fullmatch("x".join([r"[1-9]\d*"] * dims), s.topology):
    example = "x".join(["2"] * dims)
    raise ValueError(f"jobset.topology={s.topology}: {s.chip} has {dims} dimensions; nearest valid: "
                     f"{example}")
  chips = math.prod(map(int, s.topology.split("x")))
  per_host = s.chips_per_host or min(chips, CHIPS_PER_HOST)
  if chips % per_host:
    raise ValueError(f"jobset.chips_per_host={per_host} does not divide the {chips} chips of {s.topology}; "
                     f"nearest valid: {math.gcd(chips, per_host)}")
  for run in runs:
    if run.cell.resolved.mesh.slices != s.slices:
      raise ValueError(f"jobset.slices={s.slices} but mesh.slices={run.cell.resolved.mesh.slices} in cell "
                       f"{run.cell.name!r}; nearest valid: {run.cell.resolved.mesh.slices}")
  _check_meshes(runs, s.slices * chips * CHIP[s.chip].per_chip, f"{s.slices} x {s.chip} {s.topology}")
  documents = [_jobset(short, run, s, folder, chips // per_host, per_host) for run in runs]
  head = (f"# {len(runs)} runs of {name}. Written by python -m experiments.sweep {name} --render=jobset\n"
          f"#   kubectl apply -f {folder}/{short}.yaml     starts those that are not there yet\n")
  return {f"{short}.yaml": head + yaml.safe_dump_all(documents, sort_keys=False, width=100)}


def _jobset(short, run, s, folder, hosts, per_host) -> dict:
  workdir = pathlib.PurePosixPath(s.mount) / folder / run.workdir.relative_to(folder)
  command = [s.python, "-m", "experiments.task",
             *(arg for arg in run.command if not arg.startswith("--workdir=")),
             f"--config.data.cache_path={s.mount}/cache", f"--workdir={workdir}"]
  # Name, job, two indices must be within the 63 letters of a host's name.
  name = f"{re.sub(r'[^a-z0-9]+', '-', short.lower()).strip('-')[:36]}-{_tag(run)}"
  labels = {"assay-sweep": re.sub(r"[^\w.-]+", "_", short)[:63].strip("_.-")}
  metadata = {"name": name, "namespace": s.namespace,
              "labels": labels | ({"kueue.x-k8s.io/queue-name": s.queue} if s.queue else {}),
              "annotations": {"assay/run": f"{run.cell.id}/seed={run.seed}"}}
  if hosts > 1 or s.slices > 1:  # A slice of several hosts is a node pool of its own.
    metadata["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
  pod = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": SAVE_S,
    "nodeSelector": {"cloud.google.com/gke-tpu-accelerator": ACCELERATORS[s.chip],
                     "cloud.google.com/gke-tpu-topology": s.topology,
                     **({"cloud.google.com/gke-spot": "true"} if s.spot else {})},
    "tolerations": [{"key": "cloud.google.com/gke-spot", "operator": "Exists"}] if s.spot else None,
    "containers": [{
      "name": "train", "image": s.image, "command": command, "workingDir": s.checkout,
      "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],
      "resources": {"requests": {"google.com/tpu": per_host}, "limits": {"google.com/tpu": per_host}},
      "volumeMounts": [{"name": "shared", "mountPath": s.mount}]}],
    "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": s.claim}}],
  }
  # Exit code 2 is a mistake in the settings: to start again would not help.
  mistake = {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [2]}}
  job = {"parallelism": hosts, "completions": hosts, "completionMode": "Indexed", "backoffLimit": 0,
         "podFailurePolicy": {"rules": [mistake]}, "template": {"spec": pod}}
  policy = {"maxRestarts": s.max_restarts, "rules": [
    {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]}
  return _without_none({
    "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata,
    "spec": {"failurePolicy": policy,
             "replicatedJobs": [{"name": "slice", "replicas": s.slices, "template": {"spec": job}}]}})


def _tag(run):
  """Of a run, the same each time."""
  digest = hashlib.sha256(run.cell.id.encode()).hexdigest()[:8]
  return f"{digest}-{run.seed}"


def _without_none(tree):
  if isinstance(tree, dict):
    return {k: _without_none(v) for k, v in tree.items() if v is not None}
  return [_without_none(v) for v in tree] if isinstance(tree, list) else tree


RENDER = {"slurm": (Slurm, render_slurm), "jobset": (JobSet, render_jobset)}

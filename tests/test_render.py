"""The files for schedulers: pinned, of the real schemas, and run here with stand-ins for SLURM's commands.

After an intended change: python -m tests.test_render rewrites tests/golden/sweep.sbatch and sweep.yaml.
"""
import contextlib
import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml

from configs.tiny import get_config
from experiments import task
from experiments.cells import Cell, Outcome, Run
from experiments.render import ACCELERATORS, RENDER, read_settings, render, write
from train.chips import CHIP

GOLDEN = pathlib.Path(__file__).parent / "golden"
FOLDER = pathlib.Path("runs/sweeps/sweep")
REWRITE = "if that is intended, run `python -m tests.test_render` and look at the diff"
SETTINGS = {
  "slurm": ["nodes=2", "gpus_per_node=4", "cpus_per_task=8", "memory=64G", "partition=gpu", "account=lab",
            "at_a_time=3", "checkout=/home/me/assay", "setup=module load cuda", "options=('--qos=high',)"],
  "jobset": ["image=europe-docker.pkg.dev/p/r/assay:1", "chip=v5e", "topology=2x4", "claim=assay",
             "queue=tpus", "spot=True", "checkout=/assay", "namespace=research"],
}
FILES = {"slurm": "sweep.sbatch", "jobset": "sweep.yaml"}
# Of sbatch, by its man page (22.05) and by itself: it refuses others before it looks for a controller.
SBATCH = {"job-name", "array", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem",
          "partition", "account", "time", "signal", "open-mode", "output", "chdir", "requeue", "qos"}


def make_runs(folder=FOLDER):
  cells = [Cell("rmsnorm", "qk_norm=rmsnorm-0a1b2c", "configs/tiny.py", {"model.qk_norm": "rmsnorm"},
                get_config().validate()),
           Cell("it's", "it_s-3d4e5f", "configs/tiny.py", {"model.layer_pattern": ("local", "global")},
                get_config().validate())]
  return [Run(cell, seed, folder / cell.id / f"seed={seed}") for seed in (0, 1) for cell in cells]


def rendered(kind, *texts, folder=FOLDER, seconds=4000.0):
  runs = make_runs(folder)
  settings = read_settings(kind, [*SETTINGS[kind], *texts])
  files = render(kind, "experiments.sweep", runs, settings, folder, {r.workdir: seconds for r in runs})
  assert list(files) == [FILES[kind]]
  return files[FILES[kind]]


@pytest.mark.parametrize("kind", RENDER)
def test_the_files_are_pinned(kind):
  assert rendered(kind) == (GOLDEN / FILES[kind]).read_text(), REWRITE


# SLURM.

def options(text):
  lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
  return dict(line.partition("=")[::2] for line in lines)


def test_slurm_options_are_those_of_sbatch():
  found = options(rendered("slurm"))
  assert found.keys() <= SBATCH and found["array"] == "0-3%3" and found["time"] == "0-02:00:00"
  assert found["ntasks-per-node"] == "4"  # JAX takes one GPU a process where SLURM starts several.
  one = options(rendered("slurm", "nodes=1", "time=1-12"))
  assert one["ntasks-per-node"] == "1" and one["time"] == "1-12"
  assert options(rendered("slurm", seconds=100_000))["time"] == "1-18:00:00"  # 1.5 x 100000 + 1200 s = 42 h.


def test_bash_reads_the_script():
  done = subprocess.run(["bash", "-n"], input=rendered("slurm"), capture_output=True, text=True)
  assert done.returncode == 0 and not done.stderr


@pytest.fixture
def cluster(tmp_path):
  """A folder with the script and stand-ins for SLURM; run(**env) -> (process, log of what was called)."""
  commands = {
    "sbatch": 'echo "sbatch $*" >> log',
    "scontrol": 'echo "scontrol $*" >> log',
    "scancel": 'echo "scancel $*" >> log; kill -TERM $(cat train.pid)',
    "srun": 'shift; exec "$@"',
    "python": 'echo $$ > train.pid; printf "%s\\n" "$@" > argv; trap "sleep 0.3; exit 143" TERM\n'
              'for i in $(seq ${STEPS:-0}); do sleep 0.05; done; exit ${CODE:-0}'}
  (tmp_path / "bin").mkdir()
  for name, text in commands.items():
    path = tmp_path / "bin" / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
  text = rendered("slurm", f"checkout={tmp_path}", "python=python", "setup=echo before >> log",
                  "cpus_per_task=None")
  (tmp_path / "it's here.sbatch").write_text(text)

  def run(**env):
    (tmp_path / "log").unlink(missing_ok=True)
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "77", **env}
    return subprocess.Popen(["bash", str(tmp_path / "it's here.sbatch")], env=env, stdout=subprocess.PIPE,
                            text=True)

  run.log = lambda: (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
  run.folder = tmp_path
  return run


def test_outside_of_a_job_it_submits_what_is_missing(cluster):
  script = cluster.folder / "it's here.sbatch"
  assert cluster().wait() == 0 and cluster.log() == [f"sbatch --array=0,1,2,3%3 {script}"]
  for run, status in zip(make_runs(cluster.folder / FOLDER), ("done", "failed", "pruned")):
    run.workdir.mkdir(parents=True)
    (run.workdir / "outcome.json").write_text(json.dumps({"exit_code": 0, "status": status}, indent=1))
  assert cluster().wait() == 0 and cluster.log() == [f"sbatch --array=1,3%3 {script}"]
  for run in make_runs(cluster.folder / FOLDER):
    run.workdir.mkdir(parents=True, exist_ok=True)
    (run.workdir / "outcome.json").write_text(json.dumps({"status": "done"}))
  process = cluster()
  assert process.wait() == 0 and not cluster.log() and process.stdout.read() == "all 4 runs are done\n"


def wait_for(path):
  deadline = time.monotonic() + 10
  while not path.exists() or not path.read_text():
    assert time.monotonic() < deadline
    time.sleep(0.01)


@pytest.mark.parametrize("code", [0, 1, 2, 143])  # 143 is scancel: what one cancels is not queued again.
def test_a_job_runs_its_run_and_exits_as_it(code, cluster):
  assert cluster(SLURM_ARRAY_TASK_ID="1", CODE=str(code)).wait() == code
  assert (cluster.folder / "argv").read_text().splitlines() == [
    "-m", "experiments.task", *make_runs()[1].command]
  assert cluster.log() == ["before"]


def test_before_its_time_limit_it_saves_and_is_queued_again(cluster):
  process = cluster(SLURM_ARRAY_TASK_ID="3", STEPS="400")
  wait_for(cluster.folder / "train.pid")
  process.send_signal(signal.SIGTERM)  # A preemption: SLURM tells the run too.
  time.sleep(0.1)
  assert process.poll() is None
  process.send_signal(signal.SIGUSR1)
  assert process.wait(10) == 143
  assert cluster.log() == ["before", "scancel --signal=TERM 77_3", "scontrol requeue 77_3"]


def test_a_run_that_ends_while_it_is_told_to_stop_is_not_queued_again(cluster):
  process = cluster(SLURM_ARRAY_TASK_ID="0", STEPS="4")
  wait_for(cluster.folder / "train.pid")
  (cluster.folder / "bin" / "scancel").write_text("#!/bin/bash\nsleep 0.5\n")
  process.send_signal(signal.SIGUSR1)
  assert process.wait(10) == 0 and cluster.log() == ["before"]


# GKE.

def test_jobsets_are_of_the_schema():
  schema = pytest.importorskip("kubeflow_trainer_api.models.jobset_v1alpha2_job_set",
                               reason="its models are the schema: pip install kubeflow-trainer-api")
  documents = list(yaml.safe_load_all(rendered("jobset")))
  misspelt = [(document, path) for document in documents[:1] for path in _paths(document)]
  for document in documents:
    assert schema.JobsetV1alpha2JobSet.from_dict(document).to_dict() == document
  for document, path in misspelt:  # Nothing is there that the schema does not read.
    wrong = json.loads(json.dumps(document))
    section = wrong
    for key in path[:-1]:
      section = section[key]
    section[path[-1] + "x"] = section.pop(path[-1])
    with contextlib.suppress(ValueError):
      assert schema.JobsetV1alpha2JobSet.from_dict(wrong).to_dict() != wrong, path


FREE = ("labels", "annotations", "nodeSelector", "limits", "requests", "key")


def _paths(tree, path=()):
  """Every key that the schema knows."""
  for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
    if isinstance(key, str):
      yield (*path, key)
    if isinstance(value, dict | list) and key not in FREE and not (isinstance(value, list) and not isinstance(
        value[0], dict)):
      yield from _paths(value, (*path, key))


def test_a_jobset_is_of_one_slice_and_its_names_are_short_enough():
  documents = list(yaml.safe_load_all(rendered("jobset", "chip=v5p", "topology=2x2x2")))
  names = [d["metadata"]["name"] for d in documents]
  assert len(set(names)) == 4 and all(len(f"{name}-slice-0-9999") <= 63 for name in names)
  for document, run in zip(documents, make_runs()):
    replicated, = document["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    container, = pod["containers"]
    assert job["parallelism"] == job["completions"] == 2
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x2"
    *settings, cache, workdir = container["command"][3:]
    assert settings == run.command[:-1] and cache.endswith("cache_path=/shared/cache")
    assert workdir == f"--workdir=/shared/{run.workdir}"
  single, *_ = yaml.safe_load_all(rendered("jobset", "topology=1x1"))
  assert single["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] == 1
  assert list(single["metadata"]["annotations"]) == ["assay/run"]  # Others may use the node pool.
  assert ACCELERATORS.keys() <= CHIP.keys()


MISTAKES = [
  ("slurm", "partitoin=x", "unknown key partitoin; did you mean partition?"),
  ("slurm", "nodes=0", "slurm.nodes=0 must be at least 1"),
  ("slurm", "time=4h", "slurm.time=4h must be D-HH:MM:SS; nearest valid: 04:00:00"),
  ("slurm", "gpus_per_node=3", "cell 'rmsnorm' on the 6 devices of slurm.nodes x slurm.gpus_per_node: model"),
  ("jobset", "image=", "jobset.image must be given"),
  ("jobset", "claim=", "jobset.claim must be given"),
  ("jobset", "chip=v5", "jobset.chip=v5: nearest valid: v5e, v5p"),
  ("jobset", "topology=2x2x2", "jobset.topology=2x2x2: v5e has 2 dimensions; nearest valid: 2x2"),
  ("jobset", "chips_per_host=3", "chips_per_host=3 does not divide the 8 chips of 2x4; nearest valid: 1"),
  ("jobset", "slices=2", "jobset.slices=2 but mesh.slices=1 in cell 'rmsnorm'; nearest valid: 1"),
  ("slurmm", "", "--render=slurmm: did you mean slurm?"),
]


@pytest.mark.parametrize("kind, text, said", MISTAKES)
def test_mistakes_are_named(kind, text, said, tmp_path):
  texts = [*SETTINGS.get(kind, ()), *filter(None, [text])]
  with pytest.raises(ValueError) as error:
    write(kind, texts, "experiments.sweep", make_runs(tmp_path), tmp_path)
  assert said in str(error.value) and not list(tmp_path.iterdir())


# What they start.

def run_task(monkeypatch, workdir, outcome=None, env=()):
  """(exit code, what was run in this process, what this process became)"""
  ran, became = [], []
  monkeypatch.setattr(task, "run_one", lambda run, stop: ran.append(run) or outcome)
  monkeypatch.setattr(os, "execv", lambda path, argv: became.append(argv) or sys.exit(99))
  for name in task.RANKS:
    monkeypatch.delenv(name, raising=False)
  for name, value in dict(env).items():
    monkeypatch.setenv(name, value)
  try:
    code = task.main(["--config=x.py", f"--workdir={workdir}"])
  except SystemExit as e:
    code = e.code
  return code, ran, became


@pytest.mark.parametrize("outcome, code", [
  (Outcome("done", 0, 1.0), 0), (None, 143), (Outcome("failed", 2, 1.0, "wrong"), 2),
  (Outcome("failed", -9, 1.0, "killed"), 137)])
def test_a_task_exits_as_its_run_does(outcome, code, monkeypatch, tmp_path):
  found, ran, became = run_task(monkeypatch, tmp_path, outcome)
  assert found == code and not became
  assert ran == [(tmp_path, ["--config=x.py", f"--workdir={tmp_path}"])]


@pytest.mark.parametrize("status, runs", [("done", 0), ("pruned", 0), ("failed", 1)])
def test_a_task_runs_what_is_not_done(status, runs, monkeypatch, tmp_path):
  (tmp_path / "outcome.json").write_text(json.dumps(Outcome(status, 0, 1.0)._asdict()))
  code, ran, _ = run_task(monkeypatch, tmp_path, Outcome("done", 0, 1.0))
  assert code == 0 and len(ran) == runs


@pytest.mark.parametrize("env, first", [
  ({}, True), ({"SLURM_PROCID": "0"}, True), ({"SLURM_PROCID": "3"}, False), ({"TPU_WORKER_ID": "0"}, True),
  ({"TPU_WORKER_ID": "1"}, False), ({"TPU_WORKER_ID": "0", "MEGASCALE_SLICE_ID": "1"}, False)])
def test_of_the_processes_of_a_run_the_first_writes_the_outcome(env, first, monkeypatch, tmp_path):
  _, ran, became = run_task(monkeypatch, tmp_path, Outcome("done", 0, 1.0), env)
  assert len(ran) == first and len(became) == (not first)
  if became:
    assert became[0][1:4] == ["-m", "train.main", "--config=x.py"]


def main():
  for kind, name in FILES.items():
    (GOLDEN / name).write_text(rendered(kind))


if __name__ == "__main__":
  main()

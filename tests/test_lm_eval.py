"""lm-eval over the engine, beside lm-eval's own Hugging Face backend on the same weights."""
import json
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest

from data.tokenizer_gguf import read_fields, to_tokenizers
from infer.engine import Engine
from infer.eval import RESULTS, Reading, main, read_lines
from infer.load import load_params, open_run
from infer.score import window_scores
from model.hub.convert import export_model, import_model, open_source
from tests.hub_cases import import_folder, settings, write_folder
from tests.test_chat import byte_level
from tests.test_hub_real import smollm2
from tests.tiny import mesh_of

pytest.importorskip("lm_eval", reason="the extra [eval]")
WINDOW = 64  # Positions of the model.
SAME = "doc_id", "prompt_hash", "arguments"
QUIET = lambda done, total, what: None
YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
metadata: {{version: {version}}}
"""
CHOOSE = """output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""
READ = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
"""
WRITE = """output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["z", "\\n"], max_gen_toks: 7, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module", params=[True, pytest.param(False, marks=pytest.mark.slow)],
                ids=["bos", "no bos"])
def folders(request, tmp_path_factory):
  """(a run's folder of an imported model, the folder that it is exported to, YAML files)."""
  path = tmp_path_factory.mktemp("lm_eval")
  config = settings("Llama 3, SmolLM2") | {"max_position_embeddings": WINDOW}
  tokenizer = byte_level()
  bos, eos = (tokenizer.token_to_id(name) for name in ("<s>", "</s>"))
  write_folder(path / "source", config | {"bos_token_id": bos, "eos_token_id": eos}, seed=1)
  if not request.param:
    tokenizer.post_processor = type(tokenizer.post_processor)(single="$A", special_tokens=[])
  tokenizer.save(str(path / "source" / "tokenizer.json"))
  (path / "source" / "tokenizer_config.json").write_text(json.dumps({
    "bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}))
  import_folder(path / "source", path / "run")
  export_model(path / "run", path / "exported")
  return path / "run", path / "exported", write_yamls(path, *made_up())


def made_up():
  """60 choices, some behind contexts that are too long; texts of one window and of several; prompts."""
  rng = np.random.default_rng(5)
  word = lambda: "".join(map(chr, rng.integers(97, 123, rng.integers(1, 6))))
  text = lambda n: " ".join(word() for _ in range(n))
  return ([{"context": "" if i == 7 else text(25 if i % 10 == 3 else 3) + " " * (i % 2),
            "choices": [text(int(rng.integers(1, 4))) for _ in range(4)], "answer": i % 4}
           for i in range(60)],
          [{"text": text(n)} for n in (1, 8, 40, 3, 90)],
          [{"context": text(3 if i else 40), "answer": "q"} for i in range(6)])


def write_yamls(path, choices, texts, writes):
  rows = {"choose": (1.5, CHOOSE, choices), "read": (1, READ, texts), "write": (2, WRITE, writes)}
  for name, (version, kind, lines) in rows.items():
    file = path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / f"{name}.yaml").write_text(YAML.format(name=name, file=file, version=version) + kind)
  return [path / f"{name}.yaml" for name in rows]


@pytest.fixture(scope="module")
def theirs(folders, offline):
  return run_theirs(folders, WINDOW)


def run_theirs(folders, window, **more):
  """Samples of lm-eval's own Hugging Face backend."""
  for needed in ("torch", "transformers", "accelerate"):
    pytest.importorskip(needed, reason=f"lm-eval's own Hugging Face backend: pip install {needed}")
  from lm_eval import simple_evaluate
  from lm_eval.models.huggingface import HFLM

  from infer.lm_eval_adapter import load_tasks
  _, exported, yamls = folders
  manager, found = load_tasks(yamls)
  lm = HFLM(str(exported), device="cpu", dtype="float32", batch_size=4, max_length=window, **more)
  return simple_evaluate(lm, tasks=list(found.values()), task_manager=manager, bootstrap_iters=0)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
  """No data set is looked for elsewhere, nor kept."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_DATASETS_OFFLINE", "1")
    patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    yield


def run_ours(folders, slots, mesh="one", window=WINDOW):
  from lm_eval import simple_evaluate

  from infer.lm_eval_adapter import EngineLM, load_tasks
  run, mesh = open_run(folders[0], "--model"), mesh_of(mesh)
  with jax.set_mesh(mesh):
    params, *_ = load_params(run, run.model, mesh)
  engine = Engine(run.model, params, mesh, stop_ids=(run.tokenizer.eos_id,), slots=slots,
                  max_length=window + 1)
  manager, found = load_tasks(folders[2])
  lm = EngineLM(engine, Reading(run.tokenizer, run.tokenizer.add_bos, None, window))
  return simple_evaluate(lm, tasks=list(found.values()), task_manager=manager, bootstrap_iters=0)


def check_same(ours, theirs) -> float:
  """Every choice and every text that was made; returns by how much log-likelihoods differ at most."""
  worst = 0.0
  for name in ours["samples"]:
    likelihoods = lambda s: np.array([r[0] if name == "choose" else r for r in s["filtered_resps"]])
    for x, y in zip(ours["samples"][name], theirs["samples"][name], strict=True):
      assert [x[key] for key in SAME] == [y[key] for key in SAME]
      if name == "write":
        assert x["filtered_resps"] == y["filtered_resps"], x["doc_id"]
        continue
      worst = max(worst, np.abs(likelihoods(x) - likelihoods(y)).max())
      if name == "choose":
        assert [r[1] for r in x["filtered_resps"]] == [r[1] for r in y["filtered_resps"]]
        assert likelihoods(x).argmax() == likelihoods(y).argmax()
        assert all(x[metric] == y[metric] for metric in ("acc", "acc_norm", "acc_bytes"))
    assert ours["versions"][name] == theirs["versions"][name]
  n = {name: len(samples) for name, samples in ours["samples"].items()}
  print(f"{n} items decided alike, log-likelihoods at most {worst:.1e} apart")
  return worst


@pytest.mark.parametrize("slots, mesh", [(8, "one"), pytest.param(1, "one", marks=pytest.mark.slow),
                                         pytest.param(16, "all", marks=pytest.mark.slow)])
def test_the_same_as_hugging_faces_backend(folders, theirs, slots, mesh):
  ours = run_ours(folders, slots, mesh)
  assert {name: len(samples) for name, samples in ours["samples"].items()} == {
    "choose": 60, "read": 5, "write": 6}
  assert check_same(ours, theirs) < 1e-3
  assert 0 < ours["results"]["choose"]["acc,none"] < 1


@pytest.mark.slow
def test_the_same_on_smollm2(tmp_path, offline):
  """Real weights on real text: how does a paragraph of Python's own documentation go on?

  torch's log_softmax of 49152 float32 logits is too high by 1.7e-5 on average, by 1.2e-3 over a text of 70
  tokens: theirs is taken in float64.
  """
  file = smollm2(None)
  pytest.importorskip("gguf")
  run = import_model(open_source(file), tmp_path / "run")
  export_model(run, tmp_path / "exported")
  fields = tmp_path / "run" / "tokenizer_gguf.json"
  to_tokenizers(read_fields(fields), fields).save(str(tmp_path / "exported" / "tokenizer.json"))
  tokenizer = open_run(run, "--model").tokenizer
  names = {key: tokenizer.names[key] for key in ("bos_token", "eos_token")}
  (tmp_path / "exported" / "tokenizer_config.json").write_text(json.dumps(
    {"tokenizer_class": "PreTrainedTokenizerFast", **names}))
  rng = np.random.default_rng(0)
  paragraphs = [" ".join(p.split()) for name in sorted(topics) for p in topics[name].split("\n\n")]
  words = " ".join(paragraphs).split()
  span = lambda n: " ".join(words[(at := int(rng.integers(0, len(words) - 60))):at + n])
  # Each once, whatever topics it stands under. Choices stand at one place of their paragraphs.
  long = [p for p in map(str.split, dict.fromkeys(paragraphs)) if len(p) >= 36]
  items = []
  for i in range(60):
    four = [long[j] for j in rng.choice(len(long), 4, replace=False)]
    items.append({"context": " ".join(four[i % 4][:30]), "choices": [" ".join(p[30:36]) for p in four],
                  "answer": i % 4})
  texts = [{"text": span(50)} for _ in range(4)]
  writes = [{"context": span(20), "answer": ""} for _ in range(8)]
  folders = run, tmp_path / "exported", write_yamls(tmp_path, items, texts, writes)
  theirs = run_theirs(folders, 256, softmax_dtype="float64")
  ours = run_ours(folders, 8, window=256)
  assert check_same(ours, theirs) < 1e-3
  assert ours["results"]["choose"]["acc,none"] > 0.8


def test_windows_are_lm_evals():
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
  for n in range(1, 40):
    for overlap in (1, 3, 8):
      tokens = list(range(n))
      wanted = [make_disjoint_window(w) for w in get_rolling_token_windows(tokens, 99, 8, overlap)]
      got = [(s.tokens[:s.start], s.tokens[s.start:]) for s in window_scores(tokens, 99, 8, overlap)]
      assert got == wanted, (n, overlap)


def test_the_command_runs_yaml_tasks(folders, offline, tmp_path, capsys):
  """And goes on where it was: what was answered is asked no more."""
  run, _, yamls = folders
  command = [f"--model={run}", f"--out={tmp_path / 'out'}", f"--tasks={','.join(map(str, yamls))}"]
  assert main([*command, "--limit=3"]) == 0
  capsys.readouterr()
  assert main(command) == 0
  table = capsys.readouterr().out.splitlines()
  results = json.loads((tmp_path / "out" / RESULTS).read_text())
  assert [row.split()[2] for row in table[1:6]] == ["acc", "acc_norm", "acc_bytes", "bits_per_byte",
                                                    "exact_match"]
  assert {name: (r["n"], r["version"]) for name, r in results.items()} == {
    "choose": (60, 1.5), "read": (5, 1), "write": (6, 2)}
  for name, metric in (("choose", "acc"), ("read", "bits_per_byte"), ("write", "exact_match")):
    own = results[name]["lm_eval"][f"{metric},none"]
    assert results[name]["metrics"][metric]["mean"] == pytest.approx(own)
  header, lines = read_lines(tmp_path / "out" / "choose.jsonl")
  assert header["kind"] == "lm-eval" and len(lines) == 60 and len({line["prompt"] for line in lines}) == 60
  from infer import compare
  assert compare.main([str(tmp_path / "out"), str(tmp_path / "out")]) == 0


def test_what_was_answered_is_not_asked_again(folders, offline, tmp_path):
  """A kill in the midst of a task: lm-eval's cache has what came before it."""
  from infer.lm_eval_adapter import EngineLM, load_tasks, run_tasks
  from tests.fake_scorer import FakeEngine
  run, mesh = open_run(folders[0], "--model"), mesh_of("one")
  with jax.set_mesh(mesh):
    params, *_ = load_params(run, run.model, mesh)
    from model.transformer import abstract_params
    graphdef, _ = abstract_params(run.model, mesh)
  how = Reading(run.tokenizer, run.tokenizer.add_bos, None, WINDOW)

  class Killed(Exception):
    pass

  def kill(done, total, what):
    if done == 100:
      raise Killed

  first, second = (FakeEngine(run.model, graphdef, params, mesh, slots=16) for _ in range(2))
  def run_choose(engine, step, progress=QUIET):
    (_, lines, _), = run_tasks(load_tasks(folders[2][:1]), EngineLM(engine, how, progress), {"step": step},
                               tmp_path, None)
    return lines

  with pytest.raises(Killed):
    run_choose(first, 1, kill)
  lines = run_choose(second, 1)
  assert 0 < len(second.submitted) <= 240 - 100 + 16 and len(lines) == 60
  fresh = run_choose(first, 2)  # Of other weights.
  assert [line["scores"] for line in fresh] == [line["scores"] for line in lines]


def test_what_is_not_served_is_refused_by_name(folders, offline):
  from infer.lm_eval_adapter import EngineLM, load_tasks, read_generation
  with pytest.raises(ValueError, match="generation_kwargs.num_beams is not served; known: until"):
    read_generation({"until": ["a"], "num_beams": 4}, 0)
  with pytest.raises(ValueError, match="top_p=3"):
    read_generation({"do_sample": True, "top_p": 3}, 0)
  settings = {"until": "\n", "max_new_tokens": 9, "do_sample": True, "temperature": 0.5, "top_k": 0}
  s = read_generation(settings, 4)
  assert (s.stop, s.max_tokens, s.temperature, s.top_k, s.seed) == (("\n",), 9, 0.5, None, 4)
  assert read_generation({"temperature": 0.7}, 0).temperature == 0
  lm = EngineLM(None, Reading(open_run(folders[0], "--model").tokenizer, True, None, WINDOW))
  with pytest.raises(ValueError, match=f"has {WINDOW + 1} tokens; valid: 1 to the window of {WINDOW}"):
    lm._loglikelihood_tokens([(("a", "b"), [5], [6] * (WINDOW + 1))])
  broken = folders[0].parent / "broken.yaml"
  broken.write_text("task: [\n")
  with pytest.raises(ValueError, match="broken.yaml: lm-eval cannot load it"):
    load_tasks([broken])

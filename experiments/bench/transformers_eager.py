"""The yardstick of `bench engine`: transformers' model with its own cache, greedy, prompts of one length.

  python -m experiments.bench.transformers_eager FOLDER THREADS

Reads questions from stdin, one in a line of JSON: {"prompts": [[ids] ...], "tokens": n} makes n tokens after
the first of each; with n = 0 the prompts are only read. Answers {"seconds", "logprobs", "last"}: of the
making, or of the reading; of the first token of each; and the id of its last.
"""
import json
import sys
import time
import warnings

import torch
import transformers


class Turns:
  """Usage: answer = Turns(model)(question)."""

  def __init__(self, model):
    self._model = model
    self._read = {}  # Prompts -> (cache, first tokens, their log-probabilities): read once, made from often.

  @torch.inference_mode()
  def __call__(self, question) -> dict:
    prompts, n = question["prompts"], question["tokens"]
    start = time.perf_counter()
    cache, ids_B1, logprobs = self._remember(prompts) if n else self._prefill(prompts)
    if n:
      start = time.perf_counter()
    for _ in range(n):
      ids_B1 = self._model(input_ids=ids_B1, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
    last = ids_B1[:, 0].tolist()
    seconds = time.perf_counter() - start
    if n:
      cache.crop(-n)
    return {"seconds": seconds, "logprobs": logprobs, "last": last}

  def _remember(self, prompts):
    key = json.dumps(prompts)
    if key not in self._read:
      self._read[key] = self._prefill(prompts)
    return self._read[key]

  def _prefill(self, prompts):
    out = self._model(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1)
    logits_BV = out.logits[:, -1]
    best = logits_BV.argmax(-1, keepdim=True)
    return out.past_key_values, best, logits_BV.log_softmax(-1).gather(1, best)[:, 0].tolist()


def main():
  torch.set_num_threads(int(sys.argv[2]))
  transformers.utils.logging.disable_progress_bar()
  warnings.filterwarnings("ignore", category=FutureWarning)  # All versions know the name past_key_values.
  turns = Turns(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval())
  print(json.dumps({"version": f"{transformers.__version__}, torch {torch.__version__}"}), flush=True)
  for line in sys.stdin:
    print(json.dumps(turns(json.loads(line))), flush=True)


if __name__ == "__main__":
  main()

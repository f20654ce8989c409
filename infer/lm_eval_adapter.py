"""EleutherAI's lm-eval over the engine: its tasks, prompts, filters and metrics, our weights.

What is asked is what lm-eval's own Hugging Face backend would ask: contexts and continuations are cut where
it cuts them, the beginning marker stands where it puts it, a context that is too long loses its beginning.
Two things differ. A text that spells a special token stays text. A continuation that is longer than the
window is refused by name, and so is a setting of generation that is unknown here.
"""
import math
import pathlib
import re

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from infer import tasks
from infer.sampling import Sampling
from infer.score import Score, Write, answer, window_scores

MAX_TOKENS = 256  # Where a task does not say: lm-eval's own.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # The first one counts.
FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")


class EngineLM(TemplateLM):
  """lm-eval's LM over an engine."""

  def __init__(self, engine, reading, progress=lambda done, total, what: None):
    """Args:
      engine: an infer.engine.Engine; its prompts may be one token longer than reading.window.
      reading: an infer.eval.Reading without a chat template.
    """
    super().__init__()
    self._engine, self._reading, self._progress = engine, reading, progress
    self.max_length, self.max_gen_toks = reading.window, MAX_TOKENS

  @property
  def eot_token_id(self) -> int:
    return self._reading.tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    return self._reading.tokenizer.bos_id

  @property
  def tokenizer_name(self) -> str:
    return self._reading.tokenizer.sha256

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    marked = self._reading.bos if add_special_tokens is None else add_special_tokens
    return [self.prefix_token_id] * marked + self._reading.tokenizer.encode(string)

  def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
    jobs = []
    for (context, continuation), context_ids, ids in requests:
      if not 1 <= len(ids) <= self.max_length:
        raise ValueError(f"the continuation {continuation[:80]!r} of {context[-80:]!r} has {len(ids)} "
                         f"tokens; valid: 1 to the window of {self.max_length} (--window)")
      tokens = (context_ids + ids)[-(self.max_length + 1):]
      jobs.append([Score(tokens, len(tokens) - len(ids))])
    keep = lambda i, found: self.cache_hook.add_partial("loglikelihood", requests[i][0], found)
    read = lambda job, found: (found[0].logprob, found[0].greedy)
    return self._answer(jobs, read, keep, "loglikelihood")

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    jobs = [window_scores(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length)
            for request in requests]
    keep = lambda i, found: self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, found)
    total = lambda job, found: math.fsum(one.logprob for one in found)
    return self._answer(jobs, total, keep, "loglikelihood_rolling")

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    jobs = []
    for i, request in enumerate(requests):
      context, settings = request.args
      sampling = read_generation(settings, seed=i)
      room = self.max_length - sampling.max_tokens
      if room < 1:
        raise ValueError(f"max_gen_toks={sampling.max_tokens} leaves no room for a context in a window of "
                         f"{self.max_length} (--window)")
      ids = self.tok_encode(context) or [self.prefix_token_id]
      jobs.append([Write(ids[-room:], sampling)])
    keep = lambda i, found: self.cache_hook.add_partial("generate_until", requests[i].args, found)
    return self._answer(jobs, self._read_text, keep, "generate_until")

  def _read_text(self, job, found) -> str:
    """As lm-eval reads tokens: half a character at the end is U+FFFD, where serving leaves it out."""
    text = self._reading.tokenizer.decode(found[0].tokens)
    for stop in job[0].sampling.stop:
      text = text.partition(stop)[0]
    return text

  def _answer(self, jobs, read, keep, what):
    """read(jobs, their answers) for each request; keep(request, that) as soon as it is known, so that a run
    that is killed does not ask again."""
    found, done, n_done = [{} for _ in jobs], [None] * len(jobs), 0
    # Those that begin alike are neighbours, whatever the order of the task: the engine reads that once.
    order = sorted(range(len(jobs)), key=lambda i: _tokens(jobs[i]))
    asked = (((i, part), job) for i in order for part, job in enumerate(jobs[i]))
    self._progress(0, len(jobs), what)
    for i in (i for i, parts in enumerate(jobs) if not parts):  # An empty text.
      done[i] = read([], [])
    for (i, part), one in answer(self._engine, self._reading.tokenizer, asked):
      found[i][part] = one
      if len(found[i]) == len(jobs[i]):
        done[i], n_done = read(jobs[i], [found[i][p] for p in range(len(jobs[i]))]), n_done + 1
        keep(i, done[i])
        self._progress(n_done, len(jobs), what)
    return done


def _tokens(jobs):
  first = jobs[0] if jobs else None
  return [] if first is None else first.tokens if isinstance(first, Score) else first.prompt


def read_generation(settings: dict, seed: int) -> Sampling:
  """lm-eval's generation_kwargs -> Sampling.

  Raises:
    ValueError: one that is not served here.
  """
  left = dict(settings)
  lengths = [left.pop(name) for name in LENGTHS if name in left]
  until, do_sample = left.pop("until", None) or (), left.pop("do_sample", False)
  values = {name: left.pop(name) for name in FILTERS if name in left}
  temperature = left.pop("temperature", 1.0 if do_sample else 0.0)
  if left:
    known = ("until", "do_sample", "temperature", *FILTERS, *LENGTHS)
    raise ValueError(f"generation_kwargs.{next(iter(left))} is not served; known: {', '.join(known)}")
  values["top_k"] = values.get("top_k") or None  # 0 is off.
  stop = (until,) if isinstance(until, str) else tuple(s for s in until if s)
  return Sampling(max_tokens=int(lengths[0]) if lengths else MAX_TOKENS, stop=stop, seed=seed,
                  temperature=float(temperature) if do_sample else 0.0, **values).validate()


# Its tasks, and what came of them as our files have it.

def load_tasks(paths):
  """(task manager, tasks) of YAML files.

  Raises:
    ValueError: lm-eval cannot load one.
  """
  manager, loaded = TaskManager(include_defaults=False), {}
  for path in paths:
    try:
      found = manager.load([str(pathlib.Path(path).resolve())])["tasks"]
    except Exception as e:  # Of its own, of YAML, of datasets: what it says names the fault.
      raise ValueError(f"{path}: lm-eval cannot load it: {type(e).__name__}: {e}") from e
    for name in found:
      if name in loaded or not re.fullmatch(r"[\w.-]{1,100}", name):
        raise ValueError(f"{path}: task={name!r} must be letters, digits, and _ . - (its file has that "
                         "name), and no other's")
    loaded |= found
  return manager, loaded


def run_tasks(loaded, lm: EngineLM, header: dict, out: pathlib.Path, limit: int | None):
  """Yields (header, lines, lm-eval's own results) of each task. What was answered is kept in `out` at once.

  Args:
    loaded: of `load_tasks`.
    header: what the answers depend on beside what is asked.
  """
  manager, found = loaded
  kept = out / f"lm_eval_{tasks.digest({k: v for k, v in header.items() if k != 'model'})}"
  results = simple_evaluate(lm, tasks=list(found.values()), task_manager=manager, limit=limit,
                            bootstrap_iters=0, use_cache=str(kept))
  for name in found:
    about = {"task": name, "version": results["versions"].get(name), "kind": "lm-eval", **header}
    own = {k: v for k, v in results["results"][name].items() if isinstance(v, int | float | str)}
    yield about, make_lines(results["samples"][name]), own


def make_lines(samples: list[dict]) -> list[dict]:
  """lm-eval's samples, one a document and filter -> a line a document. Metrics that are no number of one
  document (BLEU, a corpus's F1) are in lm-eval's own results alone."""
  lines = {}
  for sample in samples:
    line = lines.setdefault(sample["doc_id"], {
      "id": str(sample["doc_id"]), "prompt": tasks.digest([sample["arguments"], str(sample["target"])]),
      "scores": {}, "answers": sample["filtered_resps"]})
    for metric in sample["metrics"]:
      value, name = sample[metric], metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
      if isinstance(value, bool | int | float):
        line["scores"][name] = float(value)
      elif metric == "bits_per_byte":  # (log-likelihood, bytes).
        line["logprob"], line["bytes"] = map(float, value)
  return [lines[i] for i in sorted(lines)]

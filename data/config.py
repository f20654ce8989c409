"""Typed data configuration: which text, which tokenizer, how rows are cut from it."""
import dataclasses
import math

# The keys of data.sources.SOURCE.
SOURCES = ("text", "jsonl", "parquet", "tfds", "array_record", "synthetic")


@dataclasses.dataclass(kw_only=True, slots=True)
class SourceConfig:
  """One named stream of documents."""
  name: str = "text"  # What logs, weights and addresses call it.
  kind: str = "text"  # text | jsonl | parquet | tfds | array_record | synthetic.
  # Globs, comma-separated, !GLOB excludes; {stdlib} is Python's library folder, {site} that of what pip
  # installed; for tfds a name or folder.
  path: str = ""
  text_key: str = "text"  # The field or column that holds the text (jsonl, parquet, tfds).
  split: str = "train"  # TFDS only.
  documents: int = 1000  # Synthetic only: how many to make.
  weight: float | None = None  # Share of the rows, relative to the others; None: tokens ** (1 / temperature).
  max_epochs: float | None = None  # The run is refused if it would repeat this source more; None: no limit.


@dataclasses.dataclass(kw_only=True, slots=True)
class TokenizerConfig:
  kind: str = "sentencepiece"  # sentencepiece | huggingface (a tokenizer.json) | gguf (tokenizer_gguf.json).
  path: str | None = None  # None: trained on the sources (sentencepiece only) and kept in the cache.
  model: str = "bpe"  # bpe | unigram; what training makes.
  vocab_size: int = 8192  # What training aims for.
  train_bytes: int = 10_000_000  # How much text training reads, evenly from all documents.


@dataclasses.dataclass(kw_only=True, slots=True)
class DataConfig:
  sources: list[SourceConfig] = dataclasses.field(default_factory=lambda: [SourceConfig()])
  tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
  packing: str = "best_fit"  # best_fit (cuts few documents) | concat (no padding, cuts documents).
  val_fraction: float = 0.01  # Of the documents, chosen by the hash of their content.
  temperature: float = 1.0  # For sources without a weight: 1 is by size, large is uniform.
  weights_from_step: tuple[tuple, ...] = ()  # ((step, (weight, ...)), ...): new weights from these steps on.
  cache_path: str = "runs/cache"  # Tokenised shards, one folder per distinct content.
  workers: int | None = None  # Processes that tokenise; None: one a core.
  prefetch: int = 4  # Batches made ahead of the step.

  def validate(self) -> "DataConfig":
    """What settings must be together; what each may be is in train.config. No file is touched.

    Raises:
      ValueError: with the names, the values and the nearest valid choice.
    """
    if not self.sources:
      raise ValueError("data.sources is empty: name at least one")
    names = [s.name for s in self.sources]
    if len(set(names)) < len(names):
      raise ValueError(f"data.sources: names must differ, got {names}")
    if self.tokenizer.kind != "sentencepiece" and self.tokenizer.path is None:
      raise ValueError(f"data.tokenizer.path=None: a {self.tokenizer.kind} tokenizer is read from its "
                       "tokenizer.json or tokenizer_gguf.json")
    for i, source in enumerate(self.sources):
      if source.kind != "synthetic" and not source.path:
        raise ValueError(f"data.sources[{i}].path is empty: kind {source.kind!r} needs one")
    if len({s.weight is None for s in self.sources}) > 1:
      raise ValueError("data.sources: give every source a weight or none; "
                       f"got {[s.weight for s in self.sources]}")
    if sum(s.weight or 0 for s in self.sources) == 0 and self.sources[0].weight is not None:
      raise ValueError(f"data.sources: weights {[s.weight for s in self.sources]} must not be all 0; "
                       "nearest valid: None for each")
    self._validate_stages()
    return self

  def _validate_stages(self):
    last, n = 0, len(self.sources)
    number = lambda w: type(w) in (int, float) and 0 <= w < math.inf
    for stage in self.weights_from_step:
      match stage:
        case (int(step), (*weights,)) if len(weights) == n and all(map(number, weights)) and sum(weights) > 0:
          if step <= last:
            raise ValueError(f"data.weights_from_step: step {step} must be above {last}")
          last = step
        case _:
          raise ValueError(f"data.weights_from_step: {stage} must be (step, one weight for each of the {n} "
                           "sources), no weight below 0 and not all 0, such as "
                           f"(100, {(1.0,) * n})")

"""Training that begins with the weights of a run, or of a model of others that was imported (init_from)."""
from data.config import TokenizerConfig
from data.flags import as_json
from infer.load import TOKENIZERS, open_run
from model.config import ModelConfig
from model.hub.orbax import check_shapes
from model.transformer import abstract_params


def read_initial(path: str) -> tuple[ModelConfig, TokenizerConfig]:
  """The model of a run's folder, and its tokenizer, as settings of another run.

  Raises:
    ValueError: it is no run, or its tokenizer is missing.
  """
  run = open_run(path)
  kind = next(kind for kind, name in TOKENIZERS.items() if (run.path / name).is_file())
  return run.model, TokenizerConfig(kind=kind, path=str((run.path / TOKENIZERS[kind]).resolve()))


def check_initial(cfg, mesh, note) -> None:
  """Notes which settings cfg.init_from was trained with that this run has others for.

  Raises:
    ValueError: it is no run, or its weights have other shapes.
  """
  try:
    there = open_run(cfg.init_from).model
    check_shapes(cfg.init_from, abstract_params(cfg.model, mesh.abstract_mesh)[1])
  except ValueError as e:
    raise ValueError(f"init_from={cfg.init_from}: {e}") from None
  here, there = as_json(cfg.model), as_json(there)
  differ = [f"model.{name}={here[name]} (there {there[name]})" for name in here if here[name] != there[name]]
  note(f"weights of {cfg.init_from}" + (f", with other settings: {', '.join(differ)}" if differ else ""))

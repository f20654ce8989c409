"""The case that `bench train` measures: the model's shape, its run's settings, its rows.

Fixed, so that figures compare.
"""
import jax
import numpy as np

from data.config import DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig
from train.config import OptimConfig, TrainConfig
from train.optim import path_name
from train.step import init_state, make_train_step


def train_config(**changes) -> TrainConfig:
  """d_model 512, 8 layers, 8 heads of 64, SwiGLU 1408, vocabulary 32000 untied, T 512, B 8, float32, AdamW.

  Args:
    changes: fields of the model, for smaller cases in tests and for what a setting brings.
  """
  model = ModelConfig(**dict(vocab_size=32_000, n_layers=8, d_model=512, n_heads=8, d_ff=1408,
                             precision="fp32", attention_impl="chunked", unroll=8) | changes)
  optim = OptimConfig(schedule="constant", warmup_steps=0, b1=0.9, b2=0.95, eps=1e-8)
  data = DataConfig(sources=[SourceConfig(name="none", kind="synthetic")],  # Not read: rows are made here.
                    tokenizer=TokenizerConfig(vocab_size=model.vocab_size))
  return TrainConfig(steps=10_000, batch_size=8, seq_len=512, model=model, optim=optim, data=data).validate()


def make_rows(cfg) -> dict[str, np.ndarray]:
  """Random rows of one document each, as the pipeline gives them."""
  B, T = cfg.batch_size, cfg.seq_len
  tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (B, T + 1), np.int32)
  return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=np.ones((B, T), np.float32),
              positions=np.tile(np.arange(T, dtype=np.int32), (B, 1)), segments=np.ones((B, T), np.int32))


def compile_step(cfg, mesh):
  """(step, params, compiled): our own training step on the case's rows. Each call of step() trains once and
  returns {"loss", "grad_norm"} when everything is done; params are those before the first call, as NumPy by
  path."""
  with jax.set_mesh(mesh):
    graphdef, state = init_state(cfg, mesh)
    split = jax.NamedSharding(mesh, cfg.model.rules("batch", None))
    batch = {name: jax.device_put(a, split) for name, a in make_rows(cfg).items()}
    step = jax.jit(make_train_step(cfg, graphdef, state.params), donate_argnums=0)
    compiled = step.lower(state, batch).compile()
  params = {path_name(path): np.array(a) for path, a in jax.tree_util.tree_flatten_with_path(state.params)[0]}

  def one():
    nonlocal state
    state, metrics = compiled(state, batch)
    jax.block_until_ready(state)
    return {name: float(metrics[name]) for name in ("loss", "grad_norm")}

  return one, params, compiled

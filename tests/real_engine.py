"""The real engine over a tiny model with random weights, and what a server needs beside it."""
import jax

from infer.engine import Engine, Request
from infer.grammar import GrammarCompiler
from infer.sampling import Sampling
from model.config import ModelConfig
from model.transformer import init_params
from tests.fake_engine import END, bytes_tokenizer, make_served
from tests.tiny import mesh_of


def make_real(slots: int = 8, max_length: int = 400, **settings):
  """(engine, warmed up; what is served): an id a byte, as the fake has them."""
  mesh, tokenizer = mesh_of("one"), bytes_tokenizer()
  cfg = ModelConfig(vocab_size=tokenizer.vocab_size, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2,
                    precision="fp32")
  with jax.set_mesh(mesh):
    _, params = init_params(cfg.validate(), mesh, jax.random.key(0))
  engine = Engine(cfg, params, mesh, stop_ids=(END,), slots=slots, max_length=max_length,
                  **{"page_size": 4, "prefill_chunk": 32, "row_buckets": (slots,)} | settings)
  engine.warm_up()
  make = lambda prompt, settings, grammar, user: Request(
    prompt=prompt, sampling=Sampling(**settings), grammar=grammar, user=user)
  return engine, make_served(max_length=max_length, make_request=make, tools=None, force_call=None,
                             grammars=GrammarCompiler(tokenizer, cfg.padded_vocab_size, (END,)))

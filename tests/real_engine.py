"""The real engine over a tiny model with random weights, in this process and in one of its own."""
import contextlib
import os
import re
import subprocess
import sys
import threading
import time

from infer.beam import BeamSearch
from infer.engine import Engine, Request
from infer.grammar import GrammarCompiler
from infer.sampling import Sampling
from model.config import ModelConfig
from tests.fake_engine import END, bytes_tokenizer, make_served
from tests.hub_cases import import_folder, settings, write_folder
from tests.test_chat import byte_level
from tests.tiny import ROOT, make_params, mesh_of

# The engine's thread ends in the middle of whatever it does, when the process is sent SIGUSR1.
KILLABLE = """
import ctypes, signal, sys, threading
def kill(*_):
  engine, = [t for t in threading.enumerate() if t.name == "engine"]
  ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(engine.ident), ctypes.py_object(SystemExit))
signal.signal(signal.SIGUSR1, kill)
from infer.server import main
sys.exit(main(sys.argv[1:]))
"""


def make_real(slots: int = 8, max_length: int = 400, **settings):
  """(engine, warmed up; what is served): an id a byte, as the fake has them."""
  mesh, tokenizer = mesh_of("one"), bytes_tokenizer()
  cfg = ModelConfig(vocab_size=tokenizer.vocab_size, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2,
                    precision="fp32").validate()
  _, params = make_params(cfg, mesh)
  engine = Engine(cfg, params, mesh, stop_ids=(END,), slots=slots, max_length=max_length,
                  **{"page_size": 4, "prefill_chunk": 32, "row_buckets": (slots,)} | settings)
  engine.warm_up()
  make = lambda prompt, settings, grammar, user, beams=None: Request(
    prompt=prompt, sampling=Sampling(**settings), grammar=grammar, user=user,
    beams=beams and BeamSearch(**beams))
  return engine, make_served(max_length=max_length, make_request=make, tools=None, force_call=None,
                             grammars=GrammarCompiler(tokenizer, cfg.padded_vocab_size, (END,)))


def tiny_folder(path):
  """An imported model of two layers, with a tokenizer of bytes."""
  tokenizer = byte_level()
  bos, eos = (tokenizer.token_to_id(name) for name in ("<s>", "</s>"))
  write_folder(path / "source", settings("Llama 2") | {
    "max_position_embeddings": 2048, "bos_token_id": bos, "eos_token_id": eos}, seed=1)
  tokenizer.save(str(path / "source" / "tokenizer.json"))
  import_folder(path / "source", path / "run")
  return path / "run"


@contextlib.contextmanager
def serving(folder, *flags, **env):
  """The real server as a process, when it answers: (it, its port, seconds until then, what it says)."""
  said, began = [], time.monotonic()
  command = [sys.executable, "-c", KILLABLE, f"--model={folder}", "--port=0", *flags]
  with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"} | env, text=True,
                        stderr=subprocess.PIPE) as p:
    reader = threading.Thread(target=lambda: said.extend(iter(p.stderr.readline, "")), daemon=True)
    reader.start()
    try:
      while not (found := re.search(r"is served at http://127.0.0.1:(\d+)", "".join(said))):
        assert p.poll() is None, "".join(said)
        time.sleep(0.05)
      yield p, int(found[1]), time.monotonic() - began, said
    finally:
      p.kill()

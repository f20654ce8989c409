"""SmolLM2-135M-Instruct out of its package, imported once."""
import atexit
import functools
import pathlib
import shutil
import tempfile

from data.chat import find_template
from model.hub.convert import import_model, open_source
from tests.test_hub_real import smollm2

# Its own template knows no tools: a turn more where there are some, in the Hermes style.
TOOLS = """{% if tools %}{{ '<|im_start|>system\nTo call a function, write <tool_call>\n{"name": ..., \
"arguments": ...}\n</tool_call>. Functions: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"""


@functools.cache
def run_folder() -> pathlib.Path:
  """Skips the test where the weights are not installed."""
  file = smollm2(None)
  root = tempfile.mkdtemp(prefix="smollm2-")
  atexit.register(shutil.rmtree, root)
  run = import_model(open_source(file), pathlib.Path(root) / "run")
  (run / "chat_template.jinja").write_text(TOOLS + find_template(run), encoding="utf-8")
  return run

"""Imports go one way: model, data <- infer <- train <- configs, experiments. Nothing of torch or TensorFlow
in the core."""
import ast

import pytest

from tests.tiny import ROOT

ALLOWED = {
  "model": set(), "data": set(), "infer": {"model", "data"}, "train": {"model", "data", "infer"},
  "configs": {"train", "data", "model"}, "experiments": {"model", "data", "infer", "train"},
}
FOREIGN = {"torch", "tensorflow", "transformers"}
YARDSTICKS = {"experiments/bench"}  # Measures against torch, imported where it is used.


def imports(path):
  """Top-level packages that a file imports, anywhere in it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      yield node.module.split(".")[0]


def violations(package, path):
  found = set(imports(path))
  wrong = found & (ALLOWED.keys() - ALLOWED[package] - {package})
  if not any(str(path.relative_to(ROOT)).startswith(y) for y in YARDSTICKS):
    wrong |= found & FOREIGN
  return wrong | (found & {"jax", "flax"} if package == "data" and path.name != "flags.py" else set())


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package):
  files = sorted((ROOT / package).rglob("*.py"))
  assert files
  for path in files:
    assert not violations(package, path), f"{path.relative_to(ROOT)} imports {violations(package, path)}"


def test_a_wrong_import_is_seen(tmp_path):
  path = ROOT / "model" / "config.py"
  wrong = tmp_path / "wrong.py"
  wrong.write_text("import os\nfrom train.step import x\ndef f():\n  import data.prepare\n")
  assert set(imports(wrong)) == {"os", "train", "data"} and not violations("model", path)

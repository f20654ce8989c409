"""A folder from the Hugging Face hub, as data: nothing in it is imported, unpickled or followed elsewhere."""
import json
import pathlib

from model.hub.errors import HubError
from model.hub.safetensors_file import read_safetensors

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_JSON = 64_000_000  # Bytes: the index of the largest models has 10 MB.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
                   "chat_template.json", "generation_config.json")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")


def read_config(path) -> dict:
  """config.json of a folder."""
  config = read_json(inside(path, "config.json"))
  if not isinstance(config, dict):
    raise HubError(f"{path}/config.json is a {type(config).__name__}, not settings by name")
  return config


def read_json(path):
  if (size := path.stat().st_size) > MAX_JSON:
    raise HubError(f"{path} has {size} bytes; more than {MAX_JSON} are not read")
  try:
    return json.loads(path.read_text())
  except (ValueError, RecursionError) as e:
    raise HubError(f"{path} is not JSON: {e}") from None


def inside(folder, name: str) -> pathlib.Path:
  """The path of a file of the folder.

  Raises:
    HubError: the name is a path, or the file is missing, or a link that leads out of the folder. The hub's
      own cache links a snapshot's files to its blobs, two folders up, which is not out.
  """
  folder = pathlib.Path(folder)
  if not isinstance(name, str) or pathlib.PurePath(name).name != name or "\\" in name or "\0" in name:
    raise HubError(f"{folder}: {name!r:.80} is a path, not the name of a file in it")
  path = folder / name
  if not path.is_file():
    raise HubError(f"{folder} has no {name}")
  real, root = path.resolve(), folder.resolve()
  blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
  if real.parent not in (root, blobs):
    raise HubError(f"{path} is a link to {real}, out of the folder: copy the file there if you trust it")
  return path


def read_tensors(folder) -> dict:
  """Name -> FileTensor of every safetensors file that the folder says it has.

  Raises:
    HubError: there are none, or they contradict the index.
  """
  folder = pathlib.Path(folder)
  if (folder / INDEX).is_file():
    index = read_json(inside(folder, INDEX))
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
      raise HubError(f"{folder / INDEX} has no weight_map of file names by tensor")
    files = {name: read_safetensors(inside(folder, name)) for name in sorted(set(places.values()))}
    tensors = {}
    for file, found in files.items():
      if twice := tensors.keys() & found.keys():
        raise HubError(f"{folder}: {sorted(twice)[0]} is in {file} and in another file")
      tensors |= found
    wrong = [name for name, file in places.items() if name not in files[file]]
    if wrong or len(places) != len(tensors):
      name = (wrong or sorted(tensors.keys() - places.keys()))[0]
      raise HubError(f"{folder}: {name} is not where {INDEX} says")
    return tensors
  if not (folder / SINGLE).is_file():
    pickles = [p.name for p in folder.iterdir() if p.suffix in PICKLES]
    more = (f"; {pickles[0]} may run code when it is read, so it is not: convert it to safetensors where you "
            "trust it" if pickles else "")
    raise HubError(f"{folder} has neither {SINGLE} nor {INDEX}{more}")
  return read_safetensors(inside(folder, SINGLE))


def find_ignored(folder, config: dict) -> list[str]:
  """A line for each thing in the folder that is not used, though another program would run it."""
  folder, lines = pathlib.Path(folder), []
  if "auto_map" in config:
    lines.append("config.json names code of its own (auto_map): ignored, the families here are read as data")
  code = sorted(p.name for p in folder.iterdir() if p.suffix == ".py")
  pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
  if code:
    lines.append(f"Python files are ignored: {', '.join(code[:5])}")
  if pickles:
    lines.append(f"pickles are ignored, only safetensors are read: {', '.join(pickles[:5])}")
  return lines

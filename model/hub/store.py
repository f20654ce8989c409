"""Arrays of a checkpoint's state/, written and read a slice at a time: a model passes through that does not
fit in memory. What is written is what Orbax writes: zarr 3 in OCDBT, with its description of the tree."""
import json
import math
import pathlib

import jax
import numpy as np
import tensorstore as ts

CHUNK = 16 << 20  # Bytes of one stored chunk, and about what one write or read holds.
PENDING = 64 << 20  # Bytes that wait for a commit.
CACHE = 128 << 20  # Bytes of chunks kept while reading: slices of one chunk come one after the other.
DICT_KEY = 2  # Orbax's number for a dict's key.


class StateWriter:
  """Usage:
    with StateWriter(step_dir / "state", {"params/embed": (jax.ShapeDtypeStruct, chunk shape)}) as state:
      state.write("params/embed", (slice(0, 5), slice(None)), rows)
  """

  def __init__(self, path, leaves: dict):
    self._path, self._leaves = pathlib.Path(path).absolute(), leaves
    self._context = ts.Context()
    self._arrays, self._transaction, self._pending = {}, None, 0

  def __enter__(self):
    self._path.mkdir(parents=True)
    for name, (leaf, chunk) in self._leaves.items():
      self._arrays[name] = self._create(name, leaf, chunk)
    return self

  def __exit__(self, kind, *_):
    self._arrays.clear()
    if kind is not None:
      self._transaction = None
      return
    self._commit()
    for name, text in self._describe().items():
      file = self._path / name
      file.parent.mkdir(exist_ok=True)
      file.write_text(json.dumps(text))

  def write(self, name: str, where: tuple, values: np.ndarray) -> None:
    """Writes values into a slice of a leaf; cheap where it is whole chunks."""
    self._transaction = self._transaction or ts.Transaction()
    array = self._arrays[name].with_transaction(self._transaction)
    array[where].write(np.ascontiguousarray(values)).result()
    self._pending += values.nbytes
    if self._pending >= PENDING:
      self._commit()

  def _commit(self):
    if self._transaction is not None:
      self._transaction.commit_async().result()
    self._transaction, self._pending = None, 0

  def _create(self, name, leaf, chunk):
    # Read in half the time of Orbax's zstd, and about as short.
    lz4 = {"cname": "lz4", "clevel": 1, "shuffle": "shuffle", "typesize": np.dtype(leaf.dtype).itemsize,
           "blocksize": 0}
    inner = {"chunk_shape": list(chunk),
             "codecs": [{"name": "bytes", "configuration": {"endian": "little"}},
                        {"name": "blosc", "configuration": lz4}]}
    return ts.open({
      "driver": "zarr3",
      "kvstore": {"driver": "ocdbt", "base": f"file://{self._path}", "path": name.replace("/", ".") + "/"},
      "metadata": {"shape": list(leaf.shape), "data_type": np.dtype(leaf.dtype).name,
                   "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
                   "codecs": [{"name": "sharding_indexed", "configuration": inner}]},
      "store_data_equal_to_fill_value": True, "create": True, "delete_existing": True,
    }, context=self._context).result()

  def _describe(self):
    """The files that tell Orbax what the tree is."""
    tree, arrays = {}, []
    for name, (leaf, chunk) in self._leaves.items():
      keys, shape = name.split("/"), list(leaf.shape)
      tree[str(tuple(keys))] = {
        "key_metadata": [{"key": key, "key_type": DICT_KEY} for key in keys],
        "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": shape}}
      arrays.append({"array_metadata": {"param_name": ".".join(keys), "write_shape": shape,
                                        "chunk_shape": list(chunk), "ext_metadata": None}})
    return {"_METADATA": {"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": True,
                          "store_array_data_equal_to_fill_value": True, "custom_metadata": None},
            "array_metadatas/process_0": {"array_metadatas": arrays}}


class StateReader:
  """Slices of the arrays of one step."""

  def __init__(self, path, cache: int = CACHE):
    """cache: bytes of chunks that are kept, for the slices that come after."""
    self._path = pathlib.Path(path).absolute()
    self._context = ts.Context({"cache_pool": {"total_bytes_limit": cache}})
    self._arrays = {}

  def shape(self, name: str) -> tuple[int, ...]:
    return self._open(name).shape

  def read(self, name: str, where: tuple) -> np.ndarray:
    """reader.read("params/embed", (slice(0, 5),))"""
    return self._open(name)[where].read().result()

  def read_into(self, name: str, where: tuple, target: np.ndarray) -> ts.Future:
    """Begins to read a slice into an array, whatever its strides; cast to its dtype. Done when the future's
    result() returns."""
    source = ts.cast(self._open(name)[where], target.dtype)
    return ts.array(target, context=self._context, copy=False).write(source)

  def _open(self, name):
    if name not in self._arrays:
      self._arrays[name] = ts.open({
        "driver": "zarr3", "recheck_cached_data": "open",
        "kvstore": {"driver": "ocdbt", "base": f"file://{self._path}", "path": name.replace("/", ".") + "/"},
      }, context=self._context, open=True).result()
    return self._arrays[name]


def name_params(params) -> dict:
  """"params/blocks/0/attention/wq" -> leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {"/".join(["params", *(str(k.key) for k in path)]): leaf for path, leaf in leaves}


def chunk_shape(leaf, n_lead: int, axis: int) -> tuple[int, ...]:
  """One index of each of the n_lead dims in front, as much of `axis` as CHUNK holds, all of the others."""
  shape = [1] * n_lead + list(leaf.shape[n_lead:])
  axis += n_lead
  rest = math.prod(shape) // shape[axis] * np.dtype(leaf.dtype).itemsize
  shape[axis] = max(1, min(shape[axis], CHUNK // rest))
  return tuple(shape)

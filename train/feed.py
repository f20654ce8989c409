"""Rows of the host -> arrays of the mesh. Each process makes only the rows that its devices hold."""
import time

import jax
import jax.numpy as jnp
import numpy as np


class Feed:
  """Attributes:
    slots: which rows of the global batch this process makes.
    abstract: the types of a batch, for compiling.
    wait_s: how long the last `next` of `batches` waited for its rows.
  """

  def __init__(self, cfg, mesh):
    rules, B = cfg.model.rules, cfg.batch_size
    self._by_row, self._by_token = (
        jax.NamedSharding(mesh, rules(*axes)) for axes in (("batch",), ("batch", None)))
    self.n_rows, self.wait_s = B, 0.0
    held = self._by_row.addressable_devices_indices_map((B,)).values()
    self.slots = sorted({slot for rows, in held for slot in range(*rows.indices(B))})
    number = lambda dtype: jax.ShapeDtypeStruct((B, cfg.seq_len), dtype, sharding=self._by_token)
    self.abstract = {name: number(jnp.float32 if name == "weights" else jnp.int32)
                     for name in ("tokens", "targets", "weights", "positions", "segments")}
    self.abstract_bytes = jax.ShapeDtypeStruct((B,), jnp.int32, sharding=self._by_row)

  def put(self, batch):
    """NumPy arrays of this process's slots -> global arrays."""
    def one(a):
      pick = lambda index: a[np.searchsorted(self.slots, np.arange(*index[0].indices(self.n_rows)))]
      sharding = self._by_token if a.ndim == 2 else self._by_row
      return jax.make_array_from_callback((self.n_rows, *a.shape[1:]), sharding, pick)

    return {name: one(a) for name, a in batch.items()}

  def batches(self, batches, clock):
    """Each batch on the devices, with the wait for it measured."""
    while True:
      start = time.perf_counter()
      with clock.within("waiting for data"):
        batch = next(batches)
      self.wait_s = time.perf_counter() - start
      yield self.put(batch)

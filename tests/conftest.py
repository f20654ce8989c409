"""Every test runs in one process on 8 fake CPU devices, set here before anything asks for a device."""
import os
import pathlib

import jax

CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"

if "JAX_PLATFORMS" not in os.environ:
  jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# More fake devices than cores: programs in flight side by side can starve each other's collectives for ever.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

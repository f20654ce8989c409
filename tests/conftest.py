"""Every test runs in one process on 8 fake CPU devices, set here before anything asks for a device."""
import os
import pathlib

import jax

CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"

CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)  # One that others can write is refused by a run.
# Most of the time of the tests is LLVM at work on programs that run once or twice. Level 1 is the least that
# leaves two programs with the same bits (0 does not); the older emitters make a third less work for it, while
# there are some. Processes that a test starts inherit both.
FLAGS = {"--xla_backend_optimization_level": "1"} | (
  {"--xla_cpu_use_fusion_emitters": "false"} if jax.__version_info__ < (0, 12) else {})
for flag, value in FLAGS.items():
  if flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
if "JAX_PLATFORMS" not in os.environ:
  jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# More fake devices than cores: programs in flight side by side can starve each other's collectives for ever.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

"""The machine that every test sees: eight CPU devices, and compiled programs kept from one run to the next."""

import os
import pathlib

from absl import flags

# Before jax is imported. JAX_PLATFORMS=cuda in the environment runs the same tests on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far longer than they run: without LLVM's optimizations a gradient takes 2.9 s instead of 6.4 s.
# Eight devices that meet on two busy cores may be minutes apart, and XLA ends the process after 40 s of waiting.
_FLAGS = (
    " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + _FLAGS
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# grain reads absl flags, which nothing parses here.
flags.FLAGS.mark_as_parsed()

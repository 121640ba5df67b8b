"""Eight simulated CPU devices, checked annotations, pytree-mode NNX for every test."""

import atexit
import gc
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all test time is compilation; code that runs once needn't be optimised. A
# training step compiles in 2.5 s with these and in 14 s without, half of which goes to
# the newer emitters alone.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1",
)
# Writing down where in the code an operation comes from takes time; nobody reads it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Traced programs are millions of objects that live on; looking through all of them for
# garbage as often as Python does took a twentieth of the time.
gc.set_threshold(20_000, 20, 100)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # A program is compiled once for all workers and the processes that tests start:
    # they inherit the variable.
    programs = tempfile.mkdtemp(prefix="uoe-jax-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from jaxtyping import install_import_hook

# Shapes and dtypes of every annotated function are checked while tests run.
install_import_hook("uoe_jax", "beartype.beartype")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from flax import nnx

nnx.set_graph_mode(False)
nnx.set_graph_updates(False)

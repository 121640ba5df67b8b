"""Eight simulated CPU devices, checked annotations, pytree-mode NNX for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all test time is compilation; code that runs once needn't be optimised.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

from jaxtyping import install_import_hook

# Shapes and dtypes of every annotated function are checked while tests run.
install_import_hook("uoe_jax", "beartype.beartype")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from flax import nnx

nnx.set_graph_mode(False)
nnx.set_graph_updates(False)

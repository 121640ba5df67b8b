"""The state of a run: one pytree of arrays, and the static half of its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from uoe_jax.config import ExperimentConfig, ModelConfig
from uoe_jax.model import make_model
from uoe_jax.partition.mesh import replicated

# Initialisation runs once: on a CPU compiling it well takes longer than running it.
_COMPILE_FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a step changes, as arrays (or what jax traces in their place)."""

    step: Any  # int32, steps taken, skipped ones included
    params: PyTree
    opt_state: PyTree
    buffers: PyTree  # the routers' balance biases
    bad_steps: Any  # int32, non-finite steps in a row


def split_model(config: ModelConfig, seed: int) -> tuple[nnx.GraphDef, Any]:
    """Return a model's static half and a function that makes (params, buffers)."""

    def make() -> Any:
        return nnx.split(make_model(config, jax.random.key(seed)), nnx.Param, ...)

    return jax.eval_shape(make)[0], lambda: make()[1:]


def init_state(
    config: ExperimentConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """Return the model's static half and the first state, on every device."""
    graphdef, make = split_model(config.model, config.train.seed)

    def init() -> TrainState:
        params, buffers = make()
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            buffers=buffers,
            bad_steps=jnp.zeros((), jnp.int32),
        )

    run = jax.jit(init, out_shardings=replicated(mesh), compiler_options=_COMPILE_FAST)
    return graphdef, run()

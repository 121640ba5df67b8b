"""What a run trains: a whole model, or weights that stand beside a frozen one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from uoe_jax.config import ExperimentConfig
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.model import update_router_bias
from uoe_jax.partition.layout import Layout
from uoe_jax.runs.state import TrainState, init_state, layout_of
from uoe_jax.train.loss import Taught
from uoe_jax.tree import named_leaves, replace_leaves
from uoe_jax.weights import find_weight

MakeKey = Callable[[], jax.Array]


def call_model(
    fn: Callable[..., Any],
    state: tuple[PyTree, PyTree],
    frozen: PyTree,
    *args: Any,
    make_key: MakeKey | None = None,
) -> Any:
    """Return `fn(params, buffers, *args)` where all parameters are trained."""
    del frozen, make_key
    params, buffers = state
    return fn(params, buffers, *args)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """How a model's loss depends on what is trained.

    `call(fn, (weights, buffers), frozen, *args, make_key=...)` returns `fn(params,
    buffers, *args)` of the model that trained weights, the state's buffers and frozen
    arrays make together, each device with its shards. `make_key()` is the dropout key
    of a microbatch; outside of training `make_key` is None.
    """

    call: Callable[..., Any] = call_model
    # (buffers, router statistics, model config) -> buffers after a step
    update_buffers: Callable[..., PyTree] = update_router_bias
    frozen_specs: PyTree = None  # PartitionSpecs of the frozen arrays
    # (frozen, batch) -> what a teacher among them says of the tokens whose loss a
    # device takes; None: nobody teaches
    teach: Callable[[PyTree, Mapping[str, Any]], Taught] | None = None


WHOLE_MODEL = Objective()


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the training loop needs to know of what it trains."""

    graphdef: nnx.GraphDef  # the model's static half
    state: TrainState  # before the first step, laid out
    layout: Layout  # of the state
    optimizer: optax.GradientTransformationExtraArgs
    flops_per_token: float  # of a training step
    objective: Objective = WHOLE_MODEL
    frozen: PyTree = None  # what steps read only, laid out
    validate_start: bool = False  # whether there is something to compare with
    about: Mapping[str, Any] = field(default_factory=dict)  # for env.json
    note: str | None = None  # what a run that begins is told of its start


MakeSubject = Callable[
    [ExperimentConfig, optax.GradientTransformationExtraArgs, Mesh], Subject
]


def freeze_params(params: PyTree, config: ExperimentConfig) -> PyTree:
    """Return parameters that aren't trained: large weights in the compute dtype.

    Half the memory in bfloat16, and the same forward pass: the model casts those
    weights on every use.
    """
    dtype = jnp.dtype(config.model.compute_dtype)
    cast = {
        name: leaf.astype(dtype)
        for name, leaf in named_leaves(params).items()
        if (weight := find_weight(name)) and weight.cast
    }
    return replace_leaves(params, cast)


def whole_model(
    config: ExperimentConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
) -> Subject:
    """Return a freshly initialised model, all of whose parameters are trained."""
    graphdef, state = init_state(config, optimizer, mesh)
    return Subject(
        graphdef=graphdef,
        state=state,
        layout=layout_of(config, mesh),
        optimizer=optimizer,
        flops_per_token=flops_per_token(config.model, config.seq_len).training,
    )

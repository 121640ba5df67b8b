"""A whole run as one program: the project's training step in a scan over its batches.

For runs of one shape that differ only in their start, rate and seed: mapped over these,
a stack of runs is compiled once. `train`'s loop can't be mapped: it reads every step's
metrics and writes files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from uoe_jax.runs.state import TrainState

Step = Callable[..., tuple[TrainState, Any]]  # as `make_step` returns it


def with_rate(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer of rate 1 whose updates are times `state["rate"]`."""

    def init(params: PyTree) -> PyTree:
        return {"rate": jnp.ones(()), "inner": inner.init(params)}

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        updates, new = inner.update(updates, state["inner"], params, **extra)
        rate = state["rate"]
        scaled = jax.tree.map(lambda u: u * rate, updates)
        return scaled, {"rate": rate, "inner": new}

    return optax.GradientTransformationExtraArgs(init, update)


def first_state(
    params: PyTree,
    buffers: PyTree,
    optimizer: optax.GradientTransformation,
    rate: Float[Array, ""],
) -> TrainState:
    """Return the state before the first step, for an optimizer of `with_rate`."""
    zero = jnp.zeros((), jnp.int32)
    opt_state: Any = optimizer.init(params)
    return TrainState(
        step=zero,
        params=params,
        opt_state=opt_state | {"rate": rate},
        buffers=buffers,
        bad_steps=zero,
    )


def train_at_once(
    step: Step,
    state: TrainState,
    batch: Callable[[Int[Array, ""]], Mapping[str, Array]],
    steps: int,
    frozen: PyTree = None,
) -> PyTree:
    """Return what was trained after `steps` steps; `batch(number)` is a step's batch.

    Its arrays are [B, ...]. Steps that weren't finite changed nothing.
    """

    def body(state: TrainState, number: Int[Array, ""]) -> tuple[TrainState, None]:
        parts = {name: array[None] for name, array in batch(number).items()}
        state, _ = step(state, parts, frozen)
        return state, None

    return jax.lax.scan(body, state, jnp.arange(steps))[0].params

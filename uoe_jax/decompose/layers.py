"""A model's parameters by name, and its stacks of blocks by layer.

Names are dotted paths, as checkpoints have them: `trunk.blocks.0.mlp.w_up`. A layer's
arrays have the rest of the path as names and no layer axis: `mlp.w_up`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uoe_jax.config import ModelConfig
from uoe_jax.model import split_model
from uoe_jax.tree import fill_leaves, named_leaves
from uoe_jax.weights import BLOCKS, layer_period

Arrays = dict[str, np.ndarray]


def flat_params(model: nnx.Module) -> Arrays:
    """Return host copies of a model's parameters by name."""
    params = named_leaves(nnx.split(model, nnx.Param, ...)[1])
    return {name: np.asarray(leaf) for name, leaf in params.items()}


def flat_buffers(model: nnx.Module) -> Arrays:
    """Return host copies of a model's router biases by name."""
    rest = named_leaves(nnx.split(model, nnx.Param, ...)[2])
    return {name: np.asarray(leaf) for name, leaf in rest.items()}


def with_params(
    config: ModelConfig,
    params: Mapping[str, Any],
    buffers: Mapping[str, Any] | None = None,
) -> Any:
    """Return a config's model with the given parameters, and zero or given buffers.

    Buffers are the routers' balance biases, by name.
    """
    graphdef, make = split_model(config)
    shapes, biases = jax.eval_shape(make)
    cast = lambda tree, arrays: {
        name: jnp.asarray(arrays[name], leaf.dtype)
        for name, leaf in named_leaves(tree).items()
    }
    zeros = {n: np.zeros(a.shape) for n, a in named_leaves(biases).items()}
    filled = (
        fill_leaves(shapes, cast(shapes, params)),
        fill_leaves(biases, cast(biases, zeros | dict(buffers or {}))),
    )
    return nnx.merge(graphdef, *filled)


def to_layers(
    params: Mapping[str, Any], config: ModelConfig
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the parameters outside the blocks, and those of each layer in order."""
    period = layer_period(config)
    rest: dict[str, Any] = {}
    layers: list[dict[str, Any]] = [{} for _ in range(config.num_layers)]
    for name, stacked in params.items():
        if not name.startswith(BLOCKS):
            rest[name] = stacked
            continue
        stack, _, inner = name.removeprefix(BLOCKS).partition(".")
        for index in range(stacked.shape[0]):
            layers[index * period + int(stack)][inner] = stacked[index]
    return rest, layers


def from_layers(
    rest: Mapping[str, Any], layers: list[dict[str, Any]], config: ModelConfig
) -> dict[str, Any]:
    """Return what `to_layers` took apart, in the stacks of `config`'s period."""
    params, period = dict(rest), layer_period(config)
    for stack in range(period):
        members = layers[stack::period]
        for inner in members[0]:
            arrays = [member[inner] for member in members]
            params[f"{BLOCKS}{stack}.{inner}"] = np.stack(arrays)
    return params

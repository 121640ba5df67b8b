"""A model's parameters by name, and its stacks of blocks by layer.

Names are dotted paths, as checkpoints have them: `trunk.blocks.0.mlp.w_up`. A layer's
arrays have the rest of the path as names and no layer axis: `mlp.w_up`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from uoe_jax.config import ModelConfig
from uoe_jax.model import make_model
from uoe_jax.model.balance import layer_period
from uoe_jax.optim import leaf_name

Arrays = dict[str, np.ndarray]
BLOCKS = "trunk.blocks."


def flat_params(model: nnx.Module) -> Arrays:
    """Return host copies of a model's parameters by name."""
    params = nnx.split(model, nnx.Param, ...)[1]
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {leaf_name(path): np.asarray(leaf) for path, leaf in leaves}


def flat_buffers(model: nnx.Module) -> Arrays:
    """Return host copies of a model's router biases by name."""
    rest = nnx.split(model, nnx.Param, ...)[2]
    leaves = jax.tree_util.tree_flatten_with_path(rest)[0]
    return {leaf_name(path): np.asarray(leaf) for path, leaf in leaves}


def param_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every parameter by name; nothing is allocated."""
    params = jax.eval_shape(lambda: _split(config, jax.random.key(0)))[1]
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {leaf_name(path): leaf for path, leaf in leaves}


def with_params(
    config: ModelConfig,
    params: Mapping[str, Any],
    buffers: Mapping[str, Any] | None = None,
) -> Any:
    """Return a config's model with the given parameters, and zero or given buffers.

    Buffers are the routers' balance biases, by name.
    """
    given = {"params": params, "buffers": buffers or {}}
    graphdef, *trees = jax.eval_shape(lambda: _split(config, jax.random.key(0)))

    def fill(arrays: Mapping[str, Any], path: Any, leaf: Any, needed: bool) -> Any:
        name = leaf_name(path)
        if name in arrays or needed:
            return jax.numpy.asarray(arrays[name], leaf.dtype)
        return jax.numpy.zeros(leaf.shape, leaf.dtype)

    filled = [
        jax.tree_util.tree_map_with_path(
            lambda path, leaf, part=part: fill(
                given[part], path, leaf, part == "params"
            ),
            tree,
        )
        for part, tree in zip(given, trees, strict=True)
    ]
    return nnx.merge(graphdef, *filled)


def _split(config: ModelConfig, key: jax.Array) -> Any:
    return nnx.split(make_model(config, key), nnx.Param, ...)


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

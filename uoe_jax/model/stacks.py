"""A model's parameters by name taken apart into layers, and put together again.

Names are dotted paths, as checkpoints have them: `trunk.blocks.0.mlp.w_up`. A layer's
arrays have the rest of the path as names and no layer axis: `mlp.w_up`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from uoe_jax.config import ModelConfig
from uoe_jax.weights import BLOCKS, layer_period


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
        for inner in members[0] if members else ():
            arrays = [member[inner] for member in members]
            params[f"{BLOCKS}{stack}.{inner}"] = np.stack(arrays)
    return params

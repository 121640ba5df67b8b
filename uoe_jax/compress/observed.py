"""A model taken apart into its layers, with what a text shows of each; the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from uoe_jax.compress.statistics import LayerStatistics
from uoe_jax.config import ModelConfig
from uoe_jax.hardware.count import count_params
from uoe_jax.model.stacks import to_layers
from uoe_jax.tree import Arrays


class Smaller(NamedTuple):
    """A model of a cut: its config, parameters and buffers by name."""

    config: ModelConfig
    params: Arrays
    buffers: Arrays


class Observed(NamedTuple):
    """A model's parameters and buffers by layer, and the layers' statistics."""

    model: ModelConfig
    rest: Arrays  # outside of the layers
    layers: list[Arrays]
    buffers: list[Arrays]
    seen: tuple[LayerStatistics, ...]

    @property
    def influences(self) -> Float[np.ndarray, " L"]:
        """Block Influence of each layer."""
        return np.array([layer.influence for layer in self.seen])


def take_apart(
    model: ModelConfig,
    params: Mapping[str, np.ndarray],
    buffers: Mapping[str, np.ndarray],
    seen: tuple[LayerStatistics, ...],
) -> Observed:
    """Return a model by layer."""
    rest, layers = to_layers(params, model)
    return Observed(model, rest, layers, to_layers(buffers, model)[1], seen)


def block_params(model: ModelConfig) -> int:
    """Return the parameters of the blocks' attention and MLPs."""
    parts = count_params(model)
    return sum(parts.get(name, 0) for name in ("attention", "mlp"))

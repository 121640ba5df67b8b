"""Whole layers left out: those that change what goes through them least.

After ShortGPT (Men et al. 2024), by Block Influence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from uoe_jax.compress.observed import Observed, Smaller
from uoe_jax.compress.options import Compress
from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.model.stacks import from_layers


def prepare_depth(observed: Observed) -> Callable[[Compress], Smaller]:
    """Return what leaves out a share of the layers, to the nearest whole layer."""

    def cut(options: Compress) -> Smaller:
        kept = kept_layers(observed.influences, options.cut or 0.0)
        config = with_layers(observed.model, kept)
        pick = lambda layers: [layers[n] for n in kept]
        params = from_layers(observed.rest, pick(observed.layers), config)
        return Smaller(config, params, from_layers({}, pick(observed.buffers), config))

    return cut


def kept_layers(
    influences: Float[np.ndarray, " L"], cut: float
) -> Int[np.ndarray, " K"]:
    """Return the layers that stay, in order.

    Raises ConfigError for a cut that drops none or all.
    """
    count = dropped(len(influences), cut)
    order = np.argsort(influences, kind="stable")
    return np.sort(order[count:])


def dropped(layers: int, cut: float) -> int:
    """Return how many layers a cut drops, the nearest number.

    Raises ConfigError for a cut that drops none or all.
    """
    count = round(cut * layers)
    if not 0 < count < layers:
        raise ConfigError(
            f"cut is {cut:g}, which of {layers} layers is {count or 'none'}; method "
            f"depth drops whole layers, cut a multiple of {1 / layers:.2g}"
        )
    return count


def with_layers(model: ModelConfig, kept: Sequence[int] | np.ndarray) -> ModelConfig:
    """Return the config of a model with some of its layers."""
    pick = lambda kinds: _shortest([kinds[n] for n in kept])
    attention, mlp = zip(*model.layer_kinds, strict=True)
    return dataclasses.replace(
        model,
        num_layers=len(kept),
        attention=pick(attention),
        mlp=pick(mlp),
        blocks=pick(model.block_kinds),
        window=pick(model.windows),
    )


def _shortest(kinds: list[Any]) -> tuple[Any, ...]:
    """Return the shortest pattern that gives these when it is cycled."""
    for period in range(1, len(kinds)):
        if all(kinds[i] == kinds[i % period] for i in range(len(kinds))):
            return tuple(kinds[:period])
    return tuple(kinds)

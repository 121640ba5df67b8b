"""The methods that sort a layer's channels, by name: a new one is a line and a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from uoe_jax.compress.channels import Layer, SortedLayer
from uoe_jax.compress.modegpt import modegpt, sort
from uoe_jax.compress.pruning import drop, flap, magnitude
from uoe_jax.compress.statistics import LayerStatistics

# (a layer's parameters, what was seen of it, whether pairs turn) -> sorted channels
Sorter = Callable[[Layer, LayerStatistics, bool], SortedLayer]
SORTERS: Mapping[str, Sorter] = {
    "modegpt": modegpt,
    "sort": sort,
    "drop": drop,
    "flap": flap,
    "magnitude": magnitude,
}


def sort_layers(
    method: str,
    layers: Sequence[Layer],
    seen: Sequence[LayerStatistics],
    rotates: bool,
) -> list[SortedLayer]:
    """Return every layer's channels as a method sorts them."""
    sorter = SORTERS[method]
    return [sorter(a, b, rotates) for a, b in zip(layers, seen, strict=True)]

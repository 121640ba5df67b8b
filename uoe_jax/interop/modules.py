"""Where the modules of another library's model lie in ours: adapters' names."""

from __future__ import annotations

from typing import NamedTuple

from uoe_jax.config import ModelConfig
from uoe_jax.interop.families import FAMILIES
from uoe_jax.interop.names import by_tensor, find_sources
from uoe_jax.weights import EXPERT

_SUFFIX = ".weight"


class Place(NamedTuple):
    """Where a module's delta goes: a parameter, and the index of its batch axes."""

    name: str
    index: tuple[int, ...] = ()


def module_places(model: ModelConfig, architecture: str) -> dict[str, Place]:
    """Return the place of every module that is one matrix of ours, by its name.

    Left out are those that hold several of ours, such as GPT-2's `c_attn`, and those
    whose columns a union's experts share. Raises ConfigError for a model that isn't of
    the architecture.
    """
    found = {}
    groups = by_tensor(find_sources(model, FAMILIES[architecture]))
    for tensor, sources in groups.items():
        source = sources[0]
        axes = {axis for group in source.view.theirs for axis in group}
        shared = EXPERT in axes and source.sizes[EXPERT] > 1
        matrix = len(source.shape) == 2 and tensor.endswith(_SUFFIX)
        if matrix and len(sources) == 1 and not shared:
            found[tensor.removesuffix(_SUFFIX)] = Place(source.name, source.index)
    return found

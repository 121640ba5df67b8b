"""Which tensor of another library holds which weight of ours.

A family's table has one line a weight; `find_sources` spells it out for all layers and
experts of a model. A union's experts lie side by side in the dense tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.interop.views import View, parse_pattern
from uoe_jax.weights import BLOCKS, EXPERT, Param, layer_period, model_params

# Our weight's name -> (their tensor's name, its pattern).
Table = Mapping[str, tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one architecture: their config.json and the names of their tensors.

    `read` gives our config of theirs, raising DataError for what isn't supported; the
    names of the tensors say which optional parts are there. `write` gives the fields of
    their config that `read` needs.
    """

    architecture: str
    model_type: str
    prefix: str  # of most names; files without it are read too
    read: Callable[[Mapping[str, Any], frozenset[str]], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    outer: Table
    blocks: Table  # {layer} and {expert} are numbers
    # Tensors that hold no weights of ours, by regular expression: masks, caches.
    ignored: tuple[str, ...] = ()
    # Tensors that must be equal to another one, where they are there.
    same: Mapping[str, str] = field(default_factory=dict)


class Source(NamedTuple):
    """A tensor that holds one layer (and expert) of a weight of ours."""

    tensor: str
    view: View
    name: str  # of our parameter
    index: tuple[int, ...]  # along its layers and experts
    sizes: dict[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.view.shape(self.sizes)


def find_sources(model: ModelConfig, family: Family) -> list[Source]:
    """Return the tensors of all weights of a model but its unions' routers.

    Raises ConfigError for weights that the family has no tensors for.
    """
    sources: list[Source] = []
    strangers = []
    for name, param in model_params(model).items():
        outer = not name.startswith(BLOCKS)
        inner = name.removeprefix(BLOCKS).partition(".")[2]
        entry = family.outer.get(name) if outer else family.blocks.get(inner)
        if entry is not None:
            sources += _spell_out(name, param, entry, model)
        elif ".router." not in name:
            strangers.append(name)
    if strangers:
        raise ConfigError(
            f"{len(strangers)} weights have no place in a {family.architecture}: "
            f"{', '.join(strangers[:6])}{', ...' if len(strangers) > 6 else ''}"
        )
    return sources


def _spell_out(
    name: str, param: Param, entry: tuple[str, str], model: ModelConfig
) -> Iterator[Source]:
    """Yield the tensors of one weight, layer by layer and expert by expert."""
    template, pattern = entry
    stacked = name.startswith(BLOCKS)
    axes, shape = param.weight.axes, param.shape
    layers: Sequence[int | None] = [None]
    if stacked:
        layers, axes, shape = range(shape[0]), axes[1:], shape[1:]
    experts: Sequence[int | None] = [None]
    if "{expert}" in template:
        experts, axes, shape = range(shape[0]), axes[1:], shape[1:]
    elif EXPERT in axes:
        pattern = _with_experts(pattern, param.weight.cut)
    theirs, _, ours = pattern.partition(" > ")
    view = View(parse_pattern(theirs), parse_pattern(ours or " ".join(axes)))
    side = {"y": model.image_patch, "x": model.image_patch, "c": model.image_channels}
    sizes = view.sizes(tuple(shape), side)
    period = layer_period(model)
    first = int(name.removeprefix(BLOCKS).partition(".")[0]) if stacked else 0
    for layer in layers:
        for expert in experts:
            number = first + (layer or 0) * period
            tensor = template.format(layer=number, expert=expert)
            index = tuple(i for i in (layer, expert) if i is not None)
            yield Source(tensor, view, name, index, sizes)


def _with_experts(pattern: str, cut: str) -> str:
    """Return the pattern of a dense tensor whose axis `cut` experts share."""
    groups = [
        tuple(b for a in group for b in ((EXPERT, a) if a == cut else (a,)))
        for group in parse_pattern(pattern)
    ]
    return " ".join(f"({' '.join(g)})" if len(g) > 1 else g[0] for g in groups)


def by_tensor(sources: list[Source]) -> dict[str, list[Source]]:
    """Return the sources of each tensor, by its name."""
    found: dict[str, list[Source]] = {}
    for source in sources:
        found.setdefault(source.tensor, []).append(source)
    return found


def spellings(name: str, family: Family) -> Iterator[str]:
    """Yield the names under which a tensor may lie in a file, usual ones first."""
    for spelled in (name, name.removeprefix(family.prefix)):
        yield spelled
        old = spelled.replace("LayerNorm.weight", "LayerNorm.gamma")
        yield old.replace("LayerNorm.bias", "LayerNorm.beta")

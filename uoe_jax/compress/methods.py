"""The methods by name; each looks at a model once and then cuts it at any share.

A new one that sorts channels is a line and a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from uoe_jax.compress.channels import Layer, SortedLayer
from uoe_jax.compress.depth import dropped, prepare_depth
from uoe_jax.compress.modegpt import modegpt, sort
from uoe_jax.compress.observed import Observed, Smaller
from uoe_jax.compress.options import LOW_RANK, Compress
from uoe_jax.compress.pruning import drop, flap, magnitude
from uoe_jax.compress.ranks import check_dense, one_rank, prepare_ranks
from uoe_jax.compress.slicing import check_turns, kept_width, prepare_slice
from uoe_jax.compress.statistics import LayerStatistics
from uoe_jax.compress.widths import (
    Curves,
    choose_widths,
    error_curves,
    layer_parts,
    with_widths,
)
from uoe_jax.config import ModelConfig
from uoe_jax.tree import Arrays

# (a layer's parameters, what was seen of it, whether pairs turn) -> sorted channels
Sorter = Callable[[Layer, LayerStatistics, bool], SortedLayer]
SORTERS: Mapping[str, Sorter] = {
    "modegpt": modegpt,
    "sort": sort,
    "drop": drop,
    "flap": flap,
    "magnitude": magnitude,
}


class SortedModel(NamedTuple):
    """A model whose layers' channels are in order, and what each cut costs of them."""

    model: ModelConfig
    rest: Arrays
    layers: list[Arrays]
    buffers: list[Arrays]
    found: Sequence[SortedLayer]
    curves: Sequence[Curves]
    influences: Float[np.ndarray, " L"]

    def cut(self, options: Compress) -> Smaller:
        """Return the model of a cut."""
        made = lambda own: layer_parts(self.model, self.curves, own)
        finer = lambda: made(dataclasses.replace(options, multiple=1))
        parts, cut = made(options), options.cut or 0.0
        widths = choose_widths(parts, self.influences, cut, options, finer)
        given = (self.rest, self.layers)
        return with_widths(self.model, given, self.found, parts, widths, self.buffers)


def sort_model(observed: Observed, method: str) -> SortedModel:
    """Return a model as a method sorts its channels."""
    sorter, rotates = SORTERS[method], observed.model.rotates
    pairs = list(zip(observed.layers, observed.seen, strict=True))
    found = [sorter(layer, seen, rotates) for layer, seen in pairs]
    seen = observed.seen
    curves = [error_curves(a, b) for a, b in zip(found, seen, strict=True)]
    rest, layers, buffers = observed.rest, observed.layers, observed.buffers
    return SortedModel(
        observed.model, rest, layers, buffers, found, curves, observed.influences
    )


def check_method(model: ModelConfig, options: Compress) -> None:
    """Raise ConfigError for what needs no look at a text to be refused."""
    method, cut = options.chosen, options.cut or 0.0
    if method in LOW_RANK:
        check_dense(model, method)
        if options.spread != "curve":
            one_rank(model, options)
    if method == "depth":
        dropped(model.num_layers, cut)
    if method == "slice":
        check_turns(model)
        kept_width(model.d_model, cut, options.way().multiple)


def prepare(observed: Observed, method: str) -> Callable[[Compress], Smaller]:
    """Return what cuts a model by a method; all that doesn't depend on the cut is done.

    Raises ConfigError for a model that the method doesn't take; so does each cut that
    can't be.
    """
    if method in LOW_RANK:
        return prepare_ranks(observed, method)
    if method == "depth":
        return prepare_depth(observed)
    if method == "slice":
        return prepare_slice(observed)
    return sort_model(observed, method).cut

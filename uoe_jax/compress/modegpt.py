"""MoDeGPT (Lin et al. 2024) with nested orders, and these orders without its fits."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from uoe_jax.compress.channels import Layer, Neurons, SortedLayer
from uoe_jax.compress.order import (
    best_first,
    dropping_errors,
    leverage_scores,
    make_lift,
)
from uoe_jax.compress.sorting import (
    ExpertNeurons,
    expert_neurons,
    head_pairs,
    head_values,
    pair_errors,
)
from uoe_jax.compress.statistics import LayerStatistics
from uoe_jax.compress.value_output import value_basis


def modegpt(layer: Layer, seen: LayerStatistics, rotates: bool) -> SortedLayer:
    """Return a layer in MoDeGPT's orders, its down-projections fitted at every width.

    Neurons by ridge leverage score (Nystrom, algorithm 1), pairs by the product of
    their norms (CR, algorithm 2), values by SVD (algorithm 3). The values' moment is
    that of what attention makes of them, which is what is written; the paper takes that
    of the values before.
    """
    return _sorted(layer, seen, rotates, lifted=True)


def sort(layer: Layer, seen: LayerStatistics, rotates: bool) -> SortedLayer:
    """Return a layer in MoDeGPT's orders, its down-projections as they were.

    The form of UniQL (Chiang et al. 2025): every width in one pass, nothing fitted.
    """
    return _sorted(layer, seen, rotates, lifted=False)


def _sorted(
    layer: Layer, seen: LayerStatistics, rotates: bool, lifted: bool
) -> SortedLayer:
    neurons = []
    for expert in expert_neurons(layer, seen):
        order = best_first(leverage_scores(expert.moment))
        if lifted:
            lift = make_lift(expert.moment, expert.w_down, order)
            neurons.append(Neurons(order, lift.errors(), lift))
        else:
            neurons.append(dropped_neurons(expert, order))
    if not seen.heads.size:
        return SortedLayer(tuple(neurons))
    values, pairs = head_values(layer, seen), head_pairs(seen, rotates)
    bases = tuple(value_basis(head.mixed, head.outputs) for head in values)
    errors = pair_errors(pairs, values, rotates)
    return SortedLayer(tuple(neurons), pairs, errors, bases)


def dropped_neurons(expert: ExpertNeurons, order: Int[np.ndarray, " F"]) -> Neurons:
    """Return an expert's neurons in an order, with nothing made up for."""
    errors = dropping_errors(expert.moment, expert.w_down[order], order)
    return Neurons(order, errors)

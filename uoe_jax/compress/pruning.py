"""Channels dropped by a score of each, weights as they were: what fits are measured by.

By what a channel writes on the calibration text, by its weights alone, or by how much
it fluctuates (FLAP), with its mean kept in a bias.
"""

from __future__ import annotations

import numpy as np

from uoe_jax.compress.channels import Layer, SortedLayer
from uoe_jax.compress.modegpt import dropped_neurons
from uoe_jax.compress.order import activity_scores, best_first
from uoe_jax.compress.query_key import pair_scores
from uoe_jax.compress.sorting import (
    expert_neurons,
    head_pairs,
    head_values,
    pair_errors,
)
from uoe_jax.compress.statistics import LayerStatistics
from uoe_jax.compress.value_output import chosen_values


def drop(layer: Layer, seen: LayerStatistics, rotates: bool) -> SortedLayer:
    """Return a layer by what each channel writes: root mean square times its row."""
    neurons = tuple(
        dropped_neurons(e, best_first(activity_scores(e.moment, e.w_down)))
        for e in expert_neurons(layer, seen)
    )
    if not seen.heads.size:
        return SortedLayer(neurons)
    values, pairs = head_values(layer, seen), head_pairs(seen, rotates)
    bases = tuple(
        chosen_values(v.mixed, v.outputs, activity_scores(v.mixed, v.stacked))
        for v in values
    )
    return SortedLayer(neurons, pairs, pair_errors(pairs, values, rotates), bases)


def magnitude(layer: Layer, seen: LayerStatistics, rotates: bool) -> SortedLayer:
    """Return a layer by the norms of weights alone, no text looked at for the order."""
    length = lambda a, axis: np.linalg.norm(a, axis=axis)
    neurons = tuple(
        dropped_neurons(e, best_first(length(e.into, 0) * length(e.w_down, 1)))
        for e in expert_neurons(layer, seen)
    )
    if not seen.heads.size:
        return SortedLayer(neurons)
    values = head_values(layer, seen)
    bases = tuple(
        chosen_values(v.mixed, v.outputs, length(v.weight, 0) * length(v.stacked, 1))
        for v in values
    )
    # A weight's own squares in place of its queries' and keys'.
    squares = lambda name: np.square(layer[name][0].astype(np.float64)).sum(axis=0)
    pairs = pair_scores(squares("attention.wq"), squares("attention.wk"), rotates)
    errors = pair_errors(head_pairs(seen, rotates), values, rotates)
    return SortedLayer(neurons, pairs, errors, bases)


def flap(layer: Layer, seen: LayerStatistics, rotates: bool) -> SortedLayer:
    """Return a layer by how much each channel fluctuates, means kept in biases.

    FLAP (An et al. 2024): the variance of a channel times the squared length of its
    row; a dropped channel is replaced by its mean. Pairs are those of `drop`.
    """
    neurons = []
    for e in expert_neurons(layer, seen):
        centred = e.moment - e.tokens * np.outer(e.mean, e.mean)
        order = best_first(activity_scores(centred, e.w_down))
        found = dropped_neurons(e._replace(moment=centred), order)
        neurons.append(found._replace(mean=e.mean))
    if not seen.heads.size:
        return SortedLayer(tuple(neurons))
    values, pairs = head_values(layer, seen), head_pairs(seen, rotates)
    tokens = float(seen.tokens)
    bases = []
    for v in values:
        centred = v.mixed - tokens * v.mean.T @ v.mean
        scores = activity_scores(centred, v.stacked)
        bases.append(chosen_values(centred, v.outputs, scores, v.mean))
    errors = pair_errors(pairs, values, rotates)
    return SortedLayer(tuple(neurons), pairs, errors, tuple(bases))

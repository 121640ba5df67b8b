"""What methods that sort channels read of a layer, one expert or head at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from uoe_jax.compress.channels import Layer
from uoe_jax.compress.query_key import pair_scores
from uoe_jax.compress.statistics import LayerStatistics
from uoe_jax.compress.value_output import value_moment

ENOUGH = 10  # calibration tokens for each neuron of an expert


class ExpertNeurons(NamedTuple):
    """An expert's neurons: second moment and mean of activations; weights."""

    moment: Float[np.ndarray, "F F"]  # sum over its tokens
    mean: Float[np.ndarray, " F"]
    tokens: float
    into: Float[np.ndarray, "I F"]  # up and gate, one above the other
    w_down: Float[np.ndarray, "F D"]


class HeadValues(NamedTuple):
    """A value head: second moments of its values, and its output matrices.

    `mixed` is that of what attention makes of the values, summed over query heads,
    `mean` its average.
    """

    moment: Float[np.ndarray, "H H"]
    mixed: Float[np.ndarray, "H H"]
    mean: Float[np.ndarray, "G H"]
    weight: Float[np.ndarray, "D H"]
    outputs: Float[np.ndarray, "G H D"]

    @property
    def stacked(self) -> Float[np.ndarray, "H GD"]:
        """The output matrices side by side."""
        return self.outputs.transpose(1, 0, 2).reshape(len(self.moment), -1)


def expert_neurons(layer: Layer, seen: LayerStatistics) -> list[ExpertNeurons]:
    """Return the neurons of each expert of a layer."""
    names = [name for name in ("mlp.w_up", "mlp.w_gate") if name in layer]
    into = np.concatenate([layer[name] for name in names], axis=1).astype(np.float64)
    w_down = layer["mlp.w_down"].astype(np.float64)
    return [
        ExpertNeurons(*_seen_of(seen, e), into[e], w_down[e]) for e in range(len(into))
    ]


def few_tokens(seen: LayerStatistics) -> Bool[np.ndarray, " E"]:
    """Return which experts saw fewer tokens than good fits of their neurons take."""
    return seen.expert_tokens < ENOUGH * seen.neurons.shape[1]


def _seen_of(
    seen: LayerStatistics, expert: int
) -> tuple[Float[np.ndarray, "F F"], Float[np.ndarray, " F"], float]:
    """Return second moment, mean and tokens of an expert's neurons.

    Of an expert of a union that few tokens chose: as all tokens have them, with the
    energy that its own have.
    """
    tokens = max(float(seen.expert_tokens[expert]), 1.0)
    moment = seen.neurons[expert].astype(np.float64)
    mean = seen.neurons_mean[expert] / tokens
    if not (seen.all_neurons.size and few_tokens(seen)[expert]):
        return moment, mean, tokens
    every, total = seen.all_neurons[expert].astype(np.float64), float(seen.tokens)
    whole = max(float(np.trace(every)), 1e-300)
    share = max(float(np.trace(moment)) / whole, 1 / max(total, 1.0))
    mean = seen.all_neurons_mean[expert] / max(total, 1.0)
    return every * share, mean * (share * total / tokens) ** 0.5, tokens


def head_values(layer: Layer, seen: LayerStatistics) -> list[HeadValues]:
    """Return the values of each key/value head of dense attention."""
    weights = layer["attention.wv"][0].astype(np.float64)
    outputs = layer["attention.wo"][0].astype(np.float64)
    bias = layer.get("attention.bv")
    heads, groups, width, _ = outputs.shape
    tokens = float(seen.tokens)
    means = seen.heads_mean.reshape(heads, groups, width) / max(tokens, 1.0)
    found = []
    for j in range(heads):
        vector = None if bias is None else bias[0, j].astype(np.float64)
        inputs = (seen.attention_input, seen.attention_mean)
        moment = value_moment(*inputs, tokens, weights[:, j], vector)
        mixed = np.zeros_like(moment)
        for query in range(j * groups, (j + 1) * groups):
            place = slice(query * width, (query + 1) * width)
            mixed += seen.heads[place, place]
        found.append(HeadValues(moment, mixed, means[j], weights[:, j], outputs[j]))
    return found


def head_pairs(seen: LayerStatistics, rotates: bool) -> Float[np.ndarray, "K P"]:
    """Return the scores of each key head's pairs, a mean over tokens."""
    scores = pair_scores(seen.query_squares, seen.key_squares, rotates)
    return scores / max(float(seen.tokens), 1.0)


def pair_errors(
    scores: Float[np.ndarray, "K P"], values: list[HeadValues], rotates: bool
) -> Float[np.ndarray, " P1"]:
    """Return an estimate of attention's squared error with the first k pairs.

    Dropped pairs change a score by e^2 = sum (energy of q) (energy of k) / H on average
    (half of it where a pair turns), and with it a share 1 - exp(-e^2) of what the
    values' differences write, of which their own energy is the bound. Of G query heads
    to a key head the energies are sums over all G, so e^2 is about that of G heads.
    """
    width = len(values[0].moment)
    falling = np.square(np.sort(scores, axis=1)[:, ::-1]) / width
    if rotates:
        falling = falling / 2
    total = np.zeros(scores.shape[1] + 1)
    for squares, head in zip(falling, values, strict=True):
        tail = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
        stacked = head.stacked
        total += -np.expm1(-tail) * float(np.sum(head.moment * (stacked @ stacked.T)))
    return total

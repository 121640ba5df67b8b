"""A layer whose channels are sorted: any first ones of them make a smaller layer.

Methods differ in the order and in what makes up for what is left out. What they share
is here: the sorted layer, and how it is cut. Channels are an expert's neurons, a head's
rotary pairs of queries and keys, and its values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from uoe_jax.compress.order import Lift
from uoe_jax.compress.query_key import pair_dims
from uoe_jax.compress.value_output import ValueBasis

Layer = Mapping[str, np.ndarray]  # a layer's parameters: `mlp.w_up`


class Neurons(NamedTuple):
    """An expert's neurons, the best first.

    With a lift the down-projection of any k is fitted; `mean` is what a dropped neuron
    is replaced by, where the output has a bias to hold it.
    """

    order: Int[np.ndarray, " F"]
    errors: Float[np.ndarray, " F1"]  # squared, of the output with the first k
    lift: Lift | None = None
    mean: Float[np.ndarray, " F"] | None = None

    def down(
        self, count: int, w_down: Float[np.ndarray, "F D"]
    ) -> Float[np.ndarray, "K D"]:
        """Return the down-projection of the first `count` neurons."""
        if self.lift is None or count == len(self.order):
            return w_down[self.order[:count]]
        return self.lift.weights(count)

    def shift(
        self, count: int, w_down: Float[np.ndarray, "F D"]
    ) -> Float[np.ndarray, " D"]:
        """Return what the dropped neurons write on average."""
        if self.mean is None:
            return np.zeros(w_down.shape[1])
        dropped = self.order[count:]
        return self.mean[dropped] @ w_down[dropped]


class SortedLayer(NamedTuple):
    """One layer's channels in order, experts and heads in the layer's own order.

    Errors are squared and of the layer's output, summed over tokens, by how many
    channels each expert or head keeps. Attention that is routed has none.
    """

    neurons: tuple[Neurons, ...]  # of each expert
    pairs: Float[np.ndarray, "K P"] | None = None  # scores of each key head's pairs
    pair_errors: Float[np.ndarray, " P1"] | None = None
    values: tuple[ValueBasis, ...] = ()  # of each value head

    @property
    def neuron_errors(self) -> Float[np.ndarray, " F1"]:
        """Errors of the MLP."""
        return np.sum([neurons.errors for neurons in self.neurons], axis=0)

    @property
    def value_errors(self) -> Float[np.ndarray, " H1"]:
        """Errors of attention's output by the width of values."""
        return np.sum([basis.errors for basis in self.values], axis=0)


def cut_mlp(layer: Layer, found: SortedLayer, count: int) -> dict[str, np.ndarray]:
    """Return an MLP's parameters with the first `count` neurons of each expert.

    All of them: the parameters as they are, bit for bit.
    """
    if count >= layer["mlp.w_down"].shape[1]:
        return {name: layer[name] for name in layer if name.startswith("mlp.")}
    return _first_neurons(layer, found, count)


def sorted_layer(layer: Layer, found: SortedLayer) -> dict[str, np.ndarray]:
    """Return a layer's parameters with neurons and values in order, all of them kept.

    Pairs stay in their places, which are their frequencies.
    """
    new = {**layer, **_first_neurons(layer, found, layer["mlp.w_down"].shape[1])}
    if found.values:
        new |= cut_values(layer, found.values, len(found.values[0].into))
    return new


def _first_neurons(
    layer: Layer, found: SortedLayer, count: int
) -> dict[str, np.ndarray]:
    """Return an MLP's parameters with the first `count` neurons in order."""
    kept = {name: layer[name] for name in layer if name.startswith("mlp.")}
    w_down = layer["mlp.w_down"]
    orders = [neurons.order[:count] for neurons in found.neurons]
    for name in ("mlp.w_up", "mlp.w_gate", "mlp.b_up", "mlp.b_gate"):
        if name in kept:
            parts = zip(layer[name], orders, strict=True)
            kept[name] = np.stack([_columns(w, order) for w, order in parts])
    experts = list(zip(found.neurons, w_down, strict=True))
    kept["mlp.w_down"] = np.stack([n.down(count, w) for n, w in experts])
    if "mlp.b_down" in kept:
        kept["mlp.b_down"] = kept["mlp.b_down"] + sum(
            n.shift(count, w.astype(np.float64)) for n, w in experts
        )
    return as_before(kept, layer)


def _columns(
    weight: Float[np.ndarray, "*I F"], order: Int[np.ndarray, " K"]
) -> Float[np.ndarray, "*I K"]:
    """Return columns in an order; of a run in order already they are the first ones."""
    if np.array_equal(order, np.arange(len(order))):
        return weight[..., : len(order)]
    return weight[..., order]


def cut_query_key(
    layer: Layer, pairs: Int[np.ndarray, "K C"], rotates: bool
) -> dict[str, np.ndarray]:
    """Return parameters of queries and keys with some pairs of each key head.

    Pairs keep their original numbers, of which rotation takes their frequencies.
    """
    width = layer["attention.wk"].shape[-1]
    dims = pair_dims(pairs, width, rotates)
    # Where key heads stand among a weight's axes.
    shapes = {"wq": (1, 1, -1, 1), "wk": (1, 1, -1), "bq": (1, -1, 1), "bk": (1, -1)}
    return {
        f"attention.{name}": np.take_along_axis(
            layer[f"attention.{name}"],
            dims.reshape(*[len(dims) if n < 0 else n for n in shape], -1),
            axis=-1,
        )
        for name, shape in shapes.items()
        if f"attention.{name}" in layer
    }


def cut_values(
    layer: Layer, values: tuple[ValueBasis, ...], rank: int
) -> dict[str, np.ndarray]:
    """Return parameters of values and outputs with values of width `rank`."""
    names = [f"attention.{n}" for n in ("wv", "bv", "wo", "bo")]
    kept: dict[str, Any] = {name: layer[name] for name in names if name in layer}
    into = np.stack([basis.into[:, :rank] for basis in values])
    wide = kept["attention.wv"].astype(np.float64)
    kept["attention.wv"] = np.einsum("edjh,jhr->edjr", wide, into)
    if "attention.bv" in kept:
        kept["attention.bv"] = np.einsum("ejh,jhr->ejr", kept["attention.bv"], into)
    kept["attention.wo"] = np.stack([basis.out[:, :rank] for basis in values])[None]
    if "attention.bo" in kept:
        shift = sum(basis.shift(rank) for basis in values)
        kept["attention.bo"] = kept["attention.bo"] + shift
    return as_before(kept, layer)


def as_before(kept: Mapping[str, Any], layer: Layer) -> dict[str, np.ndarray]:
    """Return arrays in the dtypes that the layer's have."""
    return {name: np.asarray(a, layer[name].dtype) for name, a in kept.items()}

"""A model whose layers are narrower than itself, as one of whole layers with zeros."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from uoe_jax.config import RANKS, LayerWidths, ModelConfig
from uoe_jax.model.stacks import from_layers, to_layers
from uoe_jax.weights import (
    ATTENTION,
    BLOCKS,
    ROTATED,
    Param,
    layer_period,
    model_params,
)

Arrays = Mapping[str, np.ndarray]


def pad_layers(
    model: ModelConfig, params: Arrays, buffers: Arrays
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Return the config and parameters of the same function with whole layers.

    Neurons, pairs and values that a layer lacks are zeros, so that they add nothing;
    kept pairs go to where the model's frequencies rotate them; products of low rank are
    multiplied out. Without widths the model is returned as it is.
    """
    whole = dataclasses.replace(model, widths=LayerWidths())
    if whole == model:
        return model, dict(params)
    rest, layers = to_layers(params, model)
    kept = to_layers(buffers, model)[1]
    wanted, period = model_params(whole), layer_period(whole)
    padded = []
    for number, layer in enumerate(layers):
        start = f"{BLOCKS}{number % period}."
        shapes = {
            name.removeprefix(start): param
            for name, param in wanted.items()
            if name.startswith(start)
        }
        padded.append(_pad_layer(model, layer, kept[number], shapes))
    return whole, from_layers(rest, padded, whole)


def _pad_layer(
    model: ModelConfig, layer: Arrays, buffers: Arrays, shapes: Mapping[str, Param]
) -> dict[str, np.ndarray]:
    layer = dict(layer)
    for weight in RANKS:
        if f"mlp.{weight}_a" in layer:
            layer[f"mlp.{weight}"] = multiply_out(
                layer.pop(f"mlp.{weight}_a"), layer.pop(f"mlp.{weight}_b")
            )
    pairs, found = buffers.get("attention.rotary_pairs"), {}
    for name, array in layer.items():
        shape = shapes[name].shape[1:]  # without the axis of layers
        part, _, last = name.rpartition(".")
        if pairs is not None and part == "attention" and last in ROTATED:
            heads = ATTENTION[last].axes.index("j")
            array = _spread(array, pairs, heads, model.head_dim)
        whole = np.zeros(shape, array.dtype)
        whole[tuple(map(slice, array.shape))] = array
        found[name] = whole
    return found


def multiply_out(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return a product of low rank as one matrix, multiplied in float32."""
    product = first.astype(np.float32) @ second.astype(np.float32)
    return product.astype(first.dtype)


def _spread(array: np.ndarray, pairs: np.ndarray, axis: int, width: int) -> np.ndarray:
    """Return heads with pairs (i, i + n) at (p, p + width/2), p the i-th of a head."""
    places = np.concatenate([pairs, pairs + width // 2], axis=-1)
    shape = [1] * array.ndim
    shape[axis], shape[-1] = places.shape
    index = np.broadcast_to(places.reshape(shape), array.shape)
    whole = np.zeros((*array.shape[:-1], width), array.dtype)
    np.put_along_axis(whole, index, array, -1)
    return whole

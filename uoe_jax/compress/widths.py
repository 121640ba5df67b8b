"""The widths that a cut leaves each layer, and the model that has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from uoe_jax.compress.allocate import (
    Part,
    by_curve,
    by_influence,
    candidates,
    check_cut,
    nearest_widths,
)
from uoe_jax.compress.channels import (
    Layer,
    SortedLayer,
    cut_mlp,
    cut_query_key,
    cut_values,
)
from uoe_jax.compress.observed import Smaller
from uoe_jax.compress.options import Compress
from uoe_jax.compress.query_key import kept_pairs
from uoe_jax.compress.statistics import LayerStatistics
from uoe_jax.config import LayerWidths, ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.hardware.devices import find_device
from uoe_jax.hardware.gemm import GemmModel, shipped
from uoe_jax.hardware.product import Product
from uoe_jax.kinds import MLPS
from uoe_jax.model.stacks import from_layers
from uoe_jax.tree import Arrays

TOKENS = 4096  # of a product whose seconds are predicted


class Curves(NamedTuple):
    """A layer's squared errors by channels kept, over the residual's square."""

    mlp: Float[np.ndarray, " F1"]
    query_key: Float[np.ndarray, " P1"] | None
    value_output: Float[np.ndarray, " H1"] | None


def error_curves(layer: SortedLayer, seen: LayerStatistics) -> Curves:
    """Return a sorted layer's curves."""
    whole = seen.residual_square * max(float(seen.tokens), 1.0)
    if layer.pair_errors is None:
        return Curves(layer.neuron_errors / whole, None, None)
    errors = (layer.neuron_errors, layer.pair_errors, layer.value_errors)
    return Curves(*(error / whole for error in errors))


def layer_parts(
    model: ModelConfig, curves: Sequence[Curves], options: Compress
) -> list[Part]:
    """Return what a model's layers can lose: of each its MLP, pairs and values.

    Pairs are left whole where queries and keys are normalised: dropping some would
    change what the others are divided by.
    """
    way = options.way()
    seconds = _Seconds(model, way.device) if way.allocate == "seconds" else None
    cost = _parameters if seconds is None else seconds.cost
    parts = []
    for number, curve in enumerate(curves):
        experts, _ = MLPS[model.layer_kinds[number][1]].sizes(model)
        sizes = {"mlp": (curve.mlp, way.multiple)}
        if curve.query_key is not None and not model.qk_norm:
            sizes["query_key"] = (curve.query_key, 1)
        if curve.value_output is not None:
            sizes["value_output"] = (curve.value_output, 2)
        for name, (errors, multiple) in sizes.items():
            widths = candidates(len(errors) - 1, multiple, least=2)
            costs = np.array([cost(model, name, int(w), experts) for w in widths])
            parts.append(Part(number, name, widths, errors[widths], costs))
    return parts


def _parameters(model: ModelConfig, part: str, width: int, experts: int) -> float:
    """Return the parameters of a part of this width; biases are left out."""
    d = model.d_model
    if part == "mlp":
        return float((3 if model.gated else 2) * d * width * experts)
    dims = 2 * width if part == "query_key" and model.rotates else width
    return float(d * dims * (model.num_heads + model.num_kv_heads))


def find_gemm(device: str) -> GemmModel:
    """Return a device's model of products; raise ConfigError if there is none."""
    known = find_device(device)
    found = None if known is None else shipped(known.name)
    if found is None:
        raise ConfigError(
            f"device is {device!r}, of which no model of products is known; use H200, "
            "or another --allocate"
        )
    return found


class _Seconds:
    """What a part takes on a device, by its model of products, `TOKENS` at a time."""

    def __init__(self, model: ModelConfig, device: str):
        self._gemm, self._known = find_gemm(device), {}
        self._dtype = model.compute_dtype

    def cost(self, model: ModelConfig, part: str, width: int, experts: int) -> float:
        """Return the seconds of a part's products."""
        d, key = model.d_model, (part, width, experts)
        if key not in self._known:
            dims = 2 * width if part == "query_key" and model.rotates else width
            into = (model.num_heads + model.num_kv_heads) * dims
            sides = [(d, into)]
            if part == "mlp":
                sides = [(d, width * experts)] * (2 if model.gated else 1)
                sides.append((width * experts, d))
            elif part == "value_output":
                sides = [(d, model.num_kv_heads * dims), (model.num_heads * dims, d)]
            products = [
                Product(m=TOKENS, k=k, n=n, dtype=self._dtype) for k, n in sides
            ]
            self._known[key] = self._gemm.total([(p, 1.0) for p in products])
        return self._known[key]


def choose_widths(
    parts: Sequence[Part],
    influences: Float[np.ndarray, " L"],
    cut: float,
    options: Compress,
    finer: Callable[[], Sequence[Part]] | None = None,
) -> Int[np.ndarray, " N"]:
    """Return every part's width at a cut; `finer` is as in `check_cut`."""
    whole = sum(float(part.costs[-1]) for part in parts)
    way = options.way()
    if way.allocate in ("curve", "seconds"):
        check_cut(parts, cut, whole, finer)
        return by_curve(parts, (1 - cut) * whole)
    shares = np.full(len(influences), cut)
    if way.allocate == "bi":
        shares = by_influence(influences, cut, way.temperature)
    return nearest_widths(parts, [1 - shares[part.layer] for part in parts])


def with_widths(
    model: ModelConfig,
    params: tuple[Mapping[str, Any], Sequence[Layer]],
    found: Sequence[SortedLayer],
    parts: Sequence[Part],
    widths: Int[np.ndarray, " N"] | Sequence[int],
    buffers: Sequence[Layer],
) -> Smaller:
    """Return the model whose parts have these widths.

    `params` are those outside the layers, and each layer's. Parts of whole width stay
    as they are, bit for bit.
    """
    rest, layers = params
    chosen: dict[tuple[int, str], int] = {
        (part.layer, part.name): int(width)
        for part, width in zip(parts, widths, strict=True)
    }
    sizes: dict[str, list[int]] = {"d_ff": [], "key_dim": [], "value_dim": []}
    new, kept = [], []
    for number, (layer, channels) in enumerate(zip(layers, found, strict=True)):
        own = lambda name, n=number: chosen.get((n, name), 2**30)
        cut, extra = _cut_layer(model, layer, channels, own)
        new.append({**layer, **cut})
        kept.append({**buffers[number], **extra})
        sizes["d_ff"].append(int(np.prod(new[-1]["mlp.w_down"].shape[:2])))
        sizes["key_dim"].append(new[-1]["attention.wk"].shape[-1])
        sizes["value_dim"].append(new[-1]["attention.wv"].shape[-1])
    usual = {"d_ff": model.d_ff, "key_dim": model.head_dim, "value_dim": model.head_dim}
    given = {
        name: tuple(values) if any(v != usual[name] for v in values) else None
        for name, values in sizes.items()
    }
    config = dataclasses.replace(model, widths=LayerWidths(**given))
    return Smaller(
        config, from_layers(rest, new, config), from_layers({}, kept, config)
    )


def _cut_layer(
    model: ModelConfig, layer: Layer, found: SortedLayer, own: Any
) -> tuple[Arrays, Arrays]:
    """Return a layer's parameters that change, and its buffers beside them."""
    cut = cut_mlp(layer, found, own("mlp"))
    if found.pairs is None:
        return cut, {}
    extra: Arrays = {}
    if own("query_key") < found.pairs.shape[1]:
        pairs = kept_pairs(found.pairs, own("query_key"))
        cut |= cut_query_key(layer, pairs, model.rotates)
        if model.rotates:
            extra["attention.rotary_pairs"] = pairs.astype(np.int32)
    if own("value_output") < len(found.values[0].into):
        cut |= cut_values(layer, found.values, own("value_output"))
    return cut, extra

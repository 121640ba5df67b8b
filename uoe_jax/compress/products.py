"""Products of low rank, made as two or multiplied out: what a device makes sooner.

A rank that saves parameters saves multiplications too, yet two thin products may take
longer than the one that they replace: near the rank from which nothing is saved, and on
matrices that don't fill a device. Which one is faster is asked of the device's model of
products; of a device without one the multiplications are counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from uoe_jax.compress.observed import Smaller
from uoe_jax.config import RANKS, LayerWidths, ModelConfig
from uoe_jax.data.progress import note
from uoe_jax.hardware.gemm import GemmModel, find
from uoe_jax.hardware.product import Product
from uoe_jax.interop.padding import multiply_out
from uoe_jax.model import flat_buffers, flat_params, with_params
from uoe_jax.model.stacks import from_layers, to_layers
from uoe_jax.runs.load import LoadedRun
from uoe_jax.tree import Arrays

Ranks = Mapping[str, Sequence[int]]  # of a weight, a number a layer; 0: whole


def with_fast_products(
    run: LoadedRun, tokens: int, device: str | None = None
) -> LoadedRun:
    """Return a run whose products of `tokens` rows are made the faster way.

    `device` is jax's `device_kind`, this one's if not given. Products that are
    multiplied out, in float32, take more memory. A run without low ranks is returned as
    it is; so are the products that are faster as two.
    """
    model = run.config.model
    ranks = low_ranks(model)
    if not ranks:
        return run
    kind = jax.devices()[0].device_kind if device is None else device
    wanted = fast_ranks(model, tokens, find(kind))
    count = lambda given: sum(r > 0 for own in given.values() for r in own)
    before, after = count(ranks), count(wanted)
    if after == before:
        return run
    note(
        f"{before - after} of {before} products of low rank are multiplied out: for "
        f"{tokens:,} rows one is faster than two on {kind}"
    )
    made = with_ranks(model, flat_params(run.model), flat_buffers(run.model), wanted)
    config = dataclasses.replace(run.config, model=made.config)
    return run._replace(config=config, model=with_params(*made))


def low_ranks(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the ranks of each weight that has some."""
    given = {weight: getattr(model.widths, name) for weight, name in RANKS.items()}
    return {weight: ranks for weight, ranks in given.items() if ranks and any(ranks)}


def fast_ranks(
    model: ModelConfig, tokens: int, known: GemmModel | None
) -> dict[str, tuple[int, ...]]:
    """Return the ranks of each weight, 0 where the whole matrix is faster."""

    def cost(rows: int, columns: int) -> float:
        if known is None:
            return float(rows * columns)
        product = Product(m=tokens, k=rows, n=columns, dtype=model.compute_dtype)
        return known.total([(product, 1.0)])

    def keeps(layer: int, weight: str, rank: int) -> bool:
        inner, outer = model.d_model, model.of_layer(layer).d_ff
        if weight == "w_down":
            inner, outer = outer, inner
        return cost(inner, rank) + cost(rank, outer) < cost(inner, outer)

    return {
        weight: tuple(
            rank if rank and keeps(layer, weight, rank) else 0
            for layer, rank in enumerate(ranks)
        )
        for weight, ranks in low_ranks(model).items()
    }


def with_ranks(
    model: ModelConfig, params: Arrays, buffers: Arrays, wanted: Ranks
) -> Smaller:
    """Return a model whose products of rank 0 in `wanted` are multiplied out."""
    rest, layers = to_layers(params, model)
    made: list[dict[str, np.ndarray]] = []
    for number, layer in enumerate(layers):
        own = dict(layer)
        for weight, ranks in wanted.items():
            if not ranks[number] and f"mlp.{weight}_a" in own:
                pair = own.pop(f"mlp.{weight}_a"), own.pop(f"mlp.{weight}_b")
                own[f"mlp.{weight}"] = multiply_out(*pair)
        made.append(own)
    fields = {
        RANKS[weight]: tuple(ranks) if any(ranks) else None
        for weight, ranks in wanted.items()
    }
    widths: LayerWidths = dataclasses.replace(model.widths, **fields)
    config = dataclasses.replace(model, widths=widths)
    kept = to_layers(buffers, model)[1]
    return Smaller(
        config, from_layers(rest, made, config), from_layers({}, kept, config)
    )

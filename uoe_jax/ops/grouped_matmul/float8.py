"""Grouped products whose operands are rounded to eight bits on the way forward."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops import float8
from uoe_jax.ops.grouped_matmul.derivative import Products

# Axes that share a scale: of tokens or rows [M, I], and of the experts' weights.
ROW_AXES = {"tensor": (0, 1), "rows": (1,)}
WEIGHT_AXES = {"tensor": (1, 2), "rows": (1,)}


def forward_form(backend: Products) -> Products:
    """Return a backend's products with operands as `float8_products` wants them.

    Gradients have the operands as they came: they are the transposed products.
    """
    scales = float8.chosen_scales()
    return backend if scales == "none" else _rounding(backend, scales)


@functools.cache
def _rounding(backend: Products, scales: str) -> Products:
    """Return products of rounded operands, in the dtype that these came in."""

    def operands(x, w):
        rows, weights = ROW_AXES[scales], WEIGHT_AXES[scales]
        return float8.rounded(x, rows), float8.rounded(w, weights)

    def products(x, w, offsets, ids, *, transpose):
        if not transpose:
            counted = x if ids is not None else without_garbage(x, offsets, scales)
            x, w = operands(counted, w)
        return backend.products(x, w, offsets, ids, transpose=transpose)

    def sums(rows, w, packing, *, transpose):
        if not transpose:
            counted = without_garbage(rows, packing.group_offsets, scales)
            rows, w = operands(counted, w)
        return backend.sums(rows, w, packing, transpose=transpose)

    return Products(products, sums, backend.weight_grads)


def without_garbage(
    rows: Float[Array, "M I"], offsets: Int[Array, " E1"], scales: str
) -> Float[Array, "M I"]:
    """Return rows with zeros past the last group where one scale is for all of them.

    What lies there may be any number, and would be the largest.
    """
    if 0 not in ROW_AXES[scales]:
        return rows
    counts = jnp.arange(rows.shape[0]) < offsets[-1]
    return jnp.where(counts[:, None], rows, 0)

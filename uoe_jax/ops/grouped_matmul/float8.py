"""Grouped products whose operands are rounded to eight bits on the way forward."""

from __future__ import annotations

import functools

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
        x, w = (x, w) if transpose else operands(x, w)
        return backend.products(x, w, offsets, ids, transpose=transpose)

    def sums(rows, w, packing, *, transpose):
        rows, w = (rows, w) if transpose else operands(rows, w)
        return backend.sums(rows, w, packing, transpose=transpose)

    return Products(products, sums, backend.weight_grads)

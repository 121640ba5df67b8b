"""Grouped products of eight-bit operands on NVIDIA GPUs that multiply them (Ada on).

Operands are rounded once and read in a byte each; a tile's sums are multiplied by the
scales of its rows and columns before they are stored, rounded once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops import nvidia
from uoe_jax.ops.float8 import to_float8
from uoe_jax.ops.grouped_matmul.derivative import Products
from uoe_jax.ops.grouped_matmul.float8 import (
    ROW_AXES,
    WEIGHT_AXES,
    without_garbage,
)
from uoe_jax.ops.grouped_matmul.nvidia.launch import is_permutation, map_tiles, sum_rows
from uoe_jax.ops.grouped_matmul.nvidia.tiles import Tiles, power_above

ADA = 8.9  # compute capability from which matrix units take e4m3


def multiplies_float8() -> bool:
    """Whether the device's matrix units take operands of eight bits."""
    if nvidia.is_interpreted():
        return True
    return float(jax.devices()[0].compute_capability) >= ADA


@functools.cache
def eight_bit_products(backend: Products, scales: str) -> Products:
    """Return a backend's products with forward ones of eight bits."""

    def products(x, w, offsets, ids, *, transpose):
        if transpose:
            return backend.products(x, w, offsets, ids, transpose=True)
        return forward_products(x, w, offsets, ids, scales=scales)

    def sums(rows, w, packing, *, transpose):
        if transpose:
            return backend.sums(rows, w, packing, transpose=True)
        scatter = is_permutation(packing)
        offsets, ids = packing.group_offsets, packing.token_ids if scatter else None
        out = forward_products(rows, w, offsets, ids, scales=scales, scatter=scatter)
        return out if scatter else sum_rows(out, packing.row_ids)

    return Products(products, sums, backend.weight_grads)


@functools.partial(jax.jit, static_argnames=("scales", "scatter", "tiles"))
def forward_products(
    x: Float[Array, "N I"],
    w: Float[Array, "E I O"],
    offsets: Int[Array, " E1"],
    ids: Int[Array, " M"] | None,
    *,
    scales: str,
    scatter: bool = False,
    tiles: Tiles | None = None,
) -> Float[Array, "M O"]:
    """Return each row (of x, or of x[ids]) times its group's weight, both rounded.

    With `scatter` the rows are those of x, and row m goes to ids[m]: a permutation.
    """
    num_rows = x.shape[0] if ids is None else ids.shape[0]
    num_groups, inner, outer = w.shape
    if ids is None or scatter:
        x = without_garbage(x, offsets, scales)
    numbers, row_scales = to_float8(x, ROW_AXES[scales])
    weights, column_scales = to_float8(jnp.swapaxes(w, 1, 2), _swapped(scales))
    tiles = tiles or choose_tiles(inner, outer)
    tile_map = map_tiles(offsets, num_rows, tiles.rows)
    from uoe_jax.ops.grouped_matmul.nvidia import float8_kernels

    return nvidia.launch(
        float8_kernels.products,
        numbers,
        weights,
        tile_map,
        offsets if ids is None else ids,
        jnp.broadcast_to(row_scales[:, 0], x.shape[:1]),
        jnp.broadcast_to(column_scales[:, :, 0], (num_groups, outer)),
        out_shape=((num_rows, outer), x.dtype),
        grid=tile_map.shape[1] * -(-outer // tiles.outer),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        TILES=tile_map.shape[1],
        I=inner,
        O=outer,
        E=num_groups,
        GATHER=ids is not None and not scatter,
        SCATTER=scatter,
        ROWS=tiles.rows,
        INNER=tiles.inner,
        OUTER=tiles.outer,
        BAND=tiles.band,
    )


def _swapped(scales: str) -> tuple[int, ...]:
    """Return the axes that share a scale where weights lie output by output."""
    return tuple({0: 0, 1: 2, 2: 1}[axis] for axis in WEIGHT_AXES[scales])


def choose_tiles(inner: int, outer: int) -> Tiles:
    """Return a tile of 128 bytes along the inner side, with the stages that fit."""
    deep, wide = (max(32, power_above(side)) for side in (inner, outer))
    deep, wide = min(128, deep), min(256, wide)
    held = nvidia.shared_memory() // (deep * (128 + wide))
    return Tiles(128, deep, wide, 8, 8, max(1, min(4, held)))

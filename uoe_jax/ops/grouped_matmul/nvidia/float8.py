"""Grouped products of eight-bit operands on NVIDIA GPUs that multiply them (Ada on).

Operands are rounded once and read in a byte each; a tile's sums are multiplied by the
scales of its rows and columns before they are stored, rounded once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int

from uoe_jax.ops import nvidia
from uoe_jax.ops.float8 import as_they_lie, to_float8
from uoe_jax.ops.grouped_matmul.derivative import Products
from uoe_jax.ops.grouped_matmul.float8 import (
    ROW_AXES,
    WEIGHT_AXES,
    without_garbage,
)
from uoe_jax.ops.grouped_matmul.nvidia.launch import is_permutation, map_tiles, sum_rows
from uoe_jax.ops.grouped_matmul.nvidia.tiles import Tiles
from uoe_jax.ops.grouped_matmul.nvidia.tiles import choose_tiles as tiles_of_all

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


class Rounded(NamedTuple):
    """Operands of eight bits as the kernels read them: weights output by output."""

    numbers: Float8e4m3fn[Array, "N I"]
    row_scales: Float32[Array, " N"]
    weights: Float8e4m3fn[Array, "E O I"]
    column_scales: Float32[Array, "E O"]


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
    if ids is None or scatter:
        x = without_garbage(x, offsets, scales)
    given = round_operands(x, w, scales)
    return multiply(given, offsets, ids, dtype=x.dtype, scatter=scatter, tiles=tiles)


def round_operands(
    x: Float[Array, "N I"], w: Float[Array, "E I O"], scales: str
) -> Rounded:
    """Return rows and weights in eight bits. Tokens are rounded before a gather."""
    numbers, row_scales = to_float8(x, ROW_AXES[scales])
    weights, column_scales = to_float8(w, WEIGHT_AXES[scales])
    return Rounded(
        numbers,
        jnp.broadcast_to(row_scales[:, 0], x.shape[:1]),
        jnp.swapaxes(as_they_lie(weights), 1, 2),
        jnp.broadcast_to(column_scales[:, 0], (w.shape[0], w.shape[2])),
    )


@functools.partial(jax.jit, static_argnames=("dtype", "scatter", "tiles"))
def multiply(
    given: Rounded,
    offsets: Int[Array, " E1"],
    ids: Int[Array, " M"] | None,
    *,
    dtype: Any,
    scatter: bool = False,
    tiles: Tiles | None = None,
) -> Float[Array, "M O"]:
    """Return the products of `forward_products` of what was rounded."""
    num_rows = given.numbers.shape[0] if ids is None else ids.shape[0]
    num_groups, outer, inner = given.weights.shape
    gather = ids is not None and not scatter
    tiles = tiles or choose_tiles(num_rows, num_groups, inner, outer, gather)
    tile_map = map_tiles(offsets, num_rows, tiles.rows)
    from uoe_jax.ops.grouped_matmul.nvidia import float8_kernels

    kernel: Any = float8_kernels.products
    turns: dict[str, Any] = {}
    grid = tile_map.shape[1] * -(-outer // tiles.outer)
    if tiles.in_turn:
        kernel = float8_kernels.products_in_turn
        grid = min(grid, nvidia.cores() * tiles.in_turn)
        turns = {"PROGRAMS": grid}
    return nvidia.launch(
        kernel,
        given.numbers,
        given.weights,
        tile_map,
        offsets if ids is None else ids,
        given.row_scales,
        given.column_scales,
        out_shape=((num_rows, outer), dtype),
        grid=grid,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        TILES=tile_map.shape[1],
        I=inner,
        O=outer,
        E=num_groups,
        GATHER=gather,
        SCATTER=scatter,
        ROWS=tiles.rows,
        INNER=tiles.inner,
        OUTER=tiles.outer,
        BAND=tiles.band,
        **turns,
    )


def choose_tiles(
    num_rows: int, num_groups: int, inner: int, outer: int, gather: bool
) -> Tiles:
    """Return the tile of the 16-bit product that reads and multiplies as long.

    It is half as deep, and its weights lie the same way: transposed.
    """
    sides = {"rows": num_rows, "inner": inner // 2, "outer": outer}
    layout = {"gather": gather, "transpose": True, "groups": num_groups}
    shape = {**sides, **layout, "dtype": "bfloat16"}
    tiles = tiles_of_all("products", shape)
    return tiles._replace(inner=2 * tiles.inner)

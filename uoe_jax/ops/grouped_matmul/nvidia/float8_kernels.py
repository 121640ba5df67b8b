"""A Triton kernel of grouped matmul with operands of eight bits and their scales.

Weights lie output by output, [E, O, I]: Hopper's matrix units read eight-bit operands
along the inner side alone. Letters and tiles as in `kernels.py`.
"""

from __future__ import annotations

from typing import no_type_check

from uoe_jax.ops._triton_language import jit, tl
from uoe_jax.ops.grouped_matmul.nvidia.kernels import (
    add_product,
    operands,
    store_tile,
    swizzle,
)


@jit
@no_type_check
def scale_tile(
    total,
    row_scales,
    column_scales,
    ids,
    group,
    first,
    stop,
    column,
    O: tl.constexpr,
    E: tl.constexpr,
    GATHER: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
):
    """A tile of sums times the scales of its rows and of its group's columns."""
    row = first + tl.arange(0, ROWS)
    source = tl.where(row < stop, row, first)
    if GATHER:
        source = tl.load(ids + source)
    o = column * OUTER + tl.arange(0, OUTER)
    at = column_scales + group.to(tl.int64) * O + o
    # The group past the last has no columns, and sums of zero.
    columns = tl.load(at, mask=(o < O) & (group < E), other=0.0)
    return total * tl.load(row_scales + source)[:, None] * columns[None, :]


@jit
@no_type_check
def products(
    x,
    w,
    tile_map,
    ids,
    row_scales,
    column_scales,
    out,
    TILES: tl.constexpr,
    I: tl.constexpr,
    O: tl.constexpr,
    E: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BAND: tl.constexpr,
):
    """out[m] = x[ids[m]] @ w[group of m].T times both scales; [N] and [E, O] of them.

    With SCATTER out[ids[m]] = x[m] @ w.T instead.
    """
    tile, column = swizzle(tl.program_id(0), TILES, (O + OUTER - 1) // OUTER, BAND)
    group = tl.load(tile_map + tile)
    first = tl.load(tile_map + TILES + tile)
    stop = tl.load(tile_map + 2 * TILES + tile)
    if group > E:
        return
    x_at, w_at = operands(
        x, w, ids, group, first, stop, column, I, O, GATHER, True, ROWS, INNER, OUTER
    )
    total = tl.zeros((ROWS, OUTER), tl.float32)
    for left in range(tl.where(group < E, I, 0), 0, -INNER):
        # The precision is of float32 operands, which these aren't.
        total = add_product(total, x_at, w_at, left, I, INNER, "tf32")
        x_at += INNER
        w_at += INNER
    total = scale_tile(
        total, row_scales, column_scales, ids, group, first, stop, column, O, E,
        GATHER, ROWS, OUTER,
    )  # fmt: skip
    store_tile(out, total, ids, first, stop, column, O, SCATTER, ROWS, OUTER)


@jit
@no_type_check
def products_in_turn(
    x,
    w,
    tile_map,
    ids,
    row_scales,
    column_scales,
    out,
    TILES: tl.constexpr,
    I: tl.constexpr,
    O: tl.constexpr,
    E: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BAND: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """As `products`, but each of PROGRAMS makes every PROGRAMS-th tile, in one loop."""
    columns: tl.constexpr = (O + OUTER - 1) // OUTER
    turns: tl.constexpr = (I + INNER - 1) // INNER
    program = tl.program_id(0)
    rounds = (TILES * columns - program + PROGRAMS - 1) // PROGRAMS
    for number in tl.range(0, rounds, flatten=True):
        place = program + number * PROGRAMS
        tile, column = swizzle(place, TILES, columns, BAND)
        group = tl.load(tile_map + tile)
        first = tl.load(tile_map + TILES + tile)
        stop = tl.load(tile_map + 2 * TILES + tile)
        # Tiles that aren't there are made as well, from what is: nothing is stored.
        x_at, w_at = operands(
            x, w, ids, tl.minimum(group, E - 1), tl.minimum(first, stop - 1), stop,
            column, I, O, GATHER, True, ROWS, INNER, OUTER,
        )  # fmt: skip
        total = tl.zeros((ROWS, OUTER), tl.float32)
        for turn in range(turns):
            left = I - turn * INNER
            total = add_product(total, x_at, w_at, left, I, INNER, "tf32")
            x_at += INNER
            w_at += INNER
        total = tl.where(group < E, total, 0)  # the group past the last has no weight
        total = scale_tile(
            total, row_scales, column_scales, ids, group, tl.minimum(first, stop - 1),
            stop, column, O, E, GATHER, ROWS, OUTER,
        )  # fmt: skip
        store_tile(out, total, ids, first, stop, column, O, SCATTER, ROWS, OUTER)

"""Two TPU kernels: rows times their group's weight, and the gradient of the weights.

A tile of rows that lies in one group takes one product; a tile that straddles groups
is visited once for each, and only the 128-row grains that hold rows of it take part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from uoe_jax.ops import tpu
from uoe_jax.ops.grouped_matmul.tpu.rows import (
    Gather,
    by_row,
    gather_parts,
)
from uoe_jax.ops.grouped_matmul.tpu.schedule import Items, read_item, work_items
from uoe_jax.ops.tpu import LANES, Target, matmul
from uoe_jax.varying import struct_varying


@dataclass(frozen=True)
class Tiles:
    """Rows, summed columns and output columns of one block, and its target."""

    target: Target
    rows: int
    inner: int
    outer: int
    vmem: int


def _each_part(item: Items, rows: int, whole: Any, part: Any) -> None:
    """Run `whole()` on a tile of one group, else `part(grain start)` on its grains."""
    first, last = item.start - item.tile * rows, item.end - item.tile * rows
    full = (first == 0) & (last == rows)
    pl.when(full)(whole)
    grains = jnp.where(full | (last <= first), 0, lax.div(last + LANES - 1, LANES))

    def body(grain, _):
        part(pl.multiple_of(grain * LANES, LANES))

    lax.fori_loop(lax.div(first, LANES), grains, body, None)


def _inside(item: Items, rows: int, offset: Any, shape: tuple[int, ...]) -> jax.Array:
    """Return which rows of a grain belong to the item, in the shape `[128, ...]`."""
    row = item.tile * rows + offset
    row += lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= item.start) & (row < item.end)


def _product_kernel(items, *refs, tiles, steps, transpose, picked):
    index, step = pl.program_id(1), pl.program_id(2)
    item = read_item(items, index)
    before = read_item(items, jnp.maximum(index - 1, 0))
    first_visit = (index == 0) | (before.tile != item.tile)
    if picked:
        here, ahead, x_hbm, w_ref, out_ref, acc_ref, *buffers = refs
        gather = Gather(x_hbm, here, ahead, *buffers)

        # Once a tile, at the first of its items: the others find the rows there.
        @pl.when(first_visit)
        def _():
            gather.advance(item.tile, first=index == 0, last=item.tile == picked - 1)

        read = lambda rows: gather.read(item.tile, rows)
    else:
        x_ref, w_ref, out_ref, acc_ref = refs
        read = lambda rows: x_ref[rows]

    def product(rows):
        total = matmul(read(rows), w_ref[0], (1, 1 if transpose else 0))
        if steps == 1:
            return total
        # Chosen, not zeroed beforehand: other items' sums of the tile may be there.
        return total + jnp.where(step == 0, 0.0, acc_ref[rows])

    def whole():
        total = product(slice(None))
        if steps > 1:
            acc_ref[...] = total
        out_ref[...] = total.astype(out_ref.dtype).reshape(out_ref.shape)

    def part(offset):
        rows = pl.ds(offset, LANES)
        total = product(rows)
        if steps > 1:
            acc_ref[rows] = total
        # A tile's items follow each other, so its block is still in VMEM, with what
        # the groups before wrote.
        others = out_ref[rows]
        mine = _inside(item, tiles.rows, offset, others.shape)
        total = total.astype(others.dtype).reshape(others.shape)
        out_ref[rows] = jnp.where(mine, total, others)

    # Grains that no item writes are of no group: they must be zero, not what was there.
    @pl.when(first_visit & (step == 0))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    _each_part(item, tiles.rows, whole, part)


def _weight_kernel(items, *refs, tiles, last_index, picked, picks_grad):
    index = pl.program_id(2)
    item = read_item(items, index)
    before = read_item(items, jnp.maximum(index - 1, 0))
    after = read_item(items, jnp.minimum(index + 1, last_index))
    if picked:
        here, ahead, source, other_ref, out_ref, acc_ref, *buffers = refs
        gather = Gather(source, here, ahead, *buffers)

        @pl.when((index == 0) | (before.tile != item.tile))
        def _():
            gather.advance(item.tile, first=index == 0, last=item.tile == picked - 1)

        reads = (
            (lambda rows: gather.read(item.tile, rows)),
            lambda rows: other_ref[rows],
        )
    else:
        x_ref, grad_ref, out_ref, acc_ref = refs
        reads = (lambda rows: x_ref[rows]), lambda rows: grad_ref[rows]
    read_x, read_grad = reads[::-1] if picks_grad else reads

    # Each group has an item, if without rows: the gradient of its weight is zero then.
    @pl.when((index == 0) | (before.group != item.group))
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def whole():
        acc_ref[...] += matmul(read_x(slice(None)), read_grad(slice(None)), (0, 0))

    def part(offset):
        rows = pl.ds(offset, LANES)
        x, grad = read_x(rows), read_grad(rows)
        # Both, for 0 * nan is nan.
        x, grad = (
            jnp.where(_inside(item, tiles.rows, offset, a.shape), a, jnp.zeros_like(a))
            for a in (x, grad)
        )
        acc_ref[...] += matmul(x, grad, (0, 0))

    _each_part(item, tiles.rows, whole, part)

    @pl.when((index == last_index) | (after.group != item.group))
    def _():
        out_ref[0] = acc_ref[...].astype(out_ref.dtype)


def products(
    x: jax.Array,
    w: jax.Array,
    offsets: jax.Array,
    tiles: Tiles,
    *,
    transpose: bool,
    ids: jax.Array | None = None,
    rows_apart: bool = False,
) -> jax.Array:
    """Return `x[m] @ w[e]` (or its transpose) for each row m of each group e.

    With `ids` row m is `x[ids[m]]`, and a tile holds whole rows. With `rows_apart` the
    result is `[M, O / 128, 128]`, for its rows to be picked.
    """
    num_rows = x.shape[0] if ids is None else ids.shape[0]
    depth, width = w.shape[1:][::-1] if transpose else w.shape[1:]
    items = work_items(offsets, num_rows, tiles.rows)
    num_tiles = pl.cdiv(num_rows, tiles.rows)
    steps = depth // tiles.inner
    # Columns outermost: with one step all items of a group find its weight in VMEM, for
    # a block whose index stays isn't copied again.
    grid = (pl.cdiv(width, tiles.outer), items.tile.shape[0], steps)

    def weight_block(column, index, step, scalars):
        fetch = read_item(scalars, index).fetch
        return (fetch, column, step) if transpose else (fetch, step, column)

    def tile_of(column, index, step, scalars):
        return read_item(scalars, index).tile

    if ids is None:
        row_block = lambda *i: (tile_of(*i), i[2])
        specs = [pl.BlockSpec((tiles.rows, tiles.inner), row_block)]
        sources, buffers = [x], []
    else:
        sources, specs, buffers = gather_parts(by_row(x), ids, tiles.rows, tile_of)
    out_block, out_sides = (tiles.rows, tiles.outer), (num_rows, width)
    if rows_apart:
        out_block, out_sides = (
            (sides[0], sides[1] // LANES, LANES) for sides in (out_block, out_sides)
        )
    out_index = lambda *i: (tile_of(*i), i[0], 0)[: len(out_block)]
    sides = (tiles.outer, tiles.inner) if transpose else (tiles.inner, tiles.outer)
    # Of one step nothing is kept between: the smallest block there is.
    scratch = (tiles.rows, tiles.outer) if steps > 1 else (8, LANES)
    call = tpu.call(
        lambda *refs: _product_kernel(
            *refs,
            tiles=tiles,
            steps=steps,
            transpose=transpose,
            picked=0 if ids is None else num_tiles,
        ),
        tiles.target,
        vmem=tiles.vmem,
        # Items in order: they share tiles, and a gather runs one tile ahead.
        parallel=(True, False, False),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[*specs, pl.BlockSpec((1, *sides), weight_block)],
            out_specs=pl.BlockSpec(out_block, out_index),
            scratch_shapes=[pltpu.VMEM(scratch, jnp.float32), *buffers],
        ),
        out_shape=struct_varying(out_sides, x.dtype, x),
        cost_estimate=_cost(num_rows, w, grid[0] * num_rows * depth, num_rows * width),
        name="grouped_matmul_dx" if transpose else "grouped_matmul",
    )
    return call(items.pack(), *sources, w)


def weight_gradients(
    x: jax.Array,
    grad: jax.Array,
    offsets: jax.Array,
    w: jax.ShapeDtypeStruct,
    tiles: Tiles,
    *,
    ids: jax.Array | None = None,
    picks_grad: bool = False,
) -> jax.Array:
    """Return `x[rows of e].T @ grad[rows of e]` of each group e, like w; 0 if empty.

    With `ids` row m of x (with `picks_grad` of grad) is row ids[m] of what is given.
    """
    num_rows = grad.shape[0] if picks_grad is False else x.shape[0]
    depth, width = x.shape[1], grad.shape[1]
    items = work_items(offsets, num_rows, tiles.rows)
    count = items.tile.shape[0]
    num_tiles = pl.cdiv(num_rows, tiles.rows)
    # Items innermost: a group's follow each other, and its sum stays in VMEM.
    grid = (pl.cdiv(depth, tiles.inner), pl.cdiv(width, tiles.outer), count)
    tile_of = lambda i, o, n, scalars: read_item(scalars, n).tile
    x_spec = pl.BlockSpec((tiles.rows, tiles.inner), lambda *i: (tile_of(*i), i[0]))
    grad_spec = pl.BlockSpec((tiles.rows, tiles.outer), lambda *i: (tile_of(*i), i[1]))
    if ids is None:
        sources, specs, buffers = [x, grad], [x_spec, grad_spec], []
    else:
        picked, other = (grad, x) if picks_grad else (x, grad)
        parts = gather_parts(by_row(picked), ids, tiles.rows, tile_of)
        sources, specs, buffers = parts
        sources, specs = (
            [*sources, other],
            [*specs, x_spec if picks_grad else grad_spec],
        )
    call = tpu.call(
        lambda *refs: _weight_kernel(
            *refs,
            tiles=tiles,
            last_index=count - 1,
            picked=0 if ids is None else num_tiles,
            picks_grad=picks_grad,
        ),
        tiles.target,
        vmem=tiles.vmem,
        parallel=(True, True, False),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=specs,
            out_specs=pl.BlockSpec(
                (1, tiles.inner, tiles.outer),
                lambda i, o, n, scalars: (read_item(scalars, n).group, i, o),
            ),
            scratch_shapes=[
                pltpu.VMEM((tiles.inner, tiles.outer), jnp.float32),
                *buffers,
            ],
        ),
        out_shape=struct_varying(w.shape, w.dtype, x),
        cost_estimate=_cost(
            num_rows, w, grid[1] * num_rows * depth, grid[0] * num_rows * width
        ),
        name="grouped_matmul_dw",
    )
    return call(items.pack(), *sources)


def _cost(
    num_rows: int, w: jax.Array | jax.ShapeDtypeStruct, *moved: int
) -> pl.CostEstimate:
    """Return the work told to the compiler, which can't see the offsets.

    `moved` are elements of rows, read or written.
    """
    return pl.CostEstimate(
        flops=2 * num_rows * w.shape[1] * w.shape[2],
        transcendentals=0,
        bytes_accessed=w.dtype.itemsize * (w.size + sum(moved)),
    )

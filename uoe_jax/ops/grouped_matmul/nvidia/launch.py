"""Launches of the Triton kernels: products, weight gradients, sums of rows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops import nvidia
from uoe_jax.ops.grouped_matmul.nvidia.tiles import Tiles, choose_tiles, power_above
from uoe_jax.ops.packing import Packing

# Partial weight gradients of a group; past a few, adding them costs what they save.
MOST_SPLITS = 8


def map_tiles(
    offsets: Int[Array, " E1"], num_rows: int, size: int
) -> Int[Array, "3 C"]:
    """Return group, first row and end of the group of every tile of `size` rows.

    Rows past the last group are group E; spare tiles at the end have a group above it.
    One map serves all products over a packing, so it costs a few small kernels once.
    """
    groups = offsets.shape[0]  # the rows of no group included
    offsets = jnp.append(offsets.astype(jnp.int32), num_rows)
    counts = -(-jnp.diff(offsets) // size)
    place = jnp.arange(groups)
    ends = jnp.sum(jnp.where(place[None] <= place[:, None], counts[None], 0), axis=1)
    tile = jnp.arange((num_rows + groups * (size - 1)) // size, dtype=jnp.int32)
    group = jnp.sum((ends[None] <= tile[:, None]).astype(jnp.int32), axis=1)
    known = jnp.minimum(group, groups - 1)
    first = offsets[known] + (tile - (ends - counts)[known]) * size
    return jnp.stack([group, first, offsets[known + 1]])


def is_permutation(packing: Packing) -> bool:
    """Whether each token has one row: then a product stores it where its token is."""
    num_tokens, picks = packing.row_ids.shape
    return picks == 1 and packing.token_ids.shape[0] == num_tokens


@functools.partial(jax.jit, static_argnames=("transpose", "scatter", "tiles"))
def products(
    x: Float[Array, "N A"],
    w: Float[Array, "E I O"],
    offsets: Int[Array, " E1"],
    ids: Int[Array, " M"] | None,
    *,
    transpose: bool,
    scatter: bool = False,
    tiles: Tiles | None = None,
) -> Float[Array, "M B"]:
    """Return each row (of x, or of x[ids]) times its group's weight (transposed).

    With `scatter` the rows are those of x, and row m goes to ids[m]: a permutation.
    """
    num_rows = x.shape[0] if ids is None else ids.shape[0]
    gather = ids is not None and not scatter
    num_groups, inner, outer = w.shape
    if transpose:
        inner, outer = outer, inner
    shape = {"rows": num_rows, "inner": inner, "outer": outer, "dtype": x.dtype.name}
    shape |= {"gather": gather, "transpose": transpose, "groups": num_groups}
    tiles = tiles or choose_tiles("products", shape)
    tile_map = map_tiles(offsets, num_rows, tiles.rows)
    from uoe_jax.ops.grouped_matmul.nvidia import kernels

    kernel: Any = kernels.products
    turns: dict[str, Any] = {}
    grid = tile_map.shape[1] * -(-outer // tiles.outer)
    if tiles.in_turn:
        kernel = kernels.products_in_turn
        grid = min(grid, nvidia.cores() * tiles.in_turn)
        turns = {"PROGRAMS": grid}
    return nvidia.launch(
        kernel,
        x,
        w,
        tile_map,
        offsets if ids is None else ids,
        out_shape=((num_rows, outer), x.dtype),
        grid=grid,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        TILES=tile_map.shape[1],
        I=inner,
        O=outer,
        E=num_groups,
        GATHER=gather,
        SCATTER=scatter,
        TRANSPOSE=transpose,
        ROWS=tiles.rows,
        INNER=tiles.inner,
        OUTER=tiles.outer,
        BAND=tiles.band,
        PRECISION=_precision(x.dtype),
        **turns,
    )


@functools.partial(jax.jit, static_argnames=("tiles",))
def weight_grads(
    x: Float[Array, "Nx I"],
    grad: Float[Array, "Ng O"],
    offsets: Int[Array, " E1"],
    x_ids: Int[Array, " M"] | None,
    grad_ids: Int[Array, " M"] | None,
    tiles: Tiles | None = None,
) -> Float[Array, "E I O"]:
    """Return every group's sum of x (outer) grad over its rows, rounded once.

    Where the results' tiles leave multiprocessors idle, several programs share a
    group's rows, and their float32 sums are added in order.
    """
    num_groups, inner, outer = offsets.shape[0] - 1, x.shape[1], grad.shape[1]
    num_rows = x.shape[0] if x_ids is None else x_ids.shape[0]
    shape = {"rows": num_rows, "inner": inner, "outer": outer, "dtype": x.dtype.name}
    sides = [
        name for name, ids in (("x", x_ids), ("grad", grad_ids)) if ids is not None
    ]
    shape |= {"gather": " and ".join(sides) or "none", "groups": num_groups}
    tiles = tiles or choose_tiles("weight_grads", shape)
    programs = num_groups * -(-inner // tiles.inner) * -(-outer // tiles.outer)
    splits = max(1, min(MOST_SPLITS, nvidia.cores() // programs))
    from uoe_jax.ops.grouped_matmul.nvidia import kernels

    out = nvidia.launch(
        kernels.weight_grads,
        x,
        grad,
        offsets,
        offsets if x_ids is None else x_ids,
        offsets if grad_ids is None else grad_ids,
        out_shape=(
            (num_groups, splits, inner, outer),
            x.dtype if splits == 1 else jnp.float32,
        ),
        grid=splits * programs,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        I=inner,
        O=outer,
        GATHER_X=x_ids is not None,
        GATHER_GRAD=grad_ids is not None,
        ROWS=tiles.rows,
        INNER=tiles.inner,
        OUTER=tiles.outer,
        BAND=tiles.band,
        SPLITS=splits,
        AHEAD=tiles.ahead,
        PRECISION=_precision(x.dtype),
    )
    return out[:, 0] if splits == 1 else jnp.sum(out, axis=1).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("tokens", "num_warps"))
def sum_rows(
    rows: Float[Array, "M D"],
    row_ids: Int[Array, "N X"],
    tokens: int = 1,
    num_warps: int = 4,
) -> Float[Array, "N D"]:
    """Return each token's sum over its rows, added in float32."""
    from uoe_jax.ops.grouped_matmul.nvidia import kernels

    num_tokens, picks = row_ids.shape
    return nvidia.launch(
        kernels.sum_rows,
        rows,
        row_ids,
        out_shape=((num_tokens, rows.shape[1]), rows.dtype),
        grid=-(-num_tokens // tokens),
        num_warps=num_warps,
        num_stages=1,
        M=rows.shape[0],
        N=num_tokens,
        X=picks,
        D=rows.shape[1],
        TOKENS=tokens,
        WIDTH=power_above(rows.shape[1]),
    )


def _precision(dtype) -> str:
    # Float32 by three tf32 products: errors of float32, not of tf32.
    return "tf32x3" if dtype == jnp.float32 else "tf32"

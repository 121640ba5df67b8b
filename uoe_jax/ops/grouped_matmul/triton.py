"""Grouped matmul on NVIDIA GPUs from Ampere on, and the gather or sum around it.

Rows of x are loaded by token id inside the products, so no copy of x by rows is ever
written. A sum over a token's rows is made in a fixed order, in one of two ways: by
writing the products once and adding them up, which moves bytes, or inside one dense
product as deep as all groups together, which multiplies zeros. Both repeat bit by bit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops import _triton, _tuning
from uoe_jax.ops._dispatch import vary_together
from uoe_jax.ops.packing import Packing, take_rows

# Partial weight gradients of a group; past a few, adding them costs what they save.
MOST_SPLITS = 8
# FLOPs in the time of a byte, measured on an H100: Triton's products, cuBLAS's.
TRITON_RATE, DENSE_RATE = 230, 300
# The dense sum is taken where it is this much cheaper: it needs more memory.
DENSE_GAIN = 0.85


class Tiles(NamedTuple):
    """Sides of a tile, and how it is compiled."""

    rows: int
    inner: int
    outer: int
    band: int  # tiles down before the next column
    num_warps: int
    num_stages: int
    in_turn: bool = False  # of products: a program a multiprocessor, tile after tile
    ahead: bool = False  # of weight gradients: ids are read a step before their rows


def grouped_matmul(
    x: Float[Array, "M I"], w: Float[Array, "E I O"], offsets: Int[Array, " E1"]
) -> Float[Array, "M O"]:
    """Return each row times its group's weight; rows past the last group are zero.

    Raises:
      NotImplementedError: no fit device, package or dtype, or an empty axis.
    """
    require(x, w)
    x, w, offsets = vary_together(x, w, offsets)
    return _grouped(x, w, offsets.astype(jnp.int32))


def gather_project(
    x: Float[Array, "N I"], w: Float[Array, "E I O"], packing: Packing
) -> Float[Array, "M O"]:
    """Return each row's token times the row's expert weight; keeps only x and w.

    Raises:
      NotImplementedError: as `grouped_matmul`.
    """
    require(x, w, packing.token_ids)
    x, w, *ids = vary_together(x, w, *packing)
    return _gather_project(x, w, Packing(*ids))


def project_scatter(
    rows: Float[Array, "M I"], w: Float[Array, "E I O"], packing: Packing
) -> Float[Array, "N O"]:
    """Return each token's sum of its rows times their expert weights.

    Raises:
      NotImplementedError: as `grouped_matmul`.
    """
    require(rows, w, packing.row_ids)
    rows, w, *ids = vary_together(rows, w, *packing)
    return _project_scatter(rows, w, Packing(*ids))


def require(x: jax.Array, w: jax.Array, *ids: jax.Array) -> None:
    """Return if the kernels can serve; raises NotImplementedError."""
    _triton.require(x.dtype)
    if 0 in (*x.shape, *w.shape, *(side for array in ids for side in array.shape)):
        raise NotImplementedError("it takes no empty arrays")


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


@functools.partial(jax.jit, static_argnames=("transpose", "tiles"))
def products(
    x: Float[Array, "N A"],
    w: Float[Array, "E I O"],
    offsets: Int[Array, " E1"],
    ids: Int[Array, " M"] | None,
    *,
    transpose: bool,
    tiles: Tiles | None = None,
) -> Float[Array, "M B"]:
    """Return each row (of x, or of x[ids]) times its group's weight (transposed)."""
    num_rows = x.shape[0] if ids is None else ids.shape[0]
    num_groups, inner, outer = w.shape
    if transpose:
        inner, outer = outer, inner
    shape = {"rows": num_rows, "inner": inner, "outer": outer, "dtype": x.dtype.name}
    shape |= {"gather": ids is not None, "transpose": transpose}
    tiles = tiles or choose_tiles("products", shape)
    tile_map = map_tiles(offsets, num_rows, tiles.rows)
    from uoe_jax.ops.grouped_matmul import triton_kernels

    kernel, turns = triton_kernels.products, {}
    grid = tile_map.shape[1] * -(-outer // tiles.outer)
    if tiles.in_turn:
        kernel, grid = triton_kernels.products_in_turn, min(grid, _triton.cores())
        turns = {"PROGRAMS": grid}
    return _triton.launch(
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
        GATHER=ids is not None,
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
    shape |= {"gather": x_ids is not None or grad_ids is not None}
    tiles = tiles or choose_tiles("weight_grads", shape)
    programs = num_groups * -(-inner // tiles.inner) * -(-outer // tiles.outer)
    splits = max(1, min(MOST_SPLITS, _triton.cores() // programs))
    from uoe_jax.ops.grouped_matmul import triton_kernels

    out = _triton.launch(
        triton_kernels.weight_grads,
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
    from uoe_jax.ops.grouped_matmul import triton_kernels

    num_tokens, picks = row_ids.shape
    return _triton.launch(
        triton_kernels.sum_rows,
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
        WIDTH=_power(rows.shape[1]),
    )


def two_step_sums(
    rows: Float[Array, "M A"],
    w: Float[Array, "E I O"],
    packing: Packing,
    *,
    transpose: bool,
) -> Float[Array, "N B"]:
    """Return each token's sum of its rows' products, which are written, then added."""
    out = products(rows, w, packing.group_offsets, None, transpose=transpose)
    return sum_rows(out, packing.row_ids)


@functools.partial(jax.jit, static_argnames=("transpose",))
def dense_sums(
    rows: Float[Array, "M A"],
    w: Float[Array, "E I O"],
    packing: Packing,
    *,
    transpose: bool,
) -> Float[Array, "N B"]:
    """Return each token's sum of its rows' products, as one product of all groups.

    A token's rows lie side by side in it, zeros for the groups that it has no row of.
    """
    members = find_members(packing.group_offsets, packing.row_ids, rows.shape[0])
    dense = take_rows(rows, members)
    # In 16 bits cuBLAS adds in float32 and rounds once.
    return jnp.einsum("nei,eoi->no" if transpose else "nei,eio->no", dense, w)


def find_members(
    offsets: Int[Array, " E1"], row_ids: Int[Array, "N X"], num_rows: int
) -> Int[Array, "N E"]:
    """Return each token's row in every group, `num_rows` where it has none."""
    ids, edges = row_ids[:, :, None], offsets[None, None]
    inside = (ids >= edges[..., :-1]) & (ids < edges[..., 1:])
    return jnp.min(jnp.where(inside, ids, num_rows), axis=1)


def choose_tiles(op: str, shape: Mapping[str, Any]) -> Tiles:
    """Return the tile that measured fastest near this shape, or one that must fit.

    No side is twice this shape's own or more. Outside the tables a tile is as wide as
    the result up to 256 columns, and its stages are what shared memory holds.
    """
    depth, columns = (max(16, _power(shape[side])) for side in ("inner", "outer"))
    found = _tuning.tiles(op, shape)
    if found is not None:
        tile = Tiles(**found)
        sides = {"inner": min(tile.inner, depth), "outer": min(tile.outer, columns)}
        return tile._replace(**sides)
    wide = shape["dtype"] == "float32"
    columns = min(128 if wide else 256, columns)
    if op == "weight_grads":
        # Few rows at a time and many stages: ids are loaded before the rows they name.
        rows, inner, most = 32, min(128, depth), 5
        stage = rows * (inner + columns)
    else:
        rows, inner, most = 128, min(32 if wide else 64, depth), 4
        stage = inner * (rows + columns)
    held = _triton.shared_memory() // (stage * (4 if wide else 2))
    stages = max(1, min(most, held))
    return Tiles(rows, inner, columns, band=16, num_warps=8, num_stages=stages)


def dense_pays(
    num_rows: int, num_tokens: int, groups: int, inner: int, outer: int, dtype: Any
) -> bool:
    """Return whether `dense_sums` are expected to be clearly the faster ones.

    In bytes a token, a product counted as what is moved in its time: X products of its
    rows, written and read, beside one of depth EI, its E rows written and X of them
    read. Float32 keeps its products of three.
    """
    if jnp.dtype(dtype).itemsize != 2:
        return False
    picks = num_rows / num_tokens
    steps = picks * outer * (2 * inner / TRITON_RATE + 4)
    dense = inner * (2 * groups * outer / DENSE_RATE + 2 * (groups + picks))
    return dense < DENSE_GAIN * steps


def _project_sum(rows, w, packing, transpose):
    """Return each token's sum of its rows times their weights, the faster way."""
    groups, *sides = w.shape
    inner, outer = reversed(sides) if transpose else sides
    sizes = rows.shape[0], packing.row_ids.shape[0], groups, inner, outer
    run = dense_sums if dense_pays(*sizes, rows.dtype) else two_step_sums
    return run(rows, w, packing, transpose=transpose)


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _precision(dtype) -> str:
    # Float32 by three tf32 products: errors of float32, not of tf32.
    return "tf32x3" if dtype == jnp.float32 else "tf32"


@jax.custom_vjp
def _grouped(x, w, offsets):
    return products(x, w, offsets, None, transpose=False)


def _grouped_fwd(x, w, offsets):
    return _grouped(x, w, offsets), (x, w, offsets)


def _grouped_bwd(saved, grad):
    x, w, offsets = saved
    dx = products(grad, w, offsets, None, transpose=True)
    return dx, weight_grads(x, grad, offsets, None, None), None


@jax.custom_vjp
def _gather_project(x, w, packing):
    return products(x, w, packing.group_offsets, packing.token_ids, transpose=False)


def _gather_project_fwd(x, w, packing):
    return _gather_project(x, w, packing), (x, w, packing)


def _gather_project_bwd(saved, grad):
    x, w, packing = saved
    offsets, ids = packing.group_offsets, packing.token_ids
    dw = weight_grads(x, grad, offsets, ids, None)
    return _project_sum(grad, w, packing, True), dw, None


@jax.custom_vjp
def _project_scatter(rows, w, packing):
    return _project_sum(rows, w, packing, False)


def _project_scatter_fwd(rows, w, packing):
    return _project_scatter(rows, w, packing), (rows, w, packing)


def _project_scatter_bwd(saved, grad):
    rows, w, packing = saved
    offsets, ids = packing.group_offsets, packing.token_ids
    drows = products(grad, w, offsets, ids, transpose=True)
    return drows, weight_grads(rows, grad, offsets, None, ids), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)
_gather_project.defvjp(_gather_project_fwd, _gather_project_bwd)
_project_scatter.defvjp(_project_scatter_fwd, _project_scatter_bwd)

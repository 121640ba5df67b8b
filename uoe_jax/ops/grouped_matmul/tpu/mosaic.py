"""Grouped matmul on TPU, with the gather before it and the sum after it.

Tokens are gathered inside the kernels, row by row, so the M gathered rows of a packing
exist only a tile at a time; x itself is never held more than once. Widths that aren't
multiples of 128 are gathered by XLA.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops import tpu
from uoe_jax.ops.grouped_matmul.derivative import (
    Products,
    gathered,
    grouped,
    scattered,
)
from uoe_jax.ops.grouped_matmul.float8 import forward_form
from uoe_jax.ops.grouped_matmul.tpu.kernels import (
    Tiles,
    products,
    weight_gradients,
)
from uoe_jax.ops.grouped_matmul.tpu.rows import sum_rows
from uoe_jax.ops.packing import Packing, combine_rows, gather_rows
from uoe_jax.ops.tpu import LANES, Target, round_up
from uoe_jax.varying import vary_together


def grouped_matmul(
    x: Float[Array, "M I"], w: Float[Array, "E I O"], offsets: Int[Array, " E1"]
) -> Float[Array, "M O"]:
    """Return each row times its group's weight; rows past the last group are zero.

    Raises:
      NotImplementedError: no TPU, or a dtype or width the kernels don't take.
    """
    target = _target(x)
    if x.shape[0] == 0:
        return jnp.zeros((0, w.shape[2]), x.dtype)
    x, w, offsets = vary_together(x, w, offsets)
    padded = tpu.pad_rows(x, round_up(x.shape[0], LANES))
    check_tiles(target, padded.shape[0], w, PLAIN)
    return grouped(forward_form(_backend(target)), padded, w, offsets)[: x.shape[0]]


def gather_project(
    x: Float[Array, "N I"], w: Float[Array, "E I O"], packing: Packing
) -> Float[Array, "M O"]:
    """Return each row's token times the row's expert weight; keeps only x and w.

    Raises:
      NotImplementedError: as `grouped_matmul`.
    """
    target = _target(x)
    x, w, packing = packing.together(x, w)
    if (
        fits(target, _padded_rows(packing.token_ids), w, PICKED)
        and x.shape[1] % LANES == 0
    ):
        return gathered(forward_form(_backend(target)), x, w, packing)
    return grouped_matmul(gather_rows(x, packing), w, packing.group_offsets)


def project_scatter(
    rows: Float[Array, "M I"], w: Float[Array, "E I O"], packing: Packing
) -> Float[Array, "N O"]:
    """Return each token's sum of its rows times their expert weights.

    Raises:
      NotImplementedError: as `grouped_matmul`.
    """
    target = _target(rows)
    rows, w, packing = packing.together(rows, w)
    if (
        fits(target, _padded_rows(packing.token_ids), w, SUMMED)
        and w.shape[2] % LANES == 0
    ):
        return scattered(forward_form(_backend(target)), rows, w, packing)
    return combine_rows(grouped_matmul(rows, w, packing.group_offsets), packing)


def _target(x: jax.Array) -> Target:
    target = tpu.current_target()
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"TPUs multiply bfloat16 or float32, not {x.dtype}")
    return target


# What a kernel does with its rows: reads and writes them as they lie, picks rows of x
# or of the gradient by number, or writes them apart for others to pick.
Rows = Literal["plain", "pick x", "pick grad", "apart"]


def choose_tiles(
    target: Target,
    op: str,
    num_rows: int,
    depth: int,
    width: int,
    dtype,
    rows: Rows = "plain",
) -> Tiles:
    """Return tile sides for `[M, depth] x [E, depth, width]`: tuned or modelled.

    Rows stream past a weight block that stays; so first as many rows, then as much of
    the weight as fit beside their double buffers.
    """
    shape = {"inner": depth, "outer": width, "dtype": jnp.dtype(dtype).name}
    modelled = _model_tiles(target, op, num_rows, depth, width, dtype, rows)
    sides = tpu.choose(op, shape | {"rows": rows}, target, modelled)
    sides |= _fixed(rows, depth, width)
    sides["rows"] = min(sides["rows"], num_rows)
    if op == "grouped_matmul" and depth % sides["inner"]:
        sides["inner"] = depth  # a sum has no partial blocks
    return Tiles(target=target, vmem=_bytes(op, sides, dtype, rows), **sides)


# How the forward product, the gradient of its rows and that of its weights treat rows.
PLAIN: tuple[Rows, Rows, Rows] = ("plain", "plain", "plain")
PICKED: tuple[Rows, Rows, Rows] = ("pick x", "apart", "pick x")
SUMMED: tuple[Rows, Rows, Rows] = ("apart", "pick x", "pick grad")


def check_tiles(
    target: Target,
    num_rows: int,
    w: jax.Array | jax.ShapeDtypeStruct,
    kinds: tuple[Rows, Rows, Rows],
) -> None:
    """Raise now what the forward or backward pass would raise later.

    Raises:
      NotImplementedError: the tiles of one of the three kernels don't fit in VMEM.
    """
    _, depth, width = w.shape
    forward, backward, weights = kinds
    for op, inner, outer, rows in (
        ("grouped_matmul", depth, width, forward),
        ("grouped_matmul", width, depth, backward),
        ("grouped_matmul_dw", depth, width, weights),
    ):
        choose_tiles(target, op, num_rows, inner, outer, w.dtype, rows)


def fits(
    target: Target,
    num_rows: int,
    w: jax.Array | jax.ShapeDtypeStruct,
    kinds: tuple[Rows, Rows, Rows],
) -> bool:
    """Return whether the tiles of all three kernels fit in VMEM."""
    try:
        check_tiles(target, num_rows, w, kinds)
    except NotImplementedError:
        return False
    return True


def _fixed(rows: Rows, depth: int, width: int) -> dict[str, int]:
    """Return the sides that can't be split: a row is copied whole."""
    if rows == "pick x":
        return {"inner": depth}
    return {"outer": width} if rows in ("pick grad", "apart") else {}


def _model_tiles(target, op, num_rows, depth, width, dtype, rows):
    side = max(512, 2 * target.generation.mxu_side)
    fixed = _fixed(rows, depth, width)
    sides = {
        "rows": min(512, 1 << (num_rows.bit_length() - 1)),
        "inner": depth if op == "grouped_matmul" else min(depth, 2 * side),
        "outer": min(round_up(width, LANES), 2 * side),
    } | fixed
    budget = target.generation.vmem_budget
    least = {
        "outer": 256,
        "rows": 128 if fixed else 256,
        "inner": 128 if fixed else 512,
    }
    while _bytes(op, sides, dtype, rows) > budget:
        # The weight block first narrows, then the rows, then the sum is split.
        for name in least:
            half = sides[name] // 2
            exact = name != "inner" or op != "grouped_matmul" or depth % half == 0
            free = name not in fixed and half >= least[name] and half % LANES == 0
            if free and exact:
                sides[name] = half
                break
        else:
            raise NotImplementedError(
                f"blocks {sides} of {depth} x {width} weights need more than "
                f"{budget // tpu.MIB} MiB of {target.generation.name}'s VMEM"
            )
    return sides


def _bytes(op: str, sides: dict[str, int], dtype, rows: Rows) -> int:
    """Return the VMEM of one block each of rows, weights and outputs, in bytes."""
    count, inner, outer = sides["rows"], sides["inner"], sides["outer"]
    size, f32 = tpu.vmem_bytes, jnp.float32
    x, w, out = (count, inner), (inner, outer), (count, outer)
    kept = out if op == "grouped_matmul" else w
    total = sum(size(side, dtype, 2) for side in (x, w, out)) + size(kept, f32, 2)
    apart = {"pick x": inner, "pick grad": outer, "apart": outer}.get(rows)
    if apart:  # the rows as they are copied, beside those the matrix unit takes
        total += size((count, -(-apart // LANES), LANES), dtype, 2)
    return total


@functools.cache
def _backend(target: Target) -> Products:
    run = lambda function: functools.partial(function, target)
    return Products(run(_products), run(_sums), run(_weight_grads))


def _products(target, x, w, offsets, ids, *, transpose):
    if ids is None:
        return _multiply(target, x, w, offsets, "plain", transpose=transpose)
    padded = _pad_ids(ids)
    how = {"transpose": transpose, "ids": padded}
    return _multiply(target, x, w, offsets, "pick x", **how)[: ids.shape[0]]


def _sums(target, rows, w, packing, *, transpose):
    rows = tpu.pad_rows(rows, _padded_rows(packing.token_ids))
    offsets = packing.group_offsets
    out = _multiply(target, rows, w, offsets, "apart", transpose=transpose)
    # Picks without a row take the first row of no group.
    row_ids = jnp.minimum(packing.row_ids, packing.token_ids.shape[0])
    return sum_rows(out, row_ids, target)


def _weight_grads(target, x, grad, offsets, x_ids, grad_ids):
    rows, ids = "plain", None
    if x_ids is not None:
        rows, ids = "pick x", _pad_ids(x_ids)
        grad = tpu.pad_rows(grad, _padded_rows(x_ids))
    if grad_ids is not None:
        rows, ids = "pick grad", _pad_ids(grad_ids)
        x = tpu.pad_rows(x, _padded_rows(grad_ids))
    num_rows = x.shape[0] if rows == "pick grad" else grad.shape[0]
    sides = x.shape[1], grad.shape[1]
    tiles = choose_tiles(target, "grouped_matmul_dw", num_rows, *sides, x.dtype, rows)
    w = jax.ShapeDtypeStruct((offsets.shape[0] - 1, *sides), x.dtype)
    picks_grad = rows == "pick grad"
    return weight_gradients(x, grad, offsets, w, tiles, ids=ids, picks_grad=picks_grad)


def _multiply(target, x, w, offsets, rows, *, transpose, ids=None):
    depth, width = w.shape[1:][::-1] if transpose else w.shape[1:]
    num_rows = x.shape[0] if ids is None else ids.shape[0]
    tiles = choose_tiles(
        target, "grouped_matmul", num_rows, depth, width, x.dtype, rows
    )
    how = dict(transpose=transpose, ids=ids, rows_apart=rows == "apart")
    return products(x, w, offsets, tiles, **how)


def _padded_rows(ids: Int[Array, " M"]) -> int:
    """Return M in whole grains, with at least one row of no group: it stays zero."""
    return round_up(ids.shape[0] + 1, LANES)


def _pad_ids(ids: Int[Array, " M"]) -> Int[Array, " M2"]:
    return tpu.pad_rows(ids.astype(jnp.int32), _padded_rows(ids))

"""Which tiles the Triton products take, and which way of adding rows up pays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from uoe_jax.ops import _triton, _tuning

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
    in_turn: int = 0  # of products: programs a multiprocessor, tile after tile; 0: all
    ahead: bool = False  # of weight gradients: ids are read a step before their rows


def choose_tiles(op: str, shape: Mapping[str, Any]) -> Tiles:
    """Return the tile that measured fastest near this shape, or one that must fit.

    No side is twice this shape's own or more. Outside the tables a tile is as wide as
    the result up to 256 columns, and its stages are what shared memory holds.
    """
    depth, columns = (max(16, power_above(shape[side])) for side in ("inner", "outer"))
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


def power_above(number: int) -> int:
    """Return the least power of two that isn't below a number."""
    return 1 << (number - 1).bit_length()

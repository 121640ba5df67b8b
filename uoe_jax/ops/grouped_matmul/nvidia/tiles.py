"""Which tiles the Triton products take, and which way of adding rows up pays."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from uoe_jax.hardware import gemm, step_products
from uoe_jax.hardware.product import Product
from uoe_jax.ops import measured, nvidia


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


# What is tried where tiles are measured or predicted.
CANDIDATES = {
    "products": (
        Tiles(128, 64, 256, 8, 8, 3),
        Tiles(128, 64, 256, 8, 8, 4),
        Tiles(128, 64, 256, 16, 8, 4),
        Tiles(256, 64, 128, 16, 8, 4),
        Tiles(128, 64, 128, 16, 4, 3),  # two programs a multiprocessor
        Tiles(128, 64, 256, 8, 8, 3, in_turn=1),
        Tiles(128, 64, 256, 8, 8, 4, in_turn=1),
        Tiles(128, 64, 128, 8, 4, 3, in_turn=2),
        Tiles(64, 64, 256, 8, 8, 4),  # for groups of few rows
        Tiles(64, 64, 128, 8, 4, 4),
    ),
    "weight_grads": (
        Tiles(32, 128, 256, 16, 8, 5),
        Tiles(32, 128, 256, 16, 8, 7),
        Tiles(64, 128, 256, 8, 8, 3),
        Tiles(64, 128, 128, 8, 8, 4),
        Tiles(64, 128, 256, 8, 8, 4, ahead=True),
        Tiles(32, 128, 256, 16, 8, 7, ahead=True),
        Tiles(64, 256, 128, 8, 8, 4, ahead=True),
        Tiles(64, 128, 128, 8, 8, 5, ahead=True),
    ),
}


def choose_tiles(op: str, shape: Mapping[str, Any]) -> Tiles:
    """Return a tile for a shape, none of its sides twice the shape's own or more.

    The one that measured fastest at this shape or one close to it; else the one that
    the device's model of products predicts fastest; else the nearest measured. Without
    any a tile is as wide as the result up to 256 columns, and its stages are what
    shared memory holds.
    """
    depth, columns = (max(16, power_above(shape[side])) for side in ("inner", "outer"))
    found = measured.tiles(op, shape, within=measured.CLOSE)
    tile = Tiles(**found) if found else predict_tiles(op, shape)
    if tile is None and (found := measured.tiles(op, shape)) is not None:
        tile = Tiles(**found)
    if tile is not None:
        return cut_tiles(tile, shape)
    wide = shape["dtype"] == "float32"
    columns = min(128 if wide else 256, columns)
    if op == "weight_grads":
        # Few rows at a time and many stages: ids are loaded before the rows they name.
        rows, inner, most = 32, min(128, depth), 5
        stage = rows * (inner + columns)
    else:
        rows, inner, most = 128, min(32 if wide else 64, depth), 4
        stage = inner * (rows + columns)
    held = nvidia.shared_memory() // (stage * (4 if wide else 2))
    stages = max(1, min(most, held))
    return Tiles(rows, inner, columns, band=16, num_warps=8, num_stages=stages)


def cut_tiles(tile: Tiles, shape: Mapping[str, Any]) -> Tiles:
    """Return a tile with no side twice a shape's own or more."""
    depth, columns = (max(16, power_above(shape[side])) for side in ("inner", "outer"))
    return tile._replace(inner=min(tile.inner, depth), outer=min(tile.outer, columns))


def predict_tiles(op: str, shape: Mapping[str, Any]) -> Tiles | None:
    """Return the tile that the device's model predicts fastest; None without one."""
    if shape["dtype"] != "bfloat16" or "groups" not in shape:
        return None  # few others were timed
    return _predict(measured.device_kind(), op, tuple(sorted(shape.items())))


@functools.cache
def _predict(kind: str, op: str, sides: tuple[tuple[str, Any], ...]) -> Tiles | None:
    model, shape = gemm.find(kind), dict(sides)
    if model is None or op not in model.trees:
        return None
    tried = list(dict.fromkeys(cut_tiles(tile, shape) for tile in CANDIDATES[op]))
    plain = [tuple(int(side) for side in tile) for tile in tried]
    common = {"groups": shape["groups"], "kernel": op, "tile": plain[0]}
    if op == "weight_grads":
        sizes = {"m": shape["inner"], "n": shape["outer"], "k": shape["rows"]}
        gather = "" if shape["gather"] == "none" else shape["gather"].split(" ")[-1]
        product = Product(**sizes, layout="tn", gather=gather, **common)
    else:
        sizes = {"m": shape["rows"], "n": shape["outer"], "k": shape["inner"]}
        layout = "nt" if shape["transpose"] else "nn"
        gather = "x" if shape["gather"] else ""
        product = Product(**sizes, layout=layout, gather=gather, **common)
    return tried[plain.index(gemm.choose_tile(model, product, plain))]


def dense_pays(
    num_rows: int, num_tokens: int, groups: int, inner: int, outer: int, dtype: Any
) -> bool:
    """Return whether `dense_sums` are expected to be clearly the faster ones."""
    sides = (num_rows, num_tokens, groups, inner, outer)
    return step_products.dense_pays(*sides, jnp.dtype(dtype).itemsize)


def power_above(number: int) -> int:
    """Return the least power of two that isn't below a number."""
    return 1 << (number - 1).bit_length()

"""Narrow experts' MLPs on NVIDIA GPUs: one kernel each way, sums in a fixed order."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

from uoe_jax.ops import nvidia
from uoe_jax.ops.float8 import chosen_scales
from uoe_jax.ops.grouped_matmul.nvidia.launch import map_tiles, sum_rows, weight_grads
from uoe_jax.ops.grouped_matmul.nvidia.tiles import power_above
from uoe_jax.ops.numerics import PROJECTION
from uoe_jax.ops.packing import Packing
from uoe_jax.varying import vary_together


class Tiles(NamedTuple):
    """Sides of a tile, and how it is compiled."""

    rows: int
    inner: int  # entries of a token at a time, of the first product
    hidden: int  # hidden columns at a time
    outer: int  # columns of the second product at a time
    num_warps: int
    num_stages: int


# The fastest of eleven and of eight on an H200, at 524288 rows of width 512 and 256.
FORWARD = Tiles(128, 64, 256, 64, 8, 4)
BACKWARD = Tiles(128, 64, 256, 64, 8, 4)
WIDEST = 256  # hidden columns: a tile's rows of them are registers of one program


def cut_tiles(tiles: Tiles, width: int, hidden: int) -> Tiles:
    """Return tiles with no side twice a call's own or more."""
    wide, narrow = (max(16, power_above(side)) for side in (width, hidden))
    return tiles._replace(
        inner=min(tiles.inner, wide),
        hidden=min(tiles.hidden, narrow),
        outer=min(tiles.outer, wide),
    )


def _constants(
    w_up: Float[Array, "E D F"], tiles: Tiles, tile_map: Int[Array, "3 C"]
) -> dict[str, Any]:
    experts, width, hidden = w_up.shape
    return {
        "grid": tile_map.shape[1],
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "TILES": tile_map.shape[1],
        "D": width,
        "F": hidden,
        "E": experts,
        "ROWS": tiles.rows,
        "INNER": tiles.inner,
        "HIDDEN": tiles.hidden,
        "OUTER": tiles.outer,
        "ROUGH": w_up.dtype != jnp.float32 and not nvidia.is_interpreted(),
        "PRECISION": "tf32x3" if w_up.dtype == jnp.float32 else "tf32",
    }


@functools.partial(jax.jit, static_argnames=("saves", "tiles"))
def forward(
    x: Float[Array, "N D"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    factors: Float32[Array, " M"],
    packing: Packing,
    tiles: Tiles | None = None,
    saves: bool = True,
) -> list[Array]:
    """Return rows' ups [M, F], their activations times factors, and results [M, D].

    Unless it `saves` them the first two are [1, F] of any content.
    """
    from uoe_jax.ops.expert_mlp.nvidia import kernels

    rows, (_, width, hidden) = packing.token_ids.shape[0], w_up.shape
    tiles = cut_tiles(tiles or FORWARD, width, hidden)
    tile_map = map_tiles(packing.group_offsets, rows, tiles.rows)
    kept = rows if saves else 1
    return nvidia.launch(
        kernels.forward,
        x,
        w_up,
        w_down,
        factors,
        tile_map,
        packing.token_ids,
        out_shape=[
            ((kept, hidden), x.dtype),
            ((kept, hidden), x.dtype),
            ((rows, width), x.dtype),
        ],
        SAVES=saves,
        **_constants(w_up, tiles, tile_map),
    )


@functools.partial(jax.jit, static_argnames=("tiles",))
def backward(
    grad: Float[Array, "N D"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    factors: Float32[Array, " M"],
    ups: Float[Array, "M F"],
    packing: Packing,
    tiles: Tiles | None = None,
) -> list[Array]:
    """Return gradients by row: of ups [M, F], factors [M], tokens [M, D]."""
    from uoe_jax.ops.expert_mlp.nvidia import kernels

    rows, (_, width, hidden) = packing.token_ids.shape[0], w_up.shape
    tiles = cut_tiles(tiles or BACKWARD, width, hidden)
    tile_map = map_tiles(packing.group_offsets, rows, tiles.rows)
    return nvidia.launch(
        kernels.backward,
        grad,
        w_up,
        w_down,
        factors,
        ups,
        tile_map,
        packing.token_ids,
        out_shape=[
            ((rows, hidden), grad.dtype),
            ((rows,), jnp.float32),
            ((rows, width), grad.dtype),
        ],
        **_constants(w_up, tiles, tile_map),
    )


def expert_mlp(
    x: Float[Array, "N D"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    factors: Float32[Array, " M"],
    packing: Packing,
) -> Float[Array, "N D"]:
    """Return each token's sum of factor * (gelu(x w_up) w_down) over its rows.

    Raises:
      NotImplementedError: no fit device, package or dtype, an empty array, or hidden
        sides too wide to stay in registers.
    """
    nvidia.require(x.dtype)
    if 0 in (*x.shape, *w_up.shape, *packing.row_ids.shape, *packing.token_ids.shape):
        raise NotImplementedError("it takes no empty arrays")
    if chosen_scales() != "none":
        raise NotImplementedError("its operands aren't rounded to eight bits")
    if w_up.shape[2] > WIDEST:
        raise NotImplementedError(
            f"an expert is {w_up.shape[2]} wide; it takes up to {WIDEST}"
        )
    x, w_up, w_down, factors, *ids = vary_together(x, w_up, w_down, factors, *packing)
    ids = [each.astype(jnp.int32) for each in ids]
    return _expert_mlp(x, w_up, w_down, factors, Packing(*ids))


@jax.custom_vjp
def _expert_mlp(x, w_up, w_down, factors, packing):
    rows = forward(x, w_up, w_down, factors, packing, saves=False)[-1]
    return sum_rows(rows, packing.row_ids)


def _fwd(x, w_up, w_down, factors, packing):
    ups, hiddens, rows = forward(x, w_up, w_down, factors, packing)
    ups, hiddens = (checkpoint_name(a, PROJECTION) for a in (ups, hiddens))
    saved = x, w_up, w_down, factors, packing, ups, hiddens
    return sum_rows(rows, packing.row_ids), saved


def _bwd(saved, grad):
    x, w_up, w_down, factors, packing, ups, hiddens = saved
    offsets, ids = packing.group_offsets, packing.token_ids
    d_ups, d_factors, rows = backward(grad, w_up, w_down, factors, ups, packing)
    d_w_up = weight_grads(x, d_ups, offsets, ids, None)
    d_w_down = weight_grads(hiddens, grad, offsets, None, ids)
    return sum_rows(rows, packing.row_ids), d_w_up, d_w_down, d_factors, None


_expert_mlp.defvjp(_fwd, _bwd)

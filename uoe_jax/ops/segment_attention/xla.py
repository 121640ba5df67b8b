"""Segment attention in plain JAX: any device, memory linear in the rows."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from uoe_jax.ops.segment_attention.blockwise import Options, blockwise_attention
from uoe_jax.ops.segment_attention.layout import segment_layout


def segment_attention(
    q: Float[Array, "M G H"],
    k: Float[Array, "M H"],
    v: Float[Array, "M H"],
    offsets: Int[Array, " S1"],
    *,
    causal: bool,
    window: int | None,
    bounds: tuple[Int[Array, " M"], Int[Array, " M"]] | None,
    scale: float,
) -> Float[Array, "M G H"]:
    """Return blockwise attention inside each segment."""
    num_rows, groups, _ = q.shape
    if num_rows == 0:
        return q
    mean = num_rows // (offsets.shape[0] - 1)
    block, chunk = choose_tile(num_rows, mean, groups)
    layout = segment_layout(
        offsets, num_rows, block, causal=causal, window=window, bounds=bounds
    )
    # Without a window, all blocks of a full segment need the same key blocks.
    options = Options(
        scale, chunk, cyclic=not causal and window is None and bounds is None
    )
    return blockwise_attention(q, k, v, layout, options)


def choose_tile(num_rows: int, mean_rows: int, groups: int) -> tuple[int, int]:
    """Return the rows of a block and the blocks of a chunk, from measurement.

    A block is at most two thirds of a mean segment, so that little of it is padding.
    A chunk is what one step works on: enough to hide its fixed cost.
    """
    if jax.default_backend() == "cpu":
        largest, rows = 64, 1024 if num_rows < 8192 else 2048
    else:
        largest, rows = 256, 65536
    block = 16
    while block < largest and block * 3 <= mean_rows:
        block *= 2
    num_blocks = -(-num_rows // block)
    return block, min(num_blocks, max(1, rows // (block * groups)))

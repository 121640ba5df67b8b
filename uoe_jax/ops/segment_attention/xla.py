"""Segment attention in plain JAX: any device, memory linear in the rows."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from uoe_jax.ops.segment_attention.blockwise import Options, blockwise_attention
from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.layout import segment_layout


def segment_attention(call: Call) -> Float[Array, "M G H"]:
    """Return blockwise attention inside each segment."""
    num_rows, groups, _ = call.q.shape
    if num_rows == 0:
        return call.q
    mean = num_rows // (call.offsets.shape[0] - 1)
    block, chunk = choose_tile(num_rows, mean, groups)
    layout = segment_layout(call.offsets, num_rows, block, call.mask, call.bounds)
    # Without a window, all blocks of a full segment need the same key blocks.
    whole = call.mask == Mask(causal=False) and call.bounds is None
    options = Options(call.scale, chunk, cyclic=whole)
    return blockwise_attention(call.q, call.k, call.v, layout, options, call.sink)


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

"""Forward TPU kernel: one tile of queries, keys streamed past it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from uoe_jax.ops import tpu
from uoe_jax.ops.segment_attention.tpu import parts
from uoe_jax.ops.segment_attention.tpu.schedule import (
    diagonal_steps,
    read_tile,
    visible_ranges,
)
from uoe_jax.ops.tpu import LANES, matmul
from uoe_jax.varying import struct_varying


def _kernel(
    tiles,
    q_ref,
    own_k,
    own_v,
    bounds_ref,
    k_hbm,
    v_hbm,
    out_ref,
    lse_ref,
    k_ring,
    v_ring,
    semaphores,
    limits,  # [2, R, 128] bounds of each stacked row
    top_ref,  # [R, 128] running maximum
    sum_ref,  # [R, 128] running sum
    acc_ref,  # [R, H] output before scaling
    *,
    options: Any,
    groups: int,
):
    rows, chunk = options.rows, options.chunk
    sides = "left" if options.causal else "both"
    tile = read_tile(tiles, pl.program_id(0), rows, chunk, sides)
    streams = [parts.Stream(k_hbm, k_ring), parts.Stream(v_hbm, v_ring)]
    ring = parts.Ring(streams, semaphores, chunk, tile.piece)
    width = q_ref.shape[-1]

    def block(own, k, v, first_row, masked, first):
        if masked:
            k, v = (parts.clean(x, first_row, tile.low, tile.high) for x in (k, v))
        q = parts.stacked(q_ref, own)
        scores = matmul(q, k, (1, 1)) * (options.scale * parts.LOG2_E)
        if masked:
            shown = parts.seen(limits[0, own], limits[1, own], first_row, k.shape[0])
            scores = jnp.where(shown, scores, parts.HIDDEN)
        top = jnp.max(scores, axis=1, keepdims=True)
        shape = (scores.shape[0], LANES)
        top = jnp.broadcast_to(top, shape) if first else jnp.maximum(top_ref[own], top)
        weights = jnp.exp2(scores - parts.widen(top, k.shape[0]))
        total = jnp.broadcast_to(jnp.sum(weights, axis=1, keepdims=True), shape)
        add = matmul(weights.astype(v.dtype), v, (1, 0))
        if not first:
            keep = jnp.exp2(top_ref[own] - top)
            total += sum_ref[own] * keep
            add += acc_ref[own] * parts.widen(keep, width)
        top_ref[own], sum_ref[own], acc_ref[own] = top, total, add

    def stream(index, slot):
        first, size = tile.piece(index)

        def use(own, offset, size, masked):
            other = pl.ds(offset, size)
            k, v = k_ring[slot, other], v_ring[slot, other]
            block(own, k, v, first + offset, masked, False)

        parts.visit(tile, first, size, groups, use)

    def diagonal():
        for own, other in diagonal_steps(rows, groups, options.causal, True):
            stacked = own if groups == 1 else slice(0, groups * rows)
            block(stacked, own_k[other], own_v[other], tile.start, True, True)

    @pl.when(tile.live)
    def _():
        count = tile.num_chunks
        # The first copy runs under the diagonal, which needs no copy of its own.
        pl.when(count > 0)(lambda: ring.start(0))
        parts.stack_columns(bounds_ref, limits, groups)
        diagonal()
        ring.run(count, stream)
        _finish(out_ref, lse_ref, limits, top_ref, sum_ref, acc_ref)

    @pl.when(~tile.live)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        lse_ref[...] = jnp.full_like(lse_ref, parts.UNSEEN)


def _finish(out_ref, lse_ref, limits, top_ref, sum_ref, acc_ref):
    """Divide by the sums, and write the base-2 log-sums as rows."""
    groups, rows, width = out_ref.shape
    real = limits[1] > limits[0]
    total = jnp.where(real, sum_ref[...], 1.0)
    out = acc_ref[...] * parts.widen(1.0 / total, width)
    out = jnp.where(parts.widen(limits[1] - limits[0], width) > 0, out, 0.0)
    out_ref[...] = out.reshape(groups, rows, width).astype(out_ref.dtype)
    lse = jnp.where(real, top_ref[...] + jnp.log2(total), parts.UNSEEN)
    for group in range(groups):
        lse_ref[group : group + 1] = parts.as_row(
            lse[group * rows : (group + 1) * rows]
        )


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, edges: jax.Array, options: Any
) -> tuple[jax.Array, jax.Array]:
    """Return outputs `[G, M, H]` and base-2 log-sums `[G, M]` of head-major queries.

    FlashAttention-2 (arXiv 2307.08691), algorithm 1. M is a multiple of the tile.
    """
    groups, num_rows, width = q.shape
    rows, chunk = options.rows, options.chunk
    ranges = visible_ranges(edges, rows, causal=options.causal, window=options.window)
    own = pl.BlockSpec((rows, width), lambda i, tiles: (i, 0))
    stacked = pl.BlockSpec((groups, rows, width), lambda i, tiles: (0, i, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    f32 = jnp.float32
    scratch = [
        pltpu.VMEM((2, chunk, width), k.dtype),
        pltpu.VMEM((2, chunk, width), v.dtype),
        pltpu.SemaphoreType.DMA((2, 2)),
        pltpu.VMEM((2, groups * rows, LANES), jnp.int32),
        pltpu.VMEM((groups * rows, LANES), f32),
        pltpu.VMEM((groups * rows, LANES), f32),
        pltpu.VMEM((groups * rows, width), f32),
    ]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(num_rows // rows,),
        in_specs=[
            stacked,
            own,
            own,
            pl.BlockSpec((2, rows), lambda i, tiles: (0, i)),
            anywhere,
            anywhere,
        ],
        out_specs=[stacked, pl.BlockSpec((groups, rows), lambda i, tiles: (0, i))],
        scratch_shapes=scratch,
    )
    kernel = tpu.call(
        lambda *refs: _kernel(*refs, options=options, groups=groups),
        options.target,
        vmem=options.vmem,
        parallel=(True,),
        grid_spec=grid,
        out_shape=[
            struct_varying(q.shape, q.dtype, q),
            struct_varying((groups, num_rows), f32, q),
        ],
        cost_estimate=options.cost(q, products=2, arrays=4),
        name="segment_attention_forward",
    )
    out, lse = kernel(ranges.tiles, q, k, v, ranges.bounds, k, v)
    return out, lse

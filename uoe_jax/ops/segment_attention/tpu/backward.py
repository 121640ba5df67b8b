"""Backward TPU kernels: query gradients, then key and value gradients.

Each streams the other side past one tile, so sums run in a fixed order: the result is
the same on every run.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
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


def _query_kernel(
    tiles,
    q_ref,
    dout_ref,
    stats_ref,  # [G, 2, rows] log-sums and row sums of out * dout
    own_k,
    own_v,
    bounds_ref,
    k_hbm,
    v_hbm,
    dq_ref,
    k_ring,
    v_ring,
    semaphores,
    limits,  # [2, R, 128]
    stats,  # [2, R, 128]
    acc_ref,  # [R, H]
    *,
    options: Any,
):
    rows, chunk = options.rows, options.chunk
    groups, _, width = q_ref.shape
    sides = "left" if options.causal else "both"
    tile = read_tile(tiles, pl.program_id(0), rows, chunk, sides)
    streams = [parts.Stream(k_hbm, k_ring), parts.Stream(v_hbm, v_ring)]
    ring = parts.Ring(streams, semaphores, chunk, tile.piece)

    def block(own, k, v, first_row, masked, first):
        if masked:
            k, v = (parts.clean(x, first_row, tile.low, tile.high) for x in (k, v))
        size = k.shape[0]
        q = parts.stacked(q_ref, own)
        dout = parts.stacked(dout_ref, own)
        scores = matmul(q, k, (1, 1)) * (options.scale * parts.LOG2_E)
        if masked:
            shown = parts.seen(limits[0, own], limits[1, own], first_row, size)
            scores = jnp.where(shown, scores, parts.HIDDEN)
        weights = jnp.exp2(scores - parts.widen(stats[0, own], size))
        dweights = matmul(dout, v, (1, 1))
        dscores = weights * (dweights - parts.widen(stats[1, own], size))
        add = matmul(dscores.astype(k.dtype), k, (1, 0))
        acc_ref[own] = add if first else acc_ref[own] + add

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
        pl.when(count > 0)(lambda: ring.start(0))
        parts.stack_columns(bounds_ref, limits, groups)
        for group in range(groups):
            for kind in range(2):
                stats[kind, group * rows : (group + 1) * rows] = parts.as_columns(
                    stats_ref[group, kind : kind + 1]
                )
        diagonal()
        ring.run(count, stream)
        real = parts.widen(limits[1] - limits[0], width) > 0
        dq = jnp.where(real, acc_ref[...] * options.scale, 0.0)
        dq_ref[...] = dq.reshape(groups, rows, width).astype(dq_ref.dtype)

    @pl.when(~tile.live)
    def _():
        dq_ref[...] = jnp.zeros_like(dq_ref)


def _key_kernel(
    tiles,
    k_ref,
    v_ref,
    own_q,
    own_dout,
    own_stats,
    bounds_ref,
    q_hbm,
    dout_hbm,
    stats_hbm,
    dk_ref,
    dv_ref,
    q_ring,
    dout_ring,
    stats_ring,
    semaphores,
    limits,  # [2, rows, 128] bounds of the queries that see each key
    dk_acc,
    dv_acc,
    *,
    options: Any,
):
    rows, chunk = options.key_rows, options.key_chunk
    groups, width = own_q.shape[0], k_ref.shape[1]
    sides = "right" if options.causal else "both"
    tile = read_tile(tiles, pl.program_id(0), rows, chunk, sides)
    streams = [
        parts.Stream(q_hbm, q_ring),
        parts.Stream(dout_hbm, dout_ring),
        parts.Stream(stats_hbm, stats_ring, axis=1),
    ]
    # Heads are visited one by one: index = chunk * G + head.
    ring = parts.Ring(
        streams,
        semaphores,
        chunk,
        lambda index: tile.piece(lax.div(index, groups)),
        lambda source, index: source.at[lax.rem(index, groups)],
    )

    def block(own, q, dout, stats, first_row, masked):
        if masked:
            q, dout = (
                parts.clean(x, first_row, tile.low, tile.high) for x in (q, dout)
            )
        k, v = k_ref[own], v_ref[own]
        # Keys down, queries across: the log-sums then lie along the lanes.
        scores = matmul(k, q, (1, 1)) * (options.scale * parts.LOG2_E)
        if masked:
            shown = parts.seen(limits[0, own], limits[1, own], first_row, q.shape[0])
            scores = jnp.where(shown, scores, parts.HIDDEN)
        weights = jnp.exp2(scores - stats[0:1])
        dv_acc[own] += matmul(weights.astype(dout.dtype), dout, (1, 0))
        dweights = matmul(v, dout, (1, 1))
        dscores = weights * (dweights - stats[1:2])
        dk_acc[own] += matmul(dscores.astype(q.dtype), q, (1, 0))

    def stream(index, slot):
        first, size = tile.piece(lax.div(index, groups))

        def use(own, offset, size, masked):
            other = pl.ds(offset, size)
            q, dout = q_ring[slot, other], dout_ring[slot, other]
            block(own, q, dout, stats_ring[slot, :, other], first + offset, masked)

        parts.visit(tile, first, size, 1, use)

    def diagonal(group, _=None):
        for own, other in diagonal_steps(rows, 1, options.causal, False):
            q, dout = own_q[group, other], own_dout[group, other]
            stats = own_stats[group, :, other]
            block(own, q, dout, stats, tile.start + other.start, True)

    @pl.when(tile.live)
    def _():
        count = tile.num_chunks * groups
        pl.when(count > 0)(lambda: ring.start(0))
        parts.stack_columns(bounds_ref, limits, 1)
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)
        lax.fori_loop(0, groups, diagonal, None)
        ring.run(count, stream)
        real = parts.widen(limits[1] - limits[0], width) > 0
        dk = jnp.where(real, dk_acc[...] * options.scale, 0.0)
        dk_ref[...] = dk.astype(dk_ref.dtype)
        dv_ref[...] = jnp.where(real, dv_acc[...], 0.0).astype(dv_ref.dtype)

    @pl.when(~tile.live)
    def _():
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)


def query_gradient(q, k, v, edges, dout, stats, options: Any) -> jax.Array:
    """Return dq `[G, M, H]`; stats `[G, 2, M]` are log-sums and out * dout sums."""
    groups, num_rows, width = q.shape
    rows, chunk = options.rows, options.chunk
    ranges = visible_ranges(edges, rows, causal=options.causal, window=options.window)
    own = pl.BlockSpec((rows, width), lambda i, tiles: (i, 0))
    stacked = pl.BlockSpec((groups, rows, width), lambda i, tiles: (0, i, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(num_rows // rows,),
        in_specs=[
            stacked,
            stacked,
            pl.BlockSpec((groups, 2, rows), lambda i, tiles: (0, 0, i)),
            own,
            own,
            pl.BlockSpec((2, rows), lambda i, tiles: (0, i)),
            anywhere,
            anywhere,
        ],
        out_specs=stacked,
        scratch_shapes=[
            pltpu.VMEM((2, chunk, width), k.dtype),
            pltpu.VMEM((2, chunk, width), v.dtype),
            pltpu.SemaphoreType.DMA((2, 2)),
            pltpu.VMEM((2, groups * rows, LANES), jnp.int32),
            pltpu.VMEM((2, groups * rows, LANES), jnp.float32),
            pltpu.VMEM((groups * rows, width), jnp.float32),
        ],
    )
    kernel = tpu.call(
        lambda *refs: _query_kernel(*refs, options=options),
        options.target,
        vmem=options.vmem,
        parallel=(True,),
        grid_spec=grid,
        out_shape=struct_varying(q.shape, q.dtype, q),
        cost_estimate=options.cost(q, products=3, arrays=5),
        name="segment_attention_dq",
    )
    return kernel(ranges.tiles, q, dout, stats, k, v, ranges.bounds, k, v)


def key_gradients(q, k, v, edges, dout, stats, options: Any) -> tuple:
    """Return dk and dv `[M, H]`, summed over the G query heads of each key."""
    groups, num_rows, width = q.shape
    rows, chunk = options.key_rows, options.key_chunk
    ranges = visible_ranges(
        edges,
        rows,
        causal=options.causal,
        window=options.window,
        seen_by=True,
    )
    own = pl.BlockSpec((rows, width), lambda i, tiles: (i, 0))
    stacked = pl.BlockSpec((groups, rows, width), lambda i, tiles: (0, i, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(num_rows // rows,),
        in_specs=[
            own,
            own,
            stacked,
            stacked,
            pl.BlockSpec((groups, 2, rows), lambda i, tiles: (0, 0, i)),
            pl.BlockSpec((2, rows), lambda i, tiles: (0, i)),
            anywhere,
            anywhere,
            anywhere,
        ],
        out_specs=[own, own],
        scratch_shapes=[
            pltpu.VMEM((2, chunk, width), q.dtype),
            pltpu.VMEM((2, chunk, width), q.dtype),
            pltpu.VMEM((2, 2, chunk), jnp.float32),
            pltpu.SemaphoreType.DMA((3, 2)),
            pltpu.VMEM((2, rows, LANES), jnp.int32),
            pltpu.VMEM((rows, width), jnp.float32),
            pltpu.VMEM((rows, width), jnp.float32),
        ],
    )
    kernel = tpu.call(
        lambda *refs: _key_kernel(*refs, options=options),
        options.target,
        vmem=options.vmem,
        parallel=(True,),
        grid_spec=grid,
        out_shape=[struct_varying(x.shape, x.dtype, q) for x in (k, v)],
        cost_estimate=options.cost(q, products=4, arrays=6),
        name="segment_attention_dkv",
    )
    dk, dv = kernel(ranges.tiles, k, v, q, dout, stats, ranges.bounds, q, dout, stats)
    return dk, dv

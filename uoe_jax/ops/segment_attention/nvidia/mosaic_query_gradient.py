"""Gradient of the queries on Hopper: the forward loop again, from saved logsumexps."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from uoe_jax.ops.segment_attention.nvidia import mosaic_parts as parts
from uoe_jax.ops.segment_attention.nvidia.schedule import (
    ALIGN,
    END,
    ROW,
    SLOT,
    Plan,
    Rows,
)


def query_gradient(
    q: Float[Array, "M G H"],
    k: Float[Array, "M H"],
    v: Float[Array, "M H"],
    dout: Float[Array, "M G H"],
    stats: tuple[Float[Array, "G N2"], Float[Array, "G N2"]],
    plan: Plan,
    rows: Rows | None,
    options: parts.Options,
) -> Float[Array, "M G H"]:
    """Return dq; `stats` are logsumexp (base 2) and rowsum(dout * out) by slots."""
    groups, width = q.shape[1:]
    kernel = plgpu.kernel(
        partial(_kernel, options=options, groups=groups, has_rows=rows is not None),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=_scratch(options, width, q.dtype),
        grid=(options.cores,),
        grid_names=("core",),
        num_threads=options.consumers + 1,
        thread_name="wg",
        kernel_name="segment_attention_query_gradient",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return kernel(plan.rounds, plan.tiles, *(rows or ()), q, k, v, dout, *stats)


def _scratch(options: parts.Options, width: int, dtype) -> dict:
    wgs, stages = options.consumers, options.stages
    tile = partial(parts.tile_memory, width=width, dtype=dtype)
    ring = partial(plgpu.Barrier, num_barriers=stages)
    return {
        "q_s": tile(wgs, parts.WG_ROWS),
        "d_s": tile(wgs, parts.WG_ROWS),
        "k_s": tile(stages, options.key_block),
        "v_s": tile(stages, options.key_block),
        "o_s": parts.output_memory(wgs, width, dtype),
        "stats_s": plgpu.SMEM((wgs, 2, parts.WG_ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=wgs, num_arrivals=4),
        "q_free": plgpu.Barrier(num_arrivals=wgs),
        "full": ring(num_arrivals=2),
        "free": ring(num_arrivals=wgs),
        "clean": plgpu.Barrier(num_arrivals=wgs),
    }


def _kernel(rounds_ref, tiles_ref, *refs, options, groups, has_rows, **scratch):
    rows_refs, refs = (refs[:2], refs[2:]) if has_rows else (None, refs)
    *sources, dq_ref = refs
    wg = lax.axis_index("wg")
    work = parts.Work(rounds_ref, tiles_ref, groups)

    @pl.when(wg < options.consumers)
    def _consume():
        plgpu.set_max_registers(options.registers, action="increase")
        _consumer(wg, work, rows_refs, dq_ref, options, **scratch)

    @pl.when(wg == options.consumers)
    def _produce():
        plgpu.set_max_registers(parts.PRODUCER_REGISTERS, action="decrease")
        _producer(work, sources, options, **scratch)


def _producer(work, sources, options, **s):
    """Load a tile's queries and their gradients, then blocks of keys and values."""
    q_ref, k_ref, v_ref, d_ref, lse_ref, delta_ref = sources
    size, stages = options.key_block, options.stages
    block_rows = options.consumers * parts.WG_ROWS

    def tile(index, item, step):
        @pl.when(index > 0)
        def _():
            plgpu.barrier_wait(s["q_free"])

        for wg in range(options.consumers):
            start = pl.multiple_of(item[ROW] + wg * parts.WG_ROWS, ALIGN)
            here = pl.ds(start, parts.WG_ROWS), item.group
            place = item[SLOT] * block_rows + wg * parts.WG_ROWS
            there = item.group, pl.ds(place, parts.WG_ROWS)
            for source, target in (
                (q_ref.at[here], s["q_s"].at[wg]),
                (d_ref.at[here], s["d_s"].at[wg]),
                (lse_ref.at[there], s["stats_s"].at[wg, 0]),
                (delta_ref.at[there], s["stats_s"].at[wg, 1]),
            ):
                plgpu.copy_gmem_to_smem(source, target, s["q_full"].at[wg])

        def block(turn, step):
            slot = lax.rem(step, stages)
            start = item.origin + item.block(turn) * size
            here = pl.ds(pl.multiple_of(start, ALIGN), size)

            @pl.when(step >= stages)
            def _():
                plgpu.barrier_wait(s["free"].at[slot])

            for ref, target in ((k_ref, s["k_s"]), (v_ref, s["v_s"])):
                plgpu.copy_gmem_to_smem(
                    ref.at[here], target.at[slot], s["full"].at[slot]
                )
            return step + 1

        return lax.fori_loop(0, item.blocks, block, step)

    tiles, steps = work.loop(tile, jnp.int32(0))
    pl.when(tiles > 0)(lambda: plgpu.barrier_wait(s["q_free"]))
    parts.drain((s["free"],), steps, stages)


def _consumer(wg, work, rows_refs, dq_ref, options, **s):
    """Sum dS K over the blocks, for 64 queries of every tile."""
    width = s["q_s"].shape[2]
    shape = (parts.WG_ROWS, options.key_block)
    factor = options.scale * parts.LOG2E

    def tile(index, item, step):
        del index
        first_row = item[ROW] + wg * parts.WG_ROWS
        low, high = parts.visible(item, first_row, rows_refs, options, 0)
        plgpu.barrier_wait(s["q_full"].at[wg])
        layout = plgpu.Layout.WGMMA.reduce(1)
        lse = plgpu.load(s["stats_s"].at[wg, 0], layout=layout)
        delta = plgpu.load(s["stats_s"].at[wg, 1], layout=layout)
        plgpu.commit_smem()  # read before the copy engine writes the next tile's

        def block(turn, carry, *, masked):
            dq, step = carry
            slot = lax.rem(step, options.stages)
            plgpu.barrier_wait(s["full"].at[slot])
            first_key = item.origin + item.block(turn) * options.key_block
            if masked:
                keys = (s["k_s"].at[slot],)
                real = item[END] - first_key
                parts.blank_rows(keys, real, wg, s["clean"], options.consumers)

            def scores(x_ref, dp_ref):
                plgpu.wgmma(x_ref, s["q_s"].at[wg], s["k_s"].at[slot].T)
                plgpu.wgmma(dp_ref, s["d_s"].at[wg], s["v_s"].at[slot].T)
                x = plgpu.wgmma_accumulator_load(x_ref, wait_n=1)
                p = jnp.exp2(x * factor - lax.broadcast_in_dim(lse, shape, [0]))
                ds = p * (dp_ref[...] - lax.broadcast_in_dim(delta, shape, [0]))
                if masked:
                    ds = jnp.where(parts.seen(shape, first_key, low, high, 0), ds, 0.0)
                return ds.astype(s["k_s"].dtype)

            acc = plgpu.ACC(shape, jnp.float32)
            ds = pl.run_scoped(scores, acc, acc)
            dq = parts.accumulate(dq, ds, s["k_s"].at[slot], options)
            plgpu.barrier_arrive(s["free"].at[slot])
            return dq, step + 1

        carry = parts.filled((parts.WG_ROWS, width), 0.0), step
        body = partial(block, masked=False)
        carry = lax.fori_loop(0, item.whole, body, carry)
        body = partial(block, masked=True)
        dq, step = lax.fori_loop(item.whole, item.blocks, body, carry)
        plgpu.barrier_arrive(s["q_free"])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        dq = (dq * options.scale).astype(dq_ref.dtype)
        parts.store_rows(dq, s["o_s"], wg, dq_ref.at[:, item.group], item, first_row)
        return step

    work.loop(tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)

"""The forward kernel on Hopper (FlashAttention-3, arXiv 2407.08608, section 3)."""

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

LOWEST = -1e30  # a running maximum before any score; finite, so that no nan arises


def forward(
    q: Float[Array, "M G H"],
    k: Float[Array, "M H"],
    v: Float[Array, "M H"],
    plan: Plan,
    rows: Rows | None,
    num_slots: int,
    options: parts.Options,
) -> tuple[Float[Array, "M G H"], Float[Array, "G N2"]]:
    """Return the output and the logsumexp (base 2) by tile slots."""
    groups, width, wgs = q.shape[1], q.shape[2], options.consumers
    slots = parts.WG_ROWS * wgs * (num_slots + 1)  # and one for no tile
    body = partial(_kernel, options=options, groups=groups, has_rows=rows is not None)
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((groups, slots), jnp.float32),
        ),
        scratch_types=_scratch(options, width, q.dtype),
        grid=(options.cores,),
        grid_names=("core",),
        num_threads=wgs + 1,
        thread_name="wg",
        kernel_name="segment_attention_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return kernel(plan.rounds, plan.tiles, *(rows or ()), q, k, v)


def _scratch(options: parts.Options, width: int, dtype) -> dict:
    wgs, stages = options.consumers, options.stages
    tile = partial(parts.tile_memory, width=width, dtype=dtype)
    ring = partial(plgpu.Barrier, num_barriers=stages)
    return {
        "q_s": tile(wgs, parts.WG_ROWS),
        "k_s": tile(stages, options.key_block),
        "v_s": tile(stages, options.key_block),
        "o_s": parts.output_memory(wgs, width, dtype),
        "lse_s": plgpu.SMEM((wgs, parts.WG_ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=wgs),
        "q_free": plgpu.Barrier(num_arrivals=wgs),
        "k_full": ring(),
        "v_full": ring(),
        "k_free": ring(num_arrivals=wgs),
        "v_free": ring(num_arrivals=wgs),
        "turn": plgpu.Barrier(num_arrivals=wgs),
        "clean": plgpu.Barrier(num_arrivals=wgs),
    }


def _kernel(rounds_ref, tiles_ref, *refs, options, groups, has_rows, **scratch):
    rows_refs, (q_ref, k_ref, v_ref, o_ref, lse_ref) = (
        (refs[:2], refs[2:]) if has_rows else (None, refs)
    )
    wg = lax.axis_index("wg")
    work = parts.Work(rounds_ref, tiles_ref, groups)

    # Products keep their accumulators in registers, copies need nearly none: who copies
    # gives its registers to those who multiply.
    @pl.when(wg < options.consumers)
    def _consume():
        plgpu.set_max_registers(options.registers, action="increase")
        _consumer(wg, work, rows_refs, o_ref, lse_ref, options, **scratch)

    @pl.when(wg == options.consumers)
    def _produce():
        plgpu.set_max_registers(parts.PRODUCER_REGISTERS, action="decrease")
        _producer(work, q_ref, k_ref, v_ref, options, **scratch)


def _producer(work, q_ref, k_ref, v_ref, options, **s):
    """Load the tile's queries, then its blocks of keys and values, ahead of use."""
    size, stages = options.key_block, options.stages

    def tile(index, item, step):
        @pl.when(index > 0)
        def _():
            plgpu.barrier_wait(s["q_free"])

        for wg in range(options.consumers):
            start = item[ROW] + wg * parts.WG_ROWS
            start = pl.multiple_of(start, ALIGN)
            source = q_ref.at[pl.ds(start, parts.WG_ROWS), item.group]
            plgpu.copy_gmem_to_smem(source, s["q_s"].at[wg], s["q_full"].at[wg])

        def block(turn, step):
            slot = lax.rem(step, stages)
            start = item.origin + item.block(turn) * size
            source = pl.ds(pl.multiple_of(start, ALIGN), size)
            for ref, name in ((k_ref, "k"), (v_ref, "v")):

                @pl.when(step >= stages)
                def _(name=name):
                    plgpu.barrier_wait(s[name + "_free"].at[slot])

                plgpu.copy_gmem_to_smem(
                    ref.at[source],
                    s[name + "_s"].at[slot],
                    s[name + "_full"].at[slot],
                )
            return step + 1

        return lax.fori_loop(0, item.blocks, block, step)

    tiles, steps = work.loop(tile, jnp.int32(0))
    pl.when(tiles > 0)(lambda: plgpu.barrier_wait(s["q_free"]))
    parts.drain((s["k_free"], s["v_free"]), steps, stages)


def _consumer(wg, work, rows_refs, o_ref, lse_ref, options, **s):
    """Attend 64 queries of every tile to the blocks that the producer brings."""
    width = s["q_s"].shape[2]
    shape = (parts.WG_ROWS, options.key_block)
    factor = options.scale * parts.LOG2E

    def tile(index, item, step):
        del index
        first_row = item[ROW] + wg * parts.WG_ROWS
        low, high = parts.visible(item, first_row, rows_refs, options, 0)
        plgpu.barrier_wait(s["q_full"].at[wg])

        def block(turn, carry, *, masked):
            acc, top, total, step = carry
            slot = lax.rem(step, options.stages)
            plgpu.barrier_wait(s["k_full"].at[slot])

            def scores(ref):
                plgpu.wgmma(ref, s["q_s"].at[wg], s["k_s"].at[slot].T)
                if options.take_turns:
                    parts.meet(s["turn"])
                return ref[...]

            x = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
            plgpu.barrier_arrive(s["k_free"].at[slot])
            first_key = item.origin + item.block(turn) * options.key_block
            if masked:
                x = jnp.where(parts.seen(shape, first_key, low, high, 0), x, -jnp.inf)
            new_top = jnp.maximum(top, x.max(axis=1) * factor)
            shrink = jnp.exp2(top - new_top)
            p = jnp.exp2(x * factor - lax.broadcast_in_dim(new_top, shape, [0]))
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
            total = total * shrink + p.sum(axis=1)
            p = p.astype(s["v_s"].dtype)
            # The softmax is done when the turn is handed over: nothing of it may move
            # past this.
            acc, total, new_top, p = lax.optimization_barrier((acc, total, new_top, p))
            if options.take_turns:
                plgpu.barrier_arrive(s["turn"])
            plgpu.barrier_wait(s["v_full"].at[slot])
            if masked:
                real = item[END] - first_key
                values = (s["v_s"].at[slot],)
                parts.blank_rows(values, real, wg, s["clean"], options.consumers)
            if options.take_turns:
                plgpu.barrier_wait(s["turn"])
            acc = parts.accumulate(acc, p, s["v_s"].at[slot], options)
            plgpu.barrier_arrive(s["v_free"].at[slot])
            return acc, new_top, total, step + 1

        # The second warpgroup stays half a block behind the first, inside a tile only:
        # across tiles it would wait for queries that are loaded once it has finished.
        if options.take_turns:
            pl.when(wg == 1)(lambda: parts.meet(s["turn"]))
        carry = (
            parts.filled((parts.WG_ROWS, width), 0.0),
            parts.filled((parts.WG_ROWS,), LOWEST),
            parts.filled((parts.WG_ROWS,), 0.0),
            step,
        )
        body = partial(block, masked=False)
        carry = lax.fori_loop(0, item.whole, body, carry)
        body = partial(block, masked=True)
        carry = lax.fori_loop(item.whole, item.blocks, body, carry)
        if options.take_turns:
            pl.when(wg == 0)(lambda: parts.meet(s["turn"]))
        plgpu.barrier_arrive(s["q_free"])
        acc, top, total, step = carry

        # Rows past the last segment met no key: they return zero.
        total = jnp.where(total == 0.0, 1.0, total)
        out = acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])
        # The last tile's stores may still be reading the memory that is written next.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        s["lse_s"].at[wg][...] = top + jnp.log2(total)
        slot = item[SLOT] * (options.consumers * parts.WG_ROWS) + wg * parts.WG_ROWS
        parts.store_rows(
            out.astype(o_ref.dtype),
            s["o_s"],
            wg,
            o_ref.at[:, item.group],
            item,
            first_row,
        )
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            s["lse_s"].at[wg], lse_ref.at[item.group, pl.ds(slot, parts.WG_ROWS)]
        )
        return step

    work.loop(tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)

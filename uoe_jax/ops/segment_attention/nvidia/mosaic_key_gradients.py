"""Gradients of keys and values on Hopper, and of the queries where order is free."""

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

QUERIES = parts.WG_ROWS  # of a block
WGS = 2


def key_gradients(
    q: Float[Array, "M G H"],
    k: Float[Array, "M H"],
    v: Float[Array, "M H"],
    dout: Float[Array, "M G H"],
    stats: tuple[Float[Array, "G N2"], Float[Array, "G N2"]],
    plan: Plan,
    rows: Rows | None,
    options: parts.Options,
    dq: jax.Ref | None = None,
) -> tuple[Float[Array, "M H"], Float[Array, "M H"]]:
    """Return dk and dv, summed over query heads.

    With `dq` (float32 zeros `[M + 64, G, H]`) also adds the gradient of the queries
    without its factor `scale`, in an order that differs between runs.
    """
    groups, width = q.shape[1:]
    flags = {"has_rows": rows is not None, "fused": dq is not None}
    kernel = plgpu.kernel(
        partial(_kernel, options=options, groups=groups, **flags),
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2,
        scratch_types=_scratch(options, width, q.dtype, dq is not None),
        grid=(options.cores,),
        grid_names=("core",),
        num_threads=WGS + 1,
        thread_name="wg",
        kernel_name="segment_attention_key_gradients",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    more = () if dq is None else (dq,)
    return kernel(plan.rounds, plan.tiles, *(rows or ()), q, k, v, dout, *stats, *more)


def _scratch(options: parts.Options, width: int, dtype, fused: bool) -> dict:
    stages = options.stages
    tile = partial(parts.tile_memory, width=width, dtype=dtype)
    ring = partial(plgpu.Barrier, num_barriers=stages)
    scratch = {
        "k_s": tile(1, WGS * parts.WG_ROWS),
        "v_s": tile(1, WGS * parts.WG_ROWS),
        "q_s": tile(stages, QUERIES),
        "d_s": tile(stages, QUERIES),
        "o_s": parts.output_memory(WGS, width, dtype, fused),
        "lse_s": plgpu.SMEM((stages, QUERIES), jnp.float32),
        "delta_s": plgpu.SMEM((stages, QUERIES), jnp.float32),
        "k_full": plgpu.Barrier(num_arrivals=2),
        "k_free": plgpu.Barrier(num_arrivals=WGS),
        "full": ring(num_arrivals=4),
        "free": ring(num_arrivals=WGS),
        "clean": plgpu.Barrier(num_arrivals=WGS),
    }
    if fused:
        scratch["ds_s"] = parts.tile_memory(
            2, WGS * parts.WG_ROWS, width=QUERIES, dtype=dtype
        )
        scratch["shared"] = plgpu.Barrier(num_arrivals=WGS)
    return scratch


def _kernel(rounds_ref, tiles_ref, *refs, options, groups, has_rows, fused, **scratch):
    rows_refs, refs = (refs[:2], refs[2:]) if has_rows else (None, refs)
    dq_ref, refs = (refs[6], (*refs[:6], *refs[7:])) if fused else (None, refs)
    *sources, dk_ref, dv_ref = refs
    wg = lax.axis_index("wg")
    work = parts.Work(rounds_ref, tiles_ref, 1)

    @pl.when(wg < WGS)
    def _consume():
        plgpu.set_max_registers(options.registers, action="increase")
        targets = dk_ref, dv_ref, dq_ref
        _consumer(wg, work, rows_refs, targets, groups, options, **scratch)

    @pl.when(wg == WGS)
    def _produce():
        plgpu.set_max_registers(parts.PRODUCER_REGISTERS, action="decrease")
        _producer(work, sources, groups, options, **scratch)


def _slots(item: parts.Item) -> jax.Array:
    """Return the slot of the segment's first query."""
    return item[SLOT] * (WGS * parts.WG_ROWS) - (item[ROW] - item.origin)


def _producer(work, sources, groups, options, **s):
    """Load a tile's keys and values, then blocks of queries and their gradients."""
    q_ref, k_ref, v_ref, d_ref, lse_ref, delta_ref = sources
    stages, tile_rows = options.stages, WGS * parts.WG_ROWS

    def tile(index, item, step):
        @pl.when(index > 0)
        def _():
            plgpu.barrier_wait(s["k_free"])

        here = pl.ds(pl.multiple_of(item[ROW], ALIGN), tile_rows)
        for ref, target in ((k_ref, s["k_s"]), (v_ref, s["v_s"])):
            plgpu.copy_gmem_to_smem(ref.at[here], target.at[0], s["k_full"])

        def block(index, step):
            turn, group = lax.div(index, groups), lax.rem(index, groups)
            slot = lax.rem(step, stages)
            offset = item.block(turn) * QUERIES
            here = pl.ds(pl.multiple_of(item.origin + offset, ALIGN), QUERIES), group
            there = group, pl.ds(_slots(item) + offset, QUERIES)

            @pl.when(step >= stages)
            def _():
                plgpu.barrier_wait(s["free"].at[slot])

            for source, target in (
                (q_ref.at[here], s["q_s"]),
                (d_ref.at[here], s["d_s"]),
                (lse_ref.at[there], s["lse_s"]),
                (delta_ref.at[there], s["delta_s"]),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[slot], s["full"].at[slot])
            return step + 1

        return lax.fori_loop(0, item.blocks * groups, block, step)

    tiles, steps = work.loop(tile, jnp.int32(0))
    pl.when(tiles > 0)(lambda: plgpu.barrier_wait(s["k_free"]))
    parts.drain((s["free"],), steps, stages)


def _consumer(wg, work, rows_refs, targets, groups, options, **s):
    """Sum dS^T Q and P^T dO over the blocks, for 64 keys of every tile."""
    dk_ref, dv_ref, dq_ref = targets
    width, dtype = s["q_s"].shape[2], s["q_s"].dtype
    shape = (parts.WG_ROWS, QUERIES)
    mine = pl.ds(pl.multiple_of(wg * parts.WG_ROWS, parts.WG_ROWS), parts.WG_ROWS)

    def tile(index, item, step):
        del index
        first_key = item[ROW] + wg * parts.WG_ROWS
        plgpu.barrier_wait(s["k_full"])
        if dq_ref is not None:
            keys = (s["k_s"].at[0],)
            parts.blank_rows(keys, item[END] - item[ROW], wg, s["clean"], WGS)

        def block(index, carry, *, masked):
            dk, dv, step = carry
            turn, group = lax.div(index, groups), lax.rem(index, groups)
            slot = lax.rem(step, options.stages)
            first_row = item.origin + item.block(turn) * QUERIES
            plgpu.barrier_wait(s["full"].at[slot])
            count = None
            if masked:
                blocks = s["q_s"].at[slot], s["d_s"].at[slot]
                real = item[END] - first_row
                parts.blank_rows(blocks, real, wg, s["clean"], WGS)
                low, high = parts.visible(item, first_row, rows_refs, options, 1)
                count = parts.seen(shape, first_key, low, high, 1)
            p, ds = _weights(mine, slot, count, options, s)
            refs = s["d_s"].at[slot], s["q_s"].at[slot]
            if dq_ref is None:
                dv, dk = parts.accumulate_two((dv, dk), (p, ds), refs, options)
            else:
                half = s["ds_s"].at[lax.rem(step, 2)]
                half.at[mine][...] = ds
                plgpu.commit_smem()
                dv, dk = parts.accumulate_two((dv, dk), (p, ds), refs, options)
                parts.meet(s["shared"])
                target = dq_ref.at[:, group]
                _add_query_gradient(wg, half, target, first_row, item, options, s)
            plgpu.barrier_arrive(s["free"].at[slot])
            return dk, dv, step + 1

        zero = parts.filled((parts.WG_ROWS, width), 0.0)
        body = partial(block, masked=False)
        whole = item.whole * groups
        carry = lax.fori_loop(0, whole, body, (zero, zero, step))
        body = partial(block, masked=True)
        carry = lax.fori_loop(whole, item.blocks * groups, body, carry)
        dk, dv, step = carry
        plgpu.barrier_arrive(s["k_free"])
        for value, ref in ((dv, dv_ref), (dk * options.scale, dk_ref)):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            parts.store_rows(value.astype(dtype), s["o_s"], wg, ref, item, first_key)
        return step

    work.loop(tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _weights(mine, slot, count, options, s):
    """Return the transposed weights and the gradients of their scores, `[64, 64]`."""
    shape = (parts.WG_ROWS, QUERIES)
    layout = plgpu.Layout.WGMMA.reduce(0)
    factor, dtype = options.scale * parts.LOG2E, s["q_s"].dtype

    def statistic(name):
        value = plgpu.load(s[name].at[slot], layout=layout)
        return lax.broadcast_in_dim(value, shape, [1])

    def scores(x_ref, dp_ref):
        plgpu.wgmma(x_ref, s["k_s"].at[0].at[mine], s["q_s"].at[slot].T)
        plgpu.wgmma(dp_ref, s["v_s"].at[0].at[mine], s["d_s"].at[slot].T)
        lse = statistic("lse_s")
        x = plgpu.wgmma_accumulator_load(x_ref, wait_n=1)
        p = jnp.exp2(x * factor - lse)
        delta = statistic("delta_s")  # only now: registers are scarce before
        plgpu.commit_smem()  # read before the copy engine writes the next block's
        ds = p * (dp_ref[...] - delta)
        if count is not None:
            p, ds = jnp.where(count, p, 0.0), jnp.where(count, ds, 0.0)
        return p.astype(dtype), ds.astype(dtype)

    acc = plgpu.ACC(shape, jnp.float32)
    return pl.run_scoped(scores, acc, acc)


def _add_query_gradient(wg, ds, target, first_row, item, options, s):
    """Add dS K of all the tile's keys to 64 columns of the queries' gradient."""
    width = s["q_s"].shape[2]
    for index in range(width // 64):

        @pl.when(wg == index)
        def _(index=index):
            columns = pl.ds(index * 64, 64)

            def product(ref):
                plgpu.wgmma(ref, ds.T, s["k_s"].at[0].at[:, columns])
                return ref[...]

            dq = pl.run_scoped(product, plgpu.ACC((QUERIES, 64), jnp.float32))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            memory = s["o_s"][index][2]
            memory[...] = dq
            plgpu.commit_smem()
            start = pl.multiple_of(first_row, ALIGN)
            parts.add_block(memory, target, start, columns, options)

"""Moving single rows inside TPU kernels: gathers into a tile, and sums of rows.

A row is copied by a DMA of its own, so arrays whose rows are picked are `[N, S, 128]`:
there a row's S * 128 numbers lie together, while the tiles of `[N, D]` hold pieces of
eight or more rows. Rows reach the matrix unit straight from these copies; nothing of
the size of the packing is written for them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from uoe_jax.ops import tpu
from uoe_jax.ops.tpu import LANES, Target, round_up
from uoe_jax.varying import struct_varying

UNROLL = 8  # copies issued in one turn of the loop


def by_row(x: jax.Array) -> jax.Array:
    """Return `[N, D]` as `[N, D / 128, 128]`."""
    return x.reshape(x.shape[0], -1, LANES)


class Gather:
    """Rows of the current tile in VMEM, and the copies of the next tile's rows."""

    def __init__(self, source: Any, here: Any, ahead: Any, buffers: Any, sems: Any):
        self.source, self.buffers, self.sems = source, buffers, sems
        self.here, self.ahead = here, ahead  # [1, rows] row numbers of two tiles

    def _start(self, ids: Any, slot: Any) -> None:
        def copy(row, _):
            pltpu.make_async_copy(
                self.source.at[ids[0, row]],
                self.buffers.at[slot, row],
                self.sems.at[slot],
            ).start()

        lax.fori_loop(0, ids.shape[1], copy, None, unroll=UNROLL)

    def advance(self, tile: Any, *, first: Any, last: Any) -> None:
        """Wait for a tile's rows, and start on the next tile's unless it is the last.

        `first`: nothing is under way yet.
        """
        slot = lax.rem(tile, 2)
        pl.when(first)(lambda: self._start(self.here, slot))
        # One wait for all rows: a semaphore counts bytes, and the copy that is named
        # here, but never started, has as many.
        whole = self.buffers.at[slot]
        pltpu.make_async_copy(whole, whole, self.sems.at[slot]).wait()
        # The other buffer is free: the last item of its tile was an earlier grid step.
        # After the last tile nobody would wait for the copies.
        pl.when(~last)(lambda: self._start(self.ahead, 1 - slot))

    def read(self, tile: Any, rows: Any) -> jax.Array:
        """Return some of the current tile's rows, `[rows, D]`."""
        x = self.buffers[lax.rem(tile, 2), rows]
        return x.reshape(x.shape[0], -1)


def gather_parts(
    source: jax.Array, ids: jax.Array, rows: int, tile_of: Any
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return arguments, their specs and the scratch memory of a `Gather`.

    Args:
      source: `[N, D / 128, 128]`, see `by_row`.
      ids: numbers of the rows to pick, tile after tile.
      rows: rows of a tile.
      tile_of: grid indices -> tile.
    """
    num_tiles = pl.cdiv(ids.shape[0], rows)
    # Every number of a tile is copied, so every number must exist.
    ids = tpu.pad_rows(ids, num_tiles * rows)[None]

    def following(*index: Any) -> tuple[Any, Any]:
        return 0, jnp.minimum(tile_of(*index) + 1, num_tiles - 1)

    smem = pltpu.SMEM
    specs = [
        pl.BlockSpec((1, rows), lambda *i: (0, tile_of(*i)), memory_space=smem),
        pl.BlockSpec((1, rows), following, memory_space=smem),
        pl.BlockSpec(memory_space=pl.ANY),
    ]
    scratch = [
        pltpu.VMEM((2, rows, *source.shape[1:]), source.dtype),
        pltpu.SemaphoreType.DMA((2,)),
    ]
    return [ids, ids, source], specs, scratch


def _sum_kernel(here, ahead, rows_hbm, out_ref, buffers, sems, *, picks):
    tile, tokens = pl.program_id(1), out_ref.shape[0]
    gather = Gather(rows_hbm, here, ahead, buffers, sems)
    gather.advance(tile, first=tile == 0, last=tile == pl.num_programs(1) - 1)
    slot = lax.rem(tile, 2)
    total = buffers[slot, pl.ds(0, tokens)].astype(jnp.float32)
    for pick in range(1, picks):
        total += buffers[slot, pl.ds(pick * tokens, tokens)].astype(jnp.float32)
    out_ref[...] = total.astype(out_ref.dtype).reshape(out_ref.shape)


def sum_rows(rows: jax.Array, row_ids: jax.Array, target: Target) -> jax.Array:
    """Return each token's sum over its rows, `[N, D]`, added in float32.

    Args:
      rows: `[M, D / 128, 128]`; rows that count for nothing are zero.
      row_ids: `[N, X]`, all below M.
      target: what the kernel is traced for.
    """
    _, sides, _ = rows.shape
    num_tokens, picks = row_ids.shape
    width, size = sides * LANES, rows.dtype.itemsize
    row_bytes = round_up(sides, 32 // size) * LANES * size
    # Two buffers of every pick's row take half of the budget.
    tokens = LANES
    while (
        tokens > 16 and 4 * tokens * picks * row_bytes > target.generation.vmem_budget
    ):
        tokens //= 2
    # Each core of a device takes a run of tiles.
    cores = target.generation.cores
    padded = round_up(num_tokens, tokens * cores)
    num_tiles = padded // tokens
    share = num_tiles // cores
    tile_of = lambda core, step: core * share + step
    ids = tpu.pad_rows(row_ids.astype(jnp.int32), padded)
    # Pick after pick inside a tile, so that a pick's rows are one block.
    ids = ids.reshape(num_tiles, tokens, picks).transpose(0, 2, 1).reshape(-1)
    sources, specs, scratch = gather_parts(rows, ids, tokens * picks, tile_of)
    call = tpu.call(
        lambda *refs: _sum_kernel(*refs, picks=picks),
        target,
        vmem=2 * tokens * (picks + 2) * row_bytes,
        parallel=(True, False),
        grid=(cores, share),
        in_specs=specs,
        out_specs=pl.BlockSpec((tokens, width), lambda *i: (tile_of(*i), 0)),
        scratch_shapes=scratch,
        out_shape=struct_varying((padded, width), rows.dtype, rows),
        cost_estimate=pl.CostEstimate(
            flops=padded * picks * width,
            transcendentals=0,
            bytes_accessed=padded * (picks + 1) * width * size,
        ),
        name="sum_rows",
    )
    return call(*sources)[:num_tokens]

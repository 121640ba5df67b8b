"""What the GPU kernels share: their options, tiles of memory, masks and stores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from uoe_jax.ops.segment_attention.call import Mask
from uoe_jax.ops.segment_attention.nvidia.schedule import (
    ALIGN,
    COLUMNS,
    END,
    FIRST,
    FULL,
    LAST,
    MASKED,
    START,
)

WG_ROWS = 64  # rows of a warpgroup's products
PRODUCER_REGISTERS = 24
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Options:
    """Everything static about one call; part of jit's cache key."""

    mask: Mask
    scale: float
    key_block: int  # keys of a block (forward)
    stages: int  # blocks in flight
    consumers: int  # warpgroups that compute
    cores: int  # multiprocessors
    registers: int  # of a computing thread
    interpreted: bool = False

    @property
    def take_turns(self) -> bool:
        """Whether one warpgroup's softmax overlaps the other's products by turns."""
        return self.consumers == 2


@dataclass(frozen=True)
class Item:
    """One tile of one query head."""

    columns: tuple[jax.Array, ...]
    group: jax.Array

    def __getitem__(self, column: int) -> jax.Array:
        return self.columns[column]

    @property
    def origin(self) -> jax.Array:
        """First row of the segment's first tile and block."""
        return self[START] - lax.rem(self[START], ALIGN)

    @property
    def blocks(self) -> jax.Array:
        """How many blocks the tile meets."""
        return self[LAST] - self[FIRST]

    @property
    def whole(self) -> jax.Array:
        """How many of them need no mask; they come first."""
        return self[MASKED] - self[FULL]

    def block(self, turn: jax.Array) -> jax.Array:
        """Return the number of the block met at a turn."""
        masked = turn - self.whole + self[FIRST]
        masked = jnp.where(masked < self[FULL], masked, masked + self.whole)
        return jnp.where(turn < self.whole, self[FULL] + turn, masked)


@dataclass(frozen=True)
class Work:
    """The tiles dealt to one multiprocessor, each for all query heads in turn."""

    rounds_ref: Any
    tiles_ref: Any
    groups: int

    def loop(
        self, body: Callable[..., jax.Array], carry: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the number of tiles and the carry of `body(index, item, carry)`."""
        core = lax.axis_index("core")
        total = self.rounds_ref[0] * self.groups

        def step(index: jax.Array, carry: jax.Array) -> jax.Array:
            place = lax.div(index, self.groups), core
            columns = tuple(self.tiles_ref[*place, i] for i in range(COLUMNS))
            return body(index, Item(columns, lax.rem(index, self.groups)), carry)

        return total, lax.fori_loop(0, total, step, carry)


def tile_memory(count: int, rows: int, *, width: int, dtype: Any) -> Any:
    """Return `count` tiles of shared memory as the tensor cores want them.

    (8, 64) numbers of two bytes are 8 rows of 128 bytes. Swizzled, the 8 lie in
    different banks of memory, so that products read them without waiting in turn.
    """
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((count, rows, width), dtype, transforms=transforms)


def output_memory(
    count: int, width: int, dtype: Any, fused: bool = False
) -> tuple[Any, ...]:
    """Return a tile per warpgroup, to be stored whole or row by row.

    With `fused` the same memory also takes a float32 block of 64 columns.
    """
    half = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    single = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
    shape = (WG_ROWS, width)
    views = [plgpu.SMEM(shape, dtype, transforms=half), plgpu.SMEM(shape, dtype)]
    if fused:
        views.append(plgpu.SMEM((WG_ROWS, 64), jnp.float32, transforms=single))
    return tuple(plgpu.RefUnion(*views) for _ in range(count))


def filled(shape: tuple[int, ...], value: float) -> jax.Array:
    """Return an accumulator or a vector beside one."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def accumulate(acc: Any, a: jax.Array, b: Any, options: Options) -> Any:
    """Return `acc + a @ b` with `a` in registers and `b` in shared memory."""
    if options.interpreted:  # its products take no operand from registers
        product = jnp.matmul(a, b[...], preferred_element_type=acc.dtype)
        plgpu.commit_smem()  # unlike a product's, this read is an ordinary one
        return acc + product
    update = lambda ref: plgpu.wgmma(ref, a, b)
    return pl.run_state(update)(plgpu.ACC.init(acc))


def accumulate_two(
    accs: tuple[Any, Any],
    lefts: tuple[jax.Array, jax.Array],
    rights: tuple[Any, Any],
    options: Options,
) -> Any:
    """Return two accumulators plus their products, both in flight together."""
    if options.interpreted:
        first, second = (
            accumulate(*x, options) for x in zip(accs, lefts, rights, strict=True)
        )
        return first, second

    def update(refs: tuple[Any, Any]) -> None:
        for ref, a, b in zip(refs, lefts, rights, strict=True):
            plgpu.wgmma(ref, a, b)

    return pl.run_state(update)(tuple(plgpu.ACC.init(x) for x in accs))


def add_block(
    memory: Any, ref: Any, start: jax.Array, columns: Any, options: Options
) -> None:
    """Add a block of shared memory to rows from `start`, atomically by element."""
    target = ref.at[pl.ds(start, WG_ROWS), columns]
    if options.interpreted:  # it knows no reductions; its blocks run one by one
        target[...] = target[...] + memory[...]
    else:
        plgpu.copy_smem_to_gmem(memory, target, reduction_op="add")


def drain(rings: tuple[Any, ...], steps: jax.Array, stages: int) -> None:
    """Wait until every slot that was filled is free: barriers end as they began."""
    for ring in rings:
        for slot in range(stages):
            pl.when(steps > slot)(partial(plgpu.barrier_wait, ring.at[slot]))


def meet(barrier: Any) -> None:
    """Wait for the other warpgroups to come as far."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def visible(
    item: Item, first_row: jax.Array, rows_refs: Any, options: Options, axis: int
) -> tuple[jax.Array, jax.Array]:
    """Return the first and last key that each of 64 queries sees.

    Queries lie along `axis` of the scores. Rows of other segments see nothing.
    """
    layout = plgpu.Layout.WGMMA.reduce(1 - axis)
    row = plgpu.broadcasted_iota(jnp.int32, (WG_ROWS,), 0, layout=layout) + first_row
    if rows_refs is not None:
        here = pl.ds(first_row, WG_ROWS)
        low, high = (
            plgpu.load(ref.at[here], layout=layout, optimized=False)
            for ref in rows_refs
        )
    else:
        low = jnp.broadcast_to(item[START], row.shape)
        high = jnp.broadcast_to(item[END] - 1, row.shape)
        if options.mask.causal:
            high = row
        if options.mask.window is not None:
            low = jnp.maximum(low, row - (options.mask.window - 1))
            high = jnp.minimum(high, row + (options.mask.window - 1))
    mine = (row >= item[START]) & (row < item[END])
    return low, jnp.where(mine, high, -1)


def seen(
    shape: tuple[int, int], first_key: jax.Array, low: Any, high: Any, axis: int
) -> jax.Array:
    """Return which scores count; queries lie along `axis`, keys along the other."""
    key = first_key + plgpu.broadcasted_iota(
        jnp.int32, shape, 1 - axis, layout=plgpu.Layout.WGMMA
    )
    low, high = (lax.broadcast_in_dim(x, shape, [axis]) for x in (low, high))
    return (key >= low) & (key <= high)


def blank_rows(
    blocks: tuple[Any, ...], real: jax.Array, wg: jax.Array, barrier: Any, wgs: int
) -> None:
    """Zero the rows of blocks past the first `real`: 0 times nan would be nan."""
    size = blocks[0].shape[0]
    parts = [(ref, start) for ref in blocks for start in range(0, size, WG_ROWS)]

    @pl.when(real < size)
    def _():
        for index, (ref, start) in enumerate(parts):

            @pl.when(wg == index % wgs)
            def _(ref=ref, start=start):
                mine = ref.at[pl.ds(start, WG_ROWS)]
                x = plgpu.layout_cast(mine[...], plgpu.Layout.WGMMA)
                row = start + plgpu.broadcasted_iota(
                    jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA
                )
                mine[...] = jnp.where(row < real, x, jnp.zeros_like(x))
                plgpu.commit_smem()

        meet(barrier)


def store_rows(
    out: jax.Array,
    memory: tuple[Any, ...],
    wg: jax.Array,
    ref: Any,
    item: Item,
    first: jax.Array,
) -> None:
    """Store 64 rows at `first`, without those that belong to other segments."""
    skip = jnp.maximum(item[START] - first, 0)
    rows = jnp.minimum(item[END] - first, WG_ROWS) - skip
    for index, (whole, plain, *_) in enumerate(memory):
        mine = wg == index

        @pl.when(mine & (rows == WG_ROWS))
        def _(whole=whole):
            whole[...] = out
            plgpu.commit_smem()  # copies are another unit's: it sees what is committed
            target = pl.ds(pl.multiple_of(first, ALIGN), WG_ROWS)
            plgpu.copy_smem_to_gmem(whole, ref.at[target])

        @pl.when(mine & (rows > 0) & (rows < WG_ROWS))
        def _(plain=plain):
            plain[...] = out
            plgpu.commit_smem()
            _store_ladder(plain, ref, first, skip, rows)


def _store_ladder(
    memory: Any, ref: Any, first: jax.Array, skip: jax.Array, rows: jax.Array
) -> None:
    """Store `rows` rows from `skip` on; copies have static sizes, powers of two."""
    done = skip
    for bit in reversed(range(int(math.log2(WG_ROWS)))):
        size = 1 << bit

        @pl.when((rows & size) != 0)
        def _(size=size, done=done):
            target = ref.at[pl.ds(first + done, size)]
            plgpu.copy_smem_to_gmem(memory.at[pl.ds(done, size)], target)

        done += rows & size

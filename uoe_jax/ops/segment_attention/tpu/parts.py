"""Pieces shared by the three TPU attention kernels: copies, masks, columns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from uoe_jax.ops.segment_attention.tpu.schedule import EDGE, Tile
from uoe_jax.ops.tpu import LANES

HIDDEN = -1e30  # score of a pair that must not be seen; finite, so no inf - inf
UNSEEN = 1e30  # log-sum of a row that sees nothing: every weight becomes exp2(-1e30)
LOG2_E = 1.4426950408889634


class Stream(NamedTuple):
    """Rows that a ring copies from HBM: source, two buffers, and the row axis."""

    source: Any
    buffers: Any  # [2, ...]
    axis: int = 0


class Ring:
    """Two-deep ring of chunk copies: chunk c + 1 is under way while c is used."""

    def __init__(
        self,
        streams: Sequence[Stream],
        semaphores: Any,
        chunk: int,
        piece: Callable[[Any], tuple[Any, Any]],
        select: Callable[[Any, Any], Any] = lambda source, index: source,
    ):
        self.streams, self.semaphores, self.chunk = streams, semaphores, chunk
        self.piece, self.select = piece, select

    def _each(self, index: Any, action: Callable[[Any], None]) -> None:
        first, size = self.piece(index)
        slot = lax.rem(index, 2)

        def transfer(offset: Any, length: int) -> None:
            rows = pl.ds(pl.multiple_of(first + offset, LANES), length)
            into = pl.ds(pl.multiple_of(offset, LANES), length)
            for number, (source, buffers, axis) in enumerate(self.streams):
                origin = self.select(source, index)
                lead = (slice(None),) * axis
                action(
                    pltpu.make_async_copy(
                        origin.at[(*lead, rows)],
                        buffers.at[slot].at[(*lead, into)],
                        self.semaphores.at[number, slot],
                    )
                )

        whole = size == self.chunk
        pl.when(whole)(lambda: transfer(0, self.chunk))
        # The end of a run: only its own grains are copied.
        grains = jnp.where(whole, 0, lax.div(size, LANES))
        lax.fori_loop(0, grains, lambda i, _: transfer(i * LANES, LANES), None)

    def start(self, index: Any) -> None:
        """Issue the copies of a chunk."""
        self._each(index, lambda copy: copy.start())

    def run(self, count: Any, use: Callable[[Any, Any], None]) -> None:
        """Call `use(index, slot)` for each chunk, the first being under way."""

        def body(index, _):
            pl.when(index + 1 < count)(lambda: self.start(index + 1))
            self._each(index, lambda copy: copy.wait())
            use(index, lax.rem(index, 2))

        lax.fori_loop(0, count, body, None)


def visit(
    tile: Tile,
    first: Any,
    size: Any,
    heads: int,
    block: Callable[[Any, Any, int, bool], None],
) -> None:
    """Run `block(own rows, offset, size, masked)` over one chunk.

    A whole chunk that every row of the tile sees takes one block without a mask. An
    edge is cut in power-of-two blocks, and if only one half of the tile's rows sees it
    (two segments meet in the tile), only that half takes part.
    """
    every = slice(0, heads * tile.rows)
    clear = tile.all_see(first, size) & (size == tile.chunk)
    pl.when(clear)(lambda: block(every, 0, tile.chunk, False))

    def edge(offset: Any, size: int) -> None:
        if heads > 1 or tile.rows == LANES:
            block(every, offset, size, True)
            return
        half = tile.rows // 2
        alone, start = tile.half_that_sees(first + offset, size)
        own = pl.ds(pl.multiple_of(start, half), half)
        pl.when(alone)(lambda: block(own, offset, size, True))
        pl.when(~alone)(lambda: block(every, offset, size, True))

    @pl.when(~clear)
    def _():
        largest = min(tile.chunk, EDGE)
        lax.fori_loop(
            0,
            lax.div(size, largest),
            lambda i, _: edge(pl.multiple_of(i * largest, largest), largest),
            None,
        )
        part = largest // 2
        while part >= LANES:
            offset = pl.multiple_of(size & -(2 * part), LANES)
            pl.when((size & part) != 0)(functools.partial(edge, offset, part))
            part //= 2


def stacked(ref: Any, own: Any) -> jax.Array:
    """Return `[G, rows, H]` heads below each other, or some rows of a single head."""
    if ref.shape[0] == 1:
        return ref[0, own]
    return ref[...].reshape(-1, ref.shape[-1])


def as_columns(row: jax.Array) -> jax.Array:
    """Return `[1, R]` values as `[R, 128]`, each repeated along the lanes.

    A register holds 8 rows of 128 lanes. Repeated, a number of a row meets its row's
    scores lane by lane; from one lane it would be spread anew at each use.
    """
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def stack_columns(bounds_ref: Any, limits: Any, groups: int) -> None:
    """Write `[2, rows]` bounds as `[2, G * rows, 128]` columns, once for each head."""
    rows = bounds_ref.shape[1]
    for side in range(2):
        column = as_columns(bounds_ref[side : side + 1])
        for group in range(groups):
            limits[side, group * rows : (group + 1) * rows] = column


def as_row(column: jax.Array) -> jax.Array:
    """Return `[R, 128]` repeated values as `[1, R]`."""
    return column.T[:1]


def widen(column: jax.Array, width: int) -> jax.Array:
    """Return `[R, 128]` repeated values as `[R, width]`."""
    if width <= LANES:
        return column[:, :width]
    return jnp.tile(column, (1, -(-width // LANES)))[:, :width]


def seen(low: jax.Array, high: jax.Array, first: Any, size: int) -> jax.Array:
    """Return which of `size` rows from `first` each own row sees, `[R, size]`."""
    other = first + lax.broadcasted_iota(jnp.int32, (low.shape[0], size), 1)
    return (other >= widen(low, size)) & (other < widen(high, size))


def clean(rows: jax.Array, first: Any, low: Any, high: Any) -> jax.Array:
    """Return rows with those outside `low:high` zero: 0 * nan would be nan."""
    index = first + lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    return jnp.where((index >= low) & (index < high), rows, jnp.zeros_like(rows))

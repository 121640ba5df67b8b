"""What each row sees, cut into tiles and chunks, for the TPU attention kernels.

A tile is a run of rows that one grid step owns. What its rows see outside the tile is
at most two runs of rows, left and right of it, visited in chunks: nothing else is
copied or computed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from uoe_jax.ops.tpu import LANES, round_up
from uoe_jax.varying import zeros_varying

FIELDS = 6  # scalars of a tile, in the order of Tile
EDGE = 512  # most rows of a masked block
FEW_EDGES = 1024  # up to here, comparing every row with every edge is the fastest


class Ranges(NamedTuple):
    """Row r sees rows bounds[0, r] <= s < bounds[1, r]."""

    bounds: Int[Array, "2 M"]
    tiles: Int[Array, " C6"]  # FIELDS scalars a tile


def segment_edges(offsets: Int[Array, " S1"], num_rows: int) -> Int[Array, "2 M"]:
    """Return the first and end row of each row's segment; 0 and 0 outside them all."""
    row = jnp.arange(num_rows, dtype=jnp.int32)
    offsets = offsets.astype(jnp.int32)
    if offsets.shape[0] <= FEW_EDGES:
        # Fused compare-and-reduce: no gathers, which are slow on TPU.
        edges = offsets[:, None]
        start = jnp.max(jnp.where(edges <= row[None], edges, 0), axis=0)
        end = jnp.min(jnp.where(edges > row[None], edges, num_rows), axis=0)
    else:
        marks = zeros_varying((num_rows + 1,), jnp.int32, offsets, fill=-1.0)
        marks = marks.at[offsets].set(offsets, indices_are_sorted=True, mode="drop")
        start = lax.cummax(marks[:-1])
        later = jnp.where(marks < 0, num_rows, marks)[1:]
        end = lax.cummin(later, reverse=True)
    real = (row >= offsets[0]) & (row < offsets[-1])
    return jnp.stack([jnp.where(real, start, 0), jnp.where(real, end, 0)])


def visible_ranges(
    edges: Int[Array, "2 M"],
    tile: int,
    *,
    causal: bool,
    window: int | None,
    seen_by: bool = False,
) -> Ranges:
    """Return the rows that each row sees, or with `seen_by` those that see it."""
    num_rows = edges.shape[1]
    row = jnp.arange(num_rows, dtype=jnp.int32)
    low, high = edges[0], edges[1]
    real = high > low
    if causal and seen_by:
        low = row
    elif causal:
        high = row + 1
    if window is not None:
        low = jnp.maximum(low, row - window + 1)
        high = jnp.minimum(high, row + min(window, num_rows))
    low, high = jnp.where(real, low, 0), jnp.where(real, high, 0)
    return Ranges(jnp.stack([low, high]), _tile_scalars(low, high, real, tile))


def _tile_scalars(low, high, real, tile):
    """Return the scalars that `Tile` holds, tile after tile."""
    low, high, real = (x.reshape(-1, tile) for x in (low, high, real))
    far = jnp.int32(jnp.iinfo(jnp.int32).max)
    fields = (
        jnp.min(jnp.where(real, low, far), axis=1),
        jnp.max(high, axis=1),
        jnp.max(jnp.where(real, low, far), axis=1),
        jnp.min(high, axis=1),
        jnp.max(high[:, : tile // 2], axis=1),
        jnp.min(jnp.where(real, low, far)[:, tile // 2 :], axis=1),
    )
    return jnp.stack(fields, axis=1).reshape(-1)


@dataclass(frozen=True)
class Tile:
    """One tile: its own rows, and the rows that they see."""

    start: Any  # first own row
    rows: int
    chunk: int  # a power of two
    low: Any  # first and end row seen by any own row
    high: Any
    all_low: Any  # ... by every own row
    all_high: Any
    upper_high: Any  # end row seen by the first half of the own rows
    lower_low: Any  # first row seen by the second half
    sides: str = "both"  # on which side of the tile there is anything: left, right

    @property
    def live(self) -> Any:
        """Whether any of its rows sees anything."""
        return self.high > self.low

    @property
    def left(self) -> Any:
        """Rows to visit before the tile, in whole grains."""
        if self.sides == "right":
            return 0
        low = self.low & -LANES
        return jnp.where(self.live, jnp.maximum(self.start - low, 0), 0)

    @property
    def right(self) -> Any:
        """Rows to visit after the tile, in whole grains."""
        if self.sides == "left":
            return 0
        high = (self.high + LANES - 1) & -LANES
        end = self.start + self.rows
        return jnp.where(self.live, jnp.maximum(high - end, 0), 0)

    @property
    def num_chunks(self) -> Any:
        """Chunks outside the tile."""
        return self._count(self.left) + self._count(self.right)

    def _count(self, rows: Any) -> Any:
        return (rows + self.chunk - 1) >> (self.chunk.bit_length() - 1)

    def piece(self, index: Any) -> tuple[Any, Any]:
        """Return the first row and the number of rows of a chunk."""
        past = index * self.chunk
        size = jnp.minimum(self.chunk, self.left - past)
        left = self.start - past - size, size
        if self.sides == "left":
            return left
        before = 0 if self.sides == "right" else self._count(self.left)
        past = past - before * self.chunk
        right = (
            self.start + self.rows + past,
            jnp.minimum(self.chunk, self.right - past),
        )
        if self.sides == "right":
            return right
        is_left = index < before
        first, size = (
            jnp.where(is_left, x, y) for x, y in zip(left, right, strict=True)
        )
        return first, size

    def all_see(self, first: Any, size: Any) -> Any:
        """Whether every row of the tile sees the whole chunk."""
        return (first >= self.all_low) & (first + size <= self.all_high)

    def half_that_sees(self, first: Any, size: Any) -> tuple[Any, Any]:
        """Return whether just one half of the rows may see a block, and its start."""
        second = first >= self.upper_high
        return second | (first + size <= self.lower_low), jnp.where(
            second, self.rows // 2, 0
        )


def read_tile(
    scalars: Any, index: Any, rows: int, chunk: int, sides: str = "both"
) -> Tile:
    """Return a tile from the prefetched scalars, inside or outside a kernel."""
    fields = [scalars[index * FIELDS + field] for field in range(FIELDS)]
    return Tile(index * rows, rows, chunk, *fields, sides=sides)


def diagonal_steps(rows: int, groups: int, causal: bool, by_rows: bool) -> list:
    """Return (own rows, other rows) slices that cover a tile's own square.

    Causal squares are cut in bands so that little above the diagonal is computed.
    Heads that share the rows of a tile are stacked, and then it stays whole.
    """
    whole = slice(0, rows)
    if not causal or groups > 1:
        return [(whole, whole)]
    bands = [slice(start, start + LANES) for start in range(0, rows, LANES)]
    if by_rows:
        return [(band, slice(0, band.stop)) for band in bands]
    return [(band, slice(band.start, rows)) for band in bands]


def computed_pairs(
    offsets: jax.Array, num_rows: int, rows: int, chunk: int, *, groups: int = 1, **how
) -> int:
    """Return the score entries that a kernel computes, of one query head."""
    total = 0
    for pieces in visited(offsets, num_rows, rows, chunk, groups=groups, **how):
        total += sum(int(count) * own * other for (own, other), count in pieces.items())
    return total


def needed_pairs(offsets: jax.Array, num_rows: int, **how) -> int:
    """Return the score entries that the definition asks for, of one query head."""
    edges = segment_edges(offsets, num_rows)
    bounds = np.asarray(visible_ranges(edges, num_rows, **how).bounds)
    return int(np.sum(bounds[1] - bounds[0], dtype=np.int64))


def visited(
    offsets: jax.Array, num_rows: int, rows: int, chunk: int, *, groups: int = 1, **how
) -> tuple[dict, dict, dict]:
    """Return how often a kernel runs each (own rows, other rows) block.

    Three counts: squares on the diagonal, whole chunks without a mask, and edges.
    """
    padded = round_up(num_rows, rows)
    causal, seen_by = how["causal"], how.get("seen_by", False)
    scalars = visible_ranges(segment_edges(offsets, padded), rows, **how).tiles
    scalars = np.asarray(scalars)
    sides = "both" if not causal else "right" if seen_by else "left"
    tile = read_tile(scalars, np.arange(padded // rows), rows, chunk, sides)
    live, count = np.asarray(tile.live), np.asarray(tile.num_chunks)
    diagonal, clear, edge = Counter(), Counter(), Counter()
    for own, other in diagonal_steps(rows, groups, causal, not seen_by):
        diagonal[own.stop - own.start, other.stop - other.start] += int(live.sum())
    for index in range(int(np.max(count, initial=0, where=live))):
        first, size = (np.asarray(x) for x in tile.piece(index))
        on = live & (index < count)
        whole = on & np.asarray(tile.all_see(first, size)) & (size == chunk)
        clear[rows, chunk] += int(whole.sum())
        for offset in range(0, chunk, LANES):
            # The block that starts here, if any: edges are cut at powers of two.
            part = min(chunk, EDGE)
            while part >= LANES:
                starts = (size & -(2 * part)) if part < min(chunk, EDGE) else None
                if starts is None:
                    here = (offset % part == 0) & (offset + part <= size)
                else:
                    here = (starts == offset) & ((size & part) != 0)
                here = here & on & ~whole
                alone, _ = tile.half_that_sees(first + offset, part)
                half = np.asarray(alone) & (groups == 1) & (rows > LANES)
                edge[rows // 2, part] += int((here & half).sum())
                edge[rows, part] += int((here & ~half).sum())
                part //= 2
    return diagonal, clear, edge

"""Which tiles a GPU kernel works on, in which order, computed on the device.

Segments are cut in tiles that never straddle two of them; a tile meets a range of
blocks of the other side (keys for a tile of queries, and the reverse). Tiles that take
longest come first, among segments that fit in the L2 cache together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from uoe_jax.ops.segment_attention.call import Mask

ALIGN = 8  # rows of a copy into swizzled memory start at multiples of it
L2_ROWS = 1 << 17  # rows of keys and values dealt together: 64 MiB at H 128
SMALL = 4096  # up to here comparing all pairs is faster than sorting or searching
# Columns of a plan, one row a tile.
ROW, START, END, SLOT, FIRST, FULL, MASKED, LAST = range(8)
COLUMNS = 8


class Rows(NamedTuple):
    """What each row sees, where documents cut the segments further; M + pad rows."""

    low: Int[Array, " M2"]
    high: Int[Array, " M2"]


class Plan(NamedTuple):
    """Rounds of tiles, one a core: `[rounds, cores, 8]`, and how many rounds count.

    A segment's tiles and blocks are counted from START rounded down to `ALIGN`. ROW is
    the first row, SLOT the tile's number before sorting. Of the blocks that it meets,
    FIRST <= block < LAST, those with FULL <= block < MASKED are seen whole. Where a
    round has no tile for a core, END is 0 and SLOT is past the real ones.
    """

    tiles: Int[Array, "R C 8"]
    rounds: Int[Array, " 1"]


def num_tiles(num_rows: int, num_segments: int, block: int) -> int:
    """Return how many tiles there are at most; rows past the end make a segment."""
    return (num_rows + (num_segments + 1) * (block + ALIGN - 2)) // block


def make_rows(
    offsets: Int[Array, " S1"],
    bounds: tuple[Int[Array, " M"], Int[Array, " M"]],
    mask: Mask,
    pad: int,
) -> Rows:
    """Return the first and last row that each row sees; padded rows see themselves."""
    row = jnp.arange(bounds[0].shape[0], dtype=jnp.int32)
    first, last = (x.astype(jnp.int32) for x in bounds)
    index = jnp.searchsorted(offsets, row, side="right", method="sort") - 1
    index = jnp.clip(index, 0, offsets.shape[0] - 2)
    low = jnp.maximum(first, offsets[index])
    high = jnp.minimum(last, offsets[index + 1] - 1)
    if mask.causal:
        high = jnp.minimum(high, row)
    if mask.window is not None:
        window = mask.window
        low = jnp.where(row - low >= window, row - (window - 1), low)
        high = jnp.where(high - row >= window, row + (window - 1), high)
    real = row < offsets[-1]
    low, high = jnp.where(real, low, row), jnp.where(real, high, row)
    more = row.shape[0] + jnp.arange(pad, dtype=jnp.int32)
    return Rows(jnp.concatenate([low, more]), jnp.concatenate([high, more]))


@dataclass(frozen=True)
class Segments:
    """The segments of M rows, what their rows see, and the cores that share them."""

    offsets: Int[Array, " S1"]
    num_rows: int
    mask: Mask
    rows: Rows | None
    cores: int


def query_plan(segments: Segments, block: int, key_block: int) -> Plan:
    """Return tiles of `block` queries and the blocks of keys they meet."""
    (causal, window), rows = segments.mask, segments.rows
    row, start, end, real = _cut(segments.offsets, segments.num_rows, block)
    top, bottom = jnp.maximum(row, start), jnp.minimum(row + block, end) - 1
    low, high = start, end - 1
    if rows is not None:
        index = row[:, None] + jnp.arange(block, dtype=jnp.int32)[None]
        index = jnp.clip(index, top[:, None], bottom[:, None])
        low = rows.low.at[index].get(mode="clip").min(axis=1)
        high = rows.high.at[index].get(mode="clip").max(axis=1)
    else:
        if causal:
            high = bottom
        if window is not None:
            low = jnp.maximum(low, top - (window - 1))
            high = jnp.minimum(high, bottom + (window - 1))
    origin = start // ALIGN * ALIGN
    first, last = (low - origin) // key_block, (high - origin) // key_block + 1
    if rows is not None or window is not None:
        full = masked = last  # an edge may cross any block
    else:
        full = (start != origin).astype(jnp.int32)
        masked = ((row if causal else end - 1) + 1 - origin) // key_block
    columns = row, start, end, first, full, masked, last
    return _deal(columns, real, segments)


def key_plan(segments: Segments, block: int, query_block: int) -> Plan:
    """Return tiles of `block` keys and the blocks of queries they meet."""
    (causal, window), rows = segments.mask, segments.rows
    row, start, end, real = _cut(segments.offsets, segments.num_rows, block)
    top, bottom = jnp.maximum(row, start), jnp.minimum(row + block, end) - 1
    low, high = start, end - 1
    if rows is not None:
        # Any bounds are allowed, so the first query that may see a key is found in
        # the running maximum of what queries see; segments ascend, so one scan does.
        reach = lax.cummax(rows.high)
        back = lax.cummin(rows.low, reverse=True)
        low = jnp.searchsorted(reach, top, side="left", method="sort")
        high = jnp.searchsorted(back, bottom, side="right", method="sort") - 1
        low = jnp.clip(low.astype(jnp.int32), start, end)
        high = jnp.clip(high.astype(jnp.int32), start - 1, end - 1)
    else:
        if causal:
            low = top
        if window is not None:
            low = jnp.maximum(low, top - (window - 1))
            high = jnp.minimum(high, bottom + (window - 1))
    origin = start // ALIGN * ALIGN
    first, last = (low - origin) // query_block, (high - origin) // query_block + 1
    if rows is not None or window is not None:
        full = masked = last
    else:
        full = (start != origin).astype(jnp.int32)
        if causal:
            full = -((origin - bottom) // query_block)
        # Keys of other segments in a tile at an end of its own: never unmasked.
        mixed = (row < start) | (row + block > end)
        full = jnp.where(mixed, last, full)
        masked = (end - origin) // query_block
    columns = row, start, end, first, full, masked, last
    return _deal(columns, real, segments)


def _cut(offsets: jax.Array, num_rows: int, block: int):
    """Return row, segment start and end of every tile, and if it has work to do.

    Few segments are compared with every tile: that is one kernel, not a search's many.
    """
    starts = offsets.astype(jnp.int32)
    ends = jnp.concatenate([starts[1:], jnp.full((1,), num_rows, jnp.int32)])
    origins = starts // ALIGN * ALIGN
    tiles = jnp.where(ends > starts, -((origins - ends) // block), 0)
    count = starts.shape[0]
    index = jnp.arange(num_tiles(num_rows, count - 1, block), dtype=jnp.int32)
    if count > SMALL:
        stops = jnp.cumsum(tiles, dtype=jnp.int32)
        owner = jnp.searchsorted(stops, index, side="right", method="sort")
        exists, owner = owner < count, jnp.minimum(owner, count - 1)
        start, end = starts[owner], jnp.where(exists, ends[owner], 0)
        row = origins[owner] + (index - (stops - tiles)[owner]) * block
        return row, start, end, exists & (owner < count - 1)
    segment = jnp.arange(count, dtype=jnp.int32)
    earlier = segment[None] < segment[:, None]
    first = jnp.sum(jnp.where(earlier, tiles[None], 0), axis=1, dtype=jnp.int32)
    mine = (index[:, None] >= first[None]) & (index[:, None] < (first + tiles)[None])

    def take(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mine, values[None], 0), axis=1, dtype=jnp.int32)

    row = take(origins - first * block) + index * block
    start, end = take(starts), take(ends)
    return row, start, end, (end > 0) & (start < starts[-1])


def _deal(columns: tuple, real: jax.Array, segments: Segments) -> Plan:
    """Return the tiles dealt to cores back and forth, so that long meets short.

    Segments whose keys fit the cache together are dealt before the next ones.
    """
    cores = segments.cores
    row, start, end, first, full, masked, last = columns
    index = jnp.arange(row.shape[0], dtype=jnp.int32)
    last = jnp.where(real, jnp.maximum(last, first), first)
    full = jnp.clip(full, first, last)
    masked = jnp.clip(masked, full, last)
    columns = row, start, end, index, first, full, masked, last
    table = jnp.stack([jnp.broadcast_to(x, row.shape) for x in columns], axis=1)

    exists = end > row
    work = jnp.minimum(last - first, (1 << 16) - 1)
    num_groups = -(-segments.num_rows // L2_ROWS)
    if num_groups == 1:
        place = _rank(jnp.where(exists, -work, 1))
        turn, core = place // cores, place % cores
        rounds = -(-jnp.sum(exists, dtype=jnp.int32) // cores)
    else:
        # One number to rank by: the group above, and in it the longest tiles first.
        group = jnp.where(exists, start // L2_ROWS, num_groups)
        place = _rank((group << 16) - work)
        groups = jnp.arange(num_groups + 1, dtype=jnp.int32)
        earlier = jnp.sum(group[None] < groups[:, None], axis=1, dtype=jnp.int32)
        taken = -(-jnp.diff(earlier) // cores)  # rounds of each group
        rounds = jnp.sum(taken, dtype=jnp.int32)
        same = group[:, None] == groups[None]
        before = jnp.where(group[:, None] > groups[None, :-1], taken[None], 0)
        place = place - jnp.sum(
            jnp.where(same, earlier[None], 0), axis=1, dtype=jnp.int32
        )
        turn = jnp.sum(before, axis=1, dtype=jnp.int32) + place // cores
        core = place % cores
    core = jnp.where(turn % 2 == 0, core, cores - 1 - core)
    most = -(-row.shape[0] // cores) + num_groups
    target = jnp.where(exists, turn * cores + core, most * cores)
    empty = (most * cores, COLUMNS)
    column = lax.broadcasted_iota(jnp.int32, empty, 1)
    dealt = jnp.where(column == SLOT, row.shape[0], 0).astype(jnp.int32)
    dealt = dealt.at[target].set(table, mode="drop")
    return Plan(dealt.reshape(most, cores, COLUMNS), rounds[None])


def smaller_blocks(plan: Plan, ratio: int) -> Plan:
    """Return the plan for blocks that are `ratio` times smaller."""
    column = lax.broadcasted_iota(jnp.int32, plan.tiles.shape, 2)
    return Plan(jnp.where(column >= FIRST, plan.tiles * ratio, plan.tiles), plan.rounds)


def _rank(key: jax.Array) -> jax.Array:
    """Return the place of every entry in ascending order; ties keep theirs."""
    index = jnp.arange(key.shape[0], dtype=jnp.int32)
    if key.shape[0] > SMALL:
        order = jnp.argsort(key, stable=True)
        return jnp.zeros_like(index).at[order].set(index, unique_indices=True)
    before = (key[None] < key[:, None]) | (
        (key[None] == key[:, None]) & (index[None] < index[:, None])
    )
    return jnp.sum(before, axis=1, dtype=jnp.int32)


def slot_rows(
    offsets: Int[Array, " S1"], num_rows: int, block: int
) -> Int[Array, " N2"]:
    """Return the row of every slot: a tile's rows, tiles in order of segments."""
    row, *_ = _cut(offsets, num_rows, block)
    return (row[:, None] + jnp.arange(block, dtype=jnp.int32)[None]).reshape(-1)


def own_rows(
    offsets: Int[Array, " S1"], num_rows: int, block: int
) -> Int[Array, " N2"]:
    """Return the row of every slot that is its own; of others one past the last.

    A tile that reaches past its segment has rows of the next one, too.
    """
    row, start, end, _ = _cut(offsets, num_rows, block)
    index = row[:, None] + jnp.arange(block, dtype=jnp.int32)[None]
    own = (index >= start[:, None]) & (index < end[:, None])
    # Each past the last is another one, so that no two slots write the same row.
    past = num_rows + jnp.arange(index.size, dtype=jnp.int32)
    return jnp.where(own.reshape(-1), index.reshape(-1), past)

"""Triton kernels of segment attention: the forward pass, and what all kernels share.

A program works on one tile of rows of one segment; the schedule says which, and which
blocks of the other side it meets. Most blocks need no mask. Those at an edge are met
afterwards with masked loads, so that a neighbour's rows, maybe nan, enter no sum.
Letters: M rows, G query heads of a row, H width of a head.
"""

from __future__ import annotations

from typing import no_type_check

from uoe_jax.ops._triton_language import jit, tl


@jit
@no_type_check
def tile_edges(tiles, place, ALIGN: tl.constexpr):
    """A segment's start, end and origin, and the edges of the blocks a tile meets:
    first, full, masked, last. Columns of `schedule.Plan`.
    """
    at = tiles + place * 8
    start = tl.load(at + 1)
    edges = tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7)
    return start, tl.load(at + 2), start // ALIGN * ALIGN, edges


@jit
@no_type_check
def tile_rows(
    tiles,
    place,
    group,
    G: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """A tile's rows, which of them are of its segment, and where they lie.

    Made AGAIN before results are stored: kept through the loops, the addresses take
    registers from an accumulator. A volatile load keeps the compiler from merging both.
    """
    at = tiles + place * 8
    m = tl.load(at, volatile=AGAIN) + tl.arange(0, ROWS)
    mine = (m >= tl.load(at + 1)) & (m < tl.load(at + 2))
    inside = (m.to(tl.int64)[:, None] * G + group) * H + tl.arange(0, H)[None, :]
    return m, mine, inside


@jit
@no_type_check
def turns(edges, MASKED: tl.constexpr):
    """The range of turns in which the whole blocks are met, or the masked ones."""
    first, full, masked, last = edges
    if MASKED:
        return first, last - (masked - full)
    return full, masked


@jit
@no_type_check
def block_of(turn, edges, MASKED: tl.constexpr):
    """The block met at a turn: masked ones lie before and after the whole ones."""
    first, full, masked, last = edges
    if MASKED:
        return turn + tl.where(turn < full, 0, masked - full)
    return turn


@jit
@no_type_check
def limits(m, start, end, low, high, BOUNDS: tl.constexpr):
    """First and last key that queries m see, where low and high tell; else nothing."""
    if BOUNDS:
        mine = (m >= start) & (m < end)
        first = tl.load(low + m, mask=mine, other=0)
        return first, tl.load(high + m, mask=mine, other=-1)
    return m, m


@jit
@no_type_check
def seen(
    m,
    key,
    first,
    last,
    start,
    end,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    """Whether queries see keys, each along its axis; a WINDOW of 0 is none.

    Queries of other segments may see anything: nothing of theirs is kept or added.
    """
    if BOUNDS:  # which hold the rest as well
        mask = (key >= first) & (key <= last)
    else:  # no early return: Triton compiles what follows one, with its own type
        mask = (key >= start) & (key < end)
        if WINDOW:
            # Both ends at once: below 0 is far above as an unsigned number.
            ahead: tl.constexpr = 0 if CAUSAL else WINDOW - 1
            gap = (m + ahead) - key
            mask = mask & (gap.to(tl.uint32) < WINDOW + ahead)
        elif CAUSAL:
            mask = mask & (key <= m)
    return mask


@jit
@no_type_check
def load_rows(at, row, start, end, MASKED: tl.constexpr):
    """The rows that a block of pointers names; with MASKED, 0 outside start..end."""
    if MASKED:
        return tl.load(at, mask=((row >= start) & (row < end))[:, None], other=0)
    return tl.load(at)


@jit
@no_type_check
def attend(
    state,
    query,
    k,
    v,
    tiles,
    place,
    low,
    high,
    H: tl.constexpr,
    FACTOR: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BOUNDS: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Running maximum, sum and output after the whole blocks, or the masked ones."""
    start, end, origin, edges = tile_edges(tiles, place, ALIGN)
    if MASKED:
        m = tl.load(tiles + place * 8) + tl.arange(0, ROWS)
        lo, hi = limits(m, start, end, low, high, BOUNDS)
    top, total, out = state
    lane = tl.arange(0, BLOCK)
    inside = lane[:, None] * H + tl.arange(0, H)[None, :]
    begin, stop = turns(edges, MASKED)
    for turn in range(begin, stop):
        first_key = origin + block_of(turn, edges, MASKED) * BLOCK
        key = first_key + lane
        skip = first_key.to(tl.int64) * H  # elements may be more than 2^31
        keys = load_rows(k + skip + inside, key, start, end, MASKED)
        x = tl.dot(query, tl.trans(keys))
        if MASKED:
            mask = seen(
                m[:, None], key[None, :], lo[:, None], hi[:, None], start, end,
                CAUSAL, WINDOW, BOUNDS,
            )  # fmt: skip
            x = tl.where(mask, x, float("-inf"))
        # In base 2, with log2(e) in FACTOR: exp2 is an instruction, exp is not.
        new_top = tl.maximum(top, tl.max(x, 1) * FACTOR)
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(x * FACTOR - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        values = load_rows(v + skip + inside, key, start, end, MASKED)
        p = p.to(values.dtype)  # for the tensor cores; `total` has it unrounded
        out = tl.dot(p, values, out * shrink[:, None])
        top = new_top
    return top, total, out


@jit
@no_type_check
def forward(
    q,
    k,
    v,
    tiles,
    low,
    high,
    out,
    lse,
    M: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    FACTOR: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BOUNDS: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[m, g] and lse[g, m], in base 2, of one tile of queries of one head.

    FACTOR is the scale of the scores times log2(e).
    """
    place, group = tl.program_id(0) // G, tl.program_id(0) % G
    if tl.load(tiles + place * 8 + 2) == 0:  # a spare tile
        return
    m, mine, at = tile_rows(tiles, place, group, G, H, ROWS, False)
    query = tl.load(q + at, mask=mine[:, None], other=0)
    # Finite, so that no nan arises where a row sees nothing of its first block.
    top = tl.full((ROWS,), -1e30, tl.float32)
    state = top, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, H), tl.float32)
    for masked in tl.static_range(2):
        state = attend(
            state, query, k, v, tiles, place, low, high, H, FACTOR,
            CAUSAL, WINDOW, BOUNDS, ALIGN, ROWS, BLOCK, masked == 1,
        )  # fmt: skip
    top, total, acc = state
    # Rows past the last segment met no key: they return zero.
    total = tl.where(total == 0, 1, total)
    acc = acc / total[:, None]
    m, mine, at = tile_rows(tiles, place, group, G, H, ROWS, True)
    tl.store(lse + group * M + m, top + tl.log2(total), mask=mine)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mine[:, None])

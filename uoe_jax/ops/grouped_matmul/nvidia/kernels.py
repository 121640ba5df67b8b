"""Triton kernels of grouped matmul: products, weight gradients, sums of rows.

Tiles of M rows never straddle groups. A map made from the group offsets on the device
says which rows each tile has; rows past the last group are one more group, E, whose
result is zero. Letters: M rows, I inner, O outer width of a weight.
"""

from __future__ import annotations

from typing import no_type_check

from uoe_jax.ops._triton_language import jit, tl


@jit
@no_type_check
def swizzle(program, rows: tl.constexpr, columns: tl.constexpr, BAND: tl.constexpr):
    """(row, column) of a program: down bands of BAND rows, whose inputs stay in L2."""
    band = program // (BAND * columns)
    height = min(rows - band * BAND, BAND)
    place = program % (BAND * columns)
    return band * BAND + place % height, place // height


@jit
@no_type_check
def wrapped(place, SIDE: tl.constexpr, TILE: tl.constexpr):
    """place % SIDE, for loads past a side that fills no tile.

    Wrapping keeps runs of neighbours, and the compiler is told of them: it loads a run
    with one copy of up to 16 bytes, but lone elements one by one, waiting for each.
    """
    # The largest power of two that divides the side, within a tile.
    RUN: tl.constexpr = min(SIDE & -SIDE, TILE)
    return tl.max_contiguous(tl.multiple_of(place % SIDE, RUN), RUN)


@jit
@no_type_check
def operands(
    x,
    w,
    ids,
    group,
    first,
    stop,
    column,
    I: tl.constexpr,
    O: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
):
    """Where the first INNER columns of a tile's rows lie, and its part of the weight.

    Rows past the group are computed as its first and not stored: no mask in the loop.
    """
    row = first + tl.arange(0, ROWS)
    source = tl.where(row < stop, row, first)
    if GATHER:
        source = tl.load(ids + source)
    at = column * OUTER + tl.arange(0, OUTER)
    if O % OUTER:
        at = wrapped(at, O, OUTER)
    i = tl.arange(0, INNER)
    # In 64 bits: rows times width passes 2**31 where batches are large.
    x_at = x + source.to(tl.int64)[:, None] * I + i[None, :]
    w_at = w + group.to(tl.int64) * (I * O)
    if TRANSPOSE:
        w_at += at[None, :] * I + i[:, None]
    else:
        w_at += i[:, None] * O + at[None, :]
    return x_at, w_at


@jit
@no_type_check
def add_product(
    total,
    x_at,
    w_at,
    left,
    I: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total + rows @ weight over INNER columns, of which `left` are there."""
    if I % INNER:
        i = tl.arange(0, INNER)
        # Not the integer 0, from which numbers of eight bits aren't made.
        a = tl.load(x_at, mask=i[None, :] < left, other=0.0)
        b = tl.load(w_at, mask=i[:, None] < left, other=0.0)
    else:
        a = tl.load(x_at)
        b = tl.load(w_at)
    return tl.dot(a, b, total, input_precision=PRECISION)


@jit
@no_type_check
def store_tile(
    out,
    total,
    ids,
    first,
    stop,
    column,
    O: tl.constexpr,
    SCATTER: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
):
    """Store a tile's rows that are of its group, each in its place or at its token."""
    row = first + tl.arange(0, ROWS)
    # Said again: as the operands' columns, carried through a loop over tiles, these are
    # no longer known to be neighbours, and are stored two bytes at a time.
    o = tl.multiple_of(column * OUTER + tl.arange(0, OUTER), OUTER)
    o = tl.max_contiguous(o, OUTER)
    inside = (row < stop)[:, None]
    if SCATTER:
        row = tl.load(ids + row, mask=row < stop, other=0)
    at = out + row.to(tl.int64)[:, None] * O + o[None, :]
    if O % OUTER:
        inside = inside & (o < O)[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@jit
@no_type_check
def products(
    x,
    w,
    tile_map,
    ids,
    out,
    TILES: tl.constexpr,
    I: tl.constexpr,
    O: tl.constexpr,
    E: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[m] = x[ids[m]] @ w[group of m]; w is [E, I, O], or [E, O, I] transposed.

    With SCATTER out[ids[m]] = x[m] @ w instead. tile_map is [3, TILES]: group, first
    row, end of the group. Above E: no tile.
    """
    tile, column = swizzle(tl.program_id(0), TILES, (O + OUTER - 1) // OUTER, BAND)
    group = tl.load(tile_map + tile)
    first = tl.load(tile_map + TILES + tile)
    stop = tl.load(tile_map + 2 * TILES + tile)
    if group > E:
        return
    x_at, w_at = operands(
        x, w, ids, group, first, stop, column, I, O, GATHER, TRANSPOSE, ROWS, INNER,
        OUTER,
    )  # fmt: skip
    total = tl.zeros((ROWS, OUTER), tl.float32)
    # The group past the last has no weight.
    for left in range(tl.where(group < E, I, 0), 0, -INNER):
        total = add_product(total, x_at, w_at, left, I, INNER, PRECISION)
        x_at += INNER
        w_at += INNER if TRANSPOSE else INNER * O
    store_tile(out, total, ids, first, stop, column, O, SCATTER, ROWS, OUTER)


@jit
@no_type_check
def products_in_turn(
    x,
    w,
    tile_map,
    ids,
    out,
    TILES: tl.constexpr,
    I: tl.constexpr,
    O: tl.constexpr,
    E: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BAND: tl.constexpr,
    PRECISION: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """As `products`, but each of PROGRAMS makes every PROGRAMS-th tile.

    Both loops are one to the compiler, so that the next tile's first rows are on their
    way while a tile is stored: of shallow products that is much of the time.
    """
    columns: tl.constexpr = (O + OUTER - 1) // OUTER
    turns: tl.constexpr = (I + INNER - 1) // INNER
    program = tl.program_id(0)
    rounds = (TILES * columns - program + PROGRAMS - 1) // PROGRAMS
    for number in tl.range(0, rounds, flatten=True):
        place = program + number * PROGRAMS
        tile, column = swizzle(place, TILES, columns, BAND)
        group = tl.load(tile_map + tile)
        first = tl.load(tile_map + TILES + tile)
        stop = tl.load(tile_map + 2 * TILES + tile)
        # Tiles that aren't there are made as well, from what is: nothing is stored.
        x_at, w_at = operands(
            x, w, ids, tl.minimum(group, E - 1), tl.minimum(first, stop - 1), stop,
            column, I, O, GATHER, TRANSPOSE, ROWS, INNER, OUTER,
        )  # fmt: skip
        total = tl.zeros((ROWS, OUTER), tl.float32)
        for turn in range(turns):
            left = I - turn * INNER
            total = add_product(total, x_at, w_at, left, I, INNER, PRECISION)
            x_at += INNER
            w_at += INNER if TRANSPOSE else INNER * O
        total = tl.where(group < E, total, 0)  # the group past the last has no weight
        store_tile(out, total, ids, first, stop, column, O, SCATTER, ROWS, OUTER)


@jit
@no_type_check
def named_rows(ids, first, stop, GATHER: tl.constexpr, ROWS: tl.constexpr):
    """The rows that ROWS places name, or their own numbers; 0 past the end."""
    row = first + tl.arange(0, ROWS)
    if GATHER:
        return tl.load(ids + row, mask=row < stop, other=0)
    return row


@jit
@no_type_check
def weight_grads(
    x,
    grad,
    offsets,
    x_ids,
    grad_ids,
    out,
    I: tl.constexpr,
    O: tl.constexpr,
    GATHER_X: tl.constexpr,
    GATHER_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BAND: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[e, s] = sum over the rows m of group e's share s of x[x_ids[m]] (outer) grad.

    The SPLITS shares of a group are runs of its rows, of equal steps; the last ones may
    be short or empty. AHEAD: ids are read a step before their rows are asked for, so
    that all stages hold rows and none waits for ids.
    """
    high: tl.constexpr = (I + INNER - 1) // INNER
    wide: tl.constexpr = (O + OUTER - 1) // OUTER
    # All tiles of a share follow each other: they read the same rows, which stay in L2.
    share = tl.program_id(0) // (high * wide)
    group = share // SPLITS
    up, column = swizzle(tl.program_id(0) % (high * wide), high, wide, BAND)
    i = up * INNER + tl.arange(0, INNER)
    o = column * OUTER + tl.arange(0, OUTER)
    i_at, o_at = i, o
    if I % INNER:
        i_at = wrapped(i, I, INNER)
    if O % OUTER:
        o_at = wrapped(o, O, OUTER)
    start = tl.load(offsets + group)
    stop = tl.load(offsets + group + 1)
    if SPLITS > 1:
        steps = (stop - start + ROWS * SPLITS - 1) // (ROWS * SPLITS)
        start += share % SPLITS * steps * ROWS
        stop = min(stop, start + steps * ROWS)
    total = tl.zeros((INNER, OUTER), tl.float32)
    x_row = named_rows(x_ids, start, stop, GATHER_X, ROWS)
    grad_row = named_rows(grad_ids, start, stop, GATHER_GRAD, ROWS)
    for first in range(start, stop, ROWS):
        inside = first + tl.arange(0, ROWS) < stop
        if not AHEAD:
            x_row = named_rows(x_ids, first, stop, GATHER_X, ROWS)
            grad_row = named_rows(grad_ids, first, stop, GATHER_GRAD, ROWS)
        x_at = x + x_row.to(tl.int64)[:, None] * I + i_at[None, :]
        grad_at = grad + grad_row.to(tl.int64)[:, None] * O + o_at[None, :]
        if AHEAD:
            x_row = named_rows(x_ids, first + ROWS, stop, GATHER_X, ROWS)
            grad_row = named_rows(grad_ids, first + ROWS, stop, GATHER_GRAD, ROWS)
        # Rows past the share are zero on both sides: 0 * nan is nan.
        a = tl.load(x_at, mask=inside[:, None], other=0)
        b = tl.load(grad_at, mask=inside[:, None], other=0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    # Each share has a place of its own: they are added up later, in their order.
    out_at = out + share.to(tl.int64) * (I * O) + i[:, None] * O + o[None, :]
    value = total.to(out.dtype.element_ty)
    if (I % INNER) or (O % OUTER):
        tl.store(out_at, value, mask=(i < I)[:, None] & (o < O)[None, :])
    else:
        tl.store(out_at, value)


@jit
@no_type_check
def sum_rows(
    rows,
    row_ids,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    X: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out[n] = sum over x of rows[row_ids[n, x]], in order; ids past M add nothing."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, WIDTH)
    token = tl.where(n < N, n, 0)  # its ids are loaded without a mask
    total = tl.zeros((TOKENS, WIDTH), tl.float32)
    for x in tl.static_range(X):
        row = tl.load(row_ids + token * X + x)
        at = rows + row.to(tl.int64)[:, None] * D + d[None, :]
        real = (row < M)[:, None] & (d < D)[None, :]
        total += tl.load(at, mask=real, other=0).to(tl.float32)
    out_at = out + n.to(tl.int64)[:, None] * D + d[None, :]
    value = total.to(out.dtype.element_ty)
    tl.store(out_at, value, mask=(n < N)[:, None] & (d < D)[None, :])

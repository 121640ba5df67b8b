"""Triton kernels of narrow experts: both products of a tile of rows in one program.

A tile's rows are of one expert. Their hidden sides stay in registers as the left side
of the second product, so neither the activations nor, backwards, the gradient's copy by
rows is read again. Letters: M rows, D width of a token, F hidden width of an expert.
"""

from __future__ import annotations

from typing import no_type_check

from uoe_jax.ops._triton_language import jit, tl
from uoe_jax.ops.grouped_matmul.nvidia.kernels import add_product, wrapped


@jit
@no_type_check
def gelu(x, SLOPE: tl.constexpr, ROUGH: tl.constexpr):
    """Gelu of float32 in the tanh form, or its slope (Hendrycks and Gimpel 2016).

    ROUGH: by the card's own tanh, whose error is 2**-11 of its value: below that of a
    result in 16 bits, and a third of the instructions.
    """
    square = x * x
    inner = x * (0.7978845608028654 + 0.03567740641322301 * square)
    if ROUGH:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [inner], tl.float32, True, 1
        )
    else:
        tanh = 2 * tl.sigmoid(2 * inner) - 1
    share = 0.5 + 0.5 * tanh
    if not SLOPE:
        return x * share
    # Of tanh, 1 - tanh**2; of what is in it, times x / 2.
    steep = x * (0.3989422804014327 + 0.05351610961983451 * square)
    return share + steep * (1 - tanh * tanh)


@jit
@no_type_check
def tile_rows(tile_map, ids, TILES: tl.constexpr, ROWS: tl.constexpr):
    """A program's group, its rows, which are there, and the tokens they are of.

    Rows past the group are its first once more, and not stored: no mask in the loops.
    """
    tile = tl.program_id(0)
    group = tl.load(tile_map + tile)
    first = tl.load(tile_map + TILES + tile)
    stop = tl.load(tile_map + 2 * TILES + tile)
    row = first + tl.arange(0, ROWS)
    there = row < stop
    token = tl.load(ids + tl.where(there, row, first), mask=first < stop, other=0)
    return group, row.to(tl.int64)[:, None], there[:, None], token.to(tl.int64)[:, None]


@jit
@no_type_check
def gathered_product(
    x,
    w,
    token,
    D: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x[token] @ HIDDEN columns at `w`, which lie STEP further for each entry of D."""
    i = tl.arange(0, INNER)
    x_at = x + token * D + i[None, :]
    total = tl.zeros((ROWS, HIDDEN), tl.float32)
    for left in range(D, 0, -INNER):
        total = add_product(total, x_at, w, left, D, INNER, PRECISION)
        x_at += INNER
        w += INNER * STEP
    return total


@jit
@no_type_check
def zero_rows(out, row, there, D: tl.constexpr, OUTER: tl.constexpr):
    """Zeros in rows of no expert, which sums over a token's rows may read."""
    o = tl.arange(0, OUTER)[None, :]
    for column in range(0, D, OUTER):
        at = out + row * D + column + o
        inside = there & (column + o < D)
        zeros = tl.zeros((there.shape[0], OUTER), out.dtype.element_ty)
        tl.store(at, zeros, mask=inside)


@jit
@no_type_check
def store_products(
    out,
    hidden,
    w,
    row,
    there,
    D: tl.constexpr,
    F: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store hidden rows, a tuple of blocks, times w [F, D], or [D, F] transposed."""
    f = tl.arange(0, HIDDEN)[:, None]
    for column in range(0, D, OUTER):
        o = tl.max_contiguous(
            tl.multiple_of(column + tl.arange(0, OUTER), OUTER), OUTER
        )
        o_at = o
        if D % OUTER:
            o_at = wrapped(o, D, OUTER)
        total = tl.zeros((ROWS, OUTER), tl.float32)
        for block in tl.static_range(len(hidden)):
            place = block * HIDDEN + f
            at = w + (
                o_at[None, :] * F + place if TRANSPOSE else place * D + o_at[None, :]
            )
            side = (
                tl.load(at) if F % HIDDEN == 0 else tl.load(at, mask=place < F, other=0)
            )
            total = tl.dot(hidden[block], side, total, input_precision=PRECISION)
        inside = there
        if D % OUTER:
            inside = inside & (o < D)[None, :]
        value = total.to(out.dtype.element_ty)
        tl.store(out + row * D + o[None, :], value, mask=inside)


@jit
@no_type_check
def forward(
    x,
    w_up,
    w_down,
    factors,
    tile_map,
    ids,
    ups,
    hiddens,
    out,
    TILES: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTER: tl.constexpr,
    SAVES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUGH: tl.constexpr,
):
    """hiddens[m] = gelu(ups[m]) * factors[m] of ups[m] = x[ids[m]] @ w_up, and
    out[m] = hiddens[m] @ w_down.

    w_up is [E, D, F], w_down [E, F, D]; tile_map is [3, TILES]: group, first row, end
    of the group. Above E: no tile. Group E has no weights, and its `out` is zero.
    """
    group, row, there, token = tile_rows(tile_map, ids, TILES, ROWS)
    if group > E:
        return
    if group == E:
        zero_rows(out, row, there, D, OUTER)
        return
    w_up += group.to(tl.int64) * (D * F)
    w_down += group.to(tl.int64) * (F * D)
    factor = tl.load(factors + row, mask=there, other=0)
    hidden = ()
    for block in tl.static_range((F + HIDDEN - 1) // HIDDEN):
        f = tl.max_contiguous(
            tl.multiple_of(block * HIDDEN + tl.arange(0, HIDDEN), HIDDEN), HIDDEN
        )
        f_at = f
        if F % HIDDEN:
            f_at = wrapped(f, F, HIDDEN)
        w_at = w_up + tl.arange(0, INNER)[:, None] * F + f_at[None, :]
        up = gathered_product(x, w_at, token, D, F, ROWS, INNER, HIDDEN, PRECISION)
        inside = there & (f < F)[None, :]
        if SAVES:
            value = up.to(ups.dtype.element_ty)
            tl.store(ups + row * F + f[None, :], value, mask=inside)
        # Not of the rounded ups: the compiler would compute gelu once in the layout of
        # their store and once in that of the product.
        found = gelu(up, False, ROUGH) * factor
        if F % HIDDEN:
            found = tl.where((f < F)[None, :], found, 0)
        found = found.to(ups.dtype.element_ty)
        if SAVES:
            tl.store(hiddens + row * F + f[None, :], found, mask=inside)
        hidden = hidden + (found,)
    store_products(
        out, hidden, w_down, row, there, D, F, False, ROWS, HIDDEN, OUTER, PRECISION
    )


@jit
@no_type_check
def backward(
    grad,
    w_up,
    w_down,
    factors,
    ups,
    tile_map,
    ids,
    d_ups,
    d_factors,
    d_rows,
    TILES: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTER: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUGH: tl.constexpr,
):
    """Of `forward`, whose sums by token have the gradient grad [N, D].

    d_ups, d_factors and d_rows = d_ups @ w_up^T are gradients by row.
    """
    group, row, there, token = tile_rows(tile_map, ids, TILES, ROWS)
    if group > E:
        return
    if group == E:
        zero_rows(d_rows, row, there, D, OUTER)
        tl.store(d_factors + row, tl.zeros((ROWS, 1), tl.float32), mask=there)
        return
    w_up += group.to(tl.int64) * (D * F)
    w_down += group.to(tl.int64) * (F * D)
    factor = tl.load(factors + row, mask=there, other=0)
    share = tl.zeros((ROWS,), tl.float32)
    blocks = ()
    for block in tl.static_range((F + HIDDEN - 1) // HIDDEN):
        f = tl.max_contiguous(
            tl.multiple_of(block * HIDDEN + tl.arange(0, HIDDEN), HIDDEN), HIDDEN
        )
        f_at = f
        if F % HIDDEN:
            f_at = wrapped(f, F, HIDDEN)
        w_at = w_down + f_at[None, :] * D + tl.arange(0, INNER)[:, None]
        d_hidden = gathered_product(
            grad, w_at, token, D, 1, ROWS, INNER, HIDDEN, PRECISION
        )
        inside = there & (f < F)[None, :]
        at = row * F + f[None, :]
        up = tl.load(ups + at, mask=inside, other=0).to(tl.float32)
        # Bound to the product, so that gelu is computed in its layout alone: else once
        # more in that of the load, and moved in float32.
        up += 0.0 * d_hidden
        share += tl.sum(d_hidden * gelu(up, False, ROUGH), axis=1)
        d_up = (d_hidden * factor * gelu(up, True, ROUGH)).to(ups.dtype.element_ty)
        tl.store(d_ups + at, d_up, mask=inside)
        blocks = blocks + (d_up,)
    tl.store(d_factors + row, share[:, None], mask=there)
    store_products(
        d_rows, blocks, w_up, row, there, D, F, True, ROWS, HIDDEN, OUTER, PRECISION
    )

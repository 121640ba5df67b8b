"""Triton kernels of segment attention's backward pass, from saved logsumexps.

Two kernels that each compute the weights, so that every sum has one program and one
order: the same bits on every run. Letters as in `triton_forward`.
"""

from __future__ import annotations

from typing import no_type_check

from uoe_jax.ops._triton_language import jit, tl
from uoe_jax.ops.segment_attention.nvidia.triton_forward import (
    block_of,
    limits,
    load_rows,
    seen,
    tile_edges,
    tile_rows,
    turns,
)


@jit
@no_type_check
def sum_over_keys(
    dq,
    query,
    grad,
    stats,
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
    """dq plus dS K over the whole blocks, or the masked ones."""
    start, end, origin, edges = tile_edges(tiles, place, ALIGN)
    if MASKED:
        m = tl.load(tiles + place * 8) + tl.arange(0, ROWS)
        lo, hi = limits(m, start, end, low, high, BOUNDS)
    lse, delta = stats
    lane = tl.arange(0, BLOCK)
    inside = lane[:, None] * H + tl.arange(0, H)[None, :]
    begin, stop = turns(edges, MASKED)
    for turn in range(begin, stop):
        first_key = origin + block_of(turn, edges, MASKED) * BLOCK
        key = first_key + lane
        skip = first_key.to(tl.int64) * H
        keys = load_rows(k + skip + inside, key, start, end, MASKED)
        values = load_rows(v + skip + inside, key, start, end, MASKED)
        x = tl.dot(query, tl.trans(keys))
        if MASKED:
            mask = seen(
                m[:, None], key[None, :], lo[:, None], hi[:, None], start, end,
                CAUSAL, WINDOW, BOUNDS,
            )  # fmt: skip
            x = tl.where(mask, x, float("-inf"))
        # The weights at once: with the saved logsumexp no running maximum is needed.
        p = tl.exp2(x * FACTOR - lse[:, None])
        dp = tl.dot(grad, tl.trans(values))
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq)
    return dq


@jit
@no_type_check
def query_gradient(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    tiles,
    low,
    high,
    dq,
    M: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BOUNDS: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dq[m, g] of one tile of queries of one head; delta[g, m] = sum(grad * out)."""
    place, group = tl.program_id(0) // G, tl.program_id(0) % G
    if tl.load(tiles + place * 8 + 2) == 0:
        return
    m, mine, at = tile_rows(tiles, place, group, G, H, ROWS, False)
    query = tl.load(q + at, mask=mine[:, None], other=0)
    cotangent = tl.load(grad + at, mask=mine[:, None], other=0)
    # Zeros for rows of other segments, as their cotangents: their dS is then 0.
    stats = (
        tl.load(lse + group * M + m, mask=mine, other=0),
        tl.load(delta + group * M + m, mask=mine, other=0),
    )
    acc = tl.zeros((ROWS, H), tl.float32)
    for masked in tl.static_range(2):
        acc = sum_over_keys(
            acc, query, cotangent, stats, k, v, tiles, place, low, high, H, FACTOR,
            CAUSAL, WINDOW, BOUNDS, ALIGN, ROWS, BLOCK, masked == 1,
        )  # fmt: skip
    acc = acc * SCALE  # the factor of every dS, once instead of in each block
    m, mine, at = tile_rows(tiles, place, group, G, H, ROWS, True)
    tl.store(dq + at, acc.to(dq.dtype.element_ty), mask=mine[:, None])


@jit
@no_type_check
def sum_over_queries(
    sums,
    keys,
    values,
    q,
    grad,
    lse,
    delta,
    tiles,
    place,
    low,
    high,
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
    MASKED: tl.constexpr,
):
    """dk plus dS^T Q and dv plus P^T dO over the whole blocks, or the masked ones."""
    start, end, origin, edges = tile_edges(tiles, place, ALIGN)
    key = tl.load(tiles + place * 8) + tl.arange(0, ROWS)
    dk, dv = sums
    lane = tl.arange(0, BLOCK)
    inside = lane[:, None] * (G * H) + tl.arange(0, H)[None, :]
    begin, stop = turns(edges, MASKED)
    # All heads of a block before the next one: their rows lie side by side in memory.
    for index in range(begin * G, stop * G):
        step = index - begin * G
        turn, group = begin + step // G, step % G
        first_row = origin + block_of(turn, edges, MASKED) * BLOCK
        m = first_row + lane
        skip = (first_row.to(tl.int64) * G + group) * H
        query = load_rows(q + skip + inside, m, start, end, MASKED)
        cotangent = load_rows(grad + skip + inside, m, start, end, MASKED)
        lse_at, delta_at = lse + group * M + m, delta + group * M + m
        if MASKED:
            mine = (m >= start) & (m < end)
            log_sum = tl.load(lse_at, mask=mine, other=0)
            shift = tl.load(delta_at, mask=mine, other=0)
        else:
            log_sum, shift = tl.load(lse_at), tl.load(delta_at)
        x = tl.dot(keys, tl.trans(query))
        if MASKED:
            row = m[None, :]
            lo, hi = limits(row, start, end, low, high, BOUNDS)
            mask = seen(row, key[:, None], lo, hi, start, end, CAUSAL, WINDOW, BOUNDS)
            x = tl.where(mask, x, float("-inf"))
        p = tl.exp2(x * FACTOR - log_sum[None, :])
        weights = p.to(cotangent.dtype)
        dv = tl.dot(weights, cotangent, dv)
        dp = tl.dot(values, tl.trans(cotangent))
        ds = (p * (dp - shift[None, :])).to(query.dtype)
        dk = tl.dot(ds, query, dk)
    return dk, dv


@jit
@no_type_check
def key_gradients(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    tiles,
    low,
    high,
    dk,
    dv,
    M: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BOUNDS: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dk[m] and dv[m] of one tile of keys, summed over blocks and query heads."""
    place = tl.program_id(0)
    if tl.load(tiles + place * 8 + 2) == 0:
        return
    m, mine, at = tile_rows(tiles, place, 0, 1, H, ROWS, False)
    keys = tl.load(k + at, mask=mine[:, None], other=0)
    values = tl.load(v + at, mask=mine[:, None], other=0)
    sums = tl.zeros((ROWS, H), tl.float32), tl.zeros((ROWS, H), tl.float32)
    for masked in tl.static_range(2):
        sums = sum_over_queries(
            sums, keys, values, q, grad, lse, delta, tiles, place, low, high,
            M, G, H, FACTOR, CAUSAL, WINDOW, BOUNDS, ALIGN, ROWS, BLOCK, masked == 1,
        )  # fmt: skip
    key_sum, value_sum = sums
    key_sum = key_sum * SCALE
    m, mine, at = tile_rows(tiles, place, 0, 1, H, ROWS, True)
    tl.store(dk + at, key_sum.to(dk.dtype.element_ty), mask=mine[:, None])
    tl.store(dv + at, value_sum.to(dv.dtype.element_ty), mask=mine[:, None])

"""Triton kernels that split rows into rotated heads, and join them turned back.

Letters: M rows, J key/value heads, G queries of each, H width of a head. A row has J*G
queries, then J keys, then J values; apart, all rows of a key/value head are in a run.
"""

from __future__ import annotations

from typing import no_type_check

from uoe_jax.ops._triton_language import jit, tl


@jit
@no_type_check
def angles(table, ids, M: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr):
    """A program's rows, which of them are there, and the cosines and sines of each."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.load(ids + m, mask=m < M, other=0)
    half = tl.arange(0, H // 2)
    at = table + token.to(tl.int64)[:, None] * H + half[None, :]
    return m.to(tl.int64), (m < M)[:, None], tl.load(at), tl.load(at + H // 2)


@jit
@no_type_check
def turn(source, target, cos, sin, inside, H: tl.constexpr):
    """Write the heads at `source`, turned by the angles, to `target`."""
    first = tl.load(source, mask=inside, other=0).to(tl.float32)
    second = tl.load(source + H // 2, mask=inside, other=0).to(tl.float32)
    dtype = target.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(target + H // 2, (second * cos + first * sin).to(dtype), mask=inside)


@jit
@no_type_check
def move(source, target, inside, H: tl.constexpr):
    """Write the heads at `source` to `target` as they are."""
    for part in tl.static_range(2):
        at = part * (H // 2)
        tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)


@jit
@no_type_check
def split_heads(
    rows,
    table,
    ids,
    q,
    k,
    v,
    M: tl.constexpr,
    J: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
):
    """q [J, M, G, H], k and v [J, M, H] of rows [M, J(G + 2)H]; q and k rotated."""
    m, inside, cos, sin = angles(table, ids, M, H, ROWS)
    half = tl.arange(0, H // 2)[None, :]
    at = rows + m[:, None] * (J * (G + 2) * H) + half
    for j in tl.static_range(J):
        row = (m + j * M)[:, None]
        for g in tl.static_range(G):
            to = q + (row * G + g) * H + half
            turn(at + (j * G + g) * H, to, cos, sin, inside, H)
        turn(at + (J * G + j) * H, k + row * H + half, cos, sin, inside, H)
        move(at + (J * G + J + j) * H, v + row * H + half, inside, H)


@jit
@no_type_check
def join_heads(
    q,
    k,
    v,
    table,
    ids,
    rows,
    M: tl.constexpr,
    J: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
):
    """rows of q, k and v, as `split_heads` has them; q and k turned back."""
    m, inside, cos, sin = angles(table, ids, M, H, ROWS)
    half = tl.arange(0, H // 2)[None, :]
    at = rows + m[:, None] * (J * (G + 2) * H) + half
    for j in tl.static_range(J):
        row = (m + j * M)[:, None]
        for g in tl.static_range(G):
            source = q + (row * G + g) * H + half
            turn(source, at + (j * G + g) * H, cos, -sin, inside, H)
        turn(k + row * H + half, at + (J * G + j) * H, cos, -sin, inside, H)
        move(v + row * H + half, at + (J * G + J + j) * H, inside, H)

"""A Triton kernel that routes single tokens: norm, scores, picks and gates at once.

Letters: B rows of width D, E experts, the first S of them always on, K others picked.
"""

from __future__ import annotations

from typing import no_type_check

from uoe_jax.ops._triton_language import jit, tl


@jit
@no_type_check
def gate_of(score, picked, RULE: tl.constexpr, K: tl.constexpr):
    """Gates of the picked experts, by the rule of their router; 0 of the others."""
    there = picked.to(tl.float32)
    if RULE == "one":
        return there
    if RULE == "sigmoid":
        return there * 2 * tl.sigmoid(score)
    if RULE == "affinity":
        affinity = there * tl.sigmoid(score)
        return affinity / (tl.sum(affinity) + 1e-20)
    counted = picked if RULE != "softmax_all" else score > float("-inf")
    peak = tl.max(tl.where(counted, score, float("-inf")))
    share = tl.where(counted, tl.exp(score - peak), 0)
    share = there * share / tl.sum(share)
    return share * K if RULE == "scaled_softmax" else share


@jit
@no_type_check
def rows_of(weight, d, e, D: tl.constexpr, E: tl.constexpr):
    """Weights [BD, EE] of the inputs d."""
    there = (d < D)[:, None] & (e < E)[None, :]
    return tl.load(weight + d[:, None] * E + e[None, :], mask=there, other=0)


@jit
@no_type_check
def scored(x, scale, out, d, w, inverse, D: tl.constexpr):
    """Products [BD, EE] of inputs d with their weights; the normed inputs are kept."""
    value = tl.load(x + d, mask=d < D, other=0).to(tl.float32)
    factor = tl.load(scale + d, mask=d < D, other=0).to(tl.float32)
    row = (value * inverse * factor).to(out.dtype.element_ty)
    tl.store(out + d, row, mask=d < D)
    return row.to(tl.float32)[:, None] * w.to(tl.float32)


@jit
@no_type_check
def route(
    x,
    scale,
    weight,
    bias,
    out,
    experts,
    gates,
    table,
    D: tl.constexpr,
    DD: tl.constexpr,
    BD: tl.constexpr,
    E: tl.constexpr,
    EE: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    RULE: tl.constexpr,
    AFFINE: tl.constexpr,
    EPS: tl.constexpr,
):
    """out [B, D]: the norm of x; experts, gates [B, S + K]; table [B, S + E] of gates.

    Scores are in float32, of weights [D, E]; equal ones go to the lower expert. AFFINE:
    the bias is added to the sigmoid of a score. A program routes one row.
    """
    b = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EE)
    d = tl.arange(0, BD)
    # Asked for before the norm, which waits for its own sum.
    w = rows_of(weight, d, e, D, E)
    whole = tl.arange(0, DD)
    value = tl.load(x + b * D + whole, mask=whole < D, other=0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value) / D + EPS)
    total = scored(x + b * D, scale, out + b * D, d, w, inverse, D)
    for first in tl.static_range(BD, D, BD):
        w = rows_of(weight, first + d, e, D, E)
        total += scored(x + b * D, scale, out + b * D, first + d, w, inverse, D)
    score = tl.where(e < E, tl.sum(total, axis=0), float("-inf"))
    key = tl.sigmoid(score) if AFFINE else score
    key += tl.load(bias + e, mask=e < E, other=0).to(tl.float32)
    key = tl.where(e < E, key, float("-inf"))
    # How many experts are before this one.
    other = tl.expand_dims(key, 0)
    mine = tl.expand_dims(key, 1)
    f = tl.expand_dims(e, 0)
    before = (other > mine) | ((other == mine) & (f < tl.expand_dims(e, 1)))
    rank = tl.sum(before.to(tl.int32), axis=1)
    picked = (rank < K) & (e < E)
    gate = gate_of(score, picked, RULE, K)
    at = b * (S + K) + S + rank
    tl.store(experts + at, e + S, mask=picked)
    tl.store(gates + at, gate, mask=picked)
    tl.store(table + b * (S + E) + S + e, gate, mask=e < E)
    if S > 0:
        s = tl.arange(0, EE)
        one = tl.full((EE,), 1.0, tl.float32)
        tl.store(experts + b * (S + K) + s, s, mask=s < S)
        tl.store(gates + b * (S + K) + s, one, mask=s < S)
        tl.store(table + b * (S + E) + s, one, mask=s < S)

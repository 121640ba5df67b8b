"""Triton kernels of a router of tokens, and of its gradient.

Letters: N tokens of width D, E experts, K of them picked; EE is the power of two of
columns that holds E. Beside bfloat16 tokens a weight is three bfloat16 pieces
[3, D, EE] (SPLIT), beside others itself [1, D, EE].
"""

from __future__ import annotations

from typing import no_type_check

from uoe_jax.ops._triton_language import jit, tl


@jit
@no_type_check
def softmax(score, inside):
    """Probabilities, their logarithms and the log-partition of rows of scores."""
    peak = tl.max(tl.where(inside, score, float("-inf")), axis=1)
    share = tl.where(inside, tl.exp(score - peak[:, None]), 0)
    total = tl.sum(share, axis=1)
    partition = peak + tl.log(total)
    return share / total[:, None], score - partition[:, None], partition


@jit
@no_type_check
def weight_of(counted, n, N: tl.constexpr, COUNTED: tl.constexpr):
    """What tokens weigh in sums: 0 those that aren't counted, or aren't there."""
    if COUNTED:
        return tl.load(counted + n, mask=n < N, other=0)
    return (n < N).to(tl.float32)


@jit
@no_type_check
def route(
    x,
    weight,
    bias,
    counted,
    scores,
    picks,
    chosen,
    sums,
    N: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    EE: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    COUNTED: tl.constexpr,
    SCALARS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scores [N, E]; picks and their scores [N, K]; sums of each program's tokens.

    A program's sums are EE counts of picks, EE probabilities, z and entropy. The
    highest score and bias goes first; of equal ones the lower expert.
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EE)[None, :]
    # Rows past the last are another's: read, so that loads need no mask, not kept.
    row = x + tl.minimum(n, N - 1).to(tl.int64)[:, None] * D
    large = tl.zeros((ROWS, EE), tl.float32)
    middle = tl.zeros((ROWS, EE), tl.float32)
    small = tl.zeros((ROWS, EE), tl.float32)
    for first in range(0, D, BLOCK):
        d = first + tl.arange(0, BLOCK)
        at = weight + d[:, None] * EE + e
        if D % BLOCK == 0:
            value = tl.load(row + d[None, :])
            w = tl.load(at)
        else:
            value = tl.load(row + d[None, :], mask=d[None, :] < D, other=0)
            w = tl.load(at, mask=d[:, None] < D, other=0)
        if SPLIT:
            if D % BLOCK == 0:
                w2 = tl.load(at + D * EE)
                w3 = tl.load(at + 2 * D * EE)
            else:
                w2 = tl.load(at + D * EE, mask=d[:, None] < D, other=0)
                w3 = tl.load(at + 2 * D * EE, mask=d[:, None] < D, other=0)
            large = tl.dot(value, w, large)
            middle = tl.dot(value, w2, middle)
            small = tl.dot(value, w3, small)
        else:
            value = value.to(tl.float32)
            large = tl.dot(value, w, large, input_precision="tf32x3")
    score = large + (middle + small)
    there = n < N
    inside = e < E
    n = n.to(tl.int64)
    tl.store(scores + n[:, None] * E + e, score, mask=there[:, None] & inside)

    # As whole numbers of the same order, in which NaN has a place too: picks are always
    # E different experts. The least number is for those that can't be picked any more.
    gone = -2147483648
    key = score + tl.load(bias + e, mask=inside, other=0)
    key = key.to(tl.int32, bitcast=True)
    key = key ^ ((key >> 31) & 0x7FFFFFFF)
    key = tl.where(inside, tl.maximum(key, gone + 1), gone)
    for k in range(K):
        best = tl.max(key, axis=1)[:, None]
        pick = tl.min(tl.where(key == best, e, EE), axis=1)
        hit = e == pick[:, None]
        value = tl.sum(tl.where(hit, score, 0), axis=1)
        tl.store(picks + n * K + k, pick, mask=there)
        tl.store(chosen + n * K + k, value, mask=there)
        key = tl.where(hit, gone, key)

    counts = weight_of(counted, n, N, COUNTED)
    taken = (inside & (key == gone)).to(tl.float32)
    prob, logarithm, partition = softmax(score, inside)
    entropy = -tl.sum(tl.where(inside, prob * logarithm, 0), axis=1)
    own = sums + tl.program_id(0) * (2 * EE + SCALARS)
    e = tl.arange(0, EE)
    tl.store(own + e, tl.sum(taken * counts[:, None], axis=0))
    tl.store(own + EE + e, tl.sum(prob * counts[:, None], axis=0))
    tl.store(own + 2 * EE, tl.sum(partition * partition * counts))
    tl.store(own + 2 * EE + 1, tl.sum(entropy * counts))
    free = tl.arange(0, SCALARS)
    tl.store(own + 2 * EE + free, tl.zeros((SCALARS,), tl.float32), mask=free > 1)


@jit
@no_type_check
def score_grads(
    scores,
    picks,
    d_chosen,
    d_sums,
    counted,
    d_scores,
    N: tl.constexpr,
    E: tl.constexpr,
    EE: tl.constexpr,
    K: tl.constexpr,
    COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """d_scores [N, EE] of d_chosen [N, K] and d_sums: of EE probs, z and entropy."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = n < N
    n = n.to(tl.int64)
    e = tl.arange(0, EE)[None, :]
    inside = e < E
    at = n[:, None] * E + e
    score = tl.load(scores + at, mask=there[:, None] & inside, other=0)
    prob, logarithm, partition = softmax(score, inside)
    d_prob = tl.load(d_sums + e)
    grad = d_prob - tl.sum(prob * d_prob, axis=1)[:, None]
    grad += tl.load(d_sums + EE) * 2 * partition[:, None]
    entropy = -tl.sum(tl.where(inside, prob * logarithm, 0), axis=1)[:, None]
    grad -= tl.load(d_sums + EE + 1) * (logarithm + entropy)
    counts = weight_of(counted, n, N, COUNTED)
    grad = tl.where(inside, grad * prob, 0) * counts[:, None]
    for k in range(K):
        pick = tl.load(picks + n * K + k, mask=there, other=EE)[:, None]
        own = tl.load(d_chosen + n * K + k, mask=there, other=0)[:, None]
        grad += tl.where(e == pick, own, 0)
    tl.store(d_scores + n[:, None] * EE + e, grad, mask=there[:, None])


@jit
@no_type_check
def product_grads(
    x,
    weight,
    d_scores,
    d_x,
    d_weight,
    N: tl.constexpr,
    D: tl.constexpr,
    EE: tl.constexpr,
    SPLIT: tl.constexpr,
    RUN: tl.constexpr,
    ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """d_x [N, D] = d_scores @ weight.T; d_weight [parts, D, EE] adds up to its own.

    A program takes RUN tokens of COLUMNS inputs, so each x is read once for both.
    """
    c = tl.program_id(0) % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(0) // ACROSS
    e = tl.arange(0, EE)
    wide = (c < D)[None, :]
    at = weight + c[None, :] * EE + e[:, None]
    w = tl.load(at, mask=wide, other=0)
    w2 = w
    if SPLIT:
        w2 = tl.load(at + D * EE, mask=wide, other=0)
    total = tl.zeros((COLUMNS, EE), tl.float32)
    for first in range(0, RUN, ROWS):
        n = part * RUN + first + tl.arange(0, ROWS)
        there = (n < N)[:, None]
        row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
        value = tl.load(x + row * D + c[None, :], mask=wide, other=0)
        grad = tl.load(d_scores + row * EE + e[None, :], mask=there, other=0)
        if SPLIT:
            g1 = grad.to(tl.bfloat16)
            rest = grad - g1.to(tl.float32)
            g2 = rest.to(tl.bfloat16)
            g3 = (rest - g2.to(tl.float32)).to(tl.bfloat16)
            back = tl.dot(g1, w2)
            back = tl.dot(g2, w, back)
            back = tl.dot(g1, w, back)
            turned = tl.trans(value)
            total = tl.dot(turned, g1, total)
            total = tl.dot(turned, g2, total)
            total = tl.dot(turned, g3, total)
        else:
            back = tl.dot(grad, w, input_precision="tf32x3")
            turned = tl.trans(value.to(tl.float32))
            total = tl.dot(turned, grad, total, input_precision="tf32x3")
        back = back.to(d_x.dtype.element_ty)
        tl.store(d_x + row * D + c[None, :], back, mask=there & wide)
    at = d_weight + (part * D + c[:, None]) * EE + e[None, :]
    tl.store(at, total, mask=(c < D)[:, None])

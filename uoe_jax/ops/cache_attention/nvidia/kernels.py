"""A Triton kernel of one new token's attention over a cache: it also writes the token.

Letters: B rows, X picks of a token, J key/value heads of an expert with G query heads
each, of width H, of values W. A row's cache is a log: R rows of J heads, X of them a
token; dense attention is one expert with all heads that every token picks.
"""

from __future__ import annotations

from typing import no_type_check

from uoe_jax.ops._triton_language import jit, tl


@jit
@no_type_check
def settle(
    at,
    there,
    scale,
    cosines,
    sines,
    h,
    angle,
    H: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Both halves [M, HH] of heads, normalised and rotated, in their own dtype.

    Numbers h of a half are turned by the angles with these numbers.
    """
    half: tl.constexpr = H // 2
    dtype = at.dtype.element_ty
    first = tl.load(at, mask=there, other=0).to(tl.float32)
    second = tl.load(at + half, mask=there, other=0).to(tl.float32)
    if NORM:
        square = tl.sum(first * first + second * second, axis=1) / H
        inverse = tl.rsqrt(square + EPS)[:, None]
        near = tl.load(scale + h, mask=h < half, other=0).to(tl.float32)
        far = tl.load(scale + half + h, mask=h < half, other=0).to(tl.float32)
        first = (first * inverse * near[None, :]).to(dtype).to(tl.float32)
        second = (second * inverse * far[None, :]).to(dtype).to(tl.float32)
    if ROTATE:
        cos = tl.load(cosines + angle, mask=h < half, other=0)[None, :]
        sin = tl.load(sines + angle, mask=h < half, other=0)[None, :]
        first, second = first * cos - second * sin, second * cos + first * sin
    return first.to(dtype), second.to(dtype)


@jit
@no_type_check
def look(
    keys,
    values,
    log,
    entry,
    r,
    inside,
    sought,
    j,
    J: tl.constexpr,
    H: tl.constexpr,
    HH: tl.constexpr,
    W: tl.constexpr,
    WW: tl.constexpr,
    ROUTED: tl.constexpr,
):
    """Which queries [M] see which rows r of a layer's log, their keys and values.

    Keys in two halves. Only rows that some query sees are read.
    """
    half: tl.constexpr = H // 2
    match = inside[None, :] & (sought >= 0)[:, None]
    if ROUTED:
        owner = tl.load(log + entry + r, mask=inside, other=-1)
        match = owner[None, :] == sought[:, None]
        inside = tl.max(match.to(tl.int32), axis=0) > 0
    h = tl.arange(0, HH)
    wide = tl.arange(0, WW)
    head = (entry + r) * J + j
    place = (head * H)[:, None]
    near = inside[:, None] & (h < half)[None, :]
    k1 = tl.load(keys + place + h[None, :], mask=near, other=0)
    k2 = tl.load(keys + place + half + h[None, :], mask=near, other=0)
    far = inside[:, None] & (wide < W)[None, :]
    v = tl.load(values + (head * W)[:, None] + wide[None, :], mask=far, other=0)
    return match, k1, k2, v


@jit
@no_type_check
def weigh(
    q1,
    q2,
    match,
    k1,
    k2,
    v,
    peak,
    total,
    acc,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Peak, sum and weighted values of a softmax that has seen these rows too."""
    score = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    score = tl.dot(q2, tl.trans(k2), score, input_precision=PRECISION)
    score = tl.where(match, score * FACTOR, float("-inf"))
    highest = tl.maximum(peak, tl.max(score, axis=1))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    chance = tl.exp2(score - base[:, None])
    fade = tl.exp2(peak - base)
    total = total * fade + tl.sum(chance, axis=1)
    acc = acc * fade[:, None]
    acc = tl.dot(chance.to(v.dtype), v, acc, input_precision=PRECISION)
    return highest, total, acc


@jit
@no_type_check
def attend(
    heads,
    cosines,
    sines,
    q_scale,
    k_scale,
    positions,
    experts,
    keys,
    values,
    log,
    layer,
    pairs,
    out,
    weights,
    new_keys,
    new_values,
    new_log,
    B: tl.constexpr,
    R: tl.constexpr,
    X: tl.constexpr,
    J: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    SLOTS: tl.constexpr,
    M: tl.constexpr,
    HH: tl.constexpr,
    W: tl.constexpr,
    WW: tl.constexpr,
    ANGLES: tl.constexpr,
    PAIRED: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARE: tl.constexpr,
    WINDOW: tl.constexpr,
    ROUTED: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    ROTATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [B, SPLITS, SLOTS, J, G, W] and the log2 sums of its parts.

    heads [B, SLOTS, (J * G + J) * H + J * W] are a token's queries, keys and values, of
    its picks in order, or with SLOTS > X of all experts; keys [n, B, R, J, H], values
    [n, B, R, J, W]. Cosines and sines [B, ANGLES] are those of a token's pairs in
    order, if PAIRED those whose numbers are pairs [J, H / 2]. Scores are divided by the
    root of SCORES.
    A program has one key head of a row and SHARE rows of its log, whole BLOCKs.
    """
    number = tl.program_id(0)
    split = number % SPLITS
    j = number // SPLITS % J
    b = (number // (SPLITS * J)).to(tl.int64)
    half: tl.constexpr = H // 2
    h = tl.arange(0, HH)
    angle = h
    if PAIRED:  # asked for first: the angles wait for it
        angle = tl.load(pairs + j * half + h, mask=h < half, other=0)
    m = tl.arange(0, M)
    there = m < X * G
    pick = tl.minimum(m // G, X - 1)
    group = m % G
    stored = tl.load(positions + b)  # tokens before this one
    expert = pick * 0
    slot = pick
    if ROUTED:
        expert = tl.load(experts + b * X + pick)
        if SLOTS > X:
            slot = expert
    sought = tl.where(there, expert, -2)
    entry = (tl.cast(layer, tl.int64) * B + b) * R
    low = split * SHARE
    if WINDOW > 0:
        low = tl.maximum(low, (stored - WINDOW + 1) * X)
    last = tl.minimum(stored * X, split * SHARE + SHARE)
    if SHARE == BLOCK:  # asked for before all else
        r = split * SHARE + tl.arange(0, BLOCK)
        inside = (r >= low) & (r < last)
        match, c1, c2, v = look(
            keys, values, log, entry, r, inside, sought, j, J, H, HH, W, WW, ROUTED
        )

    inner = there[:, None] & (h < half)[None, :]
    wide = tl.arange(0, WW)
    whole = there[:, None] & (wide < W)[None, :]
    token = heads + (b * SLOTS + slot)[:, None] * ((J * G + J) * H + J * W)
    cos, sin = cosines + b * ANGLES, sines + b * ANGLES
    query = token + ((j * G + group) * H)[:, None] + h[None, :]
    q1, q2 = settle(query, inner, q_scale, cos, sin, h, angle, H, NORM, EPS, ROTATE)
    peak = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, WW), tl.float32)
    factor: tl.constexpr = 1.4426950408889634 / SCORES**0.5
    if split == 0:  # the token itself
        key = token + (J * G + j) * H + h[None, :]
        k1, k2 = settle(key, inner, k_scale, cos, sin, h, angle, H, NORM, EPS, ROTATE)
        value = token + (J * G + J) * H + j * W + wide[None, :]
        mine = tl.load(value, mask=whole, other=0)
        at = entry + stored * X + pick
        written = there & (group == 0)
        head = at * J + j
        place = (head * H)[:, None]
        there1 = written[:, None] & (h < half)[None, :]
        tl.store(new_keys + place + h[None, :], k1, mask=there1)
        tl.store(new_keys + place + half + h[None, :], k2, mask=there1)
        there2 = written[:, None] & (wide < W)[None, :]
        tl.store(new_values + (head * W)[:, None] + wide[None, :], mine, mask=there2)
        if ROUTED:
            tl.store(new_log + at, expert, mask=written & (j == 0))
        own = tl.sum(q1.to(tl.float32) * k1.to(tl.float32), axis=1)
        own += tl.sum(q2.to(tl.float32) * k2.to(tl.float32), axis=1)
        peak = own * factor
        total = tl.full((M,), 1.0, tl.float32)
        acc = mine.to(tl.float32)

    if SHARE == BLOCK:
        peak, total, acc = weigh(
            q1, q2, match, c1, c2, v, peak, total, acc, factor, PRECISION
        )
    else:
        for start in range(low, last, BLOCK):
            r = start + tl.arange(0, BLOCK)
            match, c1, c2, v = look(
                keys, values, log, entry, r, r < last, sought, j,
                J, H, HH, W, WW, ROUTED,
            )  # fmt: skip
            peak, total, acc = weigh(
                q1, q2, match, c1, c2, v, peak, total, acc, factor, PRECISION
            )

    found = acc / tl.where(total > 0, total, 1.0)[:, None]
    head = ((b * SPLITS + split) * SLOTS + slot) * (J * G) + j * G + group
    place = head[:, None] * W + wide[None, :]
    tl.store(out + place, found.to(out.dtype.element_ty), mask=whole)
    if SPLITS > 1:
        # Without a row the peak is -inf, and so is this.
        sums = peak + tl.log2(tl.where(total > 0, total, 1.0))
        tl.store(weights + head, sums, mask=there)

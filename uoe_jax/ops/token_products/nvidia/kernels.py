"""Triton kernels that multiply single tokens with the weights of what they picked.

Letters: B rows of X picks among E experts, I inputs, O outputs. They are bound by the
bytes of the weights: a program reads whole rows of them, 16 bytes a thread and load.
"""

from __future__ import annotations

from typing import no_type_check

from uoe_jax.ops._triton_language import jit, tl


@jit
@no_type_check
def normed(x, scale, i, I: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """A row's values [II] in float32, divided by their root mean square if NORM."""
    value = tl.load(x + i, mask=i < I, other=0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(value * value) / I + EPS)
        factor = tl.load(scale + i, mask=i < I, other=0).to(tl.float32)
        value = (value * inverse * factor).to(x.dtype.element_ty).to(tl.float32)
    return value


@jit
@no_type_check
def gelu(x, EXACT: tl.constexpr):
    """x times the normal distribution function, or the tanh form of it."""
    if EXACT:
        return x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(2 * inner)


@jit
@no_type_check
def biased(total, bias, at, inside, BIAS: tl.constexpr):
    """Sums plus their bias, if there is one."""
    if BIAS:
        total += tl.load(bias + at, mask=inside, other=0).to(tl.float32)
    return total


@jit
@no_type_check
def scaled(total, scales, at, inside, SCALED: tl.constexpr):
    """Sums times their scales, if they have any."""
    if SCALED:
        total *= tl.load(scales + at, mask=inside, other=0)
    return total


@jit
@no_type_check
def project(
    x,
    scale,
    weight,
    bias,
    scales,
    experts,
    gates,
    out,
    I: tl.constexpr,
    II: tl.constexpr,
    O: tl.constexpr,
    X: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
    ROUTED: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    APART: tl.constexpr,
):
    """out [B, X, O] = act(norm(x) weight[expert] + bias) * gate of x [B, I].

    Weights are [E, S, O, I], S = 2 where the activation is "swiglu": up, then gate.
    If APART, x is [B, S * I]: each side reads a part of its own.
    If SCALED, each output's sum is multiplied by its scale.
    A program makes BLOCK outputs of one pick.
    """
    blocks: tl.constexpr = (O + BLOCK - 1) // BLOCK
    sides: tl.constexpr = 2 if ACTIVATION == "swiglu" else 1
    pick = tl.program_id(0) // blocks
    expert = 0
    if ROUTED:
        expert = tl.load(experts + pick)
    o = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, II)
    row = tl.cast(expert, tl.int64) * (sides * O) + o
    there = (o < O)[:, None] & (i < I)[None, :]
    at = weight + row[:, None] * I + i[None, :]
    # Asked for before the norm, which waits for its own sum.
    up = tl.load(at, mask=there, other=0)
    if sides == 2:
        side = tl.load(at + O * I, mask=there, other=0)
    width: tl.constexpr = sides * I if APART else I
    x += (pick // X).to(tl.int64) * width
    value = normed(x, scale, i, I, NORM, EPS)[None, :]
    dtype = out.dtype.element_ty
    found = tl.sum(up.to(tl.float32) * value, axis=1)
    found = scaled(found, scales, row, o < O, SCALED)
    found = biased(found, bias, row, o < O, BIAS)
    if ACTIVATION == "swiglu":
        if APART:
            value = normed(x + I, scale, i, I, NORM, EPS)[None, :]
        gate = tl.sum(side.to(tl.float32) * value, axis=1)
        gate = scaled(gate, scales, row + O, o < O, SCALED)
        gate = biased(gate, bias, row + O, o < O, BIAS)
        found *= gate * tl.sigmoid(gate)
    elif ACTIVATION != "none":
        found = gelu(found, ACTIVATION == "gelu_erf")
    if GATED:
        found *= tl.load(gates + pick)
    tl.store(out + pick.to(tl.int64) * O + o, found.to(dtype), mask=o < O)


@jit
@no_type_check
def joined(parts, weights, at, there, head, inside, N, SIZE, SPLITS: tl.constexpr):
    """Values of heads from their SPLITS parts, whose log2 sums are `weights`.

    Parts are SIZE numbers apart, their N weights side by side.
    """
    peak = tl.load(weights + head, mask=inside, other=0)
    for split in tl.static_range(1, SPLITS):
        one = tl.load(weights + split * N + head, mask=inside, other=0)
        peak = tl.maximum(peak, one)
    total = tl.zeros(peak.shape, tl.float32)
    value = tl.zeros(at.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        one = tl.load(weights + split * N + head, mask=inside, other=0)
        share = tl.exp2(one - peak)
        total += share
        part = tl.load(parts + split * SIZE + at, mask=there, other=0)
        value += share[:, None] * part.to(tl.float32)
    return value / total[:, None]


@jit
@no_type_check
def add(
    y,
    weights,
    gates,
    weight,
    bias,
    scales,
    experts,
    residual,
    out,
    I: tl.constexpr,
    O: tl.constexpr,
    X: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
    ROUTED: tl.constexpr,
):
    """out [B, O] = residual + bias + sum over picks of gate * y[pick] weight[expert].

    y [B, SPLITS, X, I] and weight [O, E, I]. With SPLITS > 1 y are parts of heads of
    width H, a multiple of WIDTH, whose log2 sums are `weights`. A program makes BLOCK
    outputs and takes PIECES pieces of WIDTH inputs at a time. If SCALED, an expert's
    weights of an output are multiplied by scales [O, E].
    """
    blocks: tl.constexpr = (O + BLOCK - 1) // BLOCK
    each: tl.constexpr = (I + WIDTH - 1) // WIDTH  # pieces of a pick
    b = (tl.program_id(0) // blocks).to(tl.int64)
    o = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = weight + (o.to(tl.int64) * (E * I))[:, None, None]
    dtype = residual.dtype.element_ty
    total = tl.zeros((BLOCK, PIECES, WIDTH), tl.float32)
    for first in range(0, X * each, PIECES):
        piece = first + tl.arange(0, PIECES)
        inside = piece < X * each
        pick = piece // each
        i = (piece % each * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
        there = inside[:, None] & (i < I)
        expert = pick * 0
        if ROUTED:
            expert = tl.load(experts + b * X + pick, mask=inside, other=0)
        column = (expert * I)[:, None] + i
        mask = (o < O)[:, None, None] & there[None, :, :]
        w = tl.load(at + column[None, :, :], mask=mask, other=0)
        if SPLITS == 1:
            value = tl.load(
                y + b * X * I + (pick * I)[:, None] + i, mask=there, other=0
            )
            value = value.to(tl.float32)
        else:
            heads: tl.constexpr = X * I // H
            value = joined(
                y + b * (SPLITS * X * I),
                weights + b * (SPLITS * heads),
                (pick * I)[:, None] + i,
                there,
                (pick * I + piece % each * WIDTH) // H,
                inside,
                heads,
                X * I,
                SPLITS,
            )
            value = value.to(dtype).to(tl.float32)
        if GATED:
            gate = tl.load(gates + b * X + pick, mask=inside, other=0)
            value *= gate.to(dtype).to(tl.float32)[:, None]
            value = value.to(dtype).to(tl.float32)
        w = w.to(tl.float32)
        if SCALED:
            place = (o.to(tl.int64) * E)[:, None] + expert[None, :]
            inner = (o < O)[:, None] & inside[None, :]
            w *= tl.load(scales + place, mask=inner, other=0)[:, :, None]
        total += w * value[None, :, :]
    found = tl.sum(tl.sum(total, axis=2), axis=1).to(dtype).to(tl.float32)
    found = biased(found, bias, o, o < O, BIAS).to(dtype).to(tl.float32)
    found += tl.load(residual + b * O + o, mask=o < O, other=0).to(tl.float32)
    tl.store(out + b * O + o, found.to(dtype), mask=o < O)

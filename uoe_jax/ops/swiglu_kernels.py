"""Triton kernels of SwiGLU times a factor of each row, and of its gradient.

Letters: M rows, F the width of a side. A row has its up side, then its gate side.
"""

from __future__ import annotations

from typing import no_type_check

from uoe_jax.ops._triton_language import jit, tl


@jit
@no_type_check
def owners(factors, M: tl.constexpr, ROWS: tl.constexpr):
    """A program's rows, which of them are there, and their factors."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    factor = tl.load(factors + m, mask=m < M, other=0)
    return m.to(tl.int64)[:, None], (m < M)[:, None], factor[:, None]


@jit
@no_type_check
def sides(at, inside, F: tl.constexpr):
    """Up, the gate's sigmoid and its silu, in float32."""
    up = tl.load(at, mask=inside, other=0).to(tl.float32)
    gate = tl.load(at + F, mask=inside, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    return up, sigmoid, gate * sigmoid


@jit
@no_type_check
def forward(
    rows,
    factors,
    out,
    M: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [M, F] = silu(gate) * up * factor of rows [M, 2F]."""
    m, there, factor = owners(factors, M, ROWS)
    for first in range(0, F, BLOCK):
        f = first + tl.arange(0, BLOCK)[None, :]
        inside = there & (f < F)
        up, _, silu = sides(rows + m * (2 * F) + f, inside, F)
        found = (silu * up * factor).to(out.dtype.element_ty)
        tl.store(out + m * F + f, found, mask=inside)


@jit
@no_type_check
def backward(
    rows,
    factors,
    grads,
    d_rows,
    d_factors,
    M: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d_rows [M, 2F] and d_factors [M] of the gradient [M, F] of `forward`'s result."""
    m, there, factor = owners(factors, M, ROWS)
    dtype = d_rows.dtype.element_ty
    # Summed over the threads of a row once, after all its columns.
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, F, BLOCK):
        f = first + tl.arange(0, BLOCK)[None, :]
        inside = there & (f < F)
        at = m * (2 * F) + f
        up, sigmoid, silu = sides(rows + at, inside, F)
        grad = tl.load(grads + m * F + f, mask=inside, other=0).to(tl.float32)
        total += grad * silu * up
        grad *= factor
        slope = sigmoid + silu * (1 - sigmoid)
        tl.store(d_rows + at, (grad * silu).to(dtype), mask=inside)
        tl.store(d_rows + at + F, (grad * up * slope).to(dtype), mask=inside)
    tl.store(d_factors + m, tl.sum(total, axis=1)[:, None], mask=there)

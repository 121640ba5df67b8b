"""Float64 numpy oracles with their gradients, and a walk over traced programs."""

from __future__ import annotations

import math

import jax
import jax.extend
import numpy as np


def segment_visible(offsets, num_rows, causal, window):
    """bool [M, M]: which rows each row sees; none past offsets[-1]."""
    row = np.arange(num_rows)
    segment = np.searchsorted(offsets[1:], row, side="right")
    visible = (segment[:, None] == segment) & (row < offsets[-1])
    distance = row[:, None] - row
    if causal:
        visible &= distance >= 0
    return visible if window is None else visible & (np.abs(distance) < window)


def attention(q, k, v, grad, visible, scale, sink=None):
    """[out, dq, dk, dv] of q [M, G, H], k, v [M, H] in float64; of a sink [M, G] too.

    A sink is one more key, whose score is given and whose value is zero.
    """
    q, k, v, grad = (np.asarray(x, np.float64) for x in (q, k, v, grad))
    s = np.einsum("mgh,nh->mgn", q, k) * scale
    s = np.where(visible[:, None, :], s, -np.inf)
    top = s.max(axis=-1, keepdims=True)
    p = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = p.sum(axis=-1, keepdims=True)
    if sink is not None:
        sunk = np.asarray(sink, np.float64)[..., None]
        sunk = np.exp(sunk - np.where(np.isfinite(top), top, 0))
        total = total + sunk
    p = p / np.where(total == 0, 1, total)
    out = np.einsum("mgn,nh->mgh", p, v)
    dp = np.einsum("mgh,nh->mgn", grad, v)
    ds = p * (dp - (grad * out).sum(axis=-1, keepdims=True)) * scale
    dq = np.einsum("mgn,nh->mgh", ds, k)
    dk = np.einsum("mgn,mgh->nh", ds, q)
    found = out, dq, dk, np.einsum("mgn,mgh->nh", p, grad)
    if sink is None:
        return found
    delta = (grad * out).sum(axis=-1)
    return *found, np.where(visible.any(1)[:, None], -(sunk / total)[..., 0] * delta, 0)


def grouped(x, w, offsets, grad):
    """[out, dx, dw] of rows x [M, I] times w [E, I, O] by group, in float64."""
    x, w, grad = (np.asarray(a, np.float64) for a in (x, w, grad))
    out, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    for e, (a, b) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        out[a:b] = x[a:b] @ w[e]
        dx[a:b] = grad[a:b] @ w[e].T
        dw[e] = x[a:b].T @ grad[a:b]
    return out, dx, dw


def assert_near(got, want, tolerance):
    """Every array within `tolerance` of the oracle's largest entry (at least 1)."""
    for g, w in zip(got, want, strict=True):
        g = np.asarray(g, np.float64)
        bound = tolerance * max(1.0, float(np.abs(w).max()))
        np.testing.assert_allclose(g, w, rtol=0, atol=bound)


def equations(jaxpr):
    """Every equation of a jaxpr and of the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def largest_result(fun, *args):
    """Elements of the largest array that any equation of fun(*args) makes."""
    jaxpr = jax.make_jaxpr(fun)(*args).jaxpr
    return max(math.prod(v.aval.shape) for e in equations(jaxpr) for v in e.outvars)


def primitives(fun, *args):
    """Names of all primitives in fun(*args)."""
    jaxpr = jax.make_jaxpr(fun)(*args).jaxpr
    return {e.primitive.name for e in equations(jaxpr)}


def draw_heads(seed, tokens, rows, kv_heads, groups, width, dtype=np.float32):
    """Rows, positions of all tokens, ids of the rows' tokens, the parts' gradients."""
    draw = np.random.default_rng(seed)
    normal = lambda *shape: draw.normal(size=shape).astype(dtype)
    shape = (kv_heads, rows, width)
    grads = normal(kv_heads, rows, groups, width), normal(*shape), normal(*shape)
    positions = draw.integers(0, 500, tokens).astype(np.int32)
    ids = draw.integers(0, tokens, rows).astype(np.int32)
    return normal(rows, kv_heads * (groups + 2) * width), positions, ids, grads


def split_heads(rows, positions, ids, grads, *, kv_heads, groups, theta):
    """[q, k, v, drows] of split heads by complex products, in float64."""
    count, width = rows.shape[0], grads[1].shape[-1]
    half = width // 2
    speed = theta ** (-np.arange(half) / half) if theta else np.zeros(half)
    turn = np.exp(1j * np.outer(positions[ids], speed))

    def rotate(x, turn):  # [J, M, G, H]
        x = np.asarray(x, np.float64)
        x = (x[..., :half] + 1j * x[..., half:]) * turn[:, None]
        return np.concatenate([x.real, x.imag], axis=-1)

    parts = np.asarray(rows, np.float64).reshape(count, kv_heads * (groups + 2), width)
    edges = [kv_heads * groups, kv_heads * (groups + 1)]
    q, k, v = (
        part.reshape(count, kv_heads, -1, width).swapaxes(0, 1)
        for part in np.split(parts, edges, axis=1)
    )
    dq, dk, dv = (np.asarray(grad, np.float64) for grad in grads)
    back = rotate(dq, turn.conj()), rotate(dk[:, :, None], turn.conj()), dv[:, :, None]
    back = [x.swapaxes(0, 1).reshape(count, -1) for x in back]
    out = rotate(q, turn), rotate(k, turn)[:, :, 0], v[:, :, 0]
    return *out, np.concatenate(back, axis=-1)


def draw_swiglu(seed, count, width, dtype=np.float32):
    """Rows [M, 2F], their factors and the gradient of the result."""
    draw = np.random.default_rng(seed)
    normal = lambda *shape: draw.normal(size=shape)
    # Gates from those that are shut to those that pass everything; a row of gates so
    # shut that exponentials overflow.
    rows = 4 * normal(count, 2 * width)
    rows[1:2, width:] -= 200
    factors = normal(count).astype(np.promote_types(dtype, np.float32))
    return rows.astype(dtype), factors, normal(count, width).astype(dtype)


def swiglu(rows, factors, grad):
    """[out, drows, dfactors] by the hyperbolic tangent, in float64."""
    rows, factors, grad = (np.asarray(a, np.float64) for a in (rows, factors, grad))
    up, gate = np.split(rows, 2, axis=1)
    factors, tanh = factors[:, None], np.tanh(gate / 2)
    silu = gate * (1 + tanh) / 2
    slope = (1 + tanh) / 2 + gate * (1 - tanh**2) / 4
    d_rows = [grad * factors * silu, grad * factors * up * slope]
    out = silu * up * factors
    return out, np.concatenate(d_rows, axis=1), np.sum(grad * silu * up, axis=1)


def expert_mlp(x, w_up, w_down, factors, grad, matrix, offsets):
    """[out, dx, dw_up, dw_down, dfactors] in float64; matrix [M, N] is row <- token."""
    x, w_up, w_down, factors, grad = (
        np.asarray(a, np.float64) for a in (x, w_up, w_down, factors, grad)
    )
    rows, row_grad, factors = matrix @ x, matrix @ grad, factors[:, None]
    ups = grouped(rows, w_up, offsets, np.zeros((len(rows), w_up.shape[2])))[0]
    root = math.sqrt(2 / math.pi)
    tanh = np.tanh(root * (ups + 0.044715 * ups**3))
    active = ups * (1 + tanh) / 2
    slope = (1 + tanh) / 2
    slope += ups * (1 - tanh**2) * root * (1 + 3 * 0.044715 * ups**2) / 2
    out, d_hidden, d_down = grouped(active * factors, w_down, offsets, row_grad)
    d_ups = d_hidden * factors * slope
    _, dx, d_up = grouped(rows, w_up, offsets, d_ups)
    d_factors = np.sum(d_hidden * active, axis=1)
    return matrix.T @ out, matrix.T @ dx, d_up, d_down, d_factors

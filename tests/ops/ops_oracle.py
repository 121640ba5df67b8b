"""Float64 numpy oracles with their gradients, and a walk over traced programs."""

from __future__ import annotations

import math

import jax
import jax.extend
import numpy as np


def segment_visible(offsets, num_rows, causal, window):
    """bool [M, M]: which rows each row sees; none past offsets[-1]."""
    visible = np.zeros((num_rows, num_rows), bool)
    for start, end in zip(offsets[:-1], offsets[1:], strict=True):
        for i in range(start, end):
            for j in range(start, i + 1 if causal else end):
                visible[i, j] = window is None or abs(i - j) < window
    return visible


def attention(q, k, v, grad, visible, scale):
    """[out, dq, dk, dv] of q [M, G, H], k, v [M, H] in float64."""
    q, k, v, grad = (np.asarray(x, np.float64) for x in (q, k, v, grad))
    s = np.einsum("mgh,nh->mgn", q, k) * scale
    s = np.where(visible[:, None, :], s, -np.inf)
    top = s.max(axis=-1, keepdims=True)
    p = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = p.sum(axis=-1, keepdims=True)
    p = p / np.where(total == 0, 1, total)
    out = np.einsum("mgn,nh->mgh", p, v)
    dp = np.einsum("mgh,nh->mgn", grad, v)
    ds = p * (dp - (grad * out).sum(axis=-1, keepdims=True)) * scale
    dq = np.einsum("mgn,nh->mgh", ds, k)
    dk = np.einsum("mgn,mgh->nh", ds, q)
    return out, dq, dk, np.einsum("mgn,mgh->nh", p, grad)


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

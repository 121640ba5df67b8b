"""Masked attention over packed rows, written out: the oracle. Memory M x M."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.ops.segment_attention.call import Call


def segment_attention(call: Call) -> Float[Array, "M G H"]:
    """Return softmax attention inside each segment, in float32 or wider."""
    q, offsets, (causal, window) = call.q, call.offsets, call.mask
    dtype = accumulator_dtype(q.dtype)
    row = jnp.arange(q.shape[0])
    # A row past the last segment must not reach the others, even as 0 * nan.
    real = (row < offsets[-1])[:, None]
    segment = jnp.searchsorted(offsets, row, side="right")
    distance = row[:, None] - row[None, :]
    visible = segment[:, None] == segment[None, :]
    visible &= real
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= jnp.abs(distance) < window
    if call.bounds is not None:
        first, last = call.bounds
        visible &= (row[None, :] >= first[:, None]) & (row[None, :] <= last[:, None])
    high = jax.lax.Precision.HIGHEST
    k, v = (jnp.where(real, x, 0).astype(dtype) for x in (call.k, call.v))
    scores = jnp.einsum("mgh,nh->mgn", q.astype(dtype), k, precision=high) * call.scale
    # Rows with nothing to see (past the last segment) stay zero, without a 0 / 0.
    scores = jnp.where(visible[:, None, :], scores, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True, initial=jnp.finfo(dtype).min)
    sink = call.sink
    if sink is not None:
        sink = jnp.where(real, sink, 0).astype(dtype)[:, :, None]
        top = jnp.maximum(top, sink)
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - top)
    weights = weights / jnp.where(total == 0, 1, total)
    out = jnp.einsum("mgn,nh->mgh", weights, v, precision=high)
    return out.astype(q.dtype)

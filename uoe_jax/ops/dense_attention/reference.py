"""Attention of whole sequences, written out: the oracle. Memory T x T."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops.dense_attention.call import Call
from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.ops.segment_attention.call import Mask


def dense_attention(call: Call) -> Float[Array, "B T N H"]:
    """Return softmax attention with masks, in float32 or wider."""
    batch, length, _, width = call.q.shape
    dtype = accumulator_dtype(call.q.dtype)
    qs, k, v = (x.astype(dtype) for x in (call.q, call.k, call.v))
    qs = qs.reshape(batch, length, k.shape[2], -1, width)
    visible = visibility(batch, length, call.mask, call.segments)
    high = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btkgh,bskh->bkgts", qs, k, precision=high) * call.scale
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    if call.sink is not None:
        sink = call.sink.reshape(1, k.shape[2], -1, 1, 1).astype(dtype)
        sink = jnp.broadcast_to(sink, (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :length]
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, precision=high)
    return out.reshape(call.q.shape).astype(call.q.dtype)


def visibility(
    batch: int,
    length: int,
    mask: Mask,
    segments: Int[Array, "B T"] | None,
) -> Array:
    """Return which tokens each token sees, bool [B, T, T]."""
    position = jnp.arange(length)
    distance = position[:, None] - position[None, :]
    visible = jnp.ones((length, length), bool)
    if mask.causal:
        visible &= distance >= 0
    if mask.window is not None:
        visible &= jnp.abs(distance) < mask.window
    visible = jnp.broadcast_to(visible[None], (batch, length, length))
    if segments is not None:
        start = run_starts(segments)
        visible &= start[:, :, None] == start[:, None, :]
    return visible


def run_starts(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return the first position of each token's run of equal ids."""
    position = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    changed = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    return jax.lax.cummax(jnp.where(changed, position, 0), axis=1)

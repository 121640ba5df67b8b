"""Dense attention of tokens spread over the devices of a mesh axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_NEVER = -1e30  # a score that never counts beside a real one, and has no NaN


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
    *,
    causal: bool,
    axis: str,
    size: int,
) -> Float[Array, "B T N H"]:
    """Return attention of this device's tokens to all; keys and values go round.

    Ring Attention (Liu et al. 2023): softmax sums are carried from device to device's
    keys, and the next keys travel while these are worked on.
    """
    batch, length, heads, width = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, width)
    if segments is None:
        segments = jnp.zeros((batch, length), jnp.int32)
    rank = jax.lax.axis_index(axis)
    step = [(i, (i + 1) % size) for i in range(size)]

    @jax.checkpoint  # scores are worked out again rather than kept for every visit
    def visit(k: Array, v: Array, theirs: Array, source: Array) -> tuple[Array, ...]:
        visible = _visible(segments, theirs, rank, source, causal)
        scores = _scores(q, k)
        scores = jnp.where(visible[:, None, None], scores, _NEVER)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        value = jnp.einsum(
            "bkgts,bskh->bkgth",
            weights.astype(v.dtype),
            v,
            preferred_element_type=scores.dtype,
        )
        return top, jnp.sum(weights, axis=-1, keepdims=True), value

    held = (k, v, segments)
    top, norm, out = visit(*held, rank)  # own tokens first: something is visible
    for turn in range(1, size):
        held = jax.lax.ppermute(held, axis, step)
        new_top, new_norm, new_out = visit(*held, (rank - turn) % size)
        both = jnp.maximum(top, new_top)
        old, new = jnp.exp(top - both), jnp.exp(new_top - both)
        norm, out = norm * old + new_norm * new, out * old + new_out * new
        top = both
    out = (out / norm).astype(q.dtype).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, width)


def gathered_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
    *,
    causal: bool,
    axis: str,
    size: int,
) -> Float[Array, "B T N H"]:
    """Return attention of this device's tokens to all; keys and values are gathered."""
    if segments is None:
        segments = jnp.zeros(q.shape[:2], jnp.int32)
    rank = jax.lax.axis_index(axis)
    gather = lambda a: jax.lax.all_gather(a, axis, axis=1, tiled=True)
    theirs = gather(segments + jnp.zeros_like(rank))
    visible = _visible(segments, theirs, rank, 0, causal)
    return jax.nn.dot_product_attention(
        q, gather(k), gather(v), mask=visible[:, None], implementation="xla"
    )


def _scores(
    q: Float[Array, "B T K G H"], k: Float[Array, "B S K H"]
) -> Float[Array, "B K G T S"]:
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=dtype)
    return scores * q.shape[-1] ** -0.5


def _visible(
    mine: Int[Array, "B T"],
    theirs: Int[Array, "B S"],
    rank: Int[Array, ""],
    source: Int[Array, ""] | int,
    causal: bool,
) -> Bool[Array, "B T S"]:
    """Return which keys, from device `source` on, each of device `rank`'s tokens sees:
    those of its document, and where causal none after it."""
    visible = mine[:, :, None] == theirs[:, None]
    if not causal:
        return visible
    length = mine.shape[1]
    place = rank * length + jnp.arange(length)
    other = source * length + jnp.arange(theirs.shape[1])
    return visible & (other[None, None] <= place[None, :, None])

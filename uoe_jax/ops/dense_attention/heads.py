"""Whole sequences as packed rows: each (sample, key head) is one segment."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def pack_heads(x: Float[Array, "B T N H"], num_kv: int) -> Float[Array, "M G H"]:
    """Return the rows of all samples and key heads, M = B * K * T."""
    batch, length, _, width = x.shape
    x = x.reshape(batch, length, num_kv, -1, width)
    return x.transpose(0, 2, 1, 3, 4).reshape(-1, x.shape[3], width)


def unpack_heads(rows: Float[Array, "M G H"], like: jax.Array) -> jax.Array:
    """Return packed rows as an array `[B, T, N, H]` like another."""
    batch, length, num_heads, width = like.shape
    groups = rows.shape[1]
    x = rows.reshape(batch, num_heads // groups, length, groups, width)
    return x.transpose(0, 2, 1, 3, 4).reshape(like.shape)


def document_edges(
    segments: Int[Array, "B T"] | None, batch: int, length: int, num_kv: int
) -> Int[Array, "2 M"]:
    """Return the first and end row of each packed row's run of equal document ids."""
    place = jnp.arange(length, dtype=jnp.int32)[None]
    if segments is None:
        start, end = jnp.zeros_like(place), jnp.full_like(place, length)
    else:
        changed = segments[:, 1:] != segments[:, :-1]
        changed = jnp.pad(changed, ((0, 0), (1, 0)))
        start = lax.cummax(jnp.where(changed, place, 0), axis=1)
        later = jnp.where(changed, place, length)[:, 1:]
        later = jnp.pad(later, ((0, 0), (0, 1)), constant_values=length)
        end = lax.cummin(later, axis=1, reverse=True)
    base = jnp.arange(batch * num_kv, dtype=jnp.int32).reshape(batch, num_kv, 1)
    edges = jnp.stack([start, end])[:, :, None] + base[None] * length
    return edges.reshape(2, -1)

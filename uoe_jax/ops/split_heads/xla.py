"""Splitting and rotating heads in plain JAX."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops.rotary import rotate


def split_heads(
    rows: Float[Array, "M O"],
    positions: Int[Array, " N"],
    token_ids: Int[Array, " M"],
    *,
    kv_heads: int,
    groups: int,
    theta: float | None,
) -> tuple[Array, Array, Array]:
    """Return queries [J, M, G, H], keys and values [J, M, H] of packed rows."""
    queries, keys = kv_heads * groups, kv_heads
    width = rows.shape[1] // (queries + 2 * keys)
    edges = [queries * width, (queries + keys) * width]
    q, k, v = (
        part.reshape(rows.shape[0], -1, width)
        for part in jnp.split(rows, edges, axis=-1)
    )
    if theta is not None:
        places = positions[token_ids]
        q, k = rotate(q, places, theta), rotate(k, places, theta)
    q = q.reshape(-1, kv_heads, groups, width)
    return jnp.moveaxis(q, 1, 0), jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0)

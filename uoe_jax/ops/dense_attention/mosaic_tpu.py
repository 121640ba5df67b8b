"""Attention of whole sequences on TPU: each (sample, key head) is one segment."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from uoe_jax.ops._dispatch import vary_together
from uoe_jax.ops._tpu import pad_rows
from uoe_jax.ops.segment_attention.mosaic_tpu import attend


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    causal: bool,
    segments: Int[Array, "B T"] | None,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Return attention by the segment kernels; documents are shorter segments.

    Raises:
      NotImplementedError: as `segment_attention` on TPU.
    """
    batch, length, num_heads, width = q.shape
    num_kv = k.shape[2]

    def pack(x: jax.Array) -> jax.Array:
        x = x.reshape(batch, length, num_kv, -1, width)
        return x.transpose(0, 2, 1, 3, 4).reshape(-1, x.shape[3], width)

    if segments is not None:
        q, k, v, segments = vary_together(q, k, v, segments)
    out = attend(
        pack(q),
        pack(k)[:, 0],
        pack(v)[:, 0],
        partial(_edges, batch, length, num_kv, segments),
        batch * num_kv,
        causal=causal,
        window=window,
        scale=scale,
    )
    out = out.reshape(batch, num_kv, length, -1, width).transpose(0, 2, 1, 3, 4)
    return out.reshape(q.shape)


def _edges(batch, length, num_kv, segments, num_rows):
    """Return the first and end row of each row's run of equal document ids."""
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
    return pad_rows(edges.reshape(2, -1), num_rows, axis=1)

"""Attention of whole sequences by the segment kernels of NVIDIA GPUs.

For what cuDNN refuses: documents packed in a sequence, and padding, which is one.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops.dense_attention.heads import document_edges, pack_heads, unpack_heads
from uoe_jax.varying import vary_together


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    kernels: Callable[..., jax.Array],
    causal: bool,
    segments: Int[Array, "B T"] | None,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Return attention by a segment backend; documents are bounds inside a segment.

    Raises:
      NotImplementedError: as that backend.
    """
    batch, length = q.shape[:2]
    num_kv = k.shape[2]
    bounds = None
    if segments is not None:
        q, k, v, segments = vary_together(q, k, v, segments)
        first, end = document_edges(segments, batch, length, num_kv)
        bounds = first, end - 1
    out = kernels(
        pack_heads(q, num_kv),
        pack_heads(k, num_kv)[:, 0],
        pack_heads(v, num_kv)[:, 0],
        jnp.arange(batch * num_kv + 1, dtype=jnp.int32) * length,
        causal=causal,
        window=window,
        bounds=bounds,
        scale=scale,
    )
    return unpack_heads(out, q)

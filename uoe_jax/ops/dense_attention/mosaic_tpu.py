"""Attention of whole sequences on TPU: each (sample, key head) is one segment."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from uoe_jax.ops.dense_attention.heads import document_edges, pack_heads, unpack_heads
from uoe_jax.ops.segment_attention.tpu.mosaic import attend
from uoe_jax.ops.tpu import pad_rows
from uoe_jax.varying import vary_together


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
    batch, length = q.shape[:2]
    num_kv = k.shape[2]
    if segments is not None:
        q, k, v, segments = vary_together(q, k, v, segments)

    def edges(num_rows: int) -> Int[Array, "2 M2"]:
        return pad_rows(
            document_edges(segments, batch, length, num_kv), num_rows, axis=1
        )

    out = attend(
        pack_heads(q, num_kv),
        pack_heads(k, num_kv)[:, 0],
        pack_heads(v, num_kv)[:, 0],
        edges,
        batch * num_kv,
        causal=causal,
        window=window,
        scale=scale,
    )
    return unpack_heads(out, q)

"""Attention of whole sequences in plain JAX, blockwise where that is faster."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops.dense_attention.call import Call
from uoe_jax.ops.dense_attention.reference import run_starts, visibility
from uoe_jax.ops.segment_attention.blockwise import Options, blockwise_attention
from uoe_jax.ops.segment_attention.call import Mask
from uoe_jax.ops.segment_attention.layout import Layout, visible_range
from uoe_jax.ops.segment_attention.xla import choose_tile


def dense_attention(call: Call) -> Float[Array, "B T N H"]:
    """Return attention, blockwise unless the sequences are short.

    Blockwise, each (sample, key head) is a run of packed rows.
    """
    q, k, v, segments = call.q, call.k, call.v, call.segments
    batch, length, num_heads, width = q.shape
    num_kv = k.shape[2]
    if batch * length * width == 0:
        return q
    if length <= _longest_plain() and call.sink is None:
        visible = visibility(batch, length, call.mask, segments)
        return jax.nn.dot_product_attention(
            q, k, v, mask=visible[:, None], scale=call.scale, implementation="xla"
        )
    groups = num_heads // num_kv
    block, chunk = choose_tile(batch * num_kv * length, length, groups)
    pad = -length % block
    padded = length + pad

    def pack(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
        x = x.reshape(batch, padded, num_kv, -1, width)
        return x.transpose(0, 2, 1, 3, 4).reshape(-1, x.shape[3], width)

    bounds = _bounds(batch, length, pad, segments, call.mask)
    low, high = (_slots(x, num_kv, block) for x in bounds)
    layout = Layout(rows=None, slots=None, low=low, high=high)
    whole = call.mask == Mask(causal=False) and segments is None
    sink = call.sink
    if sink is not None:
        heads = sink.reshape(1, num_kv, 1, groups)
        rows = (batch, num_kv, padded, groups)
        sink = jnp.broadcast_to(heads, rows).reshape(-1, groups)
    out = blockwise_attention(
        pack(q), pack(k)[:, 0], pack(v)[:, 0], layout,
        Options(call.scale, chunk, whole), sink,
    )  # fmt: skip
    out = out.reshape(batch, num_kv, padded, groups, width).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, padded, num_heads, width)[:, :length]


def _longest_plain() -> int:
    """Return the longest T whose T x T scores are cheaper written out.

    Measured on CPU; elsewhere small enough to fit, and one program instead of a loop.
    """
    return 64 if jax.default_backend() == "cpu" else 512


def _bounds(
    batch: int,
    length: int,
    pad: int,
    segments: Int[Array, "B T"] | None,
    mask: Mask,
) -> tuple[jax.Array, jax.Array]:
    """Return the first and last position each token sees, int [B, T + pad] each."""
    position = jnp.arange(length, dtype=jnp.int32)[None]
    position = jnp.broadcast_to(position, (batch, length))
    if segments is None:
        start, end = jnp.zeros_like(position), jnp.full_like(position, length - 1)
    else:
        start = run_starts(segments)
        end = length - 1 - run_starts(segments[:, ::-1])[:, ::-1]
    low, high = visible_range(position, start, end, mask)
    fill = ((0, 0), (0, pad))
    return jnp.pad(low, fill), jnp.pad(high, fill, constant_values=-1)


def _slots(positions: jax.Array, num_kv: int, block: int) -> jax.Array:
    """Turn positions [B, T'] into slots of the (sample, key head) runs, [C, P]."""
    batch, padded = positions.shape
    base = jnp.arange(batch * num_kv, dtype=jnp.int32) * padded
    base = base.reshape(batch, num_kv, 1)
    slots = jnp.where(positions[:, None] < 0, -1, positions[:, None] + base)
    return slots.reshape(-1, block)

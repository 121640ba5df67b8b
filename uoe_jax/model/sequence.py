"""Dense attention of sequences whose tokens lie on several devices of `sequence`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops.as_segments import document_edges
from uoe_jax.ops.dense_attention.api import dense_attention
from uoe_jax.ops.partial_attention import Call, Part, partial_attention
from uoe_jax.ops.segment_attention.call import Mask
from uoe_jax.ops.segment_attention.layout import visible_range
from uoe_jax.ops.segment_attention.sinks import beside_sink


@dataclass(frozen=True)
class Tokens:
    """Which keys of the whole sequence each of this device's tokens sees."""

    first: Int[Array, "B T"]
    last: Int[Array, "B T"]

    def among(self, start: Array | int) -> tuple[Array, Array]:
        """Return the first and the last counted from key `start` on."""
        return self.first - start, self.last - start


def own_view(
    segments: Int[Array, "B T"] | None,
    like: Float[Array, "B T N H"],
    sees: Mask,
    axis: str,
    size: int,
) -> Tokens:
    """Return what this device's tokens see; documents may go on at the next device."""
    batch, length = like.shape[:2]
    start = jax.lax.axis_index(axis) * length
    place = start + jnp.arange(length, dtype=jnp.int32)
    place = jnp.broadcast_to(place[None], (batch, length))
    if segments is None:
        edges = jnp.zeros_like(place), jnp.full_like(place, size * length - 1)
    else:
        whole = _all_ids(segments, axis)
        begin, end = document_edges(whole, batch, whole.shape[1], 1)
        base = jnp.arange(batch, dtype=jnp.int32)[:, None] * whole.shape[1]
        own = lambda a: jax.lax.dynamic_slice_in_dim(
            a.reshape(batch, -1) - base, start, length, axis=1
        )
        edges = own(begin), own(end) - 1
    return Tokens(*visible_range(place, *edges, sees))


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
    *,
    sees: Mask,
    sink: Float[Array, " N2"] | None = None,
    axis: str,
    size: int,
) -> Float[Array, "B T N H"]:
    """Return attention of this device's tokens to all; keys and values go round.

    Ring Attention (Liu et al. 2023): results and their logsumexp are carried from
    device to device's keys, and the next keys travel while these are worked on.
    """
    view, length = own_view(segments, q, sees, axis, size), q.shape[1]
    rank = jax.lax.axis_index(axis)
    step = [(i, (i + 1) % size) for i in range(size)]

    def visit(held: tuple[Array, Array], source: Array) -> Part:
        ends = view.among(source * length)
        return partial_attention(Call(q, *held, *ends, q.shape[3] ** -0.5))

    held = (k, v)
    found = visit(held, rank)  # own tokens first: they needn't travel
    for turn in range(1, size):
        held = jax.lax.ppermute(held, axis, step)
        found = found.plus(visit(held, (rank - turn) % size))
    out = found.out if sink is None else beside_sink(found.out, found.lse, sink)
    return out.astype(q.dtype)


def gathered_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
    *,
    sees: Mask,
    sink: Float[Array, " N2"] | None = None,
    axis: str,
    size: int,
) -> Float[Array, "B T N H"]:
    """Return attention of this device's tokens to all; keys and values are gathered."""
    view = own_view(segments, q, sees, axis, size)
    gather = lambda a: jax.lax.all_gather(a, axis, axis=1, tiled=True)
    ends = view.among(0)
    call = Call(q, gather(k), gather(v), *ends, q.shape[3] ** -0.5)
    found = partial_attention(call)
    return found.out if sink is None else beside_sink(found.out, found.lse, sink)


def exchanged_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
    *,
    sees: Mask,
    sink: Float[Array, " N2"] | None = None,
    axis: str,
    size: int,
) -> Float[Array, "B T N H"]:
    """Return attention of this device's tokens to all; heads are exchanged for tokens.

    DeepSpeed-Ulysses (Jacobs et al. 2023): each device attends among all tokens in its
    share of the heads, so all have the same work, and any kernel of whole sequences
    serves. The key heads must divide by the devices.
    """
    swap = lambda a, here, there: jax.lax.all_to_all(a, axis, here, there, tiled=True)
    q, k, v = (swap(a, 2, 1) for a in (q, k, v))
    ids = None if segments is None else _all_ids(segments, axis)
    if sink is not None:
        share = sink.shape[0] // size
        start = jax.lax.axis_index(axis) * share
        sink = jax.lax.dynamic_slice_in_dim(sink, start, share)
    options: dict[str, Any] = {"causal": sees.causal, "window": sees.window}
    out = dense_attention(q, k, v, segments=ids, sink=sink, **options)
    return swap(out, 1, 2)


def _all_ids(segments: Int[Array, "B T"], axis: str) -> Int[Array, "B S"]:
    # Typed as differing over the axis, where padding was made on each device alike.
    segments = segments + jnp.zeros_like(jax.lax.axis_index(axis))
    return jax.lax.all_gather(segments, axis, axis=1, tiled=True)

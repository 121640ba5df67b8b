"""Attention of packed queries to lists of keys, on the kernels of segment attention.

A list's keys are put before its segment's queries, as rows that see nothing themselves:
then rows are queries and keys at once, and bounds say which keys a query sees. That
costs copies in proportion to the rows, no scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.packing import Packing, combine_rows, gather_rows
from uoe_jax.ops.segment_attention.nvidia import mosaic as mosaic_gpu
from uoe_jax.ops.segment_attention.nvidia import triton
from uoe_jax.ops.tiled_attention import check_lists, tiled_attention


def list_attention(
    q: Float[Array, "M G H"],
    k: Float[Array, "S L H"],
    v: Float[Array, "S L H"],
    offsets: Int[Array, " S1"],
    first: Int[Array, " M"],
    last: Int[Array, " M"],
    *,
    max_rows: int,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "M G H"]:
    """Return each query's attention to keys `first..last` of its segment's list.

    Queries `offsets[s]:offsets[s + 1]`, at most `max_rows`, are segment s's. Those past
    `offsets[-1]`, or with `last < first`, return zeros.

    Raises:
      ConfigError: lists whose number isn't that of the segments, unknown or unfit
        backend.
    """
    check_lists(k, v, offsets)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return dispatch(
        "list_attention",
        BACKENDS,
        implementation,
        *(q, k, v, offsets, first, last),
        max_rows=max_rows,
        scale=scale,
    )


class Merged(NamedTuple):
    """All keys and queries as R rows: list 0, segment 0, list 1, segment 1, ..."""

    keys: Packing  # row <-> key
    queries: Packing  # row <-> query
    offsets: Int[Array, " S1"]
    low: Int[Array, " R"]
    high: Int[Array, " R"]


def merge(
    offsets: Int[Array, " S1"],
    first: Int[Array, " M"],
    last: Int[Array, " M"],
    length: int,
) -> Merged:
    """Return where keys and queries go, and what each row sees."""
    lists, num_rows = offsets.shape[0] - 1, first.shape[0]
    number = jnp.arange(lists + 1, dtype=jnp.int32)
    edges = offsets.astype(jnp.int32) + length * number
    total = num_rows + lists * length
    row = jnp.arange(total, dtype=jnp.int32)
    segment = _count_upto(edges, total) - 1  # S: past the last
    own = jnp.minimum(segment, lists - 1)
    place = row - edges[own]
    is_key = (place < length) & (segment < lists)
    # Where a row is no key its list's first one stands in: nobody sees it.
    key = own * length + jnp.where(is_key, place, 0)
    query = row - length * jnp.minimum(segment + 1, lists)
    query = jnp.clip(query, 0, num_rows - 1)
    low, high = jnp.maximum(first, 0)[query], jnp.minimum(last, length - 1)[query]
    low, high = edges[own] + jnp.where(is_key, 0, low), edges[own] + high
    to_key = edges[:-1, None] + jnp.arange(length, dtype=jnp.int32)[None]
    ahead = jnp.minimum(_count_upto(offsets, num_rows), lists)  # lists before a query
    to_query = jnp.arange(num_rows, dtype=jnp.int32) + length * ahead
    unused = edges  # a packing's offsets are for products by group
    return Merged(
        keys=Packing(key, to_key.reshape(-1, 1), unused, unused),
        queries=Packing(query, to_query[:, None], unused, unused),
        offsets=edges,
        low=low,
        high=jnp.where(is_key, -1, high),
    )


def _count_upto(edges: Int[Array, " S1"], size: int) -> Int[Array, " size"]:
    """Return how many edges are at or before each place; edges past it don't count."""
    marks = jnp.zeros(size, jnp.int32).at[edges].add(1, mode="drop")
    return jnp.cumsum(marks, dtype=jnp.int32)


def _attend_merged(
    run: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    offsets: Array,
    first: Array,
    last: Array,
    *,
    max_rows: int,
    scale: float,
) -> Array:
    """Return the attention by a segment kernel that takes rows which see nothing."""
    del max_rows
    if q.size == 0 or k.size == 0:
        return jnp.zeros_like(q)
    merged = merge(offsets, first, last, k.shape[1])
    keys, values = (gather_rows(a.reshape(-1, a.shape[2]), merged.keys) for a in (k, v))
    flat = gather_rows(q.reshape(q.shape[0], -1), merged.queries)
    out = run(
        flat.reshape(-1, *q.shape[1:]),
        keys,
        values,
        merged.offsets,
        causal=False,
        window=None,
        bounds=(merged.low, merged.high),
        scale=scale,
    )
    return combine_rows(out.reshape(flat.shape), merged.queries).reshape(q.shape)


def _attend_tiled(*args: Array, max_rows: int, scale: float) -> Array:
    return tiled_attention(*args, max_rows=max_rows, scale=scale)[0]


# In order of preference; `implementation=None` takes the first that can serve.
BACKENDS = {
    "mosaic_gpu": partial(_attend_merged, mosaic_gpu.segment_attention),
    "triton": partial(_attend_merged, triton.segment_attention),
    "xla": _attend_tiled,
}

"""Attention of packed queries to keys that lie elsewhere: a list for each segment.

Segment attention's rows are queries and keys at once. Here the queries of segment s,
however many there are, look at the keys of list s: experts that choose their queries
but share the keys of all tokens, or key blocks that are chosen by queries.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.errors import ConfigError
from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.ops.packing import Packing, combine_rows, gather_rows
from uoe_jax.ops.segment_attention.layout import segment_layout
from uoe_jax.ops.segment_attention.xla import choose_tile

MASKED = -1e30  # the logsumexp of a row that sees nothing; finite, so no nan follows


def tiled_attention(
    q: Float[Array, "M G H"],
    k: Float[Array, "S L H"],
    v: Float[Array, "S L H"],
    offsets: Int[Array, " S1"],
    first: Int[Array, " M"],
    last: Int[Array, " M"],
    *,
    max_rows: int,
    scale: float | None = None,
) -> tuple[Float[Array, "M G H"], Float[Array, "M G"]]:
    """Return each query's attention to keys `first..last` of its segment's list, and
    the logsumexp of its scores.

    Queries `offsets[s]:offsets[s + 1]`, at most `max_rows`, are segment s's. Those past
    `offsets[-1]`, or with `last < first`, return zeros and `MASKED`. Only tiles of
    queries that exist meet keys: the work is M x L and a part of a tile a segment.
    Nothing of that size is kept for the backward pass, which recomputes the scores.

    Raises:
      ConfigError: lists whose number isn't that of the segments.
    """
    check_lists(k, v, offsets)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    attend = jax.checkpoint(partial(_attend, max_rows=max_rows, scale=scale))
    return attend(q, k, v, offsets, first, last)


def check_lists(
    k: Float[Array, "Sk Lk Hk"], v: Float[Array, "Sv Lv Hv"], offsets: Int[Array, " S1"]
) -> None:
    """Return if each segment has one list of keys and of values; else ConfigError."""
    if k.shape[0] != offsets.shape[0] - 1 or k.shape != v.shape:
        raise ConfigError(
            f"k is {list(k.shape)} and v {list(v.shape)} for {offsets.shape[0] - 1} "
            "segments; give each segment one list of keys and values"
        )


class _Tiles(NamedTuple):
    """Queries in C tiles of P, none of which straddles two segments."""

    queries: Packing  # slot <-> query
    keys: Packing  # tile <-> segment
    filled: Array  # [C, P], whether the slot holds a query
    shape: tuple[int, int]


def _make_tiles(offsets: Array, num_rows: int, max_rows: int, groups: int) -> _Tiles:
    num_segments = offsets.shape[0] - 1
    size, _ = choose_tile(num_rows, num_rows // num_segments, groups)
    layout = segment_layout(offsets, num_rows, size, causal=False, window=None)
    rows, slots = layout.rows, layout.slots
    assert rows is not None and slots is not None  # segments never sit in place
    count = layout.low.shape[0]
    begin = rows.reshape(count, size)[:, 0]
    segment = jnp.searchsorted(offsets, begin, side="right").astype(jnp.int32) - 1
    used = -(-jnp.diff(offsets) // size)
    ahead = jnp.cumsum(used) - used  # tiles of the segments before
    number = jnp.arange(-(-max_rows // size), dtype=jnp.int32)[None]
    tiles = jnp.where(number < used[:, None], ahead[:, None] + number, count)
    unused = offsets  # a packing's offsets are for products by group
    return _Tiles(
        queries=Packing(
            jnp.minimum(rows, num_rows - 1), slots[:, None], unused, unused
        ),
        keys=Packing(
            jnp.clip(segment, 0, num_segments - 1),
            tiles.astype(jnp.int32),
            unused,
            unused,
        ),
        filled=layout.high >= 0,
        shape=(count, size),
    )


def _attend(
    q: Array,
    k: Array,
    v: Array,
    offsets: Array,
    first: Array,
    last: Array,
    *,
    max_rows: int,
    scale: float,
) -> tuple[Array, Array]:
    num_rows, groups, width = q.shape
    tiles = _make_tiles(offsets, num_rows, max_rows, groups)
    dtype, lists = accumulator_dtype(q.dtype), (k.shape[0], -1)
    spread = lambda a: gather_rows(a.reshape(lists), tiles.keys).reshape(
        -1, *k.shape[1:]
    )
    keys, values = spread(k), spread(v)
    qt = gather_rows(q.reshape(num_rows, -1), tiles.queries)
    qt = qt.reshape(*tiles.shape, groups, width)
    low, high = (a[tiles.queries.token_ids].reshape(tiles.shape) for a in (first, last))

    place = jnp.arange(k.shape[1])[None, None]
    visible = (place >= low[..., None]) & (place <= high[..., None])
    visible = (visible & tiles.filled[..., None])[:, :, None]
    s = jnp.einsum("cpgh,clh->cpgl", qt, keys, preferred_element_type=dtype) * scale
    s = jnp.where(visible, s, MASKED)
    top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    p = jnp.where(visible, jnp.exp(s - top), 0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    p = (p / total).astype(v.dtype)
    out = jnp.einsum("cpgl,clh->cpgh", p, values, preferred_element_type=dtype)
    lse = jnp.where(seen, top + jnp.log(total), MASKED)[..., 0]
    back = lambda a: combine_rows(a.reshape(tiles.filled.size, -1), tiles.queries)
    out = back(out.astype(q.dtype)).reshape(q.shape)
    # Rows outside every segment find no slot, and so zeros.
    inside = (jnp.arange(num_rows) < offsets[-1])[:, None]
    return out, jnp.where(inside, back(lse), MASKED)

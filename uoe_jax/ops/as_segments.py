"""Attention that isn't of segments, by the kernels that are: three ways to reach them.

Segment attention's rows are queries and keys at once, and a row sees rows of its own
segment. Here

- whole sequences are packed head by head, each (sample, key head) a segment;
- queries that look at a list of keys, one list a segment, are merged with it: the keys
  become rows that see nothing themselves, put before their segment's queries;
- where there is no kernel, such queries are cut in tiles that each meet one list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from uoe_jax import checks
from uoe_jax.errors import ConfigError
from uoe_jax.ops.dense_attention.call import Call as DenseCall
from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.ops.packing import Packing, combine_rows, gather_rows
from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.layout import segment_layout
from uoe_jax.ops.segment_attention.nvidia import mosaic as mosaic_gpu
from uoe_jax.ops.segment_attention.nvidia import triton
from uoe_jax.ops.segment_attention.plan import MASKED
from uoe_jax.ops.segment_attention.tpu import mosaic as mosaic_tpu
from uoe_jax.ops.segment_attention.xla import choose_tile
from uoe_jax.ops.tpu import pad_rows

Kernels = Callable[[Call], jax.Array]  # a backend of segment attention
# One that gives the logsumexp of each row as well.
KernelsWithSums = Callable[[Call], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Lists:
    """Queries of S segments, and a list of L keys and values for each of them.

    Queries `offsets[s]:offsets[s + 1]`, at most `max_rows`, are segment s's; each sees
    keys `first..last` of list s. Those past `offsets[-1]`, or with `last < first`, see
    nothing. `scale` None: 1 / sqrt(H).

    Raises:
      ConfigError: ranks, shapes or dtypes that don't fit, offsets that descend or end
        past the queries, another number of lists than of segments.
    """

    q: Float[Array, "M G H"]
    k: Float[Array, "S L H"]
    v: Float[Array, "S L H"]
    offsets: Int[Array, " S1"]
    first: Int[Array, " M"]
    last: Int[Array, " M"]
    max_rows: int
    scale: float | None = None

    def __post_init__(self) -> None:
        given = dict(vars(self))
        checks.floats(given, "q", "M G H")
        for name in ("k", "v"):
            checks.floats(given, name, "S L H")
        checks.ints(given, "offsets", "S+1")
        checks.ascending(given, "offsets", given["q"].shape[0], "queries")
        for name in ("first", "last"):
            checks.ints(given, name, "M")
        checks.whole(given, "max_rows")
        checks.number(given, "scale")
        for name, value in given.items():
            object.__setattr__(self, name, value)
        self._check_sides()

    def _check_sides(self) -> None:
        q, k, v, segments = self.q, self.k, self.v, self.offsets.shape[0] - 1
        if segments < 1 or k.shape[0] != segments or k.shape != v.shape:
            raise ConfigError(
                f"k is {list(k.shape)} and v {list(v.shape)} for {segments} "
                "segments; give each segment one list of keys and values"
            )
        if k.shape[2] != q.shape[2] or not q.dtype == k.dtype == v.dtype:
            raise ConfigError(
                f"q is {q.dtype} {list(q.shape)}, k {k.dtype} {list(k.shape)}, v "
                f"{v.dtype}; they need one dtype and head width"
            )
        if not self.first.shape == self.last.shape == q.shape[:1]:
            raise ConfigError(
                f"first is {list(self.first.shape)} and last {list(self.last.shape)} "
                f"for {q.shape[0]} queries; each needs one"
            )

    @property
    def factor(self) -> float:
        """Factor of the scores."""
        return self.q.shape[2] ** -0.5 if self.scale is None else self.scale


no_type_check(Lists.__init__)  # its own checks say what to do instead


def list_attention(
    lists: Lists, *, implementation: str | None = None
) -> Float[Array, "M G H"]:
    """Return each query's attention to the keys that it sees; zeros where it sees none.

    Raises:
      ConfigError: unknown or unfit backend.
    """
    return dispatch("list_attention", LIST_BACKENDS, implementation, lists)[0]


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


def merged_attention(
    kernels: KernelsWithSums, lists: Lists
) -> tuple[Float[Array, "M G H"], Float[Array, "M G"]]:
    """Return what `tiled_attention` does by a segment kernel that takes rows which see
    nothing.

    That costs copies in proportion to the rows, and no scores.
    """
    q, k, v = lists.q, lists.k, lists.v
    if q.size == 0 or k.size == 0:
        return jnp.zeros_like(q), jnp.full_like(q[..., 0], MASKED, jnp.float32)
    merged = merge(lists.offsets, lists.first, lists.last, k.shape[1])
    keys, values = (gather_rows(a.reshape(-1, a.shape[2]), merged.keys) for a in (k, v))
    flat = gather_rows(q.reshape(q.shape[0], -1), merged.queries)
    call = Call(
        flat.reshape(-1, *q.shape[1:]),
        keys,
        values,
        merged.offsets,
        Mask(causal=False),
        scale=lists.factor,
        bounds=(merged.low, merged.high),
    )
    out, lse = kernels(call)
    out = combine_rows(out.reshape(flat.shape), merged.queries).reshape(q.shape)
    seen = jnp.maximum(lists.first, 0) <= jnp.minimum(lists.last, k.shape[1] - 1)
    seen &= jnp.arange(q.shape[0]) < lists.offsets[-1]
    lse = combine_rows(lse, merged.queries)
    return out, jnp.where(seen[:, None], lse, MASKED)


def tiled_attention(
    lists: Lists,
) -> tuple[Float[Array, "M G H"], Float[Array, "M G"]]:
    """Return each query's attention to the keys that it sees, and the logsumexp of its
    scores: zeros and `MASKED` where it sees none.

    Only tiles of queries that exist meet keys: the work is M x L and a part of a tile a
    segment. Nothing of that size is kept for the backward pass, which recomputes the
    scores.
    """
    arrays = lists.q, lists.k, lists.v, lists.offsets, lists.first, lists.last
    attend = partial(_attend_tiles, max_rows=lists.max_rows, scale=lists.factor)
    return jax.checkpoint(attend)(*arrays)


class _Tiles(NamedTuple):
    """Queries in C tiles of P, none of which straddles two segments."""

    queries: Packing  # slot <-> query
    keys: Packing  # tile <-> segment
    filled: Array  # [C, P], whether the slot holds a query
    shape: tuple[int, int]


def _make_tiles(offsets: Array, num_rows: int, max_rows: int, groups: int) -> _Tiles:
    num_segments = offsets.shape[0] - 1
    size, _ = choose_tile(num_rows, num_rows // num_segments, groups)
    layout = segment_layout(offsets, num_rows, size, Mask(causal=False))
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


def _attend_tiles(
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
    p, lse = masked_softmax(s, visible)
    p = p.astype(v.dtype)
    out = jnp.einsum("cpgl,clh->cpgh", p, values, preferred_element_type=dtype)
    back = lambda a: combine_rows(a.reshape(tiles.filled.size, -1), tiles.queries)
    out = back(out.astype(q.dtype)).reshape(q.shape)
    # Rows outside every segment find no slot, and so zeros.
    inside = (jnp.arange(num_rows) < offsets[-1])[:, None]
    return out, jnp.where(inside, back(lse), MASKED)


def masked_softmax(
    s: Float[Array, "*N L"], visible: Bool[Array, "*#N L"]
) -> tuple[Float[Array, "*N L"], Float[Array, "*N"]]:
    """Return the softmax of the visible scores, and their logsumexp.

    Where nothing is visible that is zeros, and `MASKED`.
    """
    s = jnp.where(visible, s, MASKED)
    top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    p = jnp.where(visible, jnp.exp(s - top), 0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1)
    return p / total, jnp.where(some, top + jnp.log(total), MASKED)[..., 0]


# In order of preference; `implementation=None` takes the first that can serve. Each
# gives the logsumexp as well.
LIST_BACKENDS = {
    "mosaic_gpu": partial(merged_attention, mosaic_gpu.attend),
    "triton": partial(merged_attention, triton.attend),
    "xla": tiled_attention,
}


def packed_attention(kernels: Kernels, call: DenseCall) -> Float[Array, "B T N H"]:
    """Return attention of whole sequences by a segment backend of NVIDIA GPUs.

    For what cuDNN refuses: documents packed in a sequence, and padding, which is one.
    Documents are bounds inside a segment.

    Raises:
      NotImplementedError: as that backend.
    """
    batch, length = call.q.shape[:2]
    num_kv, bounds = call.k.shape[2], None
    if call.segments is not None:
        call = call.together()
        first, end = document_edges(call.segments, batch, length, num_kv)
        bounds = first, end - 1
    rows = Call(
        pack_heads(call.q, num_kv),
        pack_heads(call.k, num_kv)[:, 0],
        pack_heads(call.v, num_kv)[:, 0],
        jnp.arange(batch * num_kv + 1, dtype=jnp.int32) * length,
        call.mask,
        call.scale,
        bounds,
        pack_sinks(call),
    )
    return unpack_heads(kernels(rows), call.q)


def packed_attention_on_tpu(call: DenseCall) -> Float[Array, "B T N H"]:
    """Return attention of whole sequences on TPU; documents are shorter segments.

    Raises:
      NotImplementedError: as `segment_attention` on TPU.
    """
    batch, length = call.q.shape[:2]
    num_kv = call.k.shape[2]
    if call.segments is not None:
        call = call.together()

    def edges(num_rows: int) -> Int[Array, "2 M2"]:
        found = document_edges(call.segments, batch, length, num_kv)
        return pad_rows(found, num_rows, axis=1)

    rows = Call(
        pack_heads(call.q, num_kv),
        pack_heads(call.k, num_kv)[:, 0],
        pack_heads(call.v, num_kv)[:, 0],
        jnp.arange(batch * num_kv + 1, dtype=jnp.int32) * length,
        call.mask,
        call.scale,
        sink=pack_sinks(call),
    )
    out = mosaic_tpu.attend(rows, mosaic_tpu.Runs(edges, batch * num_kv))
    return unpack_heads(out, call.q)


def pack_heads(x: Float[Array, "B T N H"], num_kv: int) -> Float[Array, "M G H"]:
    """Return the rows of all samples and key heads, M = B * K * T."""
    batch, length, _, width = x.shape
    x = x.reshape(batch, length, num_kv, -1, width)
    return x.transpose(0, 2, 1, 3, 4).reshape(-1, x.shape[3], width)


def pack_sinks(call: DenseCall) -> Float[Array, "M G"] | None:
    """Return the packed rows' sinks: those of their heads."""
    if call.sink is None:
        return None
    batch, length = call.q.shape[:2]
    heads = call.sink.reshape(1, call.k.shape[2], 1, -1)
    rows = jnp.broadcast_to(heads, (batch, heads.shape[1], length, heads.shape[3]))
    return rows.reshape(-1, rows.shape[3])


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

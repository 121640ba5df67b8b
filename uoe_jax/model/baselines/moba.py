"""Block-sparse attention: each query looks at its own block and the few it picks.

MoBA (Lu et al. 2025). Blocks lie on the grid of the row; of a block that holds several
documents a query knows only its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.model.attention import AttentionWeights
from uoe_jax.model.cache import KeyValue, Slot
from uoe_jax.model.context import Context, document_span
from uoe_jax.model.layers import picks_to_rows, row_experts, rows_to_picks
from uoe_jax.model.routing.balance import Stats
from uoe_jax.ops.as_segments import Lists, tiled_attention
from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.ops.packing import combine_rows, gather_rows, pack_choices
from uoe_jax.ops.segment_attention.plan import MASKED

HIDDEN = -1e30  # score of a block that a query can't see


class MobaAttention(AttentionWeights):
    """Dense weights; a query head attends in its own block and `top_k - 1` others.

    Others are picked by the product of the query with the block's mean key, without a
    gradient; in a causal model they are earlier, whole blocks.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, 1, rngs=rngs)
        self.block_size, self.top_k = config.moba.block_size, config.moba.top_k

    def __call__(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], Stats, KeyValue]:
        """Return the output, no statistics, and keys and values [B, T, K, H]."""
        size, causal = self.block_size, self.causal
        q, k, v = self.project_qkv(x, context.positions)
        span = document_span(x.shape[:2], context.segments, causal)
        picks, kept = pick_blocks(q, k, *span, size, self.top_k, causal)
        out = attend_blocks(q, k, v, picks, kept, *span, size, causal)
        return self.project_out(self.gate_heads(x, out)), {}, (k, v)

    def decode(
        self, x: Float[Array, "B D"], slot: Slot
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return the output for token `slot.lengths` of each row, and its slot."""
        see = lambda q, keys: visible_rows(
            q, keys, slot.row, self.block_size, self.top_k
        )
        return self.decode_visible(x, slot, see)


def pick_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    first: Int[Array, "B T"],
    last: Int[Array, "B T"],
    size: int,
    top_k: int,
    causal: bool,
) -> tuple[Int[Array, "B T N X"], Bool[Array, "B T N X"]]:
    """Return each query's blocks, its own first, and which of them it can see.

    `first` and `last` are the keys a token may see. Of a block before its own a query
    knows the last document, of one after it the first: its own reaches there.
    """
    batch, length, heads, width = q.shape
    count = -(-length // size)
    spread = lambda x: jnp.broadcast_to(x[None], (batch, count))
    start = jnp.arange(count) * size
    end = jnp.minimum(start + size, length) - 1
    queries = q.reshape(batch, length, k.shape[2], -1, width)
    scores = _products(queries, block_means(k, first[:, end], spread(end), size))
    block, own = jnp.arange(count), jnp.arange(length) // size
    if not causal:
        means = block_means(k, spread(start), last[:, start], size)
        after = (block[None] > own[:, None])[None, :, None]
        scores = jnp.where(after, _products(queries, means), scores)
    low, high = (a[..., None] // size for a in (first, last))
    visible = (block[None, None] >= low) & (block[None, None] <= high)
    visible &= (block[None] != own[:, None])[None]
    scores = jnp.where(visible[:, :, None], scores, HIDDEN)
    value, others = jax.lax.top_k(scores, min(top_k, count) - 1)
    mine = jnp.broadcast_to(own[None, :, None, None], (batch, length, heads, 1))
    picks = jnp.concatenate([mine.astype(others.dtype), others], axis=-1)
    kept = jnp.concatenate([jnp.ones(mine.shape, bool), value > HIDDEN], axis=-1)
    return picks, kept


def block_means(
    k: Float[Array, "B T K H"],
    low: Int[Array, "B n"],
    high: Int[Array, "B n"],
    size: int,
) -> Float[Array, "B n K H"]:
    """Return the mean of every block's keys between two places; no gradient."""
    dtype = accumulator_dtype(k.dtype)
    blocks = _cut(jax.lax.stop_gradient(k).astype(dtype), size)
    place = jnp.arange(blocks.shape[1] * size).reshape(1, -1, size)
    inside = (place >= low[..., None]) & (place <= high[..., None])
    weight = inside.astype(dtype)
    total = jnp.einsum("bns,bnskh->bnkh", weight, blocks)
    count = jnp.sum(weight, axis=-1)[..., None, None]
    return total / jnp.maximum(count, 1)


def attend_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    picks: Int[Array, "B T N X"],
    kept: Bool[Array, "B T N X"],
    first: Int[Array, "B T"],
    last: Int[Array, "B T"],
    size: int,
    causal: bool,
) -> Float[Array, "B T N H"]:
    """Return each query's attention to the keys `first..last` in its `kept` blocks.

    Queries are packed by block, and what they got there is joined by the softmax of
    the logsumexps.
    """
    batch, length, heads, width = q.shape
    count, num_picks = -(-length // size), picks.shape[3]
    rows = batch * heads * length * num_picks
    if causal:
        seen = sum(min(t // size + 1, num_picks) for t in range(length))
        rows = batch * heads * seen
    by_head = lambda a: jnp.swapaxes(a, 1, 2).reshape(batch * heads, length, -1)
    packing = pack_choices(by_head(picks), count, by_head(kept), rows)
    queries = gather_rows(by_head(q).reshape(-1, width), packing)

    def lists(a: Array) -> Array:
        a = jnp.repeat(_cut(a, size), heads // a.shape[2], axis=3)
        return a.transpose(1, 0, 3, 2, 4).reshape(-1, size, width)

    ids = packing.token_ids
    token = ids // (heads * length) * length + ids % length
    begin = row_experts(packing) * size
    low, high = (a.reshape(-1)[token] - begin for a in (first, last))
    out, lse = tiled_attention(
        Lists(
            queries[:, None],
            lists(k),
            lists(v),
            packing.segment_offsets,
            low.astype(jnp.int32),
            high.astype(jnp.int32),
            max_rows=length,
        )
    )
    share = rows_to_picks(lse[:, 0], packing)
    share = jnp.where(by_head(kept).reshape(share.shape), share, MASKED)
    weight = picks_to_rows(jax.nn.softmax(share, axis=-1), packing)[:, None]
    out = combine_rows((out[:, 0] * weight).astype(q.dtype), packing)
    return jnp.swapaxes(out.reshape(batch, heads, length, width), 1, 2)


def visible_rows(
    q: Float[Array, "B K G H"],
    keys: Float[Array, "B S K H"],
    position: Int[Array, " B"],
    size: int,
    top_k: int,
) -> Bool[Array, "B K G S"]:
    """Return which cached rows the query at `position` of each sample sees."""
    rows = keys.shape[1]
    count = -(-rows // size)
    start = jnp.broadcast_to((jnp.arange(count) * size)[None], (len(position), count))
    # Blocks before the query's own are whole.
    means = block_means(keys, start, start + size - 1, size)
    scores = _products(q[:, None], means)[:, 0].reshape(*q.shape[:3], count)
    block, own = jnp.arange(count)[None], (position // size)[:, None]
    scores = jnp.where((block < own)[:, None, None], scores, HIDDEN)
    value, others = jax.lax.top_k(scores, min(top_k, count) - 1)
    chosen = jax.nn.one_hot(others, count) * (value > HIDDEN)[..., None]
    chosen = (jnp.sum(chosen, axis=-2) > 0) | (block == own)[:, None, None]
    row = jnp.arange(rows)
    written = (row[None] <= position[:, None])[:, None, None]
    return chosen[..., row // size] & written


def _products(
    q: Float[Array, "B T K G H"], means: Float[Array, "B n K H"]
) -> Float[Array, "B T N n"]:
    q = jax.lax.stop_gradient(q).astype(means.dtype)
    scores = jnp.einsum("btkgh,bnkh->btkgn", q, means)
    return scores.reshape(*q.shape[:2], -1, means.shape[1])


def _cut(a: Float[Array, "B T K H"], size: int) -> Float[Array, "B n size K H"]:
    """Return the rows by blocks, the last one filled with zeros."""
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % size), (0, 0), (0, 0)))
    return a.reshape(a.shape[0], -1, size, *a.shape[2:])

"""Union attention with two routers: where a token asks, and where it can be read."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.model.attention import UnionAttention, pick_heads
from uoe_jax.model.cache import KeyValue, Slot, attend_log
from uoe_jax.model.context import Context, document_span
from uoe_jax.model.layers import add_expert_bias, row_gates, rows_to_picks
from uoe_jax.model.routing.balance import Stats
from uoe_jax.model.routing.paired import PairedRouter
from uoe_jax.model.routing.token import Routing
from uoe_jax.model.sharded import pack_local, share_experts, splits_tokens
from uoe_jax.ops.as_segments import Lists, list_attention
from uoe_jax.ops.grouped_matmul.api import gather_project
from uoe_jax.ops.numerics import PROJECTION, scale_rows
from uoe_jax.ops.packing import Packing, gather_rows


class PairedAttention(UnionAttention):
    """Selective attention whose keys and values have a router of their own.

    A query sees those of the tokens up to its own that the expert it asks stores; where
    there are none it reads zeros. Values are times the gates of the experts that
    store them, so that the loss trains that router too.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, PairedRouter, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], Stats, KeyValue]:
        """Return the output, routing statistics, keys and values [B, T*X, J, H].

        Keys and values are in the order of the experts that store each token.
        """
        if (parallel := splits_tokens(context)) is not None:
            return share_experts(self, x, context, parallel)
        asking, storing = self.router.both(x, context)
        here = lambda r: pack_local(self.router, r, context, self.wq.shape[0])
        asked, stored = here(asking), here(storing)
        q = self.project_queries(x, asked, context.positions)
        k, v = self.project_stored(x, storing, stored, context.positions)
        out = self._look(q, (k, v), (asked, stored), context)
        out = self.gate_rows(x, out, asked)
        y = self.project_picks(out, asking, asked).reshape(x.shape)
        log = lambda a: rows_to_picks(a, stored).reshape(x.shape[0], -1, *k.shape[1:])
        return y, asking.stats, (log(k), log(v))

    def decode(
        self, x: Float[Array, "B D"], slot: Slot
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return the output for token `slot.lengths` of each row, and its slot."""
        asking, storing = self.router.decode_both(x)
        asked, stored = self.router.pack(asking), self.router.pack(storing)
        positions = slot.lengths[:, None]
        q = self.project_queries(x[:, None], asked, positions)
        rows = self.project_stored(x[:, None], storing, stored, positions)
        q, k, v = (
            rows_to_picks(a, packing)
            for a, packing in ((q, asked), (rows[0], stored), (rows[1], stored))
        )
        choices, experts = (r.choices[:, 0] for r in (asking, storing))
        first = slot.lengths * experts.shape[1]
        slot, log = slot.append(first, k=k, v=v, experts=experts)
        keys, values, written = log
        out = attend_log(q, choices, keys, values, written, slot.lengths, self.window)
        out = self.gate_rows(x, pick_heads(out, asked), asked)
        return self.project_picks(out, asking, asked), slot

    def project_stored(
        self,
        x: Float[Array, "B T D"],
        storing: Routing,
        packing: Packing,
        positions: Int[Array, "B T"],
    ) -> tuple[Float[Array, "M J H"], Float[Array, "M J H"]]:
        """Return rotated keys and gated values of the packed rows."""
        e, d, j, h = self.wk.shape
        weights = [w[...].reshape(e, d, -1) for w in (self.wk, self.wv)]
        weight = jnp.concatenate(weights, axis=-1).astype(x.dtype)
        rows = gather_project(x.reshape(-1, d), weight, packing)
        biases = [b[...].reshape(e, -1) for b in (self.bk, self.bv) if b is not None]
        if biases:
            rows = add_expert_bias(rows, jnp.concatenate(biases, axis=-1), packing)
        rows = checkpoint_name(rows, PROJECTION).reshape(-1, 2, j, h)
        places = positions.reshape(-1)[packing.token_ids]
        k = self.settle(rows[:, 0], self.k_norm, places)
        gates = row_gates(storing.gates, packing)[:, None, None]
        return k, scale_rows(rows[:, 1], gates)

    def _look(
        self,
        q: Float[Array, "M J G H"],
        pairs: tuple[Array, Array],
        packings: tuple[Packing, Packing],
        context: Context,
    ) -> Float[Array, "J M G H"]:
        """Return each query's attention to what its expert stores of its sample."""
        asked, stored = packings
        shape = context.positions.shape
        length, lists = shape[1], stored.segment_offsets.shape[0] - 1
        put, filled = list_places(stored, length)

        def listed(a: Float[Array, "M2 J H"]) -> Float[Array, "J S T H"]:
            rows = gather_rows(a.reshape(a.shape[0], -1), put)
            # A weight of 0 times another sample's nan would be nan.
            rows = jnp.where(filled, rows, 0)
            return jnp.moveaxis(rows.reshape(lists, length, *a.shape[1:]), 2, 0)

        keys, values = map(listed, pairs)
        span = document_span(shape, context.segments, self.causal)
        if self.window is not None:
            index = jnp.arange(length)[None]
            span = jnp.maximum(span[0], index - self.window + 1), span[1]
        first, last = seen_places(asked, stored, span)
        offsets = asked.segment_offsets
        # A bridge to kernels has no rule for vmap.
        outs = [
            list_attention(
                Lists(q[:, n], keys[n], values[n], offsets, first, last, length)
            )
            for n in range(keys.shape[0])
        ]
        return jnp.stack(outs)


def _segment_of(offsets: Int[Array, " S1"], rows: int) -> Int[Array, " M"]:
    """Return the segment of each row; S: of none."""
    row = jnp.arange(rows, dtype=jnp.int32)
    return jnp.searchsorted(offsets[1:], row, side="right").astype(jnp.int32)


def list_places(packing: Packing, length: int) -> tuple[Packing, Bool[Array, "N 1"]]:
    """Return which row is at each place of S lists of `length`, and each row's place.

    A segment's rows come first in its list; where none is left some row stands in,
    which gets no gradient. And which of the N = S * length places hold a row of theirs.
    """
    offsets, rows = packing.segment_offsets, packing.token_ids.shape[0]
    lists = offsets.shape[0] - 1
    row = jnp.arange(rows, dtype=jnp.int32)
    segment = _segment_of(offsets, rows)
    place = segment * length + row - offsets[segment]
    place = jnp.where(segment < lists, place, lists * length)  # of no list
    index = jnp.arange(length, dtype=jnp.int32)[None]
    source = jnp.minimum(offsets[:-1, None] + index, rows - 1).reshape(-1)
    filled = (index < jnp.diff(offsets)[:, None]).reshape(-1, 1)
    return Packing(source, place[:, None], offsets, offsets), filled


def seen_places(
    asked: Packing,
    stored: Packing,
    span: tuple[Int[Array, "B T"], Int[Array, "B T"]],
) -> tuple[Int[Array, " M"], Int[Array, " M"]]:
    """Return the first and last place of its list that each query sees.

    `span` are the first and last token of the sample that each token may see. A last
    place before the first one: nothing.
    """
    length, offsets = span[0].shape[1], stored.segment_offsets
    lists = offsets.shape[0] - 1
    keys = _segment_of(offsets, stored.token_ids.shape[0])
    # Ascending: by segment, then by token.
    code = keys * length + stored.token_ids % length
    code = jnp.where(keys < lists, code, jnp.iinfo(jnp.int32).max)
    queries = _segment_of(asked.segment_offsets, asked.token_ids.shape[0])
    queries = jnp.minimum(queries, lists - 1)  # rows of no segment see nothing anyway
    low, high = (queries * length + a.reshape(-1)[asked.token_ids] for a in span)
    first = jnp.searchsorted(code, low, side="left").astype(jnp.int32)
    last = jnp.searchsorted(code, high, side="right").astype(jnp.int32) - 1
    start = offsets[queries]
    return first - start, last - start

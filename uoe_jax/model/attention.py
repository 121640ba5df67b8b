"""Attention: dense, and as a union whose experts see only the tokens that chose them.

An expert is J key/value heads with their G query heads each; dense attention is one
expert with all K heads. Weights: wq [E,D,J,G,H], wk and wv [E,D,J,H], wo [E,J,G,H,D],
and with output gates wg [E,D,J,G], with sinks a logit a head [E,J,G];
where a layer is narrower than the model, H is `key_dim` of wq and wk and `value_dim` of
wv and wo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig, cached_dims
from uoe_jax.model.cache import (
    KeyValue,
    Slot,
    attend_cache,
    attend_log,
    route_token,
    written_rows,
)
from uoe_jax.model.context import Context, document_span
from uoe_jax.model.layers import (
    HeadNorm,
    add_expert_bias,
    init_bias,
    init_weight,
    picks_to_rows,
    project,
    residual_scale,
    row_gates,
    rows_to_picks,
)
from uoe_jax.model.routing import make_router
from uoe_jax.model.routing.balance import Stats
from uoe_jax.model.routing.token import Routing
from uoe_jax.model.sharded import attend, pack_local, share_experts, splits_tokens
from uoe_jax.ops.as_segments import Lists, list_attention
from uoe_jax.ops.float8 import float8_products
from uoe_jax.ops.grouped_matmul.api import gather_project, project_scatter
from uoe_jax.ops.numerics import PROJECTION, accumulator_dtype, scale_rows
from uoe_jax.ops.packing import Packing
from uoe_jax.ops.rotary import frequencies, rotate, rotate_pairs
from uoe_jax.ops.segment_attention.api import segment_attention
from uoe_jax.ops.segment_attention.call import Mask
from uoe_jax.ops.split_heads import split_heads

NO_EXPERT = -1  # in a log, of picks that don't count
UNUSED = 1024  # rows of a segment that nothing reads


class RotaryPairs(nnx.Variable):
    """Of each pair that narrow heads keep, which one of the model's heads it was.

    Integers [K, key_dim / 2], one row a key head; never trained.
    """


def _first_pairs(config: ModelConfig) -> RotaryPairs | None:
    """Return the first pairs of a head for all; None where heads keep all they have."""
    if not (config.widths.key_dim and config.rotates):
        return None
    pairs = jnp.arange(config.key_dim // 2, dtype=jnp.int32)[None]
    return RotaryPairs(jnp.broadcast_to(pairs, (config.num_kv_heads, pairs.size)))


class AttentionWeights(nnx.Module):
    """The weights that every kind of attention has, and what reads them densely."""

    def __init__(self, config: ModelConfig, num_experts: int, *, rngs: nnx.Rngs):
        e, d, h, hv = num_experts, config.d_model, config.key_dim, config.value_dim
        j, g = config.num_kv_heads // e, config.num_query_groups
        fan_out = config.layer_heads * hv
        scale = residual_scale(config)
        self.causal = config.causal
        self.window = config.window[0] or None  # of a block: see Block
        self.theta = config.rope_theta if config.rotates else None
        scaling = config.rope_scaling
        self.scaling = None if scaling.kind == "none" else scaling
        self.wq = init_weight(rngs, (e, d, j, g, h), d, config)
        self.wk = init_weight(rngs, (e, d, j, h), d, config)
        self.wv = init_weight(rngs, (e, d, j, hv), d, config)
        self.wo = init_weight(rngs, (e, j, g, hv, d), fan_out, config, scale)
        self.bq = init_bias((e, j, g, h), config, config.qkv_bias)
        self.bk = init_bias((e, j, h), config, config.qkv_bias)
        self.bv = init_bias((e, j, hv), config, config.qkv_bias)
        self.bo = init_bias((d,), config, config.output_bias)
        gates = jnp.zeros((e, d, j, g), config.param_dtype)
        self.wg = nnx.Param(gates) if config.output_gate else None
        sinks = jnp.zeros((e, j, g), config.param_dtype)
        self.sink = nnx.Param(sinks) if config.sink else None
        self.q_norm = HeadNorm(config) if config.qk_norm else None
        self.k_norm = HeadNorm(config) if config.qk_norm else None
        # What other widths of keys or values change; see `narrow`.
        self.head_dim = config.head_dim
        self.narrow = bool(config.widths.key_dim or config.widths.value_dim)
        self.rotary_pairs = _first_pairs(config)

    @staticmethod
    def cache_shapes(config: ModelConfig, max_len: int) -> dict[str, Any]:
        """Return shape and dtype of what a row of the cache holds, by name.

        Here k and v of every token; the dtype None stands for the cache's own.
        """
        shape = (max_len, config.num_kv_heads)
        widths = zip("kv", config.cached_dims, strict=True)
        return {name: ((*shape, width), None) for name, width in widths}

    @property
    def cached_dims(self) -> tuple[int, int]:
        """Widths of keys and of values as a cache has them."""
        return cached_dims(self.wk.shape[-1], self.wv.shape[-1], self.head_dim)

    @property
    def cached_pairs(self) -> Int[Array, "K P"] | None:
        """Which of the model's pairs those are that a cached key has, where they turn.

        None: the first ones in order. Narrow keys whose zeros make them as wide as the
        model's heads have each pair where these have it.
        """
        width = self.cached_dims[0]
        if self.rotary_pairs is None or width == self.head_dim:
            return None
        missing = width // 2 - self.rotary_pairs.shape[-1]
        return jnp.pad(self.rotary_pairs[...], ((0, 0), (0, missing)))

    def cached_keys(self, x: Float[Array, "*N K H"]) -> Float[Array, "*N K C"]:
        """Return keys as a cache has them, with zeros between; of heads K times any."""
        width, own = self.cached_dims[0], x.shape[-1]
        if width == own:
            return x
        if self.rotary_pairs is None:
            return _widen(x, width)
        half = width // 2
        if width < self.head_dim:
            first, second = jnp.split(x, 2, axis=-1)
            return jnp.concatenate([_widen(a, half) for a in (first, second)], axis=-1)
        pairs = self.rotary_pairs[...]
        heads = jnp.arange(pairs.shape[0])[:, None]
        # Of each number of a whole head the one that is kept; past the last one: zero.
        source = jnp.full((pairs.shape[0], width), own, jnp.int32)
        for place, start in ((pairs, 0), (pairs + half, own // 2)):
            number = start + jnp.arange(own // 2)[None]
            number = jnp.broadcast_to(number, pairs.shape)
            source = source.at[heads, place].set(number.astype(jnp.int32))
        source = jnp.repeat(source, x.shape[-2] // pairs.shape[0], axis=0)
        source = source.reshape((1,) * (x.ndim - 2) + source.shape)
        return jnp.take_along_axis(_widen(x, own + 1), source, axis=-1)

    def cached_queries(self, x: Float[Array, "*N K G H"]) -> Float[Array, "*N K G C"]:
        """Return queries with zeros where the keys of a cache have them."""
        flat = x.reshape(*x.shape[:-3], -1, x.shape[-1])
        return self.cached_keys(flat).reshape(*x.shape[:-1], -1)

    def cached_values(self, x: Float[Array, "*N H"]) -> Float[Array, "*N C"]:
        """Return values as a cache has them, with zeros at their ends."""
        return _widen(x, self.cached_dims[1])

    def settle(self, x: Array, norm: HeadNorm | None, positions: Array) -> Array:
        """Return heads [*N, heads, H] normalised and rotated, where the model does."""
        if norm is not None:
            x = norm(x)
        if self.theta is None:
            return x
        if self.rotary_pairs is not None:
            spectrum = frequencies(self.head_dim, self.theta, self.scaling)
            return rotate_pairs(x, positions, spectrum[self.rotary_pairs[...]])
        return rotate(x, positions, self.theta, self.scaling)

    def project_qkv(
        self, x: Float[Array, "*N D"], positions: Int[Array, "*N"]
    ) -> tuple[Array, Array, Array]:
        """Return rotated queries [*N, K*G, H] and keys, and values [*N, K, H].

        Queries of narrow keys are shrunk: whoever divides scores by the root of the
        width there is then divides by that of the model's, sqrt(head_dim).
        """
        parts = []
        pairs = zip(
            (self.wq, self.wk, self.wv), (self.bq, self.bk, self.bv), strict=True
        )
        for weight, bias in pairs:
            matrix = weight[...].reshape(x.shape[-1], -1)
            vector = None if bias is None else bias[...].reshape(-1)
            part = project(x, matrix, vector)
            parts.append(part.reshape(*x.shape[:-1], -1, weight.shape[-1]))
        q, k, v = parts
        q = self.settle(q, self.q_norm, positions)
        if q.shape[-1] != self.head_dim:
            q = q * (q.shape[-1] / self.head_dim) ** 0.5
        return q, self.settle(k, self.k_norm, positions), v

    def gate_heads(
        self, x: Float[Array, "*N D"], heads: Float[Array, "*N Q H"]
    ) -> Float[Array, "*N Q H"]:
        """Return what all heads read times their gates, 2 sigmoid of a product of x.

        Where the model has such gates (Qiu et al. 2025, one a head): 1 at the start.
        """
        if self.wg is None:
            return heads
        with float8_products("none"):
            scores = project(x, self.wg[...].reshape(x.shape[-1], -1))
        return scale_rows(heads, _output_gates(scores)[..., None])

    def gate_rows(
        self, x: Float[Array, "*N D"], heads: Float[Array, "J M G H"], packing: Packing
    ) -> Float[Array, "J M G H"]:
        """Return what packed rows read times their gates; see `gate_heads`."""
        if self.wg is None:
            return heads
        e, d, j, g = self.wg.shape
        weight = self.wg[...].reshape(e, d, -1).astype(x.dtype)
        with float8_products("none"):
            scores = gather_project(x.reshape(-1, d), weight, packing)
        scores = scores.reshape(-1, j, g)
        return scale_rows(heads, jnp.moveaxis(_output_gates(scores), 1, 0)[..., None])

    def project_out(self, heads: Float[Array, "*N Q H"]) -> Float[Array, "*N D"]:
        """Return the heads' outputs projected to the model width."""
        matrix = self.wo[...].reshape(-1, self.wo.shape[-1])
        bias = None if self.bo is None else self.bo[...]
        return project(heads.reshape(*heads.shape[:-2], -1), matrix, bias)

    def decode_visible(
        self,
        x: Float[Array, "B D"],
        slot: Slot,
        visible: Callable[[Array, Array], Array],
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return the output for one token a row, and its slot, with every head.

        `visible(q, keys)` says which rows of the cache a query sees, for queries
        [B, K, G, H] and keys [B, S, K, H].
        """
        q, k, v = self.project_qkv(x, slot.lengths)
        heads, own, width = k.shape[-2], k.shape[-1], v.shape[-1]
        k, v = self.cached_keys(k), self.cached_values(v)
        slot, (keys, values) = slot.append_token(k, v)
        q = self.cached_keys(q).reshape(x.shape[0], heads, -1, k.shape[-1])
        sink = None if self.sink is None else self.sink[...].reshape(q.shape[1:3])
        out = attend_cache(q, keys, values, visible(q, keys), sink, width=own)
        out = out.reshape(x.shape[0], -1, v.shape[-1])[..., :width]
        return self.project_out(self.gate_heads(x, out)), slot

    def project_keys(
        self, x: Float[Array, "*N D"], positions: Int[Array, "*N"]
    ) -> KeyValue:
        """Return rotated keys and values [*N, K, H] of all tokens, for all experts."""
        parts = []
        for weight, bias in ((self.wk, self.bk), (self.wv, self.bv)):
            matrix = jnp.moveaxis(weight[...], 0, 1).reshape(x.shape[-1], -1)
            vector = None if bias is None else bias[...].reshape(-1)
            part = project(x, matrix, vector)
            parts.append(part.reshape(*x.shape[:-1], -1, weight.shape[-1]))
        return self.settle(parts[0], self.k_norm, positions), parts[1]

    def project_queries(
        self, x: Float[Array, "B T D"], packing: Packing, positions: Int[Array, "B T"]
    ) -> Float[Array, "M J G H"]:
        """Return the rotated queries of the packed rows."""
        e, d, j, g, h = self.wq.shape
        weight = self.wq[...].reshape(e, d, -1).astype(x.dtype)
        rows = gather_project(x.reshape(-1, d), weight, packing)
        if self.bq is not None:
            rows = add_expert_bias(rows, self.bq[...].reshape(e, -1), packing)
        rows = checkpoint_name(rows, PROJECTION).reshape(-1, j * g, h)
        places = positions.reshape(-1)[packing.token_ids]
        return self.settle(rows, self.q_norm, places).reshape(-1, j, g, h)

    def project_picks(
        self, heads: Float[Array, "J M G H"], routing: Routing, packing: Packing
    ) -> Float[Array, "N D"]:
        """Return the gated rows projected and summed into their tokens."""
        e, d = self.wo.shape[0], self.wo.shape[-1]
        gates = row_gates(routing.gates, packing)[None, :, None, None]
        # Gated before they are put side by side: the heads are kept as they came.
        rows = jnp.moveaxis(scale_rows(heads, gates), 0, 1)
        weight = self.wo[...].reshape(e, -1, d).astype(rows.dtype)
        y = project_scatter(rows.reshape(rows.shape[0], -1), weight, packing)
        if self.bo is not None:
            y = y + self.bo[...].astype(y.dtype)[None]
        return checkpoint_name(y, PROJECTION)


def _widen(x: Array, width: int) -> Array:
    """Return x with zeros at the end of its last axis, up to a width."""
    if x.shape[-1] == width:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def _output_gates(scores: Float[Array, "*N"]) -> Float[Array, "*N"]:
    return 2.0 * jax.nn.sigmoid(scores.astype(accumulator_dtype(scores.dtype)))


class DenseAttention(AttentionWeights):
    """Every token attends with every head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, 1, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], Stats, KeyValue]:
        """Return the output, no statistics, and keys and values as a cache has them."""
        out, (k, v) = self.attend_heads(x, context)
        kept = self.cached_keys(k), self.cached_values(v)
        return self.project_out(self.gate_heads(x, out)), {}, kept

    def attend_heads(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T Q W"], KeyValue]:
        """Return what each head reads of the values, and the keys and values."""
        q, k, v = self.project_qkv(x, context.positions)
        heads = equal_widths(q, k, v) if self.narrow else (q, k, v)
        sink = None if self.sink is None else self.sink[...].reshape(-1)
        out = attend(*heads, context, Mask(self.causal, self.window), sink)
        if self.narrow:
            out = out[..., : v.shape[-1]]
        return out, (k, v)

    def decode(
        self, x: Float[Array, "B D"], slot: Slot
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return the output for token `slot.lengths` of each row, and its slot."""
        return self.decode_visible(
            x, slot, lambda q, keys: written_rows(keys, slot.row, self.window)
        )


def equal_widths(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K W"]
) -> tuple[Array, Array, Array]:
    """Return queries, keys and values with zeros up to one width, a multiple of 8.

    As kernels want them. Queries grow by what a wider head's scores are divided more.
    """
    width = -(-max(k.shape[-1], v.shape[-1]) // 8) * 8
    if width != q.shape[-1]:
        q = q * (width / q.shape[-1]) ** 0.5
    q, k, v = (_widen(a, width) for a in (q, k, v))
    return q, k, v


class UnionAttention(AttentionWeights):
    """Selective multi-head attention (SMHA; Yang et al. 2025, Union of Experts).

    Each expert gathers the tokens routed to it, attends among these alone, in their
    order and at their original positions, and adds its output at their places.
    `router` replaces the one that the config names.
    """

    def __init__(self, config: ModelConfig, router: Any = None, *, rngs: nnx.Rngs):
        union = config.union_for("attention")
        super().__init__(config, union.num_experts, rngs=rngs)
        make = make_router if router is None else router
        self.router = make(config.d_model, union, config.causal, rngs=rngs)
        self.gated_values = union.gated_values

    @staticmethod
    def cache_shapes(config: ModelConfig, max_len: int) -> dict[str, Any]:
        """Return what a row of the cache holds: the log of picks and their experts."""
        union = config.union_for("attention")
        rows = max_len * union.most
        shape = (rows, config.num_kv_heads // union.num_experts, config.head_dim)
        return {"k": (shape, None), "v": (shape, None), "experts": ((rows,), "int32")}

    def __call__(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], Stats, KeyValue]:
        """Return the output, routing statistics, keys and values [B, T*X, J, H].

        Keys and values are in the order of each token's picks, as the cache has them.
        """
        if (parallel := splits_tokens(context)) is not None:
            return share_experts(self, x, context, parallel)
        routing = self.router(x, context)
        packing = pack_local(self.router, routing, context, self.wq.shape[0])
        q, k, v = self.project_rows(x, packing, context.positions)
        v = self.weigh(v, routing, packing)
        bounds = None
        if context.segments is not None:
            bounds = document_bounds(packing, context.segments)
        if self.window is not None and self.window < x.shape[1]:
            near = window_rows(packing, x.shape[1], self.window)
            last = jnp.arange(near.shape[0], dtype=near.dtype)
            bounds = (
                (near, last)
                if bounds is None
                else (jnp.maximum(bounds[0], near), bounds[1])
            )
        sink = self.row_sinks(packing)
        out = self._attend(q, k, v, packing.segment_offsets, bounds, sink)
        out = self.gate_rows(x, out, packing)
        y = self.project_picks(out, routing, packing).reshape(x.shape)
        log = lambda a: self.log_rows(a, routing, packing).reshape(
            x.shape[0], -1, k.shape[0], k.shape[2]
        )
        return y, routing.stats, (log(k), log(v))

    def log_rows(
        self, heads: Float[Array, "J M *H"], routing: Routing, packing: Packing
    ) -> Float[Array, "N X J *H"]:
        """Return the heads' rows as picks; those of no expert, with nothing in them."""
        picks = head_picks(heads, packing)
        if not self.router.varies or routing.kept is None:
            return picks
        kept = routing.kept.reshape(-1, picks.shape[1], *[1] * (picks.ndim - 2))
        return jnp.where(kept, picks, jnp.zeros_like(picks))

    def decode(
        self, x: Float[Array, "B D"], slot: Slot
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return the output for token `slot.lengths` of each row, and its slot."""
        routing, slot = route_token(self.router, x, slot, "attention")
        choices = routing.choices[:, 0]
        packing = self.router.pack(routing)
        q, k, v = self.project_rows(x[:, None], packing, slot.lengths[:, None])
        heads = (q, k, self.weigh(v, routing, packing))
        q, k, v = (self.log_rows(part, routing, packing) for part in heads)
        first = slot.lengths * choices.shape[1]
        kept = routing.kept if self.router.varies else None
        written = choices
        if kept is not None:
            written = jnp.where(kept[:, 0], choices, NO_EXPERT)
        slot, (keys, values, experts) = slot.append(first, k=k, v=v, experts=written)
        log = (keys, values, experts)
        sink = None if self.sink is None else self.sink[...][choices]
        out = attend_log(q, choices, *log, slot.lengths, self.window, sink)
        if kept is not None:  # what sees nothing, not even itself, is no number
            kept = kept.reshape(*choices.shape, *[1] * (out.ndim - 2))
            out = jnp.where(kept, out, jnp.zeros_like(out))
        out = self.gate_rows(x, pick_heads(out, packing), packing)
        y = self.project_picks(out, routing, packing)
        return y, slot

    def weigh(
        self, values: Float[Array, "J M H"], routing: Routing, packing: Packing
    ) -> Float[Array, "J M H"]:
        """Return values times their tokens' gates, where these are gated.

        A gate of what a token asks has no gradient of how useful it is to later ones;
        with its value gated it has.
        """
        if not self.gated_values:
            return values
        gates = row_gates(routing.gates, packing)[None, :, None]
        return scale_rows(values, gates)

    def row_sinks(self, packing: Packing) -> Float[Array, "J M G"] | None:
        """Return the sinks of the packed rows' heads, where there are some."""
        if self.sink is None:
            return None
        e, j, g = self.sink.shape
        rows = jnp.zeros((packing.token_ids.shape[0], j * g), jnp.float32)
        rows = add_expert_bias(rows, self.sink[...].reshape(e, -1), packing)
        return jnp.moveaxis(rows.reshape(-1, j, g), 1, 0)

    def project_rows(
        self, x: Float[Array, "B T D"], packing: Packing, positions: Int[Array, "B T"]
    ) -> tuple[Array, Array, Array]:
        """Return rotated queries [J, M, G, H] and keys, and values [J, M, H]."""
        e, d, j, g, _ = self.wq.shape
        # One product for the three, so that each token's row is gathered once.
        weights = [w[...].reshape(e, d, -1) for w in (self.wq, self.wk, self.wv)]
        weight = jnp.concatenate(weights, axis=-1).astype(x.dtype)
        rows = gather_project(x.reshape(-1, d), weight, packing)
        given = [b for b in (self.bq, self.bk, self.bv) if b is not None]
        if given:
            biases = [b[...].reshape(e, -1) for b in given]
            rows = add_expert_bias(rows, jnp.concatenate(biases, axis=-1), packing)
        rows = checkpoint_name(rows, PROJECTION)
        places = positions.reshape(-1)
        plain = self.q_norm is None and self.scaling is None
        q, k, v = split_heads(
            rows,
            places,
            packing.token_ids,
            kv_heads=j,
            groups=g,
            theta=self.theta if plain else None,
        )
        if plain:
            return q, k, v
        places = jnp.broadcast_to(places[packing.token_ids][None], k.shape[:2])
        q = self.settle(q, self.q_norm, places)
        return q, self.settle(k[:, :, None], self.k_norm, places)[:, :, 0], v

    def _attend(
        self, q: Array, k: Array, v: Array, offsets: Array, bounds: Any, sink: Any
    ) -> Float[Array, "J M G H"]:
        """Attend inside each segment and document, every key head on its own."""
        heads, rows = k.shape[:2]
        if heads > 1:
            if bounds is not None:
                bounds = tuple(each_head(x, rows, heads) for x in bounds)
            offsets = head_offsets(offsets, rows, heads)
        q, k, v = (a.reshape(-1, *a.shape[2:]) for a in (q, k, v))
        sink = None if sink is None else sink.reshape(-1, sink.shape[2])
        options = {"causal": self.causal, "bounds": bounds, "sink": sink}
        out = segment_attention(q, k, v, offsets, **options)
        return out.reshape(heads, rows, *out.shape[1:])


class SharedKvAttention(AttentionWeights):
    """Union attention whose queries are routed while keys and values are everybody's.

    A token computes queries, scores and outputs for the heads it chose, and sees all
    its predecessors there: projections of queries and outputs, and scores, cost X/E of
    dense. `router` replaces the one that the config names.
    """

    def __init__(self, config: ModelConfig, router: Any = None, *, rngs: nnx.Rngs):
        union = config.union_for("attention")
        super().__init__(config, union.num_experts, rngs=rngs)
        make = make_router if router is None else router
        self.router = make(config.d_model, union, config.causal, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], Stats, KeyValue]:
        """Return the output, routing statistics, keys and values [B, T, K, H]."""
        if (parallel := splits_tokens(context)) is not None:
            return share_experts(self, x, context, parallel)
        routing = self.router(x, context)
        packing = pack_local(self.router, routing, context, self.wq.shape[0])
        q = self.project_queries(x, packing, context.positions)
        k, v = self.project_keys(x, context.positions)
        out = self._look(q, k, v, packing, context)
        out = self.gate_rows(x, out, packing)
        y = self.project_picks(out, routing, packing).reshape(x.shape)
        return y, routing.stats, (k, v)

    def decode(
        self, x: Float[Array, "B D"], slot: Slot
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return the output for token `slot.lengths` of each row, and its slot."""
        routing, slot = route_token(self.router, x, slot, "attention")
        choices = routing.choices[:, 0]
        packing = self.router.pack(routing)
        rows = self.project_queries(x[:, None], packing, slot.lengths[:, None])
        q = rows_to_picks(rows, packing)
        batch, picks, j, groups, width = q.shape
        k, v = self.project_keys(x, slot.lengths)
        slot, cached = slot.append_token(k, v)

        def chosen(a: Array) -> Array:
            a = a.reshape(*a.shape[:2], -1, j, width)
            a = jnp.take_along_axis(a, choices[:, None, :, None, None], axis=2)
            return a.reshape(*a.shape[:2], -1, width)

        keys, values = map(chosen, cached)
        q = q.reshape(batch, picks * j, groups, width)
        visible = written_rows(keys, slot.row, self.window)
        out = attend_cache(q, keys, values, visible)
        out = out.reshape(batch, picks, j, groups, width)
        out = self.gate_rows(x, pick_heads(out, packing), packing)
        y = self.project_picks(out, routing, packing)
        return y, slot

    def _look(
        self, q: Array, k: Array, v: Array, packing: Packing, context: Context
    ) -> Float[Array, "J M G H"]:
        """Return each row's attention to its sample, in the heads of its expert."""
        batch, length = k.shape[:2]
        e, _, j, _, h = self.wq.shape
        # One list of keys for each (expert, sample), as the rows are sorted.
        lists = lambda a: a.reshape(batch, length, e, j, h).transpose(3, 2, 0, 1, 4)
        keys, values = (lists(a).reshape(j, e * batch, length, h) for a in (k, v))
        seen, last = document_span(k.shape[:2], context.segments, self.causal)
        if self.window is not None:
            index = jnp.arange(length)[None]
            seen = jnp.maximum(seen, index - self.window + 1)
        first, last = (a.reshape(-1)[packing.token_ids] for a in (seen, last))
        segments = packing.segment_offsets
        # A bridge to kernels has no rule for vmap.
        outs = [
            list_attention(
                Lists(q[:, n], keys[n], values[n], segments, first, last, length)
            )
            for n in range(j)
        ]
        return jnp.stack(outs)


def each_head(numbers: Int[Array, " R"], rows: int, heads: int) -> Int[Array, " JR"]:
    """Return numbers of rows for every head in a run of `rows` rows."""
    shift = rows * jnp.arange(heads, dtype=numbers.dtype)[:, None]
    return (numbers[None] + shift).reshape(-1)


def head_offsets(
    offsets: Int[Array, " S1"], rows: int, heads: int
) -> Int[Array, " S2"]:
    """Return the segments of every head in a run of `rows` rows, one after another.

    Rows past a head's last segment (picks that don't count, experts elsewhere) become
    small segments, so that attending among them costs little; nothing reads them.
    """
    pieces = jnp.arange(1, -(-rows // UNUSED), dtype=offsets.dtype) * UNUSED
    unused = jnp.minimum(offsets[-1] + pieces, rows)
    offsets = each_head(jnp.concatenate([offsets, unused]), rows, heads)
    return jnp.append(offsets, rows * heads)


def head_picks(
    heads: Float[Array, "J M ..."], packing: Packing
) -> Float[Array, "N X J ..."]:
    """Return the heads' rows as each token's picks, in the order it picked them."""
    return rows_to_picks(jnp.moveaxis(heads, 0, 1), packing)


def pick_heads(
    picks: Float[Array, "N X J ..."], packing: Packing
) -> Float[Array, "J M ..."]:
    """Return the heads' rows of each token's picks; the reverse of `head_picks`."""
    return jnp.moveaxis(picks_to_rows(picks, packing), 1, 0)


def document_bounds(
    packing: Packing, segments: Int[Array, "B T"]
) -> tuple[Int[Array, " M"], Int[Array, " M"]]:
    """Return the first and last packed row of each row's document."""
    rows = packing.token_ids.shape[0]
    row = jnp.arange(rows, dtype=jnp.int32)
    document = segments.reshape(-1)[packing.token_ids]
    before = jnp.pad(document[:-1], (1, 0), constant_values=-1)
    starts = jnp.zeros(rows + 1, bool).at[packing.segment_offsets].set(True)[:rows]
    starts = starts | (document != before)
    ends = jnp.append(starts[1:], True)
    first = jax.lax.cummax(jnp.where(starts, row, 0))
    last = jax.lax.cummin(jnp.where(ends, row, rows), reverse=True)
    return first, last


def window_rows(packing: Packing, length: int, window: int) -> Int[Array, " M"]:
    """Return each row's first packed row in its segment whose token is in its window.

    A segment's tokens ascend; the window counts all tokens of the sample, whether the
    expert has them or not.
    """
    row = jnp.arange(packing.token_ids.shape[0], dtype=jnp.int32)
    segment = jnp.searchsorted(packing.segment_offsets[1:], row, side="right")
    place = packing.token_ids % length
    start = segment.astype(jnp.int32) * length
    inside = row < packing.segment_offsets[-1]
    # Rows past the last segment are nobody's: they stay behind the others.
    key = jnp.where(inside, start + place, jnp.iinfo(jnp.int32).max)
    wanted = jnp.where(inside, start + jnp.maximum(place - window + 1, 0), key)
    first = jnp.searchsorted(key, wanted, side="left").astype(jnp.int32)
    return jnp.minimum(first, row)

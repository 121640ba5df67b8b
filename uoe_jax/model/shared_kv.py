"""Attention whose queries are routed while keys and values are everybody's.

A token computes queries, scores and outputs for the heads it chose, and sees all its
predecessors there: projections of queries and outputs, and scores, cost X/E of dense.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig, UnionConfig
from uoe_jax.model.attention import KeyValue, UnionAttention
from uoe_jax.model.balance_stats import Stats
from uoe_jax.model.context import Context, document_span
from uoe_jax.model.linear import PROJECTION, add_expert_bias, project, truncated_normal
from uoe_jax.model.router import PatchRouter, Routing, State, router_scores
from uoe_jax.model.sharded import pack_local, share_experts, splits_tokens
from uoe_jax.ops.grouped_matmul.api import gather_project
from uoe_jax.ops.list_attention import list_attention
from uoe_jax.ops.packing import Packing


class SharedKvAttention(UnionAttention):
    """Union attention with queries routed and keys and values of all tokens."""

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
        y = self.project_out(out, routing, packing).reshape(x.shape)
        return y, routing.stats, (k, v)

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
        return self._rotate(rows, places).reshape(-1, j, g, h)

    def project_keys(
        self, x: Float[Array, "*N D"], positions: Int[Array, "*N"]
    ) -> KeyValue:
        """Return rotated keys and values [*N, K, H] of all tokens."""
        parts = []
        for weight, bias in ((self.wk, self.bk), (self.wv, self.bv)):
            matrix = jnp.moveaxis(weight[...], 0, 1).reshape(x.shape[-1], -1)
            vector = None if bias is None else bias[...].reshape(-1)
            part = project(x, matrix, vector)
            parts.append(part.reshape(*x.shape[:-1], -1, self.config.head_dim))
        return self._rotate(parts[0], positions), parts[1]

    def _look(
        self, q: Array, k: Array, v: Array, packing: Packing, context: Context
    ) -> Float[Array, "J M G H"]:
        """Return each row's attention to its sample, in the heads of its expert."""
        batch, length = k.shape[:2]
        e, _, j, _, h = self.wq.shape
        # One list of keys for each (expert, sample), as the rows are sorted.
        lists = lambda a: a.reshape(batch, length, e, j, h).transpose(3, 2, 0, 1, 4)
        keys, values = (lists(a).reshape(j, e * batch, length, h) for a in (k, v))
        span = document_span(k.shape[:2], context.segments, self.config.causal)
        first, last = (a.reshape(-1)[packing.token_ids] for a in span)
        segments = packing.segment_offsets
        # A bridge to kernels has no rule for vmap.
        outs = [
            list_attention(
                q[:, n], keys[n], values[n], segments, first, last, max_rows=length
            )
            for n in range(j)
        ]
        return jnp.stack(outs)


class MohRouter(PatchRouter):
    """Gates of mixture-of-head attention (MoH; Jin et al. 2024, eq. 5 and 6).

    A softmax over the chosen routed heads and one over the always-on heads, weighed
    against each other by a third; each is scaled to a mean of 1, as dense heads have.
    """

    def __init__(
        self, d_model: int, config: UnionConfig, causal: bool, *, rngs: nnx.Rngs
    ):
        super().__init__(d_model, config, causal, rngs=rngs)
        self.gate = "softmax"
        draw = lambda n: nnx.Param(
            truncated_normal(rngs, (d_model, n), config.router_init_std)
        )
        shared = config.num_shared
        self.shared_weight = draw(shared) if shared > 1 else None  # of one always 1
        self.split_weight = draw(2) if shared else None

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Routing:
        """Return the routing of every token."""
        return self._weigh(super().__call__(x, context), x)

    def decode(
        self, x: Float[Array, "B D"], state: State, lengths: Int[Array, " B"]
    ) -> tuple[Routing, State]:
        """Route token `lengths` of each row."""
        routing, state = super().decode(x, state, lengths)
        return self._weigh(routing, x[:, None]), state

    def _weigh(self, routing: Routing, x: Float[Array, "B T D"]) -> Routing:
        if self.split_weight is None:
            return routing
        softmax = lambda w: jax.nn.softmax(router_scores(x, w[...]), axis=-1)
        split = 2.0 * softmax(self.split_weight)
        shared = split[..., :1]
        if self.shared_weight is not None:
            shared = shared * self.num_shared * softmax(self.shared_weight)
        gates = [shared, split[..., 1:] * routing.gates[..., self.num_shared :]]
        return routing._replace(gates=jnp.concatenate(gates, axis=-1))


class MohAttention(SharedKvAttention):
    """Mixture-of-head attention, computed for the chosen heads only."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        union = config.union_for("attention")
        self.router = MohRouter(config.d_model, union, config.causal, rngs=rngs)

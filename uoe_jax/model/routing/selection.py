"""Routers that decide for a whole sample or a segment: selection and hierarchical."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from uoe_jax.config import UnionConfig
from uoe_jax.model.context import Context, patch_leaders
from uoe_jax.model.layers import truncated_normal
from uoe_jax.model.routing.balance import router_stats
from uoe_jax.model.routing.token import (
    Router,
    Routing,
    State,
    gate_values,
    patch_scores,
    pick_scores,
    router_scores,
)


class SelectionRouter(Router):
    """Expert selection: a sample picks its `top_k` experts by its mean score.

    A causal model decides anew every `segment_size` tokens of a document, by the mean
    over the document's earlier segments, whole; the first segment uses learned scores.
    """

    def __init__(
        self, d_model: int, config: UnionConfig, causal: bool, *, rngs: nnx.Rngs
    ):
        super().__init__(d_model, config, causal, rngs=rngs)
        self.segment_size = config.segment_size
        self.default = nnx.Param(jnp.zeros(self.weight.shape[1]))

    @staticmethod
    def state_shapes(config: Any, batch: int) -> dict[str, tuple[Any, str]]:
        """Return shapes of the running sum of scores and of the decision held."""
        shape = ((batch, config.num_experts - config.num_shared), "float32")
        return {"sum": shape, "decision": shape}

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Routing:
        """Return the routing of every token; all tokens of a segment share it."""
        scores = self.scores(x)
        decision = self.pool(scores, context)
        picks = self.choose(decision)
        gates = self.gates(decision, picks)
        routing = self.route(decision, decision, picks, gates, context)
        return self.remember(routing, scores, decision, context)

    def pool(
        self, scores: Float[Array, "B T E"], context: Context
    ) -> Float[Array, "B T E"]:
        """Return each token's decision: the mean score of what it may look at."""
        shape, segments = scores.shape[:2], context.segments
        start = patch_leaders(shape, segments, shape[1])
        if not self.causal:
            return patch_scores(scores, start, False)
        leader = patch_leaders(shape, segments, self.segment_size)
        before = document_sums(scores, start) - scores  # of earlier tokens
        total = jnp.take_along_axis(before, leader[..., None], axis=1)
        count = (leader - start)[..., None]
        mean = total / jnp.maximum(count, 1)
        default = self.default[...].astype(scores.dtype)[None, None]
        return jnp.where(count > 0, mean, default)

    def remember(
        self,
        routing: Routing,
        scores: Float[Array, "B T E"],
        decision: Float[Array, "B T E"],
        context: Context,
    ) -> Routing:
        """Add the state after prompts of `context.lengths` tokens."""
        if context.lengths is None:
            return routing
        inside = jnp.arange(scores.shape[1])[None] < context.lengths[:, None]
        total = jnp.sum(jnp.where(inside[..., None], scores, 0), axis=1)
        last = (context.lengths - 1)[:, None, None]
        held = jnp.take_along_axis(decision, last, axis=1)[:, 0]
        state = {"sum": total, "decision": held}
        return routing._replace(stats={**routing.stats, "state": state})

    def decode(
        self, x: Float[Array, "B D"], state: State, lengths: Int[Array, " B"]
    ) -> tuple[Routing, State]:
        """Route token `lengths` of each row."""
        scores = self.scores(x)
        decision, state = self.advance(scores, state, lengths)
        picks = self.choose(decision)
        gates = self.gates(decision, picks)
        return self.finish(picks[:, None], gates[:, None], None, {}, False), state

    def advance(
        self, scores: Float[Array, "B E"], state: State, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B E"], State]:
        """Return the decision for one new token and the state that includes it."""
        seen = lengths[:, None]
        default = self.default[...].astype(scores.dtype)[None]
        mean = jnp.where(seen > 0, state["sum"] / jnp.maximum(seen, 1), default)
        first = seen % self.segment_size == 0
        decision = jnp.where(first, mean, state["decision"])
        return decision, {"sum": state["sum"] + scores, "decision": decision}


class HierarchicalRouter(SelectionRouter):
    """Expert selection of `selected` experts, then each token picks among these.

    A gate is the product of the token's and the selection's.
    """

    def __init__(
        self, d_model: int, config: UnionConfig, causal: bool, *, rngs: nnx.Rngs
    ):
        super().__init__(d_model, config, causal, rngs=rngs)
        std = config.router_init_std
        self.selected = config.selected - config.num_shared
        self.token_weight = nnx.Param(truncated_normal(rngs, self.weight.shape, std))

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Routing:
        """Return the routing of every token."""
        scores = self.scores(x)
        decision = self.pool(scores, context)
        own = router_scores(x, self.token_weight[...])
        masked, picks, gates = self.choose_inside(own, decision)
        routing = self.route(own, masked, picks, gates, context)
        # The selection is balanced too: the means of both routers' losses.
        chosen = self._select(decision)
        pooled = router_stats(decision, decision, chosen, context)
        stats = dict(routing.stats)
        for name in ("balance_loss", "z_loss"):
            stats[name] = 0.5 * (stats[name] + pooled[name])
        return self.remember(routing._replace(stats=stats), scores, decision, context)

    def choose_inside(
        self, own: Float[Array, "*N E"], decision: Float[Array, "*N E"]
    ) -> tuple[Array, Int[Array, "*N X"], Float[Array, "*N X"]]:
        """Return the scores inside the selection, the picks and their gates."""
        inside = jax.nn.one_hot(self._select(decision), own.shape[-1]).sum(-2) > 0
        masked = jnp.where(inside, own, -1e9)
        bias = self.bias[...].reshape((1,) * (own.ndim - 1) + (-1,))
        biased = jnp.where(inside, own + bias, -jnp.inf)
        picks = jax.lax.top_k(jax.lax.stop_gradient(biased), self.top_k)[1]
        outer = "straight_through" if self.gate == "straight_through" else "sigmoid"
        gates = gate_values(pick_scores(own, picks), self.gate)
        return masked, picks, gates * gate_values(pick_scores(decision, picks), outer)

    def decode(
        self, x: Float[Array, "B D"], state: State, lengths: Int[Array, " B"]
    ) -> tuple[Routing, State]:
        """Route token `lengths` of each row."""
        decision, state = self.advance(self.scores(x), state, lengths)
        own = router_scores(x, self.token_weight[...])
        _, picks, gates = self.choose_inside(own, decision)
        return self.finish(picks[:, None], gates[:, None], None, {}, False), state

    def _select(self, decision: Float[Array, "*N E"]) -> Int[Array, "*N S"]:
        return jax.lax.top_k(jax.lax.stop_gradient(decision), self.selected)[1]


def document_sums(
    values: Float[Array, "B T E"], start: Int[Array, "B T"]
) -> Float[Array, "B T E"]:
    """Return running sums that begin anew at each document's first token."""
    index = jnp.broadcast_to(jnp.arange(values.shape[1])[None], start.shape)
    begins = (index == start)[..., None]

    # Not a difference of cumulative sums: that would carry rounding across documents.
    def join(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.where(b[1], b[0], a[0] + b[0]), a[1] | b[1]

    return jax.lax.associative_scan(join, (values, begins), axis=1)[0]

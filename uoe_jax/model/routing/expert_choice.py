"""Expert choice: each expert picks its tokens. Not for causal models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from uoe_jax.config import MoeConfig, UnionConfig
from uoe_jax.errors import ConfigError
from uoe_jax.model.context import Context
from uoe_jax.model.routing.balance import router_stats
from uoe_jax.model.routing.token import Router, Routing, room_of, rooms
from uoe_jax.ops.packing import Packing, pack_choices


class ExpertChoiceRouter(Router):
    """Each expert takes its top `T * X/E` tokens of every sample (Zhou et al. 2022).

    Perfectly balanced; a token may be taken by any number of experts, or none. Whether
    a token is taken depends on the whole sample, so a causal model can't use it.
    """

    def __init__(
        self,
        d_model: int,
        config: UnionConfig | MoeConfig,
        causal: bool,
        *,
        rngs: nnx.Rngs,
    ):
        if causal:
            raise ConfigError(
                "router 'expert_choice' looks at the whole sample and the model is "
                "causal; use router token, selection or hierarchical"
            )
        super().__init__(d_model, config, causal, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Routing:
        """Return the routing; the picks are all experts, `kept` those that took it."""
        scores = self.scores(x)
        kept = self.take(self.preference(scores), context)
        picks = jnp.broadcast_to(jnp.arange(scores.shape[-1]), scores.shape)
        gates = self.gates(scores, picks)
        stats = router_stats(scores, scores, picks, context)
        count = jnp.sum(kept, axis=(0, 1)).astype(jnp.float32)
        if context.axis_name is not None:
            count = jax.lax.psum(count, context.axis_name)
        load = count / jnp.maximum(jnp.sum(count), 1.0)
        # Balanced by construction: there is nothing for a balance loss to push.
        stats = {**stats, "load": load, "balance_loss": jnp.ones(())}
        return self.finish(picks, gates, kept, stats, context.collect_choices)

    def preference(self, scores: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Return what an expert ranks tokens by."""
        if self.gate == "softmax_all":
            return jax.nn.softmax(scores, axis=-1)
        return scores

    def take(
        self, values: Float[Array, "B T E"], context: Context
    ) -> Bool[Array, "B T E"]:
        """Return which tokens each expert takes; padding is never taken."""
        length, experts = values.shape[1:]
        share = self.top_k / experts
        values = jax.lax.stop_gradient(values)
        if context.segments is not None:
            valid = context.segments != 0
            values = jnp.where(valid[..., None], values, -jnp.inf)
        # The room of a padded sample follows its real tokens.
        room = room_of(share, length, context.segments)
        if not isinstance(room, int):
            room = room[:, None, None]
        order = jax.lax.top_k(jnp.swapaxes(values, 1, 2), self._room(length))[1]
        rank = jnp.arange(order.shape[-1])[None, None]
        sample = jnp.arange(values.shape[0])[:, None, None]
        expert = jnp.arange(experts)[None, :, None]
        taken = jnp.zeros(values.shape, bool)
        return taken.at[sample, order, expert].set(
            jnp.broadcast_to(rank < room, order.shape), unique_indices=True
        )

    def pack(self, routing: Routing) -> Packing:
        """Return the packed rows: as many as all experts can take."""
        batch, length, experts = routing.choices.shape
        routed = experts - self.num_shared
        rows = batch * (self.num_shared * length + routed * self._room(length))
        return pack_choices(routing.choices, self.num_experts, routing.kept, rows)

    def _room(self, length: int) -> int:
        share = self.top_k / (self.num_experts - self.num_shared)
        return int(rooms(share, length)[length])

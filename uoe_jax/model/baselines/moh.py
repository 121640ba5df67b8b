"""Mixture-of-head attention (MoH; Jin et al. 2024)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig, UnionConfig
from uoe_jax.model.attention import SharedKvAttention
from uoe_jax.model.context import Context
from uoe_jax.model.layers import truncated_normal
from uoe_jax.model.routing.token import PatchRouter, Routing, State, router_scores


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
        super().__init__(config, MohRouter, rngs=rngs)

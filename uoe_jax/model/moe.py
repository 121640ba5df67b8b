"""Mixture-of-experts baseline: whole MLPs as experts, dropless, top-k of them."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from uoe_jax.config import ModelConfig
from uoe_jax.model.context import Context
from uoe_jax.model.mlp import RoutedMlp
from uoe_jax.model.router import PatchRouter, Routing, Stats


class MoeMlp(RoutedMlp):
    """Top-k experts, softmax gates renormalised over the chosen to sum to 1.

    Gates as in GShard (Lepikhin et al. 2020) and Mixtral (Jiang et al. 2024, eq. 1).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        moe, width = config.moe, config.d_expert
        super().__init__(config, moe.num_experts, width, width, rngs=rngs)
        self.router = PatchRouter(
            config.d_model, moe, "softmax", config.causal, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], Stats]:
        """Return the output and the routing statistics."""
        routing = self.router(x, context)
        return self.apply(x, routing), routing.stats

    def apply(
        self, x: Float[Array, "B T D"], routing: Routing
    ) -> Float[Array, "B T D"]:
        """Return the output under a given routing."""
        # The router's softmax sums to X, as a union wants it.
        gates = routing.gates / routing.gates.shape[-1]
        return super().apply(x, routing._replace(gates=gates))

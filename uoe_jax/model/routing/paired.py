"""Token choice twice: where a token asks, and where its key and value are stored."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from uoe_jax.config import UnionConfig
from uoe_jax.model.context import Context
from uoe_jax.model.layers import truncated_normal
from uoe_jax.model.routing.balance import Stats
from uoe_jax.model.routing.token import (
    PatchRouter,
    RouterBias,
    Routing,
    router_scores,
)


class PairedRouter(PatchRouter):
    """Two routers of tokens with the same experts: of queries, and of keys and values.

    What a token asks for and what it is found by differ: an induction head asks by its
    own token and stores by the token before. Balance biases and loads are of the
    experts as asked and after them of the experts as stored in; the other statistics
    and the two losses are means of both.
    """

    def __init__(
        self, d_model: int, config: UnionConfig, causal: bool, *, rngs: nnx.Rngs
    ):
        super().__init__(d_model, config, causal, rngs=rngs)
        shape = self.weight.shape
        self.key_weight = nnx.Param(
            truncated_normal(rngs, shape, config.router_init_std)
        )
        self.bias = RouterBias(jnp.zeros(2 * shape[1]))

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Routing:
        """Return where tokens ask."""
        return self.both(x, context)[0]

    def both(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Routing, Routing]:
        """Return where tokens ask, with the statistics of both, and are stored."""
        routings = []
        for scores, bias in self._sides(x):
            picks = self.choose_by(scores, bias)
            gates = self.gates(scores, picks)
            routings.append(self.route(scores, scores, picks, gates, context))
        asked, stored = routings
        return asked._replace(stats=_joined(asked.stats, stored.stats)), stored

    def decode_both(self, x: Float[Array, "B D"]) -> tuple[Routing, Routing]:
        """Return where one token a row asks, and is stored."""
        routings = []
        for scores, bias in self._sides(x):
            picks = self.choose_by(scores, bias)
            gates = self.gates(scores, picks)[:, None]
            routings.append(self.finish(picks[:, None], gates, None, {}, False))
        asked, stored = routings
        return asked, stored

    def _sides(
        self, x: Float[Array, "*N D"]
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Return scores and balance biases of asking and of storing."""
        asking, storing = jnp.split(self.bias[...], 2)
        return (
            (router_scores(x, self.weight[...]), asking),
            (router_scores(x, self.key_weight[...]), storing),
        )


def _joined(asked: Stats, stored: Stats) -> Stats:
    """Return the statistics of both: shares of all picks, means of the others."""
    stats = {n: (asked[n] + stored[n]) / 2 for n in asked if n not in _LISTED}
    stats["load"] = jnp.concatenate([asked["load"], stored["load"]]) / 2
    if "choices" in asked:
        stats |= {"choices": asked["choices"], "stored": stored["choices"]}
    return stats


_LISTED = ("load", "choices")

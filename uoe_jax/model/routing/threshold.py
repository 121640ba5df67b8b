"""Threshold routing: each expert takes the tokens over its own moving threshold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from uoe_jax.config import UnionConfig
from uoe_jax.model.context import Context
from uoe_jax.model.routing.balance import (
    Stats,
    exceeded_by,
    router_stats,
    token_means,
)
from uoe_jax.model.routing.token import Router, Routing, State, gate_values, pick_scores


class ThresholdRouter(Router):
    """An expert takes a token whose score is over the expert's threshold.

    The threshold follows, from training step to step, the score that X/E of the batch's
    tokens exceed, so that experts are balanced without a loss (Sun et al. 2026, Expert
    Threshold routing). `bias` is its negative: it stands still outside of training, so
    a token's experts depend on that token alone. A token has as many experts as it
    passes, up to `most`: those that it passes by the most; also none.

    Gates are of the score over the threshold. With all experts on there is no
    threshold, and every one takes every token.
    """

    varies = True

    def __init__(
        self, d_model: int, config: UnionConfig, causal: bool, *, rngs: nnx.Rngs
    ):
        super().__init__(d_model, config, causal, rngs=rngs)
        self.most = config.most - self.num_shared

    @property
    def sees_one_token(self) -> bool:
        """Whether a token's routing depends on nothing but that token."""
        return True

    @property
    def picks(self) -> int:
        """Places for the experts of a token, always-on ones among them."""
        return self.most + self.num_shared

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Routing:
        """Return the routing; `kept` are the picks over their thresholds."""
        scores = self.scores(x)
        picks, gates, kept = self.take(scores)
        if context.segments is not None:  # padding takes no room
            kept = kept & (context.segments != 0)[..., None]
        stats = self.stats(scores, picks, kept, context)
        return self.finish(picks, gates, kept, stats, context.collect_choices)

    def take(
        self, scores: Float[Array, "*N E"]
    ) -> tuple[Int[Array, "*N X"], Float[Array, "*N X"], Bool[Array, "*N X"]]:
        """Return the experts that a token passes by the most, gates, and which it does.

        The gate of an expert that it doesn't pass is 0.
        """
        bias = self.bias[...].reshape((1,) * (scores.ndim - 1) + (-1,))
        over = scores + bias
        picks = jax.lax.top_k(jax.lax.stop_gradient(over), self.most)[1]
        values = pick_scores(over, picks)
        kept = values > 0
        if self.top_k == scores.shape[-1]:
            kept = jnp.ones_like(kept)
        gates = gate_values(values, self.gate)
        return picks, jnp.where(kept, gates, jnp.zeros_like(gates)), kept

    def stats(
        self,
        scores: Float[Array, "B T E"],
        picks: Int[Array, "B T X"],
        kept: Bool[Array, "B T X"],
        context: Context,
    ) -> Stats:
        """Return the statistics every router has, and the scores for the thresholds.

        load: fraction of the picks that count. dropped: 0. balance_loss: 1, as the
        thresholds do the balancing. threshold [E]: what X/E of the tokens exceed.
        """
        experts = scores.shape[-1]
        stats = router_stats(scores, scores, picks, context)
        one_hot = jax.nn.one_hot(picks, experts, dtype=jnp.float32)
        taken = jnp.sum(one_hot * kept[..., None], axis=-2)
        means = token_means({"taken": taken}, context)["taken"]
        share = self.top_k / experts
        threshold = jnp.zeros(experts, scores.dtype)
        if self.top_k < experts:
            each = lambda own: exceeded_by(own, share, context)
            threshold = jax.vmap(each, in_axes=-1)(scores)
        return {
            **stats,
            "load": means / jnp.maximum(jnp.sum(means), 1e-9),
            "dropped": jnp.zeros(()),
            "balance_loss": jnp.ones(()),
            "threshold": threshold,
        }

    def decode(
        self, x: Float[Array, "B D"], state: State, lengths: Int[Array, " B"]
    ) -> tuple[Routing, State]:
        """Route one token of each row."""
        del lengths
        picks, gates, kept = self.take(self.scores(x))
        picks, gates, kept = picks[:, None], gates[:, None], kept[:, None]
        return self.finish(picks, gates, kept, {}, False), state

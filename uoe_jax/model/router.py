"""Token-choice routing: which experts a token uses and how much each one counts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from uoe_jax.config import Gate, MoeConfig, UnionConfig
from uoe_jax.model.context import Context
from uoe_jax.model.linear import truncated_normal

Stats = dict[str, Array]


class RouterBias(nnx.Variable):
    """Loss-free balance bias: changed by `update_router_bias`, never by a gradient."""


class Routing(NamedTuple):
    """Chosen experts, the float32 gate of each, and the router's statistics."""

    choices: Int[Array, "B T X"]
    gates: Float[Array, "B T X"]
    stats: Stats


class PatchRouter(nnx.Module):
    """Each token, or patch of tokens, picks its `top_k` experts by score.

    Scores are float32 products of the normalised input. In a causal model a patch
    follows the decision of its first token, otherwise the mean of its tokens' scores;
    gates always come from a token's own scores. No choice looks ahead or at another
    sample, and exactly B*T*X rows result: none dropped, none padded.
    """

    def __init__(
        self,
        d_model: int,
        config: UnionConfig | MoeConfig,
        gate: Gate,
        causal: bool,
        *,
        rngs: nnx.Rngs,
    ):
        shape = (d_model, config.num_experts)
        std = config.router_init_std
        self.patch_size = getattr(config, "patch_size", 1)
        self.top_k, self.gate, self.causal = config.top_k, gate, causal
        self.weight = nnx.Param(truncated_normal(rngs, shape, std))
        self.bias = RouterBias(jnp.zeros(config.num_experts))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        leaders: Int[Array, "B T"] | None = None,
    ) -> Routing:
        """Return the routing of every token."""
        scores = self.scores(x)
        decision = scores
        if leaders is not None:
            decision = patch_scores(scores, leaders, self.causal)
        choices = self.choose(decision)
        gates = gate_values(pick_scores(scores, choices), self.gate)
        stats = router_stats(scores, decision, choices, context)
        if context.collect_choices:
            stats["choices"] = choices
        return Routing(choices, gates, stats)

    def scores(self, x: Float[Array, "*N D"]) -> Float[Array, "*N E"]:
        """Return float32 scores of every expert."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.dot(x, self.weight[...], precision=jax.lax.Precision.HIGHEST)

    def choose(self, scores: Float[Array, "*N E"]) -> Int[Array, "*N X"]:
        """Return the experts with the highest scores, balance bias included."""
        bias = self.bias[...].reshape((1,) * (scores.ndim - 1) + (-1,))
        return jax.lax.top_k(jax.lax.stop_gradient(scores) + bias, self.top_k)[1]


def pick_scores(
    scores: Float[Array, "*N E"], choices: Int[Array, "*N X"]
) -> Float[Array, "*N X"]:
    """Return the scores of the chosen experts; its gradient needs no scatter."""
    picked = _one_hot(choices, scores.shape[-1]) * scores[..., None, :]
    return jnp.sum(picked, axis=-1)


def gate_values(scores: Float[Array, "*N X"], gate: Gate) -> Float[Array, "*N X"]:
    """Return what multiplies each chosen expert's output.

    sigmoid: `2 sigmoid(score)`, 1 at score 0. softmax: softmax over the chosen, times
    X. straight_through: exactly 1, with the gradient of `2 sigmoid(score)`.
    """
    if gate == "softmax":
        return jax.nn.softmax(scores, axis=-1) * scores.shape[-1]
    value = 2.0 * jax.nn.sigmoid(scores)
    if gate == "sigmoid":
        return value
    return 1.0 + (value - jax.lax.stop_gradient(value))


def patch_scores(
    scores: Float[Array, "B T E"], leaders: Int[Array, "B T"], causal: bool
) -> Float[Array, "B T E"]:
    """Return the scores each token's patch decides by."""
    if causal:
        return jnp.take_along_axis(scores, leaders[..., None], axis=1)

    def mean(scores: Array, leaders: Array) -> Array:
        total = jnp.zeros_like(scores).at[leaders].add(scores)
        count = jnp.zeros_like(scores[:, :1]).at[leaders].add(1.0)
        return (total / jnp.maximum(count, 1.0))[leaders]

    return jax.vmap(mean)(scores, leaders)


def router_stats(
    scores: Float[Array, "B T E"],
    decision: Float[Array, "B T E"],
    choices: Int[Array, "B T X"],
    context: Context,
) -> Stats:
    """Return load, entropy and the two losses over all tokens but padding.

    load [E]: fraction of picks, sums to 1. balance_loss: `E * sum_e load_e * prob_e`,
    1 when balanced (Fedus et al. 2021, Switch Transformer, eq. 4). z_loss: mean squared
    log-partition of the scores (Zoph et al. 2022, ST-MoE, eq. 5). entropy: of the
    router's softmax, nats. With an `axis_name` the sums run over that mesh axis too.
    """
    num_experts, top_k = scores.shape[-1], choices.shape[-1]
    if context.segments is None:
        valid = jnp.ones(choices.shape[:2], jnp.float32)
    else:
        valid = (context.segments != 0).astype(jnp.float32)
    log_probs = jax.nn.log_softmax(decision, axis=-1)
    probs = jnp.exp(log_probs)
    picks = jnp.sum(_one_hot(choices, num_experts), axis=-2)
    z = jnp.square(jax.nn.logsumexp(scores, axis=-1))
    entropy = -jnp.sum(probs * log_probs, axis=-1)
    weight = valid[..., None]
    sums = {
        "tokens": jnp.sum(valid),
        "picks": jnp.sum(picks * weight, axis=(0, 1)),
        "probs": jnp.sum(probs * weight, axis=(0, 1)),
        "z": jnp.sum(z * valid),
        "entropy": jnp.sum(entropy * valid),
    }
    if context.axis_name is not None:
        sums = jax.lax.psum(sums, context.axis_name)
    tokens = jnp.maximum(sums["tokens"], 1.0)
    load = sums["picks"] / (tokens * top_k)
    return {
        "load": load,
        "entropy": sums["entropy"] / tokens,
        "balance_loss": num_experts * jnp.sum(load * sums["probs"] / tokens),
        "z_loss": sums["z"] / tokens,
    }


def _one_hot(choices: Array, num_experts: int) -> Array:
    return jax.nn.one_hot(choices, num_experts, dtype=jnp.float32)

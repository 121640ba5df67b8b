"""Load, entropy and balance losses of one router."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uoe_jax.model.context import Context

# Arrays by name; "state" holds what decoding remembers, by name again.
Stats = dict[str, Any]


def router_stats(
    scores: Float[Array, "B T E"],
    decision: Float[Array, "B T E"],
    picks: Int[Array, "B T X"],
    context: Context,
    kept: Bool[Array, "B T X"] | None = None,
) -> Stats:
    """Return load, entropy, drop rate and the two losses over all tokens but padding.

    load [E]: fraction of picks, sums to 1. balance_loss: `E * sum_e load_e * prob_e`,
    1 when balanced (Fedus et al. 2021, Switch Transformer, eq. 4). z_loss: mean squared
    log-partition of the scores (Zoph et al. 2022, ST-MoE, eq. 5). entropy: of the
    router's softmax, nats. dropped: fraction of picks that are not `kept`. With an
    `axis_name` the sums run over that mesh axis too.
    """
    num_experts = scores.shape[-1]
    log_probs = jax.nn.log_softmax(decision, axis=-1)
    probs = jnp.exp(log_probs)
    one_hot = jax.nn.one_hot(picks, num_experts, dtype=jnp.float32)
    counts = jnp.sum(one_hot, axis=-2)
    lost = jnp.zeros(picks.shape[:2])
    if kept is not None:
        lost = jnp.sum(~kept, axis=-1).astype(jnp.float32)
    sums = {
        "picks": counts,
        "probs": probs,
        "z": jnp.square(jax.nn.logsumexp(scores, axis=-1)),
        "entropy": -jnp.sum(probs * log_probs, axis=-1),
        "dropped": lost,
    }
    means = token_means(sums, context)
    load = means["picks"] / jnp.maximum(jnp.sum(means["picks"]), 1e-9)
    return {
        "load": load,
        "entropy": means["entropy"],
        "dropped": means["dropped"] / picks.shape[-1],
        "balance_loss": num_experts * jnp.sum(load * means["probs"]),
        "z_loss": means["z"],
    }


def token_means(values: dict[str, Array], context: Context) -> dict[str, Array]:
    """Return means over the tokens [B, T, ...] that aren't padding."""
    first = next(iter(values.values()))
    if context.segments is None:
        valid = jnp.ones(first.shape[:2], jnp.float32)
    else:
        valid = (context.segments != 0).astype(jnp.float32)

    def total(value: Array) -> Array:
        weight = valid.reshape(*valid.shape, *[1] * (value.ndim - 2))
        return jnp.sum(value * weight, axis=(0, 1))

    sums = {name: total(value) for name, value in values.items()}
    count = jnp.sum(valid)
    if context.axis_name is not None:
        sums, count = jax.lax.psum((sums, count), context.axis_name)
    count = jnp.maximum(count, 1.0)
    return {name: value / count for name, value in sums.items()}

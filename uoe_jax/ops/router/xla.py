"""A router of tokens in plain JAX: its scores, picks, and what is counted of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.ops.split_matmul import split_matmul


def router_scores(
    x: Float[Array, "*N D"], weight: Float[Array, "D E"]
) -> Float[Array, "*N E"]:
    """Return products in float32 or wider."""
    if (x.dtype, weight.dtype) == (jnp.bfloat16, jnp.float32):
        return split_matmul(x, weight)
    x = x.astype(accumulator_dtype(x.dtype))
    return jnp.dot(x, weight, precision=jax.lax.Precision.HIGHEST)


def pick_scores(
    scores: Float[Array, "*N E"], choices: Int[Array, "*N X"]
) -> Float[Array, "*N X"]:
    """Return the scores of the chosen experts; its gradient needs no scatter."""
    one_hot = jax.nn.one_hot(choices, scores.shape[-1], dtype=jnp.float32)
    return jnp.sum(one_hot * scores[..., None, :], axis=-1)


def token_statistics(
    scores: Float[Array, "*N E"],
    decision: Float[Array, "*N E"],
    picks: Int[Array, "*N X"],
    on: Bool[Array, "*N X"] | None = None,
) -> dict[str, Array]:
    """Return what is summed over tokens: picks and probs [*N, E], z and entropy [*N].

    picks: 1 for each expert picked. probs: softmax of the scores decided by. z: squared
    log-partition of the scores. entropy: of the softmax, nats. Of picks that are not
    `on` nothing is counted.
    """
    log_probs = jax.nn.log_softmax(decision, axis=-1)
    probs = jnp.exp(log_probs)
    one_hot = jax.nn.one_hot(picks, scores.shape[-1], dtype=jnp.float32)
    if on is not None:
        one_hot = one_hot * on[..., None]
    return {
        "picks": jnp.sum(one_hot, axis=-2),
        "probs": probs,
        "z": jnp.square(jax.nn.logsumexp(scores, axis=-1)),
        "entropy": -jnp.sum(probs * log_probs, axis=-1),
    }


def pick_experts(
    x: Float[Array, "N D"],
    weight: Float[Array, "D E"],
    bias: Float[Array, " E"],
    counted: Float[Array, " N"] | None,
    *,
    top_k: int,
) -> tuple[Array, ...]:
    """Return the fields of a `Picked` by plain JAX."""
    scores = router_scores(x, weight)
    key = jax.lax.stop_gradient(scores + bias[None])
    picks = jax.lax.top_k(key, top_k)[1]
    sums = {}
    for name, value in token_statistics(scores, scores, picks).items():
        if counted is not None:
            value = value * (counted[:, None] if value.ndim == 2 else counted)
        sums[name] = jnp.sum(value, axis=0)
    return picks, pick_scores(scores, picks), *sums.values()

"""Norm, scores, picks and gates of single tokens in plain JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.ops.split_matmul import split_matmul
from uoe_jax.ops.token_products.xla import rms_norm


def route(x: Float[Array, "B D"], norm: Any, router: Any) -> tuple[Array, ...]:
    """Return norm(x), the picked experts, their gates, and the gates of all experts."""
    x = rms_norm(x, norm.scale, norm.eps)
    if (x.dtype, router.weight.dtype) == (jnp.bfloat16, jnp.float32):
        scores = split_matmul(x, router.weight)
    else:
        wide = x.astype(accumulator_dtype(x.dtype))
        scores = jnp.dot(wide, router.weight, precision=jax.lax.Precision.HIGHEST)
    key = jax.nn.sigmoid(scores) if router.sigmoid_bias else scores
    picks = jax.lax.top_k(key + router.bias[None], router.top_k)[1]
    chosen = jnp.take_along_axis(scores, picks, axis=1)
    gates = _gates(scores, chosen, picks, router.rule)
    batch, experts = scores.shape
    shared = jnp.arange(router.shared, dtype=picks.dtype)
    always = jnp.broadcast_to(shared[None], (batch, router.shared))
    ones = jnp.ones(always.shape, gates.dtype)
    picks = jnp.concatenate([always, picks + router.shared], axis=1)
    gates = jnp.concatenate([ones, gates], axis=1)
    return x, picks, gates, gate_table(picks, gates, router.shared + experts)


def gate_table(picks: Array, gates: Array, experts: int) -> Array:
    """Return the gates of all experts, 0 of those that weren't picked."""
    one_hot = jax.nn.one_hot(picks, experts, dtype=gates.dtype)
    return jnp.sum(one_hot * gates[..., None], axis=1)


def _gates(scores: Array, chosen: Array, picks: Array, rule: str) -> Array:
    count = picks.shape[1]
    if rule == "one":
        return jnp.ones(chosen.shape, chosen.dtype)
    if rule == "sigmoid":
        return 2.0 * jax.nn.sigmoid(chosen)
    if rule == "affinity":
        affinity = jax.nn.sigmoid(chosen)
        return affinity / (jnp.sum(affinity, axis=-1, keepdims=True) + 1e-20)
    if rule == "softmax_all":
        return jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), picks, axis=1)
    share = jax.nn.softmax(chosen, axis=-1)
    return share * count if rule == "scaled_softmax" else share

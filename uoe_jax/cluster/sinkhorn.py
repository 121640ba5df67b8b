"""Scores to a doubly stochastic matrix: rows and columns that all sum to 1."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HALF_STEPS = 15


@functools.partial(jax.jit, static_argnames=("eta", "half_steps"))
def sinkhorn(
    scores: Float[Array, "N N"], eta: float, half_steps: int = HALF_STEPS
) -> Float[Array, "N N"]:
    """Return the doubly stochastic matrix nearest to symmetric scores / eta in entropy.

    Sinkhorn's algorithm (Cuturi 2013) on logarithms, in its symmetric form: one scale
    for rows and columns alike, each half-step halfway to what would make the rows sum
    to 1 (Knight, Ruiz and Ucar 2014). By turns, rows and columns take hundreds of
    half-steps where this takes eleven. Rows are normalised once more at the end.

    A low temperature `eta` joins few points, a high one all: then every entry is 1/N.
    As N entries share a row, more points want a lower eta for rows as sharp.
    """
    logs = scores / eta

    # A loop, not its turns one after another: compiled once, and its gradient keeps
    # each turn's scale alone, not N x N numbers.
    @jax.checkpoint
    def half_step(scale: Array, _: None) -> tuple[Array, None]:
        rows = jax.nn.logsumexp(logs + scale.T, axis=1, keepdims=True)
        return 0.5 * (scale - rows), None

    start = jnp.zeros((len(scores), 1), logs.dtype)
    scale = jax.lax.scan(half_step, start, length=half_steps)[0]
    logs = logs + scale + scale.T
    return jnp.exp(logs - jax.nn.logsumexp(logs, axis=1, keepdims=True))

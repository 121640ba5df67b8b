"""Scores to a doubly stochastic matrix: rows and columns that all sum to 1."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HALF_STEPS = 15
ROWS = 256  # of the scores, at a time


class Scales(NamedTuple):
    """What makes exp(logs) doubly stochastic: exp(logs_ab + columns_b - rows_a)."""

    columns: Float[Array, " N"]
    rows: Float[Array, " N"]


def find_scales(
    logs_of: Callable[[Any], Float[Array, " N"]],
    items: Any,
    half_steps: int = HALF_STEPS,
) -> Scales:
    """Return the scales of a symmetric matrix whose rows are `logs_of` each item.

    Sinkhorn's algorithm (Cuturi 2013) on logarithms, in its symmetric form: one scale
    for rows and columns alike, each half-step halfway to what would make the rows sum
    to 1 (Knight, Ruiz and Ucar 2014). By turns, rows and columns take hundreds of
    half-steps where this takes eleven. Rows are normalised once more at the end.

    A few rows are there at a time, and are made again for the gradient: what it keeps
    is each half-step's scale.
    """
    count = len(jax.tree.leaves(items)[0])

    def row_sums(scale: Array) -> Array:
        one = lambda item: jax.nn.logsumexp(logs_of(item) + scale)
        return jax.lax.map(jax.checkpoint(one), items, batch_size=min(ROWS, count))

    # A loop, not its turns one after another: compiled once.
    @jax.checkpoint
    def half_step(scale: Array, _: None) -> tuple[Array, None]:
        return 0.5 * (scale - row_sums(scale)), None

    kind = jax.eval_shape(logs_of, jax.tree.map(lambda leaf: leaf[0], items)).dtype
    scale = jax.lax.scan(half_step, jnp.zeros(count, kind), length=half_steps)[0]
    return Scales(scale, row_sums(scale))


@functools.partial(jax.jit, static_argnames=("eta", "half_steps"))
def sinkhorn(
    scores: Float[Array, "N N"], eta: float, half_steps: int = HALF_STEPS
) -> Float[Array, "N N"]:
    """Return the doubly stochastic matrix nearest to symmetric scores / eta in entropy.

    A low temperature `eta` joins few points, a high one all: then every entry is 1/N.
    As N entries share a row, more points want a lower eta for rows as sharp.
    """
    logs = scores / eta
    columns, rows = find_scales(lambda row: row, logs, half_steps)
    return jnp.exp(logs + columns[None] - rows[:, None])

"""The running level of a run's loss, and which losses jump out of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from uoe_jax.runs.state import LossLevel

WINDOW = 100  # accepted losses that the running mean and deviation are about of
WARMUP = 20  # losses that are accepted before any can jump
PERSISTENT = 10  # jumps in a row that are left out; the next is the new level
# Of the mean, the least deviation: a loss that stands still has none.
_LEAST_DEVIATION = 1e-3


def loss_limit(level: LossLevel, factor: float) -> Float[Array, ""]:
    """Return the loss above which a step is left out; infinite in the warm-up."""
    least = _LEAST_DEVIATION * jnp.abs(level.mean)
    deviation = jnp.maximum(jnp.sqrt(level.variance), least)
    limit = level.mean + factor * deviation
    return jnp.where(level.accepted < WARMUP, jnp.inf, limit)


def follow_loss(
    level: LossLevel, loss: Float[Array, ""], usable: Bool[Array, ""], factor: float
) -> tuple[LossLevel, Bool[Array, ""]]:
    """Return the level after a step's loss, and whether that loss jumped.

    A loss that jumps, or isn't `usable`, doesn't move the level. One that follows
    `PERSISTENT` jumps in a row is accepted, and the level begins anew with it.
    """
    above = usable & (loss > loss_limit(level, factor))
    anew = above & (level.jumps >= PERSISTENT)
    jumped = above & ~anew
    accepted = jnp.where(anew, 0, level.accepted)
    # A plain mean at first, so that the first losses don't weigh more than others.
    rate = jnp.maximum(1 / (accepted + 1), 1 / WINDOW).astype(jnp.float32)
    distance = loss - level.mean
    grown = (1 - rate) * (level.variance + rate * jnp.square(distance))
    after = LossLevel(
        mean=jnp.where(accepted == 0, loss, level.mean + rate * distance),
        variance=jnp.where(accepted == 0, 0.0, grown),
        # Beyond the window the number says no more, and it must not overflow.
        accepted=jnp.minimum(accepted + 1, WINDOW),
        jumps=jnp.zeros_like(level.jumps),
    )
    still = LossLevel(
        mean=level.mean,
        variance=level.variance,
        accepted=level.accepted,
        jumps=level.jumps + jumped,
    )
    moves = usable & ~jumped
    chosen = jax.tree.map(lambda new, old: jnp.where(moves, new, old), after, still)
    return chosen, jumped

"""Conjugate gradients for many small systems at once, with implicit derivatives."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Matvec = Callable[[Array], Array]


def conjugate_gradient(
    matvec: Matvec,
    rhs: Float[Array, "C R"],
    precondition: Matvec,
    target: Float[Array, " C"],
    max_steps: int,
) -> tuple[Float[Array, "C R"], Int[Array, " C"]]:
    """Solve each problem from zero until rhs' preconditioned square is `target`.

    Returns the solutions and the steps of each. A finished or broken-down problem
    is frozen, so nothing is ever divided by zero.
    """

    def dot(x: Array, y: Array) -> Array:
        return jnp.sum(x * y, axis=-1)

    def unfinished(state: tuple) -> Array:
        step, _, _, _, gamma, _ = state
        return (step < max_steps) & jnp.any(gamma > target)

    def advance(state: tuple) -> tuple:
        step, x, residual, direction, gamma, count = state
        image = matvec(direction)
        curvature = dot(direction, image)
        active = (gamma > target) & (curvature > 0)
        alpha = jnp.where(active, gamma / jnp.where(active, curvature, 1), 0)[:, None]
        x = x + alpha * direction
        residual = residual - alpha * image
        z = precondition(residual)
        new = jnp.where(active, dot(residual, z), 0)
        beta = jnp.where(active, new / jnp.where(active, gamma, 1), 0)[:, None]
        direction = jnp.where(active[:, None], z + beta * direction, 0)
        # A broken-down problem counts as finished: its gamma is set to zero.
        return step + 1, x, residual, direction, new, count + active

    z = precondition(rhs)
    gamma = dot(rhs, z)
    count = (0 * gamma).astype(jnp.int32)
    state = (0, 0 * rhs, rhs, z, gamma, count)
    _, x, _, _, _, count = jax.lax.while_loop(unfinished, advance, state)
    return x, count


def implicit_solve(
    matvec: Matvec, rhs: Float[Array, "C R"], solve: Callable
) -> tuple[Float[Array, "C R"], Int[Array, " C"]]:
    """Return `solve(rhs, None)` with derivatives of `matvec(x) = rhs`.

    In reverse mode `solve(y, y)` is asked for: accurate relative to the cotangent,
    whose scale has nothing to do with that of the right-hand side.
    """
    return jax.lax.custom_linear_solve(
        matvec,
        rhs,
        lambda _, y: solve(y, None),
        lambda _, y: solve(y, y),
        symmetric=True,
        has_aux=True,
    )

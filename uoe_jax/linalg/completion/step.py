"""Half-steps, sweeps and whole runs of alternating minimisation; pure functions.

Algorithm of Gu, Song, Yin and Zhang (arXiv 2302.11068): each half-step solves the
least-squares problems of one factor inexactly, over an orthonormal basis of the other.
With a ridge the factors keep their scale instead (the penalty depends on it), rotated
so that the fixed one has orthogonal columns; both changes leave the product alone.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from uoe_jax.linalg.completion.half import Fixed, Hyper, Stats
from uoe_jax.linalg.completion.layout import Problem, Side
from uoe_jax.linalg.completion.sides import solve_side
from uoe_jax.linalg.completion.solver import Solver
from uoe_jax.linalg.lowrank import matmul, orthonormalise, principal_axes


class State(NamedTuple):
    """Factors and biases; the model is offset + row_bias + col_bias + u v^T."""

    u: Float[Array, "M R"]
    v: Float[Array, "N R"]
    row_bias: Float[Array, " M"]
    col_bias: Float[Array, " N"]


def gauge(
    fixed: Float[Array, "M R"], other: Float[Array, "N R"], regularised: bool
) -> tuple[Float[Array, "M R"], Float[Array, "N R"], Float[Array, " R"]]:
    """Return the pair with the same product and a well-conditioned fixed factor."""
    if regularised:
        axes, energy = principal_axes(fixed)
        return matmul(fixed, axes), matmul(other, axes), energy / fixed.shape[0]
    q, r = orthonormalise(fixed)
    return q, matmul(other, r.T), jnp.full(r.shape[0], 1 / fixed.shape[0], q.dtype)


def half_step(
    side: Side,
    fixed: Float[Array, "M R"],
    fixed_bias: Float[Array, " M"],
    start: Float[Array, "N R"],
    start_bias: Float[Array, " N"],
    hyper: Hyper,
    key: Key[Array, ""],
    *,
    solver: Solver,
    regularised: bool,
    biases: bool,
    axis_name: str | None = None,
) -> tuple[tuple[Array, Array, Array], Stats]:
    """Solve for one factor (and its bias) with the other held.

    Returns (fixed factor in its new basis, new factor, new bias) and statistics.
    """
    fixed, start, scale = gauge(fixed, start, regularised)
    design = fixed
    if biases:
        ones = jnp.ones((fixed.shape[0], 1), fixed.dtype)
        design = jnp.concatenate([fixed, ones], axis=1)
        start = jnp.concatenate([start, start_bias[:, None]], axis=1)
        scale = jnp.concatenate([scale, jnp.ones(1, scale.dtype)])
    held = Fixed(design, fixed_bias, scale)
    new, stats = solve_side(
        side,
        held,
        start,
        hyper,
        key,
        solver=solver,
        biases=biases,
        axis_name=axis_name,
    )
    if biases:
        return (fixed, new[:, :-1], new[:, -1]), stats
    return (fixed, new, jnp.zeros_like(start_bias)), stats


def sweep(
    problem: Problem,
    state: State,
    hyper: Hyper,
    key: Key[Array, ""],
    *,
    solver: Solver,
    regularised: bool,
    biases: bool,
    axis_name: str | None = None,
) -> tuple[State, tuple[Stats, Stats]]:
    """Update v, then u. Stats of both half-steps; each loss is the one before it."""
    half = partial(
        half_step,
        hyper=hyper,
        key=key,
        solver=solver,
        regularised=regularised,
        biases=biases,
        axis_name=axis_name,
    )
    u, v, row_bias, col_bias = state
    (u, v, col_bias), first = half(problem.cols, u, row_bias, v, col_bias)
    (v, u, row_bias), second = half(problem.rows, v, col_bias, u, row_bias)
    return State(u, v, row_bias, col_bias), (first, second)


def alternate(
    problem: Problem,
    state: State,
    hyper: Hyper,
    key: Key[Array, ""],
    num_sweeps: int,
    *,
    solver: Solver,
    regularised: bool,
    biases: bool,
    axis_name: str | None = None,
) -> tuple[State, Float[Array, " T"]]:
    """Run a fixed number of sweeps; return the state and the loss before each.

    Differentiable in the problem's values and weights, the start and `hyper`:
    every half-step by the implicit derivative of its linear systems, the sweeps
    unrolled by `lax.scan`. Only the product of the factors has a meaningful
    derivative, the factors themselves are free up to a change of basis.
    """

    def body(state: State, key: Array) -> tuple[State, Array]:
        state, (first, _) = sweep(
            problem,
            state,
            hyper,
            key,
            solver=solver,
            regularised=regularised,
            biases=biases,
            axis_name=axis_name,
        )
        return state, first.loss

    return jax.lax.scan(body, state, jax.random.split(key, num_sweeps))

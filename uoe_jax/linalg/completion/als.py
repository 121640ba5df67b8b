"""Alternating least squares: half-steps, sweeps and whole runs; on a device or a mesh.

Algorithm of Gu, Song, Yin and Zhang (arXiv 2302.11068): each half-step solves the
least-squares problems of one factor inexactly, over an orthonormal basis of the other.
With a ridge the factors keep their scale instead (the penalty depends on it), rotated
so that the fixed one has orthogonal columns; both changes leave the product alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from uoe_jax.linalg.completion.least_squares import Equations, solve_batch
from uoe_jax.linalg.completion.method import (
    AXIS,
    FixedFactor,
    Method,
    Penalties,
    Solver,
    Stats,
    gather,
    ridge_of,
    summed,
)
from uoe_jax.linalg.completion.problem import Block, Problem, Run, Side, State
from uoe_jax.linalg.completion.segments import solve_run
from uoe_jax.linalg.completion.spectral import Start, spectral_start
from uoe_jax.linalg.lowrank import matmul, orthonormalise, principal_axes


def sweep(
    problem: Problem,
    state: State,
    penalties: Penalties,
    key: Key[Array, ""],
    method: Method,
) -> tuple[State, tuple[Stats, Stats]]:
    """Update v, then u. Stats of both half-steps; each loss is the one before it."""
    update = partial(update_factor, penalties=penalties, key=key, method=method)
    rows, cols = Factor(state.u, state.row_bias), Factor(state.v, state.col_bias)
    rows, cols, first = update(problem.cols, rows, cols)
    cols, rows, second = update(problem.rows, cols, rows)
    state = State(rows.vectors, cols.vectors, rows.bias, cols.bias)
    return state, (first, second)


def alternate(
    problem: Problem,
    state: State,
    penalties: Penalties,
    key: Key[Array, ""],
    num_sweeps: int,
    method: Method,
) -> tuple[State, Float[Array, " T"]]:
    """Run a fixed number of sweeps; return the state and the loss before each.

    Differentiable in the problem's values and weights, the start and the penalties:
    every half-step by the implicit derivative of its linear systems, the sweeps
    unrolled by `lax.scan`. Only the product of the factors has a meaningful
    derivative, the factors themselves are free up to a change of basis.
    """

    def body(state: State, key: Array) -> tuple[State, Array]:
        state, (first, _) = sweep(problem, state, penalties, key, method)
        return state, first.loss

    return jax.lax.scan(body, state, jax.random.split(key, num_sweeps))


class Factor(NamedTuple):
    """One side's vectors and biases."""

    vectors: Float[Array, "N R"]
    bias: Float[Array, " N"]


def update_factor(
    side: Side,
    held: Factor,
    start: Factor,
    penalties: Penalties,
    key: Key[Array, ""],
    method: Method,
) -> tuple[Factor, Factor, Stats]:
    """Solve for one factor (and its bias) with the other held: a half-step.

    Returns the held factor in its new basis, the new factor, and statistics.
    """
    vectors, guess, scale = gauge(held.vectors, start.vectors, method.regularised)
    design = vectors
    if method.biases:  # a bias is the coefficient of a column of ones
        ones = jnp.ones((vectors.shape[0], 1), vectors.dtype)
        design = jnp.concatenate([vectors, ones], axis=1)
        guess = jnp.concatenate([guess, start.bias[:, None]], axis=1)
        scale = jnp.concatenate([scale, jnp.ones(1, scale.dtype)])
    fixed = FixedFactor(design, held.bias, scale)
    new, stats = solve_factor(side, fixed, guess, penalties, key, method)
    held = Factor(vectors, held.bias)
    if method.biases:
        return held, Factor(new[:, :-1], new[:, -1]), stats
    return held, Factor(new, jnp.zeros_like(start.bias)), stats


def gauge(
    fixed: Float[Array, "M R"], other: Float[Array, "N R"], regularised: bool
) -> tuple[Float[Array, "M R"], Float[Array, "N R"], Float[Array, " R"]]:
    """Return the pair with the same product and a well-conditioned fixed factor."""
    if regularised:
        axes, energy = principal_axes(fixed)
        return matmul(fixed, axes), matmul(other, axes), energy / fixed.shape[0]
    q, r = orthonormalise(fixed)
    # Squares of a column of q add up to 1, so they are 1 / M on average.
    return q, matmul(other, r.T), jnp.full(r.shape[0], 1 / fixed.shape[0], q.dtype)


def solve_factor(
    side: Side,
    fixed: FixedFactor,
    start: Float[Array, "N R"],
    penalties: Penalties,
    key: Key[Array, ""],
    method: Method,
) -> tuple[Float[Array, "N R"], Stats]:
    """Improve a side's unknowns (the last one is the bias, if any) from `start`."""
    if isinstance(side.blocks, Run):
        return solve_run(side.blocks, side.degree, fixed, start, penalties, method)
    num_unknown = start.shape[0]

    def one_chunk(block: Block) -> tuple[Array, ...]:
        ids, index, values, weights = block
        a, b = gather(fixed.design, index), values - gather(fixed.shift, index)
        if weights is not None:  # by their roots: a^T a squares them
            root = jnp.sqrt(weights)
            a, b = a * root[..., None], b * root
        known = gather(side.degree, ids)
        ridge = ridge_of(penalties, known, start.shape[1], method)
        equations = Equations(a, b, ridge, known[:, None] * fixed.scale[None, :])
        guess = gather(start, ids)
        x, loss, steps = solve_batch(
            equations, guess, method.solver, penalties.tol, key
        )
        entries = steps * jnp.sum(index < fixed.design.shape[0], axis=1)
        real = steps * (ids < num_unknown)
        return x, loss.sum(), steps.max(), entries.sum() * 1.0, real.sum() * 1.0

    solution = jnp.zeros_like(start)
    totals = []
    for block in side.blocks:
        # One after the other: the gathered rows of one chunk are in memory at a time.
        x, *stats = jax.lax.map(one_chunk, block)
        ids = block.ids.reshape(-1)  # of padding one past the end, and dropped
        solution = solution.at[ids].set(x.reshape(ids.size, -1), mode="drop")
        totals.append(stats)
    # Devices hold disjoint unknowns, so summing gathers them.
    return summed(solution, method.axis_name), _total(totals, method, start.dtype)


def _total(totals: list[list[Array]], method: Method, dtype: Any) -> Stats:
    """Return the statistics of all blocks on all devices."""
    loss, slowest, entry_steps, unknown_steps = (
        [t[i] for t in totals] for i in range(4)
    )
    axis_name = method.axis_name
    most = jnp.max(jnp.stack([s.max() for s in slowest]))
    if axis_name is not None:
        most = jax.lax.pmax(most, axis_name)
    loss, entry_steps, unknown_steps = (
        summed(jnp.stack([x.sum() for x in part]).sum(), axis_name).astype(dtype)
        for part in (loss, entry_steps, unknown_steps)
    )
    return Stats(loss, most, entry_steps, unknown_steps)


# Compiled, on one device or over a mesh.


def start_state(
    problem: Problem, key: Key[Array, ""], method: Method, start: Start
) -> tuple[State, Array]:
    """Return the spectral start and the singular values behind it."""
    method = dataclasses.replace(method, solver=Solver())  # which plays no part here
    return _compiled_start(method, start)(problem, key)


def run_sweep(
    problem: Problem,
    state: State,
    penalties: Penalties,
    key: Key[Array, ""],
    method: Method,
) -> tuple[State, tuple[Stats, Stats]]:
    """Run one compiled sweep."""
    return _compiled_sweep(method)(problem, state, penalties, key)


@functools.cache
def _compiled_start(method: Method, start: Start) -> Any:
    run = partial(spectral_start, method=method, start=start)
    return _over(method.mesh, run, 1)


@functools.cache
def _compiled_sweep(method: Method) -> Any:
    """Return the jitted sweep; over a mesh, entries are split and factors are not."""
    return _over(method.mesh, partial(sweep, method=method), 3)


def _over(mesh: Mesh | None, run: Callable, num_others: int) -> Any:
    if mesh is None:
        return jax.jit(run)
    split: Any = PartitionSpec(AXIS)  # specs stand where a problem has arrays
    whole: Any = PartitionSpec()
    side = Side(split, whole)
    specs = (Problem(side, side, whole), *[whole] * num_others)
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=whole))


def place(problem: Problem, mesh: Mesh | None) -> Problem:
    """Put a problem's equations over the mesh's data axis, the rest everywhere."""
    if mesh is None:
        return problem
    split = NamedSharding(mesh, PartitionSpec(AXIS))
    whole = NamedSharding(mesh, PartitionSpec())

    def put(side: Side) -> Side:
        return Side(
            jax.device_put(side.blocks, split), jax.device_put(side.degree, whole)
        )

    return Problem(
        put(problem.rows), put(problem.cols), jax.device_put(problem.offset, whole)
    )

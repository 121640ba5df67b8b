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
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from uoe_jax.linalg.completion.least_squares import Equations, solve_batch
from uoe_jax.linalg.completion.method import (
    Fixed,
    Hyper,
    Method,
    Solver,
    Stats,
    gather,
    ridge_of,
    summed,
)
from uoe_jax.linalg.completion.problem import Block, Problem, Run, Side, State
from uoe_jax.linalg.completion.segments import solve_run
from uoe_jax.linalg.completion.spectral import spectral_start
from uoe_jax.linalg.lowrank import matmul, orthonormalise, principal_axes


def _solve_blocks(
    blocks: tuple[Block, ...],
    degree: Array,
    fixed: Fixed,
    start: Array,
    hyper: Hyper,
    solver: Solver,
    biases: bool,
    key: Key[Array, ""],
    axis_name: str | None,
) -> tuple[Array, Stats]:
    num_unknown = start.shape[0]
    rank = start.shape[1] - biases

    def one_chunk(block: Block) -> tuple[Array, ...]:
        ids, index, values, weights = block
        a, b = gather(fixed.design, index), values - gather(fixed.shift, index)
        if weights is not None:
            root = jnp.sqrt(weights)
            a, b = a * root[..., None], b * root
        known = gather(degree, ids)
        ridge = ridge_of(hyper, known, rank, biases)
        equations = Equations(a, b, ridge, known[:, None] * fixed.scale[None, :])
        guess = gather(start, ids)
        x, loss, steps = solve_batch(equations, guess, solver, hyper.tol, key)
        entries = steps * jnp.sum(index < fixed.design.shape[0], axis=1)
        real = steps * (ids < num_unknown)
        return x, loss.sum(), steps.max(), entries.sum() * 1.0, real.sum() * 1.0

    solution = jnp.zeros_like(start)
    totals = []
    for block in blocks:
        x, *stats = jax.lax.map(one_chunk, block)
        ids = block.ids.reshape(-1)
        solution = solution.at[ids].set(x.reshape(ids.size, -1), mode="drop")
        totals.append(stats)
    loss, slowest, entry_steps, unknown_steps = (
        [t[i] for t in totals] for i in range(4)
    )
    # Devices hold disjoint unknowns, so summing gathers them.
    solution = summed(solution, axis_name)
    most = jnp.max(jnp.stack([s.max() for s in slowest]))
    if axis_name is not None:
        most = jax.lax.pmax(most, axis_name)
    loss, entry_steps, unknown_steps = (
        summed(jnp.stack([x.sum() for x in part]).sum(), axis_name).astype(start.dtype)
        for part in (loss, entry_steps, unknown_steps)
    )
    return solution, Stats(loss, most, entry_steps, unknown_steps)


def solve_side(
    side: Side,
    fixed: Fixed,
    start: Float[Array, "N R"],
    hyper: Hyper,
    key: Key[Array, ""],
    *,
    solver: Solver,
    biases: bool,
    axis_name: str | None = None,
) -> tuple[Float[Array, "N R"], Stats]:
    """Improve a side's unknowns (the last one is the bias, if any) from `start`."""
    args = (side.degree, fixed, start, hyper, solver, biases)
    if isinstance(side.blocks, Run):
        return solve_run(side.blocks, *args, axis_name)
    return _solve_blocks(side.blocks, *args, key, axis_name)


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


AXIS = "data"


@functools.cache
def compiled_start(
    method: Method, mesh: Mesh | None, rank: int, clip_mu: float, passes: int
) -> Any:
    """Return the jitted spectral start; over a mesh, entries are split."""
    run = partial(
        spectral_start,
        rank=rank,
        clip_mu=clip_mu,
        passes=passes,
        regularised=method.regularised,
        biases=method.biases,
        axis_name=None if mesh is None else AXIS,
    )
    return _over(mesh, run, 1)


@functools.cache
def compiled_sweep(method: Method, mesh: Mesh | None) -> Any:
    """Return the jitted sweep; over a mesh, entries are split and factors are not."""
    run = partial(
        sweep,
        solver=method.solver,
        regularised=method.regularised,
        biases=method.biases,
        axis_name=None if mesh is None else AXIS,
    )
    return _over(mesh, run, 3)


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


def start_state(
    problem: Problem,
    key: Key[Array, ""],
    method: Method,
    mesh: Mesh | None,
    *,
    rank: int,
    clip_mu: float,
    passes: int,
) -> tuple[State, Array]:
    """Return the spectral start and the singular values behind it."""
    method = dataclasses.replace(method, solver=Solver())  # which plays no part here
    return compiled_start(method, mesh, rank, clip_mu, passes)(problem, key)


def run_sweep(
    problem: Problem,
    state: State,
    hyper: Hyper,
    key: Key[Array, ""],
    method: Method,
    mesh: Mesh | None = None,
) -> tuple[State, tuple[Stats, Stats]]:
    """Run one compiled sweep."""
    return compiled_sweep(method, mesh)(problem, state, hyper, key)

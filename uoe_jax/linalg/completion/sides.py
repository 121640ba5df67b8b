"""One side's least-squares problems: over degree buckets, or one sorted run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from uoe_jax.linalg.completion.half import (
    Fixed,
    Hyper,
    Stats,
    gather,
    ridge_of,
    summed,
)
from uoe_jax.linalg.completion.layout import Block, Run, Side
from uoe_jax.linalg.completion.segments import solve_run
from uoe_jax.linalg.completion.solve import Equations, solve_batch
from uoe_jax.linalg.completion.solver import Solver


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

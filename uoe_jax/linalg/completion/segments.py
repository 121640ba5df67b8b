"""One side's problems as one sorted run: CG for all unknowns by segment sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from uoe_jax.linalg.completion.least_squares import conjugate_gradient, implicit_solve
from uoe_jax.linalg.completion.method import (
    FixedFactor,
    Method,
    Penalties,
    Stats,
    gather,
    ridge_of,
    summed,
)
from uoe_jax.linalg.completion.problem import Run


def solve_run(
    run: Run,
    degree: Array,
    fixed: FixedFactor,
    start: Array,
    penalties: Penalties,
    method: Method,
) -> tuple[Array, Stats]:
    """CG for all unknowns at once by sorted segment sums; 4 X R FLOPs a step."""
    axis_name = method.axis_name
    unknown, index, values, weights = run.flat()
    num_unknown = start.shape[0]
    root = None if weights is None else jnp.sqrt(weights)
    a = gather(fixed.design, index)
    b = values - gather(fixed.shift, index) * (index < fixed.design.shape[0])
    if root is not None:
        a, b = a * root[:, None], b * root
    ridge = ridge_of(penalties, degree, start.shape[1], method)

    def transpose_times(a: Array, r: Array) -> Array:
        total = jax.ops.segment_sum(
            r[:, None] * a, unknown, num_unknown, indices_are_sorted=True
        )
        return summed(total, axis_name)

    def times(a: Array, x: Array) -> Array:
        return jnp.sum(a * gather(x, unknown), axis=1)

    # Every unknown's CG in one loop: it ends with the slowest (those that are done are
    # frozen), but none is padded to the entries of another.
    residual = b - times(a, start)
    rhs = transpose_times(a, residual) - ridge * start
    frozen, frozen_b, frozen_ridge = jax.lax.stop_gradient((a, b, ridge))
    scale = jax.lax.stop_gradient(degree[:, None] * fixed.scale[None, :])
    diagonal = jnp.where(scale + frozen_ridge > 0, scale + frozen_ridge, 1)
    whole = transpose_times(frozen, frozen_b)

    def solve(g: Array, reference: Array | None) -> tuple[Array, Array]:
        size = whole if reference is None else reference
        target = penalties.tol**2 * jnp.sum(size * size / diagonal, axis=1)
        return conjugate_gradient(
            lambda x: transpose_times(frozen, times(frozen, x)) + frozen_ridge * x,
            g,
            lambda g: g / diagonal,
            target,
            method.solver.max_steps,
        )

    if axis_name is None:
        x, steps = implicit_solve(
            lambda x: transpose_times(a, times(a, x)) + ridge * x, rhs, solve
        )
    else:  # jax's linear solve can't mix split entries with whole unknowns
        x, steps = solve(rhs, None)
    entries = jax.ops.segment_sum(jnp.ones_like(values), unknown, num_unknown)
    entries = summed(entries * 1.0, axis_name)
    # An unknown without entries keeps nothing of its start.
    known = (degree > 0)[:, None]
    stats = Stats(
        summed(jnp.sum(residual * residual), axis_name),
        steps.max(),
        jnp.sum(steps * entries),
        jnp.sum(steps * 1.0).astype(start.dtype),
    )
    return jnp.where(known, start + x, 0), stats

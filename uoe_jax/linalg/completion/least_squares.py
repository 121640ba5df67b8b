"""Many small regularised least-squares problems at once: exact, CG or sketched.

Each solver improves a start: it solves for the correction that the start's residual
asks for. So a problem with fewer equations than unknowns moves as little as it can, a
rounded Gram matrix costs convergence speed and not accuracy, and a good start is cheap.
Derivatives are implicit (of the normal equations), whatever the solver.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from uoe_jax.linalg.completion.method import Solver
from uoe_jax.linalg.sketch import sketch_rows

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
        # Of a singular problem rounding can leave a direction no curvature, or less.
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
    # Times 0, not new zeros: the loop's state must vary over the mesh axes rhs does.
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


class Equations(NamedTuple):
    """A batch of problems min ||a x - b||^2 + ridge . x^2, rows already weighted."""

    a: Float[Array, "C S R"]
    b: Float[Array, "C S"]
    ridge: Float[Array, "C R"]
    scale: Float[Array, "C R"]  # expected diagonal of a^T a


def times(a: Float[Array, "C S R"], x: Float[Array, "C R"]) -> Float[Array, "C S"]:
    """Return a @ x of each problem; 2 C S R FLOPs."""
    # A sum, not a product: those round float32 to TF32 or bfloat16 on accelerators,
    # and the residual is what the answer's accuracy comes from.
    return jnp.sum(a * x[:, None, :], axis=2)


def transpose_times(
    a: Float[Array, "C S R"], r: Float[Array, "C S"]
) -> Float[Array, "C R"]:
    """Return a^T @ r of each problem; 2 C S R FLOPs."""
    return jnp.sum(a * r[:, :, None], axis=1)


def _gram(a: Float[Array, "C S R"], solver: Solver) -> tuple[Array, float]:
    """Return a^T a in a's dtype or better, and its rounding relative to the trace."""
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    gram = jnp.einsum(
        "csk,csl->ckl",
        a,
        a,
        precision=solver.gram_precision,
        preferred_element_type=dtype,
    )
    rough = a.dtype == jnp.bfloat16 or solver.gram_precision != "highest"
    return gram, 2.0**-12 if rough else 10 * float(jnp.finfo(dtype).eps)


def _cholesky_solve(equations: Equations, solver: Solver) -> Callable:
    a, _, ridge, _ = equations
    gram, rounding = _gram(a, solver)
    trace = jnp.trace(gram, axis1=1, axis2=2)
    # Relative shift: a singular Gram matrix must survive its own rounding. That of a
    # problem without entries is zero, and any share of it too: it is shifted by 1.
    shift = rounding * trace + jnp.where(trace > 0, 0, 1)
    diagonal = ridge + shift[:, None]
    lower = jnp.linalg.cholesky(
        gram + diagonal[:, :, None] * jnp.eye(a.shape[2], dtype=gram.dtype)[None]
    )

    def solve(rhs: Array, _: Array | None) -> tuple[Array, Array]:
        x = jax.scipy.linalg.cho_solve((lower, True), rhs[..., None])[..., 0]
        return x, (0 * rhs[:, 0]).astype(jnp.int32)

    return solve


def sketch_triangle(
    a: Float[Array, "C S R"],
    ridge: Float[Array, "C R"],
    solver: Solver,
    key: Key[Array, ""],
) -> Float[Array, "C R R"]:
    """Return R of a sketch of each [a; sqrt(ridge)], so that a @ inv(R) is near
    orthonormal whatever the condition of `a`."""
    rank = a.shape[2]
    short = sketch_rows(a, solver.sketch_factor * rank, key, solver.sketch)
    energy = jnp.sum(short * short, axis=(1, 2))
    # Rows below the sketch that keep its triangle invertible where equations are fewer
    # than unknowns: the ridge's, or what is lost in rounding anyway.
    floor = jnp.finfo(a.dtype).eps * energy + jnp.where(energy > 0, 0, 1)
    tail = (
        jnp.sqrt(ridge + floor[:, None])[:, :, None]
        * jnp.eye(rank, dtype=a.dtype)[None]
    )
    return jnp.linalg.qr(jnp.concatenate([short, tail], axis=1), mode="r")


def _by_triangle(triangle: Float[Array, "C R R"]) -> Matvec:
    def apply(g: Array) -> Array:
        # (R^T R)^-1 g: R^T R is near a^T a + ridge, which is never made.
        y = jax.lax.linalg.triangular_solve(
            triangle, g[..., None], left_side=True, lower=False, transpose_a=True
        )
        return jax.lax.linalg.triangular_solve(
            triangle, y, left_side=True, lower=False
        )[..., 0]

    return apply


def _by_diagonal(diagonal: Float[Array, "C R"]) -> Matvec:
    # Where it is zero no equation has the unknown, and g is zero as well.
    diagonal = jnp.where(diagonal > 0, diagonal, 1)
    return lambda g: g / diagonal


def _iterative_solve(
    equations: Equations,
    kind: str,
    solver: Solver,
    tol: Float[Array, ""],
    key: Key[Array, ""],
) -> Callable:
    """Return CG on the equations themselves, or on their Gram matrices."""
    a, b, ridge, scale = equations
    short = a.astype(jnp.bfloat16) if solver.low_precision else a
    # By the expected diagonal: a's own would take another pass over the entries.
    precondition = _by_diagonal(scale + ridge)
    if kind == "sketch":
        precondition = _by_triangle(sketch_triangle(a, ridge, solver, key))
    if kind == "gram":
        gram, _ = _gram(short, solver)
        precondition = _by_diagonal(jnp.diagonal(gram, axis1=1, axis2=2) + ridge)

        def matvec(x: Array) -> Array:
            return times(gram, x) + ridge * x
    else:

        def matvec(x: Array) -> Array:
            return transpose_times(short, times(short, x)) + ridge * x

    whole = transpose_times(a, b)
    # One for each problem: over a mesh a linear solve can't close over a scalar.
    square = jnp.broadcast_to(tol**2, whole.shape[:1]) + 0 * whole[:, 0]

    def solve(rhs: Array, reference: Array | None) -> tuple[Array, Array]:
        # Relative to A^T b, not to what the start left: a good start takes few steps.
        scale = whole if reference is None else reference
        target = square * jnp.sum(scale * precondition(scale), axis=-1)
        return conjugate_gradient(matvec, rhs, precondition, target, solver.max_steps)

    return solve


def solve_batch(
    equations: Equations,
    start: Float[Array, "C R"],
    solver: Solver,
    tol: Float[Array, ""],
    key: Key[Array, ""],
) -> tuple[Float[Array, "C R"], Float[Array, " C"], Int[Array, " C"]]:
    """Return solutions, the start's squared errors, and the iterations of each.

    Iterations stop at a residual of the normal equations of `tol` times A^T b.
    """
    a, b, ridge, _ = equations
    residual = b - times(a, start)
    rhs = transpose_times(a, residual) - ridge * start

    def matvec(x: Array) -> Array:
        return transpose_times(a, times(a, x)) + ridge * x

    # The solver only has to come near: derivatives are those of `matvec` and `rhs`.
    frozen = jax.tree.map(jax.lax.stop_gradient, equations)
    kind = solver.choose(a.shape[1], a.shape[2])
    if kind == "exact":
        solve = _cholesky_solve(frozen, solver)
    else:
        solve = _iterative_solve(frozen, kind, solver, tol, key)
    correction, steps = implicit_solve(matvec, rhs, solve)
    return start + correction, jnp.sum(residual * residual, axis=1), steps

"""Every solver finds the regularised least-squares solution, and its derivative."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compare import assert_close
from uoe_jax.errors import ConfigError
from uoe_jax.linalg.completion.least_squares import (
    Equations,
    conjugate_gradient,
    solve_batch,
)
from uoe_jax.linalg.completion.method import Solver

BATCH, HEIGHT, RANK = 3, 40, 4
KINDS = ("exact", "cg", "gram", "sketch")


def draw_problem(seed):
    """Equations of mixed sizes of coefficients, and a start."""
    draw = np.random.default_rng(seed)
    a = draw.normal(size=(BATCH, HEIGHT, RANK)) * 10.0 ** draw.uniform(-2, 2)
    b = draw.normal(size=(BATCH, HEIGHT))
    ridge = draw.uniform(0, 1, size=(BATCH, RANK))
    start = draw.normal(size=(BATCH, RANK))
    return a, b, ridge, start


def dense_solution(a, b, ridge):
    """The normal equations, directly."""
    gram = jnp.einsum("csk,csl->ckl", a, a) + ridge[:, :, None] * jnp.eye(RANK)[None]
    rhs = jnp.einsum("csk,cs->ck", a, b)
    return jnp.linalg.solve(gram, rhs[..., None])[..., 0]


@partial(jax.jit, static_argnums=4)
def solved(a, b, ridge, start, solver):
    scale = jnp.sum(a * a, axis=1)
    equations = Equations(a, b, ridge, scale)
    tol = jnp.asarray(1e-12, a.dtype)
    return solve_batch(equations, start, solver, tol, jax.random.key(0))


@pytest.fixture(scope="module")
def slopes():
    """Jitted gradients of a linear function of the solution: ours and dense."""

    def probe(x):
        return jnp.sum(x * jnp.arange(1.0, 1 + x.size).reshape(x.shape))

    def ours(solver, *args):
        return probe(solved(*args, solver)[0])

    def dense(a, b, ridge):
        return probe(dense_solution(a, b, ridge))

    wanted = (0, 1, 2)
    return (
        {
            kind: jax.jit(jax.grad(partial(ours, Solver(kind, max_steps=200)), wanted))
            for kind in KINDS
        },
        jax.jit(jax.grad(dense, wanted)),
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_solvers_and_their_gradients_match_the_normal_equations(slopes, seed):
    with jax.enable_x64(True):
        a, b, ridge, start = (jnp.asarray(x) for x in draw_problem(seed))
        wanted = np.asarray(dense_solution(a, b, ridge))
        gradients, dense = slopes
        exact = dense(a, b, ridge)
        for kind in KINDS:
            solver = Solver(kind, max_steps=200)
            found, loss, steps = solved(a, b, ridge, start, solver)
            size = np.abs(wanted).max()
            np.testing.assert_allclose(found, wanted, atol=1e-7 * size, err_msg=kind)
            residual = b - jnp.einsum("csk,ck->cs", a, start)
            assert_close(loss, jnp.sum(residual**2, 1), 1e-12)
            assert (np.asarray(steps) <= 200).all()
            got = gradients[kind](a, b, ridge, wanted)
            for g, d in zip(got, exact, strict=True):
                np.testing.assert_allclose(g, d, atol=1e-6 * np.abs(d).max())


@pytest.mark.parametrize("kind", ["cg", "gram"])
def test_low_precision_iterations_refine_to_full_accuracy(kind, seed):
    """Each solve corrects the true residual, so repeating it squares the error away."""
    a, b, ridge, x = (jnp.asarray(x, jnp.float32) for x in draw_problem(seed))
    a = a / jnp.sqrt(jnp.mean(a * a))
    solver = Solver(kind, max_steps=20, low_precision=True)
    wanted = dense_solution(a, b, ridge)
    for _ in range(6):
        x, _, _ = solved(a, b, ridge, x, solver)
    np.testing.assert_allclose(x, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_empty_and_finished_problems_stay_finite(x64):
    """No equations, or a right-hand side of zero: nothing is divided by zero."""
    zeros = jnp.zeros((BATCH, HEIGHT, RANK))
    flat, square = jnp.zeros((BATCH, HEIGHT)), jnp.zeros((BATCH, RANK))
    for kind in KINDS:
        x, _, _ = solved(zeros, flat, square, square, Solver(kind, max_steps=200))
        np.testing.assert_array_equal(x, square)
    x, steps = conjugate_gradient(
        lambda v: 0 * v, square + 1, lambda g: g, jnp.zeros(BATCH), 5
    )
    assert np.isfinite(np.asarray(x)).all() and int(steps.max()) == 0


def test_unknown_solvers_and_settings_are_named():
    with pytest.raises(ConfigError, match="did you mean exact"):
        Solver("exakt")
    with pytest.raises(ConfigError, match="did you mean default"):
        Solver(gram_precision="defalt")
    with pytest.raises(ConfigError, match="max_steps is 0"):
        Solver(max_steps=0)

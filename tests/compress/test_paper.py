"""MoDeGPT's three algorithms as its paper has them, in float64, beside ours."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.compress.order import (
    LEVERAGE_RIDGE,
    best_first,
    leverage_scores,
    make_lift,
)
from uoe_jax.compress.query_key import pair_scores
from uoe_jax.compress.value_output import value_basis

seeds = st.integers(0, 2**31)


def drawn(seed, rows, columns):
    """Return well-conditioned inputs of unequal channels, and their generator."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns)) * rng.uniform(0.3, 2, (1, columns))
    return x, rng


def root(moment):
    values, vectors = np.linalg.eigh(moment)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def near(found, wanted, tolerance=1e-8):
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 23))
def test_neurons_are_chosen_and_fitted_as_by_algorithm_1(seed, count):
    z, rng = drawn(seed, 200, 24)
    moment, w_down = z.T @ z, rng.normal(size=(24, 7))
    ridge = LEVERAGE_RIDGE * np.trace(moment) / 24 * np.eye(24)
    scores = np.diag(moment @ np.linalg.inv(moment + ridge))
    near(leverage_scores(moment), scores)
    order = best_first(leverage_scores(moment))
    select = np.eye(24)[:, order[:count]]
    inner = np.linalg.inv(select.T @ moment @ select)
    near(
        make_lift(moment, w_down, order, ridge=1e-15).weights(count),
        inner @ select.T @ moment @ w_down,
    )


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_dimensions_are_scored_as_by_algorithm_2(seed):
    """Norms of the columns of the moments' roots; no pairs turn in the algorithm."""
    q, rng = drawn(seed, 100, 8)
    k = rng.normal(size=(100, 8)) * rng.uniform(0.3, 2, (1, 8))
    wanted = np.linalg.norm(root(q.T @ q), axis=0) * np.linalg.norm(
        root(k.T @ k), axis=0
    )
    squares = np.square(q).sum(0)[None, None], np.square(k).sum(0)[None]
    near(pair_scores(*squares, rotates=False)[0], wanted)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 6))
def test_values_and_outputs_are_those_of_algorithm_3(seed, rank):
    x, rng = drawn(seed, 200, 12)
    w_v, w_o = rng.normal(size=(12, 6)), rng.normal(size=(6, 12))
    half = root(x.T @ x)
    u, s, v = np.linalg.svd(half @ w_v, full_matrices=False)
    u2, s2, v2 = np.linalg.svd(s[:, None] * v @ w_o, full_matrices=False)
    into = np.linalg.inv(half) @ u @ u2[:, :rank]
    out = s2[:rank, None] * v2[:rank]
    found = value_basis(w_v.T @ (x.T @ x) @ w_v, w_o[None])
    mine = x @ w_v @ found.into[:, :rank] @ found.out[0, :rank]
    lost = np.square(x @ into @ out - x @ w_v @ w_o).sum()
    # Of two equal eigenvalues either may stay: errors agree, and where the values are
    # apart the outputs do too.
    assert abs(np.square(mine - x @ w_v @ w_o).sum() - lost) < 1e-9 * s2.sum() ** 2
    if rank == 6 or s2[rank - 1] ** 2 - s2[rank] ** 2 > 1e-3 * s2[0] ** 2:
        near(mine, x @ into @ out, 1e-7)

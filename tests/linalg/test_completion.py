"""Recovery and invariances of alternating minimisation on planted matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compare import assert_close
from tests.linalg.planted_matrices import make_planted
from uoe_jax.linalg.completion import Solver, complete, predict
from uoe_jax.linalg.completion.als import gauge, start_state
from uoe_jax.linalg.completion.entries import clean_entries
from uoe_jax.linalg.completion.method import Method
from uoe_jax.linalg.completion.problem import lay_out
from uoe_jax.linalg.completion.spectral import Start, clip_rows
from uoe_jax.linalg.lowrank import orthonormalise, subspace_distance

F64 = {"dtype": np.float64}


@pytest.fixture(scope="module")
def solved(planted):
    """One completion by each solver, in float64."""
    with jax.enable_x64(True):
        return {
            kind: complete(
                *planted.entries, (600, 600), 5, solver=kind, tol=1e-8, iters=15, **F64
            )
            for kind in ("exact", "cg", "sketch")
        }


def test_recovers_in_15_sweeps(planted, solved, x64):
    for kind, factors in solved.items():
        assert len(factors.info["train_rmse"]) <= 15
        assert planted.error(factors) <= 1e-6, kind


def test_recovers_in_float32(planted):
    options = {"solver": "cg", "tol": 1e-6, "iters": 15}
    factors = complete(*planted.entries, (600, 600), 5, **options)
    assert factors.u.dtype == jnp.float32
    assert planted.error(factors) <= 1e-4


def test_solvers_agree(solved, x64):
    for kind in ("cg", "sketch"):
        for side in ("u", "v"):
            a, b = getattr(solved[kind], side), getattr(solved["exact"], side)
            assert float(subspace_distance(a, b)) <= 10 * 1e-8, (kind, side)


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4])
def test_error_follows_tolerance(planted, tol, x64):
    options = {"solver": "cg", "tol": tol, "iters": 15, **F64}
    factors = complete(*planted.entries, (600, 600), 5, **options)
    assert planted.error(factors) <= 2 * tol


def test_exact_objective_never_rises(solved):
    losses = solved["exact"].info["loss"].reshape(-1)
    # Rounding of the sum itself, at the scale of the first loss.
    assert (np.diff(losses) <= 1e-12 * losses[0]).all()


def test_permutation_scale_and_transpose_carry_over(planted, solved, seed, x64):
    draw = np.random.default_rng(seed + 1)
    p, q = draw.permutation(600), draw.permutation(600)
    options = {"solver": "exact", "tol": 1e-8, "iters": 15, **F64}
    rows, cols, values = planted.entries
    model = np.asarray(solved["exact"].dense())
    scale = np.abs(model).max()
    permuted = complete(p[rows], q[cols], values, (600, 600), 5, **options)
    np.testing.assert_allclose(permuted.dense()[p][:, q], model, atol=1e-6 * scale)
    scaled = complete(rows, cols, 1e3 * values, (600, 600), 5, **options)
    np.testing.assert_allclose(scaled.dense(), 1e3 * model, atol=1e-3 * scale)
    swapped = complete(cols, rows, values, (600, 600), 5, **options)
    np.testing.assert_allclose(swapped.dense().T, model, atol=1e-6 * scale)


def test_spectral_start_is_near(planted, x64):
    entries = clean_entries(*planted.entries, (600, 600), dtype=np.float64)
    problem = lay_out(entries, 5).problem(entries.values, None, jnp.float64(0))
    method = Method(Solver(), False, False)
    state, _ = start_state(problem, jax.random.key(0), method, Start(5))
    truth = np.linalg.svd(planted.matrix)[0][:, :5]
    assert float(subspace_distance(state.u, jnp.asarray(truth))) < 0.5


def test_clip_bounds_heavy_rows_and_leaves_the_others(seed, x64):
    draw = np.random.default_rng(seed)
    plain = np.linalg.qr(draw.normal(size=(200, 4)))[0]
    np.testing.assert_array_equal(clip_rows(jnp.asarray(plain), 3.0), plain)
    spiky = draw.normal(size=(200, 4))
    spiky[:3] *= 1e3
    spiky = np.linalg.qr(spiky)[0]
    limit = 2 * 1.5 * np.sqrt(4 / 200)
    clipped = np.asarray(clip_rows(jnp.asarray(spiky), 1.5))
    norms = np.linalg.norm(clipped, axis=1)
    assert np.linalg.norm(spiky, axis=1).max() > limit
    assert norms.max() <= limit * (1 + 1e-12)
    untouched = np.linalg.norm(spiky, axis=1) <= limit
    np.testing.assert_array_equal(clipped[untouched], spiky[untouched])


def test_empty_rows_and_columns_are_zero_and_reported(seed):
    planted = make_planted(seed, 60, 50, 2, 0.5)
    keep = (planted.rows != 7) & (planted.cols != 0)
    entries = [x[keep] for x in planted.entries]
    factors = complete(*entries, (60, 51), 2, solver="exact", iters=10)
    assert np.flatnonzero(factors.info["empty_rows"]).tolist() == [7]
    assert np.flatnonzero(factors.info["empty_cols"]).tolist() == [0, 50]
    model = np.asarray(factors.dense())
    assert np.isfinite(model).all()
    assert (model[7] == 0).all() and (model[:, [0, 50]] == 0).all()
    inner = np.ix_(np.arange(60) != 7, np.arange(50) != 0)
    np.testing.assert_allclose(model[:, :50][inner], planted.matrix[inner], atol=1e-3)


def test_rank_one_ones_with_one_entry_missing(x64):
    matrix = np.ones((6, 5))
    rows, cols = np.nonzero(np.arange(30).reshape(6, 5) != 13)
    factors = complete(
        rows, cols, matrix[rows, cols], (6, 5), 1, iters=20, tol=1e-14, **F64
    )
    missing = predict(factors, np.array([2]), np.array([3]))
    assert_close(missing, 1.0, 1e-12)


def test_rank_is_read_off_the_spectrum(planted, seed):
    # The smallest of the five is 1.3 times the noise's edge, and lifted by it.
    factors = complete(*planted.entries, (600, 600), "auto", solver="cg", iters=1)
    assert factors.rank == 5
    pair = make_planted(seed, rank=2, fraction=0.1, ratio=1.0)
    assert complete(*pair.entries, (600, 600), "auto", solver="cg", iters=1).rank == 2
    whole = make_planted(seed, 60, 50, 4, fraction=1.0, ratio=8.0)
    assert complete(*whole.entries, (60, 50), "auto", solver="cg", iters=1).rank == 4


def test_the_rank_is_that_of_the_values_less_their_biases():
    pair = make_planted(3, 150, 150, 2, fraction=0.4, ratio=1.2)
    draw = np.random.default_rng(4)
    rows, cols = (4 * draw.normal(size=150) for _ in range(2))
    values = pair.values + rows[pair.rows] + cols[pair.cols]
    options = {"solver": "cg", "iters": 1, "biases": True, "ridge": 0.1}
    at = pair.rows, pair.cols, values, (150, 150)
    assert complete(*at, "auto", **options).rank == 2


def test_the_rank_is_seen_above_the_noise_of_a_splits_start():
    """It has a third of the entries, so that the last of the four may be hidden."""
    planted = make_planted(0, 200, 200, 4, fraction=0.3, ratio=1.5)
    options = {"solver": "cg", "iters": 1, "split": True}
    assert complete(*planted.entries, (200, 200), "auto", **options).rank <= 4


def test_sample_splitting_contracts_given_enough_entries(seed, x64):
    planted = make_planted(seed, 300, 300, 2, 0.9, ratio=1.0)
    options = {"solver": "exact", "split": True, "iters": 4, **F64}
    factors = complete(*planted.entries, (300, 300), 2, **options)
    losses = factors.info["loss"]
    # Each sweep sees other entries; the theory's contraction is 1/4 a half-step.
    assert losses[-1, 1] < losses[0, 1] / 100
    assert planted.error(factors) < 0.05


def test_ridge_solution_is_stationary(seed, x64):
    """The gradient of the whole penalised objective vanishes at the result."""
    planted = make_planted(seed, 40, 30, 2, 0.6)
    draw = np.random.default_rng(seed)
    values = planted.values + 2 + draw.normal(size=planted.values.size) * 0.1
    options = {"ridge": 0.3, "bias_ridge": 0.1, "ridge_power": 0.5, "biases": True}
    factors = complete(
        planted.rows, planted.cols, values, (40, 30), 2,
        solver="exact", tol=1e-13, iters=3000, **options, **F64,
    )  # fmt: skip
    rows, cols = planted.rows, planted.cols
    row_count, col_count = np.bincount(rows), np.bincount(cols)

    def objective(u, v, row_bias, col_bias):
        model = factors.offset + row_bias[rows] + col_bias[cols]
        model = model + jnp.sum(u[rows] * v[cols], axis=1)
        penalty = 0.0
        for count, factor, bias in ((row_count, u, row_bias), (col_count, v, col_bias)):
            per = 0.3 * jnp.sum(factor**2, axis=1) + 0.1 * bias**2
            penalty += jnp.sum(jnp.sqrt(1.0 * count) * per)
        return jnp.sum((values - model) ** 2) + penalty

    parts = (factors.u, factors.v, factors.row_bias, factors.col_bias)
    for slope in jax.grad(objective, argnums=(0, 1, 2, 3))(*parts):
        # The factors' own size is near 1 with some 20 entries each.
        assert float(jnp.abs(slope).max()) < 1e-3


def test_weights_of_zero_drop_entries(seed, x64):
    planted = make_planted(seed, 60, 50, 2, 0.5)
    bad = np.random.default_rng(seed).random(planted.rows.size) < 0.1
    spoiled = np.where(bad, 1e3, planted.values)
    options = {"solver": "exact", "iters": 40, "tol": 1e-10, **F64}
    weighted = complete(
        planted.rows, planted.cols, spoiled, (60, 50), 2, weights=1.0 - bad, **options
    )
    assert planted.error(weighted) < 1e-6


def test_held_out_entries_stop_early(seed):
    planted = make_planted(seed, 80, 60, 3, 0.4)
    draw = np.random.default_rng(seed)
    noisy = planted.values + draw.normal(size=planted.values.size)
    factors = complete(
        planted.rows, planted.cols, noisy, (80, 60), 12,
        solver="exact", iters=40, tol=1e-9, ridge=0.1, holdout=0.2, patience=2,
    )  # fmt: skip
    errors = factors.info["valid_rmse"]
    assert len(errors) < 40
    assert int(factors.info["best_sweep"]) == int(np.argmin(errors))


@pytest.mark.parametrize("regularised", [False, True])
def test_a_change_of_basis_keeps_the_product(regularised, seed, x64):
    draw = np.random.default_rng(seed)
    u, v = (jnp.asarray(draw.normal(size=(n, 4)) * [9, 3, 1, 0.1]) for n in (30, 20))
    fixed, other, scale = gauge(u, v, regularised)
    np.testing.assert_allclose(fixed @ other.T, u @ v.T, atol=1e-10)
    # Orthogonal columns, of the mean square that preconditions the solvers.
    np.testing.assert_allclose(fixed.T @ fixed / 30, np.diag(scale), atol=1e-10)


def test_orthonormalise_keeps_the_product(seed, x64):
    factor = np.random.default_rng(seed).normal(size=(50, 6)) @ np.diag(
        10.0 ** -np.arange(6)
    )
    q, r = orthonormalise(jnp.asarray(factor))
    np.testing.assert_allclose(q @ r, factor, atol=1e-12)
    np.testing.assert_allclose(q.T @ q, np.eye(6), atol=1e-10)
    zeros, _ = orthonormalise(jnp.zeros((5, 2)))
    assert np.isfinite(np.asarray(zeros)).all()

"""Predictions, storage, growth, derivatives and the scikit-learn estimator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.compare import assert_close
from tests.linalg.planted_matrices import make_planted
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.linalg.completion import (
    Factors,
    MatrixCompleter,
    complete,
    load_factors,
    make_completer,
    partial_fit,
    predict,
    save_factors,
)
from uoe_jax.linalg.completion.factors import squared_error_interval


@pytest.fixture(scope="module")
def small(seed):
    planted = make_planted(seed, 60, 50, 2, 0.5)
    options = {"solver": "exact", "tol": 1e-6, "biases": True, "ridge": 1e-3}
    factors = complete(*planted.entries, (60, 50), 2, iters=20, **options)
    return planted, factors


def test_predict_is_the_dense_model(small):
    planted, factors = small
    dense = np.asarray(factors.dense())
    model = predict(factors, planted.rows, planted.cols)
    assert_close(model, dense[planted.rows, planted.cols], 1e-5)


def test_factors_survive_storage(small, tmp_path):
    _, factors = small
    path = tmp_path / "factors.safetensors"
    save_factors(factors, path, row_ids=np.arange(60))
    loaded = load_factors(path)
    np.testing.assert_array_equal(loaded.dense(), factors.dense())
    np.testing.assert_array_equal(loaded.info["row_ids"], np.arange(60))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    save_file({**load_file(path), "v": np.zeros((4, 9), np.float32)}, path)
    with pytest.raises(DataError, match="don't belong"):
        load_factors(path)
    path.write_bytes(b"no tensors here")
    with pytest.raises(DataError, match="safetensors"):
        load_factors(path)


def test_partial_fit_finds_rows_that_were_left_out(small, x64):
    planted, _ = small
    rows, cols, values = planted.entries
    keep = rows < 59
    options = {"dtype": np.float64, "solver": "exact", "tol": 1e-10}
    kept = (rows[keep], cols[keep], values[keep])
    factors = complete(*kept, (59, 50), 2, iters=60, **options)
    new = (rows[~keep], cols[~keep], values[~keep])
    grown = partial_fit(factors, *new)
    assert grown.shape == (60, 50)
    assert planted.error(grown) < 1e-6
    np.testing.assert_array_equal(grown.dense()[:59], factors.dense())
    # The same for columns of the transposed matrix.
    flipped = Factors(
        factors.v, factors.u, factors.col_bias, factors.row_bias, factors.offset
    )
    wide = partial_fit(flipped, new[1], new[0], new[2], axis="cols")
    np.testing.assert_allclose(wide.dense().T, grown.dense(), atol=1e-12)
    with pytest.raises(ConfigError, match="axis"):
        partial_fit(factors, *new, axis="both")


def test_derivative_of_a_completion_is_its_difference_quotient(seed, x64):
    planted = make_planted(seed, 14, 12, 2, 0.8)
    draw = np.random.default_rng(seed)
    values = planted.values + 0.1 * draw.normal(size=planted.values.size)
    fill = make_completer(
        planted.rows, planted.cols, (14, 12), 2, iters=40, tol=1e-13, dtype=np.float64
    )
    probe = jnp.asarray(draw.normal(size=(14, 12)))

    @jax.jit
    def loss(values):
        u, v = fill(values)
        return jnp.sum(probe * (u @ v.T))

    values = jnp.asarray(values)
    direction = jnp.asarray(draw.normal(size=values.shape))
    slope = jnp.vdot(jax.jit(jax.grad(loss))(values), direction)
    step = 1e-5
    rise = loss(values + step * direction) - loss(values - step * direction)
    # Central difference in float64: truncation 1e-10, rounding 1e-10, times curvature.
    assert_close(slope, rise / (2 * step), 1e-4, least=1.0)


def test_interval_covers_the_true_error(rng):
    inside = 0
    for _ in range(300):
        _, low, high = squared_error_interval(rng.normal(size=400))
        inside += low <= 1 <= high
    # 95% nominal; 300 draws have a deviation of 1.3%, allow four.
    assert inside / 300 > 0.89


@pytest.fixture(scope="module")
def searched(seed):
    """A grid search over the ridge, and the entries it saw."""
    from sklearn.model_selection import GridSearchCV, ShuffleSplit

    planted = make_planted(seed, 60, 50, 2, 0.9)
    pairs = np.stack([planted.rows, planted.cols], axis=1)
    model = MatrixCompleter(iters=10, shape=(60, 50), rank=2, solver="exact")
    folds = ShuffleSplit(1, test_size=0.3, random_state=0)
    search = GridSearchCV(model, {"ridge": [1e-2, 1e3]}, cv=folds, error_score="raise")
    return search.fit(pairs, planted.values), pairs, planted.values


def test_estimator_works_in_a_grid_search(searched):
    from sklearn.base import clone

    search, pairs, values = searched
    assert search.best_params_ == {"ridge": 1e-2}
    assert search.best_score_ > 0.9
    assert search.score(pairs, values) > 0.95
    model = search.best_estimator_
    assert clone(model).get_params() == model.get_params()


def test_estimator_predicts_what_it_never_saw_and_names_mistakes(searched):
    model = searched[0].best_estimator_
    both_new = model.predict(np.array([[900, 900]]))
    assert_close(both_new, float(model.factors_.offset), 1e-6)
    fresh = MatrixCompleter(rank=2)
    with pytest.raises(ConfigError, match="fit first"):
        fresh.predict(np.array([[0, 0]]))
    with pytest.raises(ConfigError, match="did you mean ridge"):
        fresh.set_params(rigde=1.0)
    with pytest.raises(DataError, match="row, column"):
        fresh.fit(np.zeros((3, 4)), np.zeros(3))
    with pytest.raises(DataError, match="integers"):
        fresh.fit(np.array([["a", "b"]]), np.zeros(1))

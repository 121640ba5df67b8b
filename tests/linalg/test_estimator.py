"""The scikit-learn estimator: its defaults, its conventions, its mistakes."""

import dataclasses
import inspect
import pickle
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score

from tests.compare import assert_close
from uoe_jax.complete.options import CompleteArgs
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.linalg.completion import MatrixCompleter, complete, partial_fit
from uoe_jax.linalg.completion.defaults import FitOptions

QUICK = {"rank": 1, "ridge": 0.5, "iters": 3, "solver": "exact"}


@pytest.fixture(scope="module")
def ratings():
    """Noisy ratings with biases, half a matrix; a fifth of them is for a test."""
    draw = np.random.default_rng(5)
    truth = 3 + draw.normal(size=(80, 1)) / 2 + draw.normal(size=(1, 60)) / 2
    truth = truth + draw.normal(size=(80, 2)) @ draw.normal(size=(2, 60)) / 2
    rows, cols = np.nonzero(draw.random(truth.shape) < 0.5)
    values = truth[rows, cols] + draw.normal(size=len(rows)) / 2
    test = draw.random(len(rows)) < 0.2
    pairs = np.stack([rows, cols], axis=1)
    return pairs[~test], values[~test], pairs[test], values[test]


@pytest.fixture(scope="module")
def fitted(ratings):
    return MatrixCompleter().fit(*ratings[:2])


def error(model, X, y):
    return float(np.sqrt(np.mean((model.predict(X) - y) ** 2)))


def test_defaults_are_those_of_the_command_and_fit_noisy_ratings(ratings, fitted):
    given = inspect.signature(MatrixCompleter).parameters
    for field in dataclasses.fields(FitOptions):
        assert given[field.name].default == field.default
    command = {f.name: f.default for f in dataclasses.fields(CompleteArgs)}
    for name in set(given) & set(command):
        assert given[name].default == command[name]
    X, y, test, truth = ratings
    # The mean has 1.0, the noise alone 0.5; without a ridge rank 8 has over 1.5.
    assert error(fitted, test, truth) < 0.68
    assert fitted.factors_.rank == 8 and fitted.ridge_ > 0
    first = MatrixCompleter(refit=False).fit(X, y)
    assert first.ridge_ == fitted.ridge_
    assert len(first.factors_.info["train_rmse"]) > 0


def test_conventions_of_scikit_learn(ratings):
    X, y, *_ = ratings
    model = MatrixCompleter(**QUICK)
    before = model.get_params()
    assert model.fit(X, y) is model and model.get_params() == before
    assert clone(model).get_params() == before and not hasattr(clone(model), "factors_")
    assert model.n_features_in_ == 2
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    assert "rank=1" in repr(model)
    assert cross_val_score(clone(model), X, y, cv=2).shape == (2,)
    assert model.predict(np.zeros((0, 2), int)).shape == (0,)


@pytest.mark.parametrize("call", ["predict", "score"])
def test_unfitted_models_say_so_as_scikit_learn_does(call):
    args = ([[0, 0]],) if call == "predict" else ([[0, 0]], [1.0])
    with pytest.raises(NotFittedError, match="fit first"):
        getattr(MatrixCompleter(), call)(*args)


def test_random_states_of_every_kind(ratings):
    X, y, test, _ = ratings
    predict = lambda state: (
        MatrixCompleter(**QUICK, random_state=state).fit(X, y).predict(test)
    )
    for state in (None, np.int64(3), np.random.RandomState(1)):
        assert np.isfinite(predict(state)).all()
    first = predict(np.random.RandomState(1))
    np.testing.assert_array_equal(first, predict(np.random.RandomState(1)))
    with pytest.raises(ValueError, match="seed"):
        predict("seven")


def test_rows_are_any_integers(ratings):
    X, y, test, _ = ratings
    model = MatrixCompleter(**QUICK).fit(X, y)
    for shift in (2_000_000_000, -(2**62)):
        moved = MatrixCompleter(**QUICK).fit(X + shift, y)
        np.testing.assert_array_equal(moved.predict(test + shift), model.predict(test))
    high = X.astype(np.uint64) + np.uint64(2**63)
    moved = MatrixCompleter(**QUICK).fit(high, y)
    np.testing.assert_array_equal(moved.predict(high), model.predict(X))
    # Integers of the other sign are others, not what they would wrap to.
    mean = float(moved.factors_.offset)
    assert_close(moved.predict(X - 2**62), mean, 1e-6)
    as_floats = MatrixCompleter(**QUICK).fit(X.astype(float), y)
    np.testing.assert_array_equal(as_floats.predict(test), model.predict(test))


def test_constant_values_are_predicted_and_score_one():
    X = np.argwhere(np.ones((6, 5)))
    with pytest.warns(UserWarning, match="nothing to learn"):
        model = MatrixCompleter().fit(X, np.full(30, 4.0))
    assert_close(model.predict(X), 4.0, 1e-6)
    assert_close(model.score(X, np.full(30, 4.0)), 1.0, 1e-6)


def test_a_new_row_gets_a_bias_though_all_were_zero():
    """b minimises 3 (1 - 4 - b)^2 + ridge 3^power b^2."""
    X = np.argwhere(np.ones((6, 5)))
    new = [[6, 0], [6, 1], [6, 2]]
    for power in (0.0, 0.5):
        model = MatrixCompleter(ridge=0.5, ridge_power=power)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model.fit(X, np.full(30, 4.0))
        model.partial_fit(new, [1.0, 1.0, 1.0])
        want = 4 - 9 / (3 + 0.5 * 3**power)  # 1.43 with power 0
        np.testing.assert_allclose(model.predict(new), want, atol=1e-4)
        np.testing.assert_allclose(model.predict(X), 4.0, atol=1e-4)
        weighted = model.partial_fit(new, [1.0, 1.0, 2.0], sample_weight=[1, 1, 2])
        want = 4 - 10 / (4 + 0.5 * 4**power)  # the ridge grows with summed weight
        np.testing.assert_allclose(weighted.predict(new), want, atol=1e-4)


def test_a_completion_without_biases_grows_without_one():
    X = np.argwhere(np.ones((6, 5)))
    values = np.outer(np.arange(1, 7), np.arange(1, 6)).ravel() * 1.0
    factors = complete(X[:, 0], X[:, 1], values, rank=1, solver="exact", iters=5)
    grown = partial_fit(factors, [6, 6], [0, 1], [7.0, 14.0])
    assert not grown.has_biases and not np.asarray(grown.row_bias).any()
    assert_close(np.asarray(grown.dense())[6], 7.0 * np.arange(1, 6), 1e-4)


def test_partial_fit_begins_a_model_and_names_new_columns(ratings):
    X, y, *_ = ratings
    model = MatrixCompleter(**QUICK).partial_fit(X, y)
    rows = len(model.row_ids_)
    assert model.partial_fit(X[:3], y[:3]) is model and len(model.row_ids_) == rows
    with pytest.raises(DataError, match=r"X\[1, 1\] is 999"):
        model.partial_fit([[0, 0], [0, 999]], [1.0, 2.0])


@pytest.mark.parametrize(
    ("X", "y", "weight", "words"),
    [
        ([[0, 0], [1, 1]], [1j, 2], None, "complex128"),
        ([[0, 0], [1, 1]], ["a", "b"], None, "numbers"),
        ([[0, 0], [1, 1]], [1.0, np.nan], None, "nan"),
        ([[0, 0], [1, 1]], [1.0, 1e39], None, "1e.39.*power of ten"),
        ([[0, 0], [1, 1]], [1.0, 1e25], None, "1e.25.*power of ten"),
        ([[0, 0], [1, 1]], [1.0], None, "one value for each"),
        ([[0, 0], [1, 1]], [1.0, 2.0], [1.0], "one weight for each"),
        ([[0, 0], [1, 1]], [1.0, 2.0], [1.0, -1.0], "negative"),
        ([[0.5, 0], [1, 1]], [1.0, 2.0], None, "integers"),
        ([[np.nan, 0], [1, 1]], [1.0, 2.0], None, "integers"),
        ([[1j, 0], [1, 1]], [1.0, 2.0], None, "integers"),
        ([["a", "b"], ["c", "d"]], [1.0, 2.0], None, "integers"),
        (np.zeros((0, 2), int), [], None, "0 entries"),
        ([0, 1], [1.0, 2.0], None, "row, column"),
        ([[0, 0], [1]], [1.0, 2.0], None, "X is no array"),
        ([[0, 0], [1, 1]], [[1.0], [2.0, 3.0]], None, "y is no array"),
        ([[0, 0], [1, 1]], np.ones((2, 2)), None, "one value for each"),
        ([[0, 0], [1, 1]], [1.0, 2.0], [1.0, None], "weights.1. is nan"),
    ],
)
def test_mistakes_are_one_line(X, y, weight, words):
    with pytest.raises(DataError, match=words) as caught:
        MatrixCompleter(**QUICK, biases=False).fit(X, y, weight)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, None])
def test_values_that_are_not_finite_are_named_though_the_ridge_is_derived(bad):
    with pytest.raises(DataError, match=r"y\[1\] is (nan|inf) \(1 such\)"):
        MatrixCompleter(holdout=0.0).fit([[0, 0], [1, 1]], [1.0, bad])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("holdout", "0.1"),
        ("holdout", None),
        ("shape", (3,)),
        ("shape", 3),
        ("shape", "ab"),
        ("shape", (3.5, 3)),
        ("shape", (10**12, 3)),
        ("rank", True),
    ],
)
def test_parameters_of_a_wrong_type_are_one_line(name, value):
    with pytest.raises(ConfigError, match=f"{name} is") as caught:
        MatrixCompleter().set_params(**{name: value}).fit([[0, 0], [1, 1]], [1.0, 2.0])
    assert "\n" not in str(caught.value)


def test_mistakes_of_parameters_and_indices():
    with pytest.raises(ConfigError, match="holdout is 1.5"):
        MatrixCompleter(holdout=1.5).fit([[0, 0]], [1.0])
    with pytest.raises(ConfigError, match="rank is 9"):
        MatrixCompleter(rank=9).fit([[0, 0], [1, 1]], [1.0, 2.0])
    with pytest.raises(DataError, match="2000000000.*return_inverse"):
        complete([0, 2_000_000_000], [0, 1], [1.0, 2.0], rank=1)
    with pytest.raises(DataError, match="complex"):
        complete([0, 1], [0, 1], np.array([1j, 2.0]), rank=1)

"""A scikit-learn estimator; scikit-learn itself is imported only when asked for."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import jax
import numpy as np

from uoe_jax.errors import ConfigError, DataError, nearest
from uoe_jax.linalg.completion.api import complete
from uoe_jax.linalg.completion.factors import predict
from uoe_jax.linalg.completion.update import partial_fit


class MatrixCompleter:
    """Matrix completion as a regressor of X = [row, column] pairs on values.

    Follows scikit-learn's estimator protocol (`get_params`, `set_params`, `fit`,
    `predict`, `score`), so it works in GridSearchCV, cross_val_score and clone. A row
    or column that `fit` never saw is predicted from the offset and the other's bias.
    """

    def __init__(
        self,
        rank: int | str = 8,
        ridge: float = 0.0,
        bias_ridge: float | None = None,
        ridge_power: float = 0.0,
        biases: bool = True,
        solver: str = "auto",
        tol: float = 1e-4,
        iters: int = 30,
        holdout: float = 0.0,
        patience: int = 3,
        shape: tuple[int, int] | None = None,
        random_state: int = 0,
    ):
        self.rank = rank
        self.ridge = ridge
        self.bias_ridge = bias_ridge
        self.ridge_power = ridge_power
        self.biases = biases
        self.solver = solver
        self.tol = tol
        self.iters = iters
        self.holdout = holdout
        self.patience = patience
        self.shape = shape
        self.random_state = random_state

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's arguments."""
        names = inspect.signature(type(self).__init__).parameters
        return {name: getattr(self, name) for name in names if name != "self"}

    def set_params(self, **params: Any) -> MatrixCompleter:
        """Set constructor arguments by name."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise ConfigError(f"no parameter {name!r}; {nearest(name, known)}")
            setattr(self, name, value)
        return self

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> MatrixCompleter:
        """Complete from entries X = [row, column] with values y."""
        X = _pairs(X)
        options = self.get_params()
        rank, shape = options.pop("rank"), options.pop("shape")
        key = jax.random.key(options.pop("random_state"))
        self.factors_ = complete(
            X[:, 0], X[:, 1], y, shape, rank, weights=sample_weight, key=key, **options
        )
        self.n_features_in_ = 2
        return self

    def partial_fit(self, X: Any, y: Any) -> MatrixCompleter:
        """Solve again for the rows in X from these entries, the columns held."""
        if not hasattr(self, "factors_"):
            return self.fit(X, y)
        X = _pairs(X)
        self.factors_ = partial_fit(
            self.factors_,
            X[:, 0],
            X[:, 1],
            y,
            ridge=self.ridge,
            bias_ridge=self.bias_ridge,
            ridge_power=self.ridge_power,
        )
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the completed matrix at X = [row, column] pairs."""
        if not hasattr(self, "factors_"):
            raise ConfigError("this MatrixCompleter isn't fitted; call fit first")
        X, factors = _pairs(X), self.factors_
        inside = (X < np.array(factors.shape)).all(axis=1) & (X >= 0).all(axis=1)
        known = np.where(inside[:, None], X, 0)
        model = np.array(predict(factors, known[:, 0], known[:, 1]))
        mean = np.full(len(X), float(factors.offset), model.dtype)
        for axis, bias in enumerate((factors.row_bias, factors.col_bias)):
            seen = (X[:, axis] >= 0) & (X[:, axis] < factors.shape[axis])
            mean += np.where(seen, np.asarray(bias)[np.where(seen, X[:, axis], 0)], 0)
        return np.where(inside, model, mean)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the coefficient of determination R^2 of the predictions."""
        y = np.asarray(y, np.float64)
        error = (self.predict(X) - y) ** 2
        spread = (y - np.average(y, weights=sample_weight)) ** 2
        unexplained = np.average(error, weights=sample_weight)
        return float(1 - unexplained / np.average(spread, weights=sample_weight))

    def __sklearn_tags__(self) -> Any:
        utils = importlib.import_module("sklearn.utils")
        return utils.Tags(
            estimator_type="regressor",
            target_tags=utils.TargetTags(required=True),
            regressor_tags=utils.RegressorTags(),
            input_tags=utils.InputTags(),
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "factors_")

    def __repr__(self):
        shown = ", ".join(f"{k}={v!r}" for k, v in self.get_params().items())
        return f"MatrixCompleter({shown})"


def _pairs(X: Any) -> np.ndarray:
    X = np.asarray(X)
    if X.ndim != 2 or X.shape[1] != 2:
        raise DataError(f"X has shape {X.shape}; it must be [entries, 2]: row, column")
    if not np.issubdtype(X.dtype, np.number) or not (np.floor(X) == X).all():
        raise DataError(f"X holds {X.dtype}; rows and columns must be integers")
    return X.astype(np.int64)

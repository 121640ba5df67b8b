"""A scikit-learn estimator of matrix completion."""

from __future__ import annotations

import dataclasses
from numbers import Integral
from typing import Any

import jax
import numpy as np

from uoe_jax.errors import ConfigError, DataError, extra_packages, first_line, nearest
from uoe_jax.linalg.completion.choose import Ratings, choose, draw_positions, fit_again
from uoe_jax.linalg.completion.defaults import DEFAULTS, FitOptions, default_rank
from uoe_jax.linalg.completion.factors import predict_known
from uoe_jax.linalg.completion.method import Solver
from uoe_jax.linalg.completion.update import partial_fit

with extra_packages():
    from sklearn.base import BaseEstimator, RegressorMixin
    from sklearn.exceptions import NotFittedError
    from sklearn.utils import check_random_state, column_or_1d


class NotFitted(ConfigError, NotFittedError):
    """A completer that was asked before it was fitted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompleterOptions(FitOptions):
    """Options of a fit, whose solver can be given with everything set."""

    # Wider than the command's.
    solver: str | Solver = DEFAULTS.solver  # pyrefly: ignore[bad-override]


class MatrixCompleter(RegressorMixin, BaseEstimator):
    """Matrix completion as a regressor of X = [row, column] pairs on values.

    Rows and columns are any integers. One that `fit` never saw is predicted from the
    offset and the other's bias. The defaults are those of `uoe complete`: a tenth of
    the entries choose the ridge and the sweeps, then all are fitted.

    Args:
      rank: of the model, or "auto"; None: 8, or the shorter side if that is less.
      ridge: penalty; None: the best of a few on held-out entries.
      bias_ridge: penalty of the biases; None: `ridge`.
      ridge_power: penalties grow with a row's summed weight to this power.
      biases: fit an offset, row and column biases.
      solver: "auto", "exact", "gram", "cg" or "sketch", or a `Solver`.
      tol: accuracy of each half-step, and of the last sweep's gain.
      iters: sweeps at most.
      holdout: fraction of the entries that choose; where it leaves none, none choose.
      patience: sweeps without a better held-out error before stopping.
      refit: fit all entries once ridge and sweeps are chosen.
      shape: of the matrix, whose rows and columns are then counted from 0; None: the
        rows and columns that occur.
      random_state: of the split and the start, as scikit-learn takes it.

    Attributes:
      factors_: the completed matrix of `row_ids_` x `col_ids_`.
      row_ids_: row of each of the factors' rows, in ascending order after `fit`.
      col_ids_: column of each of the factors' columns.
      ridge_: the ridge that was given or chosen.
    """

    def __init__(
        self,
        rank: int | str | None = None,
        ridge: float | None = DEFAULTS.ridge,
        bias_ridge: float | None = DEFAULTS.bias_ridge,
        ridge_power: float = DEFAULTS.ridge_power,
        biases: bool = DEFAULTS.biases,
        solver: str | Solver = DEFAULTS.solver,
        tol: float = DEFAULTS.tol,
        iters: int = DEFAULTS.iters,
        holdout: float = DEFAULTS.holdout,
        patience: int = DEFAULTS.patience,
        refit: bool = DEFAULTS.refit,
        shape: tuple[int, int] | None = None,
        random_state: Any = 0,
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
        self.refit = refit
        self.shape = shape
        self.random_state = random_state

    def set_params(self, **params: Any) -> MatrixCompleter:
        """Set constructor arguments by name."""
        known = self.get_params()
        for name in params:
            if name not in known:
                raise ConfigError(f"no parameter {name!r}; {nearest(name, known)}")
        return super().set_params(**params)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> MatrixCompleter:
        """Complete from entries X = [row, column] with values y.

        Raises:
          ConfigError, DataError: one line with the value, the rule and the fix.
        """
        X, y, weights = _entries(X, y, sample_weight)
        options = self._options()  # whose types are checked
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"holdout is {self.holdout}; it must be in [0, 1)")
        if self.shape is None:
            row_ids, rows = np.unique(X[:, 0], return_inverse=True)
            col_ids, cols = np.unique(X[:, 1], return_inverse=True)
        else:
            row_ids, col_ids = map(np.arange, _checked_shape(self.shape))
            rows, cols = X.T
        shape = (len(row_ids), len(col_ids))
        ratings = Ratings(rows, cols, y, shape, weights)
        seed = self._seed()
        rank = default_rank(shape) if self.rank is None else self.rank
        key = jax.random.key(seed)
        train, valid = _split(ratings, self.holdout, seed)
        chosen = choose(train, valid, rank, options, key)
        factors = chosen.factors
        if valid is not None and self.refit:
            factors = fit_again(ratings, chosen, options, key)
        self.factors_, self.ridge_ = factors, chosen.ridge
        self.row_ids_, self.col_ids_ = row_ids, col_ids
        self.n_features_in_ = 2
        return self

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> MatrixCompleter:
        """Solve again for the rows in X from these entries, the columns held.

        Rows that are new are added. Without a fit before, this is `fit`.

        Raises:
          ConfigError, DataError: one line; a column that `fit` never saw.
        """
        if not hasattr(self, "factors_"):
            return self.fit(X, y, sample_weight)
        X, y, weights = _entries(X, y, sample_weight)
        cols = _places(self.col_ids_, X[:, 1])
        if (cols < 0).any():
            bad = int(np.argmax(cols < 0))
            raise DataError(
                f"X[{bad}, 1] is {X[bad, 1]}, a column that fit never saw; columns are "
                "held here: fit again with it"
            )
        known = _places(self.row_ids_, X[:, 0])
        new = np.unique(X[known < 0, 0])
        row_ids = np.concatenate([self.row_ids_, new.astype(self.row_ids_.dtype)])
        if (row_ids[len(self.row_ids_) :] != new).any():
            raise DataError(
                f"X holds {X.dtype} and fit saw {self.row_ids_.dtype}; give rows of "
                "one type of integers"
            )
        self.factors_ = partial_fit(
            self.factors_,
            _places(row_ids, X[:, 0]),
            cols,
            y,
            ridge=self.ridge_,
            bias_ridge=self.bias_ridge,
            ridge_power=self.ridge_power,
            weights=weights,
        )
        self.row_ids_ = row_ids
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the completed matrix at X = [row, column] pairs.

        Raises:
          NotFittedError: before `fit` (a ConfigError too).
          DataError: X isn't pairs of integers.
        """
        if not hasattr(self, "factors_"):
            raise NotFitted("this MatrixCompleter isn't fitted; call fit first")
        X = _pairs(X)
        rows, cols = _places(self.row_ids_, X[:, 0]), _places(self.col_ids_, X[:, 1])
        return predict_known(self.factors_, rows, cols)

    def _options(self) -> CompleterOptions:
        names = [field.name for field in dataclasses.fields(CompleterOptions)]
        return CompleterOptions(**{name: getattr(self, name) for name in names})

    def _seed(self) -> int:
        draw = check_random_state(self.random_state)
        if isinstance(self.random_state, Integral):
            return int(self.random_state)
        return int(draw.randint(2**31 - 1))


def _split(
    ratings: Ratings, holdout: float, seed: int
) -> tuple[Ratings, Ratings | None]:
    """Return entries to fit and entries that choose, if the fraction leaves any."""
    place, order = draw_positions(ratings.rows, ratings.cols, ratings.shape[1], seed)
    count = round(holdout * len(order))
    if not 0 < count < len(order):
        return ratings, None
    held = np.isin(place, order[:count])
    return ratings.take(np.flatnonzero(~held)), ratings.take(np.flatnonzero(held))


def _places(known: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the place of each id among the known ones, -1 for the others."""
    order = np.argsort(known, kind="stable")
    # One dtype: int64 beside uint64 would be searched as floats, but compares exactly.
    found = np.searchsorted(known, ids.astype(known.dtype), sorter=order)
    place = order[np.minimum(found, len(known) - 1)]
    return np.where(known[place] == ids, place, -1)


def _checked_shape(shape: Any) -> tuple[int, int]:
    """Return (rows, columns); ConfigError for anything but two whole numbers."""
    sizes = list(shape) if isinstance(shape, list | tuple) else []
    if len(sizes) != 2 or not all(
        isinstance(size, Integral) and 0 < int(size) < 2**31 for size in sizes
    ):
        raise ConfigError(
            f"shape is {shape!r}; give (rows, columns), whole numbers from 1 to "
            f"{2**31 - 1}, or None"
        )
    return int(sizes[0]), int(sizes[1])


def _array(name: str, given: Any) -> np.ndarray:
    """Return an array; DataError for lists of unequal lengths."""
    try:
        return np.asarray(given)
    except ValueError as error:
        raise DataError(f"{name} is no array: {first_line(error)}") from None


def _entries(X: Any, y: Any, weights: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    X = _pairs(X)
    y = _array("y", y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = np.asarray(column_or_1d(y, warn=True))
    if y.dtype.kind not in "biuf":
        if y.dtype.kind in "cMmV":
            raise DataError(f"y holds {y.dtype}; values must be real numbers")
        try:
            y = y.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"y must be numbers: {error}") from None
    if y.ndim != 1 or len(y) != len(X):
        raise DataError(
            f"X has {len(X)} entries and y has shape {y.shape}; give one value for each"
        )
    finite = np.isfinite(y)
    if not finite.all():
        bad = int(np.argmin(finite))
        raise DataError(
            f"y[{bad}] is {y[bad]} ({int((~finite).sum())} such); drop entries that "
            "aren't finite: what is unknown is left out"
        )
    if not len(X):
        raise DataError("there are 0 entries; completion needs at least one")
    if weights is not None:
        weights = _array("sample_weight", weights)
        if weights.shape not in ((), (len(X),)):
            raise DataError(
                f"X has {len(X)} entries and sample_weight has shape {weights.shape}; "
                "give one weight for each"
            )
        weights = np.full(len(X), weights) if not weights.ndim else weights
    return X, y, weights


def _pairs(X: Any) -> np.ndarray:
    X = _array("X", X)
    if X.ndim != 2 or X.shape[1] != 2:
        raise DataError(f"X has shape {X.shape}; it must be [entries, 2]: row, column")
    if X.dtype.kind == "O":
        X = np.array(X.tolist())  # of the type that holds them all
    whole = X.dtype.kind in "biu" or (
        X.dtype.kind == "f" and bool((np.floor(X) == X).all() & (abs(X) < 2**53).all())
    )
    if not whole:
        raise DataError(f"X holds {X.dtype}; rows and columns must be integers")
    return X if X.dtype.kind in "iu" else X.astype(np.int64)

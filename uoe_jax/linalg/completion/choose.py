"""A ridge and a number of sweeps, chosen on entries held out; then all are fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Key

from uoe_jax.linalg.completion.defaults import RIDGES, FitOptions
from uoe_jax.linalg.completion.factors import Factors
from uoe_jax.linalg.completion.fit import complete


class Ratings(NamedTuple):
    """Entries to fit, on the host."""

    rows: np.ndarray
    cols: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]
    weights: np.ndarray | None = None

    def take(self, where: np.ndarray) -> Ratings:
        """Return some of the entries."""
        weights = None if self.weights is None else self.weights[where]
        return Ratings(
            self.rows[where], self.cols[where], self.values[where], self.shape, weights
        )


class Listener(NamedTuple):
    """Who is told how the choice goes on."""

    # Called with a ridge before its fit; returns what each sweep calls.
    begin: Callable[[float], Callable[[dict], None] | None] = lambda ridge: None
    # Called with a ridge and its held-out error after the fit.
    tell: Callable[[float, float], None] = lambda ridge, error: None


QUIET = Listener()


class Chosen(NamedTuple):
    """The best fit, and what made it the best."""

    factors: Factors
    ridge: float
    sweeps: int


def draw_positions(
    rows: np.ndarray, cols: np.ndarray, num_cols: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return each entry's position and the positions in a random order.

    Entries of one position go into a split together: apart, the fit would have seen
    the answer.
    """
    key = rows.astype(np.int64) * num_cols + cols
    positions, place = np.unique(key, return_inverse=True)
    return place, np.random.default_rng(seed).permutation(len(positions))


def choose(
    train: Ratings,
    valid: Ratings | None,
    rank: int | str,
    options: FitOptions,
    key: Key[Array, ""],
    *,
    dtype: Any = np.float32,
    listener: Listener = QUIET,
) -> Chosen:
    """Return the best fit over the ridges to try.

    Args:
      train: entries to fit.
      valid: entries that choose; None: the ridge is the given one, or the values'
        standard deviation.
      rank: of the model, or "auto".
      options: of the fit.
      key: of the start.
      dtype: float32 or float64.
      listener: is told of each ridge and sweep.
    """
    if options.ridge is not None:
        ridges = [options.ridge]
    else:
        deviation = float(np.std(train.values, dtype=np.float64)) or 1.0
        ridges = [r * deviation for r in (RIDGES if valid else (1.0,))]
    found = []
    for ridge in ridges:
        once = dataclasses.replace(options, ridge=ridge)
        factors = fit(train, valid, rank, once, key, dtype, listener.begin(ridge))
        error = float(factors.info.get("valid_rmse", np.zeros(1)).min())
        found.append((error, ridge, factors))
        if len(ridges) > 1:
            listener.tell(ridge, error)
    _, ridge, factors = min(found, key=lambda line: line[0])
    return Chosen(factors, ridge, int(factors.info["best_sweep"]) + 1)


def fit_again(
    ratings: Ratings,
    chosen: Chosen,
    options: FitOptions,
    key: Key[Array, ""],
    dtype: Any = np.float32,
) -> Factors:
    """Return the fit of all entries by the rank, ridge and sweeps that were chosen."""
    once = dataclasses.replace(options, ridge=chosen.ridge, iters=chosen.sweeps)
    return fit(ratings, None, chosen.factors.rank, once, key, dtype)


def fit(
    train: Ratings,
    valid: Ratings | None,
    rank: int | str,
    options: FitOptions,
    key: Key[Array, ""],
    dtype: Any = np.float32,
    callback: Callable[[dict], None] | None = None,
) -> Factors:
    """Complete by these options; `ridge` is a number."""
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(FitOptions)}
    del given["refit"], given["holdout"]
    held = 0.0 if valid is None else (valid.rows, valid.cols, valid.values)
    return complete(
        train.rows,
        train.cols,
        train.values,
        train.shape,
        rank,
        weights=train.weights,
        holdout=held,
        dtype=dtype,
        key=key,
        callback=callback,
        **given,
    )

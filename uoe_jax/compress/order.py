"""Nested orders of channels, and the weights that make up for those left out.

A linear layer reads channels z with second moment C = E z^T z and writes z W. Keep the
first k channels of an order and the best weights for them, in least squares, are
`C_SS^-1 C_S: W`. With the order fixed, one Cholesky factor gives them for every k, and
the error that stays: see `Lift`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

LEVERAGE_RIDGE = 1e-2  # of scores, in units of the channels' mean second moment
RIDGE = 1e-7  # of the factor, likewise
_BLOCK = 64  # rows solved at once
_TRIES = 8  # of a ridge ten times larger each


class Lift(NamedTuple):
    """Channels in order, and what gives the best weights of the first k for any k.

    With C of the sorted channels = L L^T and M = L^T W, `C_SS^-1 C_S: W` is
    `L[:k, :k]^-T M[:k]`: the first rows of W, and what makes up for the others. The
    error of the output is the sum of squares of M[k:].
    """

    order: Int[np.ndarray, " F"]
    factor: Float[np.ndarray, "F F"]  # L
    rows: Float[np.ndarray, "F D"]  # W in order

    def weights(self, count: int) -> Float[np.ndarray, "K D"]:
        """Return the best weights of the first `count` channels."""
        kept, lost = self.rows[:count], self.rows[count:]
        return kept + solve_transposed(
            self.factor[:count, :count], self.factor[count:, :count].T @ lost
        )

    def errors(self) -> Float[np.ndarray, " F1"]:
        """Return the output's squared error with the first k channels, k = 0 to F."""
        return tail_sums(np.square(self.factor.T @ self.rows).sum(axis=1))


def make_lift(
    moment: Float[np.ndarray, "F F"],
    weights: Float[np.ndarray, "F D"],
    order: Int[np.ndarray, " F"],
    ridge: float = RIDGE,
) -> Lift:
    """Return the lift of sorted channels, in float64."""
    sorted_moment = moment[np.ix_(order, order)].astype(np.float64)
    factor = cholesky(sorted_moment, ridge)
    return Lift(order, factor, weights[order].astype(np.float64))


def cholesky(
    moment: Float[np.ndarray, "F F"], ridge: float = RIDGE
) -> Float[np.ndarray, "F F"]:
    """Return the lower factor of a moment with a ridge added to its diagonal.

    The ridge is relative to the mean of the diagonal; it grows tenfold as often as a
    moment that was summed in float32 needs it. Of nothing but zeros it is the identity.
    """
    size = len(moment)
    mean = float(np.trace(moment)) / size
    if mean <= 0:
        return np.eye(size)
    for attempt in range(_TRIES):
        added = ridge * 10**attempt * mean
        try:
            return np.linalg.cholesky(moment + added * np.eye(size))
        except np.linalg.LinAlgError:
            continue
    raise np.linalg.LinAlgError("the second moment has large negative eigenvalues")


def solve_transposed(
    factor: Float[np.ndarray, "K K"], right: Float[np.ndarray, "K D"]
) -> Float[np.ndarray, "K D"]:
    """Return X with `factor^T X = right` for a lower triangular factor, by halves."""
    size = len(factor)
    if size <= _BLOCK:
        return np.linalg.solve(factor.T, right)
    half = size // 2
    last = solve_transposed(factor[half:, half:], right[half:])
    rest = right[:half] - factor[half:, :half].T @ last
    return np.concatenate([solve_transposed(factor[:half, :half], rest), last])


def invert_triangle(factor: Float[np.ndarray, "K K"]) -> Float[np.ndarray, "K K"]:
    """Return the inverse of a lower triangular factor, by halves."""
    size = len(factor)
    if size <= _BLOCK:
        return np.linalg.inv(factor)
    half = size // 2
    found = np.zeros_like(factor)
    found[:half, :half] = first = invert_triangle(factor[:half, :half])
    found[half:, half:] = last = invert_triangle(factor[half:, half:])
    found[half:, :half] = -last @ (factor[half:, :half] @ first)
    return found


def leverage_scores(
    moment: Float[np.ndarray, "F F"], ridge: float = LEVERAGE_RIDGE
) -> Float[np.ndarray, " F"]:
    """Return each channel's ridge leverage score: diag(C (C + ridge I)^-1).

    MoDeGPT (Lin et al. 2024, algorithm 1) with a ridge relative to the mean of the
    diagonal, so that it doesn't depend on the number of tokens.
    """
    moment = moment.astype(np.float64)
    added = ridge * float(np.trace(moment)) / len(moment)
    if added <= 0:
        return np.zeros(len(moment))
    # The diagonal of the inverse of L L^T, a third of the work of the whole inverse.
    inverse = invert_triangle(cholesky(moment, ridge))
    return 1 - added * np.square(inverse).sum(axis=0)


def activity_scores(
    moment: Float[np.ndarray, "F F"], weights: Float[np.ndarray, "F D"]
) -> Float[np.ndarray, " F"]:
    """Return what each channel writes: its root mean square times its row's length."""
    lengths = np.linalg.norm(weights.astype(np.float64), axis=1)
    return np.sqrt(np.maximum(np.diag(moment), 0)) * lengths


def best_first(scores: Float[np.ndarray, " F"]) -> Int[np.ndarray, " F"]:
    """Return the channels by falling score; of equal ones the first comes first."""
    return np.argsort(-scores, kind="stable")


def tail_sums(values: Float[np.ndarray, " F"]) -> Float[np.ndarray, " F1"]:
    """Return the sum of values[k:] for k = 0 to F."""
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)


def dropping_errors(
    moment: Float[np.ndarray, "F F"],
    weights: Float[np.ndarray, "F D"],
    order: Int[np.ndarray, " F"],
) -> Float[np.ndarray, " F1"]:
    """Return the output's squared error with the first k channels, weights unchanged.

    `weights` are sorted already. What the others wrote is tr(W_R^T C_RR W_R).
    """
    moment = moment[np.ix_(order, order)].astype(np.float64)
    between = moment * (weights @ weights.T)
    # Of the square of channels k to F: its corner, and the rest of its row and column.
    return tail_sums(np.diag(between) + 2 * np.triu(between, 1).sum(axis=1))

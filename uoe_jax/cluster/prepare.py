"""Points made ready for clustering: a frame of their own, and few that stand for all.

What comes out doesn't depend on the order of the rows, nor on their units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

from uoe_jax.errors import DataError, shown

MAX_WIDTH = 32  # principal directions
ENERGY = 0.99  # of the variance that the directions hold
CORESET_ABOVE = 200_000  # points; more are stood for by
CORESET_SIZE = 10_000  # weighted points
_BLOCK = 1 << 16


def check_points(points: Shaped[np.ndarray, "*shape"]) -> Float[np.ndarray, "N P"]:
    """Return points as numbers of 64 bits.

    Raises DataError for what isn't a table of finite numbers, naming the first cell.
    """
    if points.dtype.kind not in "biuf":
        raise DataError(
            f"points are of type {points.dtype}; give numbers, a row a point"
        )
    if points.ndim != 2 or not points.size:
        raise DataError(
            f"points have shape {list(points.shape)}; give an array [points, features] "
            "with at least one of each"
        )
    points = points.astype(np.float64)
    if not np.isfinite(points).all():
        row, column = np.argwhere(~np.isfinite(points))[0]
        raise DataError(
            f"row {row}, column {column} is {shown(float(points[row, column]))}; leave "
            "out rows that aren't finite, or fill them in (rows count from 0)"
        )
    return points


def canonical_order(points: Float[np.ndarray, "N P"]) -> Int[np.ndarray, " N"]:
    """Return rows in an order that only what is in them decides: by their numbers.

    Rows that share the first number are few, mostly: only these are sorted by the rest.
    """
    order = np.argsort(points[:, 0], kind="stable")
    first = points[order, 0]
    same = np.r_[False, first[1:] == first[:-1]]
    tied = np.flatnonzero(same | np.r_[same[1:], False])
    some = order[tied]
    order[tied] = some[np.lexsort(points[some].T[::-1])]
    return order


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A change of coordinates: constant columns away, standardised, turned."""

    kept: Int[np.ndarray, " Q"]
    mean: Float[np.ndarray, " Q"]
    deviation: Float[np.ndarray, " Q"]
    axes: Float[np.ndarray, "Q P"]

    @property
    def width(self) -> int:
        """Dimensions that are left; 0 where all points are the same."""
        return self.axes.shape[1]

    def apply(self, points: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N P"]:
        """Return points in the new coordinates."""
        blocks = [
            (
                (points[i : i + _BLOCK, self.kept] - self.mean[None])
                / self.deviation[None]
            )
            @ self.axes
            for i in range(0, len(points), _BLOCK)
        ]
        return np.concatenate(blocks)


def make_frame(points: Float[np.ndarray, "N C"]) -> Frame:
    """Return the frame of points in canonical order.

    Principal axes of the standardised columns, as many as hold 99% of the variance,
    the largest loading of each positive.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    size = np.maximum(np.abs(low), np.abs(high))
    kept = np.flatnonzero(high - low > 1e-12 * size)
    if not kept.size:
        none = np.zeros(0)
        return Frame(kept=kept, mean=none, deviation=none, axes=np.zeros((0, 0)))
    # From the middle of the range on: sums of large offsets would lose digits.
    middle = 0.5 * (low + high)[kept]
    mean, square, count = np.zeros(len(kept)), np.zeros((len(kept),) * 2), len(points)
    for i in range(0, count, _BLOCK):
        mean += (points[i : i + _BLOCK, kept] - middle[None]).sum(axis=0)
    mean = middle + mean / count
    for i in range(0, count, _BLOCK):
        centred = points[i : i + _BLOCK, kept] - mean[None]
        square += centred.T @ centred
    deviation = np.sqrt(np.diagonal(square) / count)
    values, axes = np.linalg.eigh(square / count / np.outer(deviation, deviation))
    values, axes = np.maximum(values[::-1], 0), axes[:, ::-1]
    share = np.cumsum(values) / values.sum()
    width = min(int(np.searchsorted(share, ENERGY) + 1), MAX_WIDTH, len(kept))
    axes = axes[:, :width]
    largest = np.argmax(np.abs(axes).round(6), axis=0)
    axes = axes * np.sign(axes[largest, np.arange(width)])[None]
    return Frame(kept=kept, mean=mean, deviation=deviation, axes=axes)


def coreset(
    points: Float[np.ndarray, "N P"], size: int = CORESET_SIZE
) -> tuple[Int[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """Return which points stand for all, and for how many each.

    A lightweight coreset (Bachem, Lucic and Krause 2018): half of the chances are
    equal, half grow with the squared distance to the mean, and weights are the chances'
    inverse. Not drawn but taken at even steps along the points in their order.
    """
    count = len(points)
    distance = np.square(points - points.mean(axis=0)[None]).sum(axis=1)
    chance = 0.5 / count + 0.5 * distance / distance.sum()
    ends = np.cumsum(chance)
    chosen = np.searchsorted(ends, (np.arange(size) + 0.5) / size * ends[-1])
    chosen, times = np.unique(np.minimum(chosen, count - 1), return_counts=True)
    weights = times / (size * chance[chosen])
    return chosen, weights * (count / weights.sum())

"""k-means without chance: a start that the data decide on, and Lloyd's rounds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

ROUNDS = 100  # Lloyd's rounds end earlier where no point moves
DIGITS = 9  # of centres: below it lies what the number of threads changes
_BLOCK = 1 << 16  # points whose distances are in memory at once


class Parts(NamedTuple):
    """Points cut into parts: their centres and each point's part."""

    centres: Float[np.ndarray, "K P"]
    labels: Int[np.ndarray, " N"]


def lloyd(
    points: Float[np.ndarray, "N P"],
    centres: Float[np.ndarray, "K P"],
    weights: Float[np.ndarray, " N"] | None = None,
) -> Parts:
    """Return the parts that Lloyd's rounds end with from the given centres.

    A point belongs to its nearest centre, the first of equals. A centre that nobody is
    nearest to stays where it is.
    """
    labels = nearest(points, centres)
    for _ in range(ROUNDS):
        centres = part_means(points, labels, weights, centres)
        new = nearest(points, centres)
        if (new == labels).all():
            break
        labels = new
    return Parts(centres, labels)


def kmeans(
    points: Float[np.ndarray, "N P"],
    centres: Float[np.ndarray, "K P"],
    weights: Float[np.ndarray, " N"],
) -> Parts:
    """Return Lloyd's parts, mended: two are merged and one split while that gains.

    Lloyd's rounds keep a wrong start's mistake of two centres in one cluster and one
    in two. Each time the two parts that lose least together give a centre to the part
    that gains most by one.
    """
    parts = lloyd(points, centres, weights)
    error = squared_error(points, parts, weights)
    for _ in range(len(centres)):
        moved = _exchange(points, parts, weights)
        if moved is None:
            break
        new = lloyd(points, moved, weights)
        less = squared_error(points, new, weights)
        if less >= error * (1 - 1e-6):
            break
        parts, error = new, less
    return parts


def squared_error(
    points: Float[np.ndarray, "N P"], parts: Parts, weights: Float[np.ndarray, " N"]
) -> float:
    """Return the weighted sum of squared distances to the centres."""
    away = np.square(points - parts.centres[parts.labels]).sum(axis=1)
    return float(weights @ away)


def _exchange(
    points: np.ndarray, parts: Parts, weights: np.ndarray
) -> np.ndarray | None:
    """Return centres after the best merge and split; None if it costs more than that.

    A merge of a and b costs m_a m_b / (m_a + m_b) |c_a - c_b|^2.
    """
    centres, count = parts.centres, len(parts.centres)
    if count < 3:
        return None
    halves = [Split(points[on], weights[on]) for on in _members(parts.labels, count)]
    gains = np.array([half.gain() for half in halves])
    mass = np.bincount(parts.labels, weights, count)
    apart = np.square(centres[:, None] - centres[None]).sum(axis=2)
    both = np.maximum(mass[:, None] + mass[None], 1e-300)
    costs = mass[:, None] * mass[None] / both * apart
    split = int(np.argmax(gains))
    costs[split], costs[:, split] = np.inf, np.inf
    np.fill_diagonal(costs, np.inf)
    a, b = np.unravel_index(np.argmin(costs), costs.shape)
    cut = halves[split].centres(2)
    if cut is None or costs[a, b] >= gains[split]:
        return None
    moved = centres.copy()
    joined = mass[a] * centres[a] + mass[b] * centres[b]
    moved[a] = joined / max(mass[a] + mass[b], 1e-300)
    moved[split], moved[b] = cut
    return moved.round(DIGITS)


def _members(labels: np.ndarray, count: int) -> list[np.ndarray]:
    return [np.flatnonzero(labels == part) for part in range(count)]


def nearest(
    points: Float[np.ndarray, "N P"], centres: Float[np.ndarray, "K P"]
) -> Int[np.ndarray, " N"]:
    """Return the nearest centre of each point, the first of equals."""
    half = 0.5 * np.square(centres).sum(axis=1)
    blocks = range(0, len(points), _BLOCK)
    found = [
        np.argmax(points[i : i + _BLOCK] @ centres.T - half[None], 1) for i in blocks
    ]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def part_means(
    points: Float[np.ndarray, "N P"],
    labels: Int[np.ndarray, " N"],
    weights: Float[np.ndarray, " N"] | None,
    otherwise: Float[np.ndarray, "K P"],
) -> Float[np.ndarray, "K P"]:
    """Return the mean of each part, rounded; `otherwise` where a part is empty.

    Sums go through the points in order, so no number of threads changes them.
    """
    count = len(otherwise)
    mass = np.bincount(labels, weights, count)
    scaled = points if weights is None else points * weights[:, None]
    sums = [np.bincount(labels, column, count) for column in scaled.T]
    means = np.array(sums).reshape(-1, count).T / np.maximum(mass, 1e-300)[:, None]
    return np.where(mass[:, None] > 0, means, otherwise).round(DIGITS)


class Split:
    """Parts by splitting, one more each time: the start of k-means for every k.

    The part with the largest sum of squared errors is split at its mean along its
    first principal axis. Deterministic, and the parts for k + 1 refine those for k.
    """

    def __init__(
        self,
        points: Float[np.ndarray, "N P"],
        weights: Float[np.ndarray, " N"] | None = None,
    ):
        self._points = points
        self._weights = np.ones(len(points)) if weights is None else weights
        self._labels = np.zeros(len(points), np.int64)
        self._errors, self._means = [], []
        self._measure(0)

    def centres(self, count: int) -> Float[np.ndarray, "K P"] | None:
        """Return the means of `count` parts; None if the points can't be cut so often.

        Counts are asked for in ascending order.
        """
        while len(self._means) < count:
            worst = int(np.argmax(self._errors))
            if self._errors[worst] <= 1e-12 * len(self._points):
                return None
            members = np.flatnonzero(self._labels == worst)
            centred = self._points[members] - self._means[worst][None]
            along = centred @ self._axis(centred, self._weights[members])
            self._labels[members[along > 0]] = len(self._means)
            self._measure(worst)
            self._measure(len(self._means))
        return np.stack(self._means).round(DIGITS)

    def gain(self) -> float:
        """Return how much less the first cut leaves of the squared error."""
        before = self._errors[0]
        return 0.0 if self.centres(2) is None else before - sum(self._errors)

    def _axis(self, centred: np.ndarray, weights: np.ndarray) -> np.ndarray:
        scatter = centred.T @ (centred * weights[:, None])
        axis = np.linalg.eigh(scatter)[1][:, -1]
        return axis * np.sign(axis[np.argmax(np.abs(axis).round(6))])

    def _measure(self, part: int) -> None:
        members = self._labels == part
        points, weights = self._points[members], self._weights[members]
        mean = weights @ points / max(weights.sum(), 1e-300)
        error = float(weights @ np.square(points - mean[None]).sum(axis=1))
        self._means[part : part + 1] = [mean]
        self._errors[part : part + 1] = [error]

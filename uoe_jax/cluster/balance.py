"""Groups of equal size: experts of one width."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

_ROUNDS = 30  # k-means stops earlier where no point moves


def balanced_kmeans(
    points: Float[np.ndarray, "N P"], num_groups: int, seed: int = 0
) -> Int[np.ndarray, " N"]:
    """Return each point's group; all groups have N / num_groups members.

    Lloyd's rounds with centres of length 1, started as k-means++ (Arthur and
    Vassilvitskii 2007); the assignment under the size limit is greedy.
    """
    draw = np.random.default_rng(seed)
    centres = _first_centres(points, num_groups, draw)
    labels = np.full(len(points), -1)
    best, best_labels = -np.inf, labels
    for _ in range(_ROUNDS):
        likeness = points @ centres.T
        new = balanced_assignment(likeness)
        value = likeness[np.arange(len(points)), new].sum()
        if value > best:
            best, best_labels = value, new
        if (new == labels).all():
            break
        labels = new
        # A product: copies of each group's points would take longer.
        members = np.arange(num_groups)[:, None] == labels[None]
        centres = members.astype(points.dtype) @ points
        length = np.linalg.norm(centres, axis=1, keepdims=True)
        centres = centres / np.maximum(length, 1e-12)
    return best_labels


def balanced_assignment(likeness: Float[np.ndarray, "N K"]) -> Int[np.ndarray, " N"]:
    """Return a group for each point, N / K in each, preferring high likeness.

    In turns every free point asks for the group it is most like of those with room;
    a group takes first those that would lose most by going elsewhere. Then points of
    any two groups change places while both together gain.
    """
    count, groups = likeness.shape
    labels = np.full(count, -1)
    room = np.full(groups, count // groups)
    while (free := np.flatnonzero(labels < 0)).size:
        open_groups = np.flatnonzero(room)
        scores = likeness[np.ix_(free, open_groups)]
        ranked = np.sort(scores, axis=1)
        regret = ranked[:, -1] - ranked[:, -min(2, len(open_groups))]
        wanted = open_groups[scores.argmax(axis=1)]
        for group in open_groups:
            asking = np.flatnonzero(wanted == group)
            taken = asking[np.argsort(-regret[asking], kind="stable")][: room[group]]
            labels[free[taken]] = group
            room[group] -= len(taken)
    return _exchange(likeness, labels)


def _exchange(likeness: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return labels after every exchange of two points that gains likeness."""
    groups = likeness.shape[1]
    least = 1e-9 * max(float(np.abs(likeness).max()), 1e-300)
    changed = True
    while changed:
        changed = False
        for a in range(groups):
            for b in range(a + 1, groups):
                gain = likeness[:, b] - likeness[:, a]
                ours, theirs = np.flatnonzero(labels == a), np.flatnonzero(labels == b)
                ours = ours[np.argsort(-gain[ours], kind="stable")]
                theirs = theirs[np.argsort(gain[theirs], kind="stable")]
                count = np.count_nonzero(gain[ours] - gain[theirs] > least)
                labels[ours[:count]], labels[theirs[:count]] = b, a
                changed |= count > 0
    return labels


def _first_centres(
    points: np.ndarray, num_groups: int, draw: np.random.Generator
) -> np.ndarray:
    chosen = [int(draw.integers(len(points)))]
    nearest = np.full(len(points), np.inf)
    for _ in range(num_groups - 1):
        distance = 2 - 2 * points @ points[chosen[-1]]
        nearest = np.minimum(nearest, np.maximum(distance, 0))
        total = nearest.sum()
        weights = nearest / total if total > 0 else None
        chosen.append(int(draw.choice(len(points), p=weights)))
    return points[chosen]

"""Groups of equal size: experts of one width."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

_ROUNDS = 30  # k-means stops earlier where no point moves


def balanced_kmeans(
    points: Float[np.ndarray, "N P"], num_groups: int, seed: int = 0
) -> Int[np.ndarray, " N"]:
    """Return each point's group; all groups have N / num_groups members.

    Points are rows of length 1; see `balanced_kmeans_of`.
    """
    return balanced_kmeans_of(points @ points.T, num_groups, seed)


def balanced_kmeans_of(
    products: Float[np.ndarray, "N N"], num_groups: int, seed: int = 0
) -> Int[np.ndarray, " N"]:
    """Return what `balanced_kmeans` does, of points whose products are given.

    Lloyd's rounds with centres of length 1, started as k-means++ (Arthur and
    Vassilvitskii 2007). A centre is a sum of points, so that products tell how like a
    point is to it (Dhillon, Guan and Kulis 2004, kernel k-means): profiles of many
    thousand numbers are read once, not in every round.
    """
    draw, count = np.random.default_rng(seed), len(products)
    likeness = products[:, _first_centres(products, num_groups, draw)]
    labels = np.full(count, -1)
    best, best_labels = -np.inf, labels
    for _ in range(_ROUNDS):
        new = balanced_assignment(likeness)
        value = likeness[np.arange(count), new].sum()
        if value > best:
            best, best_labels = value, new
        if (new == labels).all():
            break
        labels = new
        members = (labels[:, None] == np.arange(num_groups)[None]).astype(
            products.dtype
        )
        sums = products @ members
        length = np.sqrt(np.maximum((members * sums).sum(axis=0), 0))
        likeness = sums / np.maximum(length, 1e-12)[None]
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
        most = scores.argmax(axis=1)
        wanted = open_groups[most]
        first = scores[np.arange(len(free)), most]
        if len(open_groups) > 1:
            scores[np.arange(len(free)), most] = -np.inf
        regret = first - scores.max(axis=1)
        order = np.lexsort((-regret, wanted))  # each group's, dearest first
        asking = np.bincount(wanted, minlength=groups)
        place = np.arange(len(free)) - (asking.cumsum() - asking)[wanted[order]]
        taken = order[place < room[wanted[order]]]
        labels[free[taken]] = wanted[taken]
        room -= np.minimum(asking, room)
    return _exchange(likeness, labels)


def _exchange(likeness: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return labels after every exchange of two points that gains likeness.

    Pairs of groups are visited in order, again and again while any exchanges. The most
    that a move from one group to another gains is kept, so that only pairs that gain
    are looked at.
    """
    groups = likeness.shape[1]
    least = 1e-9 * max(float(np.abs(likeness).max()), 1e-300)
    members = [np.flatnonzero(labels == group) for group in range(groups)]
    gains = np.array([_best_moves(likeness, members, a) for a in range(groups)])
    upper = np.triu(np.ones((groups, groups), bool), 1).ravel()
    at, changed = 0, False
    while True:
        both = (gains + gains.T).ravel()
        left = np.flatnonzero((both[at:] > least) & upper[at:])
        if not len(left):
            if not changed:
                break
            at, changed = 0, False
            continue
        at += int(left[0])
        a, b = divmod(at, groups)
        gain = likeness[:, b] - likeness[:, a]
        ours = members[a][np.argsort(-gain[members[a]], kind="stable")]
        theirs = members[b][np.argsort(gain[members[b]], kind="stable")]
        count = np.count_nonzero(gain[ours] - gain[theirs] > least)
        members[a] = np.sort(np.concatenate([theirs[:count], ours[count:]]))
        members[b] = np.sort(np.concatenate([ours[:count], theirs[count:]]))
        gains[a], gains[b] = (_best_moves(likeness, members, g) for g in (a, b))
        at, changed = at + 1, True
    for group, inside in enumerate(members):
        labels[inside] = group
    return labels


def _best_moves(
    likeness: np.ndarray, members: list[np.ndarray], group: int
) -> np.ndarray:
    """Return the most that any point of a group gains by going to each other one."""
    inside = likeness[members[group]]
    return (inside - inside[:, group : group + 1]).max(axis=0)


def _first_centres(
    products: np.ndarray, num_groups: int, draw: np.random.Generator
) -> list[int]:
    chosen = [int(draw.integers(len(products)))]
    nearest = np.full(len(products), np.inf)
    for _ in range(num_groups - 1):
        distance = 2 - 2 * products[chosen[-1]]
        nearest = np.minimum(nearest, np.maximum(distance, 0))
        total = nearest.sum()
        weights = nearest / total if total > 0 else None
        chosen.append(int(draw.choice(len(products), p=weights)))
    return chosen

"""Which neurons become an expert together: as they are, random, or by co-activation."""

from __future__ import annotations

from typing import get_args

import numpy as np
from jaxtyping import Float, Int

from uoe_jax.decompose.cut import Grouping
from uoe_jax.errors import ConfigError, choose

GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)

_ROUNDS = 30  # k-means stops earlier where no neuron moves


def order_neurons(
    grouping: Grouping,
    num_experts: int,
    num_neurons: int,
    *,
    seed: int = 0,
    contributions: Float[np.ndarray, "N F"] | None = None,
) -> Int[np.ndarray, " F"]:
    """Return one layer's neurons in the order in which to cut them into experts.

    Args:
      contributions: what `contributions` returns; for "coactivation" only.
    """
    if grouping == "contiguous":
        return np.arange(num_neurons)
    draw = np.random.default_rng(seed)
    if grouping == "random":
        return draw.permutation(num_neurons)
    choose("grouping", grouping, {"coactivation": None})
    if contributions is None:
        raise ConfigError("grouping by co-activation needs calibration data")
    return coactivation_order(contributions, num_experts, seed)


def contributions(
    neurons: Float[np.ndarray, "N F"], w_down: Float[np.ndarray, "F D"]
) -> Float[np.ndarray, "N F"]:
    """Return how much each neuron writes to the residual: |activation| |w_down row|."""
    return np.abs(neurons) * np.linalg.norm(w_down, axis=1)[None]


def coactivation_order(
    contributions: Float[np.ndarray, "N F"], num_experts: int, seed: int = 0
) -> Int[np.ndarray, " F"]:
    """Return the neurons grouped into equal experts of those that are active together.

    Balanced k-means on the neurons' profiles over N tokens, each with its mean taken
    off and scaled to length 1: a distance then measures the correlation of two
    neurons' contributions. MoEfication (Zhang et al. 2022, section 3.1) groups by
    co-activation too, by cutting its graph. Ties and starts depend on the seed only.
    """
    profiles = (contributions - contributions.mean(axis=0)[None]).T
    length = np.linalg.norm(profiles, axis=1, keepdims=True)
    profiles = profiles / np.maximum(length, 1e-12)
    labels = balanced_kmeans(profiles, num_experts, seed)
    return np.argsort(labels, kind="stable")


def balanced_kmeans(
    points: Float[np.ndarray, "F N"], num_groups: int, seed: int = 0
) -> Int[np.ndarray, " F"]:
    """Return each point's group; all groups have F / num_groups members.

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


def balanced_assignment(likeness: Float[np.ndarray, "F E"]) -> Int[np.ndarray, " F"]:
    """Return a group for each point, F / E in each, preferring high likeness.

    In turns every free point asks for the group it is most like of those with room;
    a group takes first those that would lose most by going elsewhere.
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

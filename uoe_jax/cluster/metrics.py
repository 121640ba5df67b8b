"""How good clusters are: against known classes, and by the ranks of their features."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Shaped

from uoe_jax.errors import extra_packages

ENERGY = 0.95  # of the squared singular values: what a numerical rank has to hold


def contingency(
    labels: Shaped[np.ndarray, " N"], classes: Shaped[np.ndarray, " N"]
) -> Int[np.ndarray, "K C"]:
    """Return how many points each cluster has of each class."""
    rows, row = np.unique(labels, return_inverse=True)
    cols, col = np.unique(classes, return_inverse=True)
    table = np.zeros((len(rows), len(cols)), np.int64)
    np.add.at(table, (row, col), 1)
    return table


def accuracy(
    labels: Shaped[np.ndarray, " N"], classes: Shaped[np.ndarray, " N"]
) -> float:
    """Return ACC: the share of right labels once clusters are matched to classes.

    One cluster a class, by the best linear assignment (scipy, of the extra `data`).
    """
    with extra_packages():
        from scipy.optimize import linear_sum_assignment

    table = contingency(labels, classes)
    rows, cols = linear_sum_assignment(-table)
    return float(table[rows, cols].sum() / len(labels))


def mutual_information(
    labels: Shaped[np.ndarray, " N"], classes: Shaped[np.ndarray, " N"]
) -> float:
    """Return NMI: mutual information over the mean of both entropies; 1: the same.

    Two labellings that each have one cluster only are the same.
    """
    joint = contingency(labels, classes) / len(labels)
    first, second = joint.sum(axis=1), joint.sum(axis=0)
    entropy = lambda p: -float(np.sum(p[p > 0] * np.log(p[p > 0])))
    both = entropy(first) + entropy(second)
    if both == 0:
        return 1.0
    return float(2 * max(both - entropy(joint.ravel()), 0.0) / both)


def adjusted_rand(
    labels: Shaped[np.ndarray, " N"], classes: Shaped[np.ndarray, " N"]
) -> float:
    """Return ARI: agreement of two labellings on pairs, 0 by chance and 1 at best.

    Hubert and Arabie 1985, equation 5.
    """
    table = contingency(labels, classes)
    pairs = lambda n: float((n * (n - 1) // 2).sum())
    first, second = pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    total = pairs(np.array([len(labels)]))
    chance = first * second / total if total else 0.0
    most = 0.5 * (first + second)
    if most == chance:
        return 1.0
    return (pairs(table) - chance) / (most - chance)


def numerical_rank(z: Float[np.ndarray, "N D"]) -> int:
    """Return the fewest directions that hold 95% of the squared singular values."""
    gram = z.T @ z if len(z) > z.shape[1] else z @ z.T
    energy = np.maximum(np.linalg.eigvalsh(gram.astype(np.float64))[::-1], 0)
    if not energy.size or energy[0] <= 0:
        return 0
    share = np.cumsum(energy) / energy.sum()
    return int(np.searchsorted(share, ENERGY) + 1)

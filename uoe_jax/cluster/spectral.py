"""Clusters of a graph: spectral embedding of an affinity, and labels from it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import eigh

from uoe_jax.cluster.kmeans import lloyd
from uoe_jax.errors import ConfigError


def spectral_embedding(
    affinity: Float[np.ndarray, "N N"], num_clusters: int
) -> Float[np.ndarray, "N K"]:
    """Return each point as a row of length 1: near rows where clusters are.

    The first eigenvectors of D^-1/2 A D^-1/2, A made symmetric and D its row sums (Ng,
    Jordan and Weiss 2001). Signs don't matter to distances. A point without any
    affinity has the row zero.
    """
    count = len(affinity)
    if not 1 <= num_clusters <= count:
        raise ConfigError(
            f"the number of clusters is {num_clusters}; it must be 1 to {count}, the "
            "number of points"
        )
    graph = 0.5 * (affinity + affinity.T).astype(np.float64)
    degree = np.maximum(graph.sum(axis=1), 0)
    scale = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
    graph = graph * scale[:, None] * scale[None]
    last = [count - num_clusters, count - 1]
    vectors = eigh(graph, subset_by_index=last, check_finite=False)[1]
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(length, 1e-12)


def spectral_labels(
    affinity: Float[np.ndarray, "N N"], num_clusters: int
) -> Int[np.ndarray, " N"]:
    """Return each point's cluster, by k-means on the spectral embedding.

    k-means starts at the rows that pivoting picks, each the one farthest from what the
    rows before it span (Damle, Minden and Ying 2019): no chance is involved.
    """
    rows = spectral_embedding(affinity, num_clusters)
    return lloyd(rows, rows[_pivots(rows, num_clusters)]).labels


def _pivots(rows: Float[np.ndarray, "N K"], count: int) -> list[int]:
    """Return the rows that QR with pivoting takes; the first of equals to 9 digits."""
    left, chosen = rows.copy(), []
    for _ in range(count):
        lengths = np.square(left).sum(axis=1).round(9)
        lengths[chosen] = -1
        best = int(np.argmax(lengths))
        chosen.append(best)
        axis = left[best] / max(float(np.linalg.norm(left[best])), 1e-12)
        left = left - np.outer(left @ axis, axis)
    return chosen

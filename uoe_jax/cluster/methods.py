"""Four ways to cluster an array, asked and answered alike, to be set side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from uoe_jax.cluster.method import Method
from uoe_jax.cluster.metrics import (
    accuracy,
    adjusted_rand,
    mutual_information,
    numerical_rank,
)
from uoe_jax.cluster.mlc import MLC
from uoe_jax.cluster.ppp import PPP
from uoe_jax.cluster.prepare import make_frame
from uoe_jax.errors import ConfigError, extra_packages


@dataclass(frozen=True, kw_only=True)
class Clustered:
    """What a method makes of points."""

    method: Method
    labels: Int[np.ndarray, " N"]
    sizes: list[int]
    # Of a cluster's features; where points are their own, around the cluster's mean.
    ranks: list[int]
    how: str  # where the number of clusters is from
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)
    # Accuracy, normalised mutual information and adjusted Rand index against classes.
    scores: dict[str, float] = field(default_factory=dict)


def cluster_points(
    points: Float[np.ndarray, "N P"],
    method: Method,
    num_clusters: int | None,
    *,
    classes: Shaped[np.ndarray, " N"] | None = None,
    seed: int = 0,
) -> Clustered:
    """Return clusters of points; None: as many as PPP finds.

    With known `classes` they are scored. `seed` is of what is drawn: MLC's network and
    anchors, and the starts of k-means; PPP draws nothing.

    ppp: PPP. mlc: MLC with its network. spectral: MLC's affinity of the points'
    directions alone. kmeans: scikit-learn's, on standardised principal axes.

    Raises ConfigError for more clusters than points, DataError for bad points.
    """
    if num_clusters is not None and num_clusters > len(points):
        raise ConfigError(
            f"k is {num_clusters} and there are {len(points)} points; ask for no more "
            "clusters than points"
        )
    begun = perf_counter()
    how = "given" if num_clusters is not None else "found by PPP among points"
    details: dict[str, Any] = {}
    features, centred = points, True
    if method in ("mlc", "spectral"):
        network = method == "mlc"
        mlc = MLC(num_clusters=num_clusters, network=network, seed=seed).fit(points)
        labels, features, centred = mlc.labels, mlc.features, False
        details = mlc.report()
        if num_clusters is None:
            how = "found by PPP among features"
    elif method == "ppp":
        ppp = PPP(num_clusters=num_clusters).fit(points)
        labels, details = ppp.labels, ppp.report()
    else:
        labels = _kmeans(points, num_clusters or PPP().fit(points).found, seed)
    sizes = np.bincount(labels)
    parts = [features[labels == j] for j in range(len(sizes))]
    ranks = [numerical_rank(p - p.mean(axis=0)[None] if centred else p) for p in parts]
    return Clustered(
        method=method,
        labels=labels,
        sizes=sizes.tolist(),
        ranks=ranks,
        how=how,
        seconds=perf_counter() - begun,
        details=details,
        scores={} if classes is None else _scores(labels, classes),
    )


def _scores(
    labels: Int[np.ndarray, " N"], classes: Shaped[np.ndarray, " N"]
) -> dict[str, float]:
    return {
        "accuracy": accuracy(labels, classes),
        "nmi": mutual_information(labels, classes),
        "ari": adjusted_rand(labels, classes),
    }


def _kmeans(points: np.ndarray, count: int, seed: int) -> Int[np.ndarray, " N"]:
    """Return scikit-learn's labels, the best of ten starts; the largest part first."""
    with extra_packages():
        from sklearn.cluster import KMeans

    turned = make_frame(points).apply(points)
    if len(np.unique(turned, axis=0)) < count:
        raise ConfigError(
            f"k is {count} and the points have fewer different values; ask for fewer"
        )
    if count == 1:
        return np.zeros(len(points), np.int64)
    found = KMeans(count, n_init=10, random_state=seed).fit(turned)
    labels = np.asarray(found.labels_, np.int64)
    sizes = np.bincount(labels, minlength=count)
    place = np.empty(count, np.int64)
    place[np.argsort(-sizes, kind="stable")] = np.arange(count)
    return place[labels]

"""Ways to cluster features, and a row of figures for each."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.mixture import GaussianMixture

from experiments.e011_clusters.record import Record
from experiments.e011_clusters.training import Scale
from uoe_jax.cluster.metrics import (
    accuracy,
    adjusted_rand,
    mutual_information,
    numerical_rank,
)
from uoe_jax.cluster.objective import membership
from uoe_jax.cluster.spectral import spectral_labels

ANCHORS = 2048  # points whose labels are from the spectrum; others: nearest subspace


def by_affinity(z: np.ndarray, c: np.ndarray, k: int, eta: float) -> np.ndarray:
    """Return labels by the spectrum of Sinkhorn(C C^T / eta), the rest by subspaces."""
    draw = np.random.default_rng(0)
    anchors = draw.choice(len(z), min(ANCHORS, len(z)), replace=False)
    found = spectral_labels(
        np.asarray(membership(jnp.asarray(c[anchors]), eta, False)), k
    )
    held = []
    for j in range(k):
        part = z[anchors][found == j]
        axes = np.linalg.eigh(part.T @ part)[1][:, ::-1][:, : numerical_rank(part)]
        held.append(np.square(z @ axes).sum(axis=1))
    labels = np.argmax(held, axis=0)
    labels[anchors] = found
    return labels


def methods(
    features: str, z: np.ndarray, c: np.ndarray, k: int, scale: Scale
) -> dict[str, Callable[[], np.ndarray]]:
    """Return every way to cluster features, the most telling first."""
    own = "with network" if features == "MLC" else "affinity only"
    found: dict[str, Callable[[], np.ndarray]] = {}
    for eta in sorted({scale.eta, 0.1, 0.05}, reverse=True):
        name = f"MLC, {own}, eta {eta:g}"
        found[name] = functools.partial(by_affinity, z, c, k, eta)
    found["k-means"] = lambda: KMeans(k, n_init=10, random_state=0).fit_predict(z)
    for kind in ("full", "diag"):
        mixture = GaussianMixture(
            k, covariance_type=kind, reg_covar=1e-4, random_state=0
        )
        found[f"Gaussian mixture, {kind}"] = functools.partial(mixture.fit_predict, z)
    spectral = SpectralClustering(
        k, affinity="nearest_neighbors", n_neighbors=20, random_state=0
    )
    found["spectral, 20 neighbours"] = lambda: spectral.fit_predict(z)
    return found


def add_rows(
    features: str,
    ways: dict[str, Callable[[], np.ndarray]],
    classes: np.ndarray,
    record: Record,
    seed: int,
) -> None:
    """Cluster features by each method whose row is missing; write after each."""
    rows = record.seed(seed)["rows"]
    done = {(row["features"], row["method"]) for row in rows}
    for method, labels_of in ways.items():
        if (features, method) in done:
            continue
        begun = time.perf_counter()
        labels = labels_of()
        row = {
            "features": features,
            "method": method,
            "acc": accuracy(labels, classes),
            "nmi": mutual_information(labels, classes),
            "ari": adjusted_rand(labels, classes),
            "seconds": time.perf_counter() - begun,
            "commit": record.found["commit"],
        }
        rows.append(row)
        figures = f"ACC {row['acc']:.3f} NMI {row['nmi']:.3f} ARI {row['ari']:.3f}"
        record.write(
            f"seed {seed}, {features}, {method}: {figures}, {row['seconds']:.1f} s"
        )

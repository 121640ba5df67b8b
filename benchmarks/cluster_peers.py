"""How many clusters PPP finds, beside BIC, the gap statistic and HDBSCAN.

    python benchmarks/cluster_peers.py --out benchmarks/results/cluster_peers.json

Ten sets, those that are drawn with several seeds. All methods get the same points:
constant columns away, standardised, principal axes with 99% of the variance. BIC is
scikit-learn's mixture with full covariances; the gap statistic is Tibshirani, Walther
and Hastie 2001 with ten uniform references; HDBSCAN is scikit-learn's with its usual
settings. Each set is written as soon as it is done, and what is there isn't done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn import __version__, datasets
from sklearn.cluster import HDBSCAN, KMeans
from sklearn.mixture import GaussianMixture

from uoe_jax.bench.record import (
    arguments,
    header,
    processor,
    read_record,
    write_record,
)
from uoe_jax.cluster import PPP
from uoe_jax.cluster.metrics import adjusted_rand
from uoe_jax.cluster.prepare import make_frame

MOST = 12  # clusters that BIC and the gap statistic try; digits have ten
Points = tuple[np.ndarray, np.ndarray]


def blobs(clusters: int, width: int, apart: float) -> Callable[[int], Points]:
    """Return what draws round clusters, centres uniform in a cube of side `apart`."""

    def make(seed: int) -> Points:
        draw = np.random.default_rng(seed)
        centres = draw.uniform(0, apart, size=(clusters, width))
        label = draw.integers(clusters, size=120 * clusters)
        return centres[label] + draw.normal(size=(len(label), width)), label

    return make


def one(kind: str, width: int) -> Callable[[int], Points]:
    """Return what draws 600 points of one cluster."""
    draw = lambda seed: getattr(np.random.default_rng(seed), kind)(size=(600, width))
    return lambda seed: (draw(seed), np.zeros(600, int))


def parallel(seed: int) -> Points:
    """Three long Gaussians side by side."""
    draw = np.random.default_rng(seed)
    label = draw.integers(3, size=600)
    points = draw.normal(size=(600, 2)) * [8, 0.5]
    points[:, 1] += 4 * label
    return points, label


def unequal(seed: int) -> Points:
    """Four round clusters of 400, 150, 60 and 30 points and different widths."""
    draw = np.random.default_rng(seed)
    label = np.repeat(np.arange(4), [400, 150, 60, 30])
    centres = np.array([[0, 0, 0], [12, 0, 0], [0, 12, 0], [0, 0, 12.0]])
    spread = np.array([1.5, 1.0, 0.7, 0.5])[label, None]
    return centres[label] + spread * draw.normal(size=(len(label), 3)), label


def stored(load: Callable[[], Any]) -> Callable[[int], Points]:
    return lambda seed: ((found := load()).data, found.target)


# name -> how it is made, the true number, whether it is drawn
SETS: dict[str, tuple[Callable[[int], Points], int, bool]] = {
    "5 round clusters, 2 dimensions": (blobs(5, 2, 40), 5, True),
    "5 round clusters, 16 dimensions": (blobs(5, 16, 8), 5, True),
    "8 round clusters, 16 dimensions": (blobs(8, 16, 8), 8, True),
    "4 clusters of unequal size": (unequal, 4, True),
    "one Gaussian": (one("normal", 4), 1, True),
    "uniform cube": (one("uniform", 3), 1, True),
    "3 long parallel Gaussians": (parallel, 3, True),
    "iris": (stored(datasets.load_iris), 3, False),
    "wine": (stored(datasets.load_wine), 3, False),
    "digits": (stored(datasets.load_digits), 10, False),
}


def by_ppp(points: np.ndarray, seed: int) -> np.ndarray:
    del seed
    return PPP().fit(points).labels


def by_bic(points: np.ndarray, seed: int) -> np.ndarray:
    best = np.inf, np.zeros(len(points), int)
    for k in range(1, MOST + 1):
        mixture = GaussianMixture(k, n_init=2, reg_covar=1e-4, random_state=seed)
        labels = mixture.fit_predict(points)
        best = min(best, (mixture.bic(points), labels), key=lambda pair: pair[0])
    return best[1]


def by_gap(points: np.ndarray, seed: int, references: int = 10) -> np.ndarray:
    """Return k-means' labels for the least k with gap(k) >= gap(k + 1) - s(k + 1)."""
    draw = np.random.default_rng(seed)
    low, high = points.min(axis=0), points.max(axis=0)
    uniform = [draw.uniform(low, high, size=points.shape) for _ in range(references)]

    def within(x: np.ndarray, k: int) -> tuple[float, np.ndarray]:
        fit = KMeans(k, n_init=3, random_state=seed).fit(x)
        return float(np.log(fit.inertia_)), fit.labels_

    gaps, spreads, labels = [], [], []
    for k in range(1, MOST + 1):
        mine, found = within(points, k)
        logs = np.array([within(x, k)[0] for x in uniform])
        gaps.append(logs.mean() - mine)
        spreads.append(logs.std() * np.sqrt(1 + 1 / references))
        labels.append(found)
        if k > 1 and gaps[-2] >= gaps[-1] - spreads[-1]:
            return labels[-2]
    return labels[-1]


def by_hdbscan(points: np.ndarray, seed: int) -> np.ndarray:
    """Return labels; -1 is no cluster."""
    del seed
    return HDBSCAN(copy=True).fit_predict(points)


METHODS = {"PPP": by_ppp, "BIC": by_bic, "gap": by_gap, "HDBSCAN": by_hdbscan}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    results: dict[str, Any] = {"sets": read_record(options.out).get("sets", {})}
    results |= header(stated=options.commit, device=processor())
    results["scikit-learn"] = __version__
    for name, (make, true, drawn) in SETS.items():
        if name in results["sets"]:
            continue
        found: dict[str, Any] = {"true": true}
        for method, cluster in METHODS.items():
            begun = time.perf_counter()
            numbers, scores = [], []
            for seed in range(options.seeds if drawn else 1):
                points, classes = make(seed)
                turned = make_frame(points).apply(points)
                labels = cluster(points if method == "PPP" else turned, seed)
                numbers.append(len(set(labels.tolist()) - {-1}))
                scores.append(round(adjusted_rand(labels, classes), 4))
            seconds = (time.perf_counter() - begun) / len(numbers)
            found[method] = {"found": numbers, "ari": scores, "seconds": seconds}
        results["sets"][name] = found
        write_record(options.out, results)
        row = {method: found[method]["found"] for method in METHODS}
        print(f"{name}: {true}, {row}", flush=True)


if __name__ == "__main__":
    main()

"""How many clusters there are, and which: the same answer for any order and any start.

Probabilistic partitive partitioning (Kumar 2020, arXiv 2003.04372) has k-means make
partitions and a Gaussian mixture confirm them. Only the paper's abstract could be read:
how it is done here is this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from uoe_jax.cluster.kmeans import Split, kmeans, nearest, part_means
from uoe_jax.cluster.mixture import Mixture, choose_covariance, grow_mixture
from uoe_jax.cluster.prepare import (
    CORESET_ABOVE,
    CORESET_SIZE,
    Frame,
    canonical_order,
    check_points,
    coreset,
    make_frame,
)
from uoe_jax.errors import ConfigError
from uoe_jax.fields import Checked, Count, Fraction

SURE = 0.95  # posterior of a point of the core


class Tried(NamedTuple):
    """One number of clusters: what the mixture makes of k-means' parts."""

    num_clusters: int
    agreement: float  # least Jaccard index of a part and its component
    icl: float  # integrated completed likelihood, BIC + 2 entropy: less is better
    bic: float
    covariance: str

    def separable(self, least: float) -> bool:
        """Whether the mixture confirms the parts."""
        return self.num_clusters == 1 or self.agreement >= least


@dataclass(kw_only=True)
class PPP(Checked):
    """Clusters, and their number, that k-means and a Gaussian mixture agree on.

    For every k: k-means from a start that the data decide on, then a mixture grown from
    those parts. A k is separable if the mixture keeps every part: the Jaccard index of
    part and component is at least `agreement`. Of the separable k that with the best
    ICL is taken; one cluster is always separable. A point's label is the component that
    it belongs to most. Order of rows, threads, shifts and scales change no label but
    those of points as near to two parts.

    After `fit`: `labels`, `core`, `num_clusters`, `tried`.
    """

    num_clusters: Count | None = None  # None: found

    max_clusters: Count = 64  # at most; nor more than the root of the points' number

    agreement: Fraction = 0.95  # of parts and components in a separable partition

    # So many further k without a better ICL end the search.
    patience: Count = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels: Any = None
        self.core: Any = None
        self.tried: list[Tried] = []

    def fit(self, points: Shaped[np.ndarray, "*shape"]) -> PPP:
        """Cluster points, a row each, and return self.

        Raises DataError for points that aren't finite numbers in a table, ConfigError
        for more clusters than points or than there are different points.
        """
        points = check_points(points)
        if self.num_clusters and self.num_clusters > len(points):
            raise ConfigError(
                f"num_clusters is {self.num_clusters} and there are {len(points)} "
                "points; ask for no more clusters than points"
            )
        order = canonical_order(points)
        points = points[order]
        self._frame: Frame = make_frame(points)
        turned = self._frame.apply(points)
        few, weights = turned, np.ones(len(turned))
        if len(turned) > CORESET_ABOVE and self._frame.width:
            chosen, weights = coreset(turned, CORESET_SIZE)
            few = turned[chosen]
        self._search(few, weights)
        if few is not turned:  # a round on all points: the sample has told the place
            parts = nearest(turned, self._centres)
            self._centres = part_means(turned, parts, None, self._centres)
        found, sure = self._assign(turned)
        self._number(found)
        labels, core = np.empty(len(order), np.int64), np.empty(len(order), bool)
        labels[order], core[order] = self._numbers[found], sure
        self.labels, self.core = labels, core
        return self

    def predict(self, points: Shaped[np.ndarray, "*shape"]) -> Int[np.ndarray, " N"]:
        """Return the cluster of each point, in the fitted ones' numbers.

        Raises ConfigError before `fit`, DataError as `fit` does.
        """
        if self.labels is None:
            raise ConfigError("PPP has no clusters yet; call fit(points) first")
        turned = self._frame.apply(check_points(points))
        return self._numbers[self._assign(turned)[0]]

    @property
    def found(self) -> int:
        """Clusters that were found."""
        return len(self._centres)

    def report(self) -> dict[str, Any]:
        """Return the clusters' number and sizes, the core's share, and each k tried."""
        return {
            "num_clusters": self.found,
            "sizes": np.bincount(self.labels, minlength=self.found).tolist(),
            "core": float(self.core.mean()),
            "dimensions": self._frame.width,
            "tried": [
                {**t._asdict(), "separable": t.separable(self.agreement)}
                for t in self.tried
            ],
        }

    def _search(self, few: np.ndarray, weights: np.ndarray) -> None:
        """Try numbers of clusters; keep the parts and the mixture of the best."""
        self.tried, mass = [], float(weights.sum())
        most = min(int(np.ceil(np.sqrt(mass))), self.max_clusters)
        one = self.num_clusters is None and mass < 2 * self._frame.width
        if one or not self._frame.width:
            most = 1
        split = Split(few, weights)
        best, lowest, since = np.inf, np.inf, 0
        counts = (
            range(1, most + 1) if self.num_clusters is None else [self.num_clusters]
        )
        for count in counts:
            start = split.centres(count)
            parts = None if start is None else kmeans(few, start, weights)
            if parts is None or len(np.unique(parts.labels)) < count:
                if self.num_clusters is None:
                    continue
                raise ConfigError(
                    f"num_clusters is {count} and k-means leaves parts empty: the "
                    "points have too few different values; ask for fewer"
                )
            mixture = self._mixture(few, parts.labels, weights)
            agreed = agreement(parts.labels, mixture.posterior, weights)
            icl = mixture.bic + 2 * entropy(mixture.posterior, weights)
            found = Tried(count, agreed, icl, mixture.bic, mixture.kind)
            self.tried.append(found)
            taken = self.num_clusters is not None or found.separable(self.agreement)
            if taken and icl < best:
                best, self._chosen, self._centres = icl, mixture, parts.centres
                self._confirmed = found.separable(self.agreement)
            since = 0 if icl < lowest else since + 1
            lowest = min(lowest, icl)
            if since >= self.patience:
                break

    def _mixture(
        self, few: np.ndarray, labels: np.ndarray, weights: np.ndarray
    ) -> Mixture:
        mass, width = float(weights.sum()), few.shape[1]
        # A weighted point tells no more of a covariance than another one.
        told = min(mass, float(len(few)))
        kind = choose_covariance(told, int(labels.max()) + 1, width)
        return grow_mixture(few, labels, weights, kind)

    def _number(self, found: Int[np.ndarray, " N"]) -> None:
        """Number the clusters: the largest first, then by their mean's coordinates."""
        sizes = np.bincount(found, minlength=self.found)
        self._numbers = np.empty(self.found, np.int64)
        order = np.lexsort((*self._centres.T[::-1], -sizes))
        self._numbers[order] = np.arange(self.found)

    def _assign(
        self, turned: Float[np.ndarray, "N P"]
    ) -> tuple[Int[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
        """Return points' clusters, and which part and component agree on, surely.

        Clusters have the parts' numbers here. A cluster is a component of a mixture
        that confirms the parts: it knows their widths, where the nearest centre cuts
        halfway. So a point far outside of all belongs to the widest. Of another
        mixture, and for points so far that no density is left, it is the part.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            posterior = self._chosen.predict(turned)
            part = nearest(turned, self._centres)
        core = posterior[np.arange(len(part)), part] >= SURE
        known = np.isfinite(posterior).all(axis=1) & self._confirmed
        return np.where(known, posterior.argmax(axis=1), part), core


def agreement(
    labels: Int[np.ndarray, " N"],
    posterior: Float[np.ndarray, "N K"],
    weights: Float[np.ndarray, " N"],
) -> float:
    """Return the least Jaccard index of a part and the component grown out of it.

    A component that has wandered off to another part's points agrees with neither.
    """
    component = posterior.argmax(axis=1)
    count = posterior.shape[1]
    both = np.bincount(labels, weights * (labels == component), count)
    either = np.bincount(labels, weights, count)
    either = either + np.bincount(component, weights, count) - both
    return float(np.min(both / either))


def entropy(
    posterior: Float[np.ndarray, "N K"], weights: Float[np.ndarray, " N"]
) -> float:
    """Return how unsure the mixture is of its points: -sum r log r, in nats."""
    logs = np.log(np.maximum(posterior, 1e-300))
    return max(-float(weights @ (posterior * logs).sum(axis=1)), 0.0)

"""Manifold linearising and clustering: features and clusters learnt together.

Ding, Tong, Chan, Dai, Ma and Haeffele 2023, arXiv 2301.01805. Points near one manifold
become points of one linear subspace, and manifolds become subspaces apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, Shaped

from uoe_jax.cluster.descent import Step, main_step, start_step
from uoe_jax.cluster.metrics import numerical_rank
from uoe_jax.cluster.network import TwoHeads, run_network, unit_rows
from uoe_jax.cluster.objective import membership
from uoe_jax.cluster.ppp import PPP
from uoe_jax.cluster.prepare import check_points
from uoe_jax.cluster.spectral import spectral_labels
from uoe_jax.errors import ConfigError
from uoe_jax.fields import Checked, Count, NotNegative, Positive, Seed, Whole

ANCHORS = 2048  # points with labels from the spectrum; others go to a subspace
_BLOCK = 1 << 14


@dataclass(kw_only=True)
class MLC(Checked):
    """Clusters of points near manifolds, and features in which these are subspaces.

    With `network`, a small network is trained: first for features that are spread out
    and the same for two noisy views, then, its feature head copied into the cluster
    head, for R - Rc. Without, the points themselves, scaled to length 1, are features:
    only the affinity is left of the method.

    After `fit`: `labels`, `features`, `history` (objective by step).
    """

    num_clusters: Count | None = None  # None: as many as PPP finds among features

    network: bool = True  # False: the affinity only

    width: Count = 32  # of the features

    hidden: Count = 128  # of the network

    eps2: Positive = 0.1  # squared distortion of the coding rate

    eta: Positive = 0.1  # temperature of memberships; lower for larger batches

    absolute: bool = False  # affinities |c . c'|; always so without a network

    gamma: NotNegative = 0.0  # against memberships of one point alone

    invariance: NotNegative = 20.0  # weight of the views' agreement at the start

    noise: NotNegative = 0.1  # of a view, in deviations of all columns together

    start_steps: Whole = 300

    steps: Whole = 100

    batch: Count = 512

    start_rate: Positive = 1e-3  # learning rates, of Adam

    learning_rate: Positive = 1e-4

    seed: Seed = 0  # of weights, noise and batches

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels: Any = None
        self.features: Any = None
        self.history: list[float] = []

    def fit(self, points: Shaped[np.ndarray, "*shape"]) -> MLC:
        """Cluster points, a row each, and return self.

        Raises DataError for points that aren't finite numbers in a table, ConfigError
        for more clusters than points or than there are different points.
        """
        points = check_points(points)
        if self.num_clusters and self.num_clusters > min(len(points), ANCHORS):
            raise ConfigError(
                f"num_clusters is {self.num_clusters} and there are {len(points)} "
                f"points; ask for no more clusters than points, nor than {ANCHORS}"
            )
        self._offset, self._scale = np.zeros(points.shape[1]), 1.0
        self._state: Any = None
        if self.network:
            self._offset = points.mean(axis=0)
            deviation = float(np.sqrt(points.var(axis=0).sum()))
            self._scale = max(deviation, 1e-30) / np.sqrt(points.shape[1])
            self._train(points)
        self.features, rows = self._rows(points)
        self.labels = self._label(rows)
        return self

    def predict(self, points: Shaped[np.ndarray, "*shape"]) -> Int[np.ndarray, " N"]:
        """Return the cluster of each point: the nearest subspace of the features.

        Raises ConfigError before `fit`, DataError as `fit` does.
        """
        if self.labels is None:
            raise ConfigError("MLC has no clusters yet; call fit(points) first")
        return self._nearest(self._rows(check_points(points))[0])

    def report(self) -> dict[str, Any]:
        """Return sizes and numerical ranks of all features and of each cluster."""
        count = len(self._bases)
        ranks = [numerical_rank(self.features[self.labels == j]) for j in range(count)]
        return {
            "num_clusters": count,
            "sizes": np.bincount(self.labels, minlength=count).tolist(),
            "rank": numerical_rank(self.features),
            "cluster_ranks": ranks,
            "network": self.network,
            "objective": self.history[-1] if self.history else None,
        }

    def membership(self, points: Shaped[np.ndarray, "*shape"]) -> np.ndarray:
        """Return the doubly stochastic membership of points, at most a few thousand."""
        return self._affinity(self._rows(check_points(points))[1])

    def _affinity(self, rows: np.ndarray) -> np.ndarray:
        absolute = self.absolute or not self.network
        return np.asarray(membership(jnp.asarray(rows), self.eta, absolute))

    def _prepared(self, points: np.ndarray) -> np.ndarray:
        return ((points - self._offset[None]) / self._scale).astype(np.float32)

    def _rows(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return features and cluster rows."""
        x = self._prepared(points)
        if self._state is None:
            z = np.asarray(unit_rows(jnp.asarray(x)))
            return z, z
        parts = [
            run_network(self._graph, self._state, x[i : i + _BLOCK])
            for i in range(0, len(x), _BLOCK)
        ]
        z, c = (np.concatenate([np.asarray(p[n]) for p in parts]) for n in (0, 1))
        return z, c

    def _train(self, points: np.ndarray) -> None:
        x = self._prepared(points)
        net = TwoHeads(x.shape[1], self.hidden, self.width, nnx.Rngs(self.seed))
        self._graph, state = nnx.split(net)
        knobs = self.eps2, self.invariance, self.noise
        step = start_step(self._graph, knobs, self.start_rate)
        state = self._descend(step, state, x, self.start_steps)
        net = nnx.merge(self._graph, state)
        nnx.update(net.clusters, nnx.state(net.features))  # the one-shot start
        self._graph, state = nnx.split(net)
        knobs = self.eps2, self.eta, self.gamma, self.absolute, self.noise
        step = main_step(self._graph, knobs, self.learning_rate)
        self._state = self._descend(step, state, x, self.steps)

    def _descend(self, step: Step, state: Any, x: np.ndarray, count: int) -> Any:
        """Return weights after some steps on two noisy views of batches."""
        memory, size = step.memory(state), min(self.batch, len(x))
        draw, key = np.random.default_rng(self.seed), jax.random.key(self.seed)
        queue = np.zeros(0, np.int64)
        self.history = []
        for number in range(count):
            while len(queue) < size:  # the rest of a round opens the next batch
                queue = np.concatenate([queue, draw.permutation(len(x))])
            batch, queue = queue[:size], queue[size:]
            fold = jax.random.fold_in(key, number)
            state, memory, found = step.run(state, memory, x[batch], fold)
            self.history.append(-float(found))
        return state

    def _label(self, rows: np.ndarray) -> Int[np.ndarray, " N"]:
        """Return labels: of anchors from the spectrum, of the rest by subspaces."""
        count = len(rows)
        anchors = np.arange(count)
        if count > ANCHORS:
            draw = np.random.default_rng(self.seed)
            anchors = np.sort(draw.choice(count, ANCHORS, replace=False))
        k = self.num_clusters
        if k is None:
            k = PPP().fit(self.features[anchors]).found
        if (distinct := len(np.unique(rows[anchors].round(6), axis=0))) < k:
            raise ConfigError(
                f"num_clusters is {k} and only {distinct} directions of points "
                "differ: there are too few different values; ask for fewer"
            )
        found = np.zeros(len(anchors), np.int64)
        if k > 1:
            found = _by_size(spectral_labels(self._affinity(rows[anchors]), k), k)
        z = self.features[anchors]
        self._bases = [_basis(z[found == j]) for j in range(k)]
        labels = self._nearest(self.features)
        labels[anchors] = found
        return labels

    def _nearest(self, z: Float[np.ndarray, "N D"]) -> Int[np.ndarray, " N"]:
        held = [np.square(z @ basis).sum(axis=1) for basis in self._bases]
        return np.argmax(np.stack(held, axis=1), axis=1)


def _by_size(labels: Int[np.ndarray, " N"], count: int) -> Int[np.ndarray, " N"]:
    """Return labels in numbers anew: the largest first, of equals the first seen."""
    sizes = np.bincount(labels, minlength=count)
    first = np.array([np.argmax(labels == j) for j in range(count)])
    place = np.empty(count, np.int64)
    place[np.lexsort((first, -sizes))] = np.arange(count)
    return place[labels]


def _basis(z: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "D R"]:
    """Return an orthonormal basis of the subspace that holds 95% of features."""
    axes = np.linalg.eigh(z.T @ z)[1][:, ::-1]
    return axes[:, : numerical_rank(z)]

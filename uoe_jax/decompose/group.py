"""Which neurons become an expert together: every way of grouping, in one table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uoe_jax.cluster.balance import balanced_kmeans, balanced_kmeans_of
from uoe_jax.cluster.mlc import MLC
from uoe_jax.cluster.sinkhorn import sinkhorn
from uoe_jax.cluster.spectral import spectral_embedding
from uoe_jax.decompose.cut import Grouping
from uoe_jax.errors import ConfigError, choose

GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)
ETA = 0.1  # temperature of the spectral grouping's memberships
SKETCH = 256  # numbers that stand for a neuron's profile where a network reads it


class Neurons:
    """One layer's F neurons, as far as a grouping looks at them.

    What several groupings and numbers of experts share is computed once.
    """

    def __init__(
        self,
        count: int,
        contributions: Float[np.ndarray, "N F"] | Float[Array, "N F"] | None = None,
        w_in: Float[np.ndarray, "P F"] | None = None,
    ):
        self.count, self._written, self._w_in = count, contributions, w_in
        self._learnt: dict[int, np.ndarray] = {}
        self._all: tuple[Neurons, np.ndarray] | None = None

    def among(self, members: Int[np.ndarray, " M"]) -> Neurons:
        """Return some of these neurons; what all of them share isn't computed again."""
        part = Neurons(len(members))
        part._all = self, members
        return part

    @property
    def directions(self) -> Float[np.ndarray, "F P"]:
        """What each neuron reads, scaled to length 1."""
        if self._all is not None:
            whole, members = self._all
            return whole.directions[members]
        if self._w_in is None:
            raise ConfigError("grouping by weights needs the neurons' input weights")
        rows = self._w_in.T
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.maximum(length, 1e-12)

    @functools.cached_property
    def correlations(self) -> Float[np.ndarray, "F F"]:
        """Products of profiles: how two neurons' contributions correlate."""
        if self._all is not None:
            whole, members = self._all
            return whole.correlations[np.ix_(members, members)]
        return np.asarray(_products(self._profiles))

    @functools.cached_property
    def affinity(self) -> Float[np.ndarray, "F F"]:
        """The affinity of MLC alone: |correlation|, made doubly stochastic."""
        return np.asarray(sinkhorn(jnp.abs(jnp.asarray(self.correlations)), ETA))

    def learnt(self, seed: int) -> Float[np.ndarray, "F F"]:
        """The membership that MLC's network has learnt of the profiles."""
        if seed not in self._learnt:
            points = self._sketch(seed)
            mlc = MLC(num_clusters=1, seed=seed).fit(points)
            self._learnt[seed] = mlc.membership(points)
        return self._learnt[seed]

    def _sketch(self, seed: int) -> Float[np.ndarray, "F S"]:
        if self._all is not None:
            whole, members = self._all
            return whole._sketch(seed)[members]
        return np.asarray(sketch(self._profiles, seed))

    @functools.cached_property
    def _profiles(self) -> Float[Array, "F N"]:
        if self._written is None:
            raise ConfigError("grouping by co-activation needs calibration data")
        return profiles(self._written)


# (neurons, number of experts, seed) -> the neurons in the order in which to cut them.
Group = Callable[[Neurons, int, int], Int[np.ndarray, " F"]]


def order_neurons(
    grouping: Grouping, num_experts: int, neurons: Neurons, *, seed: int = 0
) -> Int[np.ndarray, " F"]:
    """Return one layer's neurons in the order in which to cut them into experts.

    Ties and starts depend on the seed only. Raises ConfigError for a grouping that
    isn't known or that lacks what it looks at: input weights for "weights",
    contributions for "coactivation", "spectral" and "mlc".
    """
    return choose("grouping", grouping, GROUPS)(neurons, num_experts, seed)


# All that is as large as tokens times neurons stays on the device: on a GPU's host,
# pages of memory for it took longer than the arithmetic.
@jax.jit
def contributions(
    neurons: Float[Array, "N F"], w_down: Float[Array, "F D"]
) -> Float[Array, "N F"]:
    """Return how much each neuron writes to the residual: |activation| |w_down row|."""
    return jnp.abs(neurons) * jnp.linalg.norm(w_down, axis=1)[None]


@jax.jit
def profiles(contributions: Float[Array, "N F"]) -> Float[Array, "F N"]:
    """Return each neuron's contributions, its mean taken off, scaled to length 1.

    Products of two profiles are the correlations of the neurons' contributions.
    """
    rows = (contributions - contributions.mean(axis=0)[None]).T
    length = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.maximum(length, 1e-12)


@jax.jit
@jax.default_matmul_precision("highest")
def _products(profiles: Float[Array, "F N"]) -> Float[Array, "F F"]:
    return profiles @ profiles.T


def sketch(profiles: Float[Array, "F N"], seed: int = 0) -> Float[Array, "F S"]:
    """Return profiles in at most `SKETCH` numbers that keep products nearly the same.

    A random projection (Johnson and Lindenstrauss 1984).
    """
    width = profiles.shape[1]
    if width <= SKETCH:
        return profiles
    draw = np.random.default_rng(seed).normal(size=(width, SKETCH))
    with jax.default_matmul_precision("highest"):
        return profiles @ jnp.asarray(draw / np.sqrt(SKETCH), profiles.dtype)


def _contiguous(neurons: Neurons, num_experts: int, seed: int) -> np.ndarray:
    del num_experts, seed
    return np.arange(neurons.count)


def _random(neurons: Neurons, num_experts: int, seed: int) -> np.ndarray:
    del num_experts
    return np.random.default_rng(seed).permutation(neurons.count)


def _weights(neurons: Neurons, num_experts: int, seed: int) -> np.ndarray:
    """Group neurons that read alike, by balanced k-means of their input weights.

    MoEfication's parameter clustering (Zhang et al. 2022, section 3.1).
    """
    return _in_groups(balanced_kmeans(neurons.directions, num_experts, seed))


def _coactivation(neurons: Neurons, num_experts: int, seed: int) -> np.ndarray:
    """Group neurons that are active together, by balanced k-means of their profiles.

    A distance then measures the correlation of two neurons' contributions. MoEfication
    (section 3.1) groups by co-activation too, by cutting its graph.
    """
    return _in_groups(balanced_kmeans_of(neurons.correlations, num_experts, seed))


def _spectral(neurons: Neurons, num_experts: int, seed: int) -> np.ndarray:
    return _of_graph(neurons.affinity, num_experts, seed)


def _mlc(neurons: Neurons, num_experts: int, seed: int) -> np.ndarray:
    return _of_graph(neurons.learnt(seed), num_experts, seed)


GROUPS: Mapping[str, Group] = {
    "contiguous": _contiguous,
    "random": _random,
    "weights": _weights,
    "coactivation": _coactivation,
    "spectral": _spectral,
    "mlc": _mlc,
}


def _of_graph(
    affinity: Float[np.ndarray, "F F"], num_experts: int, seed: int
) -> Int[np.ndarray, " F"]:
    """Return an order by equal groups of a graph's spectral embedding."""
    rows = spectral_embedding(affinity, num_experts)
    return _in_groups(balanced_kmeans(rows, num_experts, seed))


def _in_groups(labels: Int[np.ndarray, " F"]) -> Int[np.ndarray, " F"]:
    return np.argsort(labels, kind="stable")

"""Which neurons become an expert together: as they are, random, or by co-activation."""

from __future__ import annotations

from typing import get_args

import numpy as np
from jaxtyping import Float, Int

from uoe_jax.cluster.balance import balanced_kmeans
from uoe_jax.decompose.cut import Grouping
from uoe_jax.errors import ConfigError, choose

GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)


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

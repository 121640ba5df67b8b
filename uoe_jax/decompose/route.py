"""Routers for a union that was cut from a dense model, before any training."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import linear_sum_assignment

from uoe_jax.cluster.kmeans import Split, lloyd

# Scores this small order the experts and leave every gate within 1% of 1.
SCORE_DEVIATION = 0.02
_RIDGE = 1e-2  # times the mean eigenvalue of the inputs' second moment


class RouterFit(NamedTuple):
    """A linear router: scores `x @ weight`, and `bias` that only selection sees."""

    weight: Float[np.ndarray, "D E"]
    bias: Float[np.ndarray, " E"]
    explained: float  # share of the shares' variance that the scores explain


def expert_lengths(
    inner: Float[np.ndarray, "N F"] | Float[Array, "N F"],
    weight: Float[np.ndarray, "E W D"],
) -> Float[np.ndarray, "N E"]:
    """Return the length of each expert's output, `|inner[:, e] @ weight[e]|`.

    `inner` are neurons or heads' values in the experts' order, F = E W.
    """
    return np.asarray(_output_lengths(inner, weight))


@jax.default_matmul_precision("highest")
def output_lengths(
    inner: Float[Array, "N F"], weight: Float[Array, "E W D"]
) -> Float[Array, "N E"]:
    """Return what `expert_lengths` does, within a program."""
    experts, width, _ = weight.shape
    parts = inner.reshape(len(inner), experts, width).swapaxes(0, 1)
    # One expert at a time: the outputs of all would be E times the residual stream.
    length = lambda pair: jnp.linalg.norm(pair[0] @ pair[1], axis=1)
    return jax.lax.map(length, (parts, weight)).T


_output_lengths = jax.jit(output_lengths)


def fit_router(
    x: Float[np.ndarray, "N D"] | Float[Array, "N D"],
    shares: Float[np.ndarray, "N E"],
    deviation: float = SCORE_DEVIATION,
) -> RouterFit:
    """Return the least-squares router from inputs to each expert's share.

    Targets are the lengths of the experts' outputs less each token's mean, as routing
    only compares experts. Scaled to scores of the given standard deviation. Ridge
    regression; see MoEfication (Zhang et al. 2022, section 3.2) for learnt selection.
    """
    with jax.enable_x64(True):
        sums = [np.asarray(found) for found in _router_sums(x, shares)]
    moment, cross, x_mean, target_mean, total = sums
    ridge = _RIDGE * np.trace(moment) / len(moment)
    weight = np.linalg.solve(moment + ridge * np.eye(len(moment)), cross)
    bias = target_mean - x_mean @ weight
    square = np.einsum("de,df,fe->e", weight, moment, weight, optimize=True)
    explained = (2 * (weight * cross).sum() - square.sum()) / total if total else 0.0
    # The variance of all scores together: within each expert's, and of their means.
    variance = square.mean() / len(x) + (x_mean @ weight).var()
    scale = deviation / max(float(np.sqrt(variance)), 1e-12)
    return RouterFit(weight * scale, bias * scale, float(explained))


@jax.jit
def _router_sums(x: Float[Array, "N D"], shares: Float[Array, "N E"]) -> Any:
    """Return moments of inputs and targets around their means, and those means."""
    x, shares = x.astype(float), shares.astype(float)
    targets = shares - shares.mean(axis=1, keepdims=True)
    x_mean, target_mean = x.mean(axis=0), targets.mean(axis=0)
    centred, wanted = x - x_mean[None], targets - target_mean[None]
    total = jnp.square(wanted).sum()
    return centred.T @ centred, centred.T @ wanted, x_mean, target_mean, total


def cluster_router(
    x: Float[np.ndarray, "N D"] | Float[Array, "N D"],
    shares: Float[np.ndarray, "N E"],
    deviation: float = SCORE_DEVIATION,
) -> RouterFit:
    """Return a router that points each expert at a cluster of the inputs.

    The inputs, their mean taken off, are cut into as many clusters as there are
    experts (k-means, of which no part is drawn). A cluster goes to the expert whose
    share is above its usual one there, by the best assignment. The expert's row is the
    cluster's first principal direction, towards its mean. Shares and scale are those of
    `fit_router`.
    """
    x, experts = np.asarray(x), shares.shape[1]
    targets = shares - shares.mean(axis=1, keepdims=True)
    targets = targets - targets.mean(axis=0)[None]
    x_mean = x.mean(axis=0)
    centred = (x - x_mean[None]).astype(np.float64)
    start = Split(centred).centres(experts)
    if start is None:  # fewer different inputs than experts
        none = np.zeros((x.shape[1], experts))
        return RouterFit(none, np.zeros(experts), 0.0)
    labels = lloyd(centred, start).labels
    members = np.arange(experts)[:, None] == labels[None]
    share = members @ targets / np.maximum(members.sum(axis=1), 1)[:, None]
    cluster, expert = linear_sum_assignment(-share)
    weight = np.zeros((x.shape[1], experts))
    for j, e in zip(cluster, expert, strict=True):
        weight[:, e] = _direction(centred[labels == j])
    scores = centred @ weight
    scale = deviation / max(float(scores.std()), 1e-12)
    both = np.square(scores).sum() * np.square(targets).sum()
    explained = np.sum(scores * targets) ** 2 / both if both > 0 else 0.0
    return RouterFit(weight * scale, -x_mean @ weight * scale, float(explained))


def _direction(points: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " D"]:
    """Return the first principal direction from the origin, towards the points."""
    if not len(points):
        return np.zeros(points.shape[1])
    axis = np.linalg.eigh(points.T @ points)[1][:, -1]
    return axis if points.sum(axis=0) @ axis >= 0 else -axis

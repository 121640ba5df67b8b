"""What MLC's network is trained for, given both views' features and cluster rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.cluster.coding_rate import coding_rate, column_rates
from uoe_jax.cluster.network import unit_rows
from uoe_jax.cluster.sinkhorn import find_scales, sinkhorn

Rows = Float[Array, "N D"]


def membership(c: Rows, eta: float, absolute: bool) -> Float[Array, "N N"]:
    """Return Pi = Sinkhorn(C C^T / eta), or of |C C^T|."""
    scores = c @ c.T
    return sinkhorn(jnp.abs(scores) if absolute else scores, eta)


class Columns(NamedTuple):
    """A membership's columns, each made of a point when it is wanted."""

    of: Callable[[Any], Float[Array, " N"]]
    points: Any  # what `of` takes, for all N columns


def columns_of(c: Rows, eta: float, absolute: bool) -> Columns:
    """Return `membership` without its N x N entries: N numbers and C tell them."""

    def logs_of(row: Float[Array, " D"]) -> Float[Array, " N"]:
        scores = c @ row
        return (jnp.abs(scores) if absolute else scores) / eta

    scales = find_scales(logs_of, c)

    def column(point: tuple[Array, Array]) -> Float[Array, " N"]:
        row, scale = point
        return jnp.exp(logs_of(row) + scale - scales.rows)

    return Columns(column, (c, scales.columns))


def start_value(
    views: tuple[Rows, Rows], eps2: float, invariance: float
) -> Float[Array, ""]:
    """Return what the start maximises: spread-out features that views agree on.

    R((Z + Z') / 2) + invariance * mean |z . z'|: total coding rate, section 3.3.
    """
    first, second = views
    agreed = jnp.abs((first * second).sum(axis=1)).mean()
    return coding_rate(0.5 * (first + second), eps2) + invariance * agreed


def value(
    features: tuple[Rows, Rows],
    clusters: tuple[Rows, Rows],
    *,
    eps2: float,
    eta: float,
    absolute: bool,
    gamma: float,
) -> Float[Array, ""]:
    """Return R(Z) - Rc(Z, Pi) - gamma / 2 |Pi|^2: equation 8, where gamma is 0.

    Z is the normalised mean of both views' features, Pi the mean of their memberships.
    Memory is linear in N: columns of Pi are made a few at a time, and again for the
    gradient.
    """
    z = unit_rows(0.5 * (features[0] + features[1]))
    columns = [columns_of(c, eta, absolute) for c in clusters]

    def mean_column(points: list[Any]) -> Float[Array, " N"]:
        pairs = zip(columns, points, strict=True)
        return jnp.stack([each.of(point) for each, point in pairs]).mean(axis=0)

    points = [each.points for each in columns]
    within, squares = column_rates(z, mean_column, points, eps2)
    return coding_rate(z, eps2) - within - 0.5 * gamma * squares

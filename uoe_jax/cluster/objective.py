"""What MLC's network is trained for, given both views' features and cluster rows."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.cluster.coding_rate import coding_rate, rate_reduction
from uoe_jax.cluster.network import unit_rows
from uoe_jax.cluster.sinkhorn import sinkhorn

Rows = Float[Array, "N D"]


def membership(c: Rows, eta: float, absolute: bool) -> Float[Array, "N N"]:
    """Return Pi = Sinkhorn(C C^T / eta), or of |C C^T|."""
    scores = c @ c.T
    return sinkhorn(jnp.abs(scores) if absolute else scores, eta)


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
    """
    z = unit_rows(0.5 * (features[0] + features[1]))
    first, second = (membership(c, eta, absolute) for c in clusters)
    pi = 0.5 * (first + second)
    return rate_reduction(z, pi, eps2) - 0.5 * gamma * jnp.square(pi).sum()

"""How many bits features take: of all of them together, and of their clusters.

The objective of manifold linearising and clustering (Ding et al. 2023, arXiv
2301.01805, equations 5 to 8): features Z spread as a whole, R, and compact within
what belongs together, Rc. In nats; both without a factor of one half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CHUNK = 8  # columns of the membership at a time


def coding_rate(z: Float[Array, "N D"], eps2: float) -> Float[Array, ""]:
    """Return R(Z) = log det(I + D / (N eps2) Z^T Z)."""
    count, width = z.shape
    return _log_det(width / (count * eps2) * (z.T @ z))


def cluster_coding_rate(
    z: Float[Array, "N D"], membership: Float[Array, "N N"], eps2: float
) -> Float[Array, ""]:
    """Return Rc(Z, Pi) = 1/N sum_j log det(I + D / eps2 Z^T diag(Pi_j) Z).

    Pi_j is column j of a doubly stochastic matrix: which points belong to point j.
    """
    return column_rates(z, lambda column: column, membership.T, eps2)[0]


def column_rates(
    z: Float[Array, "N D"],
    column_of: Callable[[Any], Float[Array, " N"]],
    items: Any,
    eps2: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return Rc(Z, Pi) and |Pi|^2 of a Pi whose columns are `column_of` each item.

    Columns are made a few at a time and again for the gradient, so that it needs
    neither Pi nor N matrices of D x D.
    """
    width = z.shape[1]

    @jax.checkpoint
    def one(item: Any) -> tuple[Array, Array]:
        column = column_of(item)
        rate = _log_det(width / eps2 * (z.T @ (column[:, None] * z)))
        return rate, jnp.square(column).sum()

    rates, squares = jax.lax.map(one, items, batch_size=CHUNK)
    return rates.mean(), squares.sum()


def rate_reduction(
    z: Float[Array, "N D"], membership: Float[Array, "N N"], eps2: float
) -> Float[Array, ""]:
    """Return R(Z) - Rc(Z, Pi), which MLC maximises."""
    return coding_rate(z, eps2) - cluster_coding_rate(z, membership, eps2)


def _log_det(gram: Array) -> Array:
    """Return log det(I + gram) of a positive semidefinite matrix."""
    factor = jnp.linalg.cholesky(gram + jnp.eye(len(gram), dtype=gram.dtype))
    return 2 * jnp.log(jnp.diagonal(factor)).sum()

"""How many bits features take: of all of them together, and of their clusters.

The objective of manifold linearising and clustering (Ding et al. 2023, arXiv
2301.01805, equations 5 to 8): features Z spread as a whole, R, and compact within
what belongs together, Rc. In nats; both without a factor of one half.
"""

from __future__ import annotations

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
    Columns are taken a few at a time and computed again for the gradient, so that it
    needs no N matrices of D x D.
    """
    width = z.shape[1]

    @jax.checkpoint
    def one(column: Array) -> Array:
        return _log_det(width / eps2 * (z.T @ (column[:, None] * z)))

    return jax.lax.map(one, membership.T, batch_size=CHUNK).mean()


def rate_reduction(
    z: Float[Array, "N D"], membership: Float[Array, "N N"], eps2: float
) -> Float[Array, ""]:
    """Return R(Z) - Rc(Z, Pi), which MLC maximises."""
    return coding_rate(z, eps2) - cluster_coding_rate(z, membership, eps2)


def _log_det(gram: Array) -> Array:
    """Return log det(I + gram) of a positive semidefinite matrix."""
    factor = jnp.linalg.cholesky(gram + jnp.eye(len(gram), dtype=gram.dtype))
    return 2 * jnp.log(jnp.diagonal(factor)).sum()

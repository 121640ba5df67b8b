"""Matrices as products of two thin ones: by what comes out of them, or by themselves.

LoRD (Kaushal et al. 2023, "Low Rank Decomposition of monolingual code LLMs", with the
output features of Atomic Feature Mimicking, Yu and Wu 2023): with U the eigenvectors of
the covariance of the outputs y, the best y of rank r is `U_r U_r^T (y - E y) + E y`.
Plain SVD is the same with inputs taken as white.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from uoe_jax.compress.order import cholesky, tail_sums
from uoe_jax.errors import ConfigError


class LowRank(NamedTuple):
    """A matrix W as `into @ out`; the first r columns and rows are the best of rank r.

    `shift` is the output's mean, None where there is no bias to hold it.
    """

    into: Float[np.ndarray, "I R"]
    out: Float[np.ndarray, "R O"]
    energies: Float[np.ndarray, " R"]
    shift: Float[np.ndarray, " O"] | None = None

    def errors(self) -> Float[np.ndarray, " R1"]:
        """Return the squared error of the output at rank r, r = 0 to R."""
        return tail_sums(self.energies)

    def bias(self, rank: int, bias: Float[np.ndarray, " O"]) -> Float[np.ndarray, " O"]:
        """Return the bias beside the product of rank `rank`: mu + (b - mu) U U^T."""
        if self.shift is None:
            return bias
        basis = self.out[:rank]
        return self.shift + (bias - self.shift) @ basis.T @ basis


def by_outputs(
    moment: Float[np.ndarray, "I I"],
    weight: Float[np.ndarray, "I O"],
    mean: Float[np.ndarray, " I"] | None = None,
    bias: Float[np.ndarray, " O"] | None = None,
) -> LowRank:
    """Return LoRD of a matrix from the mean second moment of its inputs.

    With the inputs' mean and a bias the covariance is taken, else the moment as it is.
    Where the matrix goes to more outputs than inputs, the outputs' covariance isn't
    formed: the same vectors come from the SVD of its root.
    """
    moment, weight = moment.astype(np.float64), weight.astype(np.float64)
    shift = None
    if mean is not None and bias is not None:
        mean = mean.astype(np.float64)
        moment = moment - np.outer(mean, mean)
        shift = mean @ weight + bias
    rows, columns = weight.shape
    if columns <= rows:
        energies, vectors = np.linalg.eigh(weight.T @ moment @ weight)
        energies, vectors = np.maximum(energies[::-1], 0), vectors[:, ::-1]
    else:
        root = cholesky(moment).T  # root^T root = moment
        _, values, right = np.linalg.svd(root @ weight, full_matrices=False)
        energies, vectors = np.square(values), right.T
    return LowRank(weight @ vectors, vectors.T, energies, shift)


def by_weights(weight: Float[np.ndarray, "I O"]) -> LowRank:
    """Return the plain SVD of a matrix, which knows nothing of its inputs."""
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    return LowRank(left * values[None], right, np.square(values))


def break_even(rows: int, columns: int) -> float:
    """Return the rank from which two factors have as many numbers as the matrix."""
    return rows * columns / (rows + columns)


def check_rank(rank: int, rows: int, columns: int, name: str) -> None:
    """Raise ConfigError for a rank that saves no parameters."""
    limit = break_even(rows, columns)
    if not 1 <= rank < limit:
        most = int(np.ceil(limit)) - 1
        raise ConfigError(
            f"rank {rank} of {name} ({rows} x {columns}) saves nothing: two factors "
            f"have fewer numbers below rank {limit:g}; use 1 to {most}"
        )

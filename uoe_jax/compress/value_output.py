"""Values and outputs of attention as products of a smaller inner width.

A key/value head gives y W_O to each of its query heads, y = v mixed by attention. For
any chain A B with second moment C before it, the best output of rank r is
`A B V_r V_r^T` with V the eigenvectors of (A B)^T C (A B), and the error is the sum of
the other eigenvalues (MoDeGPT, Lin et al. 2024, algorithm 3, in its equal form). B are
the output matrices of all query heads of the head, side by side, and C is the sum of
their moments. With one query head to a head that is the output's error. With G of them
each query head's values are counted through all G output matrices: the error of the
outputs themselves is sum_g tr(B_g^T C_g B_g), about G times less, and the basis that is
least for it may be another one. Dividing by G was tried: cuts spread so are worse.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from uoe_jax.compress.order import dropping_errors, tail_sums


class ValueBasis(NamedTuple):
    """A head's values in a basis whose first r are the best of rank r.

    New values are `v @ into`, new output matrices `out`; the first r columns and rows.
    """

    into: Float[np.ndarray, "H H"]
    out: Float[np.ndarray, "G H D"]
    errors: Float[np.ndarray, " H1"]  # squared, of the output at rank r, r = 0 to H
    # What attention makes of the new values on average, where a bias is to hold what
    # the dropped ones wrote.
    mean: Float[np.ndarray, "G H"] | None = None

    def shift(self, rank: int) -> Float[np.ndarray, " D"]:
        """Return what the values past `rank` write on average."""
        if self.mean is None:
            return np.zeros(self.out.shape[-1])
        return np.einsum("gh,ghd->d", self.mean[:, rank:], self.out[:, rank:])


def value_moment(
    moment: Float[np.ndarray, "D D"],
    mean: Float[np.ndarray, " D"],
    count: float,
    weight: Float[np.ndarray, "D H"],
    bias: Float[np.ndarray, " H"] | None,
) -> Float[np.ndarray, "H H"]:
    """Return the second moment of a head's values x W + b from that of x."""
    moment, weight = moment.astype(np.float64), weight.astype(np.float64)
    found = weight.T @ moment @ weight
    if bias is None:
        return found
    across = np.outer(weight.T @ mean.astype(np.float64), bias)
    return found + across + across.T + count * np.outer(bias, bias)


def value_basis(
    moment: Float[np.ndarray, "H H"], outputs: Float[np.ndarray, "G H D"]
) -> ValueBasis:
    """Return the basis of a head's values for the outputs of all its query heads."""
    groups, width, d_model = outputs.shape
    stacked = outputs.astype(np.float64).transpose(1, 0, 2).reshape(width, -1)
    stacked = np.pad(stacked, ((0, 0), (0, max(width - stacked.shape[1], 0))))
    q, r = np.linalg.qr(stacked.T)
    left = r.T
    energies, vectors = np.linalg.eigh(left.T @ moment @ left)
    energies, vectors = np.maximum(energies[::-1], 0), vectors[:, ::-1]
    out = (vectors.T @ q.T)[:, : groups * d_model].reshape(width, groups, d_model)
    return ValueBasis(left @ vectors, out.transpose(1, 0, 2), tail_sums(energies))


def chosen_values(
    moment: Float[np.ndarray, "H H"],
    outputs: Float[np.ndarray, "G H D"],
    scores: Float[np.ndarray, " H"],
    mean: Float[np.ndarray, "G H"] | None = None,
) -> ValueBasis:
    """Return a head's values as they are, those of the highest scores first."""
    order = np.argsort(-scores, kind="stable")
    out = outputs[:, order].astype(np.float64)
    stacked = out.transpose(1, 0, 2).reshape(len(order), -1)
    errors = dropping_errors(moment, stacked, order)
    mean = None if mean is None else mean[:, order]
    return ValueBasis(np.eye(len(order))[:, order], out, errors, mean)

"""Planted low-rank matrices, seen in part."""

from typing import NamedTuple

import numpy as np


class Planted(NamedTuple):
    matrix: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    values: np.ndarray

    @property
    def entries(self):
        return self.rows, self.cols, self.values

    def error(self, factors) -> float:
        """Relative Frobenius error over the whole matrix."""
        model = np.asarray(factors.dense(), np.float64)
        return float(np.linalg.norm(model - self.matrix) / np.linalg.norm(self.matrix))


def make_planted(seed, m=600, n=600, rank=5, fraction=0.2, ratio=2.0) -> Planted:
    """An incoherent matrix with unit mean square and singular values ratio..1."""
    draw = np.random.default_rng(seed)
    u = np.linalg.qr(draw.normal(size=(m, rank)))[0]
    v = np.linalg.qr(draw.normal(size=(n, rank)))[0]
    matrix = (u * np.linspace(ratio, 1, rank)) @ v.T
    matrix *= np.sqrt(m * n) / np.linalg.norm(matrix)
    rows, cols = np.nonzero(draw.random((m, n)) < fraction)
    return Planted(matrix, rows, cols, matrix[rows, cols])

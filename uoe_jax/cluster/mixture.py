"""A Gaussian mixture that grows out of given parts: no start is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from uoe_jax.cluster.kmeans import DIGITS

Covariance = Literal["full", "diag", "spherical"]

STEPS, TOLERANCE = 100, 1e-5  # of EM: the mean log-likelihood gains less than that
_BLOCK = 1 << 16  # points at once
FLOOR = 1e-4  # added to variances, where the points' are about 1


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """K Gaussians over P dimensions, and what they make of the points behind them."""

    shares: Float[np.ndarray, " K"]
    means: Float[np.ndarray, "K P"]
    covariances: Float[np.ndarray, "K P P"]
    kind: Covariance
    posterior: Float[np.ndarray, "N K"]
    log_likelihood: float  # sum over points, times their weights
    mass: float  # sum of the weights

    @property
    def num_parameters(self) -> int:
        """Free numbers: shares, means and covariances."""
        parts, width = self.means.shape
        each = {"full": width * (width + 1) // 2, "diag": width, "spherical": 1}
        return parts - 1 + parts * (width + each[self.kind])

    @property
    def bic(self) -> float:
        """Schwarz's criterion, -2 log L + parameters log N: less is better."""
        return -2 * self.log_likelihood + self.num_parameters * np.log(self.mass)

    def predict(self, points: Float[np.ndarray, "N P"]) -> Float[np.ndarray, "N K"]:
        """Return each component's posterior probability at other points."""
        parts = [
            posteriors(
                points[i : i + _BLOCK],
                self.shares,
                self.means,
                self.covariances,
                self.kind,
            )[0]
            for i in range(0, len(points), _BLOCK)
        ]
        return np.concatenate(parts)


def choose_covariance(mass: float, parts: int, width: int) -> Covariance:
    """Return the richest covariance that a part's points can tell."""
    each = mass / parts
    if each >= 5 * width * (width + 1) / 2:
        return "full"
    return "diag" if each >= 5 * width else "spherical"


def grow_mixture(
    points: Float[np.ndarray, "N P"],
    labels: Int[np.ndarray, " N"],
    weights: Float[np.ndarray, " N"],
    kind: Covariance,
) -> Mixture:
    """Return the mixture that EM ends with from parts: component j grows out of part j.

    Its start is the parts' shares, means and covariances within. Parts aren't empty.
    """
    posterior = np.zeros((len(points), int(labels.max()) + 1))
    posterior[np.arange(len(points)), labels] = 1
    before = -np.inf
    mass = float(weights.sum())
    for _ in range(STEPS):
        shares, means, covariances = _maximise(points, posterior, weights, kind)
        posterior, each = posteriors(points, shares, means, covariances, kind)
        value = float(weights @ each)
        if value - before < TOLERANCE * mass:
            break
        before = value
    return Mixture(
        shares=shares,
        means=means,
        covariances=covariances,
        kind=kind,
        posterior=posterior,
        log_likelihood=value,
        mass=mass,
    )


def posteriors(
    points: np.ndarray,
    shares: np.ndarray,
    means: np.ndarray,
    covariances: np.ndarray,
    kind: Covariance,
) -> tuple[np.ndarray, np.ndarray]:
    """Return each component's probability at each point, and points' log densities."""
    logs = _log_densities(points, means, covariances, kind) + np.log(shares)[None]
    top = logs.max(axis=1, keepdims=True)
    each = top + np.log(np.exp(logs - top).sum(axis=1, keepdims=True))
    return np.exp(logs - each), each[:, 0]


def _maximise(
    points: np.ndarray, posterior: np.ndarray, weights: np.ndarray, kind: Covariance
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return shares, means and covariances for the given memberships."""
    width = points.shape[1]
    heavy = posterior * weights[:, None]
    # A component that loses all its points stays, at a share of nearly nothing.
    mass = np.maximum(heavy.sum(axis=0), 1e-10 * weights.sum())
    means = (heavy.T @ points / mass[:, None]).round(DIGITS)
    covariances = np.zeros((len(mass), width, width))
    for part, mean in enumerate(means):
        centred = points - mean[None]
        if kind == "full":
            found = (centred * heavy[:, part : part + 1]).T @ centred / mass[part]
        else:
            variances = heavy[:, part] @ np.square(centred) / mass[part]
            if kind == "spherical":
                variances = np.full(width, variances.mean())
            found = np.diag(variances)
        covariances[part] = found + FLOOR * np.eye(width)
    return mass / mass.sum(), means, covariances


def _log_densities(
    points: np.ndarray, means: np.ndarray, covariances: np.ndarray, kind: Covariance
) -> np.ndarray:
    """Return the log density of each point in each component."""
    width = points.shape[1]
    logs = np.empty((len(points), len(means)))
    for part, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
        centred = points - mean[None]
        if kind == "full":
            factor = np.linalg.cholesky(covariance)
            scaled = centred @ np.linalg.inv(factor).T
            log_det = 2 * np.log(np.diagonal(factor)).sum()
        else:
            variances = np.diagonal(covariance)
            scaled = centred / np.sqrt(variances)[None]
            log_det = np.log(variances).sum()
        distance = np.square(scaled).sum(axis=1)
        logs[:, part] = -0.5 * (distance + log_det + width * np.log(2 * np.pi))
    return logs

"""What a fit to ratings does unless told otherwise: of the command and the estimator.

Imports no jax: the command's options are checked before it loads.
"""

from __future__ import annotations

from dataclasses import dataclass

from uoe_jax.fields import Checked

SOLVERS = ("auto", "cg", "gram", "sketch", "exact")
DEFAULT_RANK = 8
RIDGES = (0.3, 1.0, 1.5, 3.0)  # tried when none is given, times the values' deviation


@dataclass(frozen=True, kw_only=True)
class FitOptions(Checked):
    """Options that `uoe complete` and `MatrixCompleter` share, with their defaults."""

    holdout: float = 0.1  # fraction of entries that choose ridge and sweeps; 0: none
    ridge: float | None = None  # penalty; None: the best of a few on held-out entries
    bias_ridge: float | None = None  # penalty of the biases; None: as the factors'
    ridge_power: float = 0.5  # penalties grow with a row's entries to this power
    biases: bool = True  # offset, row and column biases beside the factors
    solver: str = "auto"  # auto, exact, gram, cg or sketch
    tol: float = 1e-4  # of each half-step, and of the last sweep's gain
    iters: int = 30  # sweeps at most
    patience: int = 3  # sweeps without a better held-out error before stopping
    refit: bool = True  # fit all entries again once ridge and sweeps are chosen


DEFAULTS = FitOptions()


def default_rank(shape: tuple[int, int]) -> int:
    """Return the rank where none is given: 8, or the matrix's shorter side."""
    return min(DEFAULT_RANK, *shape)

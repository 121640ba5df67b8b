"""What `uoe complete` takes, checked before jax is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from uoe_jax.errors import ConfigError, nearest

SOLVERS = ("auto", "exact", "gram", "cg", "sketch")


@dataclass(frozen=True, kw_only=True)
class CompleteArgs:
    """Complete a matrix from some of its entries; low rank, alternating minimisation.

    FILE is .npz, .csv or .parquet: a row id, a column id and a value for each entry.
    Writes factors.safetensors, convergence.png and history.json. Half of the held-out
    entries choose the ridge and the sweep to keep, the other half give the error.
    """

    file: Positional[Annotated[Path, arg(metavar="FILE")]]
    rank: str = "16"  # or "auto": the largest gap in the spectrum
    holdout: float = 0.1  # fraction of entries kept from the fit; 0: none
    ridge: float | None = None  # None: the best of a few on held-out entries
    ridge_power: float = 0.5  # penalty grows with a row's entries to this power
    biases: bool = True  # offset, row and column biases beside the factors
    solver: str = "auto"  # auto, exact, gram, cg or sketch
    tol: float = 1e-4  # of each half-step, and of the last sweep's gain
    iters: int = 30  # sweeps at most
    float64: bool = False  # twice the bytes, for errors below 1e-6
    seed: int = 0  # of the split and the start
    columns: tuple[str, str, str] | None = None  # names of row, column and value
    out: Path | None = None  # folder, written over; None: FILE's name + _completed
    quiet: bool = False  # print nothing

    def __post_init__(self):
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"holdout is {self.holdout}; it must be in [0, 1)")
        if self.rank != "auto" and not self.rank.isdecimal():
            raise ConfigError(f"rank is {self.rank!r}; give a whole number or 'auto'")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0")
        if self.solver not in SOLVERS:
            raise ConfigError(
                f"solver is {self.solver!r}; {nearest(self.solver, SOLVERS)}"
            )

    @property
    def rank_or_auto(self) -> int | str:
        """The rank as a number, or "auto"."""
        return self.rank if self.rank == "auto" else int(self.rank)

"""What `uoe complete` takes, checked before jax is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from uoe_jax.errors import ConfigError, nearest
from uoe_jax.linalg.completion.defaults import DEFAULTS, SOLVERS, FitOptions


@dataclass(frozen=True, kw_only=True)
class CompleteArgs(FitOptions):
    """Complete a matrix from some of its entries; low rank, alternating minimisation.

    FILE holds a row id, a column id and a value for each entry: a text with any usual
    delimiter, .npz, .npy, parquet, a sparse matrix of scipy's, packed or not. Or it is
    a folder that this command wrote, to predict from. Writes factors.safetensors,
    convergence.png, history.json and, on request, predictions.csv. Half of the held-out
    entries choose the ridge and the sweeps, the other half give the error; then all
    entries are fitted again.
    """

    file: Positional[Annotated[Path, arg(metavar="FILE")]]
    rank: str | None = None  # or "auto"; None: 8, or the shorter side if that is less
    columns: str | None = None  # user,item,rating: names, or numbers from 1
    delimiter: str | None = None  # of a text, or tab or space; None: found out
    decimal: str | None = None  # . or , in a text's values; None: found out
    predict: Path | None = None  # a file of row and column ids to predict
    float64: bool = False  # twice the bytes, for errors below 1e-6
    seed: int = 0  # of the split and the start
    out: Path | None = None  # folder, written over; None: FILE's name + _completed
    quiet: bool = False  # print nothing

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"holdout is {self.holdout}; it must be in [0, 1)")
        if self.rank not in (None, "auto") and not self.rank.isdecimal():
            raise ConfigError(f"rank is {self.rank!r}; give a whole number or 'auto'")
        if not 0 <= self.seed < 2**32:
            rule = "at least 0" if self.seed < 0 else "below 2^32"
            raise ConfigError(f"seed is {self.seed}; it must be {rule}")
        if self.bias_ridge is not None and not self.biases:
            raise ConfigError(
                f"bias_ridge is {self.bias_ridge:g} without biases; leave out "
                "--bias-ridge or --no-biases"
            )
        if self.holdout == 0:
            self._check_chosen()
        if self.solver not in SOLVERS:
            raise ConfigError(
                f"solver is {self.solver!r}; {nearest(self.solver, SOLVERS)}"
            )

    def _check_chosen(self) -> None:
        """Refuse what nothing reads where no entry is held out."""
        for name in ("patience", "refit"):
            value = getattr(self, name)
            if value != getattr(DEFAULTS, name):
                option = "--no-refit" if name == "refit" else f"--{name}"
                raise ConfigError(
                    f"{name} is {value} with holdout 0, where no entry chooses the "
                    f"ridge or the sweeps; leave out {option} or hold entries out"
                )

"""How a run is made smaller; the verb's options. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uoe_jax.config import Share
from uoe_jax.errors import ConfigError
from uoe_jax.fields import Checked, Count, Positive

Method = Literal["modegpt", "sort", "drop", "flap", "magnitude"]
Allocation = Literal["uniform", "bi", "curve", "seconds"]
LEAST_TOKENS = 64  # of a calibration text


@dataclass(frozen=True, kw_only=True)
class Compress(Checked):
    """How a run becomes a smaller one."""

    # Share of the blocks' parameters (of their predicted time, with seconds) to cut.
    cut: Share | None = None

    # modegpt: fitted; sort: its MLPs without fits; drop, flap, magnitude: by what
    # channels write, fluctuate, weigh
    method: Method = "modegpt"

    # Which layers and parts lose how much: all alike, by Block Influence, by error
    # curves, by these over predicted seconds.
    allocate: Allocation = "curve"

    # A text file, or tokens of the run's training data.
    calibrate: Count | Path = 16_384

    # bi: how evenly layers share the cut, in deviations of their influence
    temperature: Positive = 1.0

    multiple: Count = 8  # of the MLPs' widths, for kernels

    device: str = "H200"  # seconds: whose model of products

    def check(self) -> None:
        """Raise ConfigError for a cut that is missing."""
        if self.cut is None:
            raise ConfigError("no cut given; give a share of the blocks, such as 0.3")

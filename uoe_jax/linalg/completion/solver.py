"""Which solver a half-step uses, and with what settings."""

from __future__ import annotations

from dataclasses import dataclass

from uoe_jax.errors import ConfigError, nearest
from uoe_jax.linalg.completion.defaults import SOLVERS
from uoe_jax.linalg.sketch import SKETCHES

PRECISIONS = ("highest", "default")


@dataclass(frozen=True)
class Solver:
    """How the least-squares problems of a half-step are solved."""

    kind: str = "auto"
    max_steps: int = 50
    sketch: str = "countsketch"
    sketch_factor: int = 4  # rows of a sketch per unknown
    gram_precision: str = "highest"  # of A^T A; "default" is TF32 on a GPU
    low_precision: bool = False  # iterate on a bfloat16 copy of A, half the bytes

    def __post_init__(self):
        for name, value, known in (
            ("solver", self.kind, SOLVERS),
            ("sketch", self.sketch, SKETCHES),
            ("gram_precision", self.gram_precision, PRECISIONS),
        ):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; {nearest(value, known)}")
        for name in ("max_steps", "sketch_factor"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; it must be at least 1"
                )

    def choose(self, width: int, rank: int) -> str:
        """Return the solver for problems of `width` equations in `rank` unknowns.

        Few equations per unknown condition the problem badly, and small Gram matrices
        are cheap: there the direct solver wins.
        """
        if self.kind != "auto":
            return self.kind
        return "exact" if rank <= 64 or width < 10 * rank else "cg"

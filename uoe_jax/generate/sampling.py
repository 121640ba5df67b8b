"""How tokens are drawn, as one asks for it; imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from uoe_jax.fields import Bounds, Checked, Count, NotNegative, check_ranges

Probability = Annotated[float, Bounds(above=0, most=1)]
TEMPERATURE = 0.8  # of texts where nobody asks for another


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """How a token is drawn from what the model says of the next one."""

    temperature: NotNegative = 1.0  # 0: always the likeliest; 1: as the model has it
    top_k: Count | None = None  # sample among so many likeliest tokens
    top_p: Probability | None = None  # among the fewest that have so much probability
    greedy: bool = False  # always the likeliest token

    def __post_init__(self) -> None:
        """Check every field, bounds included."""
        super().__post_init__()
        check_ranges(self)

    @property
    def takes_likeliest(self) -> bool:
        """Whether nothing is drawn at random."""
        return self.greedy or self.temperature == 0

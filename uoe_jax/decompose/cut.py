"""How a dense run is cut into experts; the verb's options. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from uoe_jax.errors import ConfigError
from uoe_jax.fields import Checked, Count, Seed, Whole
from uoe_jax.options import words

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, ...] = ("attention", "mlp")
Grouping = Literal["contiguous", "random", "weights", "coactivation", "spectral", "mlc"]
RouterStart = Literal["zero", "least_squares", "clusters"]

_PARTS = {"both": PARTS, "attention": ("attention",), "mlp": ("mlp",)}
_STARTS = {
    "auto": None,
    "zero": "zero",
    "least-squares": "least_squares",
    "clusters": "clusters",
}
_FROM_DATA = ("coactivation", "spectral", "mlc", "all")
MAX_EXPERTS = 64


@dataclass(frozen=True, kw_only=True)
class Cut(Checked):
    """How a dense run becomes a union run."""

    # Experts of every attention and MLP block; auto: as many as PPP finds.
    num_experts: Annotated[Count | Literal["auto"], arg(name="experts")]

    max_experts: Count | None = None  # that auto may choose; 64 if not given

    top_k: Count | None = None  # experts a token uses; all of them if not given

    attention_experts: Count | None = None  # where heads need another number

    # MLP experts always on, of those used: the neurons that write most
    shared: Whole = 0

    parts: Annotated[tuple[Part, ...], words(_PARTS)] = PARTS  # what is cut

    # Which neurons become an expert together; all: the best of all on held-out data.
    grouping: Literal[Grouping, "all"] = "contiguous"

    # How routers start: at zero every gate is 1; least squares fits the experts' share
    # of each token; clusters points each expert at a cluster of the block's inputs. By
    # default zero where all experts are used.
    router: Annotated[RouterStart | None, words(_STARTS)] = None

    refit: bool = False  # fit the MLP's down-projections to the experts left on

    # A text file, or tokens of the run's training data, for groupings and fits.
    calibrate: Count | Path = 16_384

    seed: Seed = 0  # of random groups and of fits

    @property
    def experts(self) -> int:
        """The number of experts; raises ConfigError while it is to be found."""
        if self.num_experts == "auto":
            raise ConfigError("the number of experts is still to be found")
        return self.num_experts

    @property
    def chosen(self) -> int:
        """Experts that a token uses."""
        return self.top_k or self.experts

    @property
    def least_experts(self) -> int:
        """The fewest experts that the other wishes allow, where PPP finds them."""
        some_off = self.refit or self.grouping == "all"
        return max(2, (self.top_k or self.shared + 1) + some_off)

    @property
    def start(self) -> RouterStart:
        """How the routers start."""
        exact = self.chosen == self.num_experts
        return self.router or ("zero" if exact else "least_squares")

    @property
    def calibrates(self) -> bool:
        """Whether data decides on anything."""
        if self.num_experts == "auto":
            return True
        grouped = self.grouping in _FROM_DATA or self.shared > 0
        return self.start != "zero" or grouped or self.refit

    def check(self) -> None:
        """Raise ConfigError for wishes that contradict each other."""
        self._check_mlp()
        used = self.top_k or self.num_experts
        if used != "auto":
            self._check_used(used)
        if self.num_experts == "auto":
            if self.top_k is None:
                self._check_all_on("all")
            return
        if self.max_experts is not None:
            raise ConfigError(
                f"max_experts is {self.max_experts} and the number of experts is "
                f"given, {self.num_experts}; it is for experts auto"
            )
        if self.chosen > self.num_experts:
            raise ConfigError(
                f"{type(self).__name__}.top_k is {self.top_k}; it must be 1 to "
                f"{self.num_experts}, the number of experts"
            )
        if self.chosen == self.num_experts:
            self._check_all_on(f"all {self.num_experts}")

    def _check_used(self, used: int) -> None:
        if self.shared >= used and self.shared:
            raise ConfigError(
                f"shared is {self.shared}; always-on experts are part of the "
                f"{used} a token uses and one must be left to route: use 0 to "
                f"{used - 1}"
            )

    def _check_all_on(self, used: str) -> None:
        """Raise ConfigError for what is about experts that are off: there are none."""
        if self.refit or self.grouping == "all":
            name = "refit" if self.refit else "grouping all"
            raise ConfigError(
                f"{name} is for experts that are off and a token uses {used}; give a "
                "smaller top_k, or leave it out"
            )

    def _check_mlp(self) -> None:
        """Raise ConfigError for what asks about neurons where the MLP isn't cut."""
        asked = {
            "shared": self.shared,
            "refit": self.refit,
            "grouping all": self.grouping == "all",
            "experts auto": self.num_experts == "auto",
        }
        if "mlp" in self.parts:
            return
        for name, wanted in asked.items():
            if wanted:
                raise ConfigError(
                    f"{name} is about the MLP's neurons and parts is "
                    f"{list(self.parts)}; cut the MLP too, or leave it out"
                )

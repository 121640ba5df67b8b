"""How a run is made smaller; the verb's options. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from uoe_jax.config import Share
from uoe_jax.errors import ConfigError
from uoe_jax.fields import Checked, Count, Positive

Method = Literal[
    "modegpt", "sort", "drop", "flap", "magnitude", "lord", "svd", "depth", "slice"
]
Allocation = Literal["uniform", "bi", "curve", "seconds"]
LOW_RANK = ("lord", "svd")
FITTED = ("modegpt", "lord")  # to second moments of neurons
ALIKE = ("depth", "slice")  # no way to spread a cut
# flap keeps the means of what a cut drops in biases, other than at another cut.
ANYTIME_METHODS = ("modegpt", "sort", "drop", "magnitude")
COMPARED: tuple[Method, ...] = ("modegpt", "sort", "drop")  # by a curve
LEAST_TOKENS = 64  # of a calibration text
USUAL = {"temperature": 1.0, "multiple": 8, "device": "H200"}  # where not given
ANYTIME = "anytime.safetensors"  # in a run that opens at any cut


def percent(cut: float) -> str:
    """Return a cut in percent as names of runs have it: 30 for 0.3, 0.4 for 0.004."""
    return f"{100 * cut:.6g}"


class Way(NamedTuple):
    """By what channels are sorted, and how a cut is spread over layers and parts."""

    method: Method
    allocate: Allocation
    temperature: float
    multiple: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Compress(Checked):
    """How a run becomes a smaller one."""

    # Share of the blocks' parameters (of their predicted time, with seconds) to cut.
    cut: Share | None = None

    # modegpt: fitted; sort: its MLPs without fits; drop, flap, magnitude: by what
    # channels write, fluctuate, weigh; lord, svd: MLPs of low rank, by what comes out
    # of them, by weights; depth: whole layers; slice: the residual stream's last
    # principal components. modegpt if not given.
    method: Method | None = None

    # Which layers and parts lose how much: all alike, by Block Influence, by error
    # curves, by these over predicted seconds. curve if not given; of low rank uniform.
    allocate: Allocation | None = None

    anytime: bool = False  # one run that opens at any cut, instead of a cut

    rank: Count | None = None  # lord, svd: of every matrix, instead of a cut

    # A text file, or tokens of the run's training data.
    calibrate: Count | Path = 16_384

    # What was seen of the text, read or put there; RUN/statistics.safetensors
    statistics: Path | None = None

    # bi: how evenly layers share the cut, in deviations of their influence; 1 if not
    # given, or as the run that opens at any cut was made to be: so are the next two.
    temperature: Positive | None = None

    # Of the MLPs' widths, of ranks that curves choose and of the width that slice
    # leaves, for kernels; 8 if not given.
    multiple: Count | None = None

    device: str | None = None  # seconds: whose model of products; H200 if not given

    @property
    def chosen(self) -> Method:
        """The method: modegpt if none is given."""
        return self.method or "modegpt"

    @property
    def spread(self) -> Allocation:
        """How the cut is spread: by curves, or of methods without any alike."""
        sorts = self.chosen not in (*LOW_RANK, *ALIKE)
        return self.allocate or ("curve" if sorts else "uniform")

    def way(self, usual: Mapping[str, Any] = USUAL) -> Way:
        """Return the way to cut; of it what isn't given is as usual."""
        given = {name: getattr(self, name) for name in USUAL}
        made = {n: usual[n] if value is None else value for n, value in given.items()}
        return Way(method=self.chosen, allocate=self.spread, **made)

    def check(self) -> None:
        """Raise ConfigError for a cut that is missing, or for what contradicts it."""
        method = self.chosen
        if self.anytime:
            self._check_anytime()
        if self.rank is not None and method not in LOW_RANK:
            raise ConfigError(
                f"rank is {self.rank} with method {method}; only "
                f"{' and '.join(LOW_RANK)} have ranks, leave it out"
            )
        if self.rank is not None and self.cut is not None:
            raise ConfigError(
                f"cut is {self.cut:g} and rank {self.rank}; one settles the other, "
                "give one of them"
            )
        if self.cut is None and self.rank is None and not self.anytime:
            raise ConfigError("no cut given; give a share of the blocks, such as 0.3")
        if self.spread != "uniform" and method in (*LOW_RANK, *ALIKE):
            self._check_spread()

    def check_read(self, made: Compress) -> None:
        """Refuse what a cut doesn't read, by its method and its way to spread.

        `made` is how it is made: of a run that opens at any cut, as that run says. Such
        a run may be made with what later cuts read.
        """
        for message in self.unread(made).values():
            raise ConfigError(message)

    def unread(self, made: Compress) -> dict[str, str]:
        """Return {option: message} of what `check_read` refuses."""
        method, spread = made.chosen, made.spread
        found = {}
        for name, reader in (("temperature", "bi"), ("device", "seconds")):
            value = getattr(self, name)
            if value is not None and spread != reader:
                found[name] = (
                    f"{name} is {value!r}, and the cut is spread by {spread!r}; only "
                    f"--allocate {reader} reads it, leave it out"
                )
        free = method in ("depth", "svd") or (method, spread) == ("lord", "uniform")
        if self.multiple is not None and free:
            found["multiple"] = (
                f"multiple is {self.multiple} with method {method}, whose sizes go in "
                "no such steps; leave it out"
            )
        return found

    def _check_spread(self) -> None:
        """Refuse ways to spread a cut that low ranks and whole layers haven't got."""
        method = self.chosen
        if method == "lord" and self.spread == "curve":
            if self.rank is None:
                return
            raise ConfigError(
                f"allocate is 'curve' with rank {self.rank}, which is every matrix's; "
                "give a cut, or leave one of them out"
            )
        way = {
            "lord": "uniform and curve",
            "svd": "uniform alone",
            "depth": "none, it drops whole layers",
            "slice": "none, it makes all layers narrower alike",
        }[method]
        raise ConfigError(
            f"allocate is {self.allocate!r} with method {method}, which has {way}; "
            "leave it out"
        )

    def _check_anytime(self) -> None:
        given = {"cut": self.cut, "rank": self.rank}
        for name, value in given.items():
            if value is not None:
                raise ConfigError(
                    f"{name} is {value:g} with anytime, a run that opens at any cut; "
                    "leave one of them out"
                )
        if self.chosen not in ANYTIME_METHODS:
            raise ConfigError(
                f"method is {self.chosen} with anytime; "
                f"{', '.join(ANYTIME_METHODS)} put channels in order, use one of them"
            )


@dataclass(frozen=True, kw_only=True)
class Curve(Compress):
    """How a run is made smaller, or by how much each method and cut harms it."""

    # Instead of one run: the loss at each of these cuts, by each of the methods.
    curve: tuple[Share, ...] | None = None

    # Of the curve; modegpt, sort and drop if not given.
    methods: tuple[Method, ...] | None = None

    @property
    def compared(self) -> tuple[Method, ...]:
        """The methods of the curve."""
        return COMPARED if self.methods is None else self.methods

    def one(self, method: Method, cut: float) -> Compress:
        """Return the options of one cut; methods without allocations have their own."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(Compress)}
        given |= {"method": method, "cut": cut}
        by_curves = method == "lord" and self.allocate == "curve"
        if method in (*LOW_RANK, *ALIKE) and not by_curves:
            given["allocate"] = None
        return Compress(**given)

    def check(self) -> None:
        """Raise ConfigError for what contradicts a curve, or each other."""
        if not self.curve:
            if self.methods is not None:
                raise ConfigError(
                    f"methods is {' '.join(self.methods)!r} without curve, which "
                    "compares them; give --curve 0.1 0.3, or --method"
                )
            super().check()
            return
        given = {"cut": self.cut, "rank": self.rank, "method": self.method}
        given["anytime"] = self.anytime or None
        for name, value in given.items():
            if value is not None:
                raise ConfigError(
                    f"{name} is {value} with curve, which has cuts and methods of its "
                    "own; leave one of them out"
                )
        alike = all(method in (*LOW_RANK, *ALIKE) for method in self.compared)
        if alike and self.spread != "curve" and self.allocate not in (None, "uniform"):
            raise ConfigError(
                f"allocate is {self.allocate!r} with {' and '.join(self.compared)}, "
                "which don't read it; leave it out"
            )
        for name, values in (("curve", self.curve), ("methods", self.compared)):
            if len(set(values)) < max(len(values), 1):
                raise ConfigError(
                    f"{name} is {' '.join(map(str, values))!r}; give each once, at "
                    "least one"
                )
        unread = [self.unread(self.one(m, self.curve[0])) for m in self.compared]
        for name, message in unread[0].items():
            if all(name in of_one for of_one in unread):  # by none of the methods
                raise ConfigError(message)

"""Comparisons that were planned before the runs: pooled spread, intervals, Holm.

A comparison is of two models over their seeds. The spread is pooled over all models:
three seeds alone know theirs badly. A comparison that isn't in the plan is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from scipy import stats

from uoe_jax.config import from_json
from uoe_jax.errors import ConfigError, nearest
from uoe_jax.fields import Checked, NotNegative
from uoe_jax.files import format_json, parse_json

LEVEL = 0.05  # of all planned comparisons together: Holm 1979


class Spread(NamedTuple):
    """Standard deviation of one run about its model's mean, and what it rests on."""

    deviation: float
    freedom: int  # degrees of freedom


class Difference(NamedTuple):
    """How far the first model's mean is above the second's."""

    mean: float
    error: float  # standard error
    freedom: int

    @property
    def half(self) -> float:
        """Half of the 95% interval."""
        return float(stats.t.ppf(0.975, self.freedom)) * self.error


@dataclass(frozen=True, kw_only=True)
class Comparison(Checked):
    """One comparison of the plan, and the sentence to print where it fails.

    below: the mean is at least `margin` below, and a difference of 0 is refused.
    within: a difference of `margin` or more is refused.
    """

    name: str
    headline: int  # of evidence.md's list
    first: str  # the model that the claim is about
    second: str  # its control
    size: str
    at: Literal["tokens", "seconds", "flops"] = "tokens"  # what both spend alike
    claim: Literal["below", "within"] = "below"
    margin: NotNegative = 0.0  # bits/byte
    failed: str = ""

    @property
    def digest(self) -> str:
        """What identifies the comparison's content."""
        text = format_json(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Plan:
    """The comparisons that were written down."""

    comparisons: tuple[Comparison, ...]

    def digests(self) -> list[str]:
        """Return what a results file notes of the plan before its runs."""
        return sorted(c.digest for c in self.comparisons)

    def find(self, first: str, second: str, size: str, at: str) -> Comparison:
        """Return the planned comparison; ConfigError for one that isn't planned."""
        wanted = (first, second, size, at)
        for one in self.comparisons:
            if (one.first, one.second, one.size, one.at) == wanted:
                return one
        raise ConfigError(
            f"{first} less {second} at {size} by equal {at} isn't planned; "
            f"{nearest(first, sorted({c.first for c in self.comparisons}))}"
        )

    def check(self, noted: Sequence[str]) -> None:
        """Raise ConfigError for a comparison that isn't in the plan before the runs."""
        late = [c.name for c in self.comparisons if c.digest not in set(noted)]
        if late:
            raise ConfigError(
                f"{late[0]!r} isn't planned: it was written or changed after the first "
                "run of these results; take it out, or begin new results"
            )


def read_plan(path: Path) -> Plan:
    """Return the plan of a JSON file; ConfigError where two have one name."""
    rows = parse_json(path.read_text("utf-8"), path.name)
    plan = Plan(tuple(from_json(format_json(row), Comparison) for row in rows))
    names = [c.name for c in plan.comparisons]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"{path.name} has {min(twice)!r} twice; name each once")
    return plan


def pooled(groups: Mapping[str, Sequence[float]]) -> Spread:
    """Return the spread of runs about their model's mean, over all models.

    Raises ConfigError where no model has two runs: nothing says how they spread.
    """
    squares, freedom = 0.0, 0
    for runs in groups.values():
        mean = statistics.fmean(runs)
        squares += sum((x - mean) ** 2 for x in runs)
        freedom += len(runs) - 1
    if not freedom:
        raise ConfigError("no model has two seeds; an interval needs some that have")
    return Spread(math.sqrt(squares / freedom), freedom)


def differ(
    first: Sequence[float], second: Sequence[float], spread: Spread
) -> Difference:
    """Return the difference of two models' means with the pooled spread's error."""
    error = spread.deviation * math.sqrt(1 / len(first) + 1 / len(second))
    mean = statistics.fmean(first) - statistics.fmean(second)
    return Difference(mean, error, spread.freedom)


def p_value(difference: Difference, comparison: Comparison) -> float:
    """Return how often chance alone shows as much as this, were the claim false.

    below: two-sided, of no difference. within: one-sided, of a difference of `margin`.
    """
    beyond = comparison.margin if comparison.claim == "within" else 0.0
    if difference.error == 0.0:
        return 0.0 if difference.mean < beyond else 1.0
    t = (difference.mean - beyond) / difference.error
    if comparison.claim == "within":
        return float(stats.t.cdf(t, difference.freedom))
    return float(2 * stats.t.sf(abs(t), difference.freedom))


def holm(values: Sequence[float]) -> list[float]:
    """Return p values adjusted for there being so many (Holm 1979), in their order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, number in enumerate(order):
        highest = max(highest, min((len(values) - rank) * values[number], 1.0))
        adjusted[number] = highest
    return adjusted


class Verdict(NamedTuple):
    """What became of a planned comparison; without runs both are None."""

    comparison: Comparison
    difference: Difference | None
    adjusted: float | None  # p, for there being as many as are planned

    @property
    def holds(self) -> bool | None:
        """Whether the claim holds; None: it wasn't measured."""
        if self.difference is None or self.adjusted is None:
            return None
        sure = self.adjusted < LEVEL
        if self.comparison.claim == "within":
            return sure
        return sure and self.difference.mean <= -self.comparison.margin

    @property
    def open(self) -> bool:
        """Whether it doesn't hold but the interval has values at which it would."""
        if self.difference is None or self.holds:
            return False
        margin = self.comparison.margin
        bound = margin if self.comparison.claim == "within" else -margin
        return self.difference.mean - self.difference.half < bound

    def say(self, holds: str, fails: str) -> str:
        """Return the word for what became of it; what fails adds its sentence."""
        if self.holds:
            return holds
        if self.open:
            return "open: the runs neither show it nor refuse it"
        return f"{fails} {self.comparison.failed}"


def judge(plan: Plan, found: Mapping[str, Difference]) -> list[Verdict]:
    """Return what became of each comparison; `found` has differences by name.

    A comparison that wasn't measured counts among those that p is adjusted for: what
    is left out makes nothing else surer. Raises ConfigError for one that isn't planned
    or isn't finite.
    """
    planned = {c.name: c for c in plan.comparisons}
    for name in found:
        if name not in planned:
            raise ConfigError(f"{name!r} isn't planned; {nearest(name, planned)}")
        if not (math.isfinite(found[name].mean) and math.isfinite(found[name].error)):
            raise ConfigError(
                f"{name!r} has a difference that isn't finite; leave out what diverged"
            )
    values = [
        p_value(found[c.name], c) if c.name in found else 1.0 for c in plan.comparisons
    ]
    adjusted = holm(values)
    return [
        Verdict(c, found.get(c.name), p if c.name in found else None)
        for c, p in zip(plan.comparisons, adjusted, strict=True)
    ]

"""The points of a sweep: all combinations of some values, or some drawn at random.

Imports no jax.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from uoe_jax.errors import ConfigError, shown

MOST = 1000  # runs of one sweep
_NAME_BYTES = 200  # file systems take 255, and a temporary file's name is longer

Values = tuple[str, ...]
Point = tuple[tuple[str, str], ...]  # (option, value as it is typed) pairs


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between two ends, drawn so that each doubling is as likely as another."""

    low: float
    high: float
    whole: bool

    def draw(self, rng: random.Random) -> str:
        """Return a number as it is typed."""
        value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        if self.whole:
            return str(min(max(round(value), round(self.low)), round(self.high)))
        text = f"{value:.4g}"  # in a narrow range rounding may leave it
        inside = self.low <= float(text) <= self.high
        return text if inside else repr(min(max(value, self.low), self.high))


def parse_axis(text: str) -> tuple[str, Values | Range]:
    """Return the option and the values of NAME=A,B,C or NAME=LOW..HIGH.

    Raises ConfigError for a text that is neither.
    """
    name, equals, right = text.partition("=")
    name = name.strip().lstrip("-").replace("_", "-")
    values = tuple(value.strip() for value in right.split(","))
    if not name or not equals or not all(values):
        raise ConfigError(
            f"--grid {shown(text)} can't be read; write NAME=A,B,C or NAME=LOW..HIGH, "
            "such as optim.learning-rate=1e-3,3e-3"
        )
    words = [word for value in values for word in value.split()]
    if options := [word for word in words if word.startswith("--")]:
        raise ConfigError(
            f"--grid {shown(text)} has the option {options[0]} among its values; give "
            "an option that varies a --grid NAME=A,B,C of its own, others outside"
        )
    if len(values) == 1 and ".." in right:
        return name, _range(text, right)
    if len(set(values)) < len(values):
        raise ConfigError(f"--grid {shown(text)} has a value twice; name each once")
    return name, values


def _range(text: str, right: str) -> Range:
    low, _, high = right.partition("..")
    try:
        ends = float(low), float(high)
    except ValueError:
        ends = math.nan, math.nan
    if not 0 < ends[0] < ends[1] < math.inf:
        raise ConfigError(
            f"--grid {shown(text)}: a range goes from a positive number to a larger "
            "one, such as 1e-4..1e-2"
        )
    whole = all(end.strip().isdigit() for end in (low, high))
    return Range(low=ends[0], high=ends[1], whole=whole)


def make_points(
    axes: Sequence[tuple[str, Values | Range]], samples: int | None, seed: int
) -> list[Point]:
    """Return all combinations of the axes' values, or so many drawn at random.

    Points are drawn without repeats, fewer where there are no more; the same seed draws
    the same. Raises ConfigError for an option that is named twice, for a range without
    `samples`, and for more than `MOST` points.
    """
    names = [name for name, _ in axes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--grid names {twice[0]} twice; give all its values at once")
    ranges = [name for name, values in axes if isinstance(values, Range)]
    if samples is None:
        if ranges:
            raise ConfigError(
                f"--grid {ranges[0]} is a range: say how many points to draw with "
                "--samples N, or list its values"
            )
        grids = [values for _, values in axes if isinstance(values, tuple)]
        _check_count(math.prod(map(len, grids)))
        return [
            tuple(zip(names, values, strict=True))
            for values in itertools.product(*grids)
        ]
    _check_count(samples)
    rng = random.Random(seed)
    every = math.prod(len(v) for _, v in axes if isinstance(v, tuple))
    found: dict[Point, None] = {}
    for _ in range(100 * samples):
        if len(found) == samples or (not ranges and len(found) == every):
            break
        draw = lambda v: v.draw(rng) if isinstance(v, Range) else rng.choice(v)
        found[tuple((name, draw(values)) for name, values in axes)] = None
    return list(found)


def _check_count(count: int) -> None:
    if count > MOST:
        raise ConfigError(
            f"the sweep has {count:,} runs; use at most {MOST:,}: fewer values, or "
            "--samples N draws some of them"
        )


def point_name(point: Point) -> str:
    """Return a point's name, which is its folder's: learning-rate=0.001,seed=2.

    A name that is too long for a file system ends in a hash instead of the rest.
    """
    leaves = [name.rpartition(".")[2] for name, _ in point]
    parts = []
    for (name, value), leaf in zip(point, leaves, strict=True):
        short = leaf if leaves.count(leaf) == 1 else name
        parts.append(f"{short}={value}")
    kept = "".join(c if c.isalnum() or c in "._-=,+" else "_" for c in ",".join(parts))
    if len(kept.encode()) > _NAME_BYTES:
        digest = hashlib.sha256(kept.encode()).hexdigest()[:12]
        kept = kept.encode()[: _NAME_BYTES - 16].decode("utf-8", "ignore")
        return f"{kept}...{digest}"
    return kept or "run"

"""Loss against what a run spends: fronts of several lengths, and laws fitted to them.

Rule of equal spending: the two models are compared at the spendings of the one that
spends less for a length; the other's loss there is interpolated between its own
lengths, log loss linear in log spending, for each seed. Nothing is extrapolated: where
a front doesn't reach there is no number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from uoe_jax.errors import ConfigError

Front = Sequence[tuple[float, float]]  # (what is spent, loss) of each length

_ROUNDING = 1e-9  # of a spending: an end of a front is on it
_DRAWS = 200  # of runs, for the interval of a fit


def loss_at(front: Front, spent: float) -> float | None:
    """Return a front's loss where so much is spent; None where it doesn't reach."""
    points = sorted(front)
    if not points or spent <= 0:
        return None
    low, high = points[0][0] * (1 - _ROUNDING), points[-1][0] * (1 + _ROUNDING)
    if not low <= spent <= high:
        return None
    xs, ys = np.log(np.array(points)).T
    return float(np.exp(np.interp(math.log(spent), xs, ys)))


class Equal(NamedTuple):
    """Losses of two models' seeds where both spend as much."""

    length: int  # the cheaper model's, counted from its shortest
    spent: float
    first: list[float]
    second: list[float]


def equal_spending(first: Sequence[Front], second: Sequence[Front]) -> list[Equal]:
    """Return the losses of two models, a front a seed, at the cheaper one's lengths.

    A seed that diverged has fewer lengths, or none, and is left out of the others.
    """
    first, second = ([front for front in fronts if front] for fronts in (first, second))
    if not first or not second:
        return []
    ends = [max(front[-1][0] for front in fronts) for fronts in (first, second)]
    cheaper = first if ends[0] <= ends[1] else second
    found = []
    for number in range(max(map(len, cheaper))):
        reached = [front[number][0] for front in cheaper if number < len(front)]
        spent = statistics.fmean(reached)
        sides = []
        for fronts in (first, second):
            # A cheaper seed's own length: its loss there, whatever its second was.
            if fronts is cheaper:
                losses = [f[number][1] for f in fronts if number < len(f)]
            else:
                losses = [loss_at(f, spent) for f in fronts]
            sides.append([x for x in losses if x is not None])
        if all(sides):
            found.append(Equal(number, spent, *sides))
    return found


class Law(NamedTuple):
    """loss = floor + scale[family] * (compute / unit)^-exponent."""

    floor: float
    exponent: float
    scales: dict[str, float]
    unit: float

    def loss(self, family: str, compute: float) -> float:
        """Return the loss of a family at some compute."""
        return (
            self.floor + self.scales[family] * (compute / self.unit) ** -self.exponent
        )

    def multiplier(self, family: str, other: str) -> float:
        """Return how many times as much compute `other` needs for the same loss."""
        return (self.scales[other] / self.scales[family]) ** (1 / self.exponent)


def fit_law(points: Mapping[str, Front]) -> Law:
    """Return the law of one floor and exponent that fits families' (compute, loss).

    Least squares of the logarithm of loss. Raises ConfigError for fewer points than it
    has numbers.
    """
    names = list(points)
    pairs = [(names.index(n), x, y) for n in names for x, y in points[n]]
    if len(pairs) < len(names) + 2 or not all(points.values()):
        raise ConfigError(
            f"{len(pairs)} points of {len(names)} families fit no law; each family "
            f"needs some and all together {len(names) + 2}"
        )
    which, x, y = (np.array(column) for column in zip(*pairs, strict=True))
    unit = float(np.exp(np.log(x).mean()))
    x = x / unit

    def losses(free: np.ndarray) -> np.ndarray:
        floor, exponent, scales = np.exp(free[0]), np.exp(free[1]), np.exp(free[2:])
        return np.log(floor + scales[which] * x**-exponent)

    start = np.log([0.5 * y.min(), 0.3, *[0.5 * y.mean()] * len(names)])
    found = least_squares(lambda free: losses(free) - np.log(y), start, method="lm")
    floor, exponent, *scales = np.exp(found.x).tolist()
    return Law(floor, exponent, dict(zip(names, scales, strict=True)), unit)


def law_intervals(
    points: Mapping[str, Front], deviation: float, family: str, other: str
) -> dict[str, tuple[float, float]]:
    """Return 95% intervals of a law's exponent and of a family's multiplier.

    By fits to losses drawn about the fitted ones with the runs' pooled deviation.
    """
    law, rng = fit_law(points), np.random.default_rng(0)
    drawn = []
    for _ in range(_DRAWS):
        noisy = {
            name: [(x, law.loss(name, x) + deviation * rng.standard_normal())
                   for x, _ in front]
            for name, front in points.items()
        }  # fmt: skip
        one = fit_law(noisy)
        drawn.append((one.exponent, one.multiplier(family, other)))
    low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    names = ("exponent", "multiplier")
    return {n: (float(a), float(b)) for n, a, b in zip(names, low, high, strict=True)}

"""How much of a cut each layer and part takes: alike, by influence, by error curves.

Every part has widths to choose from, each with an error and a cost. Costs are
parameters, or seconds of a device's model of products: nothing here knows which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from uoe_jax.errors import ConfigError

_HALVINGS = 200
LEAST_KEPT = 0.05  # of a part, so that no layer loses one


class Part(NamedTuple):
    """One part of a layer: the widths it may have, ascending, the last the whole one.

    Errors fall with the width: of a layer's output, over the residual's energy.
    """

    layer: int
    name: str  # mlp, query_key, value_output
    widths: Int[np.ndarray, " W"]
    errors: Float[np.ndarray, " W"]
    costs: Float[np.ndarray, " W"]


def candidates(size: int, multiple: int, least: int = 1) -> Int[np.ndarray, " W"]:
    """Return a part's widths: multiples, and the whole size."""
    first = max(
        -(-max(least, round(LEAST_KEPT * size)) // multiple) * multiple, multiple
    )
    found = np.arange(first, size + 1, multiple)
    return np.unique(np.append(found[found <= size], size))


def nearest_widths(
    parts: Sequence[Part], kept: Sequence[float]
) -> Int[np.ndarray, " N"]:
    """Return the width of each part nearest to its kept share of the whole."""
    found = []
    for part, share in zip(parts, kept, strict=True):
        wanted = share * part.widths[-1]
        found.append(part.widths[int(np.argmin(np.abs(part.widths - wanted)))])
    return np.array(found)


def check_cut(
    parts: Sequence[Part],
    cut: float,
    of: float,
    finer: Callable[[], Sequence[Part]] | None = None,
) -> None:
    """Raise ConfigError for a cut, a share of the cost `of`, that parts haven't got.

    `finer` makes the parts without a --multiple, which may have it.
    """
    if _goes(parts, cut, of):
        return
    floor = math.floor(1000 * _most(parts) / of) / 1000
    less = finer is not None and _goes(finer(), cut, of)
    fix = " or give a smaller --multiple" if less else ""
    raise ConfigError(
        f"cut is {cut:g}; every part keeps some of its width, so at most "
        f"{floor:g} can go; cut less{fix}"
    )


def _most(parts: Sequence[Part]) -> float:
    return sum(float(part.costs[-1] - part.costs[0]) for part in parts)


def _goes(parts: Sequence[Part], cut: float, of: float) -> bool:
    return cut <= _most(parts) / of * (1 + 1e-9)


def by_curve(parts: Sequence[Part], budget: float) -> Int[np.ndarray, " N"]:
    """Return the widths of least total error whose costs sum to at most the budget.

    On the lower convex hulls of the curves, greedy by error saved per cost: exact for
    hulls but for the last step, whose rest of the budget then goes to what still fits.

    Raises ConfigError for a budget below the least widths'.
    """
    least = sum(float(part.costs[0]) for part in parts)
    if budget < least - 1e-9 * abs(least):
        raise ConfigError(
            f"a budget of {budget:g} is below {least:g}, what the least widths cost; "
            "cut less"
        )
    steps = []  # (error saved per cost, part, from, to)
    for number, part in enumerate(parts):
        hull = _lower_hull(part.costs, part.errors)
        for low, high in zip(hull, hull[1:], strict=False):
            saved = part.errors[low] - part.errors[high]
            steps.append((saved / (part.costs[high] - part.costs[low]), number, high))
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    places, spent = [0] * len(parts), least
    stuck: set[int] = set()
    for _, number, place in steps:
        part = parts[number]
        extra = float(part.costs[place] - part.costs[places[number]])
        if number in stuck:
            continue
        if spent + extra <= budget + 1e-9 * abs(budget):
            places[number], spent = place, spent + extra
        else:
            stuck.add(number)
    places = _fill(parts, places, budget - spent)
    return np.array([p.widths[i] for p, i in zip(parts, places, strict=True)])


def _fill(parts: Sequence[Part], places: list[int], rest: float) -> list[int]:
    """Return places moved up one width at a time while the rest of the budget lasts."""
    places = list(places)
    while True:
        best, number = 0.0, None
        for n, part in enumerate(parts):
            if places[n] + 1 >= len(part.widths):
                continue
            extra = float(part.costs[places[n] + 1] - part.costs[places[n]])
            saved = float(part.errors[places[n]] - part.errors[places[n] + 1])
            if extra <= rest and saved / max(extra, 1e-300) > best:
                best, number = saved / max(extra, 1e-300), n
        if number is None:
            return places
        part = parts[number]
        rest -= float(part.costs[places[number] + 1] - part.costs[places[number]])
        places[number] += 1


def _lower_hull(
    costs: Float[np.ndarray, " W"], errors: Float[np.ndarray, " W"]
) -> list[int]:
    """Return the corners of a curve's lower convex hull, costs strictly rising."""
    hull: list[int] = []
    for i in range(len(costs)):
        while hull and costs[i] <= costs[hull[-1]] and errors[i] <= errors[hull[-1]]:
            hull.pop()
        if hull and costs[i] <= costs[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            across = (costs[b] - costs[a]) * (errors[i] - errors[a])
            if across <= (costs[i] - costs[a]) * (errors[b] - errors[a]):
                hull.pop()
            else:
                break
        hull.append(i)
    while len(hull) > 1 and errors[hull[-1]] >= errors[hull[-2]]:
        hull.pop()
    return hull


def by_influence(
    influences: Float[np.ndarray, " L"],
    cut: float,
    temperature: float = 1.0,
    cap: float = 1 - LEAST_KEPT,
) -> Float[np.ndarray, " L"]:
    """Return each layer's cut from its Block Influence, `cut` on average.

    phi = L cut softmax(-s / eps) (MoDeGPT, Lin et al. 2024, eq. 11), eps in units of
    the deviation of s. Layers above the cap are held there and the rest of the cut is
    spread over the others. Raises ConfigError for a cut above the cap.
    """
    if cut > cap:
        raise ConfigError(f"cut is {cut:g}; a layer can lose at most {cap:g}")
    influences = np.asarray(influences, np.float64)
    scale = temperature * max(float(influences.std()), 1e-12)
    weights = np.exp(-(influences - influences.min()) / scale)
    found = np.zeros(len(influences))
    held = np.zeros(len(influences), bool)
    while True:
        rest = cut * len(influences) - cap * held.sum()
        free = weights * ~held
        found = np.where(held, cap, rest * free / max(free.sum(), 1e-300))
        above = (found > cap * (1 + 1e-12)) & ~held
        if not above.any():
            return found
        held |= above

"""Orders of a box of chips in which the rings of a mesh's axes take single hops.

What the program itself walks round, as ring attention does, goes as fast as its longest
hop. A mesh axis takes digits of the torus' coordinates: parts of its dimensions, each
with a stride. A grid of digits with an even side has a cycle of single steps.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from uoe_jax.errors import all_divisors
from uoe_jax.topology.graph import Box

_TRIES = 20_000  # ways to deal the dimensions out to the axes


class Digit(NamedTuple):
    """Part of a dimension of the torus that a mesh axis runs over."""

    dimension: int
    size: int
    stride: int
    ring: int  # devices of the whole dimension where its ends are joined, else 0


def box_order(
    box: Box, shape: Sequence[int], weights: Sequence[float], below: float = math.inf
) -> np.ndarray | None:
    """Return the vertices of a box as a mesh, or None: no dealing costs less than that.

    Each way to deal the dimensions' parts out to the axes is tried, up to a number; an
    order costs the mean hop of each axis' rings times its weight.
    """
    best, least = None, below
    for digits in itertools.islice(_deals(box.sides, box.rings, shape), _TRIES):
        hops = [_cycle(own)[0] for own in digits]
        cost = sum(hop * weight for hop, weight in zip(hops, weights, strict=True))
        if cost < least - 1e-9:
            best, least = digits, cost
    if best is None:
        return None
    places = np.zeros((*shape, len(box.sides)), int)
    for axis, own in enumerate(best):
        steps = np.zeros((shape[axis], len(box.sides)), int)
        for row, values in enumerate(_cycle(own)[1]):
            for digit, value in zip(own, values, strict=True):
                steps[row, digit.dimension] += value * digit.stride
        wide = [1] * len(shape) + [len(box.sides)]
        wide[axis] = shape[axis]
        places = places + steps.reshape(wide)
    return np.ravel_multi_index(tuple(np.moveaxis(places, -1, 0)), box.sides)


def box_hops(box: Box, order: np.ndarray) -> list[float]:
    """Return the mean links between neighbours on each axis' rings; 0 for one."""
    places = np.stack(np.unravel_index(order, box.sides), -1)
    rings = np.array(box.rings)
    hops = []
    for axis, size in enumerate(order.shape):
        apart = np.abs(places - np.roll(places, -1, axis=axis))
        around = np.where(rings > 0, rings - apart, apart)
        mean = float(np.minimum(apart, around).sum(-1).mean())
        hops.append(mean if size > 1 else 0.0)
    return hops


def _deals(
    extent: Sequence[int], rings: Sequence[int], sizes: Sequence[int]
) -> Iterator[tuple[tuple[Digit, ...], ...]]:
    """Yield each way to deal the dimensions' parts out to the axes, as their digits."""

    def split(left: int, free: Sequence[int]) -> Iterator[tuple[int, ...]]:
        if not free:
            if left == 1:
                yield ()
            return
        for part in all_divisors(math.gcd(left, free[0])):
            for rest in split(left // part, free[1:]):
                yield (part, *rest)

    def deal(dimension: int, free: Sequence[int], digits: Any) -> Iterator[Any]:
        if dimension == len(extent):
            yield digits
            return
        for parts in split(extent[dimension], free):
            users = [axis for axis, part in enumerate(parts) if part > 1]
            after = [size // part for size, part in zip(free, parts, strict=True)]
            # The last axes on the nearest devices first.
            for order in itertools.permutations(reversed(users)):
                stride, more = 1, [list(own) for own in digits]
                for axis in order:
                    ring = rings[dimension]
                    more[axis].append(Digit(dimension, parts[axis], stride, ring))
                    stride *= parts[axis]
                yield from deal(dimension + 1, after, tuple(tuple(own) for own in more))

    yield from deal(0, list(sizes), tuple(() for _ in sizes))


@functools.lru_cache(maxsize=1024)
def _cycle(digits: tuple[Digit, ...]) -> tuple[float, tuple[tuple[int, ...], ...]]:
    """Return the mean hop of the best closed walk over some digits, and its values."""
    if not digits:
        return 0.0, ((),)
    best: tuple[float, tuple[tuple[int, ...], ...]] = (math.inf, ())
    for order in itertools.permutations(range(len(digits))):
        sizes = [digits[i].size for i in order]
        for walk in (_snake(sizes), _closed_walk(sizes)):
            if walk is None:
                continue
            values = [tuple(step[order.index(i)] for i in range(len(order)))
                      for step in walk]  # fmt: skip
            pairs = zip(values, [*values[1:], values[0]], strict=True)
            cost = sum(_hops(digits, a, b) for a, b in pairs) / len(values)
            if cost < best[0] - 1e-9:
                best = cost, tuple(values)
    return best


def _hops(digits: tuple[Digit, ...], a: Sequence[int], b: Sequence[int]) -> int:
    total = 0
    for digit, first, second in zip(digits, a, b, strict=True):
        apart = abs(first - second) * digit.stride
        total += min(apart, digit.ring - apart) if digit.ring else apart
    return total


def _snake(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return a walk of single steps over a grid, not closed (a reflected Gray code)."""
    if not sizes:
        return [()]
    inner = _snake(sizes[1:])
    return [
        (first, *rest)
        for first in range(sizes[0])
        for rest in (inner if first % 2 == 0 else reversed(inner))
    ]


def _closed_walk(sizes: Sequence[int]) -> list[tuple[int, ...]] | None:
    """Return a cycle of single steps: rows to and fro, back along the first column.

    None where the rows aren't even in number or there is one column.
    """
    columns = _snake(sizes[1:])
    if sizes[0] % 2 or len(columns) < 2:
        return None
    walk = [
        (row, *column)
        for row in range(sizes[0])
        for column in (columns[1:] if row % 2 == 0 else reversed(columns[1:]))
    ]
    return [*walk, *((row, *columns[0]) for row in reversed(range(sizes[0])))]

"""Orders of a torus' devices in which the rings of a mesh's axes take single hops.

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
from uoe_jax.hardware.comms import closes
from uoe_jax.hardware.devices import find_device

_GAIN = 0.95  # of the hops of jax's order; less isn't worth another order
_HEAVIER = 8  # traffic of an axis over that of the axis before
_TRIES = 20_000  # ways to deal the dimensions out to the axes


class Digit(NamedTuple):
    """Part of a dimension of the torus that a mesh axis runs over."""

    dimension: int
    size: int
    stride: int
    ring: int  # devices of the whole dimension where its ends are joined, else 0


def in_rings(placed: np.ndarray) -> np.ndarray:
    """Return a mesh's devices in an order of shorter rings, or as they are.

    The last axes talk most, so they count most. Devices that aren't a whole box of one
    slice stay where they are.
    """
    found = _torus(placed.ravel().tolist())
    if found is None or max(placed.shape) < 3:
        return placed
    by_place, extent, rings = found
    best, least = None, _GAIN * _weigh(mean_hops(placed))
    for digits in itertools.islice(_deals(extent, rings, placed.shape), _TRIES):
        cost = _weigh([_cycle(own)[0] for own in digits])
        if cost < least - 1e-9:
            best, least = digits, cost
    if best is None:
        return placed
    places = np.zeros((*placed.shape, len(extent)), int)
    for axis, own in enumerate(best):
        steps = np.zeros((placed.shape[axis], len(extent)), int)
        for row, values in enumerate(_cycle(own)[1]):
            for digit, value in zip(own, values, strict=True):
                steps[row, digit.dimension] += value * digit.stride
        shape = [1] * placed.ndim + [len(extent)]
        shape[axis] = placed.shape[axis]
        places = places + steps.reshape(shape)
    result = np.empty(placed.shape, object)
    for index in np.ndindex(*placed.shape):
        result[index] = by_place[tuple(places[index].tolist())]
    return result


def mean_hops(placed: np.ndarray) -> list[float]:
    """Return the mean links between neighbours of each axis' rings; 0 for one device.

    Raises ValueError where the devices aren't a whole box of one slice.
    """
    devices = placed.ravel().tolist()
    found = _torus(devices)
    if found is None:
        raise ValueError("the devices aren't a box of one slice")
    _, extent, rings = found
    places = np.array([_place(device) for device in devices])
    places = (places - places.min(axis=0)).reshape(*placed.shape, len(extent))
    hops = []
    for axis, size in enumerate(placed.shape):
        apart = np.abs(places - np.roll(places, -1, axis=axis))
        around = np.where(np.array(rings) > 0, np.array(rings) - apart, apart)
        hops.append(
            float(np.minimum(apart, around).sum(-1).mean()) if size > 1 else 0.0
        )
    return hops


def _weigh(hops: Sequence[float]) -> float:
    return sum(hop * _HEAVIER**place for place, hop in enumerate(hops))


def _place(device: Any) -> tuple[int, ...]:
    return (int(getattr(device, "core_on_chip", 0)), *map(int, device.coords))


def _torus(
    devices: Sequence[Any],
) -> tuple[dict[tuple[int, ...], Any], tuple[int, ...], tuple[int, ...]] | None:
    """Return devices by place, the box's sides and its closed rings; None: no box."""
    kind = find_device(str(getattr(devices[0], "device_kind", "")))
    if kind is None or kind.link.kind != "torus":
        return None
    if any(getattr(device, "coords", None) is None for device in devices):
        return None
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return None
    places = np.array([_place(device) for device in devices])
    places -= places.min(axis=0)
    extent = tuple((places.max(axis=0) + 1).tolist())
    by_place = dict(zip(map(tuple, places.tolist()), devices, strict=True))
    if len(by_place) != len(devices) or math.prod(extent) != len(devices):
        return None
    # The cores of a chip, its first coordinate, form no ring.
    dimensions, sides = kind.link.dimensions, extent[1:]
    rings = [0, *(n if closes(n, sides, dimensions) else 0 for n in sides)]
    return by_place, extent, tuple(rings)


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

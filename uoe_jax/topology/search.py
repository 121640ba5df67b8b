"""Local search for orders with short rings: reversals of segments, and swaps.

Rings by 2-opt (Croes 1958) and moves of short segments; whole meshes by robust tabu
search over swaps (Taillard 1991), all swaps' gains from one product of matrices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

_LEAST = 1e-9  # of an improvement
_KICKS = 40  # restarts of a ring's search from its best, four segments changed about
_SEGMENT = 3  # vertices that are moved together, at most
_WIDE = 512  # vertices; larger rings aren't kicked


def mean_hops(table: np.ndarray, order: np.ndarray) -> list[float]:
    """Return the mean distance between ring neighbours of each axis; 0 for one device.

    `table` are distances, `order` is an array of vertices with an axis for each ring.
    """
    return [
        float(table[order, np.roll(order, -1, axis)].mean()) if size > 1 else 0.0
        for axis, size in enumerate(order.shape)
    ]


def improve_ring(
    table: np.ndarray,
    ring: np.ndarray,
    *,
    kicks: int = _KICKS,
    until: float = math.inf,
    seed: int = 0,
) -> np.ndarray:
    """Return a closed walk over the same vertices that isn't longer, its start kept.

    Ends when a walk has as few hops as it can, after the kicks, or at the time `until`
    of `time.monotonic`.
    """
    count = len(ring)
    if count < 4:
        return ring
    length = lambda walk: float(table[walk, np.roll(walk, -1)].sum())
    random = np.random.default_rng(seed)
    floor = table[ring[:, None], ring[None]].copy()
    np.fill_diagonal(floor, np.inf)
    goal = float(floor.min(axis=1).sum())
    best = _settle(table, np.array(ring), until)
    least = length(best)
    for _ in range(kicks if count <= _WIDE else 0):
        if least <= goal + _LEAST or time.monotonic() > until:
            break
        cuts = np.sort(random.choice(np.arange(1, count), 3, replace=False))
        a, b, c, d = np.split(best, cuts)
        tried = _settle(table, np.concatenate([a, c, b, d]), until)
        if length(tried) < least - _LEAST:
            best, least = tried, length(tried)
    return np.roll(best, -int(np.argmax(best == ring[0])))


def _settle(table: np.ndarray, walk: np.ndarray, until: float) -> np.ndarray:
    """Return a walk that no reversal or move of a short segment makes shorter."""
    while time.monotonic() <= until:
        changed = _reverse_best(table, walk)
        if changed is None:
            changed = _move_best(table, walk)
        if changed is None:
            return walk
        walk = changed
    return walk


def _reverse_best(table: np.ndarray, walk: np.ndarray) -> np.ndarray | None:
    after = np.roll(walk, -1)
    now = table[walk, after]
    gain = (
        now[:, None]
        + now[None]
        - table[np.ix_(walk, walk)]
        - table[np.ix_(after, after)]
    )
    np.fill_diagonal(gain, -np.inf)
    i, j = np.unravel_index(int(np.argmax(gain)), gain.shape)
    if gain[i, j] <= _LEAST:
        return None
    i, j = sorted((int(i), int(j)))
    walk = walk.copy()
    walk[i + 1 : j + 1] = walk[i + 1 : j + 1][::-1]
    return walk


def _move_best(table: np.ndarray, walk: np.ndarray) -> np.ndarray | None:
    """Return the walk with its best move of up to three vertices, or None."""
    count, best, found = len(walk), _LEAST, None
    after = np.roll(walk, -1)
    for size in range(1, min(_SEGMENT, count - 3) + 1):
        first, last = walk, np.roll(walk, 1 - size)
        left, right = np.roll(walk, 1), np.roll(walk, -size)
        saved = table[left, first] + table[last, right] - table[left, right]
        for turned in (False, True):
            head, tail = (last, first) if turned else (first, last)
            longer = (
                table[np.ix_(head, walk)]
                + table[np.ix_(tail, after)]
                - table[walk, after][None]
            )
            gain = saved[:, None] - longer
            # Not into itself, nor where it stands.
            rows = np.arange(count)[:, None]
            inside = (rows + np.arange(-1, size)[None]) % count
            gain[rows, inside] = -np.inf
            i, j = np.unravel_index(int(np.argmax(gain)), gain.shape)
            if gain[i, j] > best:
                best, found = float(gain[i, j]), (int(i), int(j), size, turned)
    if found is None:
        return None
    i, j, size, turned = found
    walk = np.roll(walk, -i)
    segment, rest = walk[:size], walk[size:]
    place = (j - i) % count - size + 1
    if turned:
        segment = segment[::-1]
    return np.concatenate([rest[:place], segment, rest[place:]])


def improve_mesh(
    table: np.ndarray,
    order: np.ndarray,
    traffic: Sequence[float],
    moves: int,
    until: float = math.inf,
    seed: int = 0,
) -> np.ndarray:
    """Return an order of a mesh that costs no more, its shape kept.

    Rows of the mesh are put in the best order along each axis first, which leaves the
    other axes as they are; then vertices are swapped.
    """
    order = _order_rows(table, order, until)
    flow = _flow(order.shape, traffic)
    if moves == 0 or not flow.any():
        return order
    best = swap_search(table, flow, order.ravel(), moves=moves, until=until, seed=seed)
    found = _order_rows(table, best.reshape(order.shape), until)
    cost = lambda tried: float(np.dot(traffic, mean_hops(table, tried)))
    return found if cost(found) < cost(order) - _LEAST else order


def _order_rows(table: np.ndarray, order: np.ndarray, until: float) -> np.ndarray:
    for axis, size in enumerate(order.shape):
        if size < 4:
            continue
        rows = np.moveaxis(order, axis, 0).reshape(size, -1)
        apart = sum(table[np.ix_(column, column)] for column in rows.T)
        ring = improve_ring(np.asarray(apart), np.arange(size), until=until)
        before = np.roll(np.arange(size), -1)
        was = apart[np.arange(size), before].sum()  # type: ignore[index]
        if apart[ring, np.roll(ring, -1)].sum() < was - _LEAST:  # type: ignore[index]
            order = order.take(ring, axis)
    return order


def _flow(shape: Sequence[int], traffic: Sequence[float]) -> np.ndarray:
    """Return what flows between places of a mesh, both ways, so that costs are sums."""
    count = math.prod(shape)
    number, scale = np.arange(count).reshape(shape), max(traffic) or 1.0
    flow = np.zeros((count, count))
    for axis, (size, weight) in enumerate(zip(shape, traffic, strict=True)):
        if size > 1:
            after = np.roll(number, -1, axis).ravel()
            np.add.at(flow, (number.ravel(), after), weight / scale)
    return flow + flow.T


def swap_search(
    table: np.ndarray,
    flow: np.ndarray,
    order: np.ndarray,
    *,
    moves: int,
    until: float = math.inf,
    seed: int = 0,
    alone: np.ndarray | None = None,
) -> np.ndarray:
    """Return an assignment of vertices to places with the least cost found by swaps.

    The cost is half the sum of flow[i, j] * table[order[i], order[j]] over all places,
    both symmetric, plus the sum of alone[i, order[i]]. Robust tabu search: the best
    swap is taken even where it costs more, what was undone is forbidden for a while.
    """
    random = np.random.default_rng(seed)
    now, best = order.copy(), order.copy()
    count, cost, least = len(order), 0.0, 0.0
    if count < 2:
        return best
    forbidden = np.full((count, int(table.shape[0])), -1)
    upper = np.triu(np.ones((count, count), bool), 1)
    near = _neighbours(flow)
    for move in range(moves):
        if time.monotonic() > until:
            break
        gains = _swap_costs(table[np.ix_(now, now)], flow, near)
        if alone is not None:
            mine = alone[:, now]
            stay = np.diagonal(mine)
            gains += mine + mine.T - stay[:, None] - stay[None]
        closed = forbidden[:, now] >= move
        allowed = ~(closed & closed.T) | (cost + gains < least - _LEAST)
        tried = np.where(upper & allowed, gains, np.inf)
        i, j = np.unravel_index(int(np.argmin(tried)), tried.shape)
        if not math.isfinite(tried[i, j]):
            continue
        cost += float(tried[i, j])
        tenure = random.integers(int(0.9 * count), int(1.1 * count) + 2, 2)
        forbidden[i, now[i]], forbidden[j, now[j]] = move + tenure
        now[i], now[j] = now[j], now[i]
        if cost < least - _LEAST:
            best, least = now.copy(), cost
    return best


def _neighbours(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return each place's few others with flow, and the flow; None: not few."""
    most = int((flow != 0).sum(axis=1).max())
    if most * 8 > len(flow):
        return None
    order = np.argsort(flow == 0, axis=1, kind="stable")[:, :most]
    return order, np.take_along_axis(flow, order, 1)


def _swap_costs(
    apart: np.ndarray, flow: np.ndarray, near: tuple[np.ndarray, np.ndarray] | None
) -> np.ndarray:
    """Return by how much each swap of two places raises the cost."""
    if near is None:
        both = flow @ apart
    else:
        both = np.zeros_like(apart)
        for place, amount in zip(near[0].T, near[1].T, strict=True):
            both += amount[:, None] * apart[place]
    own = np.diagonal(both)
    return both + both.T - own[:, None] - own[None] + 2 * flow * apart

"""Experts on devices: those chosen together near each other, busy ones central.

A token's row goes from its device to each device that has an expert it chose. A device
with two of them gets the row once, and rows that go on from device to device share
links; so experts that are chosen together belong on one device, or on neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uoe_jax.errors import ConfigError, divisors, shown
from uoe_jax.topology.graph import Graph, check_connected
from uoe_jax.topology.search import swap_search

_MOVES = 3000


@dataclass(frozen=True, eq=False, kw_only=True)
class Placement:
    """Which device holds each expert, as many on each."""

    device: np.ndarray
    cost: float
    contiguous: float  # the cost of neighbours in a row on each device
    round_robin: float  # and of every so many-th


def place_experts(
    traffic: np.ndarray,
    load: Sequence[float] | np.ndarray,
    graph: Graph,
    *,
    moves: int = _MOVES,
    seed: int = 0,
) -> Placement:
    """Return a placement of experts with few hop-rows, never worse than the plain ones.

    Args:
      traffic: (experts, experts) how often two are chosen by one token.
      load: how often each is chosen.
      graph: of the devices; as many experts on each.
      moves: of the search.
      seed: of the search.

    Raises:
      ConfigError: arrays that don't fit, negative numbers, a graph in parts.
    """
    together, load = _checked(traffic, load, graph)
    experts, count = len(load), graph.size
    # A slot is a place for one expert; those of a device have no distance.
    slots = np.repeat(np.arange(count), experts // count)
    table = (graph.distances / graph.least)[np.ix_(slots, slots)]
    central = (graph.distances / graph.least).mean(axis=0)[slots]
    alone = load[:, None] * central[None]
    plain = {
        "contiguous": np.arange(experts),
        "round_robin": np.arange(experts).reshape(-1, count).T.ravel().argsort(),
    }

    def cost(order: np.ndarray) -> float:
        pairs = 0.5 * float((together * table[np.ix_(order, order)]).sum())
        return pairs + float(alone[np.arange(experts), order].sum())

    start = min(plain.values(), key=cost)
    found = swap_search(table, together, start, moves=moves, seed=seed, alone=alone)
    return Placement(
        device=slots[found],
        cost=cost(found),
        contiguous=cost(plain["contiguous"]),
        round_robin=cost(plain["round_robin"]),
    )


def _checked(
    traffic: np.ndarray, load: Sequence[float] | np.ndarray, graph: Graph
) -> tuple[np.ndarray, np.ndarray]:
    check_connected(graph)
    together, load = np.asarray(traffic, float), np.asarray(load, float)
    experts = len(load) if load.ndim == 1 else 0
    if together.shape != (experts, experts) or not experts:
        raise ConfigError(
            f"traffic has shape {together.shape} and load {load.shape}; give experts x "
            "experts, and a number for each expert"
        )
    if experts % graph.size:
        raise ConfigError(
            f"{experts} experts don't divide over {graph.size} devices; use "
            f"{divisors(experts)}"
        )
    for name, numbers in (("traffic", together), ("load", load)):
        bad = numbers[~(np.isfinite(numbers) & (numbers >= 0))]
        if bad.size:
            raise ConfigError(
                f"{name} holds {shown(float(bad[0]))}; counts are finite and 0 or more"
            )
    # Both ways together, and nothing between an expert and itself.
    together = (together + together.T) / 2
    np.fill_diagonal(together, 0)
    return together, load


def co_selection(chosen: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (traffic, load) of tokens' choices: (tokens, top_k) numbers of experts.

    Raises:
      ConfigError: numbers that aren't experts.
    """
    chosen = np.asarray(chosen)
    if (
        chosen.ndim != 2
        or chosen.size
        and not 0 <= chosen.min() <= chosen.max() < (experts)
    ):
        raise ConfigError(
            f"choices have shape {chosen.shape}; give tokens x top_k numbers of "
            f"experts, 0 to {experts - 1}"
        )
    one = np.zeros((len(chosen), experts))
    one[np.arange(len(chosen))[:, None], chosen] = 1
    traffic = one.T @ one
    np.fill_diagonal(traffic, 0)
    return traffic, one.sum(axis=0)


def hop_rows(
    chosen: np.ndarray, device: np.ndarray, graph: Graph, home: np.ndarray
) -> dict[str, float]:
    """Return the links that a token's row crosses in the mean, three ways to send it.

    "each": once for each expert. "once": once for each device that has one of them.
    "tree": along the cheapest tree that joins the token's device with those (Prim's, of
    distances), as when devices pass rows on.
    """
    table = graph.distances / graph.least
    places = np.asarray(device)[np.asarray(chosen)]
    each = table[home[:, None], places].sum(axis=1).mean()
    once = tree = 0.0
    for start, row in zip(home.tolist(), places.tolist(), strict=True):
        goals = set(row) - {start}
        once += sum(table[start, goal] for goal in goals)
        near = {goal: table[start, goal] for goal in goals}
        while near:
            goal = min(near, key=lambda g: (near[g], g))
            tree += near.pop(goal)
            near = {g: min(d, table[goal, g]) for g, d in near.items()}
    count = max(1, len(places)) if len(places) else math.inf
    return {"each": float(each), "once": once / count, "tree": tree / count}

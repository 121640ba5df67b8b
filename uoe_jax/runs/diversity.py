"""What each path of some objects counts: how likely two of them differ in it.

That is 1 - sum p^2, p the shares of the values found there, and of objects without it
(Simpson 1949). Seen from outcomes this is blind: only settings are counted.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from uoe_jax.runs.leaves import Leaf, leaves_of
from uoe_jax.runs.leaves import Path as Place

_DISTINCT = 4096  # values of a path that are counted one by one


class Diversity:
    """How much the values at each path differ among objects."""

    def __init__(self) -> None:
        self.count = 0
        self._seen: dict[Place, Counter[tuple[str, Any]]] = defaultdict(Counter)

    def add(self, leaves: Iterable[Leaf]) -> None:
        """Count one object's leaves."""
        self.count += 1
        for leaf in leaves:
            counter = self._seen[leaf.path]
            value = (leaf.kind, leaf.value)
            if value in counter or len(counter) < _DISTINCT:
                counter[value] += 1

    def weights(self) -> dict[Place, float]:
        """Return sqrt(1 - sum p^2) of every path.

        One more object is counted that differs everywhere, so that what all share still
        counts a little: the next may be the first that differs in it.
        """
        total = self.count + 1
        found = {}
        for path, counter in self._seen.items():
            known = sum(counter.values())
            # Objects without the path are alike in that; values that were too many to
            # count are all different.
            squares = sum(n * n for n in counter.values())
            if len(counter) < _DISTINCT:
                squares += (self.count - known) ** 2
            found[path] = math.sqrt(max(0.0, 1 - (squares + 1) / total**2))
        return found


def diversity(objects: Iterable[Any]) -> dict[Place, float]:
    """Return the weight of every path of some objects; see `Diversity.weights`."""
    seen = Diversity()
    for value in objects:
        seen.add(leaves_of(value))
    return seen.weights()

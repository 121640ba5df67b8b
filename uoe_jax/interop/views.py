"""One weight of this library inside a tensor of another: split, turned, picked.

Patterns are as einops' (Rogozhnikov 2022): a word an axis, `(j g h) d` for a tensor of
two axes whose first holds j, g and h, the last varying fastest. `0/3` is the first of
three parts that lie side by side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Groups = tuple[tuple[str, ...], ...]
Sizes = Mapping[str, int]


def parse_pattern(text: str) -> Groups:
    """Return the axes of every dimension of a pattern."""
    pieces = re.findall(r"\(([^)]*)\)|(\S+)", text)
    return tuple(tuple(many.split()) if many else (one,) for many, one in pieces)


@dataclass(frozen=True)
class View:
    """Where the axes of a weight of ours lie in a tensor of theirs."""

    theirs: Groups
    ours: Groups

    def sizes(self, shape: tuple[int, ...], more: Sizes) -> dict[str, int]:
        """Return the size of every axis of a weight of ours of this shape.

        `more` has those of axes that lie together in one dimension of ours.
        """
        single = {
            group[0]: size
            for group, size in zip(self.ours, shape, strict=True)
            if len(group) == 1
        }
        return dict(more) | single

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of their tensor."""
        return tuple(math.prod(_size(a, sizes) for a in group) for group in self.theirs)

    def rows(
        self, spans: Mapping[str, tuple[int, int]], sizes: Sizes
    ) -> tuple[int, int]:
        """Return the rows of their tensor that hold the spans of some axes.

        All rows, unless what is cut is the axis that varies slowest.
        """
        first, *rest = self.theirs[0]
        whole = all(a not in spans or spans[a] == (0, sizes[a]) for a in rest)
        size = math.prod(_size(a, sizes) for a in rest)
        if "/" in first or first not in spans or not whole:
            return 0, _size(first, sizes) * size
        low, high = spans[first]
        return low * size, high * size

    def to_ours(self, rows: np.ndarray, sizes: Sizes) -> np.ndarray:
        """Return the weight that rows of their tensor hold; the first axis of the rows
        may be shorter than `sizes` says."""
        return self._turned(rows, sizes).reshape(
            [
                math.prod(self._have(rows, sizes)[a] for a in group)
                for group in self.ours
            ]
        )

    def fill(self, tensor: np.ndarray, weight: np.ndarray, sizes: Sizes) -> None:
        """Write a weight of ours to its place in a whole tensor of theirs."""
        place = self._turned(tensor, sizes)
        place[...] = weight.reshape(place.shape)

    def _have(self, rows: np.ndarray, sizes: Sizes) -> dict[str, int]:
        first, *rest = self.theirs[0]
        have = dict(sizes)
        if "/" not in first:
            have[first] = rows.shape[0] // math.prod(_size(a, sizes) for a in rest)
        return have

    def _turned(self, rows: np.ndarray, sizes: Sizes) -> np.ndarray:
        """Return a view of rows with every axis of ours apart, in our order."""
        axes = [a for group in self.theirs for a in group]
        have = self._have(rows, sizes)
        split = rows.reshape([_size(a, have) for a in axes])
        picks = tuple(int(a[0]) if "/" in a else slice(None) for a in axes)
        split, left = split[picks], [a for a in axes if "/" not in a]
        return split.transpose([left.index(a) for group in self.ours for a in group])


def _size(axis: str, sizes: Sizes) -> int:
    return int(axis.rpartition("/")[2]) if "/" in axis else sizes[axis]

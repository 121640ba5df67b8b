"""Any JSON as one unit vector, and what a vector says at a path.

Gallant's MBAT vectors (arXiv 2202.04771): an object is the sum over its keys of
M_key v(value), a list the sum over its positions of M^(i+1) v(item), M orthogonal.
By default the leaves are what is summed, each with a weight and bound along its whole
path; `weights="paper"` makes every object and list a unit vector first, as the paper.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from uoe_jax.errors import ConfigError, shown
from uoe_jax.runs.binding import (
    HadamardOperators,
    MatrixOperators,
    Operators,
    Rows,
    atom,
)
from uoe_jax.runs.leaves import LENGTH, Leaf, Path, leaves_of, parse_path
from uoe_jax.runs.scales import LOG, SHARE, Fourier, Thermometer, kind_of

_CHUNK = 512  # leaves bound at once: 4 MB, which stays in a core's cache
_KEPT_BYTES = 1 << 26  # of bound leaves in memory
_WORDS = 1000  # of a text, whose vectors are added up
_BATCH = 4096  # new leaves before the objects they are of are summed


class JsonVector:
    """An encoder of JSON values as vectors of `dim` float32 numbers, a power of two.

    Args:
        dim: dimensions; 30 for each leaf of an object let 97 of 100 be read back.
        number: how numbers are written: "fourier" or "thermometer".
        weights: of each path; those that aren't named have 1. "paper" for nested unit
            vectors.
        kinds: the kind of the number at a path, see `scales`.
        thresholds: thermometer: those of a path.
        sets: paths of lists whose order doesn't matter.
        exact: Haar orthogonal matrices, drawn by QR: slower and 340 times larger.
        operators: others than these two.
    """

    def __init__(
        self,
        dim: int = 2048,
        *,
        number: str = "fourier",
        weights: str | Mapping[Path, float] = "equal",
        kinds: Callable[[Path], str] = kind_of,
        thresholds: Mapping[Path, Sequence[float | int]] | None = None,
        sets: Iterable[Path] = (),
        exact: bool = False,
        operators: Operators | None = None,
    ):
        make = MatrixOperators if exact else HadamardOperators
        self.operators = operators or make(dim)
        if self.operators.dim != dim:
            raise ConfigError(f"dim is {dim}; the operators have {self.operators.dim}")
        if number not in ("fourier", "thermometer"):
            raise ConfigError(
                f"number is {shown(number)}; choose fourier or thermometer"
            )
        if not isinstance(weights, Mapping) and weights not in ("equal", "paper"):
            raise ConfigError(
                f"weights are {shown(weights)}; give equal, paper or a weight by path"
            )
        self.dim, self.number, self.sets = dim, number, frozenset(sets)
        self.weights = weights
        own = {tuple(p): t for p, t in (thresholds or {}).items()}
        self.numbers = Fourier(dim) if number == "fourier" else Thermometer(dim, own)
        self.kind_of = functools.lru_cache(1 << 16)(kinds)
        self._bound = _Store(max(_KEPT_BYTES // (4 * dim), 2 * _CHUNK), dim)
        self._text = functools.lru_cache(4096)(self._make_text)

    def as_set(self, path: Path | str) -> JsonVector:
        """Return an encoder for which the list at a path has no order."""
        if isinstance(path, str):
            path = parse_path(path)
        made = JsonVector.__new__(JsonVector)
        made.__dict__ |= self.__dict__ | {"sets": self.sets | {tuple(path)}}
        return made

    def encode(self, value: Any) -> Float32[np.ndarray, " D"]:
        """Return the unit vector of a JSON value.

        Raises DataError for what isn't JSON or is beyond the limits of `leaves`.
        """
        return self.encode_many([value])[0]

    def encode_many(self, values: Iterable[Any]) -> Rows:
        """Return the unit vectors of JSON values, one a row."""
        if self.weights == "paper":
            each = [self.leaves(value) for value in values]
            rows = [self._nested([l.path for l in e], self.values(e)) for e in each]
            return np.array(rows, np.float32).reshape(-1, self.dim)
        return self.encode_leaves(self.leaves(value) for value in values)

    def leaves(self, value: Any) -> list[Leaf]:
        """Return what is summed for a value, in an order that is the value's own."""
        found = leaves_of(value, self.sets)
        if self.sets:
            found.sort(key=lambda leaf: (str(leaf.path), leaf.kind, repr(leaf.value)))
        return found

    def encode_leaves(self, objects: Iterable[list[Leaf]]) -> Rows:
        """Return the unit vectors of objects given by their leaves."""
        made: list[np.ndarray] = []
        pending: list[list[Leaf]] = []
        new: dict[Leaf, None] = {}
        for leaves in objects:
            pending.append(leaves)
            new |= {leaf: None for leaf in leaves if leaf not in self._bound.places}
            if len(new) >= _BATCH:
                made.append(self._sum(pending, list(new)))
                pending, new = [], {}
        if pending or not made:
            made.append(self._sum(pending, list(new)))
        return np.concatenate(made)

    def _sum(self, objects: list[list[Leaf]], new: list[Leaf]) -> Rows:
        """Return the unit vectors of objects, `new` being leaves not yet bound."""
        fresh = self._bind(new)
        table, places = self._bound.with_new(new, fresh)
        weights = self.weights if isinstance(self.weights, Mapping) else {}
        rows = np.empty((len(objects), self.dim), np.float32)
        for row, leaves in zip(rows, objects, strict=True):
            index = [places[leaf] for leaf in leaves]
            scale = [weights.get(leaf.path, 1.0) for leaf in leaves]
            np.dot(np.array(scale, np.float32), table[index], out=row)
            length = np.sqrt(np.dot(row, row))
            if length > 0:
                row /= length
        return rows

    def _bind(self, leaves: list[Leaf]) -> Rows:
        """Return M_k1 M_k2 ... v(leaf) of each leaf."""
        rows = np.empty((len(leaves), self.dim), np.float32)
        for start in range(0, len(leaves), _CHUNK):
            part = slice(start, start + _CHUNK)
            rows[part] = self._bind_chunk(leaves[part])
        return rows

    def _bind_chunk(self, leaves: list[Leaf]) -> Rows:
        rows = self.values(leaves)
        paths = [leaf.path for leaf in leaves]
        for level in range(max(map(len, paths), default=0)):
            # From the innermost step outwards; steps of one kind side by side.
            which = [i for i, path in enumerate(paths) if len(path) > level]
            step = {i: paths[i][len(paths[i]) - 1 - level] for i in which}
            which.sort(key=lambda i: (isinstance(step[i], int), step[i]))
            groups = [
                (s, len(list(items)))
                for s, items in itertools.groupby(which, key=lambda i: step[i])
            ]
            starts = [0, *itertools.accumulate(count for _, count in groups)]
            rows[which] = self.operators.bind(
                [s for s, _ in groups], starts, rows[which]
            )
        return rows

    def values(self, leaves: Sequence[Leaf]) -> Rows:
        """Return the unit vectors of leaves' values, not bound to their paths."""
        rows = np.empty((len(leaves), self.dim), np.float32)
        numbers: dict[tuple[str, Path], list[int]] = {}
        for i, leaf in enumerate(leaves):
            kind = self.kind_of(leaf.path) if leaf.kind == "number" else ""
            if kind in (LOG, SHARE):
                own = leaf.path if self.number == "thermometer" else ()
                numbers.setdefault((kind, own), []).append(i)
            else:
                rows[i] = self.value(leaf.kind, leaf.value)
        for (kind, path), which in numbers.items():
            x = np.array([leaves[i].value for i in which], float)
            rows[which] = self.numbers.encode(kind, x, path)
        return rows

    def value(self, kind: str, value: Any) -> Float32[np.ndarray, " D"]:
        """Return the unit vector of a value that isn't a number on a scale."""
        if kind == "text":
            return self._text(value)
        return atom(kind, str(value), self.dim)

    def _make_text(self, text: str) -> Float32[np.ndarray, " D"]:
        """Return a text's vector: half its own, half the sum of its words' vectors."""
        whole = atom("text", text, self.dim)
        words = text.split()[:_WORDS]
        if len(words) < 2:
            return whole
        bag = np.sum([atom("text", word, self.dim) for word in words], axis=0)
        both = whole + bag / np.linalg.norm(bag)
        return (both / np.linalg.norm(both)).astype(np.float32)

    def _nested(self, paths: Sequence[Path], rows: Rows) -> Float32[np.ndarray, " D"]:
        """Return the paper's vector: every object and list a unit vector itself."""
        if len(paths) == 1 and not paths[0]:
            return rows[0]
        steps, children, start = [], [], 0
        for step, group in itertools.groupby(paths, key=lambda path: path[0]):
            below = [path[1:] for path in group]
            steps.append(step)
            children.append(self._nested(below, rows[start : start + len(below)]))
            start += len(below)
        starts = range(len(steps) + 1)
        total = self.operators.bind(steps, starts, np.stack(children)).sum(axis=0)
        return total / max(np.linalg.norm(total), np.float32(1e-30))

    def unbind(self, vector: Float32[np.ndarray, " D"], path: Path | str) -> Rows:
        """Return [1, D]: what a vector holds at a path, and noise from the rest."""
        x = np.asarray(vector, np.float32)[None]
        for step in parse_path(path) if isinstance(path, str) else path:
            x = self.operators.unbind(LENGTH if step == "#len" else step, x)
        return x


class _Store:
    """Bound leaves that are kept from one object to the next, until there are many."""

    def __init__(self, most: int, dim: int):
        self.most = most
        self.places: dict[Leaf, int] = {}
        self._rows = np.empty((0, dim), np.float32)

    def with_new(
        self, leaves: list[Leaf], rows: Rows
    ) -> tuple[Float32[np.ndarray, "M D"], Mapping[Leaf, int]]:
        """Return the table of all rows and where each leaf's is; keep what fits."""
        old, size = len(self.places), len(self.places) + len(leaves)
        places = zip(leaves, range(old, size), strict=True)
        if size > self.most:
            found = dict(self.places) | dict(places)
            table = np.concatenate([self._rows[:old], rows])
            self.places, self._rows = {}, self._rows[:0]
            return table, found
        if size > len(self._rows):
            room = np.empty((max(size, 2 * old), rows.shape[1]), np.float32)
            room[:old] = self._rows[:old]
            self._rows = room
        self._rows[old:size] = rows
        self.places |= places
        return self._rows, self.places

"""What a vector holds at a path: the nearest value of a codebook, or no answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from uoe_jax.runs.leaves import LENGTH, Leaf, Path, leaves_of, parse_path
from uoe_jax.runs.scales import LOG, SHARE, from_scale, to_scale
from uoe_jax.runs.vector import JsonVector

_GRID = 512  # places of a number's scale that are tried
_LEAST = 3.0  # margin over the noise of one product, 1 / sqrt(dim)


class Answer(NamedTuple):
    """What was read, how like it is, and how far the next best is behind."""

    value: Any
    cosine: float
    margin: float


class Codebook:
    """The values that leaves of an index have, of which one is read from a vector."""

    def __init__(self, encoder: JsonVector, objects: Iterable[Any] = ()):
        self.encoder = encoder
        self._atoms: dict[tuple[str, Any], None] = {}
        self._ranges: dict[Path, tuple[float, float, bool]] = {}
        self._rows: Float32[np.ndarray, "N D"] | None = None
        for value in objects:
            self.add(value)

    def add(self, value: Any) -> None:
        """Take in the values of one JSON value's leaves."""
        for leaf in leaves_of(value, self.encoder.sets):
            if self._is_number(leaf):
                low, high, whole = self._ranges.get(
                    leaf.path, (leaf.value, leaf.value, True)
                )
                self._ranges[leaf.path] = (
                    min(low, leaf.value),
                    max(high, leaf.value),
                    whole and leaf.value == int(leaf.value),
                )
            else:
                self._atoms[leaf.kind, leaf.value] = None
                self._rows = None

    def _is_number(self, leaf: Leaf) -> bool:
        return leaf.kind == "number" and self.encoder.kind_of(leaf.path) in (LOG, SHARE)

    def get(self, vector: Float32[np.ndarray, " D"], path: Path | str) -> Answer | None:
        """Return what a vector holds at a path, or None where nothing stands out.

        A list's length is at `path` + `#len`. A number is read to about a hundredth of
        a doubling; whole ones are rounded where the index has only such at the path.
        """
        path = parse_path(path) if isinstance(path, str) else tuple(path)
        path = tuple(LENGTH if step == "#len" else step for step in path)
        held = self.encoder.unbind(vector, path)[0]
        held = held / max(float(np.linalg.norm(vector)), 1e-30)
        found = self._nearest_atoms(held) if self._atoms else []
        if path in self._ranges or not found:
            found.append(self._nearest_number(held, path))
        first, *rest = sorted(found, key=lambda answer: -answer.cosine)
        margin = first.cosine - max(rest[0].cosine if rest else 0.0, 0.0)
        if margin < _LEAST / self.encoder.dim**0.5:
            return None
        return first._replace(margin=margin)

    def _nearest_atoms(self, held: Float32[np.ndarray, " D"]) -> list[Answer]:
        if self._rows is None:
            rows = [self.encoder.value(kind, value) for kind, value in self._atoms]
            self._rows = np.stack(rows)
        cosines = self._rows @ held
        found = np.argsort(-cosines, kind="stable")[:2]
        values = list(self._atoms)
        return [Answer(_as_json(*values[i]), float(cosines[i]), 0.0) for i in found]

    def _nearest_number(self, held: Float32[np.ndarray, " D"], path: Path) -> Answer:
        """Return the best of a grid over the path's range, at a parabola's top."""
        kind = "log" if path and path[-1] == LENGTH else self.encoder.kind_of(path)
        low, high, whole = self._ranges.get(path, (-1e15, 1e15, False))
        ends = to_scale(kind, np.array([low, high]))
        grid = np.linspace(ends[0], ends[1], _GRID if ends[1] > ends[0] else 1)
        own = path if self.encoder.number == "thermometer" else ()
        rows = self.encoder.numbers.encode(kind, from_scale(kind, grid), own)
        cosines = rows @ held
        top = int(np.argmax(cosines))
        place = grid[top] + _parabola(cosines, top) * (grid[1] - grid[0] if top else 0)
        value = float(from_scale(kind, np.array([place]))[0])
        return Answer(round(value) if whole else value, float(cosines[top]), 0.0)


def _parabola(y: Float32[np.ndarray, " N"], top: int) -> float:
    """Return where, in steps from the top, a parabola through three places peaks."""
    if not 0 < top < len(y) - 1:
        return 0.0
    left, middle, right = (float(v) for v in y[top - 1 : top + 2])
    bend = left - 2 * middle + right
    return 0.0 if bend >= 0 else 0.5 * (left - right) / bend


def _as_json(kind: str, value: Any) -> Any:
    """Return an atom's value as JSON has it."""
    if kind == "empty":
        return {} if value == "{}" else []
    if kind == "odd":
        return float(value)
    return value

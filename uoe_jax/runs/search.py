"""What an index of runs answers: what is like it, why not the same, what to expect.

An expectation is the mean of the nearest configurations' losses, weighted by 1 / (1 -
cosine) as Shepard (1968) does. Its interval is what the same rule, leaving each
configuration out in turn, missed by on the index's own runs (the jackknife+ of Barber
et al. 2021, in units of the distance).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from uoe_jax.errors import ConfigError
from uoe_jax.files import format_json
from uoe_jax.runs.index import RunIndex, add_new_runs, encode_rows, load_current
from uoe_jax.runs.leaves import Leaf, settings_of, show_path
from uoe_jax.runs.leaves import Path as Place
from uoe_jax.runs.read import RunRecord

NEAR = 0.75  # cosine below which nothing is like another: ten of 120 settings differ
_RECALLED = 0.9  # cosine from which a run is worth a line before another starts
_NEIGHBOURS = 3
_TIED = 5  # runs that may be equally near
_LEAST = 3  # configurations from which anything is expected
_SOFTEN = 1e-3  # keeps a weight of 1 / (1 - cosine) finite
ABSENT = "-"  # a setting that one of two lacks


class Difference(NamedTuple):
    """A setting in which two runs differ, and its share of their dissimilarity."""

    path: Place
    first: Any
    second: Any
    share: float

    def __str__(self) -> str:
        return f"{show_path(self.path)} {show_value(self.first)} -> " + show_value(
            self.second
        )


def show_value(value: Any) -> str:
    """Return a setting's value in few characters, on one line."""
    if isinstance(value, tuple):
        text = ",".join(map(show_value, value))
    elif isinstance(value, float):
        text = f"{value:.6g}"
    else:
        text = value if isinstance(value, str) else format_json(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def setting(value: Any, path: Place) -> Any:
    """Return a setting of a JSON value, or ABSENT."""
    return settings_of(value).get(path, ABSENT)


def differing(first: Any, second: Any) -> list[Place]:
    """Return the settings in which two JSON values differ, sorted by name."""
    a, b = settings_of(first), settings_of(second)
    paths = (p for p in a.keys() | b.keys() if a.get(p, ABSENT) != b.get(p, ABSENT))
    return sorted(paths, key=show_path)


def explain(index: RunIndex, first: Any, second: Any) -> tuple[float, list[Difference]]:
    """Return two values' cosine, and the settings that keep it below 1, most first.

    What a setting is worth is by how much the cosine rises where both are encoded
    without it. Shares add up to 1; a setting that the index gives no weight has 0.
    """
    paths = differing(first, second)
    a, b = settings_of(first), settings_of(second)
    leaves = [index.encoder.leaves(value) for value in (first, second)]
    whole, *without = _cosines(index, leaves, [None, *paths])
    gains = np.maximum(np.array(without, float) - whole, 0.0)
    gains[gains < 1e-6] = 0.0  # rounding
    shares = gains / max(float(gains.sum()), 1e-30)
    found = [
        Difference(path, a.get(path, ABSENT), b.get(path, ABSENT), float(share))
        for path, share in zip(paths, shares, strict=True)
    ]
    return whole, sorted(found, key=lambda d: (-d.share, show_path(d.path)))


def _cosines(
    index: RunIndex, pair: Sequence[list[Leaf]], left_out: Iterable[Place | None]
) -> list[float]:
    """Return the cosine of two values, each time without one setting."""
    objects = [
        [leaf for leaf in leaves if path is None or not _below(leaf.path, path)]
        for path in left_out
        for leaves in pair
    ]
    rows = index.encoder.encode_leaves(iter(objects))
    return [min(1.0, float(u @ v)) for u, v in zip(rows[::2], rows[1::2], strict=True)]


def _below(path: Place, setting: Place) -> bool:
    return path[: len(setting)] == setting


class Match(NamedTuple):
    """A run like another, and what differs."""

    record: RunRecord
    cosine: float
    differences: list[Difference]


def like(
    index: RunIndex, record: RunRecord, count: int = 5, *, exclude: Iterable[str] = ()
) -> list[Match]:
    """Return the runs most like one, itself left out, and in what they differ from it.

    The first value of a difference is the found run's.
    """
    left_out = {*exclude, record.path}
    found = index.nearest(record.settings, count, exclude=left_out)
    return [
        Match(other, cosine, explain(index, other.settings, record.settings)[1])
        for other, cosine in found
    ]


class Expectation(NamedTuple):
    """The loss to expect of a plan, and on what it rests.

    `loss`, `low` and `high` are None where no run is near enough to say anything.
    """

    loss: float | None
    low: float | None
    high: float | None
    level: float
    nearest: list[tuple[RunRecord, float]]  # one run of each configuration
    configurations: int  # of the same task
    reason: str = ""  # why nothing is expected


class History:
    """Runs with a loss on one task, as configurations that were repeated."""

    def __init__(self, index: RunIndex, records: Sequence[RunRecord], metric: str):
        self.records = list(records)
        self.values = np.array([r[metric] for r in self.records], float)
        keys = [format_json(r.settings, sort_keys=True) for r in self.records]
        self.keys = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self.which: Int[np.ndarray, " N"] = np.array(
            [self.keys[key] for key in keys], int
        )
        first = [int(np.argmax(self.which == j)) for j in range(len(self.keys))]
        self.firsts = [self.records[i] for i in first]
        settings = (record.settings for record in self.firsts)
        self.rows = encode_rows(index.encoder, settings, len(first), False)
        self.means = np.array(
            [self.values[self.which == j].mean() for j in range(len(first))], float
        )

    def predict(
        self, cosines: Float[np.ndarray, " C"], use: Bool[np.ndarray, " C"]
    ) -> tuple[float, float]:
        """Return the weighted mean of the nearest of `use`, and their distance."""
        places = np.flatnonzero(use)
        order = np.argsort(-cosines[places], kind="stable")[:_NEIGHBOURS]
        chosen = places[order]
        weights = 1 / (1 + _SOFTEN - np.minimum(cosines[chosen], 1.0))
        value = float(weights @ self.means[chosen] / weights.sum())
        # The weighted mean of 1 - cosine, softened.
        distance = len(chosen) / float(weights.sum())
        return value, math.sqrt(distance)

    def loneliest(self) -> float:
        """Return the cosine of the configuration that is furthest from all others.

        Of one that is twice as far out as any before, nothing is known.
        """
        table = self.rows @ self.rows.T
        np.fill_diagonal(table, -1.0)
        return float(table.max(axis=1).min())

    def misses(self) -> Float[np.ndarray, " N"]:
        """Return each run's error over its distance, its configuration left out."""
        table = np.asarray(self.rows @ self.rows.T, float)
        found = np.empty(len(self.values))
        for j in range(len(self.means)):
            use = np.arange(len(self.means)) != j
            value, distance = self.predict(table[j], use)
            runs = self.which == j
            found[runs] = abs(self.values[runs] - value) / distance
        return found

    def spread(self) -> Float[np.ndarray, " M"]:
        """Return each repeated run's distance to the mean of the others like it."""
        found = []
        for j in range(len(self.means)):
            values = self.values[self.which == j]
            if len(values) > 1:
                others = (values.sum() - values) / (len(values) - 1)
                found.append(abs(values - others))
        return np.concatenate(found) if found else np.zeros(0)


def expect(
    index: RunIndex,
    record: RunRecord,
    *,
    metric: str = "loss",
    level: float = 0.8,
    exclude: Iterable[str] = (),
) -> Expectation:
    """Return what to expect of a plan from runs on the same data, or why nothing.

    Raises ConfigError for a level that isn't between 0 and 1.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}; it must be between 0 and 1")
    left_out = {*exclude, record.path}
    same = [
        r
        for r in index.records
        if r.task == record.task and r[metric] is not None and r.path not in left_out
    ]
    if not same:
        reason = f"no run on the same data has a {metric}"
        return Expectation(None, None, None, level, [], 0, reason)
    return _expect(index, record, History(index, same, metric), level)


def _expect(
    index: RunIndex, record: RunRecord, history: History, level: float
) -> Expectation:
    cosines = np.asarray(history.rows @ index.encode(record.settings), float)
    count = len(history.means)
    order = np.argsort(-cosines, kind="stable")[:_NEIGHBOURS]
    nearest = [(history.firsts[i], min(1.0, float(cosines[i]))) for i in order]

    def nothing(reason: str) -> Expectation:
        return Expectation(None, None, None, level, nearest, count, reason)

    same = history.keys.get(format_json(record.settings, sort_keys=True))
    if same is not None:
        value, width = history.means[same], _quantile(history.spread(), level)
        if width is not None:
            return Expectation(
                value, value - width, value + width, level, nearest, count
            )
    if count <= _LEAST:
        return nothing(f"{count} configurations are too few; it takes {_LEAST + 1}")
    limit = max(NEAR, 1 - 2 * (1 - history.loneliest()))
    if cosines.max() < limit:
        return nothing(
            f"the nearest is at {cosines.max():.3f}; {limit:.3f} would be near enough"
        )
    value, distance = history.predict(cosines, np.ones(count, bool))
    width = _quantile(history.misses(), level)
    if width is None:
        return nothing(f"{len(history.values)} runs are too few for {level:.0%}")
    half = width * distance
    return Expectation(value, value - half, value + half, level, nearest, count)


def _quantile(misses: Float[np.ndarray, " N"], level: float) -> float | None:
    """Return the miss that `level` of new ones stay below, None if there are too few.

    The ceil((n + 1) level)-th smallest of n, as conformal prediction has it.
    """
    place = math.ceil((len(misses) + 1) * level)
    return float(np.sort(misses)[place - 1]) if place <= len(misses) else None


def recall(folder: Path, file: Path, record: RunRecord, seconds: float) -> Match | None:
    """Return the run most like a plan, or None: nothing near, or no time to find out.

    Reads the index in `file` if there is one, and adds the runs of `folder` it lacks
    until `seconds` are over.
    """
    index = load_current(file, lazy=True) or RunIndex([])
    add_new_runs(index, folder, seconds)
    found = index.nearest(record.settings, _TIED, exclude=[record.path])
    if not found or found[0][1] < _RECALLED:
        return None
    # Settings in which no indexed run differs have no weight: of runs that are equally
    # near, the one that differs in fewest.
    tied = [index.settled(r) for r, cosine in found if cosine > found[0][1] - 1e-6]
    other = min(tied, key=lambda r: len(differing(r.settings, record.settings)))
    if not Path(other.path).exists():
        return None
    explained = explain(index, other.settings, record.settings)[1]
    return Match(other, found[0][1], explained)


def principal_axes(
    vectors: Float32[np.ndarray, "N D"],
) -> tuple[Float[np.ndarray, "N 2"], tuple[float, float]]:
    """Return vectors on their first two principal axes, and the shares they explain."""
    centred = np.asarray(vectors, float) - np.mean(vectors, axis=0, dtype=float)
    wide = centred.shape[1] > len(centred)
    gram = centred @ centred.T if wide else centred.T @ centred
    values, axes = np.linalg.eigh(gram)
    values, axes = np.maximum(values[::-1][:2], 0), axes[:, ::-1][:, :2]
    places = axes * np.sqrt(values) if wide else centred @ axes
    places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    # Of either sign; the largest entry is made positive.
    for axis in places.T:
        if len(axis) and axis[np.argmax(abs(axis))] < 0:
            axis *= -1
    total = max(float(np.trace(gram)), 1e-30)
    shares = [*(float(v) / total for v in values), 0.0, 0.0]
    return places, (shares[0], shares[1])

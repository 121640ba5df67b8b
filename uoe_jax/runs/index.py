"""Vectors of many runs, or of any JSON, in one file; the nearest by an exact product.

What a path counts is 1 - sum p^2, p the shares of the values that the index's own runs
have there (and of those without it): how likely two runs differ in it.
"""

from __future__ import annotations

import io
import json
import math
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float16, Float32

from uoe_jax.errors import ConfigError, DataError
from uoe_jax.files import write_atomically
from uoe_jax.runs.leaves import Leaf
from uoe_jax.runs.leaves import Path as Place
from uoe_jax.runs.read import BROKEN, RunRecord, find_files, read_run, stamp_of
from uoe_jax.runs.vector import JsonVector

INDEX = ".index.npz"  # in the folder of the runs
VERSION = 1  # of the vectors; an index of another one is built anew
_DISTINCT = 4096  # values of a path that are counted one by one
_BLOCK = 1 << 14  # rows compared at once
_ENCODED = 1000  # objects encoded at once


class RunIndex:
    """Records and their vectors, row by row; broken runs are kept, without a row.

    Args:
        records: runs; `from_objects` takes any JSON.
        dim: dimensions of the vectors.
        number: "fourier" or "thermometer".
        weights: "diversity", or what `JsonVector` takes.
        half: keep float16 numbers, half the bytes.
    """

    def __init__(
        self,
        records: Iterable[RunRecord],
        *,
        dim: int = 2048,
        number: str = "fourier",
        weights: str | Mapping[Place, float] = "diversity",
        half: bool = False,
    ):
        everything = list(records)
        self.records = [r for r in everything if r.status != BROKEN]
        self.broken = [r for r in everything if r.status == BROKEN]
        if weights == "diversity":
            weights = diversity(r.settings for r in self.records)
        self.encoder = JsonVector(dim, number=number, weights=weights)
        settings = (record.settings for record in self.records)
        self.vectors = encode_rows(self.encoder, settings, len(self.records), half)

    @classmethod
    def from_objects(
        cls, objects: Iterable[Any], names: Sequence[str] | None = None, **options: Any
    ) -> RunIndex:
        """Return the index of JSON values, named by number where no names are given."""
        values = [v if isinstance(v, dict) else {"value": v} for v in objects]
        names = [str(i) for i in range(len(values))] if names is None else names
        if len(names) != len(values):
            raise ConfigError(f"{len(names)} names for {len(values)} objects")
        made = [RunRecord(n, n, v) for n, v in zip(names, values, strict=True)]
        return cls(made, **options)

    def __len__(self) -> int:
        return len(self.records)

    def encode(self, settings: Any) -> Float32[np.ndarray, " D"]:
        """Return the vector of a JSON value, weighted as the index's are."""
        if not isinstance(settings, dict):
            settings = {"value": settings}
        return self.encoder.encode(settings)

    def nearest(
        self,
        settings: Any,
        count: int = 5,
        *,
        exclude: Iterable[str] = (),
    ) -> list[tuple[RunRecord, float]]:
        """Return the runs most like some settings and their cosines, nearest first.

        `exclude` are paths of records to leave out. Of equals the first comes first.
        """
        if not isinstance(count, int) or count < 1:
            raise ConfigError(f"count is {count}; it must be at least 1")
        cosines = self.similarities(self.encode(settings))
        left_out = set(exclude)
        found: list[tuple[RunRecord, float]] = []
        for i in _largest(cosines, count + len(left_out)):
            if self.records[i].path not in left_out and len(found) < count:
                found.append((self.records[i], float(min(1.0, cosines[i]))))
        return found

    def similarities(
        self, vector: Float32[np.ndarray, " D"]
    ) -> Float32[np.ndarray, " N"]:
        """Return the cosine of every record with a unit vector."""
        return similarities(self.vectors, vector)

    def record(self, path: str) -> RunRecord | None:
        """Return the record of a path, if it is in the index."""
        return next((r for r in self.records if r.path == path), None)

    def subset(self, records: Sequence[RunRecord]) -> RunIndex:
        """Return an index of some of the records, with the same vectors."""
        places = {id(record): i for i, record in enumerate(self.records)}
        made = RunIndex.__new__(RunIndex)
        made.records, made.broken = list(records), self.broken
        made.encoder = self.encoder
        made.vectors = self.vectors[[places[id(record)] for record in records]]
        return made

    def save(self, path: Path) -> int:
        """Write the index whole or not at all; return its bytes."""
        weights = self.encoder.weights
        listed = (
            [[list(p), w] for p, w in weights.items()]
            if isinstance(weights, Mapping)
            else weights
        )
        about = {
            "version": VERSION,
            "dim": self.encoder.dim,
            "number": self.encoder.number,
            "weights": listed,
            **_as_json(self.records),
            "broken": [vars(r) for r in self.broken],
        }
        text = json.dumps(about, separators=(",", ":")).encode()
        buffer = io.BytesIO()
        np.savez(buffer, vectors=self.vectors, about=np.frombuffer(text, np.uint8))
        write_atomically(path, buffer.getvalue())
        return buffer.tell()

    @classmethod
    def load(cls, path: Path) -> RunIndex:
        """Return the index in a file; DataError for another version or damage."""
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(file["about"].tobytes())
                vectors = file["vectors"]
            if about["version"] != VERSION:
                raise ValueError(f"version {about['version']}")
            made = cls.__new__(cls)
            settings = about["settings"]
            made.records = [
                RunRecord(**{**r, "settings": settings[r["settings"]]})
                for r in about["records"]
            ]
            made.broken = [RunRecord(**r) for r in about["broken"]]
            weights = about["weights"]
            if not isinstance(weights, str):
                weights = {tuple(p): w for p, w in weights}
            made.encoder = JsonVector(
                about["dim"], number=about["number"], weights=weights
            )
            if vectors.shape != (len(made.records), made.encoder.dim):
                raise ValueError(f"{vectors.shape} vectors")
            made.vectors = vectors
        except (
            ValueError,
            LookupError,
            TypeError,
            zipfile.BadZipFile,
            EOFError,
        ) as error:
            raise DataError(
                f"{path} is not an index of this version ({error}); delete it"
            ) from None
        return made


def _as_json(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return records as JSON, settings that repeat once: most of a file is them."""
    distinct: dict[str, int] = {}
    texts = [json.dumps(r.settings, sort_keys=True) for r in records]
    numbers = [distinct.setdefault(text, len(distinct)) for text in texts]
    firsts = {n: r.settings for n, r in zip(numbers[::-1], records[::-1], strict=True)}
    return {
        "settings": [firsts[i] for i in range(len(distinct))],
        "records": [
            vars(record) | {"settings": number}
            for record, number in zip(records, numbers, strict=True)
        ],
    }


def encode_rows(
    encoder: JsonVector, objects: Iterable[Any], count: int, half: bool
) -> Float32[np.ndarray, "N D"] | Float16[np.ndarray, "N D"]:
    """Return the vectors of `count` objects without holding them all twice."""
    kind = np.float16 if half else np.float32
    rows, done, part = np.empty((count, encoder.dim), kind), 0, []
    for value in objects:
        part.append(value)
        if len(part) == _ENCODED:
            rows[done : done + len(part)] = encoder.encode_many(part)
            done, part = done + len(part), []
    if part:
        rows[done:] = encoder.encode_many(part)
    return rows


def similarities(
    vectors: Float32[np.ndarray, "N D"] | Float16[np.ndarray, "N D"],
    vector: Float32[np.ndarray, " D"],
) -> Float32[np.ndarray, " N"]:
    """Return products of rows with a vector, block by block where they are float16."""
    if vectors.dtype == np.float32:
        return vectors @ vector
    found = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), _BLOCK):
        part = slice(start, start + _BLOCK)
        found[part] = vectors[part].astype(np.float32) @ vector
    return found


def _largest(values: Float32[np.ndarray, " N"], count: int) -> list[int]:
    """Return the places of the largest values, largest first, of equals the first."""
    if count < len(values):
        edge = np.partition(values, len(values) - count)[len(values) - count]
        places = np.flatnonzero(values >= edge)
    else:
        places = np.arange(len(values))
    order = np.argsort(-values[places], kind="stable")
    return [int(i) for i in places[order]]


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
    plain, seen = JsonVector(64), Diversity()
    for value in objects:
        seen.add(plain.leaves(value))
    return seen.weights()


def open_index(roots: Sequence[Path], file: Path | None = None) -> RunIndex:
    """Return the index of all runs below some roots, read from `file` where it holds.

    Only runs whose files changed are read again. `file` is written where it can be.
    """
    before = _load_or_none(file)
    known = {r.path: r for r in (*before.records, *before.broken)} if before else {}
    records, changed = [], 0
    for path in find_files(list(roots)):
        old = known.pop(str(path), None)
        if old is not None and old.stamp == stamp_of(path):
            records.append(old)
            continue
        changed += 1
        record = read_run(path)
        if record is not None:
            records.append(record)
    if before is not None and not known and not _news(records, before):
        return before
    index = RunIndex(records)
    if file is not None and file.parent.is_dir():
        try:
            index.save(file)
        except OSError:  # a folder that others own: searched all the same
            pass
    return index


def _news(records: Sequence[RunRecord], before: RunIndex) -> bool:
    kept = {id(r) for r in (*before.records, *before.broken)}
    return any(id(record) not in kept for record in records)


def _load_or_none(file: Path | None) -> RunIndex | None:
    try:
        return RunIndex.load(file) if file is not None and file.is_file() else None
    except (OSError, DataError):  # of another version, or damaged: built anew
        return None


def add_new_runs(index: RunIndex, root: Path, seconds: float) -> None:
    """Add runs that an index lacks, by its own weights, while there is time."""
    end = time.perf_counter() + seconds
    known = {record.path for record in (*index.records, *index.broken)}
    new: list[RunRecord] = []
    for path in find_files([root]) if root.is_dir() else ():
        if time.perf_counter() > end:
            break
        if str(path) not in known and (record := read_run(path)) is not None:
            new.append(record)
    whole = [record for record in new if record.status != BROKEN]
    if whole:
        rows: Float[np.ndarray, "M D"] = index.encoder.encode_many(
            record.settings for record in whole
        )
        index.vectors = np.concatenate([index.vectors, rows])
        index.records += whole

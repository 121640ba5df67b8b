"""Vectors of many runs, or of any JSON, in one file; the nearest by an exact product.

Paths are weighted by how much the index's own runs differ in them; see `diversity`.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import time
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float16, Float32

from uoe_jax.errors import ConfigError, DataError
from uoe_jax.files import format_json, write_atomically
from uoe_jax.runs.diversity import diversity
from uoe_jax.runs.leaves import Path as Place
from uoe_jax.runs.read import (
    BROKEN,
    DEFAULTS,
    RunRecord,
    find_files,
    read_run,
    stamp_of,
)
from uoe_jax.runs.vector import JsonVector

INDEX = ".index.npz"  # in the folder of the runs
VERSION = 1  # of the vectors; an index of another one is built anew
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
        self.defaults = DEFAULTS  # that the records of runs were completed with
        self._texts: list[bytes] = []  # settings that a lazy load left as text
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
        made.encoder, made._texts = self.encoder, self._texts
        made.defaults = self.defaults
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
        numbers, texts = _distinct([r.settings for r in self.records])
        about = {
            "version": VERSION,
            "defaults": DEFAULTS,
            "dim": self.encoder.dim,
            "number": self.encoder.number,
            "weights": listed,
            "records": [
                vars(record) | {"settings": number}
                for record, number in zip(self.records, numbers, strict=True)
            ],
            "broken": [vars(r) for r in self.broken],
        }
        text = format_json(about).encode()
        buffer = io.BytesIO()
        np.savez(
            buffer,
            vectors=self.vectors,
            about=np.frombuffer(text, np.uint8),
            settings=np.frombuffer(b"".join(texts), np.uint8),
            ends=np.cumsum([len(t) for t in texts], dtype=np.int64),
        )
        write_atomically(path, buffer.getvalue())
        return buffer.tell()

    @classmethod
    def load(cls, path: Path, *, lazy: bool = False) -> RunIndex:
        """Return the index in a file; DataError for another version or damage.

        With `lazy` settings stay text until `settled` asks for one record's: reading
        those of a thousand runs takes longer than comparing them.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(file["about"].tobytes())
                if about["version"] != VERSION:
                    raise ValueError(f"version {about['version']}")
                made = cls.__new__(cls)
                made.defaults = about["defaults"]
                made.vectors = file["vectors"]
                made._texts = _split(file["settings"].tobytes(), file["ends"])
            made.records = [RunRecord(**r) for r in about["records"]]
            made.broken = [RunRecord(**r) for r in about["broken"]]
            if not lazy:
                settings = [json.loads(text) for text in made._texts]
                made.records = [
                    dataclasses.replace(r, settings=settings[r.settings])
                    for r in made.records
                ]
            weights = about["weights"]
            if not isinstance(weights, str):
                weights = {tuple(p): w for p, w in weights}
            made.encoder = JsonVector(
                about["dim"], number=about["number"], weights=weights
            )
            if made.vectors.shape != (len(made.records), made.encoder.dim):
                raise ValueError(f"{made.vectors.shape} vectors")
        except (ValueError, LookupError, TypeError, *_DAMAGE) as error:
            raise DataError(
                f"{path} is not an index of this version ({error}); delete it"
            ) from None
        return made

    def settled(self, record: RunRecord) -> RunRecord:
        """Return a record with its settings, which `load(lazy=True)` left as text."""
        if not isinstance(record.settings, int):
            return record
        text = self._texts[record.settings]
        return dataclasses.replace(record, settings=json.loads(text))


_DAMAGE = (zipfile.BadZipFile, EOFError, zlib.error)


def _distinct(settings: Sequence[Any]) -> tuple[list[int], list[bytes]]:
    """Return the number of each of some settings, and their JSON, repeats once."""
    distinct: dict[str, int] = {}
    keys = [format_json(each, sort_keys=True) for each in settings]
    numbers = [distinct.setdefault(key, len(distinct)) for key in keys]
    return numbers, [key.encode() for key in distinct]


def _split(text: bytes, ends: np.ndarray) -> list[bytes]:
    starts = [0, *(int(end) for end in ends)]
    return [text[a:b] for a, b in itertools.pairwise(starts)]


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


def open_index(roots: Sequence[Path], file: Path | None = None) -> RunIndex:
    """Return the index of all runs below some roots, read from `file` where it holds.

    Only runs whose files changed are read again. `file` is written where it can be.
    """
    before = load_current(file)
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


def load_current(file: Path | None, *, lazy: bool = False) -> RunIndex | None:
    """Return the index of runs in a file; None if there is none that is still good.

    One of a version with other settings isn't: its runs lack the new ones.
    """
    try:
        if file is None or not file.is_file():
            return None
        found = RunIndex.load(file, lazy=lazy)
    except (OSError, DataError):  # damaged, or of other vectors: built anew
        return None
    return found if found.defaults == DEFAULTS else None


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

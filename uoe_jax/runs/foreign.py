"""JSON that is nobody's run: a folder of files, one object a file or a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from uoe_jax.errors import DataError, first_line
from uoe_jax.files import parse_json, read_json
from uoe_jax.runs.leaves import leaves_of
from uoe_jax.runs.read import BROKEN, NEW, RunRecord, stamp_of

_JSON_BYTES = 1 << 26  # of a file with one object
_LINES = (".jsonl", ".ndjson")


def read_foreign(folder: Path) -> Iterator[RunRecord]:
    """Yield the objects of a folder's JSON files: one a file, or one a line of .jsonl.

    What can't be read or encoded comes as a broken record. Raises DataError for a
    folder without such files.
    """
    files = [folder] if folder.is_file() else _json_files(folder)
    if not files:
        raise DataError(f"{folder} has no .json or .jsonl files; give their folder")
    for file in files:
        yield from _read_file(file)


def _json_files(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix in (".json", *_LINES) and path.is_file() and not hidden:
            found.append(path)
    return found


def _read_file(file: Path) -> Iterator[RunRecord]:
    stamp = stamp_of(file)
    if file.suffix not in _LINES:
        yield _read_object(file, str(file), None, stamp)
        return
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _read_object(file, f"{file}:{number}", line, stamp)
    except OSError as error:
        yield RunRecord(str(file), file.name, status=BROKEN, problem=first_line(error))


def _read_object(file: Path, name: str, line: bytes | None, stamp: str) -> RunRecord:
    try:
        if line is None:
            value = read_json(file, max_bytes=_JSON_BYTES)
        else:
            value = parse_json(line, name)
        leaves_of(value)
    except (OSError, ValueError, RecursionError) as error:
        return RunRecord(name, name, status=BROKEN, problem=first_line(error))
    settings = value if isinstance(value, dict) else {"value": value}
    return RunRecord(name, Path(name).name, settings, stamp=stamp, status=NEW)

"""Files written whole or not at all."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from uoe_jax.errors import ConfigError

# A drive letter of Windows is one letter.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def check_local(path: str | os.PathLike[str], what: str) -> None:
    """Raise ConfigError for an address such as `gs://bucket/run`: paths are local.

    `pathlib` makes one slash of two, so `gs:/` counts too.
    """
    found = _SCHEME.match(os.fspath(path))
    if found:
        scheme = f"{found[1]}://"
        given = scheme + os.fspath(path)[found.end() :].lstrip("/")
        raise ConfigError(
            f"{what} is {given}; {scheme} isn't read or written here: "
            "mount the store (gcsfuse, s3fs, NFS) and give the local folder"
        )


class JsonLines(NamedTuple):
    """What a file of one JSON object a line holds."""

    records: list[dict[str, Any]]
    texts: list[bytes]  # the line of each record, with its end
    broken: list[int]  # numbers, from 1, of the lines that hold no such object


def read_json_lines(path: Path, *, step: bool = False) -> JsonLines:
    """Return the objects of a file, and which of its lines aren't any.

    With `step` an object also needs a whole number `step` and a text `kind`, as the
    lines of a run's metrics have. A last line without an end, cut short by a kill or
    a full disk, is left out and not counted.
    """
    found = JsonLines([], [], [])
    *lines, rest = path.read_bytes().split(b"\n")
    for number, text in enumerate([*lines, rest], 1):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            record = None
        whole = isinstance(record, dict) and (
            not step
            or (type(record.get("step")) is int and isinstance(record.get("kind"), str))
        )
        if isinstance(record, dict) and whole:
            found.records.append(record)
            found.texts.append(text + b"\n")
        elif number <= len(lines):
            found.broken.append(number)
    return found


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old or the new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

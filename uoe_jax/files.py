"""Files written whole or not at all, and JSON that every parser reads.

Why not `json` alone: Python writes NaN and Infinity, which no other parser takes, reads
them back, keeps the last of two equal keys, and lets a file decide how much memory and
how many levels it takes.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from uoe_jax.errors import ConfigError, DataError, shown
from uoe_jax.escape import escape_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BYTES = 1 << 28  # of a JSON file; the largest tokenizers have 2^25
PICTURES = (".png", ".svg", ".pdf")  # what pictures' names may end in
MAX_DEPTH = 64  # levels of objects and arrays
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
# A drive letter of Windows is one letter.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def local_path(path: str | os.PathLike[str], what: str) -> Path:
    """Return a path that `check_path` lets through; `what` names it in messages."""
    check_path(path, what)
    return Path(path)


def check_path(path: str | os.PathLike[str], what: str) -> None:
    """Raise ConfigError for what names no local file: "", `gs://bucket/run`, a NUL.

    `Path("")` is the working folder, which nobody means by an empty text, such as an
    unset variable of a shell. `pathlib` makes one slash of two, so `gs:/` counts too.
    """
    try:
        text = os.fspath(path)
    except TypeError:
        raise ConfigError(f"{what} is {shown(path)}; give a path") from None
    if not isinstance(text, str):
        raise ConfigError(f"{what} is {shown(text)}; give a path as text, not bytes")
    if not text.strip():
        raise ConfigError(
            f"{what} is empty, which names no file or folder; give a path or leave it "
            "out"
        )
    if "\0" in text:
        raise ConfigError(
            f"{what} is {shown(text)}; it holds a NUL character, which no path can"
        )
    found = _SCHEME.match(text)
    if found:
        scheme = f"{found[1]}://"
        root = "/" if found[1] == "file" else ""
        given = scheme + root + text[found.end() :].lstrip("/")
        raise ConfigError(
            f"{what} is {given}; {scheme} isn't read or written here: "
            "mount the store (gcsfuse, s3fs, NFS) and give the local folder"
        )


def check_target(path: Path | None, what: str) -> None:
    """Raise ConfigError where no file can be written; before the work that fills it.

    `what` is the option; None is a file that nobody asked for.
    """
    if path is None:
        return
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(
            f"{what} {path} can't be written (there is no folder {folder}); make it, "
            "or name a file in one that exists"
        )
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no file"
        raise ConfigError(f"{what} {path} is {kind}; name a file to write")
    if not os.access(folder, os.W_OK):
        raise ConfigError(
            f"{what} {path} can't be written (no right to write in {folder}); name a "
            "file in another folder"
        )


def check_picture(path: Path | None, what: str) -> None:
    """Raise ConfigError for a name that isn't a picture's, and as `check_target`."""
    if path is not None and path.suffix.lower() not in PICTURES:
        raise ConfigError(
            f"{what} is {path}; its name must end in {', '.join(PICTURES)}"
        )
    check_target(path, what)


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


def write_picture(path: Path, figure: Figure, *, dpi: int = 150) -> None:
    """Write a figure, of the kind its name ends in, as `write_atomically` does."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=dpi)
    write_atomically(path, drawn.getvalue())


def format_json(
    value: Any, *, indent: int | None = None, sort_keys: bool = False
) -> str:
    """Return strict JSON (RFC 8259): a number that isn't finite becomes null.

    Raises TypeError, naming the place, for anything but objects whose keys are strings
    or numbers, lists, tuples, strings, numbers, truth values and None.
    """
    plain = _plain(value, "the value")
    return json.dumps(plain, indent=indent, sort_keys=sort_keys, allow_nan=False)


def _plain(value: Any, place: str) -> Any:
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_key(k, place): _plain(v, f"{place}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{place}[{i}]") for i, v in enumerate(value)]
    raise TypeError(f"{place} is a {type(value).__name__}; JSON has no form for it")


def _key(key: Any, place: str) -> str:
    if isinstance(key, str):
        return key
    number = isinstance(key, (int, float)) and not isinstance(key, bool)
    if not number or not math.isfinite(key):
        raise TypeError(f"{place} has the key {key!r}; JSON's keys are strings")
    return format_json(key)


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """Return what a JSON file holds; its size and depth are limited, see `parse_json`.

    Raises OSError if it can't be opened, DataError if it isn't a file of strict JSON.
    """
    with open(path, "rb", opener=_open_without_waiting) as file:
        about = _check_regular(file, path)
        if about.st_size > max_bytes:
            raise DataError(
                f"{path} has {about.st_size:,} bytes; at most {max_bytes:,} are read"
            )
        # Not `read(max_bytes)`, which takes that much memory first.
        data = file.read(about.st_size)
    return parse_json(data, str(path))


def _check_regular(file: IO[bytes], path: Path) -> os.stat_result:
    about = os.fstat(file.fileno())
    if not stat.S_ISREG(about.st_mode):
        raise DataError(f"{path} is not a file; give a file of JSON")
    return about


def _open_without_waiting(path: str, flags: int) -> int:
    # A pipe under the name of a file would otherwise wait for its writer for ever.
    return os.open(path, flags | os.O_NONBLOCK)


def parse_json(text: str | bytes, name: str) -> Any:
    """Return what strict JSON says; `name` is the file's name in messages.

    Raises DataError, one line, for text that isn't UTF-8 or isn't JSON, for NaN and
    Infinity, numbers beyond float64, equal keys in one object, more than `MAX_DEPTH`
    levels.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        if _depth(text) > MAX_DEPTH:
            raise ValueError(f"it has more than {MAX_DEPTH} levels")
        return _DECODER.decode(text)
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno}, column {error.colno}: {error.msg}"
    except ValueError as error:  # of the hooks below, or too many digits to read
        reason = " ".join(str(error).split())
    raise DataError(f"{name} is not JSON ({escape_line(reason[:200])}); restore it")


def _depth(text: str) -> int:
    """Return how deep brackets nest, those inside strings left out."""
    # Most texts have too few brackets to be deep: count first, which is quick.
    if (found := text.count("[") + text.count("{")) <= MAX_DEPTH:
        return found
    depth = deepest = 0
    for match in _BRACKETS.finditer(text):
        if match[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in "]}":
            depth -= 1
    return deepest


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; raise ValueError for a key that is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is beyond float64")
    return value


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=unique_keys, parse_float=_number, parse_constant=_refuse
)


class JsonLines(NamedTuple):
    """What a file of one JSON object a line holds."""

    records: list[dict[str, Any]]
    texts: list[bytes]  # the line of each record, with its end
    broken: list[int]  # numbers, from 1, of the lines that hold no such object


def read_json_lines(path: Path, *, step: bool = False) -> JsonLines:
    """Return the objects of a file, and which of its lines aren't any.

    With `step` an object must be a line of a run's metrics: a whole number `step`, a
    text `kind`, an object `router`, else numbers. A last line without an end, cut short
    by a kill or a full disk, is left out and not counted. Raises DataError if it isn't
    a file.
    """
    found = JsonLines([], [], [])
    with open(path, "rb", opener=_open_without_waiting) as file:
        _check_regular(file, path)
        *lines, rest = file.read().split(b"\n")
    for number, text in enumerate([*lines, rest], 1):
        try:
            record = parse_json(text, str(path))
        except DataError:
            record = None
        if isinstance(record, dict) and (not step or _is_metrics(record)):
            found.records.append(record)
            found.texts.append(text + b"\n")
        elif number <= len(lines):
            found.broken.append(number)
    return found


_WORDS = {"kind": str, "split": str, "router": dict}  # what isn't a number in metrics


def _is_metrics(record: dict[str, Any]) -> bool:
    """Whether an object has the types of a line of metrics; null is for no number."""
    step = record.get("step")
    if type(step) is not int or not 0 <= step < 2**63 or "kind" not in record:
        return False
    return all(
        isinstance(value, _WORDS[key])
        if key in _WORDS
        else value is None or type(value) in (int, float)
        for key, value in record.items()
    )


def user_cache() -> Path:
    """Return the folder of the user's cache that is this package's.

    A user without a home has one among the temporary files.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "uoe_jax"
    except RuntimeError:  # no HOME, and a user without an entry
        return Path(tempfile.gettempdir()) / f"uoe_jax-{os.getuid()}"

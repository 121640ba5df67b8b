"""What a file holds: text, records, arrays, or a format that isn't read."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal, NamedTuple

from uoe_jax.data.encoding import SNIFF_BYTES, detect
from uoe_jax.data.files import SourceFile, content_suffix, open_content, stamp
from uoe_jax.data.progress import note_once
from uoe_jax.errors import DataError

Kind = Literal["text", "jsonl", "json", "parquet", "npz", "unread"]

_BY_SUFFIX: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".npz": "npz",
    ".npy": "npz",
}
_UNPACK = "unpack it and name the files in it"
_CONVERT = "save it as text, JSON lines or Parquet"
_PICTURE = "images are read from an .npz or TFDS"
# First bytes (at an offset) of formats that aren't read: what they are, what helps.
_SIGNATURES = (
    (0, b"PK\x03\x04", "a zip archive", _UNPACK),
    (0, b"PK\x05\x06", "an empty zip archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", "decompress it: zstd -d"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4", "decompress it: lz4 -d"),
    (0, b"\x1f\x8b", "compressed twice", "decompress it once: gzip -d"),
    (0, b"\xfd7zXZ\x00", "compressed twice", "decompress it once: xz -d"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (0, b"%PDF-", "a PDF", _CONVERT),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document", _CONVERT),
    (0, b"{\\rtf", "a rich-text document", _CONVERT),
    (0, b"ARROW1\x00", "an Arrow file", _CONVERT),
    (0, b"Obj\x01", "an Avro file", _CONVERT),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", "save its arrays as .npz"),
    (0, b"SQLite format 3\x00", "an SQLite database", _CONVERT),
    (0, b"\x89PNG\r\n", "a PNG image", _PICTURE),
    (0, b"\xff\xd8\xff", "a JPEG image", _PICTURE),
    (0, b"GIF8", "a GIF image", _PICTURE),
    (0, b"\x7fELF", "a program", "name a text"),
)
_UNREAD_SUFFIXES = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"),
                    ("an archive", _UNPACK)),
    **dict.fromkeys((".zst", ".lz4", ".br", ".z"), ("compressed", "decompress it")),
    **dict.fromkeys((".arrow", ".feather", ".avro", ".orc", ".pdf", ".docx", ".xlsx",
                     ".odt", ".epub", ".sqlite", ".pkl", ".pickle"),
                    ("a format that isn't read", _CONVERT)),
    **dict.fromkeys((".safetensors", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".hdf5",
                     ".mat", ".bin"),
                    ("a format that isn't read", "save its arrays as .npz")),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff"),
                    ("an image", _PICTURE)),
}  # fmt: skip
# Files that lie beside data and aren't data.
_BESIDE = ("readme", "license", "licence", "copying", "citation", "notice", "authors",
           "dataset_info", "dataset_dict", "dataset_infos", "state.json", "sha256",
           "md5", "checksums")  # fmt: skip
_STEADY = bytes([*range(7, 14), 27, *range(32, 256)])  # bytes that texts have
_SHOWN = 3  # file names in a message


class Found(NamedTuple):
    """A file's kind; of one that isn't read, what it is and what helps."""

    kind: Kind
    what: str = ""
    fix: str = ""


def look(path: Path) -> Found:
    """Return what a file holds, by its first bytes and its ending."""
    return _look(path, tuple(stamp(path)))


@functools.lru_cache(1 << 16)
def _look(path: Path, stamp: tuple[int, ...]) -> Found:
    del stamp  # a changed file is looked at again
    suffix = content_suffix(path)
    with open_content(path) as file:
        head = file.read(SNIFF_BYTES)
    if head.startswith(b"PAR1") and b"\0" in head:
        return Found("parquet")
    if head.startswith(b"\x93NUMPY"):
        return Found("npz")
    if suffix in _BY_SUFFIX and (suffix in (".npz", ".npy", ".parquet", ".pq")):
        return Found(_BY_SUFFIX[suffix])
    for offset, magic, what, fix in _SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return Found("unread", what, fix)
    if suffix in _UNREAD_SUFFIXES:
        return Found("unread", *_UNREAD_SUFFIXES[suffix])
    if _is_binary(head, path.name):
        raw = "--data.source text trains on its bytes, --data.encoding decodes it"
        return Found("unread", "not a text (it has zero or control bytes)", raw)
    return Found(_BY_SUFFIX.get(suffix, "text"))


def _is_binary(head: bytes, name: str) -> bool:
    """Whether bytes are no text in an encoding that is recognised.

    UTF-8 with zero bytes is text: they end documents.
    """
    encoding, _ = detect(head, name)
    if encoding != "utf-8" or not head:
        return False
    if len(head.translate(None, _STEADY)) - head.count(0) > len(head) // 20:
        return True
    if b"\0" not in head:
        return False
    try:
        # A character cut at the end isn't an error.
        head[: max(len(head) - 4, 1)].decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start < len(head) - 8
    return False


def choose_files(
    files: tuple[SourceFile, ...], shown: str
) -> tuple[Kind, tuple[SourceFile, ...]]:
    """Return the kind that files have together, and those of them that have it.

    What isn't data (a README, a picture among texts) is left out, with a note. Raises
    DataError for a file that isn't read, and for kinds of data mixed.
    """
    found = {file: look(file.path) for file in files}
    if len(files) == 1:
        kind, what, fix = found[files[0]]
        if kind == "unread":
            raise DataError(f"{files[0].name} is {what}; {fix}")
        return ("jsonl" if kind == "json" else kind), files
    beside = {f for f in files if f.path.name.lower().startswith(_BESIDE)}
    data = {f: k for f, k in found.items() if k.kind != "unread" and f not in beside}
    kinds: set[Kind] = {k.kind for k in data.values()}
    if "text" in kinds and kinds <= {"text", "json"}:
        # Of a folder of code, .json are texts like others.
        chosen = tuple(f for f in files if found[f].kind in ("text", "json"))
        return "text", _leave_out(files, chosen, shown)
    if kinds == {"json"}:
        kinds = {"jsonl"}
    if len(kinds) > 1:
        raise DataError(_mixed(data, shown))
    if not kinds:
        return _beside_only(files, found, shown)
    chosen = tuple(f for f in files if f in data)
    return kinds.pop(), _leave_out(files, chosen, shown)


def _beside_only(
    files: tuple[SourceFile, ...], found: dict[SourceFile, Found], shown: str
) -> tuple[Kind, tuple[SourceFile, ...]]:
    """Return the texts of a folder that has nothing else, or refuse it."""
    chosen = tuple(f for f in files if found[f].kind != "unread")
    if not chosen:
        first, (_, what, fix) = next(iter(found.items()))
        raise DataError(f"{shown} holds no data: {first.name} is {what}; {fix}")
    return "text", _leave_out(files, chosen, shown)


def _leave_out(
    files: tuple[SourceFile, ...], chosen: tuple[SourceFile, ...], shown: str
) -> tuple[SourceFile, ...]:
    others = [file.name for file in files if file not in set(chosen)]
    if others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        note_once(
            f"{shown}: {len(others)} of {len(files)} files aren't data and are left "
            f"out ({', '.join(others[:_SHOWN])}{more})"
        )
    return chosen


def _mixed(data: dict[SourceFile, Found], shown: str) -> str:
    examples: dict[str, str] = {}
    for file, found in data.items():
        examples.setdefault(found.kind, file.name)
    listed = ", ".join(f"{kind} ({name})" for kind, name in sorted(examples.items()))
    suffix = next(Path(n).suffix for k, n in sorted(examples.items()) if k != "text")
    folder = shown.rstrip("/") if "*" not in shown else "FOLDER"
    return (
        f"data.path {shown} mixes kinds of data: {listed}; name one of them, as "
        f"--data.path '{folder}/**/*{suffix}'"
    )

"""Text files in other encodings than UTF-8, recognised by their first bytes."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from uoe_jax.data.files import open_content
from uoe_jax.errors import ConfigError, DataError, nearest

SNIFF_BYTES = 8192
# Byte order marks; the four bytes of UTF-32 start with the two of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (b"\x84\x31\x95\x33", "gb18030"),
)
_UNREADABLE = (
    (b"\xf7\x64\x4c", "UTF-1"),
    (b"\xdd\x73\x66\x73", "UTF-EBCDIC"),
    (b"\x0e\xfe\xff", "SCSU"),
    (b"\xfb\xee\x28", "BOCU-1"),
    *((b"+/v" + last, "UTF-7") for last in (b"8", b"9", b"+", b"/")),
)
# Codecs for names of hosts, one that refuses everything: not for text.
_NOT_FOR_TEXT = ("idna", "punycode", "undefined")
_COMMON = ("utf-8", "utf-16", "utf-32", "latin-1", "cp1252", "gb18030", "shift_jis")


def check_encoding(name: str) -> str:
    """Return a codec's name, or "auto"; raise ConfigError if Python has none."""
    if name == "auto":
        return name
    try:
        info = codecs.lookup(name)
        is_text = getattr(info, "_is_text_encoding", True)
        if not is_text or info.name in _NOT_FOR_TEXT:
            raise LookupError
    except (LookupError, ValueError):
        raise ConfigError(
            f"data.encoding is {name!r}, which Python can't decode; "
            f"{nearest(name, _COMMON)}"
        ) from None
    return info.name


def detect(head: bytes, name: str) -> tuple[str, int]:
    """Return the encoding that a file's first bytes say, and the length of its mark.

    Without a mark: UTF-16 or UTF-32 by where the zero bytes are, else UTF-8. Raises
    DataError for a mark of an encoding that can't be decoded.
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    for mark, encoding in _UNREADABLE:
        if head.startswith(mark):
            raise DataError(
                f"{name} starts with the mark of {encoding}; save it as UTF-8, or set "
                "--data.encoding"
            )
    return _by_zeros(head) or "utf-8", 0


def _by_zeros(head: bytes) -> str | None:
    """Return the encoding of text that is mostly ASCII, by the pattern of its zeros."""
    usable = len(head) // 4 * 4
    if usable < 8 or b"\0" not in head:
        return None
    # Which of four places hold a zero in most characters, and in hardly any.
    shares = [head[i:usable:4].count(0) * 4 / usable for i in range(4)]
    pattern = "".join(
        "0" if share > 0.5 else "x" if share < 0.05 else "?" for share in shares
    )
    return {
        "x000": "utf-32-le",
        "000x": "utf-32-be",
        "x0x0": "utf-16-le",
        "0x0x": "utf-16-be",
    }.get(pattern)


def find_encoding(path: Path, asked: str) -> tuple[str, int]:
    """Return a file's encoding, and how many bytes of mark come before its text."""
    with open_content(path) as file:
        head = file.read(SNIFF_BYTES)
    if asked == "auto":
        return detect(head, path.name)
    encoding = check_encoding(asked)
    for mark, marked in _MARKS:
        if head.startswith(mark) and marked.startswith(encoding):
            return marked, len(mark)
    return encoding, 0


@contextmanager
def open_text(path: Path, asked: str, *, strict: bool) -> Iterator[IO[bytes]]:
    """Open a text for reading as UTF-8, whatever its encoding, without its mark.

    UTF-8 comes as it is, sound or not; of another encoding `strict` makes broken
    characters a DataError, else they become U+FFFD.
    """
    encoding, skip = find_encoding(path, asked)
    with open_content(path) as file:
        file.read(skip)
        if encoding == "utf-8":
            yield file
            return
        recoded = _Recoded(file, encoding, f"{path.name} byte", skip, strict)
        yield io.BufferedReader(recoded, 1 << 20)


class _Recoded(io.RawIOBase):
    """The UTF-8 bytes of a file in another encoding."""

    def __init__(self, file: Any, encoding: str, where: str, start: int, strict: bool):
        errors = "strict" if strict else "replace"
        self._decoder = codecs.getincrementaldecoder(encoding)(errors)
        self._file, self._where, self._encoding = file, where, encoding
        self._waiting = b""
        self._ended = False
        self._read = start  # bytes of the file

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; return 0 at the end of the file."""
        while not self._waiting and not self._ended:
            chunk = self._file.read(1 << 20)
            self._ended = not chunk
            try:
                text = self._decoder.decode(chunk, final=self._ended)
            except UnicodeDecodeError as error:
                place = max(self._read - len(error.object) + len(chunk), 0)
                raise DataError(
                    f"{self._where} {place + error.start} is not "
                    f"{self._encoding} ({error.reason}); mend the file, or set "
                    "--data.encoding or --data.bad-utf8 replace"
                ) from None
            self._read += len(chunk)
            self._waiting = text.encode("utf-8", "replace")
        size = min(len(buffer), len(self._waiting))
        buffer[:size] = self._waiting[:size]
        self._waiting = self._waiting[size:]
        return size

"""Text documents from the standard library and from local text files."""

from __future__ import annotations

import mmap
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

from uoe_jax.config import DataConfig
from uoe_jax.data.chat import ChatTemplate, Part
from uoe_jax.data.encoding import find_encoding, open_text
from uoe_jax.data.files import SourceFile, is_packed, named_splits, open_content
from uoe_jax.data.split import SPLITS, find_articles, find_cut, range_cuts
from uoe_jax.errors import DataError

# From so many files on, each is one document and splits are made of whole files.
MANY_FILES = 20
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",  # one file of 0.7 MB that isn't code; half of the split it falls in
}


class Document(NamedTuple):
    """A stretch of text that belongs together."""

    name: str  # as shown in messages
    data: bytes | memoryview
    offset: int = 0  # of `data` in the named file
    split: str | None = None  # None: by hash of `key`
    key: str | None = None  # None: the content itself
    label: int | str | None = None
    ends: bool = True  # an end-of-document token follows
    parts: tuple[Part, ...] = ()  # that `data` is made of, if not all is trained on
    member: int = 0  # of a mixture: the number of its source


@dataclass(frozen=True)
class TextSource:
    """Documents in a fixed order; `documents` may be called again and again."""

    name: str
    files: tuple[SourceFile, ...]
    config: DataConfig
    labelled: bool = False
    decodes: ClassVar[bool] = False  # whether the bytes were text in another encoding

    def documents(self) -> Iterator[Document]:
        """Yield every document."""
        raise NotImplementedError

    def num_skipped(self) -> int:
        """Return how many records without a text the last pass left out."""
        return 0

    def chat_template(self) -> ChatTemplate | None:
        """Return how the last pass wrote conversations; None if it met none."""
        return None


def stdlib_files() -> tuple[SourceFile, ...]:
    """Return the running Python's standard library: its .py files without tests."""
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [n for n in inner if n not in _SKIPPED and n[:7] != "config-"]
        for name in names:
            # _sysconfigdata is generated: it differs between builds of one Python.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                found.append(SourceFile(path.relative_to(root).as_posix(), path))
    if not found:
        raise DataError(f"no .py files in {root}; set data.path to a text of your own")
    return tuple(sorted(found))


class FileSource(TextSource):
    """One document a file; splits are made of whole files."""

    def documents(self) -> Iterator[Document]:
        """Yield every file that isn't empty."""
        return limit_bytes(self._files(), self.config.max_bytes)

    def _files(self) -> Iterator[Document]:
        splits = {} if self.name == "stdlib" else named_splits(list(self.files))
        left = self.config.max_bytes
        strict = self.config.bad_utf8 == "error"
        for file in self.files:
            with open_text(file.path, self.config.encoding, strict=strict) as opened:
                # No more than is wanted, and what tells that it was cut.
                data = opened.read() if left is None else opened.read(left + 1)
            if left is not None:
                left = max(left - len(data), 0)
            if data:
                split = unless_train(splits.get(file.name))
                yield Document(file.name, data, split=split, key=file.name)


class RangeSource(TextSource):
    """A few files laid end to end and cut into contiguous ranges, one a split.

    Documents are the articles between blank lines (or WikiExtractor's tags). A text's
    bytes stay as they are: the blank lines already mark its articles, so only the end
    of a file is followed by an end-of-document token.
    """

    @cached_property
    def _texts(self) -> dict[str, mmap.mmap | bytes]:
        """Return every file's content as UTF-8, decompressed once.

        Of all files together no more than `max_bytes`, and a byte that tells of a cut.
        """
        left, texts = self.config.max_bytes, {}
        for file in self.files:
            limit = None if left is None else left + 1
            texts[file.name] = _map_content(file.path, self.config, limit)
            if left is not None:
                left = max(left - len(texts[file.name]), 0)
        return texts

    def documents(self) -> Iterator[Document]:
        """Yield the articles of every file, broken where two splits meet."""
        splits, texts = named_splits(list(self.files)), self._texts
        left, sizes = self.config.max_bytes, {}
        for name, text in texts.items():
            sizes[name] = len(text)
            if left is not None:
                if len(text) > left:
                    sizes[name] = len(_trim(text[:left]))
                left = max(left - len(text), 0)
        shared = [n for n in texts if splits.get(n, "train") == "train"]
        missing = {s: s not in splits.values() for s in SPLITS}
        cuts = range_cuts(
            [sizes[n] for n in shared],
            self.config.valid_fraction * missing["valid"],
            self.config.test_fraction * missing["test"],
        )
        start = 0
        for name, text in texts.items():
            if sizes[name] == 0:
                continue
            local = tuple(c - start for c in cuts) if name in shared else None
            given = splits.get(name)
            yield from _articles(name, text, sizes[name], local, given)
            start += sizes[name] if name in shared else 0


def _articles(
    name: str,
    text: mmap.mmap | bytes,
    size: int,
    cuts: tuple[int, ...] | None,
    given: str | None,
) -> Iterator[Document]:
    """Yield one file's articles; `cuts` are where valid and test start in it."""
    starts = find_articles(text)
    starts = starts[starts < size]
    view = memoryview(text)
    valid, test = (find_cut(text, starts, c) for c in cuts or (size, size))
    edges = sorted({*starts.tolist(), *(c for c in (valid, test) if c < size)})
    for begin, end in zip(edges, [*edges[1:], size], strict=True):
        split = given
        if cuts is not None:
            split = "test" if begin >= test else "valid" if begin >= valid else "train"
        yield Document(name, view[begin:end], begin, split, ends=end == size)


def unless_train(split: str | None) -> str | None:
    """Return None for "train", which gives to the splits the source doesn't name."""
    return None if split == "train" else split


def limit_bytes(
    documents: Iterator[Document], max_bytes: int | None
) -> Iterator[Document]:
    """Yield documents until they have `max_bytes`; the last one is cut."""
    left = max_bytes
    for document in documents:
        if left is not None:
            if len(document.data) > left:
                if document.parts:  # half an answer is none
                    return
                data = _trim(bytes(document.data[:left]))
                if data:
                    yield document._replace(data=data)
                return
            left -= len(document.data)
        yield document


def _trim(data: bytes) -> bytes:
    """Drop the character that a cut at the end of `data` may have broken."""
    for back in range(1, min(4, len(data)) + 1):
        first = data[-back]
        if first & 0xC0 != 0x80:
            return data if _character_length(first) == back else data[:-back]
    return data


def _character_length(first: int) -> int:
    return 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def _map_content(
    path: Path, config: DataConfig, limit: int | None
) -> mmap.mmap | bytes:
    """Return a file's text as UTF-8 bytes, mapped so that they needn't fit memory.

    Of a file that has to be unpacked or decoded, only the first `limit` bytes.
    """
    if path.stat().st_size == 0:
        return b""
    plain = find_encoding(path, config.encoding) == ("utf-8", 0)
    if plain and not is_packed(path):
        with open_content(path) as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    strict = config.bad_utf8 == "error"
    with (
        open_text(path, config.encoding, strict=strict) as file,
        tempfile.TemporaryFile() as spool,
    ):
        left = sys.maxsize if limit is None else limit
        while chunk := file.read(min(1 << 20, left)):
            spool.write(chunk)
            left -= len(chunk)
        if spool.tell() == 0:
            return b""
        spool.flush()
        return mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ)

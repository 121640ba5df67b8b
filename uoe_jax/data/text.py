"""Text documents from the standard library, local files and JSON lines."""

from __future__ import annotations

import json
import mmap
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

from uoe_jax.config import DataConfig
from uoe_jax.data.files import SourceFile, is_packed, named_splits, open_content
from uoe_jax.data.split import SPLITS, find_articles, find_cut, range_cuts
from uoe_jax.errors import DataError, nearest

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
        for file in self.files:
            with open_content(file.path) as opened:
                data = opened.read()
            if data:
                split = _unless_train(splits.get(file.name))
                yield Document(file.name, data, split=split, key=file.name)


class RangeSource(TextSource):
    """A few files laid end to end and cut into contiguous ranges, one a split.

    Documents are the articles between blank lines (or WikiExtractor's tags). A text's
    bytes stay as they are: the blank lines already mark its articles, so only the end
    of a file is followed by an end-of-document token.
    """

    @cached_property
    def _texts(self) -> dict[str, mmap.mmap | bytes]:
        """Return every file's content, decompressed once."""
        return {f.name: _map_content(f.path) for f in self.files}

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


class JsonlSource(TextSource):
    """One JSON object a line; splits by a hash of the text, so repeats stay together.

    Labels (for encoders) are the field `label`, a number or a name.
    """

    decodes = True

    def documents(self) -> Iterator[Document]:
        """Yield the text of every line; blank lines are passed over."""
        return limit_bytes(self._lines(), self.config.max_bytes)

    def _lines(self) -> Iterator[Document]:
        splits = named_splits(list(self.files))
        for file in self.files:
            split = _unless_train(splits.get(file.name))
            with open_content(file.path) as lines:
                offset = 0
                for number, line in enumerate(lines, 1):
                    where = f"{file.name} line {number}"
                    if line.strip():
                        document = self._document(where, line, offset, split)
                        if document is not None:
                            yield document
                    offset += len(line)

    def _document(
        self, where: str, line: bytes, offset: int, split: str | None
    ) -> Document | None:
        key = self.config.text_key
        errors = "replace" if self.config.bad_utf8 == "replace" else "strict"
        try:
            record = json.loads(line.decode("utf-8", errors))
        except UnicodeDecodeError as error:
            # Left as it is: the policy for bad UTF-8 finds it and acts on it.
            return Document(where, line[error.start :], offset + error.start, split)
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({error}); mend the line") from None
        if not isinstance(record, dict):
            raise DataError(f"{where} holds {type(record).__name__}, not an object")
        if key not in record:
            raise DataError(
                f"{where} has no field {key!r}; {nearest(key, record)} (data.text_key)"
            )
        text = record[key]
        if not isinstance(text, str):
            raise DataError(
                f"{where} field {key!r} holds {type(text).__name__}; it must be text"
            )
        label = record.get("label")
        is_class = isinstance(label, str) or (isinstance(label, int) and label >= 0)
        if self.labelled and not is_class:
            raise DataError(
                f"{where} has label {label!r}; an encoder needs a class number from 0 "
                "or a name"
            )
        # A lone surrogate ("\ud800") has no UTF-8; surrogatepass keeps it for the
        # policy to find.
        data = text.encode("utf-8", "surrogatepass")
        return Document(where, data, split=split, label=label) if data else None


def _unless_train(split: str | None) -> str | None:
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


def _map_content(path: Path) -> mmap.mmap | bytes:
    """Return a file's (decompressed) bytes, mapped so that they needn't fit memory."""
    with open_content(path) as file:
        if path.stat().st_size == 0:
            return b""
        if not is_packed(path):
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with tempfile.TemporaryFile() as spool:
            while chunk := file.read(1 << 20):
                spool.write(chunk)
            if spool.tell() == 0:
                return b""
            spool.flush()
            return mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ)

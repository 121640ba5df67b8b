"""Documents from records: JSON lines, a JSON array, Parquet.

A record is a text, a prompt with its completion, or a conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from uoe_jax.data.arrays import MAX_CLASSES
from uoe_jax.data.chat import (
    CHATML,
    ChatTemplate,
    Part,
    answer_parts,
    check_messages,
    configured_template,
    special_tokens,
)
from uoe_jax.data.encoding import open_text
from uoe_jax.data.files import SourceFile, named_splits
from uoe_jax.data.record_fields import (
    MESSAGES,
    BadRecordError,
    find_completion,
    find_messages,
    find_text,
    text_columns,
    type_name,
)
from uoe_jax.data.text import Document, TextSource, limit_bytes, unless_train
from uoe_jax.data.tokenize import is_file_tokenizer, load_tokenizer
from uoe_jax.errors import (
    ConfigError,
    DataError,
    MissingExtra,
    extra_packages,
    nearest,
    shown,
)
from uoe_jax.files import unique_keys

_AT_ONCE = 256 << 20  # longest line, or file that is one array
_TOO_LONG = (
    f"longer than {_AT_ONCE >> 20} MiB, which are read at once; write shorter records, "
    "one a line (jq -c '.[]')"
)
_ROWS = 1024  # of Parquet, read at once


@dataclass(frozen=True)
class RecordSource(TextSource):
    """A text a record; splits by a hash of the text, so repeats stay together.

    A record without a text may have a prompt and a completion, of which the completion
    is trained on, or messages, of which the assistant's are. Labels (for encoders) are
    the field `label`, a number or a name. Other records are refused, or with
    `data.bad_records` skip left out and counted.
    """

    decodes: ClassVar[bool] = True
    skipped: dict[str, int] = field(default_factory=lambda: {"records": 0, "chats": 0})

    def documents(self) -> Iterator[Document]:
        """Yield the text of every record that isn't empty."""
        self.skipped.update(records=0, chats=0)
        return limit_bytes(self._all(), self.config.max_bytes)

    def num_skipped(self) -> int:
        """Return the records that were left out."""
        return self.skipped["records"]

    def chat_template(self) -> ChatTemplate | None:
        """Return how conversations are written, if the last pass met any."""
        return self._template if self.skipped["chats"] else None

    @cached_property
    def _template(self) -> ChatTemplate:
        """Return the template that conversations are written with."""
        return configured_template(self.config.chat_template) or CHATML

    @cached_property
    def _special(self) -> tuple[str, ...]:
        """Return the names of special tokens, known before what is trained here."""
        name = self.config.tokenizer
        known = is_file_tokenizer(name)
        return tuple(special_tokens(load_tokenizer(name))) if known else ()

    def records(self, file: SourceFile) -> Iterator[tuple[str, int, Any]]:
        """Yield (place, offset, record) of a file.

        A record is what was parsed; bytes that aren't UTF-8; or an error.
        """
        raise NotImplementedError

    def _all(self) -> Iterator[Document]:
        splits = named_splits(list(self.files))
        for file in self.files:
            split = unless_train(splits.get(file.name))
            for where, offset, record in self.records(file):
                try:
                    document = self._document(where, offset, record, split)
                except BadRecordError as error:
                    if self.config.bad_records == "error":
                        raise DataError(
                            f"{error}; --data.bad-records skip leaves such records out"
                        ) from None
                    self.skipped["records"] += 1
                    continue
                if document is not None:
                    yield document

    def _document(
        self, where: str, offset: int, record: Any, split: str | None
    ) -> Document | None:
        if isinstance(record, BadRecordError):
            raise record
        if isinstance(record, bytes):
            # Left as it is: the policy for bad UTF-8 finds it and acts on it.
            return Document(where, record, offset, split)
        if not self.labelled and (parts := self._parts(record, where)):
            data = "".join(part.text for part in parts)
            data = data.encode("utf-8", "surrogatepass")
            return Document(where, data, split=split, parts=parts) if data else None
        text = find_text(record, self.config.text_key, where)
        labelled = self.labelled and isinstance(record, dict)
        label = record.get("label") if labelled else None
        is_class = isinstance(label, str) or (
            type(label) is int and 0 <= label < MAX_CLASSES  # true is no number
        )
        if self.labelled and not is_class:
            raise BadRecordError(
                f"{where} has label {shown(label)}; an encoder needs a name or a class "
                f"number from 0 to {MAX_CLASSES - 1:,}"
            )
        # A lone surrogate ("\ud800") has no UTF-8; surrogatepass keeps it for the
        # policy to find.
        data = text.encode("utf-8", "surrogatepass")
        return Document(where, data, split=split, label=label) if data else None

    def _parts(self, record: Any, where: str) -> tuple[Part, ...]:
        """Return what a record's document is made of; none for one with a text."""
        key = self.config.text_key
        if (messages := find_messages(record, key)) is None:
            return find_completion(record, key, where)
        template, special = self._template, self._special
        try:
            parts = answer_parts(check_messages(messages), template, special)
        except MissingExtra:
            raise
        except (ConfigError, DataError) as error:
            raise BadRecordError(f"{where}: {error}") from None
        self.skipped["chats"] += 1
        return parts


class JsonSource(RecordSource):
    """JSON: an object a line, or a file that is one array of objects or texts."""

    def records(self, file: SourceFile) -> Iterator[tuple[str, int, Any]]:
        """Yield what every line or element holds; blank lines are passed over."""
        config = self.config
        with open_text(
            file.path, config.encoding, strict=config.bad_utf8 == "error"
        ) as opened:
            number, offset, begun = 0, 0, False
            while line := opened.readline(_AT_ONCE):
                number += 1
                if line.strip():
                    if not begun and _goes_on(line):
                        yield from self._array(file.name, line, opened)
                        return
                    begun = True
                    if len(line) == _AT_ONCE:
                        raise DataError(f"{file.name} line {number} is {_TOO_LONG}")
                    yield from self._line(f"{file.name} line {number}", offset, line)
                offset += len(line)

    def _line(
        self, where: str, offset: int, line: bytes
    ) -> Iterator[tuple[str, int, Any]]:
        errors = "replace" if self.config.bad_utf8 == "replace" else "strict"
        try:
            yield where, offset, _parse(line.decode("utf-8", errors))
        except UnicodeDecodeError as error:
            yield where, offset + error.start, line[error.start :]
        except (ValueError, RecursionError) as error:
            reason = "nested too deep" if isinstance(error, RecursionError) else error
            yield (
                where,
                offset,
                BadRecordError(f"{where} is not JSON ({reason}); mend the line"),
            )

    def _array(
        self, name: str, first: bytes, opened: Any
    ) -> Iterator[tuple[str, int, Any]]:
        """Yield the records of a file that is one JSON value over several lines."""
        text = first + opened.read(_AT_ONCE)
        if len(text) > _AT_ONCE:
            raise DataError(f"{name} holds one JSON value that is {_TOO_LONG}")
        errors = "replace" if self.config.bad_utf8 == "replace" else "strict"
        try:
            content = _parse(text.decode("utf-8", errors))
        except (ValueError, RecursionError) as error:
            reason = "nested too deep" if isinstance(error, RecursionError) else error
            raise DataError(f"{name} is not JSON ({reason}); mend the file") from None
        if isinstance(content, dict):
            # {"data": [{...}]}, as some exports are.
            lists = [v for v in content.values() if isinstance(v, list)]
            names = {self.config.text_key.split(".")[0], MESSAGES}
            is_record = bool(names & content.keys())
            content = lists[0] if len(lists) == 1 and not is_record else [content]
        if not isinstance(content, list):
            raise DataError(f"{name} holds {type_name(content)}, not objects")
        for number, record in enumerate(content, 1):
            yield f"{name} record {number}", 0, record


def _parse(text: str) -> Any:
    """Return what JSON says; NaN is taken, as many write it. Raises ValueError."""
    return json.loads(text, object_pairs_hook=unique_keys)


def _goes_on(line: bytes) -> bool:
    """Whether a file's first line opens a value that goes on below, or an array."""
    bare = line.strip()
    if bare.startswith(b"["):
        return True
    return bare == b"{" or (bare.startswith(b"{") and bare.endswith(b","))


class ParquetSource(RecordSource):
    """A text a row of Parquet files; needs pyarrow."""

    def records(self, file: SourceFile) -> Iterator[tuple[str, int, Any]]:
        """Yield every row, of the columns that are needed."""
        with extra_packages():
            import pyarrow
            import pyarrow.parquet as parquet
        number = 0
        try:
            with parquet.ParquetFile(file.path) as opened:
                for batch in opened.iter_batches(_ROWS, columns=self._columns(opened)):
                    for record in batch.to_pylist():
                        number += 1
                        yield f"{file.name} row {number}", 0, record
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{file.path} can't be read as Parquet ({reason}); restore the file"
            ) from None

    def _columns(self, opened: Any) -> list[str]:
        """Return the columns of text and label; DataError if there is no text."""
        known = list(opened.schema_arrow.names)
        key = self.config.text_key
        columns = text_columns(key, known, answers=not self.labelled)
        if columns is None:
            column = key.split(".")[0]
            raise DataError(
                f"{self.name} has no column {column!r}; {nearest(column, known)} "
                "(data.text_key)"
            )
        return columns + ["label"] * (self.labelled and "label" in known)

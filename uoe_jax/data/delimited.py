"""Columns of a delimited text whose encoding, delimiter and header are found out.

pyarrow parses (a quarter of a second for a million lines); Python's csv reader walks
over the lines once more only where a mistake has to be named by its line.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from uoe_jax.data.columns import Columns
from uoe_jax.errors import ConfigError, DataError, extra_packages

with extra_packages():
    import pyarrow as pa

SAMPLE = 1 << 16  # bytes by which a text is judged
# Ties go to the first: what more rarely stands inside a field.
DELIMITERS = ("::", "\t", ";", "|", ",", " ")
NAMED = {"tab": "\t", "\\t": "\t", "space": " ", "blank": " ", "comma": ","}
LINE_END = re.compile(rb"\r\n|\r|\n")
COMMENT = re.compile(rb"[ \t]*(?:[#%]+([^\r\n]*))?(?:\r\n|\r|\n)")
UNIT = "\x1f"  # stands for delimiters that aren't one character
NUMBER = re.compile(r"\s*[+-]?(\d+([.,]\d*)?|[.,]\d+)(e[+-]?\d+)?\s*", re.I)
MARKS = (  # the longer first: UTF-32's begins like UTF-16's
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\0\0", "utf-32-le"),
    (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


def is_number(text: str) -> bool:
    """Whether a field is a finite number, with a decimal point or comma."""
    return NUMBER.fullmatch(text) is not None


def read_delimited(
    path: Path,
    data: bytes,
    are_names: Callable[[list[str]], bool],
    delimiter: str | None = None,
) -> Columns:
    """Return the columns of a text.

    The delimiter is tab, comma, semicolon, bar, `::` or blanks, whichever gives most
    lines an equal number of fields and most fields that are numbers. The first line is
    a header if none of its fields is a number, or if its names are known.

    Args:
      path: to name in errors.
      data: the text; UTF-8, UTF-16 and UTF-32 by their marks or zero bytes, else
        Windows-1252.
      are_names: whether a line's fields are known as names of columns.
      delimiter: a string, "tab" or "space"; None: found out.

    Raises:
      ConfigError, DataError: one line with the file, the line and the rule.
    """
    if delimiter is not None:
        delimiter = _check_delimiter(delimiter)
    data, notes = _to_utf8(path, data)
    _check_text(path, data, delimiter)
    start, comment, stated = _preamble(data)
    body = data[start:] if start else data
    sample = _sample(body)
    if not sample.strip():
        raise DataError(f"{path} is empty; completion needs at least one entry")
    found = delimiter or stated or _sniff(path, sample)
    body, single = _separated(body, found)
    body = (
        len(LINE_END.findall(data[:start])) * b"\n" + body
    )  # lines keep their numbers
    rows = [fields for _, fields in itertools.islice(_rows(path, body, single), 50)]
    _check_quotes(path, rows)
    _check_backslashes(path, body[:SAMPLE], single)
    first = [name.strip() for name in rows[0]]
    header = are_names(first) or not any(map(is_number, first))
    names = first if header else [str(place + 1) for place in range(len(first))]
    if header:
        names = _name_all(first, rows[1:])
    else:
        notes.append("no header")
        said = next(_rows(path, *_separated(comment, found)), (0, [""]))[1]
        said = [name.strip() for name in said]
        if len(said) == len(first) and are_names(said):
            names = said
    if comment:
        notes.append("comments skipped")
    if found != ",":
        shown = {"\t": "tab", " ": "blanks"}.get(found, repr(found))
        notes.append(f"delimiter {shown}")
    text = _Text(path, body, single, names, header)
    named = names != [str(place + 1) for place in range(len(names))]
    return Columns(names, named, rows[header:], text.read, text.where, tuple(notes))


@dataclass(frozen=True)
class _Text:
    """A text in UTF-8 with a delimiter of one character."""

    path: Path
    data: bytes
    delimiter: str
    names: list[str]
    header: bool

    def read(self, positions: Sequence[int]) -> list[pa.DictionaryArray]:
        """Return columns as strings, each distinct one kept once."""
        start = 0
        if self.header:  # a quoted name may run over lines
            rows = _rows(self.path, self.data, self.delimiter)
            last = next(rows)[0]
            start = _line_start(self.data, last + 1)
        if not self.data[start:].strip():
            raise DataError(
                f"{self.path} has no entries; completion needs at least one"
            )
        try:
            return _parse(self.data, start, self.delimiter, len(self.names), positions)
        except pa.ArrowException as error:
            self._name_bad_line()
            raise DataError(f"{self.path} can't be read as a table: {error}") from None

    def _name_bad_line(self) -> None:
        width, first = len(self.names), None
        for number, fields in _rows(self.path, self.data, self.delimiter):
            first = first or number
            if len(fields) != width and (number > first or not self.header):
                raise DataError(
                    f"{self.path} line {number} has {len(fields)} fields, line {first} "
                    f"has {width}; give each line as many"
                )

    def where(self, row: int) -> str:
        """Return "line 9", counted in the file as it is."""
        rows = _rows(self.path, self.data, self.delimiter)
        number, _ = next(itertools.islice(rows, row + self.header, None))
        return f"line {number}"


def _parse(
    data: bytes, start: int, delimiter: str, width: int, positions: Sequence[int]
) -> list[pa.DictionaryArray]:
    from pyarrow.csv import ConvertOptions, ParseOptions, ReadOptions, read_csv

    names = [str(place) for place in range(width)]
    wanted = [names[place] for place in positions]
    kind = pa.dictionary(pa.int32(), pa.string())
    table = read_csv(
        pa.BufferReader(pa.py_buffer(data)[start:]),
        read_options=ReadOptions(column_names=names, block_size=4 << 20),
        parse_options=ParseOptions(
            delimiter=delimiter, newlines_in_values=b'"' in data
        ),
        convert_options=ConvertOptions(
            column_types=dict.fromkeys(wanted, kind),
            include_columns=wanted,
            null_values=[],
            strings_can_be_null=False,
        ),
    )
    table = table.unify_dictionaries()
    columns = [table.column(name).combine_chunks() for name in wanted]
    return [c if isinstance(c, pa.Array) else c.chunk(0) for c in columns]


def _to_utf8(path: Path, data: bytes) -> tuple[bytes, list[str]]:
    """Return the text in UTF-8 without a mark, and what was assumed about it."""
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return _recode(path, data[len(mark) :], encoding), []
    zeros = [data[k:SAMPLE:2].count(0) for k in range(2)]
    if min(zeros) == 0 < max(zeros) and max(zeros) > min(len(data), SAMPLE) // 8:
        encoding = "utf-16-le" if zeros[1] else "utf-16-be"
        return _recode(path, data, encoding), [f"read as {encoding}"]
    try:
        if not data.isascii():
            data.decode()
        return data, []
    except UnicodeDecodeError:
        pass
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:  # five bytes that it lacks
        text = data.decode("latin-1")
    return text.encode(), ["not UTF-8; read as Windows-1252 (latin-1)"]


def _recode(path: Path, data: bytes, encoding: str) -> bytes:
    try:
        text = data.decode(encoding)
        return data if encoding == "utf-8" else text.encode()
    except UnicodeError as error:
        raise DataError(f"{path} can't be read as {encoding}: {error}") from None


def _check_text(path: Path, data: bytes, delimiter: str | None) -> None:
    sample = data[:SAMPLE].replace((delimiter or "").encode() or b"\n", b"")
    if re.search(rb"[\x00-\x08\x0e-\x1f\x7f]", sample):
        raise DataError(
            f"{path} can't be read as text: it holds control characters; give a text, "
            ".npz, .npy or .parquet file"
        )
    if re.match(rb"\s*(\{\s*\"|\[\s*[\[{]|<[?!a-zA-Z])", sample):
        raise DataError(f"{path} holds JSON or XML; give a table with a line an entry")


def _check_quotes(path: Path, rows: list[list[str]]) -> None:
    """Raise DataError for a table whose first or last fields are in single quotes."""
    for place in (0, -1):
        column = [fields[place].strip() for fields in rows]
        data = column[1:] or column  # a header may have none
        if all(len(c) > 1 and c[0] == c[-1] == "'" for c in data):
            raise DataError(
                f"{path} has fields in single quotes, such as {data[-1]}; only double "
                "quotes hold a field together: write those, or none"
            )


def _check_backslashes(path: Path, sample: bytes, delimiter: str) -> None:
    r"""Raise DataError for a field such as "a \"b\"", whose quotes aren't doubled."""
    apart = re.escape(delimiter.encode())
    field = rb'(?:^|%s)("(?:[^"\\\r\n]|\\[^"]|"")*\\"(?! *(?:%s|\r|$)))' % (
        apart,
        apart,
    )
    if found := re.search(field, sample, re.MULTILINE):
        raise DataError(
            f"{path} has a field that begins with {found[1].decode(errors='replace')}: "
            'a quote inside a field is written twice, "", not after a backslash'
        )


def _check_delimiter(delimiter: str) -> str:
    delimiter = NAMED.get(delimiter.lower(), delimiter)
    if not delimiter or re.search(r"[\w\"\n\r.+-]", delimiter):
        raise ConfigError(
            f"delimiter is {delimiter!r}; give what stands between fields, such as ';' "
            "or '::' or tab or space"
        )
    return " " if not delimiter.strip(" ") else delimiter


def _preamble(data: bytes) -> tuple[int, bytes, str | None]:
    """Return where a text begins, the last comment before, and what `sep=;` says."""
    start, comment, stated = 0, b"", None
    while found := COMMENT.match(data, start):
        start, comment = found.end(), found[1] or comment
    # The line by which a spreadsheet is told the delimiter.
    if found := re.compile(rb'"?sep=([^"\r\n])"?(\r\n|\r|\n)').match(data, start):
        start, stated = found.end(), found[1].decode()
    return start, comment.strip(), stated


def _sample(data: bytes) -> bytes:
    sample = data[:SAMPLE]
    return (
        sample if len(data) <= SAMPLE else sample[: sample.rfind(b"\n") + 1] or sample
    )


def _sniff(path: Path, sample: bytes) -> str:
    scores = []
    for delimiter in DELIMITERS:
        text, single = _separated(sample, delimiter)
        try:
            rows = [fields for _, fields in _rows(path, text, single)]
        except DataError:
            continue
        width = Counter(map(len, rows)).most_common(1)[0][0]
        like = [fields for fields in rows if len(fields) == width]
        if width > 1:
            worth = sum(1 + sum(map(is_number, fields)) for fields in like)
            scores.append((width > 2, worth, -DELIMITERS.index(delimiter), delimiter))
    return max(scores)[-1] if scores else ","


def _separated(data: bytes, delimiter: str) -> tuple[bytes, str]:
    """Return the text with a delimiter of one character, and that character."""
    if delimiter == " ":  # runs of blanks and tabs, none at a line's ends
        data = re.sub(rb"(?m)^[ \t]+|[ \t]+(?=\r?$)", b"", data)
        if b'"' not in data:
            return re.sub(rb"[ \t]+", UNIT.encode(), data), UNIT
        quoted = rb'("[^"]*")|[ \t]+'
        return re.sub(quoted, lambda m: m[1] or UNIT.encode(), data), UNIT
    if len(delimiter.encode()) > 1:
        return data.replace(delimiter.encode(), UNIT.encode()), UNIT
    if b"\n " in data:  # a line of blanks alone is an empty line
        data = re.sub(rb"(?m)^ +(?=\r?$)", b"", data)
    return data, delimiter


def _rows(path: Path, data: bytes, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each row's last line, from 1, and its fields; empty lines are skipped."""
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8", "replace", newline="")
    reader = csv.reader(text, delimiter=delimiter)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}") from None


def _line_start(data: bytes, number: int) -> int:
    """Return where line `number` (from 1) begins."""
    ends = LINE_END.finditer(data)
    last = next(itertools.islice(ends, number - 2, None), None)
    return len(data) if last is None else last.end()


def _name_all(names: list[str], rows: list[list[str]]) -> list[str]:
    """Return a header's names, one for each field where rows have one more.

    R counts the rows in a first column without a name; others end a line with a
    delimiter.
    """
    if not rows or any(len(fields) != len(names) + 1 for fields in rows):
        return names
    if [fields[0] for fields in rows] == [str(k + 1) for k in range(len(rows))]:
        return ["", *names]
    return names if any(fields[-1].strip() for fields in rows) else [*names, ""]

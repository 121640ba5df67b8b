"""The first pass over text documents: what is kept, and which split each goes to."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt64

from uoe_jax.config import DataConfig
from uoe_jax.data.mix import MixSource
from uoe_jax.data.progress import note, note_once
from uoe_jax.data.split import (
    SPLITS,
    assign_splits,
    find_articles,
    find_cut,
    hash_fraction,
    hold_out_together,
    range_cuts,
)
from uoe_jax.data.text import Document, TextSource
from uoe_jax.errors import DataError

_SURROGATE = re.compile(b"\xed[\xa0-\xbf][\x80-\xbf]")  # half a pair, encoded alone
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")
_PIECE = 1 << 20  # bytes that are decoded at once to see whether they can be

Documents = Callable[[], Iterator[Document]]


@dataclass
class Plan:
    """What the first pass over the documents found."""

    splits: Int[np.ndarray, " D"]  # index into SPLITS
    given: Int[np.ndarray, " D"]  # the same where the source names it, -1 elsewhere
    fractions: Float[np.ndarray, " D"]  # what the others are divided by
    num_bytes: Int[np.ndarray, " D"]
    classes: dict[int | str | None, int]  # label -> class number
    bad_utf8: dict[str, int]  # documents left out or repaired
    has_parts: bool = False  # whether of some only a part is trained on


def clean_documents(
    documents: Iterator[Document], policy: str, counts: dict[str, int]
) -> Iterator[Document]:
    """Yield documents that are UTF-8, or what a policy makes of them.

    Args:
      documents: as read.
      policy: "error" raises DataError with file and byte, "replace" puts U+FFFD for
        what can't be read, "skip" leaves the whole document out, "keep" says once
        that there is some.
      counts: "skipped" and "replaced" documents are added to it.
    """
    told = False
    for document in documents:
        bad = None if told else find_bad_utf8(document.data)
        if bad is not None:
            where = _describe_bad(document, bad)
            if policy == "error":
                fix = "set data.bad_utf8 to replace or skip"
                raise DataError(f"{where}; {fix}")
            if policy == "keep":
                told = True
                note_once(
                    f"{where}: its bytes are taken as they are; if it is text, say in "
                    "what encoding: --data.encoding latin-1, cp1252, ..."
                )
                yield document
                continue
            counts["skipped" if policy == "skip" else "replaced"] += 1
            if policy == "skip":
                continue
            document = _without_bad(document)
        yield document


def _without_bad(document: Document) -> Document:
    """Return a document with U+FFFD for what isn't UTF-8."""
    if not document.parts:
        return document._replace(data=_replace_bad(document.data))
    mend = lambda text: _replace_bad(text.encode("utf-8", "surrogatepass")).decode()
    parts = tuple(part._replace(text=mend(part.text)) for part in document.parts)
    data = "".join(part.text for part in parts).encode()
    return document._replace(data=data, parts=parts)


def find_bad_utf8(data: bytes | memoryview) -> int | None:
    """Return the place of the first byte that isn't UTF-8, None if all are.

    Piece by piece: as one text, a long document would take several times its memory.
    """
    decoder = _Utf8Decoder()
    for start in range(0, len(data), _PIECE):
        begun = len(decoder.getstate()[0])  # bytes of a character that goes on
        piece = data[start : start + _PIECE]
        try:
            decoder.decode(piece, final=start + len(piece) == len(data))
        except UnicodeDecodeError as error:
            return start - begun + error.start
    return None


def _describe_bad(document: Document, start: int) -> str:
    """Return what is wrong with a document at its first byte that isn't UTF-8."""
    found = _SURROGATE.match(bytes(document.data[start : start + 3]))
    half = ""
    if found:
        code = ord(str(found[0], "utf-8", "surrogatepass"))
        half = f", half a surrogate pair (\\u{code:04x})"
    return (
        f"{document.name} byte {document.offset + start} is not UTF-8 "
        f"({document.data[start]:#04x}){half}"
    )


def _replace_bad(data: bytes | memoryview) -> bytes:
    """Return a text with U+FFFD for what isn't UTF-8, one for half a surrogate pair."""
    whole = _SURROGATE.sub("\ufffd".encode(), bytes(data))
    return str(whole, "utf-8", "replace").encode()


def plan_documents(
    source: TextSource,
    documents: Iterator[Document],
    config: DataConfig,
    count: Callable[[], dict[str, int]],
) -> Plan:
    """Read every document once and decide its split; equal contents stay together."""
    given, fractions, sizes, labels, members = [], [], [], set(), []
    mixed, contents = isinstance(source, MixSource), []
    seen: dict[bytes, float] = {}
    has_parts = False
    for document in documents:
        fraction = 0.0
        if document.split is None:
            if document.key is None:
                fraction = hash_fraction(document.data)
            else:
                digest = hashlib.sha256(document.data).digest()
                own = hash_fraction(document.key.encode())
                fraction = seen.setdefault(digest, own)
        given.append(-1 if document.split is None else SPLITS.index(document.split))
        fractions.append(fraction)
        sizes.append(len(document.data))
        labels.add(document.label)
        has_parts |= bool(document.parts)
        members.append(document.member)
        if mixed:
            # Files of texts keep the blank lines between them, records have none.
            digest = hashlib.sha256(bytes(document.data).strip()).digest()[:8]
            contents.append(int.from_bytes(digest, "big"))
    counts = count()
    if not sizes:
        why = "it is empty"
        if counts["skipped"]:
            why = f"all {counts['skipped']} documents have bad UTF-8"
        elif source.num_skipped():
            why = f"all {source.num_skipped()} records are without one"
        raise DataError(f"{source.name} has no text ({why}); give it some")
    given_of, fraction_of, member_of = map(np.array, (given, fractions, members))
    splits = np.zeros_like(given_of)
    for member in sorted(
        set(members)
    ):  # a source that names its splits names no other's
        mine = member_of == member
        splits[mine] = assign_splits(
            given_of[mine],
            fraction_of[mine],
            config.valid_fraction,
            config.test_fraction,
        )
    if mixed:
        of_content = np.array(contents, np.uint64)
        splits = _held_out_together(source, splits, of_content, member_of)
    classes = _number_classes(labels, source.name) if source.labelled else {}
    arrays = (given_of, fraction_of, np.array(sizes))
    return Plan(splits, *arrays, classes, counts, has_parts)


def _held_out_together(
    source: TextSource,
    splits: Int[np.ndarray, " D"],
    contents: UInt64[np.ndarray, " D"],
    members: Int[np.ndarray, " D"],
) -> Int[np.ndarray, " D"]:
    """Return splits in which no text of two sources is trained on and validated on."""
    result = hold_out_together(splits, contents, members)
    moved = int((result != splits).sum())
    for number, member in enumerate(getattr(source, "members", ())):
        mine = members == number
        if (splits[mine] == 0).any() and not (result[mine] == 0).any():
            raise DataError(
                f"every text of {member.name} that is trained on is held out in "
                "another source of data.mix; leave one of the two out"
            )
    if moved:
        note(
            f"{moved:,} texts of the mixture are in several sources and held out in "
            "one: they are held out in all"
        )
    return result


def too_few(plan: Plan, config: DataConfig) -> bool:
    """Whether there are so few documents that a split would get none of them.

    They are then cut, but for answers, which belong to their prompts.
    """
    if plan.has_parts:
        return False
    free = plan.given < 0
    distinct = len(np.unique(plan.fractions[free]))
    # Repeats of one text can't be told apart by cutting them.
    return 0 < distinct == int(free.sum()) <= len(_wanted(plan, config))


def _wanted(plan: Plan, config: DataConfig) -> dict[str, float]:
    """Return the share of each split that has to be taken from train."""
    shares = {"valid": config.valid_fraction, "test": config.test_fraction}
    named = {SPLITS[i] for i in plan.given[plan.given >= 0].tolist()}
    return {s: f for s, f in shares.items() if f > 0 and s not in named}


def cut_into_splits(documents: Documents, plan: Plan, config: DataConfig) -> Documents:
    """Return documents laid end to end and cut into ranges, one a split.

    The cuts fall between articles or lines, as of one text file.
    """
    shares, free = _wanted(plan, config), plan.given < 0
    cuts = range_cuts(
        plan.num_bytes[free].tolist(), shares.get("valid", 0), shares.get("test", 0)
    )

    def pieces() -> Iterator[Document]:
        start = 0
        for document, is_free in zip(documents(), free.tolist(), strict=True):
            if not is_free:
                yield document
                continue
            data = bytes(document.data)
            articles = find_articles(data)
            valid, test = (find_cut(data, articles, cut - start) for cut in cuts)
            for split, first, last in zip(
                SPLITS, (0, valid, test), (valid, test, len(data)), strict=True
            ):
                if first < last:
                    yield document._replace(
                        data=data[first:last],
                        offset=document.offset + first,
                        split=split,
                        ends=document.ends and last == len(data),
                    )
            start += len(data)

    return pieces


def _number_classes(
    labels: set[int | str | None], name: str
) -> dict[int | str | None, int]:
    """Return each label's class: numbers stay, names are numbered by alphabet."""
    if len({isinstance(label, str) for label in labels}) > 1:
        raise DataError(f"{name} has numbers and names as labels; use one kind")
    if any(isinstance(label, str) for label in labels):
        return {label: number for number, label in enumerate(sorted(map(str, labels)))}
    return {number: number for number in range(max(map(int, labels)) + 1)}  # type: ignore[arg-type]

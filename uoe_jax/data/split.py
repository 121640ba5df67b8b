"""Dividing documents among train, valid and test so that no content is in two."""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt64

SPLITS = ("train", "valid", "test")

_ARTICLE_TAG = re.compile(rb"\n</doc>[ \t\r]*\n")  # WikiExtractor's end of an article
_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")


def hash_fraction(key: bytes | bytearray | memoryview) -> float:
    """Return a number in [0, 1) that depends on the bytes of a key only."""
    return int.from_bytes(hashlib.sha256(key).digest()[:6], "big") / 2**48


def assign_splits(
    given: Int[np.ndarray, " D"],
    fractions: Float[np.ndarray, " D"],
    valid_fraction: float,
    test_fraction: float,
) -> Int[np.ndarray, " D"]:
    """Return each document's split as an index into SPLITS.

    `given` holds the splits the source names, -1 elsewhere. The rest is divided by
    `fractions` (see `hash_fraction`): equal values stay together, a new document moves
    no old one, and a split that is asked for gets a document if there are enough.
    A split that the source names gets nothing else.
    """
    result = given.copy()
    free = np.flatnonzero(given < 0)
    wanted = {2: test_fraction, 1: valid_fraction}
    wanted = {s: f for s, f in wanted.items() if f > 0 and not (given == s).any()}
    values, low = np.unique(fractions[free]), 0.0
    for others, (split, fraction) in zip(
        (len(wanted), 1), wanted.items(), strict=False
    ):
        if len(values) <= others:  # the others, train among them, need one each
            continue
        high = max(low + fraction, np.nextafter(values[0], 2.0))
        taken = values < min(high, values[-others])
        result[free[np.isin(fractions[free], values[taken])]] = split
        values, low = values[~taken], high
    result[result < 0] = 0
    return result


def hold_out_together(
    splits: Int[np.ndarray, " D"],
    contents: UInt64[np.ndarray, " D"],
    members: Int[np.ndarray, " D"],
) -> Int[np.ndarray, " D"]:
    """Return splits in which a content that several sources have is in one split.

    What one of them holds out all do; between valid and test it is test. Contents of
    one source alone stay where they are.
    """
    values, group = np.unique(contents, return_inverse=True)
    first = np.full(len(values), np.iinfo(np.int64).max)
    last, held = np.full(len(values), -1), np.zeros(len(values), splits.dtype)
    np.minimum.at(first, group, members)
    np.maximum.at(last, group, members)
    np.maximum.at(held, group, splits)
    return np.where((first < last)[group], held[group], splits)


def find_articles(text: bytes | mmap.mmap) -> Int[np.ndarray, " A"]:
    """Return where the articles of a text start, by closing tags or blank lines."""
    pattern = _ARTICLE_TAG if bytes(text[:5]) == b"<doc " else _BLANK_LINES
    starts = np.fromiter((m.end() for m in pattern.finditer(text)), np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), starts])
    return starts[starts < len(text)]


def find_cut(
    text: bytes | mmap.mmap, articles: Int[np.ndarray, " A"], near: int
) -> int:
    """Return where to cut a text at or after `near`.

    The start of an article if one is near (half a percent of the text or 4 kB), else
    of a line, else of a UTF-8 character.
    """
    size = len(text)
    if near <= 0 or near >= size:
        return min(max(near, 0), size)
    reach = min(near + max(size // 200, min(4096, size // 20)), size)
    following = np.searchsorted(articles, near)
    if following < len(articles) and articles[following] <= reach:
        return int(articles[following])
    newline = text.find(b"\n", near - 1, reach)
    if newline >= 0:
        return newline + 1
    return end_of_character(text, near)


def end_of_character(text: bytes | mmap.mmap, position: int) -> int:
    """Return the first place at or after `position` that splits no UTF-8 character."""
    size = len(text)
    for place in range(position, min(position + 4, size)):
        if text[place] & 0xC0 != 0x80:
            return place
    return size if position + 4 > size else position


def range_cuts(
    sizes: Sequence[int], valid_fraction: float, test_fraction: float
) -> tuple[int, int]:
    """Return where valid and test start in files laid end to end."""
    total = sum(sizes)
    test = total - round(total * test_fraction)
    return test - round(total * valid_fraction), test

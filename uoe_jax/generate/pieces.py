"""Text as it comes: what each new token adds to it, in whole characters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from jaxtyping import Int
from numpy import array, ndarray

Decode = Callable[[Int[ndarray, " O"]], bytes]  # the text of tokens so far
# What decoders that make text, not bytes, write for bytes that aren't a character yet.
_REPLACED = "\N{REPLACEMENT CHARACTER}".encode()


def pieces(
    decode: Decode,
    steps: Iterator[Int[ndarray, " B"]],
    *,
    eos: int | None = None,
    end: bytes = b"",
) -> Iterator[bytes]:
    """Yield what each token of a stream's first row adds to the text.

    It ends before the token `eos`, and before the text `end` where that isn't empty.
    What the next token may change is held back: a character that lacks bytes, what
    stands in its place, and the beginning of an `end`. A decoder may change its mind
    about more than that: what was yielded stays, and what it says now follows from
    where the two differ.
    """
    said, found = b"", []
    for token in steps:
        if eos is not None and token[0] == eos:
            break
        found.append(int(token[0]))
        whole, ends, _ = _split(decode(array(found)), end)
        if ends:
            break
        settled = settled_bytes(whole[: len(whole) - _begun(whole, end)])
        if new := _after(said, settled):
            yield new
            said = settled
    whole = _split(decode(array(found)), end)[0] if found else said
    if new := _after(said, whole):
        yield new


def _after(said: bytes, text: bytes) -> bytes:
    """Return what of a text, in whole characters, isn't said."""
    if said.startswith(text):
        return b""
    same = len(os.path.commonprefix([said, text]))
    if same < len(said):
        while same and text[same] & 0xC0 == 0x80:  # within a character
            same -= 1
    return text[same:]


def _split(text: bytes, end: bytes) -> tuple[bytes, bytes, bytes]:
    return text.partition(end) if end else (text, b"", b"")


def _begun(text: bytes, end: bytes) -> int:
    """Return how many bytes at a text's end may be the beginning of `end`."""
    longest = min(len(text), len(end) - 1)
    lengths = range(longest, 0, -1)
    return next((n for n in lengths if text.endswith(end[:n])), 0)


def settled_bytes(text: bytes) -> bytes:
    """Return text without a character at its end that lacks bytes.

    Nor with what a decoder that makes text writes in place of it.
    """
    while text.endswith(_REPLACED):
        text = text.removesuffix(_REPLACED)
    for count in range(1, min(len(text), 4) + 1):
        first = text[-count]
        if first & 0xC0 != 0x80:  # begins a character, or is none
            length = 1 + sum(low <= first < 0xF5 for low in (0xC0, 0xE0, 0xF0))
            return text[:-count] if length > count else text
    return text

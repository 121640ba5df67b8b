"""The ids of documents, and which of them are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from jaxtyping import Integer, UInt8

from uoe_jax.data.chat import Part, special_tokens
from uoe_jax.data.text import Document
from uoe_jax.data.tokenize import Tokenizer


def encode_documents(
    tokenizer: Tokenizer, documents: Sequence[Document]
) -> list[tuple[Integer[np.ndarray, " _"], UInt8[np.ndarray, " _"] | None]]:
    """Return each document's ids, and 1 where a token is trained on; None: all are.

    A prompt's ids are those it has alone, as when a model is asked to go on with it.
    """
    special = special_tokens(tokenizer)
    texts: list[bytes | memoryview] = []  # all that has to be encoded, at once
    for document in documents:
        if not document.parts:
            texts.append(document.data)
        for run in _runs(document):
            texts += _heads(run) + [_bytes(part) for part in run[1:]]
    encoded = iter(tokenizer.encode_documents(texts))
    found: list[tuple[np.ndarray, np.ndarray | None]] = []
    for document in documents:
        if not document.parts:
            found.append((next(encoded), None))
            continue
        ids, scored = [], []
        for is_special, parts in _grouped(document):
            if is_special:
                pieces = [np.array([special[part.text]], np.int32) for part in parts]
            else:
                heads = [next(encoded) for _ in parts]
                pieces = _cut(heads, [next(encoded) for _ in parts[1:]])
            ids += pieces
            scored += [
                np.full(len(piece), part.trained, np.uint8)
                for piece, part in zip(pieces, parts, strict=True)
            ]
        found.append((np.concatenate(ids), np.concatenate(scored)))
    return found


def _grouped(document: Document) -> list[tuple[bool, list[Part]]]:
    """Return neighbouring parts of one sort: special tokens, or text."""
    return [(s, list(p)) for s, p in groupby(document.parts, lambda p: p.special)]


def _runs(document: Document) -> list[list[Part]]:
    return [parts for is_special, parts in _grouped(document) if not is_special]


def _bytes(part: Part) -> bytes:
    return part.text.encode()


def _heads(parts: Sequence[Part]) -> list[bytes]:
    """Return the text up to the end of each part."""
    texts = [_bytes(part) for part in parts]
    return [b"".join(texts[: n + 1]) for n in range(len(texts))]


def _cut(heads: list[np.ndarray], alone: list[np.ndarray]) -> list[np.ndarray]:
    """Return the ids of each part, after those before it.

    The rest of the longer text's ids, if they begin as the shorter one's: tokenizers
    that put a blank before a text put none within it. Else, where a token would lie
    across the border, the ids that the part has alone.
    """
    pieces = [heads[0]]
    for before, after, own in zip(heads, heads[1:], alone, strict=False):
        count = len(before)
        joined = len(after) >= count and (after[:count] == before).all()
        pieces.append(after[count:] if joined else own)
    return pieces

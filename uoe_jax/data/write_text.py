"""Text into arrays: every split's tokens, document starts and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from uoe_jax.config import DataConfig
from uoe_jax.data.progress import progress
from uoe_jax.data.split import SPLITS, assign_splits, hash_fraction
from uoe_jax.data.store import ArrayWriter, token_dtype
from uoe_jax.data.text import Document, TextSource
from uoe_jax.data.tokenize import (
    ByteTokenizer,
    SubwordTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from uoe_jax.errors import DataError

_GROUP_BYTES = 4 << 20  # text tokenized at once

Documents = Callable[[], Iterator[Document]]


@dataclass
class _Plan:
    """What the first pass over the documents found."""

    splits: Int[np.ndarray, " D"]  # index into SPLITS
    num_bytes: Int[np.ndarray, " D"]
    classes: dict[int | str | None, int]  # label -> class number
    bad_utf8: dict[str, int]  # documents left out or repaired


def write_text(source: TextSource, config: DataConfig, folder: Path) -> dict[str, Any]:
    """Tokenize a text source into `folder`; return its part of the manifest."""
    decodes = source.decodes or config.tokenizer != "byte"
    counts = {"skipped": 0, "replaced": 0}
    documents = lambda: clean_documents(
        source.documents(), config.bad_utf8 if decodes else None, counts
    )
    plan = _plan_documents(source, documents(), config, counts.copy)
    tokenizer = _make_tokenizer(documents, plan, config, folder)
    splits = _write_splits(source, documents, plan, tokenizer, folder)
    return {
        "kind": "rows" if source.labelled else "text",
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "end_of_document": tokenizer.end_of_document,
        },
        "classes": [str(c) for c in plan.classes],
        "bad_utf8": plan.bad_utf8,
        "splits": splits,
    }


def clean_documents(
    documents: Iterator[Document], policy: str | None, counts: dict[str, int]
) -> Iterator[Document]:
    """Yield documents that are UTF-8; a policy of None looks at nothing.

    Args:
      documents: as read.
      policy: "error" raises DataError with file and byte, "replace" puts U+FFFD for
        what can't be read, "skip" leaves the whole document out.
      counts: "skipped" and "replaced" documents are added to it.
    """
    for document in documents:
        try:
            if policy is not None:
                str(document.data, "utf-8")
        except UnicodeDecodeError as error:
            if policy == "error":
                place = document.offset + error.start
                raise DataError(
                    f"{document.name} byte {place} is not UTF-8 "
                    f"({document.data[error.start]:#04x}); set data.bad_utf8 to "
                    "replace or skip"
                ) from None
            counts["skipped" if policy == "skip" else "replaced"] += 1
            if policy == "skip":
                continue
            text = str(document.data, "utf-8", "replace")
            document = document._replace(data=text.encode())
        yield document


def _plan_documents(
    source: TextSource,
    documents: Iterator[Document],
    config: DataConfig,
    count: Callable[[], dict[str, int]],
) -> _Plan:
    """Read every document once and decide its split; equal contents stay together."""
    given, fractions, sizes, labels = [], [], [], set()
    seen: dict[bytes, float] = {}
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
    counts = count()
    if not sizes:
        skipped = counts["skipped"]
        why = f"all {skipped} documents have bad UTF-8" if skipped else "it is empty"
        raise DataError(f"{source.name} has no text ({why}); give it some")
    splits = assign_splits(
        np.array(given),
        np.array(fractions),
        config.valid_fraction,
        config.test_fraction,
    )
    classes = _number_classes(labels, source.name) if source.labelled else {}
    return _Plan(splits, np.array(sizes), classes, counts)


def _number_classes(
    labels: set[int | str | None], name: str
) -> dict[int | str | None, int]:
    """Return each label's class: numbers stay, names are numbered by alphabet."""
    if len({isinstance(label, str) for label in labels}) > 1:
        raise DataError(f"{name} has numbers and names as labels; use one kind")
    if any(isinstance(label, str) for label in labels):
        return {label: number for number, label in enumerate(sorted(map(str, labels)))}
    return {number: number for number in range(max(map(int, labels)) + 1)}  # type: ignore[arg-type]


def _make_tokenizer(
    documents: Documents, plan: _Plan, config: DataConfig, folder: Path
) -> Tokenizer:
    """Return the tokenizer; one that isn't bytes is saved with the arrays."""
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer != "bpe":
        made = load_tokenizer(config.tokenizer)
        text = made.to_json()
    else:
        train = plan.splits == SPLITS.index("train")
        total = int(plan.num_bytes[train].sum())
        with progress("training BPE", total) as advance:

            def chosen() -> Iterator[bytes | memoryview]:
                for document, is_train in zip(documents(), train, strict=True):
                    if is_train:
                        yield document.data
                        advance(len(document.data))

            text = train_bpe(chosen(), config.bpe_vocab_size)
        made = SubwordTokenizer(text, "bpe")
    (folder / "tokenizer.json").write_text(text, "utf-8")
    return made


class _SplitWriter:
    """The arrays of one split while they grow."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, labelled: bool):
        path = lambda name: folder / f"{split}_{name}.npy"
        dtype = token_dtype(tokenizer.vocab_size)
        self.tokens = ArrayWriter(path("tokens"), dtype)
        self.starts = ArrayWriter(path("starts"), np.dtype(np.int64))
        self.starts.append(np.zeros(1, np.int64))
        self.labels = None
        if labelled:
            self.labels = ArrayWriter(path("labels"), np.dtype(np.int32))
        self.num_bytes = self.counted = 0
        self._end, self._table = tokenizer.end_of_document, tokenizer.token_bytes

    def add(self, document: Document, ids: np.ndarray, label: int) -> None:
        """Append a document's ids."""
        if document.ends and self.labels is None:
            ids = np.append(ids, ids.dtype.type(self._end or 0))
            self.num_bytes += 1
        self.num_bytes += len(document.data)
        if self._table is not None:
            self.counted += int(self._table[ids].sum())
        # A zero byte inside a text ends a document like the one after it.
        if self.labels is None and self._end is not None:
            inner = np.flatnonzero(ids[:-1] == self._end)
            self.starts.append(self.tokens.length + 1 + inner)
        self.tokens.append(ids)
        self.starts.append(np.array([self.tokens.length], np.int64))
        if self.labels is not None:
            self.labels.append(np.array([label], np.int32))

    def close(self) -> dict[str, Any]:
        """Finish the files and return the split's part of the manifest."""
        for writer in (self.tokens, self.starts, self.labels):
            if writer is not None:
                writer.close()
        return {
            "documents": self.starts.length - 1,
            "bytes": self.num_bytes,
            "tokens": self.tokens.length,
            # Whether the tokenizer's bytes a token add up to the bytes of the text.
            "exact_bytes": self._table is not None and self.counted == self.num_bytes,
        }


def _write_splits(
    source: TextSource,
    documents: Documents,
    plan: _Plan,
    tokenizer: Tokenizer,
    folder: Path,
) -> dict[str, Any]:
    """Tokenize all documents in groups and append each to its split."""
    writers = [_SplitWriter(folder, s, tokenizer, source.labelled) for s in SPLITS]
    numbers = iter(plan.splits.tolist())
    with progress(f"preparing {source.name}", int(plan.num_bytes.sum())) as advance:
        for group in _groups(documents()):
            encoded = tokenizer.encode_documents([d.data for d in group])
            for document, ids in zip(group, encoded, strict=True):
                label = plan.classes.get(document.label, 0)
                writers[next(numbers)].add(document, ids, label)
            advance(sum(len(d.data) for d in group))
    return {s: w.close() for s, w in zip(SPLITS, writers, strict=True)}


def _groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document.data)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group

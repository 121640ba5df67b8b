"""Text into arrays: every split's tokens, document starts and labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.config import DataConfig
from uoe_jax.data.bpe import train_bpe
from uoe_jax.data.chat import CHAT
from uoe_jax.data.mix import MixSource
from uoe_jax.data.parts import encode_documents
from uoe_jax.data.plan import (
    Documents,
    Plan,
    clean_documents,
    cut_into_splits,
    plan_documents,
    too_few,
)
from uoe_jax.data.progress import note, progress
from uoe_jax.data.split import SPLITS
from uoe_jax.data.store import ArrayWriter, token_dtype
from uoe_jax.data.subword import SubwordTokenizer
from uoe_jax.data.text import Document, TextSource
from uoe_jax.data.tokenize import ByteTokenizer, Tokenizer, load_tokenizer
from uoe_jax.files import write_atomically

_GROUP_BYTES = 4 << 20  # text tokenized at once
_MEASURED_BYTES = 4 << 20  # of a split, in which bytes that get lost are counted
_WORTH_A_WARNING = 0.001  # share of them


def write_text(source: TextSource, config: DataConfig, folder: Path) -> dict[str, Any]:
    """Tokenize a text source into `folder`; return its part of the manifest."""
    decodes = source.decodes or config.tokenizer != "byte"
    counts = {"skipped": 0, "replaced": 0}
    # Bytes needn't be decoded, but do what is asked for.
    policy = config.bad_utf8 if decodes or config.bad_utf8 != "error" else "keep"
    documents = lambda: clean_documents(source.documents(), policy, counts)
    plan = plan_documents(source, documents(), config, counts.copy)
    cuts = not source.labelled and not isinstance(source, MixSource)
    if cuts and too_few(plan, config):
        documents = cut_into_splits(documents, plan, config)
        plan = plan_documents(source, documents(), config, lambda: plan.bad_utf8)
    skipped = source.num_skipped()
    if skipped:
        note(f"{source.name}: {skipped:,} records without a text were left out")
    if template := source.chat_template():
        write_atomically(folder / CHAT, template.to_json())
    tokenizer = _make_tokenizer(documents, plan, config, folder)
    splits = _write_splits(source, documents, plan, tokenizer, folder)
    _warn_of_lost(source.name, tokenizer, splits)
    manifest = {
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
    # Only where there are some, so that other data keeps its hash.
    if skipped:
        manifest |= {"bad_records": skipped}
    if isinstance(source, MixSource):
        manifest |= {"members": [member.name for member in source.members]}
    return manifest


def _make_tokenizer(
    documents: Documents, plan: Plan, config: DataConfig, folder: Path
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
    write_atomically(folder / "tokenizer.json", text)
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
        self.scored: ArrayWriter | None = None  # once a token isn't trained on
        self._path = path
        self.text_bytes = self.num_bytes = self.counted = 0  # num_bytes: with ends
        self.measured = self.lost = self.unknown = self.num_scored = 0
        self.member_tokens: dict[int, int] = {}  # of each source of a mixture
        self._tokenizer = tokenizer
        self._end, self._table = tokenizer.end_of_document, tokenizer.token_bytes

    def add(
        self,
        document: Document,
        ids: np.ndarray,
        scored: np.ndarray | None,
        label: int,
    ) -> None:
        """Append a document's ids, and which are trained on if not all are."""
        self._measure_lost(document, ids)
        before = self.tokens.length
        if document.ends and self.labels is None:
            ids = np.append(ids, ids.dtype.type(self._end or 0))
            self.num_bytes += 1
            if scored is not None:  # the end is learned with what it ends
                scored = np.append(scored, document.parts[-1].trained)
        self._append_scored(scored, len(ids))
        self.text_bytes += len(document.data)
        self.num_bytes += len(document.data)
        if self._table is not None:
            self.counted += int(self._table[ids].sum())
        # A zero byte inside a text ends a document like the one after it.
        # Not of a conversation, whose turns may end so.
        if self.labels is None and self._end is not None and not document.parts:
            inner = np.flatnonzero(ids[:-1] == self._end)
            self.starts.append(self.tokens.length + 1 + inner)
        self.tokens.append(ids)
        self.starts.append(np.array([self.tokens.length], np.int64))
        if self.labels is not None:
            self.labels.append(np.array([label], np.int32))
        grown = self.tokens.length - before
        self.member_tokens[document.member] = (
            self.member_tokens.get(document.member, 0) + grown
        )

    def _append_scored(self, scored: np.ndarray | None, count: int) -> None:
        """Note which of `count` new tokens are trained on; None: all."""
        if scored is None and self.scored is None:
            return
        if self.scored is None:
            self.scored = ArrayWriter(self._path("scored"), np.dtype(np.uint8))
            self.scored.append(np.ones(self.tokens.length, np.uint8))
            self.num_scored = self.tokens.length
        if scored is None:
            scored = np.ones(count, np.uint8)
        self.scored.append(scored)
        self.num_scored += int(scored.sum())

    def _measure_lost(self, document: Document, ids: np.ndarray) -> None:
        """Count what the tokenizer doesn't know, in the first documents."""
        tokenizer = self._tokenizer
        if not isinstance(tokenizer, SubwordTokenizer):
            return
        if tokenizer.unknown is not None:
            self.unknown += int(np.count_nonzero(ids == tokenizer.unknown))
        size = len(document.data)
        if self.measured < _MEASURED_BYTES:
            self.measured += size
            if self._table is None or int(self._table[ids].sum()) < size:
                self.lost += tokenizer.count_lost(document.data)

    def close(self) -> dict[str, Any]:
        """Finish the files and return the split's part of the manifest."""
        for writer in (self.tokens, self.starts, self.labels, self.scored):
            if writer is not None:
                writer.close()
        # Only where there are some, so that other data keeps its hash.
        more = {}
        if self.lost:
            share = self.lost / self.measured
            more = {
                "lost_bytes": round(share * self.text_bytes),
                "unknown_tokens": self.unknown,
            }
        if self.scored is not None:
            more["scored"] = self.num_scored
        return more | {
            "documents": self.starts.length - 1,
            "bytes": self.num_bytes,
            "tokens": self.tokens.length,
            # Whether the tokenizer's bytes a token add up to the bytes of the text.
            "exact_bytes": self._table is not None and self.counted == self.num_bytes,
        }


def _warn_of_lost(name: str, tokenizer: Tokenizer, splits: dict[str, Any]) -> None:
    """Say what share of the text the tokenizer doesn't know."""
    lost = sum(split.get("lost_bytes", 0) for split in splits.values())
    total = sum(split["bytes"] for split in splits.values())
    if lost > _WORTH_A_WARNING * total:
        note(
            f"warning: tokenizer {tokenizer.name} doesn't know {lost / total:.1%} of "
            f"{name}; bits per byte are over the rest of its bytes"
        )


def _write_splits(
    source: TextSource,
    documents: Documents,
    plan: Plan,
    tokenizer: Tokenizer,
    folder: Path,
) -> dict[str, Any]:
    """Tokenize all documents in groups and append each to its split."""
    writers = [_SplitWriter(folder, s, tokenizer, source.labelled) for s in SPLITS]
    numbers = iter(plan.splits.tolist())
    with progress(f"preparing {source.name}", int(plan.num_bytes.sum())) as advance:
        for group in _groups(documents()):
            encoded = encode_documents(tokenizer, group)
            for document, (ids, scored) in zip(group, encoded, strict=True):
                label = plan.classes.get(document.label, 0)
                writers[next(numbers)].add(document, ids, scored, label)
            advance(sum(len(d.data) for d in group))
    splits = {s: w.close() for s, w in zip(SPLITS, writers, strict=True)}
    if isinstance(source, MixSource):
        for split, writer in zip(splits.values(), writers, strict=True):
            numbers = range(len(source.members))
            split["members"] = [writer.member_tokens.get(n, 0) for n in numbers]
    return splits


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

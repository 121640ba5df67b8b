"""Array sources into prepared arrays: images with labels, token streams and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.data.arrays import ArraySource, Pairs, Ragged
from uoe_jax.data.store import token_dtype
from uoe_jax.errors import DataError


def write_arrays(source: ArraySource, kind: str, folder: Path) -> dict[str, Any]:
    """Write an array source for a kind of model; return its part of the manifest."""
    splits = source.splits()
    holds = "images" if splits["train"][0].ndim == 4 else "tokens"
    needs = "images" if kind == "vision" else "tokens"
    if holds != needs:
        use = "vision" if holds == "images" else "decoder"
        raise DataError(
            f"{source.name} holds {holds} but model.kind is {kind!r}; use model.kind "
            f"{use} or other data"
        )
    if kind != "decoder" and any(y is None for _, y in splits.values()):
        raise DataError(
            f"{source.name} has no labels but model.kind is {kind!r}; add an array of "
            "them (ytr, yte)"
        )
    if kind == "vision":
        return _write_images(splits, folder)
    return _write_token_rows(splits, kind == "encoder", folder)


def _write_images(splits: Pairs, folder: Path) -> dict[str, Any]:
    """Write pixels as they are, with the train split's mean and deviation a channel."""
    train = splits["train"][0]
    pixels = train.reshape(-1, train.shape[-1])
    deviation = pixels.std(axis=0, dtype=np.float64)
    classes = 0
    for split, (images, labels) in splits.items():
        np.save(folder / f"{split}_images.npy", images, allow_pickle=False)
        if labels is not None:
            np.save(folder / f"{split}_labels.npy", labels, allow_pickle=False)
            classes = max(classes, int(labels.max(initial=-1)) + 1)
    return {
        "kind": "images",
        "tokenizer": None,
        "classes": [str(c) for c in range(classes)],
        "image_shape": list(train.shape[1:]),
        "mean": pixels.mean(axis=0, dtype=np.float64).tolist(),
        # A channel that is constant stays as it is.
        "deviation": np.where(deviation > 0, deviation, 1.0).tolist(),
        "splits": {
            s: {"documents": len(x), "bytes": int(x.nbytes)}
            for s, (x, _) in splits.items()
        },
    }


def _write_token_rows(splits: Pairs, labelled: bool, folder: Path) -> dict[str, Any]:
    """Write token ids as one stream a split, with the start of each row."""
    rows = {split: _as_ragged(tokens) for split, (tokens, _) in splits.items()}
    vocab_size = 1 + max(int(r.tokens.max()) for r in rows.values() if r.size)
    counts, classes = {}, 0
    for split, (_, labels) in splits.items():
        starts = rows[split].starts
        flat = rows[split].tokens.astype(token_dtype(vocab_size))
        np.save(folder / f"{split}_tokens.npy", flat, allow_pickle=False)
        np.save(folder / f"{split}_starts.npy", starts, allow_pickle=False)
        if labelled and labels is not None:
            np.save(folder / f"{split}_labels.npy", labels, allow_pickle=False)
            classes = max(classes, int(labels.max(initial=-1)) + 1)
        counts[split] = {
            "documents": len(rows[split]),
            "bytes": None,
            "tokens": int(flat.size),
            "exact_bytes": False,
        }
        if (scored := rows[split].scored) is not None:
            np.save(folder / f"{split}_scored.npy", scored, allow_pickle=False)
            counts[split]["scored"] = int(scored.sum())
    return {
        "kind": "rows" if labelled else "text",
        "tokenizer": {
            "name": "ids",
            "vocab_size": vocab_size,
            "end_of_document": None,
        },
        "classes": [str(c) for c in range(classes)],
        "splits": counts,
    }


def _as_ragged(tokens: np.ndarray | Ragged) -> Ragged:
    """Return rows [N, T], or a stream [T] as one row, end to end."""
    if isinstance(tokens, Ragged):
        return tokens
    rows = len(tokens) if tokens.ndim == 2 else min(len(tokens), 1)
    starts = np.linspace(0, tokens.size, rows + 1).round().astype(np.int64)
    return Ragged(tokens.ravel(), starts)

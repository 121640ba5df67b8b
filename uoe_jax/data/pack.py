"""Token streams into rows of T tokens: plain windows, or documents packed greedily."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

Scored = UInt8[np.ndarray, " N"] | None  # 1: a token is trained on; None: all are


class Rows(NamedTuple):
    """Rows of pieces; piece p predicts tokens starts[p]+1 .. starts[p]+lengths[p].

    Row r holds pieces offsets[r]:offsets[r+1], one after the other, each its own
    segment with positions from 0.
    """

    starts: Int[np.ndarray, " P"]
    lengths: Int[np.ndarray, " P"]
    offsets: Int[np.ndarray, " R1"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths_of(self, rows: Int[np.ndarray, " B"]) -> Int[np.ndarray, " S"]:
        """Return the lengths of all pieces of some rows."""
        spans = zip(self.offsets[rows], self.offsets[rows + 1], strict=True)
        pieces = [np.arange(first, last) for first, last in spans]
        return self.lengths[np.concatenate([np.zeros(0, np.int64), *pieces])]


def count_windows(num_tokens: int, seq_len: int, *, partial: bool) -> int:
    """Return how many windows of `seq_len` inputs (and one target more) there are.

    `partial` counts a last window that isn't full.
    """
    predictions = max(num_tokens - 1, 0)
    return -(-predictions // seq_len) if partial else predictions // seq_len


def pack_documents(
    document_starts: Int[np.ndarray, " D1"], seq_len: int, scored: Scored = None
) -> Rows:
    """Put documents into rows of `seq_len` tokens, each where it fits tightest.

    A document of n tokens makes n - 1 predictions. Longer ones than a row are cut into
    pieces that overlap by one token, so that no prediction is lost. Documents are
    taken in order and go to the fullest row that has room (best fit). Pieces none of
    whose predictions is trained on are left out.
    """
    starts, lengths = _cut_documents(document_starts, seq_len)
    if scored is not None:
        kept = _has_scored(starts, lengths, scored)
        starts, lengths = starts[kept], lengths[kept]
    rows = _best_fit(lengths, seq_len)
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(rows, minlength=int(rows.max(initial=-1)) + 1)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return Rows(starts[order], lengths[order], offsets.astype(np.int64))


def _cut_documents(
    document_starts: Int[np.ndarray, " D1"], seq_len: int
) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"]]:
    """Return start and number of predictions of every piece of every document."""
    begin = np.asarray(document_starts[:-1])
    predictions = np.maximum(np.diff(document_starts) - 1, 0)
    pieces = -(-predictions // seq_len)
    owner = np.repeat(np.arange(len(begin)), pieces)
    first = np.cumsum(pieces) - pieces
    skipped = (np.arange(len(owner)) - first[owner]) * seq_len
    lengths = np.minimum(predictions[owner] - skipped, seq_len)
    return begin[owner] + skipped, lengths


def _has_scored(
    starts: Int[np.ndarray, " P"],
    lengths: Int[np.ndarray, " P"],
    scored: UInt8[np.ndarray, " N"],
) -> Bool[np.ndarray, " P"]:
    """Return which pieces predict a token that is trained on."""
    before = np.concatenate([[0], np.cumsum(scored, dtype=np.int64)])
    return before[starts + lengths + 1] > before[starts + 1]


def _best_fit(lengths: Int[np.ndarray, " P"], seq_len: int) -> Int[np.ndarray, " P"]:
    """Return each piece's row."""
    rows = np.empty(len(lengths), np.int64)
    open_rows: dict[int, list[int]] = {}  # free tokens -> rows with as many
    free: list[int] = []  # the keys above, sorted
    count = 0
    for piece, length in enumerate(lengths.tolist()):
        place = bisect.bisect_left(free, length)
        if place < len(free):
            room = free[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], free[place]
        else:
            room, row, count = seq_len, count, count + 1
        rows[piece] = row
        left = room - length
        if left:
            if left not in open_rows:
                bisect.insort(free, left)
                open_rows[left] = []
            open_rows[left].append(row)
    return rows


def window_rows(
    num_tokens: int, seq_len: int, *, partial: bool, scored: Scored = None
) -> Rows:
    """Return contiguous windows of a stream as rows of one piece.

    Those none of whose predictions is trained on are left out.
    """
    count = count_windows(num_tokens, seq_len, partial=partial)
    starts = np.arange(count, dtype=np.int64) * seq_len
    lengths = np.minimum(num_tokens - 1 - starts, seq_len)
    if scored is not None:
        kept = _has_scored(starts, lengths, scored)
        starts, lengths = starts[kept], lengths[kept]
    return Rows(starts, lengths, np.arange(len(starts) + 1, dtype=np.int64))


def stretch_rows(
    counts: Sequence[int],
    document_starts: Int[np.ndarray, " D1"] | None,
    seq_len: int,
    scored: Scored = None,
    *,
    partial: bool,
) -> list[Rows]:
    """Return the rows of each stretch of tokens, which no row leaves.

    Args:
      counts: tokens of each stretch, one after the other.
      document_starts: where documents start, to pack them whole; None: plain windows.
      scored: of each token, whether it is trained on; None: all are.
    """
    rows, begin = [], 0
    for count in counts:
        end = begin + count
        inside = None if scored is None else scored[begin:end]
        if document_starts is None:
            made = window_rows(count, seq_len, partial=partial, scored=inside)
        else:
            first, last = np.searchsorted(document_starts, [begin, end])
            starts = np.asarray(document_starts[first : last + 1]) - begin
            made = pack_documents(starts, seq_len, inside)
        rows.append(Rows(made.starts + begin, made.lengths, made.offsets))
        begin = end
    return rows


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts, in their order."""
    if len(parts) == 1:
        return parts[0]
    pieces = np.cumsum([0, *(len(part.starts) for part in parts)])
    offsets = [p.offsets[1:] + n for p, n in zip(parts, pieces, strict=False)]
    return Rows(
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([np.zeros(1, np.int64), *offsets]),
    )


def fill_rows(
    tokens: np.ndarray,
    rows: Rows,
    chosen: Int[np.ndarray, " B"],
    seq_len: int,
    scored: Scored = None,
) -> dict[str, np.ndarray]:
    """Return a decoder batch of the chosen rows; -1 chooses an empty row.

    `tokens` and `targets` (the next token) are int32 [B, T], `positions` restart with
    every segment, `segments` count from 1 (0 is padding), `mask` is 1.0 where a target
    counts: where it is trained on.
    """
    shape = (len(chosen), seq_len)
    names = ("tokens", "targets", "positions", "segments")
    batch: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in names}
    mask = np.zeros(shape, np.float32)
    for row, index in enumerate(chosen.tolist()):
        if index < 0:
            continue
        place = 0
        pieces = range(int(rows.offsets[index]), int(rows.offsets[index + 1]))
        for segment, piece in enumerate(pieces, 1):
            start, length = int(rows.starts[piece]), int(rows.lengths[piece])
            here = slice(place, place + length)
            window = tokens[start : start + length + 1]
            batch["tokens"][row, here] = window[:-1]
            batch["targets"][row, here] = window[1:]
            batch["positions"][row, here] = np.arange(length)
            batch["segments"][row, here] = segment
            targets = slice(start + 1, start + length + 1)
            mask[row, here] = 1.0 if scored is None else scored[targets]
            place += length
    return batch | {"mask": mask}

"""Rows hold every prediction once, documents whole, and no target past its end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.data.pack import count_windows, fill_rows, pack_documents, window_rows

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=40)


def make_stream(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that tell their place in the stream, and the documents' starts."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.arange(1, starts[-1] + 1, dtype=np.uint16), starts


@given(lengths=LENGTHS, seq_len=st.integers(1, 16))
@settings(max_examples=150, deadline=None)
def test_packed_documents_predict_every_token_but_the_first_once(lengths, seq_len):
    tokens, starts = make_stream(lengths)
    rows = pack_documents(starts, seq_len)
    batch = fill_rows(tokens, rows, np.arange(len(rows)), seq_len)
    targets = np.sort(batch["targets"][batch["mask"] > 0])
    firsts = {int(s) for s in starts[:-1]}
    expected = [int(t) for i, t in enumerate(tokens) if i not in firsts]
    assert targets.tolist() == expected


@given(lengths=LENGTHS, seq_len=st.integers(1, 16))
@settings(max_examples=150, deadline=None)
def test_segments_are_runs_of_one_document(lengths, seq_len):
    tokens, starts = make_stream(lengths)
    rows = pack_documents(starts, seq_len)
    batch = fill_rows(tokens, rows, np.arange(len(rows)), seq_len)
    document_of = np.searchsorted(starts, np.arange(len(tokens)), side="right") - 1
    for row in range(len(rows)):
        segments = batch["segments"][row]
        valid = segments > 0
        # Padding comes last, segments count up from 1 one at a time.
        assert (np.diff(valid.astype(int)) <= 0).all()
        assert segments[0] == 1
        assert set(np.diff(segments[valid]).tolist()) <= {0, 1}
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            ids = batch["tokens"][row, here]
            assert len(set(document_of[ids - 1])) == 1
            assert (np.diff(ids) == 1).all()
            assert (batch["targets"][row, here] == ids + 1).all()
            assert batch["positions"][row, here].tolist() == list(range(here.sum()))


@given(lengths=LENGTHS, seq_len=st.integers(1, 16))
@settings(max_examples=50, deadline=None)
def test_padding_is_zero_in_every_array(lengths, seq_len):
    tokens, starts = make_stream(lengths)
    rows = pack_documents(starts, seq_len)
    batch = fill_rows(tokens, rows, np.array([-1, *range(len(rows))]), seq_len)
    padding = batch["segments"] == 0
    assert padding[0].all()
    for array in batch.values():
        assert not array[padding].any()
    assert (batch["mask"] == ~padding).all()


def test_packing_leaves_few_holes():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 400, 2000)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rows = pack_documents(starts, 256)
    used = (lengths - 1).sum() / (len(rows) * 256)
    # Opening a row whenever the next piece doesn't fit the last would use 0.75.
    assert used > 0.97


@given(num_tokens=st.integers(0, 200), seq_len=st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_windows_tile_the_stream(num_tokens, seq_len):
    tokens = np.arange(1, num_tokens + 1, dtype=np.uint16)
    rows = window_rows(num_tokens, seq_len, partial=True)
    assert len(rows) == count_windows(num_tokens, seq_len, partial=True)
    batch = fill_rows(tokens, rows, np.arange(len(rows)), seq_len)
    targets = batch["targets"][batch["mask"] > 0]
    assert targets.tolist() == tokens[1:].tolist()
    full = window_rows(num_tokens, seq_len, partial=False)
    assert len(full) == max(num_tokens - 1, 0) // seq_len


@pytest.mark.parametrize("seq_len", [1, 7])
def test_stream_windows_have_one_segment_and_plain_positions(seq_len):
    tokens = np.arange(50, dtype=np.uint8)
    rows = window_rows(50, seq_len, partial=False)
    batch = fill_rows(tokens, rows, np.arange(len(rows)), seq_len)
    assert (batch["segments"] == 1).all() and (batch["mask"] == 1).all()
    assert (batch["positions"] == np.arange(seq_len)).all()
    assert {k: v.dtype for k, v in batch.items()} == {
        **dict.fromkeys(("tokens", "targets", "positions", "segments"), np.int32),
        "mask": np.float32,
    }

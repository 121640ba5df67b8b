"""Bits per byte count the bytes that tokens stand for: what a tokenizer drops, not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from uoe_jax.data import make_dataset
from uoe_jax.data.subword import SubwordTokenizer

SPECIAL = {"[UNK]": 0, "<|endoftext|>": 1}
LETTERS = SPECIAL | {c: i for i, c in enumerate("abcde ", 2)}


def characters(unknown="[UNK]", normalizer=None):
    """A tokenizer that knows a few letters."""
    backend = Tokenizer(models.BPE(vocab=LETTERS, merges=[], unk_token=unknown))
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend.to_str()


def words():
    vocab = SPECIAL | {"the": 2, "cat": 3}
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend.to_str()


@given(st.text("abcxyzüß漢🙂 \n", max_size=40))
@settings(max_examples=80, deadline=None)
def test_lost_bytes_are_those_of_unknown_characters(text):
    known = set("abcde ") | {"\n"}  # white space is never counted as lost
    wanted = sum(len(c.encode()) for c in text if c not in known)
    for unknown in ("[UNK]", None):  # None: what isn't known vanishes
        tokenizer = SubwordTokenizer(characters(unknown), "t")
        assert tokenizer.count_lost(text.encode()) == wanted


def test_words_that_are_known_lose_nothing_but_the_others_do():
    tokenizer = SubwordTokenizer(words(), "t")
    assert tokenizer.count_lost(b"the  cat\nthe") == 0
    assert tokenizer.count_lost("the zoë".encode()) == 4
    lower = SubwordTokenizer(characters(normalizer=normalizers.Lowercase()), "t")
    assert lower.count_lost(b"ABC abc XYZ") == 3


@pytest.mark.parametrize("unknown", ["[UNK]", None])
def test_bytes_of_a_split_leave_out_what_is_lost(
    make_config, tmp_path, capsys, unknown
):
    (tmp_path / "t.json").write_text(characters(unknown))
    # Of 5 bytes and a blank 4 are known.
    rows = [{"text": "abüc " * 20 + "abcde"[i % 5] * i} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = make_config(
        tmp_path / "a.jsonl", tokenizer=str(tmp_path / "t.json"), valid_fraction=0.2
    )
    dataset = make_dataset(config, "valid")
    assert "warning: tokenizer t.json doesn't know" in capsys.readouterr().err
    counts = dataset.info["splits"]["valid"]
    assert counts["lost_bytes"] == 2 * 20 * counts["documents"]
    table, stream = dataset.token_bytes, dataset.prepared.array("valid", "tokens")
    kept = counts["bytes"] - counts["lost_bytes"]
    # Float64 sums of a few thousand terms: rounding stays below 1e-12 of the sum.
    assert abs(table[np.array(stream)].sum() - kept) <= 1e-12 * kept
    assert dataset.lost_share == counts["lost_bytes"] / counts["bytes"]
    if unknown:
        assert table[0] == 0.0 and counts["unknown_tokens"] == (stream == 0).sum()


def test_a_text_that_is_all_unknown_has_hardly_any_bytes(make_config, tmp_path):
    (tmp_path / "t.json").write_text(words())
    rows = [{"text": f"zwei{i} hunde{i} bellen{i} " * 5} for i in range(80)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = make_config(tmp_path / "a.jsonl", tokenizer=str(tmp_path / "t.json"))
    dataset = make_dataset(config, "valid")
    batch = dataset.batch(0)
    assert (dataset.token_bytes[0], dataset.lost_share > 0.8) == (0.0, True)
    # A model that foresees every [UNK] is credited with no byte for it.
    alone = batch | {"targets": np.zeros_like(batch["targets"])}
    assert dataset.count_bytes(alone) == 0.0


def test_a_tokenizer_that_knows_all_keeps_its_manifest(make_config, tmp_path, capsys):
    (tmp_path / "t.json").write_text(characters())
    rows = [{"text": "abc de " * (i + 9)} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = make_config(tmp_path / "a.jsonl", tokenizer=str(tmp_path / "t.json"))
    counts = make_dataset(config, "train").info["splits"]["train"]
    assert "lost_bytes" not in counts and "warning" not in capsys.readouterr().err

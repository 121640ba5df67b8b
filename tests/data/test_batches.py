"""Batches depend on seed and step alone, for any number of processes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tests.compare import assert_close
from uoe_jax.data import make_dataset
from uoe_jax.errors import ConfigError, DataError


def same(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


def targets_of(dataset):
    """Every counted target of one pass."""
    batches = [dataset.batch(step) for step in range(dataset.num_batches)]
    return np.concatenate([b["targets"][b["mask"] > 0] for b in batches])


@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_any_batch_is_the_same_in_a_fresh_dataset(make_config, text_file, pack):
    config = make_config(text_file, pack=pack)
    first = make_dataset(config, "train")
    walked = [first.batch(step) for step in range(12)]
    for step in (11, 0, 7):
        assert same(make_dataset(config, "train").batch(step), walked[step])


def test_seed_changes_the_order_and_nothing_else(make_config, text_file):
    one = make_dataset(make_config(text_file), "train")
    two = make_dataset(make_config(text_file, seed=1), "train")
    assert one.manifest == two.manifest
    assert not same(one.batch(0), two.batch(0))
    epochs = [
        np.concatenate([d.examples(np.arange(d.num_examples))["tokens"]])
        for d in (one, two)
    ]
    assert np.array_equal(*epochs)


def test_evaluation_order_has_no_seed(make_config, text_file):
    one = make_dataset(make_config(text_file), "valid")
    two = make_dataset(make_config(text_file, seed=1), "valid")
    assert same(one.batch(0), two.batch(0))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_process_shards_make_up_the_global_batch(make_config, text_file, split, count):
    dataset = make_dataset(make_config(text_file), split)
    for step in (0, dataset.num_batches - 1):
        whole = dataset.batch(step)
        parts = [
            dataset.batch(step, process_index=i, process_count=count)
            for i in range(count)
        ]
        joined = {k: np.concatenate([p[k] for p in parts]) for k in whole}
        assert same(joined, whole)


def test_uneven_processes_are_refused(make_config, text_file):
    dataset = make_dataset(make_config(text_file), "train")
    with pytest.raises(ConfigError, match="batch_size 4 isn't a multiple of 3 .*use 6"):
        dataset.batch(0, process_count=3)


def test_train_visits_every_window_once_an_epoch(make_config, text_file):
    dataset = make_dataset(make_config(text_file), "train")
    count = dataset.num_examples
    steps = range(-(-2 * count // 4))
    rows = np.concatenate([dataset.batch(s)["tokens"] for s in steps])[: 2 * count]
    every = dataset.examples(np.arange(count))["tokens"]
    expected = np.unique(every, axis=0, return_counts=True)
    for epoch in (rows[:count], rows[count:]):
        found = np.unique(epoch, axis=0, return_counts=True)
        assert all(np.array_equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluation_predicts_every_token_once(make_config, text_file, split):
    dataset = make_dataset(make_config(text_file), split)
    stream = dataset.prepared.array(split, "tokens")
    assert sorted(targets_of(dataset)) == sorted(stream[1:])
    last = dataset.batch(dataset.num_batches - 1)
    assert last["tokens"].shape == (4, 8)
    with pytest.raises(DataError, match="it has batches 0 to"):
        dataset.batch(dataset.num_batches)


def test_windows_stay_in_their_split(make_config, tmp_path):
    # Every split is its own file of one letter, so a foreign letter would show.
    for name, letter in (("train", "a"), ("valid", "b"), ("test", "c")):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.txt").write_text(letter * 300)
    for name, letter in (("train", "a"), ("valid", "b"), ("test", "c")):
        dataset = make_dataset(make_config(tmp_path / "texts"), name)
        every = dataset.examples(np.arange(dataset.num_examples))
        seen = set(every["targets"][every["mask"] > 0].tolist())
        assert seen <= {ord(letter), 0} and ord(letter) in seen


def test_bytes_of_targets_are_counted_exactly(make_config, text_file):
    for tokenizer, options in (("byte", {}), ("bpe", {"bpe_vocab_size": 300})):
        config = make_config(
            text_file, tokenizer=tokenizer, vocab_size=512, pack="stream", **options
        )
        dataset = make_dataset(config, "valid")
        batches = map(dataset.batch, range(dataset.num_batches))
        total = sum(dataset.count_bytes(b) for b in batches)
        stream = dataset.prepared.array("valid", "tokens")
        text = dataset.decode(stream)
        # The stream's first token is no target.
        assert total == len(text.encode()) - len(dataset.decode(stream[:1]).encode())
        assert_close(dataset.bytes_per_token, len(text) / len(stream), 1e-6)


def test_end_of_document_counts_as_one_byte(make_config, tmp_path):
    rows = [json.dumps({"text": f"tale number {i} é"}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    for options in ({}, {"tokenizer": "bpe", "bpe_vocab_size": 280}):
        config = make_config(tmp_path / "a.jsonl", vocab_size=512, **options)
        counts = make_dataset(config, "train").info["splits"]["train"]
        stream = make_dataset(config, "train").prepared.array("train", "tokens")
        text = make_dataset(config, "train").decode(stream)
        assert counts["bytes"] == len(text.encode()) + counts["documents"]
        assert counts["exact_bytes"]


def test_encoder_rows_are_padded_and_labelled(make_config, tmp_path):
    texts = {f"{'good' * (i % 3 + 1)} {i}": ["no", "yes"][i % 2] for i in range(40)}
    lines = [json.dumps({"text": t, "label": v}) for t, v in texts.items()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = make_config(tmp_path / "a.jsonl", "encoder", num_classes=2)
    dataset = make_dataset(config, "train")
    batch = dataset.batch(0)
    assert batch["tokens"].shape == batch["segments"].shape == (4, 8)
    for row in range(4):
        text = dataset.decode(batch["tokens"][row])
        whole = [t for t in texts if t[:8] == text[:8]]
        assert whole and batch["segments"][row].sum() == min(len(whole[0]), 8)
        names = {dataset.info["classes"][batch["labels"][row]]}
        assert names <= {texts[t] for t in whole}


def test_encoder_pads_the_last_batch_with_label_minus_one(make_config, tmp_path):
    lines = [json.dumps({"text": f"t {i}", "label": i % 3}) for i in range(90)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = make_config(tmp_path / "a.jsonl", "encoder", valid_fraction=0.2)
    dataset = make_dataset(config, "valid")
    batches = [dataset.batch(i) for i in range(dataset.num_batches)]
    labels = np.concatenate([b["labels"] for b in batches])
    assert (labels >= 0).sum() == dataset.num_examples
    segments = np.concatenate([b["segments"] for b in batches])
    assert not segments[labels < 0].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 9000}, "one example needs 9001, so give more data or"),
        ({"valid_fraction": 0.0}, "has no valid data; change data.valid_fraction"),
        (
            {"tokenizer": "bpe", "bpe_vocab_size": 300, "vocab_size": 280},
            "has 300 entries but model.vocab_size is 280; set it to at least 300",
        ),
    ],
)
def test_unusable_data_is_refused_in_one_line(make_config, text_file, options, message):
    config = make_config(text_file, **options)
    with pytest.raises(DataError, match=message) as caught:
        for split in ("train", "valid"):
            make_dataset(config, split)
    assert "\n" not in str(caught.value)


def test_unknown_split_names_the_nearest(make_config, text_file):
    with pytest.raises(DataError, match="no split 'vaild'; did you mean valid"):
        make_dataset(make_config(text_file), "vaild")


def test_batch_size_only_regroups_the_examples(make_config, text_file):
    config = make_config(text_file)
    wide = dataclasses.replace(
        config, data=dataclasses.replace(config.data, batch_size=8)
    )
    narrow = [make_dataset(config, "train").batch(s)["tokens"] for s in range(4)]
    joined = [make_dataset(wide, "train").batch(s)["tokens"] for s in range(2)]
    assert np.array_equal(np.concatenate(narrow), np.concatenate(joined))

"""Recall and copying: what is asked for was said before, once, and can be found."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.cli import main
from uoe_jax.config import DataConfig, ExperimentConfig, ModelConfig
from uoe_jax.data import make_dataset
from uoe_jax.data.tasks.recall import (
    FILLER,
    KEYS,
    MOST_PAIRS,
    VALUES,
    generate_copying,
    generate_recall,
    recall_distances,
)
from uoe_jax.errors import ConfigError, DataError


def within(tokens, ids):
    return (tokens >= ids[0]) & (tokens < ids[1])


@given(pairs=st.integers(1, 24), more=st.integers(0, 40), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_every_key_is_asked_once_and_has_one_value(pairs, more, seed):
    made = generate_recall(20, seed, 4 * pairs + more, pairs)
    distances = recall_distances(made.tokens, made.scored)
    for row, scored, far in zip(made.tokens, made.scored, distances, strict=True):
        told = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(told) == pairs
        assert all(within(k, KEYS) and within(v, VALUES) for k, v in told.items())
        rest = row[2 * pairs :]
        (asked,) = np.nonzero(within(rest, KEYS))
        assert sorted(rest[asked]) == sorted(told)
        for place in asked + 2 * pairs:
            assert scored[place + 1] and row[place + 1] == told[row[place]]
            first = row.tolist().index(row[place])
            assert far[place + 1] == place - first > 0
        assert scored.sum() == pairs == (far > 0).sum()
        assert within(rest, FILLER).sum() == len(rest) - 2 * pairs


@given(length=st.integers(8, 70), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_what_is_copied_stands_before_the_end(length, seed):
    made = generate_copying(30, seed, length)
    for row, scored in zip(made.tokens.tolist(), made.scored, strict=True):
        size = row.index(0)
        assert 1 <= size <= (length - 1) // 2 and scored.sum() == size
        (asked,) = np.nonzero(scored)
        assert asked.tolist() == list(range(size + 1, 2 * size + 1))
        assert row[size + 1 : 2 * size + 1] == row[:size] and 0 not in row[:size]
        assert set(row[2 * size + 1 :]) <= {0}


def test_each_doubling_of_the_distance_is_asked_alike():
    """p(n) falls as 1/n: between 2n and 4n as many as between n and 2n."""
    made = generate_recall(1500, 0, 1024, 4)
    far = recall_distances(made.tokens, made.scored)
    counts = np.histogram(far[far > 0], [16, 32, 64, 128, 256, 512])[0]
    # The pairs' own 8 tokens blur the shortest. Spread evenly it were 16 times as many.
    assert counts.max() < 1.5 * counts.min()


def test_more_examples_begin_with_the_same():
    few, many = (generate_recall(n, 3, 64, 8) for n in (5, 3000))
    assert np.array_equal(few.tokens, many.tokens[:5])
    assert not np.array_equal(few.tokens, generate_recall(5, 4, 64, 8).tokens)
    assert len(np.unique(many.tokens, axis=0)) == 3000
    few, many = (generate_copying(n, 3, 64) for n in (5, 3000))
    assert np.array_equal(few.tokens, many.tokens[:5])


def experiment(folder, source, **data):
    options = {"num_examples": 40, "seq_len": 32} | data
    data = DataConfig(source=source, cache_dir=str(folder), batch_size=8, **options)
    return ExperimentConfig(model=ModelConfig(max_seq_len=64), data=data)


@pytest.mark.parametrize("source", ["recall", "copying"])
@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_a_row_is_an_example_and_only_what_can_be_known_counts(tmp_path, source, pack):
    make = {
        "recall": lambda: generate_recall(50, 0, 32, 3),
        "copying": lambda: generate_copying(50, 0, 32),
    }
    made = make[source]()
    more = {"pairs": 3} if source == "recall" else {}
    config = experiment(tmp_path, source, pack=pack, **more)
    order = {"valid": (0, 5), "test": (5, 10), "train": (10, 50)}
    for split, (first, last) in order.items():
        data = make_dataset(config, split)
        assert data.num_examples == last - first
        batch = data.examples(np.arange(last - first))
        tokens, scored = made.tokens[first:last], made.scored[first:last]
        real = batch["segments"] == 1
        assert real.sum() >= (last - first) * 31
        assert np.array_equal(batch["tokens"][:, :31], tokens[:, :31])
        assert np.array_equal(batch["mask"][:, :31], scored[:, 1:])
        here = batch["mask"] == 1
        assert np.array_equal(batch["targets"][here], tokens[scored == 1])


@pytest.mark.parametrize(
    ("source", "data", "said"),
    [
        ("recall", {"seq_len": None}, "recall needs data.seq_len, the tokens of an ex"),
        ("copying", {"seq_len": None}, "copying needs data.seq_len"),
        ("recall", {"pairs": 9}, "are 36 tokens; use data.pairs 8 or fewer"),
        ("recall", {"pairs": MOST_PAIRS + 1}, f"there are {MOST_PAIRS} keys"),
        ("copying", {"seq_len": 7}, "copying needs at least 8 tokens"),
        ("copying", {"pairs": 4}, "data.pairs is 4, but data.source copying"),
    ],
)
def test_examples_that_can_not_be_are_refused(tmp_path, source, data, said):
    with pytest.raises(ConfigError, match=said):
        make_dataset(experiment(tmp_path, source, **data), "train")


def test_they_are_for_decoders(tmp_path):
    data = DataConfig(source="recall", seq_len=32, cache_dir=str(tmp_path))
    config = ExperimentConfig(model=ModelConfig(kind="encoder"), data=data)
    with pytest.raises(DataError, match="recall asks for next tokens"):
        make_dataset(config, "train")


def test_lengths_and_pairs_have_data_of_their_own(tmp_path):
    folders = {
        make_dataset(experiment(tmp_path, "recall", **d), "train").prepared.folder
        for d in ({}, {"seq_len": 40}, {"pairs": 4}, {"num_examples": 48})
    }
    assert len(folders) == 4


def test_recall_trains_from_the_command_line(tmp_path):
    run = tmp_path / "run"
    args = ["train", "tiny", "--run-dir", str(run), "--quiet", "--no-report",
            "--data.source", "recall", "--data.num-examples", "64",
            "--data.seq-len", "32", "--data.pairs", "2", "--data.batch-size", "8",
            "--data.cache-dir", str(tmp_path), "--model.d-model", "16",
            "--model.d-ff", "32", "--model.num-layers", "1", "--model.head-dim", "4",
            "--train.steps", "40", "--train.eval-every", "20",
            "--optim.learning-rate", "0.01"]  # fmt: skip
    assert main(args) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert losses[-1] < losses[0] - 0.5  # which of 256 ids are values, at least
    assert 0 <= last["accuracy"] <= 1 and last["bits_per_byte"] is None

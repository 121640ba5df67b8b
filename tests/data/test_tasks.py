"""Generated tasks as sources of a run."""

import dataclasses
import json

import numpy as np
import pytest

from uoe_jax.cli import main
from uoe_jax.config import DataConfig, ExperimentConfig, ModelConfig
from uoe_jax.data import make_dataset
from uoe_jax.data.tasks.listops import evaluate, to_words
from uoe_jax.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test")


def listops(folder, **data):
    model = ModelConfig(kind="encoder", max_seq_len=64, vocab_size=32)
    options = {"num_examples": 40, "min_length": 4, "max_length": 40} | data
    data = DataConfig(source="listops", cache_dir=str(folder), batch_size=8, **options)
    return ExperimentConfig(model=model, data=data)


def rows(config, split):
    data = make_dataset(config, split)
    batch = data.examples(np.arange(data.num_examples))
    tokens = [
        t[s == 1] for t, s in zip(batch["tokens"], batch["segments"], strict=True)
    ]
    return tokens, batch["labels"]


def test_listops_rows_have_their_own_lengths_and_values(tmp_path):
    seen = set()
    for split, count in zip(SPLITS, (40, 5, 5), strict=True):
        tokens, labels = rows(listops(tmp_path), split)
        assert len(tokens) == count
        assert len({len(t) for t in tokens}) > 1
        assert [evaluate(to_words(t)) for t in tokens] == labels.tolist()
        seen |= {t.tobytes() for t in tokens}
    assert len(seen) == 50  # no expression is in two splits


def test_held_out_examples_stay_where_train_grows(tmp_path):
    small = listops(tmp_path, num_examples=16_000)
    large = listops(tmp_path, num_examples=16_800)
    first, second = (rows(config, "valid")[0] for config in (small, large))
    assert len(first) == len(second) == 2000
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_data_seed_moves_the_order_only(tmp_path):
    config = listops(tmp_path)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=7))
    first, second = (make_dataset(c, "train") for c in (config, other))
    assert first.manifest == second.manifest
    batches = [d.batch(0)["labels"].tolist() for d in (first, second)]
    assert batches[0] != batches[1]


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"num_examples": 3}, "num_examples is 3"),
        ({"min_length": 30, "max_length": 31}, "min_length is 30"),
    ],
)
def test_sizes_that_can_not_be_are_refused(tmp_path, data, part):
    with pytest.raises(ConfigError, match=part):
        make_dataset(listops(tmp_path, **data), "train")


def test_pathfinder_is_for_vision_models(tmp_path):
    data = DataConfig(source="pathfinder", num_examples=8, cache_dir=str(tmp_path))
    model = ModelConfig(kind="vision", image_size=32, image_patch=1, num_classes=2)
    config = ExperimentConfig(model=model, data=data)
    batch = make_dataset(config, "train").batch(0)
    assert batch["images"].shape == (16, 32, 32, 1)
    assert abs(batch["images"].mean()) < 0.5  # standardised
    wrong = dataclasses.replace(config, model=ModelConfig(kind="encoder"))
    with pytest.raises(DataError, match="images"):
        make_dataset(wrong, "train")


def test_listops_trains_from_the_command_line(tmp_path, capsys):
    run = tmp_path / "run"
    args = ["train", "tiny", "--run-dir", str(run), "--quiet", "--no-report",
            "--model.kind", "encoder", "--data.source", "listops",
            "--data.num-examples", "64", "--data.max-length", "120",
            "--data.min-length", "10", "--data.cache-dir", str(tmp_path),
            "--data.batch-size", "8", "--model.d-model", "16", "--model.d-ff", "32",
            "--model.num-layers", "1", "--model.head-dim", "4",
            "--model.max-seq-len", "128", "--train.steps", "3",
            "--train.eval-every", "3"]  # fmt: skip
    assert main(args) == 0
    lines = [json.loads(x) for x in (run / "metrics.jsonl").open()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert 0 <= last["accuracy"] <= 1 and last["bits_per_byte"] is None

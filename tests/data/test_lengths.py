"""FLOPs of packed documents and padded texts are those of their own lengths."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from uoe_jax.config import ModelConfig
from uoe_jax.data import make_dataset
from uoe_jax.hardware.count import flop_share, flops_per_token
from uoe_jax.presets import get_preset
from uoe_jax.train.feed import flop_share as share_of_batch

ROWS = [{"text": "x" * (1 + 7 * i % 40), "label": i % 3} for i in range(200)]


def write(path, texts=None):
    rows = ROWS if texts is None else [{"text": text} for text in texts]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(
    ("kind", "pack"),
    [("decoder", "documents"), ("decoder", "stream"), ("encoder", "stream")],
)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_lengths_are_those_of_the_batchs_segments(
    make_config, tmp_path, kind, pack, split
):
    config = make_config(write(tmp_path / "a.jsonl"), kind, pack=pack, max_seq_len=24)
    dataset = make_dataset(config, split)
    for step in range(min(dataset.num_batches, 3)):
        segments = dataset.batch(step)["segments"]
        wanted = [
            np.bincount(row[row > 0])[1:].tolist()
            for row in segments
            if (row > 0).any()
        ]
        found = dataset.lengths(step)
        assert sorted(found.tolist()) == sorted(sum(wanted, []))
        share = share_of_batch(dataset, step)
        if pack == "stream" and kind == "decoder" and split == "train":
            assert share == 1.0
        else:
            assert 0 < share <= 1


def test_images_are_whole(make_config):
    dataset = make_dataset(make_config(kind="vision"), "train")
    assert dataset.lengths(0) is None and share_of_batch(dataset, 0) == 1.0


def test_a_dense_model_costs_what_its_pairs_of_tokens_do():
    model = ModelConfig(num_layers=3, d_model=32, num_heads=4, num_kv_heads=4,
                        head_dim=8, d_ff=64, vocab_size=100)  # fmt: skip
    lengths = [5, 1, 9, 9, 30]
    # By hand: 2 FLOPs a multiply-add; a token meets itself and those before.
    linear = 3 * (2 * 4 * 32 * 32 + 2 * 2 * 32 * 64) + 2 * 32 * 100
    pairs = lambda n: n * (n + 1) // 2
    cost = lambda n: n * linear + 3 * 4 * 32 * pairs(n)
    wanted = sum(map(cost, lengths)) / (sum(lengths) * cost(64) / 64)
    assert abs(flop_share(model, 64, lengths) - wanted) < 1e-12
    assert flop_share(model, 64, []) == 1.0 == flop_share(model, 64, [64, 64])


def test_short_documents_in_long_rows(make_config, tmp_path):
    """Documents of about 180 bytes in rows of 512, as a user's were."""
    rng = np.random.default_rng(0)
    texts = ["w" * int(n) for n in rng.integers(8, 24, 700)]
    model = dataclasses.asdict(get_preset("tiny").model) | {"max_seq_len": 512}
    config = make_config(write(tmp_path / "a.jsonl", texts), pack="documents", **{
        name: model[name] for name in ("d_model", "d_ff", "num_layers", "max_seq_len")
    })  # fmt: skip
    dataset = make_dataset(config, "train")
    tokens = int(dataset.batch(0)["mask"].sum())
    assert int(dataset.lengths(0).sum()) == tokens
    whole = flops_per_token(config.model, 512).forward
    mean = (
        sum(
            n * flops_per_token(config.model, int(n)).forward
            for n in dataset.lengths(0)
        )
        / tokens
    )
    assert abs(share_of_batch(dataset, 0) - mean / whole) < 1e-12

"""`describe` counts what the data holds and shows a first example."""

from __future__ import annotations

import json

import numpy as np

from uoe_jax.data import describe, make_dataset


def test_describe_text(make_config, text_file):
    config = make_config(text_file)
    told = describe(config)
    dataset = make_dataset(config, "train")
    assert told["source"] == "tale.txt" and told["manifest"] == dataset.manifest
    assert told["vocab_size"] == 256 and told["files"] == 1
    total = sum(s["bytes"] for s in told["splits"].values())
    assert total == text_file.stat().st_size + 1
    assert told["splits"]["train"]["examples"] == dataset.num_examples
    assert told["splits"]["train"]["bytes_per_token"] == 1
    assert told["sample"] == dataset.decode(dataset.batch(0)["tokens"][0])
    json.dumps(told)


def test_describe_images(make_config):
    told = describe(make_config(kind="vision"))
    lines = told["sample"].splitlines()
    assert len(lines) == 9 and lines[-1].startswith("label ")
    assert told["splits"]["train"]["documents"] > 1500
    json.dumps(told)


def test_describe_says_what_is_wrong_with_a_split(make_config, tmp_path):
    np.savez(tmp_path / "a.npz", tokens=np.arange(100))
    told = describe(make_config(tmp_path / "a.npz", test_fraction=0.0))
    assert told["splits"]["test"]["examples"] == 0
    assert "has no test data" in told["splits"]["test"]["problem"]

"""Experiment 006 in small, to its end: curves of adapters by the project's step."""

import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def run(script, out, data, *options):
    """What a script prints; its results are in `out`."""
    module = f"experiments.e006_adapters.{script}"
    words = [sys.executable, "-m", module, "--out", out, "--tiny", *options]
    env = os.environ | {"UOE_DATA_DIR": str(data), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, words)), env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data in the forms that the scripts read: words, and images told by colour."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    draw = random.Random(0)
    words = "river letter home carries every the a north stone".split()
    text = " ".join(draw.choice(words) for _ in range(560_000))
    with lzma.open(folder / "enwiki_plain_66MB.txt.xz", "wb", preset=0) as file:
        file.write(text.encode())
    colours = rng.integers(40, 216, (10, 3))

    def split(rows):
        labels = np.arange(rows) % 10
        noise = rng.integers(-20, 21, (rows, 3, 32, 32))
        return labels, (colours[labels][:, :, None, None] + noise).astype(np.uint8)

    parts = {key: split(300) for key in ("tr", "te")}
    labels = {f"y{key}": part[0] for key, part in parts.items()}
    grey = {f"x{k}": part[1][:, 0, :28, :28].copy() for k, part in parts.items()}
    np.savez(folder / "mnist_20k3k.npz", **grey, **labels)
    stored = {}
    for key, (_, rgb) in parts.items():
        x = np.stack([rgb[:, 1], rgb[:, 0] - rgb[:, 1], rgb[:, 2] - rgb[:, 1]], axis=1)
        for axis in (3, 2):
            x = np.diff(x, axis=axis, prepend=np.uint8(0))
        stored[f"x{key}"] = x
    np.savez(folder / "cifar10_jpg_8k2k.npz", **stored, **labels)
    return folder


def test_a_language_model_is_adapted_and_goes_on_with_what_is_missing(folder, tmp_path):
    options = ["--wiki-bytes", 300_000, "--base-steps", 20, "--base-batch", 8,
               "--steps", 6, "--batch", 4, "--curves", "lora"]  # fmt: skip
    said = run("lm", tmp_path, folder, *options)
    found = json.loads((tmp_path / "adapters_lm.json").read_text())
    about = found["about"]
    # Random bytes take 8 bits; nine words, drawn evenly, about 0.6.
    assert 0.5 < about["base_bpb_wikipedia"] < 5.0
    assert "before adapting" in said and "lora failed" not in said
    assert [row["rank"] for row in found["lora"]] == [2, 4, 8, 16, 32, 64]
    for row in found["lora"]:
        assert len(row["bpb"]) == 3 and row["params"] == 2304 * row["rank"]
        assert max(row["bpb"]) < about["base_bpb_python"] - 0.3


def test_a_convnet_is_adapted(folder, tmp_path):
    """Every kind of curve runs to its end; a few steps teach little."""
    options = ["--steps", 3, "--batch", 8, "--curves", "head", "lora"]
    said = run("conv", tmp_path, folder, *options)
    assert "failed" not in said
    found = json.loads((tmp_path / "adapters_conv.json").read_text())
    assert [row["params"] for row in found["head"]] == [0]
    assert [row["rank"] for row in found["lora"]] == [1, 2, 4, 8, 16]
    assert [row["params"] for row in found["lora"][:3]] == [355, 710, 1420]
    for row in (*found["head"], *found["lora"]):
        assert len(row["error"]) == 3 and 0 <= min(row["error"]) <= 1

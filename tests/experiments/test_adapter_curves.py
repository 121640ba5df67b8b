"""Experiment 006 in small, to its end: curves of adapters by the project's step."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.e006_adapters.config import FILE, finished, settings
from experiments.e006_adapters.curves import Curve, Results, solve
from experiments.e006_adapters.data import images, read_images
from experiments.e006_adapters.plot import HALVES, plot, table
from uoe_jax.files import read_json

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "experiments" / "e006_adapters" / "results" / FILE


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder that the whole program leaves, in small."""
    folder = tmp_path_factory.mktemp("006")
    words = ["-m", "experiments.run", "006", "--tiny", "--out", str(folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    env.pop("UOE_DATA_DIR", None)  # tiny takes no file
    done = subprocess.run(
        [sys.executable, *words], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return folder / "e006_adapters-tiny"


def test_a_language_model_is_adapted(out):
    found = read_json(out / FILE)["lm"]
    about = found["about"]
    # Random bytes take 8 bits; nine words, drawn evenly, about 0.6.
    assert 0.5 < about["base_bpb_wikipedia"] < 5.0
    assert [row["rank"] for row in found["lora"]] == [2, 4, 8, 16, 32, 64]
    for row in found["lora"]:
        assert len(row["bpb"]) == 3 and row["params"] == 2304 * row["rank"]
        assert max(row["bpb"]) < about["base_bpb_python"] - 0.3


def test_a_convnet_is_adapted(out):
    """Every kind of curve runs to its end; a few steps teach little."""
    found = read_json(out / FILE)["conv"]
    assert [row["params"] for row in found["head"]] == [0]
    assert [row["rank"] for row in found["lora"]] == [1, 2, 4, 8, 16]
    assert [row["params"] for row in found["lora"][:3]] == [355, 710, 1420]
    for row in (*found["head"], *found["lora"]):
        assert len(row["error"]) == 3 and 0 <= min(row["error"]) <= 1


def test_it_is_over_then_with_a_table_and_a_picture(out):
    assert finished(out, tiny=True) and not finished(out / "nowhere", tiny=True)
    assert not finished(out, tiny=False)
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "| lm | LoRA | 64 |" in (out / "table.md").read_text()


def test_what_was_recorded_is_read():
    record = read_json(RECORD)
    text = table(record)
    assert "| lm | LoRA | 64 | 2,654,208 | 0.003 | 1.1572 ± 0.0004 |" in text
    assert "| conv | Tucker 4-D, kernel ranks 3 | 16 | 32,275 |" in text
    assert plot(record).startswith(b"\x89PNG") and plot({}).startswith(b"\x89PNG")
    for half in HALVES:
        assert set(record[half]) >= set(settings(tiny=True)[half].curves)


def test_a_curve_goes_on_with_what_is_missing(tmp_path):
    asked = []

    def run(stack):
        _, rates, seeds = stack
        asked.append((rates.tolist(), seeds.tolist()))
        return np.abs(rates - 0.25) + seeds

    sizes = {1: 10, 2: 20}
    curve = Curve(name="a", metric="bad", rates=(0.5, 0.25), sizes=sizes, run=run)
    file = tmp_path / FILE
    solve(curve, Results(file, "lm"))
    # The rates on the first seed, then the best one on the two others.
    assert asked == [
        ([0.5, 0.5], [0, 0]), ([0.25, 0.25], [0, 0]), ([0.25, 0.25], [1, 1]),
        ([0.25, 0.25], [2, 2]),
    ]  # fmt: skip
    assert read_json(file)["lm"]["a"] == [
        {"rank": 1, "params": 10, "rate": 0.25, "bad": [0.0, 1.0, 2.0]},
        {"rank": 2, "params": 20, "rate": 0.25, "bad": [0.0, 1.0, 2.0]},
    ]
    results = Results(file, "lm")
    del results.done["a"], results.done["a/seed 1"]
    asked.clear()
    solve(curve, results)
    assert asked == [([0.25, 0.25], [1, 1])]
    Results(file, "conv").put("about", {})
    assert set(read_json(file)) == {"lm", "conv"}


def test_images_are_read_as_they_were_stored(tmp_path, rng):
    rgb = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    planes = rgb[..., 1], rgb[..., 0] - rgb[..., 1], rgb[..., 2] - rgb[..., 1]
    stored = np.stack(planes, axis=1)
    for axis in (3, 2):
        stored = np.diff(stored, axis=axis, prepend=np.uint8(0))
    labels = rng.integers(0, 10, 6)
    file = tmp_path / "images.npz"
    np.savez(file, xtr=stored, ytr=labels, xte=stored[:2], yte=labels[:2])
    train, classes, test, few = read_images("cifar", file)
    assert (train == rgb).all() and (test == rgb[:2]).all()
    assert (classes == labels).all() and (few == labels[:2]).all()
    grey = rgb[:, :28, :28, 0]
    np.savez(file, xtr=grey, ytr=labels, xte=grey, yte=labels)
    train = read_images("mnist", file)[0]
    assert (train[:, 2:-2, 2:-2] == grey[..., None]).all()
    assert train.sum(dtype=int) == 3 * grey.sum(dtype=int)  # its border is black


def test_made_up_images_tell_their_class():
    x, y, test, _ = images("mnist", tiny=True)
    assert x.shape == (300, 32, 32, 3) and -1 <= x.min() < x.max() <= 1
    means = np.stack([x[y == k].mean(axis=(0, 1, 2)) for k in range(10)])
    told = np.argmin(((test.mean(axis=(1, 2))[:, None] - means) ** 2).sum(-1), axis=1)
    assert (told == y).all()

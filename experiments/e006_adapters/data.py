"""What 006 reads: Wikipedia's bytes, Python's source, MNIST and CIFAR-10 as images.

Tiny data is made up and takes no file: words in a random order, classes told by colour.
"""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np

from experiments.e003_images.data import undo_deltas
from experiments.shared.case import data_file
from uoe_jax.config import ExperimentConfig
from uoe_jax.data import make_dataset

Halves = tuple[np.ndarray, np.ndarray]
WIKIPEDIA = "enwiki_plain_66MB.txt.xz"
IMAGES = {"mnist": "mnist_20k3k.npz", "cifar": "cifar10_jpg_8k2k.npz"}
TRAIN, VALID = 60_000_000, 3_000_000  # bytes of Wikipedia
WORDS = b"river letter home carries every the a north stone".split()


def wikipedia(tiny: bool) -> Halves:
    """Return training and validation bytes."""
    if tiny:
        drawn = np.random.default_rng(0).integers(len(WORDS), size=70_000)
        text = np.frombuffer(b" ".join(WORDS[i] for i in drawn), np.uint8)
        return text[:-50_000], text[-50_000:]
    with lzma.open(data_file(WIKIPEDIA)) as file:
        text = np.frombuffer(file.read(TRAIN + VALID), np.uint8)
    return text[:-VALID], text[-VALID:]


def python_source(config: ExperimentConfig) -> Halves:
    """Return training and validation bytes of the built-in text."""
    tokens = (
        make_dataset(config, split).prepared.array(split, "tokens")
        for split in ("train", "valid")
    )
    train, valid = (np.asarray(part).astype(np.uint8) for part in tokens)
    return train, valid


def images(name: str, tiny: bool) -> tuple[np.ndarray, ...]:
    """Return images [N, 32, 32, 3] in [-1, 1] and labels, train then test."""
    parts = _colours() if tiny else read_images(name, Path(data_file(IMAGES[name])))
    return tuple(
        part.reshape(-1).astype(np.int32)
        if number % 2
        else part.astype(np.float32) / 127.5 - 1
        for number, part in enumerate(parts)
    )


def read_images(name: str, path: Path) -> tuple[np.ndarray, ...]:
    """Return a file's images uint8 [N, 32, 32, 3] and labels, train then test."""
    with np.load(path) as saved:
        found = {key: saved[key] for key in ("xtr", "ytr", "xte", "yte")}
    for key in ("xtr", "xte"):
        if name == "mnist":
            grey = found[key].reshape(-1, 28, 28)
            grey = np.pad(grey, ((0, 0), (2, 2), (2, 2)))
            found[key] = np.repeat(grey[..., None], 3, axis=-1)
        else:
            found[key] = undo_deltas(found[key])
    return tuple(found.values())


def _colours() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (10, 1, 1, 3))
    labels = np.arange(300) % 10
    noise = rng.integers(-20, 21, (2, 300, 32, 32, 3))
    return colours[labels] + noise[0], labels, colours[labels] + noise[1], labels

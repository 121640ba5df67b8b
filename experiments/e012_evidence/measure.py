"""What is trained on, and what is measured of every trained model.

Bits/byte on valid and test of each corpus, by position too, copying of a random string,
the leak probe; of models of recall the share of right answers by distance.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer, PyTree

from experiments.e012_evidence.models import BUDGETS
from experiments.e012_evidence.study import Job
from experiments.shared.arrays import Arrays, load_split
from experiments.shared.case import change
from experiments.shared.programs import Programs
from uoe_jax.config import DataConfig, ExperimentConfig
from uoe_jax.data import make_dataset
from uoe_jax.data.tasks.recall import recall_distances
from uoe_jax.errors import ConfigError

_VALID_BYTES = 1_300_000  # of each corpus
_TEST_BYTES = 3_000_000  # likewise
_COPIES = 64  # rows of the copy test
_FIRST = 8  # tokens of the second string that aren't scored: where it begins is told
_LETTERS = (97, 123)
_PAIRS = 32  # of recall


def train_data(job: Job, options: argparse.Namespace) -> DataConfig:
    """Return what a job trains on; ConfigError where no text is given."""
    if job.task == "recall":
        few = {"num_examples": 512, "pairs": 4} if options.tiny else {"pairs": _PAIRS}
        return DataConfig(source="recall", seq_len=job.length, **few)
    parts = corpora(job, options)
    if len(parts) == 1:
        return next(iter(parts.values()))
    paths = [f"{data.path}={1 / len(parts)}" for data in parts.values()]
    return DataConfig(mix=tuple(paths))


def corpora(job: Job, options: argparse.Namespace) -> dict[str, DataConfig]:
    """Return the texts that a job's models are measured on, by name."""
    if job.task == "recall":
        return {"recall": train_data(job, options)}
    given = {"wikipedia": options.articles, "python": options.python}
    found = {n: DataConfig(path=str(path)) for n, path in given.items() if path}
    for name, data in found.items():
        if not given[name].exists():
            raise ConfigError(f"{name}: {data.path} doesn't exist; check the path")
    if not found and options.tiny:
        shares = {"valid_fraction": 0.1, "test_fraction": 0.1}
        return {"stdlib": DataConfig(source="stdlib", max_bytes=1_000_000, **shares)}
    if not found:
        raise ConfigError(
            "no text is given; give --articles, --python or both, or --tiny, which "
            "needs none"
        )
    return found


class Measures:
    """The splits that models of one T are trained and measured on."""

    def __init__(
        self, config: ExperimentConfig, parts: Mapping[str, DataConfig], tiny: bool
    ):
        self.names = tuple(parts)
        # In a trial of the program few rows are enough.
        most = lambda count: 64 if tiny else max(count // config.seq_len, 1)
        arrays = {"train": load_split(config, "train")}
        self.contents: dict[str, str] = {}  # what identifies each text as it is
        for name, data in parts.items():
            own = change(config, data=vars(data))
            self.contents[name] = make_dataset(own, "test").manifest
            arrays[f"valid {name}"] = load_split(own, "valid", most(_VALID_BYTES))
            arrays[f"test {name}"] = load_split(own, "test", most(_TEST_BYTES))
        self.recalls = self.names == ("recall",)
        if not self.recalls:
            arrays["copy"] = copy_rows(config.seq_len, _COPIES)
        arrays["valid"] = arrays[f"valid {self.names[0]}"]  # of the leak probe
        self.arrays: dict[str, Arrays] = arrays

    def of(
        self, job: Job, programs: Programs, params: PyTree, buffers: PyTree
    ) -> dict[str, Any]:
        """Return what is known of a trained model; of a union for all budgets at each
        of them too, on the first test."""
        found = self._measure(programs, params, buffers)
        if job.kind != "budgets":
            return found
        model, split = programs.config.model, f"test {self.names[0]}"
        fixed = dataclasses.replace(model.union, least_top_k=0)

        def at(top_k: int) -> float:
            union = dataclasses.replace(fixed, top_k=top_k)
            other = dataclasses.replace(model, union=union)
            return bits(programs.each_token(params, buffers, split, other))

        return found | {"budgets": {str(x): at(x) for x in BUDGETS}}

    def _measure(
        self, programs: Programs, params: PyTree, buffers: PyTree
    ) -> dict[str, Any]:
        each = lambda split: programs.each_token(params, buffers, split)
        found: dict[str, Any] = {"valid": {}, "test": {}, "positions": {}}
        for name in self.names:
            found["valid"][name] = bits(each(f"valid {name}"))
            tokens = each(f"test {name}")
            found["test"][name] = bits(tokens)
            found["positions"][name] = by_position(tokens)
            if self.recalls:
                found["recall"] = by_distance(tokens, self.arrays[f"test {name}"])
        if not self.recalls:
            copied = each("copy")
            weight = copied["weight"].sum()
            right = (copied["correct"] * copied["weight"]).sum() / weight
            found["copy"] = {"bits": bits(copied), "right": float(right)}
        return found | {"leak": programs.leak(params, buffers)}


def bits(tokens: Mapping[str, np.ndarray]) -> float:
    """Return the mean bits of the tokens that count."""
    nll = (tokens["nll"] * tokens["weight"]).sum(dtype=np.float64)
    return float(nll / tokens["weight"].sum(dtype=np.float64) / math.log(2))


def by_position(tokens: Mapping[str, np.ndarray]) -> list[dict[str, float]]:
    """Return the bits of tokens `first` to before `last` of a row, by doublings."""
    length = tokens["nll"].shape[1]
    edges = [0, *(2**n for n in range(4, length.bit_length()) if 2**n < length), length]
    place = np.arange(length)[None]
    return _binned(tokens, np.broadcast_to(place, tokens["nll"].shape), edges)


def by_distance(
    tokens: Mapping[str, np.ndarray], arrays: Arrays
) -> list[dict[str, float]]:
    """Return bits and right answers of recall by doublings of the distance."""
    inputs, targets = (np.asarray(arrays[name]) for name in ("tokens", "targets"))
    rows = np.concatenate([inputs[:, :1], targets], axis=1)
    asked = np.concatenate([np.zeros_like(inputs[:, :1]), tokens["weight"] > 0], axis=1)
    far = recall_distances(rows, asked.astype(np.uint8))[:, 1:]
    edges = [2**n for n in range(1, rows.shape[1].bit_length() + 1)]
    return _binned(tokens, far, edges)


def _binned(
    tokens: Mapping[str, np.ndarray],
    values: Integer[np.ndarray, "N T"],
    edges: list[int],
) -> list[dict[str, float]]:
    found = []
    for first, last in zip(edges, edges[1:], strict=False):
        inside: Bool[np.ndarray, "N T"] = (values >= first) & (values < last)
        weight: Float[np.ndarray, "N T"] = tokens["weight"] * inside
        if count := int((weight > 0).sum()):
            right = (tokens["correct"] * weight).sum() / weight.sum()
            part = {"first": first, "last": last, "tokens": count}
            part |= {"bits": bits(dict(tokens) | {"weight": weight})}
            found.append(part | {"right": float(right)})
    return found


def copy_rows(length: int, count: int) -> Arrays:
    """Return rows of a random string of letters, said twice; the second counts."""
    rng = np.random.default_rng(0)
    half = (length + 1) // 2
    strings = rng.integers(*_LETTERS, (count, half), dtype=np.uint8)
    rows = np.concatenate([strings, strings, strings[:, :1]], axis=1)[:, : length + 1]
    mask = np.zeros((count, length), np.float32)
    mask[:, half - 1 + _FIRST : 2 * half - 1] = 1  # targets of the second string
    parts = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "mask": mask}
    return {name: jnp.asarray(array) for name, array in parts.items()}

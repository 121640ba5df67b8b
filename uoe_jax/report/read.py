"""Run folders read back: config, environment and metrics as arrays."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.config import ExperimentConfig, ModelConfig, from_json
from uoe_jax.errors import DataError
from uoe_jax.hardware.count import count_active_params, count_params, flops_per_token

BLOCKS = ("attention", "mlp")  # the two routed places of a layer


@dataclass(frozen=True)
class Run:
    """One run as its folder tells it; records are those of metrics.jsonl."""

    path: Path
    name: str
    config: ExperimentConfig
    env: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)

    def series(self, key: str, x: str, kind: str = "train") -> np.ndarray:
        """Return [2, n]: `x` (step, seconds, flops) and `key` where both are there."""
        records = self.train if kind == "train" else self.evals
        pairs = [
            (r[x], r[key])
            for r in records
            if r.get(x) is not None and r.get(key) is not None
        ]
        return np.array(pairs, dtype=float).reshape(-1, 2).T

    def last(self, key: str, kind: str = "eval") -> float | int | None:
        """Return the newest value of `key`, or None if it was never recorded."""
        for record in reversed(self.evals if kind == "eval" else self.train):
            if record.get(key) is not None:
                return record[key]
        return None

    def routed_layers(self, block: str) -> list[int]:
        """Return which layers route in `block`: the rows of its router statistics."""
        return routed_layers(self.config.model, block)

    def router(self, block: str, key: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Return (steps [n], values [n, L] or [n, L, E]) of a router statistic."""
        found = [
            (r["step"], r["router"][block][key])
            for r in self.train
            if (r.get("router") or {}).get(block, {}).get(key)
        ]
        if not found:
            return None
        steps, values = zip(*found, strict=True)
        return np.array(steps, dtype=float), np.array(values, dtype=float)

    def summary(self) -> dict[str, Any]:
        """Return the run's one line: sizes, speed and final validation numbers."""
        model = self.config.model
        tokens, seconds = self.last("tokens", "train"), self.last("seconds")
        return {
            "name": self.name,
            "parameters": sum(count_params(model).values()),
            "active parameters": count_active_params(model),
            "FLOP/token": flops_per_token(model, self.config.seq_len).forward,
            "steps": self.last("step", "train"),
            "tokens": tokens,
            "FLOP": self.last("flops", "train"),
            "seconds": seconds or self.last("seconds", "train"),
            "tokens/s": tokens / seconds if tokens and seconds else None,
            "MFU": self.last("mfu", "train"),
            "validation loss": self.last("loss"),
            "bits/byte": self.last("bits_per_byte"),
            "accuracy": self.last("accuracy"),
        }


def routed_layers(model: ModelConfig, block: str) -> list[int]:
    """Return the numbers of the layers that route in "attention" or "mlp"."""
    column = BLOCKS.index(block)
    return [i for i, kind in enumerate(model.layer_kinds) if kind[column] != "dense"]


def read_run(path: Path) -> Run:
    """Return the run in a folder; raises DataError if it holds no metrics."""
    config = from_json((path / "config.json").read_text(encoding="utf-8"))
    env = {}
    if (path / "env.json").is_file():
        env = json.loads((path / "env.json").read_text(encoding="utf-8"))
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise DataError(f"{path} has no metrics.jsonl; train the run first")
    train, evals = [], []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a run that was killed while writing
            continue
        if record.get("kind") == "train":
            train.append(record)
        elif record.get("kind") == "eval" and record.get("split", "valid") == "valid":
            evals.append(record)
    if not train and not evals:
        raise DataError(f"{metrics} has no records yet; train the run first")
    return Run(path, config.name, config, env, train, evals)


def read_runs(paths: list[Path]) -> list[Run]:
    """Return several runs, names made distinct by their folders."""
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    return [dataclasses.replace(run, name=str(run.path)) for run in runs]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as {"a.b": value}."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}."))
    return flat

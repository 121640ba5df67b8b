"""Run folders read back: config, environment and metrics as arrays."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.config import (
    ExperimentConfig,
    ModelConfig,
    MoeConfig,
    UnionConfig,
)
from uoe_jax.data.progress import note_once
from uoe_jax.errors import DataError
from uoe_jax.escape import escape_line
from uoe_jax.files import read_json, read_json_lines
from uoe_jax.hardware.count import count_active_params, count_params, flops_per_token
from uoe_jax.kinds import router_of
from uoe_jax.runs.result import read_result
from uoe_jax.validation import read_config

BLOCKS = ("attention", "mlp", "depth")  # where a layer may route


@dataclass(frozen=True)
class Run:
    """One run as its folder tells it; records are those of metrics.jsonl."""

    path: Path
    name: str
    config: ExperimentConfig
    env: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)  # `runs/result.py`

    def series(self, key: str, x: str, kind: str = "train") -> np.ndarray:
        """Return [2, n]: `x` (step, seconds, flops) and `key` where both are there."""
        records = self.train if kind == "train" else self.evals
        pairs = [
            (r[x], r[key])
            for r in records
            if _is_number(r.get(x)) and _is_number(r.get(key))
        ]
        return np.array(pairs, dtype=float).reshape(-1, 2).T

    def last(self, key: str, kind: str = "eval") -> float | int | None:
        """Return the newest value of `key`, or None if it was never recorded."""
        for record in reversed(self.evals if kind == "eval" else self.train):
            if _is_number(record.get(key)):
                return record[key]
        return None

    def routed_layers(self, block: str) -> list[int]:
        """Return which layers route in `block`: the rows of its router statistics."""
        return routed_layers(self.config.model, block)

    def router(self, block: str, key: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Return (steps [n], values [n, L] or [n, L, E]) of a router statistic."""
        found, layers = [], len(self.routed_layers(block))
        for record in self.train:
            try:
                values = np.array(record["router"][block][key], dtype=float)
            except (KeyError, TypeError, ValueError):  # not recorded, or damaged
                continue
            if len(values.shape) and len(values) == layers:
                found.append((record["step"], values))
        found = [pair for pair in found if pair[1].shape == found[-1][1].shape]
        if not found:
            return None
        steps, values = zip(*found, strict=True)
        return np.array(steps, dtype=float), np.stack(values)

    def num_experts(self, block: str, layer: int) -> int:
        """Return how many experts a layer's router chooses from."""
        return num_experts(self.config.model, block, layer)

    def num_loads(self, block: str, layer: int) -> int:
        """Return how many loads a layer has; with a key router two of each expert."""
        return num_loads(self.config.model, block, layer)

    def num_shared(self, block: str, layer: int) -> int:
        """Return how many experts of a layer are always on, numbered first."""
        return num_shared(self.config.model, block, layer)

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


def _kinds(model: ModelConfig, block: str) -> list[str]:
    if block == "depth":
        return list(model.block_kinds)
    return [kinds[BLOCKS.index(block)] for kinds in model.layer_kinds]


def routed_layers(model: ModelConfig, block: str) -> list[int]:
    """Return the numbers of the layers that route in one of `BLOCKS`."""
    kinds = enumerate(_kinds(model, block))
    if block == "depth":
        return [i for i, kind in kinds if kind == "mod"]
    return [i for i, kind in kinds if router_of(model, block, kind) is not None]


def num_experts(model: ModelConfig, block: str, layer: int) -> int:
    """Return how many experts a layer's router chooses from; depth: in or around."""
    router = _router(model, block, layer)
    return 2 if router is None else router.num_experts - router.num_shared


def num_loads(model: ModelConfig, block: str, layer: int) -> int:
    """Return how many loads a layer has: of each expert one.

    With a key router as tokens ask in it, then as tokens are stored in it.
    """
    experts = num_experts(model, block, layer)
    twice = block == "attention" and model.union_for("attention").key_router
    return 2 * experts if twice else experts


def num_shared(model: ModelConfig, block: str, layer: int) -> int:
    """Return how many experts of a layer are always on, numbered first."""
    router = _router(model, block, layer)
    return 0 if router is None else router.num_shared


def experts_choose(model: ModelConfig) -> bool:
    """Return whether experts take tokens somewhere, not tokens experts."""
    routers = (
        _router(model, block, layer)
        for block in BLOCKS
        for layer in routed_layers(model, block)
    )
    return any(r is not None and r.router == "expert_choice" for r in routers)


def _router(
    model: ModelConfig, block: str, layer: int
) -> UnionConfig | MoeConfig | None:
    if block == "depth":
        return None
    return router_of(model, block, _kinds(model, block)[layer])


def read_run(path: Path) -> Run:
    """Return the run in a folder; raises DataError if it holds no metrics."""
    config = read_config(path)
    env, written = _read_object(path / "env.json"), read_result(path)
    train, evals = _read_metrics(path / "metrics.jsonl", required=not written)
    return Run(path, escape_line(config.name), config, env, train, evals, written)


def _read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} where there is no file."""
    try:
        return dict(read_json(file))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):
        raise DataError(f"{file} is damaged; restore it or move it away") from None


def _read_metrics(file: Path, *, required: bool) -> tuple[list[dict], list[dict]]:
    """Return training and validation records."""
    if not file.is_file():
        if not required:
            return [], []
        raise DataError(f"{file.parent} has no metrics.jsonl; train the run first")
    train, evals = [], []
    lines = read_json_lines(file, step=True)
    if lines.broken:
        which = ", ".join(map(str, lines.broken[:5]))
        more = ", ..." if len(lines.broken) > 5 else ""
        note_once(f"{file}: lines {which}{more} hold no metrics and are left out")
    for record in lines.records:
        if record["kind"] == "train":
            train.append(record)
        elif record["kind"] == "eval" and record.get("split", "valid") == "valid":
            evals.append(record)
    if required and not train and not evals:
        raise DataError(f"{file} has no records yet; train the run first")
    return train, evals


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) < 1e300


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

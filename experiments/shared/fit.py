"""One case and seed trained: validation keeps the parameters that are tested."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from experiments.shared.arrays import train_rows
from experiments.shared.paused import load_trees, save_trees
from experiments.shared.programs import CHUNKS, Programs, step_rates
from experiments.shared.stats import badness
from uoe_jax.config import ExperimentConfig
from uoe_jax.hardware.count import (
    count_active_params,
    count_params,
    flops_per_token,
    num_tokens,
)
from uoe_jax.runs.state import TrainState
from uoe_jax.tree import fill_leaves

CHECKS = 5  # validations of a run, the last at its end
_WARM = 2  # chunks whose time says how long a run will be


class OutOfTime(Exception):
    """The budget ended inside a run; its state is kept for the next call."""


class TooSlow(Exception):
    """A run would take longer than a case may."""


@dataclass(frozen=True)
class Limits:
    """When a run must stop, by `time.perf_counter`, and how long it may train."""

    deadline: float = math.inf
    seconds: float = math.inf


@dataclass
class Progress:
    """What a run has so far; written to a file when it is interrupted."""

    state: TrainState
    kept: tuple[PyTree, PyTree] | None  # parameters and buffers, best on valid
    curve: list[dict[str, Any]]
    chunks: list[float]  # seconds of each
    best: float = math.inf


def run_seed(
    programs: Programs,
    seed: int,
    rate: float,
    metric: str,
    limits: Limits,
    say: Callable[[str], None],
    paused: Path,
) -> dict[str, Any]:
    """Return one seed's result; goes on where `paused` has the state of an earlier try.

    The parameters that are best on validation by `metric` are tested.

    Seconds are those of training steps; waiting for a chunk's loss ends it. A step's
    is the median over chunks, so that what else the machine did counts little.

    Raises OutOfTime past the deadline, TooSlow where the limit won't hold.
    """
    config = programs.config
    rows = train_rows(config, seed, config.train.steps)
    rates = step_rates(config.optim, config.train.steps, rate)
    progress = _begin(programs, seed, paused, say)
    while len(progress.curve) < CHUNKS:
        number = len(progress.curve)
        part = slice(number * programs.chunk, (number + 1) * programs.chunk)
        metrics = _advance(programs, progress, rows[part], rates[part])
        line = progress.curve[-1]
        if (number + 1) % (CHUNKS // CHECKS) == 0:
            _check(programs, progress, metric)
            say(
                f"step {line['step']}, {line['seconds']:.1f} s, train "
                f"{line['train']:.4f}, valid {line['valid']['loss']:.4f}"
            )
        if not math.isfinite(line["train"]):
            say(f"step {line['step']}: diverged")
            break
        if len(progress.curve) < CHUNKS:
            _watch(progress, limits, paused)
    result = {
        "seed": seed,
        "rate": rate,
        "steps": config.train.steps,
        "seconds": sum(progress.chunks),
        "step_seconds": statistics.median(progress.chunks) / programs.chunk,
        "curve": progress.curve,
        "router": jax.tree.map(lambda a: np.asarray(a).tolist(), metrics["router"]),
    }
    paused.unlink(missing_ok=True)
    if progress.kept is None or len(progress.curve) < CHUNKS:
        return result  # diverged: it has no scores
    params, buffers = progress.kept
    checks = [line["valid"] for line in progress.curve if "valid" in line]
    scores = min(checks, key=lambda scores: badness(scores, metric))
    result |= {"valid": scores, "test": programs.scores(params, buffers, "test")}
    return result | {"leak": programs.leak(params, buffers)}


def _advance(
    programs: Programs, progress: Progress, rows: np.ndarray, rates: np.ndarray
) -> PyTree:
    """Train a chunk, note it in the curve and return its metrics."""
    jax.block_until_ready(progress.state)
    start = time.perf_counter()
    progress.state, metrics = programs.train(progress.state, rows, rates)
    metrics = jax.device_get(metrics)
    progress.chunks.append(time.perf_counter() - start)
    progress.curve.append(
        {
            "step": (len(progress.curve) + 1) * programs.chunk,
            "seconds": sum(progress.chunks),
            "train": float(metrics["loss"]),
            "skipped": int(metrics["skipped"]),  # steps that weren't finite
            "routing": routing_summary(metrics["router"]),
        }
    )
    return metrics


def routing_summary(router: PyTree) -> dict[str, dict[str, float]]:
    """Return by part the busiest expert's load in shares, mean over layers, and drops.

    Of a mixture of depths the share of the tokens that ask to enter.
    """
    found = {}
    for part, stats in router.items():
        load = np.asarray(stats["load"])
        if part == "depth":
            name, value = "entered", load[:, 0].mean()
        else:
            name, value = "busiest", (load.max(axis=1) * load.shape[1]).mean()
        dropped = float(np.mean(stats["dropped"]))
        found[part] = {name: float(value), "dropped": dropped}
    return found


def _check(programs: Programs, progress: Progress, metric: str) -> None:
    """Validate; keep the parameters if they are the best so far."""
    state = progress.state
    scores = programs.scores(state.params, state.buffers, "valid")
    progress.curve[-1]["valid"] = scores
    if (bad := badness(scores, metric)) < progress.best:
        progress.best = bad
        copies = (state.params, state.buffers)
        progress.kept = jax.tree.map(jnp.copy, copies)  # the state is donated


def _watch(progress: Progress, limits: Limits, paused: Path) -> None:
    """Stop a run that can't be finished now, its state saved, or that is too slow."""
    if len(progress.curve) == _WARM:
        expected = min(progress.chunks) * CHUNKS
        if expected > limits.seconds:
            raise TooSlow(f"{expected:.0f} s of training are over the limit")
    if time.perf_counter() > limits.deadline:
        _pause(progress, paused)
        raise OutOfTime(f"stopped after chunk {len(progress.curve)} of {CHUNKS}")


def _pause(progress: Progress, paused: Path) -> None:
    told = {"curve": progress.curve, "chunks": progress.chunks, "best": progress.best}
    save_trees(paused, {"state": progress.state, "kept": progress.kept}, told)


def _begin(
    programs: Programs,
    seed: int,
    paused: Path,
    say: Callable[[str], None],
) -> Progress:
    """Return a new run, or the one that was interrupted."""
    state = programs.start(seed)
    if not paused.is_file():
        return Progress(state, None, [], [])
    trees, told = load_trees(paused)
    place = lambda like, found: programs.place(fill_leaves(like, found))
    kept = None
    if "kept" in trees:
        kept = place((state.params, state.buffers), trees["kept"])
    state = place(state, trees["state"])
    say(f"seed {seed}: goes on after chunk {len(told['curve'])} of {CHUNKS}")
    # JSON has no infinity: nothing was validated yet.
    best = math.inf if told["best"] is None else told["best"]
    return Progress(state, kept, told["curve"], told["chunks"], best)


def describe(config: ExperimentConfig) -> dict[str, Any]:
    """Return a config's sizes: parameters, FLOPs and tokens of a whole run."""
    model = config.model
    flops = flops_per_token(model, config.seq_len)
    tokens = num_tokens(model, config.seq_len) * config.data.batch_size
    return {
        "parameters": sum(count_params(model).values()),
        "active_parameters": count_active_params(model),
        "forward_flops_per_token": flops.forward,
        "tokens_per_step": tokens,
        "training_flops_per_step": flops.training * tokens,
    }

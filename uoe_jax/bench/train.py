"""Whole training steps of presets: time, tokens a second, MFU, memory."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from uoe_jax.bench.sizes import Sizes
from uoe_jax.bench.timing import Row, round_seconds
from uoe_jax.config import ExperimentConfig
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.hardware.devices import peak_flops
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import make_mesh
from uoe_jax.presets import as_control, get_preset, has_unions
from uoe_jax.runs.state import init_state
from uoe_jax.train.memory import settle_memory
from uoe_jax.train.step import make_step, put_batch

_STEPS = 4  # back to back in a round


def bench_train(sizes: Sizes, rounds: int) -> Iterator[Row]:
    """Yield the rows of every preset's step; the rate is of its active FLOPs.

    Beside each union stands its control, the plain dense model of its FLOPs.
    """
    for preset, batch, length in sizes.train:
        config = get_preset(preset)
        runs = [config, as_control(config)] if has_unions(config.model) else [config]
        yield from (_time_preset(run, batch, length, rounds) for run in runs)


def _time_preset(config: ExperimentConfig, batch: int, length: int, rounds: int) -> Row:
    data = dataclasses.replace(config.data, batch_size=batch, seq_len=length)
    found = time_step(dataclasses.replace(config, data=data), rounds, _STEPS)
    mfu = f", MFU {found['mfu']:.1%}" if found["mfu"] else ""
    return Row(
        op="train",
        case=f"{config.name} B{batch} T{length}",
        name=config.name,
        what="step",
        milliseconds=found["milliseconds"],
        tflops=found["teraflops"],
        gigabytes=found["temporary_gigabytes"],
        note=f"{found['tokens_per_second']:.0f} tokens/s{mfu}",
    )


def random_batch(config: ExperimentConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random tokens as one batch of whole documents."""
    rng = np.random.default_rng(seed)
    shape = (config.data.batch_size, config.seq_len)
    tokens = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "segments": np.ones(shape, np.int32),
        "mask": np.ones(shape, np.float32),
    }


def time_step(
    config: ExperimentConfig,
    rounds: int,
    steps: int,
    inspect: Callable[[Any, Callable[[], Any]], None] | None = None,
) -> dict[str, Any]:
    """Return the median time of a step and what follows from it.

    `inspect` is given the compiled step and a function that takes one more step.

    Tokens are resident on the device. MFU is training FLOPs by `hardware.count` over
    the data sheet's dense rate; a union's are those of its chosen experts.
    """
    mesh = make_mesh(config.mesh, batch_size=config.data.batch_size)
    config, _ = settle_memory(config, mesh)
    optimizer = make_optimizer(config.optim, config.train.steps)
    graphdef, state = init_state(config, optimizer, mesh)
    batch = put_batch(random_batch(config), mesh, config.train.accumulate)
    start = time.perf_counter()
    program: Any = make_step(config, graphdef, optimizer, mesh)
    step = program.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    metrics: Any = None

    def once() -> Any:
        nonlocal state, metrics
        state, metrics = step(state, batch)
        return metrics["loss"]

    round_seconds(once, 1, calls=2)
    times = round_seconds(once, rounds, steps)
    if inspect is not None:
        inspect(step, once)
    seconds = statistics.median(times)
    tokens = config.data.batch_size * config.seq_len
    flops = flops_per_token(config.model, config.seq_len).training * tokens
    peak = peak_flops(jax.devices()[0].device_kind)
    memory = step.memory_analysis()
    return {
        "preset": config.name,
        "batch": config.data.batch_size,
        "seq_len": config.seq_len,
        "accumulate": config.train.accumulate,
        "remat": config.model.recompute,
        "scan_layers": config.model.scan_layers,
        "milliseconds": seconds * 1e3,
        "spread": (max(times) - min(times)) / seconds,
        "tokens_per_second": tokens / seconds,
        "teraflops": flops / seconds / 1e12,
        "mfu": flops / seconds / peak / mesh.size if peak else None,
        "temporary_gigabytes": memory.temp_size_in_bytes / 1e9,
        "compile_seconds": compile_seconds,
        "loss": float(metrics["loss"]),
    }

"""Time whole training steps of presets: milliseconds, tokens/s, MFU, memory.

    python benchmarks/bench_train.py small:32 small-union:32 --out FILE

PRESET:BATCH names a preset and its global batch; `--seq-len` shortens sequences.
Random tokens, resident on the device; medians over rounds of back-to-back steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uoe_jax.config import ExperimentConfig
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.hardware.devices import peak_flops
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import make_mesh
from uoe_jax.presets import get_preset
from uoe_jax.train.state import init_state
from uoe_jax.train.step import make_step, put_batch

OPTIONS = ("seq_len", "accumulate", "loss_chunk", "remat", "scan_layers")


def random_batch(config: ExperimentConfig, seed: int = 0) -> dict[str, np.ndarray]:
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


def time_step(config: ExperimentConfig, rounds: int, steps: int) -> dict[str, Any]:
    mesh = make_mesh(config.mesh, batch_size=config.data.batch_size)
    optimizer = make_optimizer(config.optim, config.train.steps)
    graphdef, state = init_state(config, optimizer, mesh)
    batch = put_batch(random_batch(config), mesh, config.train.accumulate)
    start = time.perf_counter()
    step = make_step(config, graphdef, optimizer, mesh).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    for _ in range(2):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics["loss"])
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics["loss"])
        times.append((time.perf_counter() - start) / steps)
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
        "milliseconds": seconds * 1e3,
        "spread": (max(times) - min(times)) / seconds,
        "tokens_per_second": tokens / seconds,
        "teraflops": flops / seconds / 1e12,
        "mfu": flops / seconds / peak / mesh.size if peak else None,
        "temporary_gigabytes": memory.temp_size_in_bytes / 1e9,
        "compile_seconds": compile_seconds,
        "loss": float(metrics["loss"]),
    }


def commit() -> str:
    """This checkout's commit, or "unknown" outside git."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="PRESET:BATCH")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--loss-chunk", type=int)
    parser.add_argument("--remat", choices=("none", "full", "dots"))
    parser.add_argument("--scan-layers", action=argparse.BooleanOptionalAction)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--commit", help="stated where git isn't there to ask")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def configure(name: str, args: argparse.Namespace) -> ExperimentConfig:
    preset, _, batch = name.partition(":")
    config = get_preset(preset)
    model, data, train = config.model, config.data, config.train
    if batch:
        data = dataclasses.replace(data, batch_size=int(batch))
    if args.seq_len:
        data = dataclasses.replace(data, seq_len=args.seq_len)
    if args.remat:
        model = dataclasses.replace(model, remat=args.remat)
    if args.scan_layers is not None:
        model = dataclasses.replace(model, scan_layers=args.scan_layers)
    if args.loss_chunk:
        train = dataclasses.replace(train, loss_chunk=args.loss_chunk)
    train = dataclasses.replace(train, accumulate=args.accumulate)
    return dataclasses.replace(config, model=model, data=data, train=train)


def main(argv: list[str]) -> None:
    args = parse(argv)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}", flush=True)
    print(f"{'preset':16s} {'batch':>5s} {'T':>5s} {'ms':>8s} {'tokens/s':>10s} "
          f"{'TFLOP/s':>8s} {'MFU':>6s} {'temp GB':>8s}", flush=True)  # fmt: skip
    rows = []
    for name in args.runs:
        row = time_step(configure(name, args), args.rounds, args.steps)
        rows.append(row)
        mfu = f"{row['mfu']:6.1%}" if row["mfu"] else "     -"
        print(f"{row['preset']:16s} {row['batch']:5d} {row['seq_len']:5d} "
              f"{row['milliseconds']:8.2f} {row['tokens_per_second']:10.0f} "
              f"{row['teraflops']:8.1f} {mfu} {row['temporary_gigabytes']:8.1f}",
              flush=True)  # fmt: skip
    if args.out:
        record = {
            "command": "python benchmarks/bench_train.py " + " ".join(args.runs),
            "commit": args.commit or commit(),
            "device": device,
            "jax": jax.__version__,
            "options": {k: v for k, v in vars(args).items() if k in OPTIONS and v},
            "results": rows,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

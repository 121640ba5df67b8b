"""Every useful layout of N devices for presets: losses, step times, memory, traffic.

    python benchmarks/bench_layouts.py 1b:8 1b-union:8 --devices 2 --out layouts.json

A run is PRESET:BATCH[,OPTION=VALUE ...] of `benchmarks/bench_train.py`. Each is timed
on one device and then under every legal mesh of N devices with each choice that its
layout has, the global batch the same. A layout's first step is its smoke test: its loss
must be one device's (the first layout's, if one device wasn't run), or nothing more is
timed. What `uoe plan` predicts and the collectives of the compiled program stand beside
the times. FILE is written after each layout; a layout that it holds already is not
timed again.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from bench_train import configure
from flax import nnx

from uoe_jax.bench.record import header, write_record
from uoe_jax.bench.traffic import traffic
from uoe_jax.bench.train import random_batch
from uoe_jax.config import ExperimentConfig, LayoutConfig
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.hardware.devices import Topology, find_device
from uoe_jax.hardware.roofline import Prediction, predict
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.legal import layout_problems
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.plan.layouts import describe_sizes, verdicts
from uoe_jax.runs.state import abstract_state, init_state
from uoe_jax.train.ahead import abstract_batch, with_mesh
from uoe_jax.train.step import make_step, put_batch

ONE = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
SMOKE_STEPS = 3  # whose losses are compared; the first alone decides
TOLERANCE = {"bfloat16": 1e-3, "float32": 1e-5}  # of the loss, relative


@dataclass(frozen=True)
class Layout:
    """A mesh and the choices of its layout that aren't the default."""

    sizes: dict[str, int]
    choices: dict[str, str]

    @property
    def name(self) -> str:
        return ", ".join([describe_sizes(self.sizes), *self.choices.values()])


def layouts(config: ExperimentConfig, devices: int) -> Iterator[Layout]:
    """Yield the legal layouts of a number of devices, each with each of its choices."""
    model = config.model
    routed_mlp = any(mlp in ("union", "moe") for _, mlp in model.layer_kinds)
    dense_attention = any(kind == "dense" for kind, _ in model.layer_kinds)
    for verdict in verdicts(config, devices):
        if verdict.problems:
            continue
        sets: list[dict[str, str]] = [{}]
        if verdict.sizes["tensor"] > 1:
            sets += [{"tensor_reduce": "reduce_scatter"}]
            if routed_mlp:
                sets += [c | {"dispatch": "all_to_all"} for c in sets]
        if verdict.sizes["sequence"] > 1 and dense_attention:
            ways = (
                {},
                {"sequence_attention": "gather"},
                {"sequence_attention": "heads"},
            )
            sets = [c | way for c in sets for way in ways]
        for choices in sets:
            chosen = dataclasses.replace(config, layout=LayoutConfig(**choices))
            if not list(layout_problems(chosen, verdict.sizes)):
                yield Layout(verdict.sizes, choices)


def lay_out(config: ExperimentConfig, layout: Layout) -> ExperimentConfig:
    """Return the experiment under a layout."""
    chosen = dataclasses.replace(config, layout=LayoutConfig(**layout.choices))
    return with_mesh(chosen, layout.sizes)


def described(config: ExperimentConfig) -> dict[str, Any]:
    """Return what `uoe plan --fit` has to know of a run."""
    return {
        "preset": config.name,
        "batch": config.data.batch_size,
        "seq_len": config.seq_len,
        "remat": config.model.recompute,
        "scan_layers": config.model.scan_layers,
        "accumulate": config.train.accumulate,
    }


def compile_layout(config: ExperimentConfig) -> tuple[Any, float]:
    """Return a compiled training step and the seconds that took."""
    start = time.perf_counter()
    mesh = mesh_for(config)
    optimizer = make_optimizer(config.optim, config.train.steps)
    graphdef, state = abstract_state(config, optimizer, mesh)
    program: Any = make_step(config, graphdef, optimizer, mesh)
    step = program.lower(state, abstract_batch(config, mesh)).compile()
    return step, time.perf_counter() - start


def run_layout(
    config: ExperimentConfig, step: Any, expected: list[float] | None, args: Any
) -> dict[str, Any]:
    """Return a layout's losses and, if the first is right, its times."""
    mesh = mesh_for(config)
    optimizer = make_optimizer(config.optim, config.train.steps)
    _, state = init_state(config, optimizer, mesh)
    batch = put_batch(random_batch(config), mesh, config.train.accumulate)
    losses, tolerance = [], TOLERANCE[config.model.compute_dtype]
    for _ in range(SMOKE_STEPS):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        apart = losses[0] / (expected or losses)[0] - 1  # nan where a loss isn't finite
        if not abs(apart) <= tolerance:
            return {"losses": losses, "failed": f"its loss is {apart:+.1e} apart"}
    times = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        for _ in range(args.steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics["loss"])
        times.append((time.perf_counter() - start) / args.steps)
    return {"losses": losses, **rates(config, statistics.median(times), mesh.size)} | {
        "spread": (max(times) - min(times)) / statistics.median(times)
    }


def rates(config: ExperimentConfig, seconds: float, devices: int) -> dict[str, Any]:
    """Return a step's time and what follows from it."""
    tokens = config.data.batch_size * config.seq_len
    flops = flops_per_token(config.model, config.seq_len).training * tokens
    device = find_device(jax.devices()[0].device_kind)
    peak = device.bf16_flops * devices if device else math.nan
    return {
        "milliseconds": seconds * 1e3,
        "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / peak if device else None,
    }


def compiled_figures(step: Any) -> dict[str, Any]:
    """Return memory of one device and the collectives of a compiled step."""
    memory = step.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"memory_bytes": held, "collectives": traffic(step.as_text())}


def predicted(config: ExperimentConfig, layout: Layout) -> dict[str, Any] | None:
    """Return what the cost model says of a layout; None on a chip it doesn't know."""
    device = find_device(jax.devices()[0].device_kind)
    if device is None:
        return None
    count = math.prod(layout.sizes.values())
    shape = (count,) + (1,) * (device.link.dimensions - 1)
    found: Prediction = predict(
        config, layout.sizes, Topology(name="here", device=device, shape=shape)
    )
    return {
        "milliseconds": found.step_seconds * 1e3,
        "memory_bytes": found.memory_bytes,
        "collectives": [
            {"kind": c.kind, "what": c.what, "count": c.count, "bytes": c.num_bytes}
            for c, _ in found.collectives
        ],
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="PRESET:BATCH[,OPTION=VALUE]")
    parser.add_argument("--devices", type=int, default=jax.device_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    only = "layouts whose name holds this text; given again, or that one"
    parser.add_argument("--only", action="append", default=[], help=only)
    parser.add_argument("--skip-one", action="store_true", help="no run on one device")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--commit", help="stated where git isn't there to ask")
    parser.add_argument("--hlo", type=Path, help="folder of the compiled programs")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


class Record:
    """The results so far, written after each."""

    def __init__(self, args: argparse.Namespace, argv: list[str]):
        self.path, self.rows = args.out, []
        if self.path and self.path.exists():
            self.rows = json.loads(self.path.read_text())["results"]
        device = f"{args.devices} x {jax.devices()[0].device_kind}"
        command = "python benchmarks/bench_layouts.py " + " ".join(argv)
        self.about = header(command, args.commit, device)

    def find(self, run: str, layout: str) -> dict[str, Any] | None:
        """Return the row of a run's layout, if there is one."""
        same = (r for r in self.rows if (r["run"], r["layout"]) == (run, layout))
        return next(same, None)

    def add(self, row: dict[str, Any]) -> None:
        """Keep, print and write a row."""
        self.rows.append(row)
        print(show(row), flush=True)
        write_record(self.path, {**self.about, "results": self.rows})


def show(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    head = f"{row['run']:24s} {row['layout']:40s}"
    if "failed" in row:
        return f"{head} failed: {row['failed']}"
    moved = sum(c["bytes"] * c["count"] for c in row["collectives"])
    plan = row["predicted"]["milliseconds"] if row["predicted"] else math.nan
    mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
    return (
        f"{head} {row['milliseconds']:8.1f} ms (plan {plan:8.1f}) "
        f"{row['tokens_per_second']:9.0f} tokens/s {mfu:>6s} "
        f"{row['memory_bytes'] / 1e9:6.1f} GB, moves {moved / 1e9:6.2f} GB, "
        f"loss {row['losses'][0]:.6f} {row['losses'][-1]:.6f}"
    )


def time_run(run: str, args: argparse.Namespace, record: Record, stop: float) -> None:
    """Time one run under every layout; all compile at once, none while one is timed."""
    config = configure(run)
    wanted = [] if args.skip_one else [Layout(ONE, {})]
    wanted += list(layouts(config, args.devices)) if args.devices > 1 else []
    if args.only:
        named = lambda layout: any(text in layout.name for text in args.only)
        wanted = [w for w in wanted if named(w) or w.sizes == ONE]
    wanted = [w for w in wanted if record.find(run, w.name) is None]
    print(f"{run}: compiling {len(wanted)} layouts ...", flush=True)
    with ThreadPoolExecutor(max(1, len(wanted))) as pool:
        steps: list[Future] = [
            pool.submit(compile_layout, lay_out(config, w)) for w in wanted
        ]
    for layout, future in zip(wanted, steps, strict=True):
        if time.monotonic() > stop:
            print("no time is left; run the same command again", flush=True)
            return
        chosen = lay_out(config, layout)
        row = {"run": run, "layout": layout.name, "mesh": layout.sizes}
        row |= described(chosen)
        row |= {"choices": layout.choices, "predicted": predicted(chosen, layout)}
        rows = [r for r in record.rows if r["run"] == run and "failed" not in r]
        expected = rows[0]["losses"] if rows else None  # one device's if it was run
        try:
            step, seconds = future.result()
            row |= {"compile_seconds": seconds, **compiled_figures(step)}
            if args.hlo:
                args.hlo.mkdir(parents=True, exist_ok=True)
                name = f"{run}_{layout.name}".replace(" ", "_").replace(":", "_")
                text = gzip.compress(step.as_text().encode())
                (args.hlo / f"{name}.hlo.gz").write_bytes(text)
            row |= run_layout(chosen, step, expected, args)
        except Exception as error:  # one too large, say: the others are timed
            row["failed"] = str(error).strip().splitlines()[0][:300]
        record.add(row)


def main(argv: list[str]) -> int:
    """Time the runs; 1 if a layout failed."""
    args = parse(argv)
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    stop = time.monotonic() + args.seconds
    record = Record(args, argv)
    for run in args.runs:
        if time.monotonic() < stop:
            time_run(run, args, record, stop)
    return int(any("failed" in row for row in record.rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

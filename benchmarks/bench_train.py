"""Time whole training steps of presets: milliseconds, tokens/s, MFU, memory.

    python benchmarks/bench_train.py small:32 1b:2,remat=none --out FILE

A run is PRESET:BATCH[,OPTION=VALUE ...]; options: seq_len, accumulate, loss_chunk,
remat, scan_layers, float8, mlp_experts and attention_experts (a union's, at the same
share of them chosen; an attention expert may be several heads). Beside each union
stands its control, the plain dense model of its FLOPs. Random tokens, resident on the
device; medians over rounds of back-to-back steps. A run that fails (memory, say) is
recorded with its reason, and the next one goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import math
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from uoe_jax.bench.profile import kernel_times
from uoe_jax.bench.record import arguments, header, write_record
from uoe_jax.bench.train import time_step
from uoe_jax.config import ExperimentConfig, ModelConfig
from uoe_jax.errors import ConfigError, first_line
from uoe_jax.presets import as_control, get_preset, has_unions
from uoe_jax.validation import validate

PARTS = ("mlp", "attention")
FAILURES = (ConfigError, jax.errors.JaxRuntimeError)
# Option -> the part of the experiment it is a field of, and how its value is read.
OPTIONS = {
    "seq_len": ("data", int),
    "accumulate": ("train", int),
    "loss_chunk": ("train", int),
    "remat": ("model", str),
    "scan_layers": ("model", lambda text: text.lower() == "true"),
    "num_layers": ("model", int),
    "compute_dtype": ("model", str),
    "float8": ("model", str),
    "mlp_experts": ("model", int),
    "attention_experts": ("model", int),
}


def configure(run: str) -> ExperimentConfig:
    """Return the experiment that PRESET:BATCH[,OPTION=VALUE ...] names."""
    name, *options = run.split(",")
    preset, _, batch = name.partition(":")
    config = get_preset(preset)
    changes: dict[str, dict[str, Any]] = {"data": {}, "train": {}, "model": {}}
    if batch:
        changes["data"]["batch_size"] = int(batch)
    for option in options:
        key, _, value = option.partition("=")
        if key not in OPTIONS:
            raise ConfigError(f"no option {key!r}; choose from {', '.join(OPTIONS)}")
        part, read = OPTIONS[key]
        try:
            changes[part][key] = read(value)
        except ValueError:
            raise ConfigError(f"{key}={value!r}; use a whole number") from None
    counts = [changes["model"].pop(f"{part}_experts", None) for part in PARTS]
    if counts != [None, None]:
        changes["model"] |= fewer_experts(config.model, *counts)
    parts = {
        part: dataclasses.replace(getattr(config, part), **fields)
        for part, fields in changes.items()
    }
    config = dataclasses.replace(config, **parts)
    validate(config)
    return config


def fewer_experts(
    model: ModelConfig, mlp: int | None, attention: int | None
) -> dict[str, Any]:
    """Return the fields of unions cut into so many experts; None: as many as before.

    Attention's experts are then groups of several heads.
    """
    unions = {}
    for part, experts in zip(PARTS, (mlp, attention), strict=True):
        old = model.union_for(part)
        if experts is None:
            experts = old.num_experts
        elif "union" not in getattr(model, part):
            raise ConfigError(
                f"{part}_experts={experts}: no {part} layer here is a union; use a "
                "preset whose name ends in -union"
            )
        if experts * old.top_k % old.num_experts:
            least = old.num_experts // math.gcd(old.num_experts, old.top_k)
            raise ConfigError(
                f"{part}_experts={experts} beside {old.top_k} of {old.num_experts}; "
                f"use a multiple of {least}"
            )
        top_k = experts * old.top_k // old.num_experts
        unions[part] = {"num_experts": experts, "top_k": top_k}
    replace = dataclasses.replace
    return {
        "union": replace(model.union, **unions["mlp"]),
        "union_attention": replace(model.union_attention, **unions["attention"]),
    }


def parse() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("runs", nargs="+", metavar="PRESET:BATCH[,OPTION=VALUE]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profile", type=Path, help="folder of kernel times and HLO")
    return parser.parse_args()


def show(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['run']:44s} failed: {row['failed']}"
    mfu = f"{row['mfu']:6.1%}" if row["mfu"] else "     -"
    return (
        f"{row['run']:44s} {row['milliseconds']:8.2f} {row['tokens_per_second']:9.0f} "
        f"{row['teraflops']:8.1f} {mfu} {row['temporary_gigabytes']:8.1f} "
        f"{row['compile_seconds']:8.1f}"
    )


def profile(folder: Path, index: int, step: Any, once: Any) -> None:
    """Write a step's device time by kernel, and its program to look kernels up in."""
    times = kernel_times(once)
    found = {"total": sum(times.values()), "kernels": times}
    write_record(folder / f"kernels_{index}.json", found)
    text = gzip.compress(step.as_text().encode())
    (folder / f"step_{index}.hlo.gz").write_bytes(text)


def time_control(config: ExperimentConfig, rounds: int, steps: int) -> dict[str, Any]:
    """The control's row; where it fails the union's still counts."""
    name = "  dense of its FLOPs"
    try:
        return {"run": name, **time_step(as_control(config), rounds, steps)}
    except FAILURES as error:
        return {"run": name, "failed": first_line(error)[:300]}


def main() -> None:
    args = parse()
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    record: dict[str, Any] = {**header(stated=args.commit), "results": []}
    print(f"{record['device']}, jax {record['jax']}", flush=True)
    print(f"{'run':44s} {'ms':>8s} {'tokens/s':>9s} {'TFLOP/s':>8s} {'MFU':>6s} "
          f"{'temp GB':>8s} {'compile':>8s}", flush=True)  # fmt: skip
    for index, run in enumerate(args.runs):
        look = functools.partial(profile, args.profile, index) if args.profile else None
        try:
            config = configure(run)
            row = {"run": run, **time_step(config, args.rounds, args.steps, look)}
        except FAILURES as error:
            row, config = {"run": run, "failed": first_line(error)[:300]}, None
        record["results"].append(row)
        print(show(row), flush=True)
        write_record(args.out, record)
        if config and has_unions(config.model):
            row["control"] = control = time_control(config, args.rounds, args.steps)
            said = show(control)
            if "failed" not in control:
                ratio = row["tokens_per_second"] / control["tokens_per_second"]
                said += f"   union {ratio:.3f} of it"
            print(said, flush=True)
            write_record(args.out, record)


if __name__ == "__main__":
    main()

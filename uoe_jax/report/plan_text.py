"""A plan as tables of text. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uoe_jax.config import ExperimentConfig
from uoe_jax.hardware import gemm
from uoe_jax.hardware.roofline import Prediction
from uoe_jax.plan.layouts import Plan, describe_sizes, reasons
from uoe_jax.report.table import format_table, si

HEADER = ("layout", "step", "tokens/s", "MFU", "chip", "compiled", "bound by")
TOO_LARGE = ("too large", "chip needs", "short of")


def describe(found: Plan, compiled: Mapping[str, Any], show: int) -> str:
    """Return a plan as tables."""
    config, topology = found.config, found.topology
    device = topology.device
    lines = [
        f"{config.name} on {topology.name}: {topology.num_devices} x {device.name}, "
        f"{si(device.bf16_flops, 'FLOP/s')} and {si(device.memory_bytes, 'B')} each; "
        f"{config.data.batch_size} x {config.seq_len} tokens a step",
        f"{len(found.fitting)} layouts fit, {len(found.too_large)} don't, "
        f"{len(found.illegal)} are illegal; factors: {found.calibration.source}"
        + (f"; {gemm.describe(found.gemm)}" if found.gemm else ""),
    ]
    if found.fitting:
        rows = [cells(p, _peak(p, compiled)) for p in found.fitting[:show]]
        lines += ["", format_table(HEADER, rows)]
        lines += ["", _traffic(found.fitting[0], config)]
    if found.too_large:
        short = [too_large(p) for p in found.too_large[:show]]
        lines += ["", format_table(TOO_LARGE, short)]
    if found.illegal:
        lines += ["", "illegal layouts by reason (one may have several):"]
    for problem, count, first in reasons(found.illegal)[:show]:
        such = f"such as {first}" if count > 1 else first
        lines.append(f"  {count}, {such}: {problem}")
    return "\n".join(lines)


def cells(found: Prediction, peak: str) -> tuple[str, ...]:
    """Return a layout's row below `HEADER`; `peak` is what a compiler said."""
    return (
        describe_sizes(found.sizes),
        f"{found.step_seconds * 1e3:.0f} ms",
        si(found.tokens_per_second),
        f"{found.mfu:.1%}",
        si(found.memory_bytes, "B"),
        peak,
        found.bound,
    )


def too_large(found: Prediction) -> tuple[str, str, str]:
    """Return the row below `TOO_LARGE` of a layout that doesn't fit."""
    sizes = describe_sizes(found.sizes)
    return sizes, si(found.memory_bytes, "B"), si(found.shortfall, "B")


def _peak(found: Prediction, compiled: Mapping[str, Any]) -> str:
    said = compiled.get(describe_sizes(found.sizes), {})
    if "peak_bytes" in said:
        return si(said["peak_bytes"], "B")
    return "refused" if "error" in said else "-"


def _traffic(found: Prediction, config: ExperimentConfig) -> str:
    """Return the collectives of the fastest layout, the largest first."""
    pairs = sorted(found.collectives, key=lambda p: -p[0].num_bytes * p[0].count)
    rows = [
        (
            f"{c.kind} over {c.axis}",
            c.what,
            str(c.count),
            si(c.num_bytes, "B"),
            f"{seconds * 1e3:.1f} ms",
            "beside" if c.hidden else "waits",
        )
        for c, seconds in pairs
    ]
    if not rows:
        return "nothing moves between devices"
    header = ("fastest layout moves", "what", "times", "each", "in all", "arithmetic")
    return format_table(header, rows)

"""What `uoe bench` does: runs benchmarks, prints a table, writes JSON and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from uoe_jax.bench.attention import bench_attention
from uoe_jax.bench.gemm_command import GemmRequest, run_gemm
from uoe_jax.bench.plot import plot_sweep
from uoe_jax.bench.record import made_with, write_record
from uoe_jax.bench.request import BenchRequest
from uoe_jax.bench.sizes import SIZES, Sizes
from uoe_jax.bench.timing import Row
from uoe_jax.bench.train import bench_train
from uoe_jax.bench.tune import tune
from uoe_jax.bench.union import bench_sweep, bench_union
from uoe_jax.errors import ConfigError
from uoe_jax.fields import check_ranges
from uoe_jax.files import check_picture
from uoe_jax.report.table import format_table

BENCHMARKS: dict[str, Callable[[Sizes, int], Iterator[Row]]] = {
    "attention": bench_attention,
    "union": bench_union,
    "sweep": bench_sweep,
    "train": bench_train,
}


def run_bench(request: BenchRequest, say: Callable[[str], None] = print) -> list[Row]:
    """Return the measured rows, printed as they come and as a table at the end.

    Raises:
      ConfigError: no such benchmark or size, rounds < 1, a plot without its sweep.
    """
    for name in request.names:
        if name not in (*BENCHMARKS, "gemm"):
            raise ConfigError(
                f"no benchmark {name!r}; choose from {', '.join(BENCHMARKS)}, gemm"
            )
    check_ranges(request, "--")
    check_picture(request.plot, "--plot")
    if "gemm" in request.names:
        _run_gemm(request, say)
        return []
    if request.plot and "sweep" not in request.names:
        raise ConfigError("--plot draws the sweep; name it: uoe bench sweep --plot ...")
    size = request.size or ("small" if jax.default_backend() == "cpu" else "full")
    if size not in SIZES:
        raise ConfigError(f"--size is {size!r}; choose from {', '.join(SIZES)}")
    device = jax.devices()[0].device_kind
    say(f"{device}, jax {jax.__version__}, {size} sizes, medians of {request.rounds}")
    if request.tune:
        say(f"tiles and backends measured: {tune(SIZES[size], request.rounds, say)}")
    rows = []
    for name in request.names:
        for row in BENCHMARKS[name](SIZES[size], request.rounds):
            rows.append(row)
            say(describe(row))
            if request.out:
                write(request.out, request, rows, device, size)
    say("")
    say(table(rows))
    if request.plot:
        plot_sweep([row for row in rows if row.op == "sweep"], request.plot)
    return rows


def _run_gemm(request: BenchRequest, say: Callable[[str], None]) -> None:
    if request.names != ("gemm",):
        others = ", ".join(name for name in request.names if name != "gemm")
        raise ConfigError(f"gemm is timed by itself; run {others} on its own")
    for name, given in (("--tune", request.tune), ("--size", request.size)):
        if given:
            raise ConfigError(f"{name} isn't for gemm; it takes --products and --seed")
    run_gemm(
        GemmRequest(
            products=request.products,
            seed=request.seed,
            out=request.out,
            plot=request.plot,
        ),
        say,
    )


def describe(row: Row) -> str:
    """Return one row as a line."""
    head = f"{row.op}: {row.case}: {row.name}, {row.what}"
    if row.milliseconds is None:
        return f"{head}: {row.note}"
    rate = f", {row.tflops:.1f} TFLOP/s" if row.tflops else ""
    return f"{head}: {row.milliseconds:.3f} ms{rate}"


def table(rows: list[Row]) -> str:
    """Return all rows that were measured as one aligned table."""
    header = ("operation", "case", "name", "pass", "ms", "TFLOP/s", "temp GB")
    number = lambda value, digits: "-" if value is None else f"{value:.{digits}f}"
    return format_table(
        header,
        [
            (
                row.op,
                row.case,
                row.name,
                row.what,
                number(row.milliseconds, 3),
                number(row.tflops, 1),
                number(row.gigabytes, 2),
            )
            for row in rows
            if row.milliseconds is not None
        ],
    )


def write(
    path: Path, request: BenchRequest, rows: list[Row], device: str, size: str
) -> None:
    """Write the rows measured so far as JSON."""
    record: dict[str, Any] = {
        "command": " ".join(["uoe bench", *request.names, "--size", size]),
        **made_with(device),
        "rounds": request.rounds,
        "rows": [row.as_dict() for row in rows],
    }
    write_record(path, record)

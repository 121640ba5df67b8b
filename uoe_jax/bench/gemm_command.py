"""`uoe bench gemm`: sweep this device's products, fit, say what unseen shapes cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uoe_jax.bench.gemm import Sweep, Timing, about
from uoe_jax.bench.gemm_cases import Case, all_cases
from uoe_jax.errors import ConfigError, extra_packages
from uoe_jax.files import check_target, format_json, write_atomically, write_picture
from uoe_jax.hardware import gemm, gemm_fit
from uoe_jax.hardware.devices import DEVICES, Device, find_device
from uoe_jax.hardware.product import roofline
from uoe_jax.ops import nvidia
from uoe_jax.report.style import LIGHT, MARKERS, styled
from uoe_jax.report.table import format_table

with extra_packages():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

CHUNK = 24  # cases compiled at a time


@dataclass(frozen=True, kw_only=True)
class GemmRequest:
    """How many random products beside the presets' own, and what to write."""

    products: int = 300
    seed: int = 0
    out: Path | None = None
    plot: Path | None = None


def run_gemm(
    request: GemmRequest,
    say: Callable[[str], None] = print,
    cases: Sequence[Case] | None = None,
    device: Device | None = None,
) -> gemm.GemmModel:
    """Return the model fitted to a sweep of this device; keep it for later commands.

    `cases` are drawn by the request if not given, `device` is the one here.

    Raises:
      ConfigError: no products asked for, or a device without a data sheet.
      DataError: too few shapes to fit.
    """
    if request.products < 1:
        raise ConfigError(f"--products is {request.products}; it must be at least 1")
    kind = jax.devices()[0].device_kind
    device = device or find_device(kind)
    if device is None:
        known = ", ".join(known.name for known in DEVICES)
        raise ConfigError(
            f"{kind!r} has no data sheet here, and a product's time is learned beside "
            f"its rates; known: {known}"
        )
    check_target(request.out, "--out")
    if cases is None:
        cases = all_cases(request.products, request.seed)
    if fault := _kernels_fault():
        say(f"without our grouped kernels: {fault}")
        cases = [case for case in cases if case.op in ("dot", "ragged_dot")]
    say(f"{kind}: timing {len(cases)} products, {CHUNK} compiled at a time ...")
    found = about() | {"command": _command(request)}
    rows: list[dict[str, Any]] = []
    for timing in Sweep().run(cases, CHUNK):
        rows.append(timing.as_dict())
        say(describe(timing))
        if request.out is not None:
            write_rows(request.out, found, rows)
    timed = gemm_fit.timed_rows(rows)
    say(f"{len(timed)} of {len(rows)} timings were steady; fitting ...")
    model, held_out = gemm_fit.fit(timed, device, found["units"], found)
    say(report(held_out))
    path = gemm.own_path(device.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    gemm.save(model, path)
    say(f"model: {path}; uoe plan and uoe cost take it from there")
    if not any(item.watts for item in timed):
        say("power: no meter was read")
    if request.plot is not None:
        plot(held_out, device, request.plot)
    return model


def _kernels_fault() -> str | None:
    try:
        nvidia.require(jax.numpy.bfloat16)
    except NotImplementedError as error:
        return str(error)
    return None


def _command(request: GemmRequest) -> str:
    return f"uoe bench gemm --products {request.products} --seed {request.seed}"


def describe(timing: Timing) -> str:
    """Return a timing as a line."""
    case = timing.case
    head = f"{case.op} {case.m} x {case.n} x {case.k}"
    if case.groups > 1:
        head += f", {case.groups} groups"
    head += f", {case.layout} {case.dtype}"
    if timing.tile is not None:
        head += f", tile {'x'.join(str(side) for side in timing.tile[:3])}"
    if timing.seconds is None:
        return f"{head}: {timing.note}"
    rate = 2.0 * case.m * case.n * case.k / timing.seconds / 1e12
    note = f" ({timing.note})" if timing.note else ""
    return f"{head}: {timing.seconds * 1e6:.1f} us, {rate:.1f} TFLOP/s{note}"


def write_rows(path: Path, found: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write a sweep as JSON, a row a line."""
    lines = ",\n".join(format_json(row) for row in rows)
    text = f'{{"about": {format_json(found)},\n"rows": [\n{lines}\n]}}\n'
    write_atomically(path, text.encode())


def report(held_out: gemm_fit.HeldOut) -> str:
    """Return the errors on unseen shapes and the cost of predicted tiles as tables."""
    rows = [
        (name, str(found["timings"]), f"{found['median']:.1%}", f"{found['mean']:.1%}")
        for name, found in gemm_fit.summary(held_out).items()
    ]
    header = ("unseen shapes", "timings", "median error", "mean")
    parts = [format_table(header, rows)]
    if regrets := held_out.regrets():
        lines = []
        for name, key in (("predicted fastest", "picked"), ("of the tables", "table")):
            slower = [found[key] for found in regrets]
            lines.append(
                (
                    name,
                    f"{statistics.fmean(slower):.1%}",
                    f"{statistics.median(slower):.1%}",
                    f"{max(slower):.1%}",
                )
            )
        header = (f"tile, {len(regrets)} calls", "slower by, mean", "median", "worst")
        parts.append(format_table(header, lines))
    return "\n\n".join(parts)


def plot(held_out: gemm_fit.HeldOut, device: Device, path: Path) -> None:
    """Write a PNG of predicted against measured seconds of shapes not seen."""
    with styled(LIGHT):
        figure = Figure(figsize=(9.0, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        times, rates = figure.subplots(1, 2)
        kernels = dict.fromkeys(item.product.kernel for item in held_out.timed)
        for index, kernel in enumerate(kernels):
            where = [
                i for i, t in enumerate(held_out.timed) if t.product.kernel == kernel
            ]
            seconds = np.asarray([held_out.timed[i].seconds for i in where])
            guess = held_out.predicted[where]
            roof = np.asarray(
                [roofline(held_out.timed[i].product, device) for i in where]
            )
            style = {"color": LIGHT.colors[index % len(LIGHT.colors)], "markersize": 3}
            style |= {"marker": MARKERS[index % len(MARKERS)], "linestyle": "none"}
            times.loglog(seconds * 1e6, guess * 1e6, label=kernel, alpha=0.6, **style)
            rates.plot(roof / seconds, roof / guess, alpha=0.6, **style)
        ends = times.get_xlim()
        times.plot(ends, ends, color=LIGHT.ink, linewidth=0.8)
        times.set_xlabel("measured, microseconds")
        times.set_ylabel("predicted without the shape")
        times.legend(fontsize=8)
        rates.plot([0, 1], [0, 1], color=LIGHT.ink, linewidth=0.8)
        rates.set_xlabel("measured share of the roofline")
        rates.set_ylabel("predicted share")
        figure.suptitle(f"matrix products on {device.name}")
        write_picture(path, figure)

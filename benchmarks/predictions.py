"""How well the cost model predicts measured steps and layouts.

    python benchmarks/predictions.py steps benchmarks/results/train_steps_h100.json \
      --out benchmarks/results/step_predictions_h100.json \
      --plot docs/images/step_predictions.png
    python benchmarks/predictions.py layouts benchmarks/results/layouts_h200x2.json \
      --steps benchmarks/results/train_steps_h200.json \
      --out benchmarks/results/layout_predictions_h200x2.json

Reads files of `bench_train.py` and `bench_layouts.py`; needs no accelerator. Steps are
predicted from others: each run from all the others; half of every model's shapes from
the other half, in every way; one size (`small`, `1b`) from the other; each run from the
others of its size, and of its kind (dense, union). Layouts are predicted three ways:
from shares of the peak, from a model of products without any timed step, and from that
model calibrated on one card's steps. Errors are predicted over measured time, less 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_train import configure
from matplotlib.figure import Figure

from uoe_jax.bench.record import arguments, command_line, read_record, write_record
from uoe_jax.config import LayoutConfig
from uoe_jax.files import write_atomically
from uoe_jax.hardware import fit, gemm
from uoe_jax.hardware.devices import Device, Topology
from uoe_jax.hardware.roofline import LEARNED, UNCALIBRATED, predict
from uoe_jax.report.style import LIGHT, MARKERS, Theme, render
from uoe_jax.report.table import format_table

Steps = Sequence[fit.Measurement]
WAYS = ("shares", "products", "fitted")


def model_of(item: fit.Measurement) -> str:
    """Return the preset that was timed."""
    return item.config.name


def size_of(item: fit.Measurement) -> str:
    """Return a preset's size: `small` for `small` and `small-union`."""
    return model_of(item).partition("-")[0]


def split(
    device: Device, steps: Steps, known: Callable[[int], bool]
) -> dict[str, float]:
    """Return the errors of the steps that aren't known, predicted from those that are.

    `known` is asked about the place of a step in `steps`.
    """
    places = range(len(steps))
    calibration = fit.fit(device, [steps[i] for i in places if known(i)], "split")
    others = [steps[i] for i in places if not known(i)]
    return fit.check(device, calibration, others).errors


def halves(device: Device, steps: Steps) -> list[dict[str, Any]]:
    """Return a record for each way to know half of every model's shapes.

    Shapes are numbered in the order in which a model's were timed.
    """
    seen: dict[str, int] = {}
    numbers = []
    for item in steps:
        numbers.append(seen.get(model_of(item), 0))
        seen[model_of(item)] = numbers[-1] + 1
    count = max(seen.values())
    records = []
    for chosen in itertools.combinations(range(count), count // 2):
        errors = split(device, steps, lambda i, chosen=chosen: numbers[i] in chosen)
        name = "shapes " + " and ".join(str(number + 1) for number in chosen)
        records.append(summary(name, errors))
    return records


def sizes(device: Device, steps: Steps) -> list[dict[str, Any]]:
    """Return a record for each size that the others are predicted from."""
    records = []
    for size in dict.fromkeys(map(size_of, steps)):
        errors = split(device, steps, lambda i, size=size: size_of(steps[i]) == size)
        if errors:
            records.append(summary(f"{size} only", errors))
    return records


def alone(device: Device, steps: Steps) -> list[dict[str, Any]]:
    """Return a record of leaving one out within each size, and within each kind."""
    groups: dict[str, list[fit.Measurement]] = {}
    for item in steps:
        size, _, kind = model_of(item).partition("-")
        groups.setdefault(size, []).append(item)
        groups.setdefault(kind or "dense", []).append(item)
    return [
        summary(f"the others of {name}", fit.leave_one_out(device, group).errors)
        for name, group in groups.items()
        if len(group) > 1
    ]


def summary(known: str, errors: dict[str, float]) -> dict[str, Any]:
    """Return what a split was calibrated on, its median and largest error, and all."""
    found = fit.Errors(errors=errors)
    rounded = {name: round(error, 6) for name, error in errors.items()}
    about = {"calibrated_on": known, "steps": len(errors)}
    median, worst = round(found.median, 6), round(found.worst, 6)
    return {**about, "median": median, "worst": worst, "errors": rounded}


def row(item: fit.Measurement, error: float) -> dict[str, Any]:
    """Return a step's milliseconds, measured and predicted, and the error."""
    measured = item.seconds * 1e3
    return {
        "run": item.name,
        "preset": model_of(item),
        "shape": f"{item.config.data.batch_size} x {item.config.seq_len}",
        "measured_milliseconds": round(measured, 2),
        "predicted_milliseconds": round(measured * (1 + error), 2),
        "error": round(error, 6),
    }


def draw(record: dict[str, Any], theme: Theme) -> Figure:
    """Draw predicted against measured time, and the error of each step."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    rows = record["rows"]
    presets = dict.fromkeys(row["preset"] for row in rows)
    ends = [0.8 * min(row["measured_milliseconds"] for row in rows)]
    ends.append(1.25 * max(row["measured_milliseconds"] for row in rows))
    left.plot(ends, ends, color=theme.ink, lw=1)
    band = [[share * end for end in ends] for share in (0.85, 1.15)]
    left.fill_between(ends, *band, color=theme.faint, alpha=0.5, label="within 15%")
    place, labels = 0, []
    looks = zip(presets, MARKERS, theme.colors, strict=False)
    for preset, mark, color in looks:
        mine = [row for row in rows if row["preset"] == preset]
        times = [[row[f"{what}_milliseconds"] for row in mine] for what in
                 ("measured", "predicted")]  # fmt: skip
        left.plot(*times, mark, color=color, ms=7, alpha=0.8, label=preset)
        bars = range(place, place + len(mine))
        errors = [100 * row["error"] for row in mine]
        right.barh(bars, errors, color=color, alpha=0.8)
        labels += [f"{preset} {row['shape']}" for row in mine]
        place += len(mine)
    left.set(xscale="log", yscale="log", xlim=ends, ylim=ends,
             xlabel="measured, ms", ylabel="predicted from the other runs, ms",
             title=f"A training step on one {record['device']}")  # fmt: skip
    ticks = [t for t in (20, 50, 100, 200, 500, 1000) if ends[0] < t < ends[1]]
    for axis in (left.xaxis, left.yaxis):
        axis.set_ticks(ticks, labels=[str(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
    left.legend(fontsize=8)
    right.axvspan(-15, 15, color=theme.faint, alpha=0.5, zorder=0)
    right.axvline(0, color=theme.ink, lw=1)
    right.set_yticks(range(place), labels=labels, fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="error, %", title="Predicted less measured; grey: within 15%")
    return figure


def describe(record: dict[str, Any]) -> str:
    """Return the predictions and the splits as tables."""
    rows = [
        (
            *(row["preset"], row["shape"], f"{row['measured_milliseconds']:.1f}"),
            *(f"{row['predicted_milliseconds']:.1f}", f"{row['error']:+.1%}"),
        )
        for row in record["rows"]
    ]
    parts = (record["leave_one_out"],), record["halves"], record["sizes"]
    splits = [
        (
            *(part["calibrated_on"], str(part["steps"])),
            *(f"{part['median']:.1%}", f"{part['worst']:.1%}"),
        )
        for part in itertools.chain(*parts, record["alone"])
    ]
    header = ("preset", "batch x length", "measured ms", "predicted ms", "error")
    columns = ("calibrated on", "steps predicted", "median error", "at most")
    return f"{format_table(header, rows)}\n\n{format_table(columns, splits)}"


def predict_steps(args: argparse.Namespace) -> None:
    """Predict each timed step from others."""
    device, steps = fit.read_measurements(args.file)
    left_out = fit.leave_one_out(device, steps).errors
    content = read_record(args.file)
    record = {
        "command": command_line(),
        "steps_commit": content.get("commit", "unknown"),
        "device": content["device"],
        "rows": [row(item, left_out[item.name]) for item in steps],
        "leave_one_out": summary("all the others", left_out),
        "halves": halves(device, steps),
        "sizes": sizes(device, steps),
        "alone": alone(device, steps),
    }
    print(describe(record))
    write_record(args.out, record)
    if args.plot:
        picture = render(lambda theme: draw(record, theme), (LIGHT,), dpi=130)
        write_atomically(args.plot, picture["light"])


def predict_layouts(args: argparse.Namespace) -> None:
    """Predict each timed layout in three ways."""
    device, steps = fit.read_measurements(args.steps)
    model = gemm.shipped(device.name)
    calibrated = fit.fit(device, steps, args.steps.name, model)
    rows: list[dict[str, Any]] = []
    for timed in read_record(args.file)["results"]:
        if timed["run"].startswith("tiny"):  # for its losses, not for its time
            continue
        layout = LayoutConfig(**timed["choices"])
        config = dataclasses.replace(configure(timed["run"]), layout=layout)
        shape = (math.prod(timed["mesh"].values()),)
        topology = Topology(name="here", device=device, shape=shape)
        rows.append({key: timed[key] for key in ("run", "layout", "milliseconds")})
        for way, factors in zip(WAYS, (UNCALIBRATED, LEARNED, calibrated), strict=True):
            found = predict(config, timed["mesh"], topology, factors, model)
            rows[-1][way] = found.step_seconds * 1e3
    error = lambda row, way: row[way] / row["milliseconds"] - 1
    cells = [
        (
            *(row["run"], row["layout"], f"{row['milliseconds']:.1f}"),
            *(f"{row[way]:.0f} ({error(row, way):+.0%})" for way in WAYS),
        )
        for row in rows
    ]
    print(format_table(("run", "layout", "measured ms", *WAYS), cells))
    found = {}
    for way in WAYS:
        apart = [abs(error(row, way)) for row in rows]
        found[way] = {"median": statistics.median(apart), "worst": max(apart)}
        print(f"{way}: {found[way]['median']:.1%}, at most {found[way]['worst']:.1%}")
    record = {"command": command_line(), "errors": found, "results": rows}
    write_record(args.out, record)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("what", choices=("steps", "layouts"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG of the steps")
    parser.add_argument("--steps", type=Path, help="one card's, for the layouts")
    args = parser.parse_args()
    if args.what == "layouts" and args.steps is None:
        parser.error("layouts want the steps of one card: --steps FILE")
    (predict_steps if args.what == "steps" else predict_layouts)(args)


if __name__ == "__main__":
    main()

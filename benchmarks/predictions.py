"""How well the cost model predicts measured steps and layouts.

    python benchmarks/predictions.py steps benchmarks/results/train_steps_h100.json \
      --out benchmarks/results/step_predictions_h100.json \
      --plot docs/images/step_predictions.png
    python benchmarks/predictions.py layouts benchmarks/results/layouts_h200x2.json \
      --steps benchmarks/results/train_steps_h200.json \
      --out benchmarks/results/layout_predictions_h200x2.json \
      --plot docs/images/layouts_h200x2.png

Reads files of `bench_train.py` and `bench_layouts.py`; needs no accelerator. Steps are
predicted from others: each run from all the others; half of every model's shapes from
the other half, in every way; one size (`small`, `1b`) from the other; each run from the
others of its size, and of its kind (dense, union). Layouts are predicted four ways:
from shares of the peak, from a model of products without any timed step, from that
model calibrated on one card's steps, and each from all other steps and layouts, with
what they say of the links. Errors are predicted over measured time, less 1.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from uoe_jax.bench.record import arguments, command_line, read_record, write_record
from uoe_jax.files import write_atomically
from uoe_jax.hardware import fit, gemm
from uoe_jax.hardware.devices import Device
from uoe_jax.hardware.roofline import LEARNED, UNCALIBRATED
from uoe_jax.report.style import LIGHT, MARKERS, Theme, render
from uoe_jax.report.table import format_table

Steps = Sequence[fit.Measurement]
WAYS = ("shares", "products", "fitted", "links")


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
    """Predict each timed layout in four ways."""
    device, steps = fit.read_measurements(args.steps)
    _, timed = fit.read_measurements(args.file)
    model = gemm.shipped(device.name)
    found = {"shares": fit.check(device, UNCALIBRATED, timed)}
    found["products"] = fit.check(device, LEARNED, timed, model)
    calibrated = fit.fit(device, steps, args.steps.name, model)
    found["fitted"] = fit.check(device, calibrated, timed, model)
    found["links"] = fit.leave_one_out(device, [*steps, *timed], model)
    rows: list[dict[str, Any]] = []
    wanted = (row for row in read_record(args.file)["results"] if "milliseconds" in row)
    for item, row in zip(timed, wanted, strict=True):
        rows.append({key: row[key] for key in ("run", "layout", "milliseconds")})
        for way in WAYS:
            rows[-1][way] = row["milliseconds"] * (1 + found[way].errors[item.name])
    error = lambda row, way: row[way] / row["milliseconds"] - 1
    cells = [
        (
            *(row["run"], row["layout"], f"{row['milliseconds']:.1f}"),
            *(f"{row[way]:.0f} ({error(row, way):+.0%})" for way in WAYS),
        )
        for row in rows
    ]
    print(format_table(("run", "layout", "measured ms", *WAYS), cells))
    errors = {}
    for way in WAYS:
        apart = [abs(error(row, way)) for row in rows]
        errors[way] = {"median": statistics.median(apart), "worst": max(apart)}
        print(f"{way}: {errors[way]['median']:.1%}, at most {errors[way]['worst']:.1%}")
    both = fit.fit(device, [*steps, *timed], "links", model)
    print(f"links take {both.links:.2f} times what the data sheet says")
    record = {"command": command_line(), "errors": errors, "links": both.links}
    write_record(args.out, {**record, "results": rows})
    if args.plot:
        picture = render(lambda theme: draw_layouts(rows, theme), (LIGHT,), dpi=130)
        write_atomically(args.plot, picture["light"])


def draw_layouts(rows: list[dict[str, Any]], theme: Theme) -> Figure:
    """Draw the time of each layout, and what was predicted before and after a fit."""
    runs = dict.fromkeys(row["run"] for row in rows)
    groups = {run: [row for row in rows if row["run"] == run] for run in runs}
    counts = [len(group) for group in groups.values()]
    figure = Figure(figsize=(6.6, 0.34 * sum(counts) + 2.2), layout="constrained")
    panels = figure.subplots(len(groups), 1, height_ratios=counts, squeeze=False)
    for (run, group), axes in zip(groups.items(), panels[:, 0], strict=True):
        group = sorted(group, key=lambda row: row["milliseconds"])
        places = range(len(group))
        colors = [
            theme.colors[6] if row["layout"] == "one device" else theme.colors[0]
            for row in group
        ]
        times = [row["milliseconds"] for row in group]
        axes.barh(places, times, color=colors, alpha=0.55, height=0.62)
        for way, mark, color in (("products", "o", 1), ("links", "D", 3)):
            label = {"products": "predicted, nothing timed",
                     "links": "predicted from all other steps"}[way]  # fmt: skip
            axes.plot(
                [row[way] for row in group], places, mark, ms=7, ls="none",
                color=theme.colors[color], mec=theme.paper, mew=0.8, label=label,
            )  # fmt: skip
        one = [row["milliseconds"] for row in group if row["layout"] == "one device"]
        if one:
            axes.axvline(one[0] / 2, color=theme.ink, lw=1, ls="--")
        axes.set_yticks(places, labels=[row["layout"] for row in group])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        preset, _, batch = run.partition(":")
        axes.set(xlim=(0, None), title=f"{preset}, {batch} x 8192 tokens")
    panels[-1, 0].set_xlabel("ms a step; dashed: half of one card's")
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2, fontsize=10)
    return figure


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("what", choices=("steps", "layouts"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG of the steps, or layouts")
    parser.add_argument("--steps", type=Path, help="one card's, for the layouts")
    args = parser.parse_args()
    if args.what == "layouts" and args.steps is None:
        parser.error("layouts want the steps of one card: --steps FILE")
    (predict_steps if args.what == "steps" else predict_layouts)(args)


if __name__ == "__main__":
    main()

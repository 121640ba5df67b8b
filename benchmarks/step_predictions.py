"""How well the cost model predicts measured steps that it wasn't calibrated on.

    python benchmarks/step_predictions.py benchmarks/results/train_steps_h100.json \
      --out benchmarks/results/step_predictions_h100.json \
      --plot docs/images/step_predictions.png

Reads a file of `benchmarks/bench_train.py`; needs no accelerator. Splits: each run from
all the others; half of every model's shapes from the other half, in every way; one
size (`small`, `1b`) from the other; each run from the others of its size, and of its
kind (dense, union). Errors are predicted over measured time, less 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from uoe_jax.files import format_json
from uoe_jax.hardware import fit
from uoe_jax.hardware.devices import Device
from uoe_jax.report.table import format_table

Steps = Sequence[fit.Measurement]


def model_of(item: fit.Measurement) -> str:
    """Return the preset that was timed."""
    return item.config.name


def size_of(item: fit.Measurement) -> str:
    """Return a preset's size: `small` for `small` and `small-union`."""
    return model_of(item).partition("-")[0]


def shape_of(item: fit.Measurement) -> str:
    """Return the batch size and the sequence length of a step."""
    return f"{item.config.data.batch_size} x {item.config.seq_len}"


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


def predictions(steps: Steps, errors: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row for each step: milliseconds measured and predicted, the error."""
    return [
        {
            "run": item.name,
            "preset": model_of(item),
            "shape": shape_of(item),
            "measured_milliseconds": round(item.seconds * 1e3, 2),
            "predicted_milliseconds": round(
                item.seconds * 1e3 * (1 + errors[item.name]), 2
            ),
            "error": round(errors[item.name], 6),
        }
        for item in steps
    ]


def plot(record: dict[str, Any], path: Path) -> None:
    """Write a PNG: predicted against measured time, and the error of each step."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    rows = record["rows"]
    presets = dict.fromkeys(row["preset"] for row in rows)
    ends = [0.8 * min(row["measured_milliseconds"] for row in rows)]
    ends.append(1.25 * max(row["measured_milliseconds"] for row in rows))
    left.plot(ends, ends, color="0.5", lw=1)
    band = [[share * end for end in ends] for share in (0.85, 1.15)]
    left.fill_between(ends, *band, color="0.9", label="within 15%")
    place, labels = 0, []
    for number, (preset, mark) in enumerate(zip(presets, "osD^v<>Phx*X", strict=False)):
        mine = [row for row in rows if row["preset"] == preset]
        times = [[row[f"{what}_milliseconds"] for row in mine] for what in
                 ("measured", "predicted")]  # fmt: skip
        left.plot(*times, mark, color=f"C{number}", ms=7, alpha=0.8, label=preset)
        bars = range(place, place + len(mine))
        errors = [100 * row["error"] for row in mine]
        right.barh(bars, errors, color=f"C{number}", alpha=0.8)
        labels += [f"{preset} {row['shape']}" for row in mine]
        place += len(mine)
    left.set(xscale="log", yscale="log", xlim=ends, ylim=ends,
             xlabel="measured, ms", ylabel="predicted from the other runs, ms",
             title=f"A training step on one {record['device']}")  # fmt: skip
    ticks = [t for t in (20, 50, 100, 200, 500, 1000) if ends[0] < t < ends[1]]
    for axis in (left.xaxis, left.yaxis):
        axis.set_ticks(ticks, labels=[str(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
    left.legend(frameon=False, fontsize=8)
    right.axvspan(-15, 15, color="0.9", zorder=0)
    right.axvline(0, color="0.5", lw=1)
    right.set_yticks(range(place), labels=labels, fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="error, %", title="Predicted less measured; grey: within 15%")
    figure.savefig(path, dpi=130)


def describe(record: dict[str, Any]) -> str:
    """Return the predictions and the splits as tables."""
    rows = [
        (
            row["preset"],
            row["shape"],
            f"{row['measured_milliseconds']:.1f}",
            f"{row['predicted_milliseconds']:.1f}",
            f"{row['error']:+.1%}",
        )
        for row in record["rows"]
    ]
    splits = [
        (part["calibrated_on"], str(part["steps"]), f"{part['median']:.1%}",
         f"{part['worst']:.1%}")
        for part in itertools.chain(
            [record["leave_one_out"]], record["halves"], record["sizes"],
            record["alone"],
        )
    ]  # fmt: skip
    header = ("preset", "batch x length", "measured ms", "predicted ms", "error")
    tables = (
        format_table(header, rows),
        format_table(
            ("calibrated on", "steps predicted", "median error", "at most"), splits
        ),
    )
    return "\n\n".join(tables)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", type=Path, help="a file of bench_train.py")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    device, steps = fit.read_measurements(args.steps)
    left_out = fit.leave_one_out(device, steps).errors
    content = json.loads(args.steps.read_text())
    record = {
        "command": "python benchmarks/step_predictions.py " + " ".join(argv),
        "steps_commit": content.get("commit", "unknown"),
        "device": content["device"],
        "rows": predictions(steps, left_out),
        "leave_one_out": summary("all the others", left_out),
        "halves": halves(device, steps),
        "sizes": sizes(device, steps),
        "alone": alone(device, steps),
    }
    print(describe(record))
    if args.out:
        args.out.write_text(format_json(record, indent=1) + "\n")
    if args.plot:
        plot(record, args.plot)


if __name__ == "__main__":
    main(sys.argv[1:])

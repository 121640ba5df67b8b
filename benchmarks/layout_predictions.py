"""Layouts that were timed beside what the cost model says of them.

    python benchmarks/layout_predictions.py benchmarks/results/layouts_h200x2.json \
      --steps benchmarks/results/train_steps_h200.json \
      --out benchmarks/results/layout_predictions_h200x2.json

Reads a file of `benchmarks/bench_layouts.py`; needs no accelerator. Predicted three
ways: from shares of the peak, from a model of products without any timed step, and from
that model calibrated on one card's steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from bench_train import configure

from uoe_jax.config import LayoutConfig
from uoe_jax.files import format_json
from uoe_jax.hardware import fit, gemm
from uoe_jax.hardware.devices import Topology
from uoe_jax.hardware.roofline import LEARNED, UNCALIBRATED, predict
from uoe_jax.report.table import format_table

WAYS = ("shares", "products", "fitted")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layouts", type=Path)
    parser.add_argument("--steps", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    device, steps = fit.read_measurements(args.steps)
    model = gemm.shipped(device.name)
    calibrated = fit.fit(device, steps, args.steps.name, model)
    rows: list[dict[str, Any]] = []
    for timed in json.loads(args.layouts.read_text())["results"]:
        if timed["run"].startswith("tiny"):  # for its losses, not for its time
            continue
        config = configure(timed["run"])
        layout = LayoutConfig(**timed["choices"])
        config = dataclasses.replace(config, layout=layout)
        count = math.prod(timed["mesh"].values())
        topology = Topology(name="here", device=device, shape=(count,))
        row = {key: timed[key] for key in ("run", "layout", "milliseconds")}
        for way, factors in zip(WAYS, (UNCALIBRATED, LEARNED, calibrated), strict=True):
            found = predict(config, timed["mesh"], topology, factors, model)
            row[way] = found.step_seconds * 1e3
        rows.append(row)
    cells = [
        (
            row["run"],
            row["layout"],
            f"{row['milliseconds']:.1f}",
            *(f"{row[w]:.0f} ({row[w] / row['milliseconds'] - 1:+.0%})" for w in WAYS),
        )
        for row in rows
    ]
    print(format_table(("run", "layout", "measured ms", *WAYS), cells))
    errors = {
        way: [abs(row[way] / row["milliseconds"] - 1) for row in rows] for way in WAYS
    }
    found = {
        way: {"median": statistics.median(e), "worst": max(e)}
        for way, e in errors.items()
    }
    print(format_json(found))
    if args.out:
        record = {
            "command": "python benchmarks/layout_predictions.py " + " ".join(argv),
            "errors": found,
            "results": rows,
        }
        args.out.write_text(format_json(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

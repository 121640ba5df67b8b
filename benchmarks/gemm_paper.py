"""Re-run a published study of matrix products on its own timings, and honestly.

    python benchmarks/gemm_paper.py FILE --out benchmarks/results/gemm_paper.json

FILE holds the timings of "GEMM on Ada" (arXiv 2411.16954) as CSV(.xz), columns m, n,
k, kernel_layout, layout_flag, block_m, block_n, block_k, alpha, beta, runtime_ms and
power_w. The paper splits its rows at random; but most settings it varies did nothing,
so nearly every row left out has a twin in training. Here each recipe is judged on that
split and on shapes that training has not seen.
"""

from __future__ import annotations

import argparse
import csv
import lzma
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestRegressor
from sklearn.metrics import r2_score

from uoe_jax.files import format_json
from uoe_jax.report.table import format_table

# GeForce RTX 4070, data sheet: float32 without tensor cores, memory, multiprocessors.
PEAK, BANDWIDTH, UNITS = 29.15e12, 504e9, 46
TILE = (128, 128, 8)  # of the one kernel that was run
FOLDS = 9
IDLE_WATTS = 40.0  # rows below were sampled after the kernel had ended
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Return the timings; numbers as floats, power None where it wasn't read."""
    opener = lzma.open if path.suffix == ".xz" else open
    rows = []
    with opener(path, "rt") as file:
        for line in csv.DictReader(file):
            row: Row = {
                key: float(line[key])
                for key in ("m", "n", "k", "alpha", "beta", "runtime_ms")
            }
            row |= {key: line[key] for key in ("kernel_layout", "layout_flag")}
            row["block"] = tuple(line[f"block_{side}"] for side in "mnk")
            try:
                row["watts"] = float(line["power_w"])
            except ValueError:
                row["watts"] = None
            rows.append(row)
    return rows


def shape_of(row: Row) -> tuple[float, float, float]:
    return row["m"], row["n"], row["k"]


def paper_features(rows: Sequence[Row]) -> np.ndarray:
    """Return what the paper's forest is given: sizes, settings, FLOPs and bytes."""
    layouts = sorted({row["kernel_layout"] for row in rows})
    flags = sorted({row["layout_flag"] for row in rows})
    blocks = sorted({row["block"] for row in rows})
    table = []
    for row in rows:
        m, n, k = shape_of(row)
        flops, size = 2 * m * n * k, 4 * (m * k + k * n + m * n)
        table.append(
            [
                m, n, k, row["alpha"], row["beta"], flops, size, flops / size,
                layouts.index(row["kernel_layout"]), flags.index(row["layout_flag"]),
                blocks.index(row["block"]),
            ]
        )  # fmt: skip
    return np.asarray(table, float)


def roofline(row: Row) -> float:
    """Return the milliseconds that a product can't beat."""
    m, n, k = shape_of(row)
    moved = 4 * (m * k + k * n + m * n * (2 if row["beta"] else 1))
    return 1e3 * max(2 * m * n * k / PEAK, moved / BANDWIDTH)


def wave_features(rows: Sequence[Row]) -> np.ndarray:
    """Return sizes and how the kernel's tiles fill the card."""
    layouts = sorted({row["kernel_layout"] for row in rows})
    table = []
    for row in rows:
        m, n, k = shape_of(row)
        tiles = math.ceil(m / TILE[0]) * math.ceil(n / TILE[1])
        waves = math.ceil(tiles / UNITS)
        flops, size = 2 * m * n * k, 4 * (m * k + k * n + m * n)
        table.append(
            [
                math.log2(m), math.log2(n), math.log2(k), math.log2(tiles), waves,
                tiles / (waves * UNITS), tiles / UNITS % 1, math.log2(roofline(row)),
                math.log2(flops / size), k / TILE[2], row["beta"] != 0,
                layouts.index(row["kernel_layout"]),
            ]
        )  # fmt: skip
    return np.asarray(table, float)


class Paper:
    """Random forest of depth 6 on the plain time, as published."""

    def __init__(self, target: str):
        self.target = target

    def fit(self, rows: Sequence[Row]) -> None:
        self.forest = RandomForestRegressor(100, max_depth=6, random_state=0, n_jobs=1)
        self.forest.fit(paper_features(rows), [row[self.target] for row in rows])

    def predict(self, rows: Sequence[Row]) -> np.ndarray:
        return self.forest.predict(paper_features(rows))


class Lookup:
    """The median time of a shape: no model at all; the overall median elsewhere."""

    def __init__(self, target: str):
        self.target = target

    def fit(self, rows: Sequence[Row]) -> None:
        known = defaultdict(list)
        for row in rows:
            known[shape_of(row)].append(row[self.target])
        self.known = {shape: float(np.median(times)) for shape, times in known.items()}
        self.other = float(np.median([row[self.target] for row in rows]))

    def predict(self, rows: Sequence[Row]) -> np.ndarray:
        return np.asarray([self.known.get(shape_of(row), self.other) for row in rows])


class Roofline:
    """The roofline times one constant."""

    def fit(self, rows: Sequence[Row]) -> None:
        ratios = [row["runtime_ms"] / roofline(row) for row in rows]
        self.factor = float(np.median(ratios))

    def predict(self, rows: Sequence[Row]) -> np.ndarray:
        return self.factor * np.asarray([roofline(row) for row in rows])


class Waves:
    """Random forest on the logarithm of time over roofline, with wave features."""

    def fit(self, rows: Sequence[Row]) -> None:
        ratio = [math.log(row["runtime_ms"] / roofline(row)) for row in rows]
        self.forest = RandomForestRegressor(100, random_state=0, n_jobs=1)
        self.forest.fit(wave_features(rows), ratio)

    def predict(self, rows: Sequence[Row]) -> np.ndarray:
        roof = np.asarray([roofline(row) for row in rows])
        return roof * np.exp(self.forest.predict(wave_features(rows)))


def random_split(rows: Sequence[Row]) -> list[np.ndarray]:
    """Return one fifth of the rows, drawn at random: what is left out."""
    order = np.random.default_rng(0).permutation(len(rows))
    return [order[: len(rows) // 5]]


def shape_split(rows: Sequence[Row]) -> list[np.ndarray]:
    """Return folds of whole shapes."""
    shapes = sorted({shape_of(row) for row in rows})
    order = np.random.default_rng(0).permutation(len(shapes))
    fold = {shapes[i]: place % FOLDS for place, i in enumerate(order)}
    folds = [np.asarray([], int)] * FOLDS
    for number in range(FOLDS):
        places = [i for i, row in enumerate(rows) if fold[shape_of(row)] == number]
        folds[number] = np.asarray(places, int)
    return [places for places in folds if len(places)]


def judge(
    make: Callable[[], Any], rows: Sequence[Row], folds: list[np.ndarray], target: str
) -> dict[str, float]:
    """Return R2 and relative errors of a recipe on the rows left out."""
    measured, predicted = [], []
    for unseen in folds:
        left = set(unseen.tolist())
        model = make()
        model.fit([row for i, row in enumerate(rows) if i not in left])
        asked = [rows[i] for i in unseen]
        measured += [row[target] for row in asked]
        predicted += model.predict(asked).tolist()
    errors = np.abs(np.asarray(predicted) / np.asarray(measured) - 1)
    return {
        "r2": float(r2_score(measured, predicted)),
        "mean_error": float(errors.mean()),
        "median_error": float(np.median(errors)),
    }


def inert(rows: Sequence[Row], setting: str) -> float:
    """Return the largest median deviation of log time that one setting's value makes.

    Within rows that are equal in everything but block sizes and layout flags.
    """
    same, by = defaultdict(list), defaultdict(list)
    for row in rows:
        key = (shape_of(row), row["kernel_layout"], row["alpha"], row["beta"])
        same[key].append(math.log(row["runtime_ms"]))
    middle = {key: float(np.median(times)) for key, times in same.items()}
    for row in rows:
        key = (shape_of(row), row["kernel_layout"], row["alpha"], row["beta"])
        by[row[setting]].append(math.log(row["runtime_ms"]) - middle[key])
    return max(abs(float(np.median(parts))) for parts in by.values())


def study(rows: Sequence[Row]) -> dict[str, Any]:
    """Return every recipe's figures on both splits."""
    found: dict[str, Any] = {
        "rows": len(rows),
        "shapes": len({shape_of(row) for row in rows}),
        "block_deviation": inert(rows, "block"),
        "flag_deviation": inert(rows, "layout_flag"),
        "time": {},
        "power": {},
    }
    splits = {"random rows": random_split, "unseen shapes": shape_split}
    recipes: dict[str, Callable[[], Any]] = {
        "paper: forest of depth 6 on milliseconds": lambda: Paper("runtime_ms"),
        "table: median of the shape": lambda: Lookup("runtime_ms"),
        "roofline times a constant": Roofline,
        "forest on log(time / roofline), waves": Waves,
    }
    for name, make in recipes.items():
        found["time"][name] = {
            split: judge(make, rows, cut(rows), "runtime_ms")
            for split, cut in splits.items()
        }
    powered = [row for row in rows if row["watts"] is not None]
    found["power_missing"] = len(rows) - len(powered)
    found["power_idle"] = sum(row["watts"] < IDLE_WATTS for row in powered)
    if len({shape_of(row) for row in powered}) > 1:
        found["power"] = {
            split: judge(lambda: Paper("watts"), powered, cut(powered), "watts")
            for split, cut in splits.items()
        }
    return found


def show(found: dict[str, Any]) -> str:
    """Return the figures as tables."""
    cells = lambda one: (
        f"{one['r2']:.3f}", f"{one['mean_error']:.1%}", f"{one['median_error']:.1%}"
    )  # fmt: skip
    rows = [
        (name, split, *cells(one))
        for name, parts in (*found["time"].items(), ("power, watts", found["power"]))
        for split, one in parts.items()
    ]
    head = (
        f"{found['rows']} rows of {found['shapes']} shapes; what a block size changes: "
        f"{found['block_deviation']:.1%} at most, a layout flag: "
        f"{found['flag_deviation']:.1%}; power missing in {found['power_missing']}, of "
        f"an idle card in {found['power_idle']}"
    )
    return f"{head}\n\n" + format_table(
        ("recipe", "split", "R2", "mean", "median"), rows
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    found = study(read(args.file))
    print(show(found))
    if args.out:
        args.out.write_text(format_json(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

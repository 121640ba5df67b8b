"""Fitting a model of matrix products to timed ones, and its error on unseen shapes.

A shape's timings are on one side of every split: with other tiles or operands of the
same shape in training, an error says how well a table is looked up, not how well a new
shape is predicted.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.errors import DataError, extra_packages
from uoe_jax.files import read_json
from uoe_jax.hardware.devices import Device, find_device
from uoe_jax.hardware.gemm import (
    LEAST,
    GemmModel,
    Trees,
)
from uoe_jax.hardware.product import Product, features, roofline

FOLDS = 8
LEAST_SHAPES = 16  # of a kernel, to be fitted
STEADY = 0.10  # the most that repeats of a timing may spread
_SETTINGS = {
    "n_estimators": 400,
    "learning_rate": 0.06,
    "max_depth": 4,
    "min_samples_leaf": 3,
    "subsample": 0.6,
    "max_features": 0.4,
    "random_state": 0,
}


@dataclass(frozen=True)
class Timed:
    """A product and its measured seconds; watts where a meter was read."""

    product: Product
    seconds: float
    watts: float | None = None
    label: str = ""
    first: bool = False  # the tile that the tables would take


@dataclass(frozen=True)
class HeldOut:
    """Seconds of every timing as a model that hasn't seen its shape predicts them."""

    timed: tuple[Timed, ...]
    predicted: np.ndarray

    def errors(self, kernel: str | None = None, least: float = 0.0) -> np.ndarray:
        """Return the sizes of the relative errors, of one kernel or of all."""
        return np.asarray(
            [
                abs(p / t.seconds - 1)
                for t, p in zip(self.timed, self.predicted, strict=True)
                if kernel in (None, t.product.kernel) and t.seconds >= least
            ]
        )

    def regrets(self) -> list[dict[str, Any]]:
        """Return how much slower the tile predicted fastest is than the fastest one.

        Beside it stands the first tile of every call: what the tables would take.
        """
        calls: dict[Any, list[int]] = defaultdict(list)
        for place, item in enumerate(self.timed):
            if item.product.tile is not None:
                calls[call_of(item.product)].append(place)
        found = []
        for places in calls.values():
            if len(places) < 3:
                continue
            times = np.asarray([self.timed[i].seconds for i in places])
            picked = times[int(np.argmin(self.predicted[places]))]
            table = [i for i in places if self.timed[i].first]
            known = self.timed[table[0]].seconds if table else math.nan
            found.append(
                {
                    "product": self.timed[places[0]].product,
                    "label": self.timed[places[0]].label,
                    "picked": picked / times.min() - 1,
                    "table": known / times.min() - 1,
                }
            )
        return found


def read_rows(path: Path) -> tuple[Device, dict[str, Any], list[Timed]]:
    """Return the device, what a sweep was made with, and its steady timings.

    Raises:
      DataError: not a sweep, or of a device that isn't known.
    """
    try:
        content = read_json(path)
        about, rows = content["about"], content["rows"]
        kind = about["device"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} isn't a sweep of products ({type(error).__name__}: {error}); make "
            "one with uoe bench gemm --out FILE"
        ) from None
    device = find_device(kind)
    if device is None:
        raise DataError(f"{path} is of {kind!r}, which has no data sheet here")
    return device, about, timed_rows(rows)


def timed_rows(rows: Sequence[Mapping[str, Any]]) -> list[Timed]:
    """Return the products of a sweep that were timed and steady.

    Of one that was timed several times the geometric mean: XLA may take another
    algorithm each time it compiles, and the clock isn't the same.
    """
    logs: dict[Product, list[float]] = defaultdict(list)
    about: dict[Product, Mapping[str, Any]] = {}
    for row in rows:
        if row.get("seconds") is None or row.get("spread", 0.0) > STEADY:
            continue
        product = product_of(row)
        logs[product].append(math.log(row["seconds"]))
        about[product] = {**row, **about.get(product, {})}
    found, seen = [], set()
    for product, times in logs.items():
        call = call_of(product)
        first = product.tile is not None and call not in seen
        seen.add(call)
        row = about[product]
        seconds = math.exp(statistics.fmean(times))
        watts, label = row.get("watts"), row.get("label", "")
        found.append(Timed(product, seconds, watts, label, first))
    return found


def product_of(row: Mapping[str, Any]) -> Product:
    """Return the product of a sweep's row."""
    return Product(
        m=row["m"], n=row["n"], k=row["k"], groups=row["groups"],
        dtype=row["dtype"], layout=row["layout"], kernel=row["op"],
        tile=None if row.get("tile") is None else tuple(row["tile"]),
        gather=row.get("gather", ""), tokens=row.get("tokens", 0),
        sizes=tuple(row.get("sizes", ())),
    )  # fmt: skip


def call_of(product: Product) -> tuple:
    """Return what a call is but its tile."""
    return (*shape_of(product), product.layout, product.gather, product.sizes)


def shape_of(product: Product) -> tuple:
    """Return the shape by which timings are split into seen and unseen."""
    sides = sorted((product.m, product.n, product.k))
    return (product.kernel, *sides, product.groups, product.dtype)


def fit(
    timed: Sequence[Timed], device: Device, units: int, about: Mapping[str, Any]
) -> tuple[GemmModel, HeldOut]:
    """Return a model and how it does on shapes it hasn't seen.

    Raises:
      DataError: no kernel with enough shapes.
    """
    trees, spread, tiles, kept, predicted = {}, {}, {}, [], []
    for kernel in dict.fromkeys(item.product.kernel for item in timed):
        items = [item for item in timed if item.product.kernel == kernel]
        shapes = list(dict.fromkeys(shape_of(item.product) for item in items))
        if len(shapes) < LEAST_SHAPES:
            continue
        x, roof, y = _table(items, device, units)
        trees[kernel] = _boost(x, y)
        found = _held_out(x, y, [shapes.index(shape_of(i.product)) for i in items])
        found = np.maximum(found, math.log(LEAST))
        low, high = np.quantile(np.exp(y - found), [0.1, 0.9])
        spread[kernel] = (round(float(min(low, 1)), 4), round(float(max(high, 1)), 4))
        used = Counter(item.product.tile for item in items if item.product.tile)
        tiles |= {kernel: tuple(t for t, n in used.items() if n >= LEAST_SHAPES)}
        kept += items
        predicted.append(np.exp(found) * roof)
    if not trees:
        raise DataError(
            f"too few shapes were timed: a kernel needs {LEAST_SHAPES} for its model"
        )
    model = GemmModel(
        device=device.name, units=units, trees=trees, spread=spread, tiles=tiles,
        about=about,
    )  # fmt: skip
    return model, HeldOut(tuple(kept), np.concatenate(predicted))


def _table(
    items: Sequence[Timed], device: Device, units: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features, rooflines and the logarithms of measured over roofline."""
    x = np.asarray([features(item.product, device, units) for item in items])
    roof = np.asarray([roofline(item.product, device) for item in items])
    seconds = np.asarray([item.seconds for item in items])
    return x, roof, np.log(seconds / roof)


def _held_out(x: np.ndarray, y: np.ndarray, shapes: Sequence[int]) -> np.ndarray:
    """Return every row as predicted from the folds without its shape."""
    fold = np.random.default_rng(0).permutation(max(shapes) + 1)[list(shapes)] % FOLDS
    found = np.zeros_like(y)
    for number in range(FOLDS):
        unseen = fold == number
        if unseen.any():
            found[unseen] = _boost(x[~unseen], y[~unseen]).predict(x[unseen])
    return found


def _boost(x: np.ndarray, y: np.ndarray) -> Trees:
    """Return boosted trees as plain arrays."""
    with extra_packages():
        from sklearn.ensemble import GradientBoostingRegressor

    start = float(np.median(y))
    model = GradientBoostingRegressor(init="zero", **_SETTINGS).fit(x, y - start)
    roots, feature, threshold, right = [], [], [], []
    for (tree,) in model.estimators_:
        nodes, base = tree.tree_, len(feature)
        roots.append(base)
        leaf = nodes.children_left < 0
        value = nodes.value[:, 0, 0] * _SETTINGS["learning_rate"]
        feature += np.where(leaf, -1, nodes.feature).tolist()
        # Six digits: what is stored is what predicts.
        kept = np.where(leaf, value, np.float32(nodes.threshold))
        threshold += [float(f"{number:.6g}") for number in kept]
        right += np.where(leaf, 0, nodes.children_right + base).tolist()
    return Trees(
        round(start, 6), np.asarray(roots), np.asarray(feature),
        np.asarray(threshold), np.asarray(right),
    )  # fmt: skip


def summary(found: HeldOut) -> dict[str, dict[str, Any]]:
    """Return the median and mean error on unseen shapes, by kernel and of all."""
    kernels = dict.fromkeys(item.product.kernel for item in found.timed)
    rows = {}
    for name in (*kernels, "all"):
        errors = found.errors(None if name == "all" else name)
        rows[name] = {
            "timings": len(errors),
            "median": statistics.median(errors.tolist()),
            "mean": float(errors.mean()),
        }
    return rows

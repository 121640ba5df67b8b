"""How long a matrix product takes on a device, learned from timed ones. Imports no jax.

A model predicts log(seconds / roofline) from a product's sizes, its tile and how the
tiles fill the device's units, by boosted regression trees for each kernel. A roofline
times one constant misses what a thin or short product loses; trees on the logarithm of
that loss carry over to shapes that were not timed.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from uoe_jax.errors import DataError
from uoe_jax.files import format_json, read_json, write_atomically
from uoe_jax.hardware.devices import DEVICES, Device, find_device
from uoe_jax.hardware.product import (
    LIBRARY_TILE,
    UNITS,
    Product,
    features,
    roofline,
)

FOLDER = "UOE_TUNING_DIR"
LEAST = 0.9  # of the roofline; no prediction is below
TIE = 0.01  # tiles whose times differ by less are equal: fewer bytes staged win
# Of a device without a model of its own: one with the same multiprocessors.
RELATIVES = {"H100": "H200", "H100 PCIe": "H200"}


@dataclass(frozen=True)
class Trees:
    """Boosted regression trees, nodes in one array: the prediction is their sum.

    A node with feature -1 is a leaf. The left child follows its parent.
    """

    start: float
    roots: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray  # of a leaf: its value
    right: np.ndarray

    def predict(self, x: Float[np.ndarray, "N F"]) -> Float[np.ndarray, " N"]:
        """Return the sum of every tree's leaf for each row."""
        place = np.broadcast_to(self.roots, (len(x), len(self.roots))).copy()
        rows = np.arange(len(x))[:, None]
        while True:
            feature = self.feature[place]
            inside = feature >= 0
            if not inside.any():
                return self.start + self.threshold[place].sum(axis=1)
            # Thresholds were found in float32.
            low = x[rows, feature].astype(np.float32) <= self.threshold[place]
            step = np.where(low, place + 1, self.right[place])
            place = np.where(inside, step, place)

    def as_json(self) -> dict[str, Any]:
        """Return plain lists."""
        return {
            "start": self.start,
            "roots": self.roots.tolist(),
            "feature": self.feature.tolist(),
            "threshold": self.threshold.tolist(),
            "right": self.right.tolist(),
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Trees:
        """Return what `as_json` wrote."""
        array = lambda name: np.asarray(content[name])
        return Trees(
            content["start"], array("roots"), array("feature"),
            np.asarray(content["threshold"], float), array("right"),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GemmModel:
    """Trees by kernel, and the tenth and ninetieth part of measured over predicted."""

    device: str  # a name of hardware.devices
    units: int
    trees: Mapping[str, Trees]
    spread: Mapping[str, tuple[float, float]]
    tiles: Mapping[str, tuple[tuple[int, ...], ...]]  # of grouped kernels, as timed
    about: Mapping[str, Any]
    roof: Device | None = None  # of another device than was measured

    def seconds(
        self, products: Sequence[Product]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the median, low and high seconds of each product.

        Raises:
          DataError: a kernel that was not measured.
        """
        device = self.roof or _device(self.device)
        found = np.zeros((3, len(products)))
        kernels = np.asarray([product.kernel for product in products])
        for kernel in dict.fromkeys(kernels.tolist()):
            if kernel not in self.trees:
                raise DataError(
                    f"the model of {self.device} has no {kernel!r}, only "
                    f"{', '.join(self.trees)}; measure it with uoe bench gemm"
                )
            (where,) = np.nonzero(kernels == kernel)
            x = np.asarray([features(products[i], device, self.units) for i in where])
            roof = np.asarray([roofline(products[i], device) for i in where])
            ratio = np.exp(self.trees[kernel].predict(x))
            for row, factor in enumerate((1.0, *self.spread[kernel])):
                found[row, where] = roof * np.maximum(ratio * factor, LEAST)
        return found[0], found[1], found[2]

    def total(self, products: Sequence[tuple[Product, float]]) -> float:
        """Return the median seconds of products, each so many times."""
        if not products:
            return 0.0
        median, _, _ = self.seconds([product for product, _ in products])
        return float(sum(median * np.asarray([count for _, count in products])))


def choose_tile(
    model: GemmModel, product: Product, candidates: Sequence[tuple[int, ...]]
) -> tuple[int, ...]:
    """Return the tile predicted fastest; of equal ones the one that stages least."""
    tried = [replace(product, tile=tuple(map(int, tile))) for tile in candidates]
    median, _, _ = model.seconds(tried)
    near = [i for i, time in enumerate(median) if time <= median.min() * (1 + TIE)]
    return candidates[min(near, key=lambda i: _staged(tried[i]))]


def _staged(product: Product) -> int:
    rows, inner, outer, _, _, stages, *_ = product.tile or LIBRARY_TILE
    sides = rows * (inner + outer) if product.layout == "tn" else inner * (rows + outer)
    return sides * stages


def _device(name: str) -> Device:
    for device in DEVICES:
        if device.name == name:
            return device
    known = ", ".join(device.name for device in DEVICES)
    raise DataError(f"no device {name!r}; known: {known}")


def save(model: GemmModel, path: Path) -> None:
    """Write a model as JSON."""
    content = {
        "device": model.device,
        "units": model.units,
        "about": dict(model.about),
        "spread": {kernel: list(pair) for kernel, pair in model.spread.items()},
        "tiles": {kernel: list(tiles) for kernel, tiles in model.tiles.items()},
        "trees": {kernel: trees.as_json() for kernel, trees in model.trees.items()},
    }
    write_atomically(path, format_json(content) + "\n")


def load(path: Path) -> GemmModel:
    """Return a model written by `save`; raise DataError on anything else."""
    try:
        content = read_json(path)
        _device(content["device"])
        return GemmModel(
            device=content["device"],
            units=content["units"],
            about=content["about"],
            spread={k: (low, high) for k, (low, high) in content["spread"].items()},
            tiles={k: tuple(map(tuple, t)) for k, t in content["tiles"].items()},
            trees={k: Trees.from_json(t) for k, t in content["trees"].items()},
        )
    except OSError as error:
        raise DataError(
            f"{path} can't be read ({error.strerror}); uoe bench gemm makes a model of "
            "products and says where it is"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} isn't a model of products ({type(error).__name__}: {error}); uoe "
            "bench gemm makes one and says where it is"
        ) from None


def user_folder() -> Path:
    """Return where this machine's measurements are: $UOE_TUNING_DIR or a cache.

    A user without a home has one among the temporary files.
    """
    if given := os.environ.get(FOLDER):
        return Path(given)
    try:
        home = Path.home()
    except RuntimeError:  # HOME unset, and a user without an entry
        home = Path(tempfile.gettempdir()) / f"uoe_jax-{os.getuid()}"
    return home / ".cache" / "uoe_jax" / "tuning"


def file_name(device: str) -> str:
    """Return the name of a device's model: `h100_pcie.json`."""
    return f"{device.lower().replace(' ', '_')}.json"


def own_path(device: str) -> Path:
    """Return where `uoe bench gemm` keeps this machine's model of a device."""
    return user_folder() / f"gemm_{file_name(device)}"


@functools.cache
def shipped(name: str) -> GemmModel | None:
    """Return the model shipped for a device of `hardware.devices`, None without one.

    A relative's model is used with the device's own rates.
    """
    folder = resources.files("uoe_jax.hardware") / "models"
    for known in (name, RELATIVES.get(name, name)):
        path = folder / file_name(known)
        if path.is_file():
            return at_rates_of(load(Path(str(path))), _device(name))
    return None


def at_rates_of(model: GemmModel, device: Device) -> GemmModel:
    """Return a model for another device: the same losses, its rates and units."""
    return replace(model, roof=device, units=UNITS.get(device.name, model.units))


def choose(path: Path | None, device: Device) -> GemmModel | None:
    """Return a file's model, else this machine's own, else the shipped one, or None."""
    if path is not None:
        return at_rates_of(load(path), device)
    own = own_path(device.name)
    if own.is_file():
        return load(own)
    return shipped(device.name)


def describe(model: GemmModel) -> str:
    """Return which model it is, in a few words."""
    own = model.roof is None or model.roof.name == model.device
    scaled = "" if own else f" at {model.roof.name}'s rates"  # type: ignore[union-attr]
    return f"products as timed on {model.device}{scaled}"


@functools.cache
def find(kind: str) -> GemmModel | None:
    """Return the model of a chip by jax's `device_kind`, None without one."""
    device = find_device(kind)
    return choose(None, device) if device else None

"""A matrix product: what it computes and moves, and the features of its time.

Imports no jax.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from uoe_jax.errors import ConfigError
from uoe_jax.hardware.devices import Device

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
KERNELS = ("dot", "ragged_dot", "products", "weight_grads")
LAYOUTS = ("nn", "nt", "tn")
UNITS = {"H200": 132, "H100": 132, "H100 PCIe": 114, "A100": 108, "B200": 148,
         "L40S": 142, "L4": 58, "A10": 72, "T4": 40, "RTX 4090": 128}  # fmt: skip
_STAGING = 227 << 10  # bytes of shared memory of a multiprocessor
_CACHE_RATE = 1.25  # of memory's rate: what tiles read again comes from a cache
_LONG = 4096  # programs, from which on they fill the units evenly
_SPLITS = 8  # of a group's rows, at most; see ops.grouped_matmul.nvidia.launch


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product [m, k] times [k, n], `groups` of them of one kernel.

    kernel: "dot" and "ragged_dot" are XLA's; "products" deals m rows over groups, each
    with a weight [k, n]; "weight_grads" (layout "tn") sums over k rows of groups, each
    with a result [m, n]. layout: "nt" has the second operand transposed, "tn" the
    first. tile: rows, inner, outer, band, warps, stages, programs in turn, ids ahead.
    gather: "x" or "grad", whose rows are picked out of `tokens`. sizes: rows of every
    group; none: all equal.

    Raises:
      ConfigError: a side below 1, or a word that isn't one of those above.
    """

    m: int
    n: int
    k: int
    groups: int = 1
    dtype: str = "bfloat16"
    layout: str = "nn"
    kernel: str = "dot"
    tile: tuple[int, ...] | None = None
    gather: str = ""
    tokens: int = 0
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("m", "n", "k", "groups"):
            value = getattr(self, name)
            if not value >= 1:
                raise ConfigError(
                    f"a product's {name} is {value}; it must be 1 or more"
                )
        for name, known in (("dtype", BYTES), ("layout", LAYOUTS), ("kernel", KERNELS)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"a product's {name} is {getattr(self, name)!r}; choose from "
                    f"{', '.join(known)}"
                )
        if self.kernel in ("products", "weight_grads") and self.tile is None:
            raise ConfigError(f"a product by {self.kernel!r} needs its tile")

    @property
    def flops(self) -> float:
        """Useful FLOPs; a multiply-add is two."""
        return 2.0 * self.m * self.n * self.k

    @property
    def num_rows(self) -> int:
        """Rows that are dealt over the groups."""
        return self.k if self.layout == "tn" else self.m

    @property
    def operand_bytes(self) -> tuple[int, int, int]:
        """Bytes of both operands and of the result, each counted once."""
        size, groups = BYTES[self.dtype], self.groups
        picked = self.tokens or self.num_rows
        if self.layout == "tn":
            left = picked if self.gather == "x" else self.k
            right = picked if self.gather == "grad" else self.k
            parts = (left * self.m, right * self.n, groups * self.m * self.n)
        else:
            left = picked if self.gather else self.m
            parts = (left * self.k, groups * self.k * self.n, self.m * self.n)
        return parts[0] * size, parts[1] * size, parts[2] * size

    @property
    def num_bytes(self) -> int:
        """Bytes of operands and result, each moved once."""
        return sum(self.operand_bytes)

    def group_sizes(self) -> Float[np.ndarray, " G"]:
        """Return the rows of every group."""
        if self.sizes:
            return np.asarray(self.sizes, float)
        return np.full(self.groups, self.num_rows / self.groups)


def peak_rate(product: Product, device: Device) -> float:
    """Return the FLOP/s at most, by the data sheet.

    Float32 runs as tf32; our grouped kernels take three such products. A ragged dot
    multiplies every row by every group's weight.
    """
    rate = device.bf16_flops
    if product.dtype == "float32":
        rate /= 6 if product.kernel in ("products", "weight_grads") else 2
    return rate / (product.groups if product.kernel == "ragged_dot" else 1)


def roofline(product: Product, device: Device) -> float:
    """Return the seconds that a product can't beat: arithmetic, or bytes moved once."""
    arithmetic = product.flops / peak_rate(product, device)
    return max(arithmetic, product.num_bytes / device.memory_bandwidth)


@dataclass(frozen=True)
class _Tiling:
    """A product in tiles: sides, stages, and how its steps fall on the units."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tiles: float
    steps: float  # of a tile, on average
    total: float  # steps of all tiles
    span: float  # steps of the unit that ends last
    resident: int  # programs that a unit runs at a time
    splits: int = 1


# What XLA's library is taken to use: it doesn't tell.
LIBRARY_TILE = (128, 64, 256, 8, 8, 4, 0, 0)


def _tiling(product: Product, units: int) -> _Tiling:
    rows, inner, outer, _, warps, stages, in_turn, _ = product.tile or LIBRARY_TILE
    if product.tile is None and product.n <= 128:
        outer = 128
    grads = product.kernel == "weight_grads"
    height, depth = (inner, rows) if grads else (rows, inner)
    staged = (height + outer) * depth * BYTES[product.dtype] * stages
    held = warps * 32 * (min(255, height * outer / (warps * 32) + 40))
    resident = int(max(1, min(_STAGING // max(staged, 1), 65536 // held)))
    if in_turn:
        resident = min(resident, in_turn)
    slots = units * resident
    columns = math.ceil(product.n / outer)
    sizes = product.group_sizes()
    if grads:
        programs = math.ceil(product.m / height) * columns
        splits = max(1, min(_SPLITS, units // (programs * product.groups)))
        each = np.repeat(np.ceil(sizes / (depth * splits)), programs * splits)
        each = np.maximum(each, 1.0)
        total, tiles, span = each.sum(), len(each), _makespan(each, slots)
        steps = total / tiles
    else:
        splits, steps = 1, math.ceil(product.k / depth)
        if product.kernel == "products" and in_turn:
            # Tiles that the map has room for are made, whether or not there are rows.
            spare = (product.groups + 1) * (rows - 1)
            tiles = columns * ((product.num_rows + spare) // rows)
        elif product.kernel == "products":
            tiles = columns * np.ceil(sizes / height).sum()
        else:
            batch = product.groups if product.layout == "tn" else 1
            tiles = columns * math.ceil(product.m / height) * batch
        total, span = tiles * steps, math.ceil(tiles / slots) * steps
    return _Tiling(
        height, outer, depth, warps, stages, float(tiles), float(steps), float(total),
        float(span), resident, splits,
    )  # fmt: skip


def _makespan(lengths: Float[np.ndarray, " P"], slots: int) -> float:
    """Return when the last of programs ends, each begun as soon as a slot is free."""
    if len(lengths) <= slots or len(lengths) > _LONG:
        return max(float(lengths.max()), float(lengths.sum()) / slots)
    busy = [0.0] * slots
    for length in lengths.tolist():
        heapq.heapreplace(busy, busy[0] + length)
    return max(busy)


def features(product: Product, device: Device, units: int | None = None) -> list[float]:
    """Return the numbers that a model looks at: sizes, tile, roofline, waves."""
    units = units or UNITS.get(device.name, 1)
    t = _tiling(product, units)
    left, right, out = product.operand_bytes
    roof = roofline(product, device)
    arithmetic = product.flops / peak_rate(product, device)
    memory = product.num_bytes / device.memory_bandwidth
    step = 2.0 * t.rows * t.columns * t.depth
    waves = t.span * t.resident * step * units / peak_rate(product, device)
    again = t.total * (t.rows + t.columns) * t.depth * BYTES[product.dtype]
    again /= _CACHE_RATE * device.memory_bandwidth
    sizes, rows = product.group_sizes(), product.num_rows
    log, word = math.log2, lambda value: float(value)
    logs = (
        product.m, product.n, product.k, product.groups, max(sizes.mean(), 1e-3),
        t.rows, t.columns, t.depth, t.tiles, t.steps, t.span, roof * 1e6,
        product.flops / product.num_bytes, max(waves, again, memory) / roof,
        waves / memory, again / memory, waves / again, t.tiles / (units * t.resident),
        arithmetic / memory, left, right, out, product.tokens / rows or 1.0,
        _alignment(product.m), _alignment(product.n), _alignment(product.k),
    )  # fmt: skip
    tile = product.tile or LIBRARY_TILE
    return [
        *(log(value) for value in logs),
        t.total / (units * t.resident * t.span),  # share of the waves that is filled
        t.tiles / (units * t.resident) % 1,
        product.flops / (t.total * step),  # share of the padded tiles that is useful
        sizes.max() / max(sizes.mean(), 1e-3),
        (t.rows + t.columns) * t.depth * t.stages / 1e4,
        *(word(value) for value in (t.resident, t.splits, *tile[3:])),
        word(product.layout == "nn"),
        word(product.layout == "nt"),
        word(product.dtype == "float32"),
        word(bool(product.gather)),
        word(product.gather == "grad"),
    ]


def _alignment(side: int) -> int:
    """Return the largest power of two that divides a side."""
    return side & -side

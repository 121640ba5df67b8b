"""What `uoe bench` takes, checked before jax is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from uoe_jax.fields import Checked, Count, Whole


@dataclass(frozen=True, kw_only=True)
class BenchRequest(Checked):
    """Time operations, layers and training steps here, beside installed peers.

    Benchmarks: attention, union (products and layers), sweep (layer time by share of
    experts kept and sequence length), train; and gemm, by itself: products of many
    shapes, to which the model is fitted that uoe plan and uoe cost read. --tune first
    measures which backend and tile is fastest on this device and keeps that for all
    later runs.
    """

    names: Positional[
        Annotated[tuple[str, ...], arg(metavar="attention|union|sweep|train|gemm")]
    ] = ("attention", "union")
    size: str | None = None  # full or small; None: small on a CPU
    rounds: Count = 5  # a time is the median of this many
    tune: bool = False  # first measure which backends and tiles are fastest here
    out: Path | None = None  # JSON file of all rows
    plot: Path | None = None  # PNG, SVG or PDF: the sweep, or gemm's predictions
    products: Count = 300  # of gemm: random ones, beside the presets' own
    seed: Whole = 0  # of gemm's random products

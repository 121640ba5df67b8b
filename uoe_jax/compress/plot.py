"""Perplexity against cut, a line a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from uoe_jax.errors import extra_packages
from uoe_jax.files import write_picture

with extra_packages():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import (
        FuncFormatter,
        LogLocator,
        NullLocator,
        PercentFormatter,
    )

# The dense model's, times this, is the most that is drawn: broken models are far above.
_MOST = 20
_MARKS = "osD^vPX*"


def plot_curves(
    points: Mapping[str, Sequence[tuple[float, float]]], dense: float, path: Path
) -> None:
    """Write a PNG of each method's perplexity by the share of the blocks that went.

    What is far above the dense model's is beyond the top, and the label says so.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(dense, color="#999999", linestyle=":", label=f"dense: {dense:.2f}")
    for (method, line), mark in zip(points.items(), _MARKS, strict=False):
        line = sorted(line)
        above = [share for share, value in line if value > _MOST * dense]
        label = f"{method}, beyond the top from {min(above):.0%}" if above else method
        axes.plot(*zip(*line, strict=True), f"{mark}-", markersize=4, label=label)
    values = [v for line in points.values() for _, v in line if v <= _MOST * dense]
    axes.set_yscale("log")
    axes.set_ylim(0.9 * dense, 1.15 * max([*values, 1.5 * dense]))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    # Powers of ten alone would leave most curves with a single number beside them.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("share of the blocks' parameters that went")
    axes.set_ylabel("perplexity of held-out data")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    write_picture(path, figure)

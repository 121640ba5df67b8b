"""A picture of clusters: points on their first two principal axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from uoe_jax.cluster.prepare import make_frame
from uoe_jax.errors import extra_packages
from uoe_jax.files import write_picture

with extra_packages():
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

MOST = 20_000  # points drawn
NAMED = 12  # clusters in the legend


def plot_clusters(
    points: Float[np.ndarray, "N P"], labels: Int[np.ndarray, " N"], path: Path
) -> None:
    """Write a PNG of points, standardised and turned, coloured by cluster."""
    step = -(-len(points) // MOST)
    turned = make_frame(points).apply(points)[::step, :2]
    turned = np.pad(turned, ((0, 0), (0, 2 - turned.shape[1])))
    shown = labels[::step]
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    most = 10 if labels.max() < 10 else 20
    colours = colormaps[f"tab{most}"](range(most))
    for label in range(int(labels.max()) + 1):
        on = shown == label
        name = f"{label} ({np.count_nonzero(labels == label):,})"
        colour = [colours[label % len(colours)]]
        axes.scatter(*turned[on].T, s=8, c=colour, label=name if label < NAMED else "")
    axes.set_xlabel("first principal axis")
    axes.set_ylabel("second principal axis")
    axes.grid(True, alpha=0.25)
    figure.legend(title="cluster (points)", loc="outside right upper", frameon=False)
    write_picture(path, figure)

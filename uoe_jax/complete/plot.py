"""The convergence plot of a completion."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from uoe_jax.errors import extra_packages
from uoe_jax.files import write_picture

with extra_packages():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator


def plot_convergence(info: dict[str, np.ndarray], path: Path) -> None:
    """Write a PNG of training and validation RMSE by sweep, the kept one marked."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    sweeps = np.arange(1, len(info["train_rmse"]) + 1)
    axes.plot(sweeps, info["train_rmse"], "o-", color="#3b6ea5", label="training")
    if "valid_rmse" in info:
        axes.plot(sweeps, info["valid_rmse"], "s-", color="#c44e52", label="validation")
        best = int(info["best_sweep"])
        axes.axvline(best + 1, color="#999999", linestyle=":", label="kept")
    errors = [*info["train_rmse"], *info.get("valid_rmse", [])]
    if max(errors) > 10 * min(errors) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("sweep")
    axes.set_ylabel("RMSE")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, alpha=0.25)
    axes.legend(frameon=False)
    write_picture(path, figure)

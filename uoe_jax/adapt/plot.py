"""The curve of an adaptation: training loss, and validation before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.errors import extra_packages
from uoe_jax.files import write_picture

with extra_packages():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator


def plot_adaptation(report: dict[str, Any], path: Path) -> None:
    """Write a PNG of the training loss by step with the two validation losses."""
    losses = np.array(report["losses"], float)  # None of a skipped step: a gap
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="#3b6ea5", linewidth=1, label="training")
    for when, style in (("before", ":"), ("after", "--")):
        loss = report.get(when, {}).get("loss")
        if loss is None:  # its line of the metrics is lost
            continue
        label = f"validation {when}: {loss:.3f}"
        axes.axhline(loss, color="#c44e52", linestyle=style, label=label)
    params = report["params"]
    share = params["adapter"] / params["base"]
    axes.set_title(
        f"{report['method']}, rank {report['rank']}: {params['adapter']:,} parameters, "
        f"{share:.2%} of the base",
        fontsize=10,
    )
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss (nats)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    write_picture(path, figure)

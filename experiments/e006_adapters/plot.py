"""Pictures of both halves: quality against adapter parameters.

    python -m experiments.e006_adapters.plot RESULTS IMAGES

RESULTS holds adapters_lm.json and adapters_conv.json, IMAGES takes the PNGs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

STYLES = {
    "lora": ("LoRA", "#3b6ea5", "o"),
    "tucker": ("Tucker, inputs x outputs", "#c44e52", "s"),
    "tucker_heads": ("Tucker, heads as modes", "#6a9a4a", "^"),
    "tucker_k2": ("Tucker 4-D, kernel ranks 2", "#c44e52", "s"),
    "tucker_k3": ("Tucker 4-D, kernel ranks 3", "#6a9a4a", "^"),
}


def draw_curves(
    results: dict[str, Any], metric: str, lines: dict[str, tuple[float, str]]
) -> Figure:
    """Mean over seeds by parameters, with the range of the seeds, and level lines."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, (label, color, marker) in STYLES.items():
        if name not in results:
            continue
        rows = results[name]
        sizes = [row["params"] for row in rows]
        values = np.array([row[metric] for row in rows])
        axes.plot(sizes, values.mean(1), color=color, marker=marker, label=label)
        axes.fill_between(
            sizes, values.min(1), values.max(1), color=color, alpha=0.2, linewidth=0
        )
        for row, size, value in zip(rows, sizes, values.mean(1), strict=True):
            axes.annotate(
                str(row["rank"]),
                (size, value),
                textcoords="offset points",
                xytext=(4, 5),
                fontsize=7,
                color=color,
            )
    for value, label in lines.values():
        axes.axhline(value, color="#777777", linestyle="--", linewidth=1)
        place = {"xy": (0.01, value), "xycoords": ("axes fraction", "data")}
        above = {"xytext": (2, 3), "textcoords": "offset points"}
        axes.annotate(label, **place, **above, fontsize=8, color="#555555")
    axes.set_xscale("log")
    axes.set_xlabel("adapter parameters (numbers at the points: ranks)")
    axes.grid(which="both", alpha=0.2)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def level(results: dict[str, Any], name: str, metric: str, label: str) -> dict:
    """A level line of a curve with one entry, where it was measured."""
    if name not in results:
        return {}
    return {name: (float(np.mean(results[name][0][metric])), label)}


def main(results: Path, images: Path) -> None:
    lm = json.loads((results / "adapters_lm.json").read_text())
    size = lm["about"]["base_params"]
    line = level(lm, "full", "bpb", f"full fine-tuning ({size / 1e6:.1f} M)")
    figure = draw_curves(lm, "bpb", line)
    before = lm["about"]["base_bpb_python"]
    figure.axes[0].set_ylabel("bits per byte, Python source")
    figure.axes[0].set_title(
        f"A Wikipedia byte model adapted to Python source ({before:.2f} before)",
        fontsize=10,
    )
    figure.savefig(images / "adapters_lm.png", dpi=150)
    conv = json.loads((results / "adapters_conv.json").read_text())
    lines = level(conv, "full", "error", "full fine-tuning")
    lines |= level(conv, "head", "error", "new head only")
    figure = draw_curves(conv, "error", lines)
    figure.axes[0].set_ylabel("CIFAR-10 test error")
    figure.axes[0].legend(frameon=False, fontsize=8, loc="center right")
    figure.axes[0].set_title("A ConvNet from MNIST adapted to CIFAR-10", fontsize=10)
    figure.savefig(images / "adapters_conv.png", dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

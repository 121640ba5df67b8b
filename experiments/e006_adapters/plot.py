"""Both halves as a picture and a table: quality against adapter parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from uoe_jax.report.style import LIGHT, Theme, render

NAMES = {
    "lora": "LoRA",
    "tucker": "Tucker, inputs x outputs",
    "tucker_heads": "Tucker, heads as modes",
    "tucker_k2": "Tucker 4-D, kernel ranks 2",
    "tucker_k3": "Tucker 4-D, kernel ranks 3",
    "full": "full fine-tuning",
    "head": "new head only",
}
LEVELS = ("full", "head")  # of one size: a line across
# half -> metric, the axis' name, title
HALVES = {
    "lm": ("bpb", "bits per byte, Python source", "A Wikipedia byte model, adapted"),
    "conv": ("error", "CIFAR-10 test error", "A ConvNet from MNIST, adapted"),
}


def table(results: dict[str, Any]) -> str:
    """Return Markdown: mean and deviation over the seeds of every curve and rank."""
    lines = ["| half | curve | rank | parameters | rate | result |", "|---" * 6 + "|"]
    for half, (metric, *_) in HALVES.items():
        for name, label in NAMES.items():
            for row in results.get(half, {}).get(name, ()):
                mean, spread = np.mean(row[metric]), np.std(row[metric])
                lines.append(
                    f"| {half} | {label} | {row['rank']} | {row['params']:,} | "
                    f"{row['rate']:g} | {mean:.4f} ± {spread:.4f} |"
                )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any]) -> bytes:
    """Return a PNG: means by parameters, the range of the seeds, and level lines."""

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(12, 4.6), layout="constrained")
        for axes, half in zip(figure.subplots(1, 2), HALVES, strict=True):
            metric, label, title = HALVES[half]
            _panel(axes, results.get(half, {}), metric, theme)
            axes.set(ylabel=label, title=title)
            axes.set_xlabel("adapter parameters (numbers at the points: ranks)")
        return figure

    return render(draw, (LIGHT,))["light"]


def _panel(axes: Any, curves: dict[str, Any], metric: str, theme: Theme) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    shown = [name for name in NAMES if name in curves and name not in LEVELS]
    for name, color, marker in zip(shown, theme.colors, "os^Dv", strict=False):
        rows = curves[name]
        sizes = [row["params"] for row in rows]
        values = np.array([row[metric] for row in rows])
        mean = values.mean(1)
        axes.plot(sizes, mean, color=color, marker=marker, label=NAMES[name])
        axes.fill_between(
            sizes, values.min(1), values.max(1), color=color, alpha=0.2, linewidth=0
        )
        for row, *at in zip(rows, sizes, mean, strict=True):
            how = {"textcoords": "offset points", "xytext": (4, 5), "fontsize": 7}
            axes.annotate(str(row["rank"]), at, color=color, **how)
    for name in (name for name in LEVELS if name in curves):
        value = float(np.mean(curves[name][0][metric]))
        axes.axhline(value, color=theme.ink, linestyle="--", linewidth=1)
        place = {"xy": (0.01, value), "xycoords": ("axes fraction", "data")}
        above = {"xytext": (2, 3), "textcoords": "offset points"}
        axes.annotate(NAMES[name], **place, **above, fontsize=8, color=theme.ink)
    if shown:
        axes.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.93))

"""Pictures of the routers: load of every expert, and how sharp the routing is."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from uoe_jax.report.read import BLOCKS, Run
from uoe_jax.report.style import Theme

_COLORS = "cividis"  # same order of lightness for every kind of colour vision
_NAMES = {"attention": "attention", "mlp": "MLP"}
_MOST_LAYERS = 6


def some_layers(count: int, most: int = _MOST_LAYERS) -> list[int]:
    """Return at most `most` rows of `count`, the first and last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def load_figure(run: Run, theme: Theme) -> Figure | None:
    """Draw the final load of every expert in every layer; 1 is a balanced share."""
    found = {b: r for b in BLOCKS if (r := run.router(b, "load")) is not None}
    if not found:
        return None
    rows = max(load.shape[1] for _, load in found.values())
    figure = Figure(
        figsize=(5.5 * len(found), 1.5 + min(0.42 * rows, 8)), layout="constrained"
    )
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (block, (steps, load)) in zip(panels, found.items(), strict=True):
        final = load[-1] * load.shape[-1]
        _heatmap(figure, axes, final, "share of load (1 = balanced)")
        if final.shape[1] <= 16 and final.shape[0] <= 16:
            _numbers(axes, final)
        axes.set_title(f"{_NAMES[block]} experts, step {steps[-1]:.0f}")
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        layers = run.routed_layers(block)
        shown = range(0, len(layers), math.ceil(len(layers) / 16))
        axes.set_yticks(shown, [str(layers[i]) for i in shown])
    return figure


def load_history_figure(run: Run, theme: Theme) -> Figure | None:
    """Draw every expert's load over the run, a panel for each of some layers."""
    found = {b: r for b in BLOCKS if (r := run.router(b, "load")) is not None}
    found = {b: (s, v) for b, (s, v) in found.items() if len(s) > 1}
    if not found:
        return None
    columns = max(len(some_layers(v.shape[1])) for _, v in found.values())
    figure = Figure(figsize=(11, 0.6 + 2.1 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), columns, squeeze=False)
    for row, (block, (steps, load)) in zip(panels, found.items(), strict=True):
        share = load * load.shape[-1]
        for axes in row[len(some_layers(load.shape[1])) :]:
            axes.set_axis_off()
        for axes, layer in zip(row, some_layers(load.shape[1]), strict=False):
            image = axes.pcolormesh(
                steps,
                np.arange(share.shape[-1]),
                share[:, layer].T,
                cmap=_COLORS,
                vmin=0,
                vmax=2,
                shading="nearest",
            )
            axes.grid(False)
            number = run.routed_layers(block)[layer]
            axes.set_title(f"{_NAMES[block]}, layer {number}")
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        row[0].set_ylabel("expert")
        figure.colorbar(
            image, ax=row.tolist(), label="share (1 = balanced)", pad=0.01, extend="max"
        )
    figure.supxlabel("training steps", fontsize=11)
    return figure


def entropy_figure(run: Run, theme: Theme) -> Figure | None:
    """Draw the routers' entropy in every layer over the run."""
    found = {b: r for b in BLOCKS if (r := run.router(b, "entropy")) is not None}
    if not found:
        return None
    figure = Figure(figsize=(5.5 * len(found), 3.4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (block, (steps, entropy)) in zip(panels, found.items(), strict=True):
        layers = run.routed_layers(block)
        colors = _shades(len(layers), theme)
        for i, layer in enumerate(layers):
            named = i in some_layers(len(layers))
            axes.plot(
                steps,
                entropy[:, i],
                color=colors[i],
                label=f"layer {layer}" if named else None,
                linewidth=1.8 if named else 0.6,
            )
        experts = _num_experts(run, block)
        axes.axhline(
            math.log(experts),
            color=theme.ink,
            linestyle=":",
            linewidth=1.2,
            label=f"uniform, ln {experts}",
        )
        axes.set_title(f"{_NAMES[block]} routers")
        axes.set_xlabel("training steps")
        axes.set_ylabel("entropy (nats)")
        axes.set_ylim(bottom=0, top=math.log(experts) * 1.08)
        axes.set_xlim(left=0)
        axes.legend(fontsize=9, ncols=2, loc="lower left")
    return figure


def _num_experts(run: Run, block: str) -> int:
    model = run.config.model
    moe = block == "mlp" and "moe" in model.mlp
    return model.moe.num_experts if moe else model.union.num_experts


def _shades(count: int, theme: Theme) -> list:
    """Return colours from early to late layers, away from the paper's own tone."""
    low, high = (0.0, 0.8) if theme.name == "light" else (0.35, 1.0)
    return list(matplotlib.colormaps["viridis"](np.linspace(low, high, count)))


def _heatmap(figure: Figure, axes: Axes, values: np.ndarray, label: str) -> None:
    image = axes.imshow(values, cmap=_COLORS, vmin=0, vmax=2, aspect="auto")
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    figure.colorbar(image, ax=axes, label=label, pad=0.02, extend="max")


def _numbers(axes: Axes, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        ink = "white" if value < 1.1 else "black"
        axes.text(
            column,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            color=ink,
            fontsize=8.5,
        )

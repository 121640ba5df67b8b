"""Pictures of the routers: load of every expert, and how sharp the routing is."""

from __future__ import annotations

import math

import numpy as np

from uoe_jax.errors import extra_packages
from uoe_jax.report.alarms import NAMES, find_alarms, latest
from uoe_jax.report.read import Run
from uoe_jax.report.style import Theme

with extra_packages():
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import EngFormatter, MaxNLocator

_COLORS = "cividis"  # same order of lightness for every kind of colour vision
_PARTS = ("attention", "mlp")  # where experts share the load
_MOST_LAYERS = 6
_ALARM = "#ff5a4f"  # stands out from the colour map and from both papers


def some_layers(count: int, most: int = _MOST_LAYERS) -> list[int]:
    """Return at most `most` rows of `count`, the first and last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def load_figure(run: Run, theme: Theme) -> Figure | None:
    """Draw every expert's load in every layer; 1 is a balanced share.

    Means over the last tenth of the run; what raises an alarm has a frame.
    """
    found = {b: r for b in _PARTS if (r := run.router(b, "load")) is not None}
    if not found:
        return None
    rows = max(load.shape[1] for _, load in found.values())
    figure = Figure(
        figsize=(5.5 * len(found), max(1.5 + min(0.42 * rows, 8), 2.6)),
        layout="constrained",
    )
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (block, (steps, load)) in zip(panels, found.items(), strict=True):
        layers = run.routed_layers(block)
        final = _shares(run, block, latest(load)[None])[0]
        first = run.num_shared(block, layers[0])
        _heatmap(figure, axes, final, first, "share (1 = balanced)")
        if final.shape[1] <= 16 and final.shape[0] <= 16:
            _numbers(axes, final, first)
        for alarm in find_alarms(run):
            if alarm.block == block:
                _frame(axes, layers.index(alarm.layer), alarm.experts)
        axes.set_title(f"{NAMES[block]} experts, up to step {steps[-1]:.0f}")
        twice = run.num_loads(block, layers[0]) > run.num_experts(block, layers[0])
        axes.set_xlabel("expert as asked, then as stored in" if twice else "expert")
        axes.set_ylabel("layer")
        shown = range(0, len(layers), math.ceil(len(layers) / 16))
        axes.set_yticks(shown, [str(layers[i]) for i in shown])
    return figure


def depth_figure(run: Run, theme: Theme) -> Figure | None:
    """Draw the share of tokens that enter each block they may go around."""
    found = run.router("depth", "load")
    if found is None:
        return None
    steps, load = found
    layers = run.routed_layers("depth")
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    shades = _shades(len(layers), theme)
    for row, (layer, color) in enumerate(zip(layers, shades, strict=True)):
        axes.plot(steps, load[:, row, 0], color=color, label=f"layer {layer}")
    keep = run.config.model.mod.keep
    axes.axhline(keep, color=theme.ink, linestyle=":", label=f"keep {keep:g}")
    axes.set(xlabel="training steps", ylabel="share of tokens that enter", ylim=(0, 1))
    axes.legend(fontsize=9, ncols=2)
    return figure


def _shares(run: Run, block: str, load: np.ndarray) -> np.ndarray:
    """Return loads [n, L, E] in balanced shares; NaN where a layer has no expert."""
    counts = np.array([run.num_loads(block, i) for i in run.routed_layers(block)])
    there = np.arange(load.shape[-1]) < counts[:, None]
    return np.where(there, load * counts[:, None], np.nan)


def load_history_figure(run: Run, theme: Theme) -> Figure | None:
    """Draw every expert's load over the run, a panel for each of some layers."""
    found = {b: r for b in _PARTS if (r := run.router(b, "load")) is not None}
    found = {b: (s, v) for b, (s, v) in found.items() if len(s) > 1}
    if not found:
        return None
    columns = max(len(some_layers(v.shape[1])) for _, v in found.values())
    figure = Figure(figsize=(11, 0.6 + 2.1 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), columns, squeeze=False)
    for row, (block, (steps, load)) in zip(panels, found.items(), strict=True):
        share = _shares(run, block, load)
        first = run.num_shared(block, run.routed_layers(block)[0])
        for axes in row[len(some_layers(load.shape[1])) :]:
            axes.set_axis_off()
        for axes, layer in zip(row, some_layers(load.shape[1]), strict=False):
            image = axes.pcolormesh(
                steps,
                first + np.arange(share.shape[-1]),
                share[:, layer].T,
                cmap=_COLORS,
                vmin=0,
                vmax=2,
                shading="nearest",
            )
            axes.grid(False)
            number = run.routed_layers(block)[layer]
            axes.set_title(f"{NAMES[block]}, layer {number}")
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
    found = {b: r for b in _PARTS if (r := run.router(b, "entropy")) is not None}
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
        experts = max(run.num_experts(block, layer) for layer in layers)
        axes.axhline(
            math.log(experts),
            color=theme.ink,
            linestyle=":",
            linewidth=1.2,
            label=f"uniform, ln {experts}",
        )
        axes.set_title(f"{NAMES[block]} routers")
        axes.set_xlabel("training steps")
        axes.set_ylabel("entropy (nats)")
        axes.set_ylim(bottom=0, top=math.log(experts) * 1.08)
        axes.set_xlim(left=0)
        axes.legend(fontsize=9, ncols=2, loc="lower left")
    return figure


def _shades(count: int, theme: Theme) -> list:
    """Return colours from early to late layers, away from the paper's own tone."""
    low, high = (0.0, 0.8) if theme.name == "light" else (0.35, 1.0)
    return list(matplotlib.colormaps["viridis"](np.linspace(low, high, count)))


def _heatmap(
    figure: Figure, axes: Axes, values: np.ndarray, first: int, label: str
) -> None:
    """Draw values [L, E] as cells; the first column is expert number `first`."""
    rows, columns = values.shape
    extent = (first - 0.5, first + columns - 0.5, rows - 0.5, -0.5)
    image = axes.imshow(
        values, cmap=_COLORS, vmin=0, vmax=2, aspect="auto", extent=extent
    )
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    figure.colorbar(image, ax=axes, label=label, pad=0.02, extend="max")


def _frame(axes: Axes, row: int, experts: tuple[int, ...]) -> None:
    """Draw a frame around cells that raised an alarm."""
    for expert in experts:
        cell = (expert - 0.46, row - 0.46)
        axes.add_patch(
            Rectangle(cell, 0.92, 0.92, fill=False, edgecolor=_ALARM, linewidth=2)
        )


def _numbers(axes: Axes, values: np.ndarray, first: int) -> None:
    for (row, column), value in np.ndenumerate(values):
        if math.isnan(value):
            continue
        axes.text(
            column + first,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            color="white" if value < 1.1 else "black",
            fontsize=8.5,
        )

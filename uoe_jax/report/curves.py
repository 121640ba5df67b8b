"""Line plots: loss and validation metrics against steps, seconds and FLOPs."""

from __future__ import annotations

import numpy as np

from uoe_jax.errors import extra_packages
from uoe_jax.report.read import Run
from uoe_jax.report.style import MARKERS, Theme, as_label

with extra_packages():
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

# x of every comparison: record key, axis label, unit of its ticks.
AXES = (
    ("step", "training steps", ""),
    ("seconds", "training time", "s"),
    ("flops", "training compute", "FLOP"),
)
LABELS = {
    "loss": "loss (nats/token)",
    "bits_per_byte": "validation bits/byte",
    "accuracy": "validation accuracy",
    "perplexity": "validation perplexity",
}


def smooth(values: np.ndarray, share: float = 0.06) -> np.ndarray:
    """Return centred means of a series [n] over windows of a share of its length.

    Windows are cut at both ends, so the line doesn't lag and is as long as the series.
    """
    half = round(len(values) * share / 2)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first = np.maximum(index - half, 0)
    end = np.minimum(index + half + 1, len(values))
    return (total[end] - total[first]) / (end - first)


def loss_figure(runs: list[Run], theme: Theme) -> Figure | None:
    """Draw smoothed training loss (line) and validation loss (markers) of every run."""
    if not any(run.series("loss", "step").size for run in runs):
        return None
    figure, panels = _panels()
    for axes, (x, label, unit) in zip(panels, AXES, strict=True):
        shown = []
        for i, run in enumerate(runs):
            color = theme.colors[i % len(theme.colors)]
            train, name = run.series("loss", x), as_label(run.name)
            if train.size:
                smoothed = smooth(train[1])
                axes.plot(*train, color=color, alpha=0.25, linewidth=0.8)
                axes.plot(
                    train[0],
                    smoothed,
                    color=color,
                    label=f"{as_label(run.name)}, training",
                )
                shown.extend(smoothed[len(smoothed) // 8 :])
            shown.extend(run.series("loss", x, "eval")[1][1:])
            _validation(axes, run, "loss", x, i, theme, f"{name}, validation")
        _dress(axes, label, unit)
        if shown:  # the first steps' fall and the noise would flatten all the rest
            axes.set_ylim(min(shown) * 0.92, max(shown) * 1.08)
    panels[0].set_ylabel(LABELS["loss"])
    _legend(figure, panels[0], columns=len(runs))
    return figure


def metric_figure(runs: list[Run], key: str, theme: Theme) -> Figure | None:
    """Draw one validation metric of every run, or None if no run has it."""
    if not any(run.series(key, "step", "eval").size for run in runs):
        return None
    figure, panels = _panels()
    for axes, (x, label, unit) in zip(panels, AXES, strict=True):
        for i, run in enumerate(runs):
            _validation(axes, run, key, x, i, theme, as_label(run.name), "-")
        _dress(axes, label, unit)
        later = [v for r in runs for v in r.series(key, x, "eval")[1][1:]]
        if len(later) > 2 * len(runs) and key != "accuracy":
            # The first, hardly trained score would dwarf the others.
            axes.set_ylim(top=max(later) * 1.08)
    panels[0].set_ylabel(LABELS[key])
    _legend(figure, panels[0], columns=len(runs))
    return figure


def health_figure(runs: list[Run], theme: Theme) -> Figure | None:
    """Draw learning rate, gradient norm and speed against steps."""
    if not any(run.train for run in runs):
        return None
    figure, panels = _panels()
    wanted = (
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm"),
        ("tokens_per_second", "tokens/s"),
    )
    for axes, (key, label) in zip(panels, wanted, strict=True):
        for i, run in enumerate(runs):
            series = run.series(key, "step")
            color = theme.colors[i % len(theme.colors)]
            axes.plot(*series, color=color, linewidth=1.3, label=as_label(run.name))
        _dress(axes, "training steps", "")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        if key == "tokens_per_second":
            axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    _legend(figure, panels[0], columns=len(runs))
    return figure


def _panels() -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(11, 4.0), layout="constrained")
    return figure, list(figure.subplots(1, 3))


def _validation(
    axes: Axes,
    run: Run,
    key: str,
    x: str,
    i: int,
    theme: Theme,
    label: str,
    line: str = "none",
) -> None:
    points = run.series(key, x, "eval")
    if points.size:
        axes.plot(
            *points,
            color=theme.colors[i % len(theme.colors)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=6,
            markeredgecolor=theme.paper,
            markeredgewidth=0.8,
            linestyle=line,
            label=label,
            zorder=3,
        )


def _dress(axes: Axes, label: str, unit: str) -> None:
    axes.set_xlabel(f"{label} ({unit})" if unit else label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(columns, 4))

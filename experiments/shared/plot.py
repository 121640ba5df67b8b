"""A study's picture: quality against FLOPs, against seconds, and while training.

Where all cases change one (`Study.origin`) they cost about the same, and a row a case
says more: what the change costs, and how fast the model trains.
"""

from __future__ import annotations

import math
import statistics

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from experiments.shared.case import Study
from experiments.shared.stats import (
    Result,
    deltas,
    median_seconds,
    spread,
    values,
)
from uoe_jax.report.style import LIGHT, Theme, render

_MARKERS = "osD^v"  # one a family


def plot(study: Study, found: dict[str, list[Result]]) -> bytes:
    """Return a PNG: test quality with its deviation over seeds, and learning curves.

    With an origin: every case's differences from it, and its speed.
    """
    if paired := _paired(study, found):
        return _rows(study, found, paired)

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(12.5, 5.2), layout="constrained")
        panels = figure.subplots(1, 3)
        for case, looks in _looks(study, found, theme).items():
            _points(panels, study, case, found[case], looks)
            _curve(panels[2], study, found[case][0], looks)
        what = _unit(study)
        panels[0].set(xlabel="training FLOPs", ylabel=f"test {what}")
        panels[1].set(xlabel="seconds of training", ylabel=f"test {what}")
        panels[2].set(
            xlabel="seconds of training", ylabel=f"validation {what}, first seed"
        )
        for axes in panels:
            axes.set_xlim(0, 1.06 * axes.dataLim.x1)  # from 0: lengths are shares
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        _zoom(panels[2], study)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=5, fontsize=8.5
        )
        return figure

    return render(draw, [LIGHT])["light"]


def _looks(
    study: Study, found: dict[str, list[Result]], theme: Theme
) -> dict[str, dict]:
    """Return colour and marker of each case: a marker a family, colours in turn."""
    families = list(dict.fromkeys(case.family for case in study.cases))
    family = {case.name: families.index(case.family) for case in study.cases}
    looks = {}
    for number, case in enumerate(found):
        looks[case] = {
            "color": theme.colors[number % len(theme.colors)],
            "marker": _MARKERS[family[case] % len(_MARKERS)],
            "markersize": 6,
            # Colours come round again: then the marker is hollow.
            "fillstyle": "none" if number >= len(theme.colors) else "full",
        }
    return looks


def _paired(study: Study, found: dict[str, list[Result]]) -> dict[str, list[float]]:
    """Return each case's test scores less the origin's, {} where that has none."""
    origin = found.get(study.origin, [])
    paired = {case: deltas(runs, origin, study.metric) for case, runs in found.items()}
    scale = _scale(study)
    return {case: [scale * d for d in seeds] for case, seeds in paired.items() if seeds}


def _rows(
    study: Study, found: dict[str, list[Result]], paired: dict[str, list[float]]
) -> bytes:
    """Return a PNG: differences from the origin on test, the best first; tokens/s."""
    order = sorted(
        paired,
        key=lambda case: statistics.fmean(paired[case]),
        reverse=study.metric == "accuracy",
    )
    speed = [
        found[case][0]["tokens_per_step"]
        * found[case][0]["steps"]
        / median_seconds(found[case])
        for case in order
    ]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(11, 1.2 + 0.27 * len(order)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(5, 2))
        left.axvline(0, color=theme.ink, linewidth=1, zorder=1)
        for row, case in enumerate(order):
            seeds = paired[case]
            error = 2 * spread(seeds) / len(seeds) ** 0.5
            color = theme.colors[0 if case != study.baseline else 1]
            left.plot(seeds, [row] * len(seeds), "o", color=color, alpha=0.35, ms=5)
            mean, looks = statistics.fmean(seeds), {"fmt": "D", "ms": 4, "capsize": 3}
            left.errorbar(mean, row, xerr=error, color=color, **looks)
            right.barh(row, speed[row], 0.6, color=color)
        left.set_yticks(range(len(order)), order)
        left.set_ylim(len(order) - 0.4, -0.6)
        scored = values(found[study.origin], "test", study.metric)
        first = _scale(study) * statistics.fmean(filter(math.isfinite, scored))
        left.set_xlabel(
            f"test {_unit(study)}, less {study.origin}'s {first:.3f}\n"
            "(paired by seed: mean with two standard errors, seeds pale)"
        )
        right.set_axisbelow(True)
        right.set_xlabel("tokens/s of training")
        right.xaxis.set_major_locator(MaxNLocator(4))
        right.xaxis.set_major_formatter(EngFormatter(sep=" "))
        return figure

    return render(draw, [LIGHT])["light"]


def _unit(study: Study) -> str:
    what = study.metric.replace("_", " ").replace("bits per byte", "bits/byte")
    return what + (", %" if study.metric == "accuracy" else "")


def _scale(study: Study) -> float:
    return 100.0 if study.metric == "accuracy" else 1.0


def _points(
    panels: list[Axes], study: Study, case: str, results: list[Result], looks: dict
) -> None:
    scored = [_scale(study) * v for v in values(results, "test", study.metric)]
    scored = [v for v in scored if math.isfinite(v)]
    if not scored:
        return
    flops = results[0]["training_flops_per_step"] * results[0]["steps"]
    for axes, x in zip(panels, (flops, median_seconds(results)), strict=False):
        axes.errorbar(
            x,
            statistics.fmean(scored),
            yerr=spread(scored) if len(scored) > 1 else None,
            capsize=3,
            label=case,
            linestyle="none",
            **looks,
        )


def _curve(axes: Axes, study: Study, result: Result, looks: dict) -> None:
    points = [line for line in result["curve"] if "valid" in line]
    axes.plot(
        [line["step"] * result["step_seconds"] for line in points],
        [_scale(study) * line["valid"][study.metric] for line in points],
        **looks | {"markersize": 4},
    )


def _zoom(axes: Axes, study: Study) -> None:
    """Leave out the first, high losses, which would hide all differences."""
    lines = [np.asarray(line.get_ydata(), float) for line in axes.get_lines()]
    lines = [y for y in lines if len(y) > 2]
    if study.metric == "bits_per_byte" and lines:
        low, high = min(y.min() for y in lines), max(y[1] for y in lines)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))

"""Layer time against the keep ratio X/E, one line a sequence length."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from uoe_jax.bench.timing import Row
from uoe_jax.errors import extra_packages
from uoe_jax.files import write_picture
from uoe_jax.report.style import LIGHT, MARKERS, styled

with extra_packages():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure


def plot_sweep(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG of union over dense time by X/E: attention beside MLP."""
    with styled(LIGHT):
        figure = Figure(figsize=(9.0, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, part in zip(panels, ("attention", "mlp"), strict=True):
            _panel(axes, part, rows)
        panels[0].set_ylabel("time over the dense layer's")
        panels[0].legend(title="tokens T", fontsize=8)
        write_picture(path, figure)


def ratios(rows: Sequence[Row], case: str) -> list[tuple[float, float]]:
    """Return (X/E, union time over dense time) of one case, both passes."""
    times = {row.name: row.milliseconds for row in rows if row.case == case}
    dense = times.pop("dense", None)
    if not dense:
        return []
    found = [
        (float(Fraction(name[1:])), time / dense)
        for name, time in times.items()
        if time
    ]
    return sorted(found)


def _panel(axes, part: str, rows: Sequence[Row]) -> None:
    cases = dict.fromkeys(row.case for row in rows if row.case.startswith(part))
    for index, case in enumerate(cases):
        points = ratios(rows, case)
        if points:
            color = LIGHT.colors[index % len(LIGHT.colors)]
            marker = MARKERS[index % len(MARKERS)]
            axes.plot(*zip(*points, strict=True), color=color, marker=marker,
                      markersize=4, label=case.rpartition("T")[2])  # fmt: skip
    axes.plot([0, 1], [0, 1], color=LIGHT.faint, linestyle="--")
    axes.axhline(1.0, color=LIGHT.ink, linewidth=0.8)
    axes.annotate("FLOPs", (0.93, 0.86), fontsize=8, rotation=38, ha="center")
    axes.set_title(f"{part} layer, forward and backward")
    axes.set_xlabel("experts kept, X/E")
    axes.set_xlim(0, 1.03)
    axes.set_ylim(bottom=0)

"""Draws docs/images/union.svg: a dense layer, its slices, and the router over them.

    python docs/draw_union.py

The same parts are drawn three times: the dense layer as two matrices, the same matrices
cut into experts, and two tokens that use two experts each.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

# Okabe and Ito's colour-blind-safe set, one colour an expert.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
INK, FAINT, PAPER = "#1f2328", "#8b949e", "#ffffff"
IMAGES = Path(__file__).parent / "images"


def arrow(axes, start, end, color=INK, *, thin=False):
    """Draw where something goes."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=8 if thin else 11, color=color,
            linewidth=0.8 if thin else 1.4, shrinkA=1, shrinkB=1,
        )
    )  # fmt: skip


def box(axes, x, y, width, height, color, text="", *, off=False, size=14):
    """Draw a part; one that is off is an outline."""
    axes.add_patch(
        Rectangle(
            (x, y), width, height, linewidth=1.2,
            facecolor=PAPER if off else color, edgecolor=color,
            alpha=0.35 if off else 1,
        )
    )  # fmt: skip
    if text:
        ink = FAINT if off else PAPER
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center",
                  color=ink, fontsize=size, fontweight="bold")  # fmt: skip


def layer(axes, left, *, cut, on=(True,) * 4):
    """Draw up and down projections side by side, whole or cut into four experts."""
    for side, name in ((0, "in"), (1.15, "out")):
        for part, color in enumerate(COLORS):
            shade = color if cut else "#57606a"
            height = 0.62 if cut else 0.71  # whole: without gaps, as high in all
            y = 0.95 + (3 - part) * 0.71
            label = f"{part + 1}" if cut else ""
            box(axes, left + side, y, 0.95, height, shade, label, off=not on[part])
        axes.text(left + side + 0.475, 0.72, name, ha="center", va="top",
                  color=INK, fontsize=12)  # fmt: skip


def panel(figure, place, title, below):
    """Return the axes of one of the three pictures."""
    axes = figure.add_axes(place)
    axes.set_xlim(0, 4.2)
    axes.set_ylim(-0.5, 4.75)
    axes.set_axis_off()
    axes.text(2.1, 4.62, title, ha="center", va="top", fontsize=15, fontweight="bold",
              color=INK)  # fmt: skip
    axes.text(2.1, 0.38, below, ha="center", va="top", fontsize=11.5, color=INK,
              linespacing=1.35)  # fmt: skip
    return axes


def draw() -> Figure:
    """Return the picture."""
    figure = Figure(figsize=(10.2, 4.1), facecolor=PAPER)
    FigureCanvasSVG(figure)
    width = 0.325
    one = panel(figure, (0.005, 0, width, 1), "A dense layer",
                "Every token is multiplied\nby every weight.")  # fmt: skip
    layer(one, 1.05, cut=False)
    arrow(one, (0.35, 2.28), (1.0, 2.28))
    arrow(one, (3.2, 2.28), (3.78, 2.28))
    one.text(0.3, 2.28, "x", ha="right", va="center", fontsize=14, color=INK)
    one.text(3.82, 2.28, "y", ha="left", va="center", fontsize=14, color=INK)

    two = panel(figure, (0.335, 0, width, 1), "is a sum of slices",
                "Cut along neurons or heads: experts.\n"
                "All of them on, y is the same.")  # fmt: skip
    layer(two, 1.05, cut=True)
    for part, color in enumerate(COLORS):
        y = 0.95 + (3 - part) * 0.71 + 0.31
        arrow(two, (0.35, 2.28), (1.0, y), color)
        arrow(two, (3.2, y), (3.76, 2.28), color)
    two.text(0.3, 2.28, "x", ha="right", va="center", fontsize=14, color=INK)
    two.text(3.8, 2.28, "+y", ha="left", va="center", fontsize=14, color=INK)

    three = panel(figure, (0.67, 0, width, 1), "each token uses some",
                  "A router picks a few for each token,\n"
                  "each multiplied by its gate.")  # fmt: skip
    on = (True, False, True, False)
    layer(three, 1.25, cut=True, on=on)
    box(three, 0.48, 1.83, 0.4, 0.9, INK, "", size=9)
    three.text(0.68, 2.28, "router", ha="center", va="center", rotation=90,
               fontsize=11, color=PAPER, fontweight="bold")  # fmt: skip
    arrow(three, (0.2, 2.28), (0.46, 2.28))
    three.text(0.2, 2.28, "x", ha="right", va="center", fontsize=14, color=INK)
    for part, color in enumerate(COLORS):
        y = 0.95 + (3 - part) * 0.71 + 0.31
        if on[part]:
            arrow(three, (0.9, 2.28), (1.22, y), color)
            arrow(three, (3.4, y), (3.84, 2.28), color)
            three.text(3.72, y + (0.3 if y > 2.2 else -0.36), "gate", fontsize=11.5,
                       ha="center", va="center", color=color)  # fmt: skip
        else:
            three.plot((0.9, 1.22), (2.28, y), color=FAINT, linewidth=0.9,
                       linestyle=":")  # fmt: skip
    three.text(3.86, 2.28, "+y", ha="left", va="center", fontsize=14, color=INK)
    return figure


def save(figure: Figure, name: str) -> None:
    """Write a picture into docs/images, the same bytes every time."""
    matplotlib.rcParams["svg.hashsalt"] = name
    matplotlib.rcParams["svg.fonttype"] = "path"  # the same shapes everywhere
    path = IMAGES / name
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    lines = [line.rstrip() for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Write the picture."""
    save(draw(), "union.svg")


if __name__ == "__main__":
    main()

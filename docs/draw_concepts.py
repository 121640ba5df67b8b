"""Draws docs/images/routing_rows.svg and mesh.svg for the pages of concepts.

python docs/draw_concepts.py
"""

from __future__ import annotations

from draw_union import COLORS, FAINT, INK, PAPER, arrow, box, save
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Experts that each of four tokens chose.
CHOICES = ((0, 2), (1, 2), (0, 3), (0, 1))


def canvas(width: float, height: float, right: float, top: float) -> Axes:
    """Return axes in their own units, without a frame."""
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, right)
    axes.set_ylim(0, top)
    axes.set_axis_off()
    return axes


def say(axes: Axes, x: float, y: float, text: str, size: float = 12, **more) -> None:
    """Write a centred text."""
    more = {"ha": "center", "va": "center", "color": INK} | more
    axes.text(x, y, text, fontsize=size, **more)


def draw_rows() -> Figure:
    """Return tokens, their scores, and the packed rows of the experts."""
    axes = canvas(9.6, 4.2, 12, 5.25)
    for x, title in ((0.9, "tokens"), (3.9, "scores, best two chosen"),
                     (8.5, "rows, sorted by expert"), (11.4, "tokens")):  # fmt: skip
        say(axes, x, 4.95, title, 13, fontweight="bold")
    height = lambda token: 3.7 - 1.0 * token
    for token, chosen in enumerate(CHOICES):
        y = height(token)
        box(axes, 0.5, y, 0.8, 0.7, "#57606a", f"{token + 1}")
        arrow(axes, (1.35, y + 0.35), (2.1, y + 0.35))
        for expert, color in enumerate(COLORS):
            off = expert not in chosen
            box(axes, 2.25 + 0.85 * expert, y + 0.05, 0.75, 0.6, color,
                "" if off else "gate", off=off, size=10)  # fmt: skip
        box(axes, 11.0, y, 0.8, 0.7, "#57606a", f"{token + 1}")
    rows = [(e, t) for e in range(4) for t, c in enumerate(CHOICES) if e in c]
    for place, (expert, token) in enumerate(rows):
        y = 4.2 - 0.46 * place - 0.1 * expert
        box(axes, 7.9, y, 1.2, 0.4, COLORS[expert], f"token {token + 1}", size=10)
        start = (2.25 + 0.85 * expert + 0.78, height(token) + 0.35)
        arrow(axes, start, (7.85, y + 0.2), COLORS[expert], thin=True)
        arrow(axes, (9.15, y + 0.2), (10.95, height(token) + 0.35), COLORS[expert],
              thin=True)  # fmt: skip
    say(axes, 6.0, 0.28, "each row is multiplied by its expert alone; a token's rows, "
        "times their gates, are added up", 12)  # fmt: skip
    return axes.figure


def draw_mesh() -> Figure:
    """Return eight devices: rows of the batch over data, experts over tensor."""
    axes = canvas(9.6, 4.0, 12, 5.0)
    say(axes, 6.4, 4.7, "tensor: experts, heads and columns are split", 13,
        fontweight="bold")  # fmt: skip
    say(axes, 0.55, 2.35, "data: rows of\nthe batch are split", 13, rotation=90,
        fontweight="bold", linespacing=1.3)  # fmt: skip
    for data in range(2):
        for tensor, color in enumerate(COLORS):
            x, y = 1.5 + 2.6 * tensor, 2.55 - 1.95 * data
            box(axes, x, y, 2.3, 1.6, FAINT, off=True)
            say(axes, x + 1.15, y + 1.35, f"device {4 * data + tensor}", 11,
                color="#57606a")  # fmt: skip
            box(axes, x + 0.15, y + 0.2, 0.95, 0.85, "#57606a",
                f"rows\n{'1-8' if data == 0 else '9-16'}", size=10.5)  # fmt: skip
            box(axes, x + 1.2, y + 0.2, 0.95, 0.85, color,
                f"experts\n{2 * tensor + 1}, {2 * tensor + 2}", size=10.5)  # fmt: skip
    say(axes, 6.4, 0.28, "left to right: outputs are summed; top to bottom: gradients "
        "are summed, once a step", 12)  # fmt: skip
    return axes.figure


def main() -> None:
    """Write both pictures."""
    save(draw_rows(), "routing_rows.svg")
    save(draw_mesh(), "mesh.svg")


if __name__ == "__main__":
    main()

"""Which expert took which token of a real example: coloured text, patches on images."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from uoe_jax.errors import extra_packages
from uoe_jax.report.alarms import NAMES
from uoe_jax.report.routers import some_layers
from uoe_jax.report.style import LIGHT, Theme

with extra_packages():
    import matplotlib
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.patheffects import withStroke

_COLUMNS = 60  # characters in a line of the picture
_PANELS = 4  # layers shown
TITLES = {"attention": "attention experts", "mlp": "MLP experts", "depth": "depth"}


@dataclass(frozen=True)
class Overlay:
    """One example and the experts each of its tokens picked, best first.

    `choices` has an array [L, T, X] for each part that is routed, always-on experts
    left out and -1 where a pick was dropped; `layers` the layer of each of its rows.
    Text has `tokens`, an image `image` [Hi, Wi, Ci] in row-major patches of `patch`
    pixels a side.
    """

    choices: dict[str, np.ndarray]
    layers: dict[str, list[int]]
    num_experts: dict[str, int]
    tokens: Sequence[str] = field(default_factory=list)
    image: np.ndarray | None = None
    patch: int = 1

    def names(self, block: str) -> list[str]:
        """Return what the choices of a part are called."""
        if block == "depth":
            return ["through the block", "around it"]
        return [str(i) for i in range(self.num_experts[block])]


def expert_colors(count: int) -> list[str]:
    """Return one colour an expert: eight named ones, beyond that shades of a map."""
    if count <= len(LIGHT.colors):
        return list(LIGHT.colors[:count])
    return [to_hex(c) for c in matplotlib.colormaps["turbo"](np.linspace(0, 1, count))]


def text_html(overlay: Overlay) -> str:
    """Return the tokens once a layer, coloured by their first expert.

    Hovering over a token names all the experts it picked.
    """
    parts = []
    for block, choices in overlay.choices.items():
        colors = expert_colors(overlay.num_experts[block])
        keys = "".join(
            f'<span class="key"><i style="background:{color}"></i>{name}</span>'
            for name, color in zip(overlay.names(block), colors, strict=True)
        )
        parts.append(f'<h4>{TITLES[block]}</h4><p class="keys">{keys}</p>')
        parts.append('<div class="overlays">')
        for row in some_layers(len(choices), _PANELS):
            names = overlay.names(block)
            spans = _spans(overlay.tokens, choices[row], colors, names)
            layer = overlay.layers[block][row]
            parts.append(
                f"<figure><figcaption>layer {layer}</figcaption>"
                f'<pre class="tokens">{spans}</pre></figure>'
            )
        parts.append("</div>")
    return "".join(parts)


def _spans(
    tokens: Sequence[str], choices: np.ndarray, colors: list[str], names: list[str]
) -> str:
    spans = []
    for text, picks in zip(tokens, choices, strict=False):
        taken = [int(pick) for pick in picks if pick >= 0]
        experts = ", ".join(names[pick] for pick in taken) or "none: no room"
        # A newline keeps its colour visible through a mark of its own.
        shown = html.escape(text).replace("\n", "↵\n")
        # 8-digit hex: translucent, so the page's own ink stays readable on it.
        style = f"background:{colors[taken[0]]}80" if taken else ""
        spans.append(f'<span style="{style}" title="experts {experts}">{shown}</span>')
    return "".join(spans)


def text_figure(overlay: Overlay, theme: Theme) -> Figure | None:
    """Draw the same as a picture: a grid of characters for each of some layers."""
    if not overlay.tokens or not overlay.choices:
        return None
    places, columns, lines = _lay_out(overlay.tokens)
    panels = [
        (block, row)
        for block, choices in overlay.choices.items()
        for row in some_layers(len(choices), _PANELS)
    ]
    rows = math.ceil(len(panels) / 2)
    most = max(overlay.num_experts[block] for block, _ in panels)
    colors = expert_colors(most)  # the same in all panels, as there is one key
    width = max(0.2 * columns, 8.0)  # inches; the key needs so much
    figure = Figure(figsize=(width, rows * (0.5 + 0.19 * lines) + 0.4))
    figure.subplots_adjust(
        0.01,
        0.01,
        0.99,
        1 - 0.7 / figure.get_figheight(),
        wspace=0.03,
        hspace=0.4 / (0.19 * lines),
    )
    grid = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (block, row) in zip(grid, panels, strict=False):
        axes.set_title(
            f"{NAMES[block]}, layer {overlay.layers[block][row]}", loc="left"
        )
        axes.set_xlim(0, 5 * width)
        axes.set_ylim(lines, 0)
        picks = overlay.choices[block][row]
        first = [next((p for p in row if p >= 0), None) for row in picks.tolist()]
        cells = [
            _cell(x, y, colors[first[token]])
            for (x, y, _), token in places
            if first[token] is not None
        ]
        axes.add_collection(PatchCollection(cells, match_original=True))
        for (x, y, char), _ in places:
            if not char.isspace():
                axes.text(
                    x + 0.5,
                    y + 0.55,
                    char,
                    ha="center",
                    va="center",
                    fontsize=9,
                    family="DejaVu Sans Mono",
                )
    keys = [Patch(facecolor=c, alpha=0.5) for c in colors]
    if most <= 16:
        names = [f"expert {i}" for i in range(most)]
        figure.legend(keys, names, loc="upper center", ncols=8, fontsize=9)
    return figure


def _cell(x: int, y: int, color: str) -> Rectangle:
    return Rectangle((x, y), 1, 1, facecolor=color, alpha=0.5, linewidth=0)


def _lay_out(tokens: Sequence[str]) -> tuple[list, int, int]:
    """Return [((column, line, character), token)] wrapped, and columns and lines."""
    places, x, y = [], 0, 0
    for number, text in enumerate(tokens):
        for char in text:
            # Beyond Latin, the font may have no glyph; the page's own fonts do.
            shown = char if char.isprintable() and ord(char) < 0x250 else "·"
            shown = {"\n": "↵", "\t": " "}.get(char, shown)
            if x == _COLUMNS:
                x, y = 0, y + 1
            places.append(((x, y, shown), number))
            x += 1
            if char == "\n":
                x, y = 0, y + 1
    columns = max((place[0] + 1 for place, _ in places), default=1)
    return places, columns, max(y + (x > 0), 1)


def image_figure(overlay: Overlay, theme: Theme) -> Figure | None:
    """Draw the image, and beside it every patch in the colour of its first expert."""
    if overlay.image is None or not overlay.choices:
        return None
    side = overlay.image.shape[0] // overlay.patch
    blocks = list(overlay.choices)
    columns = 1 + max(
        len(some_layers(len(c), _PANELS)) for c in overlay.choices.values()
    )
    figure = Figure(figsize=(2.2 * columns, 2.5 * len(blocks)), layout="constrained")
    grid = figure.subplots(len(blocks), columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    gray = overlay.image.mean(axis=-1)
    for line, block in zip(grid, blocks, strict=True):
        colors = expert_colors(overlay.num_experts[block])
        line[0].imshow(gray, cmap="gray")
        line[0].set_title("image" if block == blocks[0] else "")
        for axes, row in zip(
            line[1:], some_layers(len(overlay.choices[block]), _PANELS), strict=False
        ):
            axes.imshow(gray, cmap="gray", extent=(0, side, side, 0))
            axes.set_title(f"{NAMES[block]}, layer {overlay.layers[block][row]}")
            for token, picks in enumerate(overlay.choices[block][row][: side * side]):
                x, y = token % side, token // side
                picks = picks[picks >= 0]
                if not len(picks):
                    continue
                axes.add_patch(_cell(x, y, colors[picks[0]]))
                axes.text(
                    x + 0.5,
                    y + 0.5,
                    str(picks[0]),
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white",
                    weight="bold",
                    path_effects=[withStroke(linewidth=2, foreground="black")],
                )
    return figure

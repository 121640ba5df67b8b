"""Looks shared by every picture: two themes, colour-blind-safe colours, PNG bytes."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from uoe_jax.errors import extra_packages

with extra_packages():
    import matplotlib
    from matplotlib.figure import Figure


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Theme:
    """Background, ink and the series colours of one theme."""

    name: str
    paper: str
    ink: str
    faint: str
    colors: tuple[str, ...]


# Okabe and Ito's set (blue, vermilion, green, purple, orange, sky, ink, olive); the
# dark theme's are the same hues, lightened.
LIGHT = Theme(
    "light",
    "#ffffff",
    "#1c2128",
    "#d0d7de",
    tuple("#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #6E7781 #8C8500".split()),
)
DARK = Theme(
    "dark",
    "#161b22",
    "#e6edf3",
    "#363d47",
    tuple("#4FA8E0 #FF8A4C #2CCB9B #E79CC5 #F2B93B #8FD0F7 #B8BEC6 #D6CF4A".split()),
)
THEMES = (LIGHT, DARK)


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """Set matplotlib's looks for the figures made inside."""
    settings = {
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.titlesize": 11,
        "axes.labelsize": 11,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "font.size": 10.5,
        "font.family": "DejaVu Sans",
        "lines.linewidth": 1.8,
        "text.parse_math": False,  # a name may hold a $
    }
    with matplotlib.rc_context(settings):
        yield


def render(
    draw: Callable[[Theme], Figure | None],
    themes: Sequence[Theme] = THEMES,
    dpi: int = 110,
) -> dict[str, bytes]:
    """Return {theme name: PNG} of a figure, or {} where there is nothing to draw.

    Figures are made without pyplot, so no window system and no global state is used.
    """
    pictures = {}
    for theme in themes:
        with styled(theme):
            figure = draw(theme)
            if figure is None:
                return {}
            buffer = io.BytesIO()
            with warnings.catch_warnings():
                # The page's text has what this font lacks.
                warnings.filterwarnings("ignore", message="Glyph")
                # No software name or date: equal runs give equal files.
                about = {"Software": None}
                figure.savefig(buffer, format="png", dpi=dpi, metadata=about)
            pictures[theme.name] = buffer.getvalue()
    return pictures


def as_label(name: str, limit: int = 60) -> str:
    """Return a run's name as a legend shows it: one short line.

    matplotlib leaves labels out that begin with an underscore.
    """
    shown = "".join(c if c.isprintable() else "·" for c in name)
    if len(shown) > limit:
        shown = shown[: limit - 3] + "..."
    return f" {shown}" if shown.startswith("_") else shown


def data_uri(png: bytes) -> str:
    """Return a PNG as a `data:` address."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")

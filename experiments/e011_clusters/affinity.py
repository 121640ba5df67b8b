"""The picture of |Z Z^T|: which pictures have features of one direction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from uoe_jax.files import write_atomically
from uoe_jax.report.style import LIGHT, Theme, render

TITLES = {"start": "the start", "MLC": "MLC"}


def draw_affinity(
    panels: dict[str, np.ndarray], classes: np.ndarray, out: Path
) -> None:
    """Write |Z Z^T| of each kind of features, pictures sorted by class."""
    rng = np.random.default_rng(0)
    some = [rng.permutation(np.flatnonzero(classes == c))[:60] for c in range(10)]
    order = np.concatenate(some)

    def draw(theme: Theme) -> Figure:
        del theme
        figure = Figure(figsize=(4.2 * len(panels) + 0.8, 4.4), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for place, (name, z) in zip(axes, panels.items(), strict=True):
            shown = np.abs(z[order] @ z[order].T)
            image = place.imshow(shown, vmin=0, vmax=1, cmap="magma")
            place.grid(False)
            place.set_title(f"features of {TITLES[name]}")
            edges = np.cumsum([0, *map(len, some)])
            middles = 0.5 * (edges[1:] + edges[:-1])
            place.set_xticks(middles, range(10))
            place.set_yticks(middles, range(10))
            place.set_xlabel("class")
        axes[0].set_ylabel("class")
        figure.colorbar(image, ax=list(axes), label="|z . z'|", shrink=0.85)
        return figure

    content = render(draw, (LIGHT,), dpi=120)["light"]
    write_atomically(out / "affinity.png", content)

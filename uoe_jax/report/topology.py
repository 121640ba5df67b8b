"""Pictures of ring orders: where the devices stand, and the way a ring takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uoe_jax.files import write_picture
from uoe_jax.topology import Graph, RingOrder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe set: one colour a ring.
_COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #6E7781 #8C8500".split()


def save_picture(
    path: Path,
    title: str,
    graph: Graph,
    axes: list[str],
    before: RingOrder,
    after: RingOrder,
) -> None:
    """Write a picture of the last axis' rings in both orders."""
    pairs = [("before", before), ("ours", after)]
    figure = draw_orders([(f"{title}: {n}", graph, axes, o) for n, o in pairs])
    write_picture(path, figure)


def draw_orders(
    cases: list[tuple[str, Graph, list[str], RingOrder]], columns: int = 2
) -> Figure:
    """Return a picture with a panel each: title, graph, names of the axes, order."""
    from matplotlib.figure import Figure

    rows = -(-len(cases) // columns)
    figure = Figure(figsize=(4.2 * columns, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (title, graph, axes, order) in zip(panels, cases, strict=False):
        _draw(panel, graph, order)
        text = f"{axes[-1]}: {order.hops[-1]:.2f} hops, at most {order.worst[-1]:.3g}"
        panel.set_title(f"{title}\n{text}", fontsize=9, parse_math=False)
    for panel in panels[len(cases) :]:
        panel.set_axis_off()
    return figure


def _draw(panel: Any, graph: Graph, order: RingOrder) -> None:
    """Draw links in grey and the last axis' rings in colours; wraps bulge outwards."""
    points = flat_places(graph)
    for u, v, _ in graph.edges() if not graph.switched else []:
        panel.plot(*points[[u, v]].T, color="#D8DEE4", linewidth=1, zorder=1)
    rings = order.vertices.reshape(-1, order.vertices.shape[-1])
    for number, ring in enumerate(rings):
        color = _COLORS[number % len(_COLORS)]
        for u, v in zip(ring, np.roll(ring, -1), strict=True):
            panel.annotate(
                "",
                xy=points[v],
                xytext=points[u],
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": color,
                    "linewidth": 1.2,
                    "connectionstyle": "arc3,rad=0.12",
                    "shrinkA": 4,
                    "shrinkB": 4,
                },
            )
        panel.scatter(*points[ring].T, s=36, color=color, zorder=3)
    panel.set(xticks=[], yticks=[])
    panel.set_aspect("equal")
    panel.margins(0.12)
    panel.set_frame_on(False)


def flat_places(graph: Graph) -> np.ndarray:
    """Return (vertices, 2) places to draw at: layers of a box aslant, or a circle."""
    if graph.places is None:
        angle = np.arange(graph.size) * 2 * np.pi / graph.size
        return np.stack([np.sin(angle), np.cos(angle)], 1)
    places = graph.places.astype(float)
    if graph.box is not None:  # its dimensions are slowest first
        places = places[:, ::-1]
    places = places[:, np.ptp(places, axis=0) > 0]
    aslant = np.array([[1, 0], [0, 1], [0.35, 0.28], [0.1, 0.06]])
    return places @ aslant[: places.shape[1]]

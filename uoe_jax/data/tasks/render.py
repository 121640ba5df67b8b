"""Dashes and circles as grey images; coordinates (y, x), pixel i covers i to i + 1.

Both coordinates are arrays of their own: NumPy is slow along an axis of two.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

_HALF_WIDTH = 0.25  # of a dash, pixels
_CONTRAST = 1.5  # of a dash; what is brighter than white is white
_RADIUS = 1.5  # of a circle, pixels


def draw(
    dashes: Float[np.ndarray, "N P 2 2"],
    circles: Float[np.ndarray, "N C 2"],
    side: int,
) -> UInt8[np.ndarray, "N Hi Wi"]:
    """Return images of dashes (tail, head; NaN: none) and filled circles (centres).

    A pixel's brightness is the share of it that a shape covers, estimated from the
    distance of its middle to the shape's edge; shapes that overlap don't add up.
    """
    images = np.zeros((len(dashes), side, side), np.float32)
    for dash in dashes.transpose(1, 0, 2, 3):
        rows = np.flatnonzero(~np.isnan(dash[:, 0, 0]))
        dash = dash[rows]
        reach = int(np.ceil(np.abs(dash[:, 1] - dash[:, 0]).max(initial=0) / 2)) + 1
        y, x = window_of(dash.mean(axis=1), reach)
        edge = distance_to_dash(y + 0.5, x + 0.5, dash) - _HALF_WIDTH
        _lighten(images, rows, y, x, _CONTRAST * (0.5 - edge))
    for centre in circles.transpose(1, 0, 2):
        y, x = window_of(centre, int(np.ceil(_RADIUS)) + 1)
        across = [a + 0.5 - centre[:, i, None, None] for i, a in enumerate((y, x))]
        edge = np.sqrt(across[0] * across[0] + across[1] * across[1]) - _RADIUS
        _lighten(images, np.arange(len(images)), y, x, 0.5 - edge)
    return np.rint(255 * images).astype(np.uint8)


def distance_to_dash(
    y: Float[np.ndarray, "*P N A1 B1"],
    x: Float[np.ndarray, "*P N A2 B2"],
    dash: Float[np.ndarray, "N 2 2"],
) -> Float[np.ndarray, "*P N A B"]:
    """Return the distance of points to the segment from tail to head of their row."""
    tail, step = dash[:, 0], dash[:, 1] - dash[:, 0]
    tail_y, tail_x, step_y, step_x = (
        a[:, i, None, None] for a in (tail, step) for i in (0, 1)
    )
    y, x = y - tail_y, x - tail_x
    along = y * step_y + x * step_x
    along /= step_y * step_y + step_x * step_x
    along = np.minimum(np.maximum(along, 0), 1)
    y, x = y - along * step_y, x - along * step_x
    return np.sqrt(y * y + x * x)


def window_of(
    middle: Float[np.ndarray, "N 2"], reach: int
) -> tuple[Float[np.ndarray, "N S 1"], Float[np.ndarray, "N 1 S"]]:
    """Return the whole coordinates y and x within `reach` of each point's own cell."""
    own, offsets = np.floor(middle), np.arange(-reach, reach + 1)
    y, x = (own[:, i, None] + offsets for i in (0, 1))
    return y[:, :, None], x[:, None]


def inside(
    y: Float[np.ndarray, "N S 1"], x: Float[np.ndarray, "N 1 S"], side: int
) -> np.ndarray:
    """Return which cells of windows lie on a grid of `side` cells, [N, S, S]."""
    return ((y >= 0) & (y < side)) & ((x >= 0) & (x < side))


def _lighten(
    images: Float[np.ndarray, "N Hi Wi"],
    rows: np.ndarray,
    y: Float[np.ndarray, "R S 1"],
    x: Float[np.ndarray, "R 1 S"],
    light: Float[np.ndarray, "R S S"],
) -> None:
    """Raise the pixels of some images to at least `light`, cut to [0, 1]."""
    row, i, j = np.nonzero(inside(y, x, images.shape[1]) & (light > 0))
    y, x = y[row, i, 0].astype(np.int64), x[row, 0, j].astype(np.int64)
    new = np.minimum(light[row, i, j], 1).astype(np.float32)
    images[rows[row], y, x] = np.maximum(images[rows[row], y, x], new)

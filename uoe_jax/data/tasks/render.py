"""Dashes and circles as grey images; coordinates (y, x), pixel i covers i to i + 1."""

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
        pixels = window_of(dash.mean(axis=1), reach)
        edge = distance_to_dash(pixels + 0.5, dash[:, None, None]) - _HALF_WIDTH
        _lighten(images, rows, pixels, _CONTRAST * (0.5 - edge))
    for centre in circles.transpose(1, 0, 2):
        rows = np.arange(len(images))
        pixels = window_of(centre, int(np.ceil(_RADIUS)) + 1)
        offset = pixels + 0.5 - centre[:, None, None]
        edge = np.sqrt((offset * offset).sum(-1)) - _RADIUS
        _lighten(images, rows, pixels, 0.5 - edge)
    return np.rint(255 * images).astype(np.uint8)


def distance_to_dash(
    points: Float[np.ndarray, "... 2"], dash: Float[np.ndarray, "... 2 2"]
) -> Float[np.ndarray, "*N"]:
    """Return the distance of points to the segment from tail to head."""
    tail, step = dash[..., 0, :], dash[..., 1, :] - dash[..., 0, :]
    offset = points - tail
    along = (offset * step).sum(-1) / (step * step).sum(-1)
    nearest = offset - np.clip(along, 0, 1)[..., None] * step
    return np.sqrt((nearest * nearest).sum(-1))


def window_of(
    middle: Float[np.ndarray, "N 2"], reach: int
) -> Float[np.ndarray, "N S S 2"]:
    """Return the whole coordinates within `reach` of each point's own cell."""
    offsets = np.arange(-reach, reach + 1)
    around = np.stack(np.meshgrid(offsets, offsets, indexing="ij"), axis=-1)
    return np.floor(middle)[:, None, None] + around


def _lighten(
    images: Float[np.ndarray, "N Hi Wi"],
    rows: np.ndarray,
    pixels: Float[np.ndarray, "R S S 2"],
    light: Float[np.ndarray, "R S S"],
) -> None:
    """Raise the pixels of some images to at least `light`, cut to [0, 1]."""
    side = images.shape[1]
    inside = ((pixels >= 0) & (pixels < side)).all(axis=-1) & (light > 0)
    row, *place = np.nonzero(inside)
    y, x = pixels[(row, *place)].T.astype(np.int64)
    new = np.minimum(light[(row, *place)], 1).astype(np.float32)
    images[rows[row], y, x] = np.maximum(images[rows[row], y, x], new)

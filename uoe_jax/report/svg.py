"""Curves of a page as inline SVG: as sharp as the screen, values under the pointer.

Panels stand side by side, and one below the other on a phone.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from uoe_jax.escape import escape_line
from uoe_jax.report.curves import AXES, LABELS, smooth
from uoe_jax.report.read import Run
from uoe_jax.report.style import DARK, LIGHT, Theme
from uoe_jax.report.table import si

_WIDTH, _HEIGHT = 370.0, 270.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 12.0, 24.0, 44.0
_MOST_POINTS, _MOST_VALUES = 300, 40  # of a line; that tell their value
_HEALTH = (
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens/s"),
)


def _colors(theme: Theme) -> str:
    """Return the rules of a theme's colours: of lines, and of what is filled."""
    return "".join(
        f".s{i} {{ stroke: {c}; }} .f{i} {{ fill: {c}; background: {c}; }}\n"
        for i, c in enumerate(theme.colors)
    )


STYLE = (
    ".panels { display: grid; gap: .6rem; grid-template-columns: repeat(3, 1fr); }\n"
    ".panels svg { width: 100%; height: auto; font-size: 11px; }\n"
    ".panels text { fill: var(--soft); } .panels .grid { stroke: var(--line); }\n"
    ".panels path { fill: none; } .panels .value { fill: transparent; }\n"
    ".panels .value:hover { fill: var(--accent); fill-opacity: .35; }\n"
    "@media (max-width: 700px) { .panels { grid-template-columns: 1fr; }\n"
    "  picture { display: block; overflow-x: auto; }\n"
    "  picture img { max-width: none; width: 720px; } }\n"
    + _colors(LIGHT)
    + "@media (prefers-color-scheme: dark) {\n"
    + _colors(DARK)
    + "}\n"
)


class _Series(NamedTuple):
    """Points [2, n] of a run: a line, or marks joined by one."""

    run: int
    name: str
    points: np.ndarray
    marks: bool = False
    line: bool = True


def learning(runs: Sequence[Run], key: str) -> str:
    """Return a validation metric, and of the loss the training's, against three x."""
    panels = []
    for x, label, unit in AXES:
        series, shown = [], []
        for i, run in enumerate(runs):
            train = run.series("loss", x) if key == "loss" else np.empty((2, 0))
            if train.size:
                smoothed = smooth(train[1])
                points = np.stack([train[0], smoothed])
                series.append(_Series(i, f"{run.name}, training", points))
                shown.extend(smoothed[len(smoothed) // 8 :])
            found = run.series(key, x, "eval")
            name = f"{run.name}, validation"
            series.append(_Series(i, name, found, marks=True, line=key != "loss"))
            shown.extend(found[1][1:] if found.shape[1] > 2 else found[1])
        panels.append(_panel(series, label, LABELS[key], shown, unit))
    return _figure(panels, runs, LABELS[key])


def health(runs: Sequence[Run]) -> str:
    """Return learning rate, gradient norm and speed against steps."""
    panels = []
    for key, label in _HEALTH:
        series = [
            _Series(i, run.name, run.series(key, "step")) for i, run in enumerate(runs)
        ]
        shown = [0.0, *(y for one in series for y in one.points[1])]
        panels.append(_panel(series, "training steps", label, shown, ""))
    return _figure(panels, runs, "optimizer and speed")


def _figure(panels: Sequence[str], runs: Sequence[Run], about: str) -> str:
    if not any(panels):
        return ""
    keys = "".join(
        f'<span class="key"><i class="f{_color(i)}"></i>{_text(run.name)}</span>'
        for i, run in enumerate(runs)
    )
    return (
        f'<figure><div class="panels">{"".join(panels)}</div>'
        f'<figcaption class="keys">{_text(about)}: {keys}</figcaption></figure>'
    )


def _panel(
    series: Sequence[_Series],
    x_label: str,
    y_label: str,
    shown: Sequence[float],
    unit: str,
) -> str:
    """Return one plot, its y axis made for the values `shown`; "" without points."""
    series = [one for one in series if one.points.shape[1]]
    values = [y for y in shown if math.isfinite(y)]
    if not series or not values:
        return ""
    right = max(float(one.points[0].max()) for one in series) or 1.0
    low, high = float(min(values)), float(max(values))
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (low if low == 0 else low - room), high + room
    place_x = lambda x: _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT)
    place_y = lambda y: _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" '
        f'aria-label="{_text(f"{y_label} against {x_label}")}">'
    ]
    for tick in _ticks(0.0, right):
        x = place_x(tick)
        parts.append(_line(x, _TOP, x, _HEIGHT - _BOTTOM))
        parts.append(_label(x, _HEIGHT - _BOTTOM + 15, si(tick), "middle"))
    for tick in _ticks(low, high):
        y = place_y(tick)
        parts.append(_line(_LEFT, y, _WIDTH - _RIGHT, y))
        parts.append(_label(_LEFT - 5, y + 4, si(tick), "end"))
    parts.append(_label(_LEFT, _TOP - 9, y_label, "start"))
    about = f"{x_label} ({unit})" if unit else x_label
    parts.append(_label((_LEFT + _WIDTH) / 2, _HEIGHT - 8, about, "middle"))
    for one in series:
        pairs = [
            (place_x(x), min(max(place_y(y), _TOP), _HEIGHT - _BOTTOM), x, y)
            for x, y in one.points.T
            if math.isfinite(x) and math.isfinite(y)
        ]
        parts += _drawn(one, pairs, x_label)
    return "".join([*parts, "</svg>"])


def _drawn(one: _Series, pairs: Sequence[tuple], x_label: str) -> list[str]:
    """Return a series' line, its marks, and what shows a value under the pointer."""
    color, parts = _color(one.run), []
    if one.line and len(pairs) > 1:
        # From where it comes into the panel on: the first steps are far above.
        inside = [pair for pair in pairs if pair[1] > _TOP] or pairs
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y, *_ in _some(inside, _MOST_POINTS))
        parts.append(f'<path class="s{color}" stroke-width="1.8" d="M{path}"/>')
    if one.marks or len(pairs) == 1:
        parts += [
            f'<circle class="f{color}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
            for x, y, *_ in _some(pairs, _MOST_POINTS)
        ]
    for x, y, at, value in _some(pairs, _MOST_VALUES):
        told = _text(f"{one.name}: {value:.4g} at {si(at)} ({x_label})")
        parts.append(
            f'<circle class="value" cx="{x:.1f}" cy="{y:.1f}" r="7">'
            f"<title>{told}</title></circle>"
        )
    return parts


def _some(items: Sequence, most: int) -> list:
    """Return at most so many of the items, the first and last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers of a range."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next((m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6), 10)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 12) for i in range(count)]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
    )


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(text)}</text>'


def _color(run: int) -> int:
    return run % len(LIGHT.colors)


def _text(text: str) -> str:
    return html.escape(escape_line(text))

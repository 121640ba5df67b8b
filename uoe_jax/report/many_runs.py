"""Many runs as a picture, by how alike their settings are, and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from uoe_jax.errors import extra_packages
from uoe_jax.report import page
from uoe_jax.report.style import MARKERS, Theme, as_label, render
from uoe_jax.runs.index import RunIndex
from uoe_jax.runs.read import RunRecord
from uoe_jax.runs.search import Difference, differing, principal_axes
from uoe_jax.runs.search import setting as setting_of

with extra_packages():
    from matplotlib.figure import Figure

_ABOUT_MAP = (
    "Each point is a run; runs lie near each other where their settings are alike. "
    "Axes are the first two principal axes of the runs' vectors. Colour is the rank of "
    "the loss among runs on the same data: dark is best. Rings have no loss yet."
)
_NAMED = 3  # differences that are written out


def group_of(record: RunRecord) -> str:
    """Return the folder that a run is told apart by: its experiment's, or its own's."""
    parts = Path(record.path).parts
    if len(parts) > 2 and parts[-2] == "results":
        return parts[-3]
    return parts[-2] if len(parts) > 1 else "."


def map_figure(index: RunIndex, metric: str, theme: Theme) -> Figure | None:
    """Return the map of an index's runs, or None where there are fewer than two."""
    if len(index) < 2:
        return None
    places, shares = principal_axes(index.vectors)
    ranks = _ranks(index.records, metric)
    groups = list(dict.fromkeys(group_of(record) for record in index.records))
    figure = Figure(figsize=(8.2, 5.4), layout="constrained")
    axes = figure.subplots()
    scattered = None
    # Repeats lie on one another: a little apart they can be counted.
    apart = np.random.default_rng(0).normal(size=places.shape)
    places = places + 0.006 * np.ptp(places, axis=0).max() * apart
    for number, group in enumerate(groups):
        mine = np.array([group_of(record) == group for record in index.records])
        known = mine & np.isfinite(ranks)
        marker = MARKERS[number % len(MARKERS)]
        scattered = axes.scatter(
            *places[known].T, c=ranks[known], cmap="viridis", vmin=0, vmax=1, s=34,
            marker=marker, edgecolors=theme.paper, linewidths=0.4,
        )  # fmt: skip
        rest = mine & ~known
        axes.scatter(*places[rest].T, s=34, marker=marker, facecolors="none",
                     edgecolors=theme.ink, linewidths=0.8)  # fmt: skip
        axes.scatter([], [], s=34, marker=marker, color=theme.ink,
                     label=as_label(group, 28))  # fmt: skip
    axes.set_xlabel(f"first principal axis ({shares[0]:.0%} of the variance)")
    axes.set_ylabel(f"second principal axis ({shares[1]:.0%})")
    if scattered is not None:
        bar = figure.colorbar(scattered, ax=axes, ticks=[0, 1])
        bar.ax.set_yticklabels(["best", "worst"])
        bar.set_label(f"rank of {metric.replace('_', ' ')}, on the same data")
    if len(groups) <= 12:
        axes.legend(loc="best", fontsize=9)
    return figure


def _ranks(records: Sequence[RunRecord], metric: str) -> np.ndarray:
    """Return each run's rank, 0 best to 1 worst, among those on the same data."""
    values = np.array([_value(record, metric) for record in records], float)
    if metric == "accuracy":
        values = -values
    tasks = np.array([record.task for record in records])
    ranks = np.full(len(records), np.nan)
    for task in np.unique(tasks):
        mine = (tasks == task) & np.isfinite(values)
        order = np.argsort(np.argsort(values[mine], kind="stable"), kind="stable")
        ranks[mine] = order / max(1, mine.sum() - 1)
    return ranks


def _value(record: RunRecord, metric: str) -> float:
    found = record[metric]
    return np.nan if found is None else found


def draw_map(index: RunIndex, metric: str = "loss") -> dict[str, bytes]:
    """Return the map of an index's runs as PNGs by theme; none for fewer than two."""
    return render(lambda theme: map_figure(index, metric, theme))


def runs_page(
    index: RunIndex,
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    metric: str,
) -> str:
    """Return a page over an index: map, table, what is nearest, what is broken."""
    map_html = page.picture(draw_map(index, metric), "map of the runs")
    if map_html:
        map_html = page.paragraph(_ABOUT_MAP) + map_html
    broken = [(record.path, record.problem) for record in index.broken]
    sections = [
        ("Map", map_html),
        ("Runs", page.table(header, rows) if rows else ""),
        ("Nearest other configuration", _nearest_table(index)),
        ("Broken", page.table(("run", "problem"), broken) if broken else ""),
    ]
    count = f"{len(index):,} runs"
    if broken:
        count += f", {len(broken)} broken"
    return page.page("Runs", count, sections)


def _nearest_table(index: RunIndex) -> str:
    """Return each configuration, once, beside the one that is most like it."""
    firsts: dict[str, int] = {}
    for i, record in enumerate(index.records):
        firsts.setdefault(_key(record), i)
    places = list(firsts.values())
    if len(places) < 2:
        return ""
    rows = []
    vectors = np.asarray(index.vectors[places], np.float32)
    for own, place in enumerate(places):
        cosines = vectors @ vectors[own]
        cosines[own] = -2.0
        best = int(np.argmax(cosines))
        record, other = index.records[place], index.records[places[best]]
        rows.append((record.path, other.path, f"{cosines[best]:.3f}",
                     differences_text(record.settings, other.settings)))  # fmt: skip
    said = page.table(("run", "most like", "similarity", "differs in"), rows)
    return page.fold(f"{len(rows):,} configurations", said)


def _key(record: RunRecord) -> str:
    return repr(sorted(map(repr, record.settings.items())))


def differences_text(first: object, second: object, most: int = _NAMED) -> str:
    """Return in what two settings differ, `most` of them written out."""
    paths = differing(first, second)
    shown = [
        str(Difference(p, setting_of(first, p), setting_of(second, p), 0.0))
        for p in paths[:most]
    ]
    return list_of(shown, len(paths))


def list_of(shown: Sequence[str], count: int) -> str:
    """Return texts in a row, and how many of `count` aren't among them."""
    text = "; ".join(shown) or "nothing"
    return text if count <= len(shown) else f"{text}; and {count - len(shown)} more"

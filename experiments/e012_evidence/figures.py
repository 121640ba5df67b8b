"""Figures a to h of the study, from its results alone. PNG bytes by name."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter

from experiments.e012_evidence.choose import Row, spent
from experiments.e012_evidence.tables import Group, find_groups
from experiments.shared.compare import Difference
from experiments.shared.fronts import Law, fit_law, law_intervals
from uoe_jax.errors import ConfigError
from uoe_jax.report.style import LIGHT, MARKERS, Theme, render

LADDER = (
    "SMHA",
    "SMHA + conv",
    "SMHA, gated values + conv",
    "local + routed",
    "local + routed + conv",
    "local + few routed + conv",
    "local + few routed, gated values + conv",
    "local + few routed, sink + conv",
    "local + few routed, key router + conv",
    "local + few routed, thresholds + conv",
    "local + 2 full + conv",
    "local + full + conv",
    "local + conv",
)
_WORDS = re.compile(r"UoME \d+ of 32")  # a model of one budget
# Whose law predicts XL; the last is compared with the first.
FITTED = ("dense + conv", "MoE 2 of 8 + conv", "best lean + conv")
_FITTED_SIZES = ("S", "M", "L")
_HELD_OUT, _LAW_LENGTH = "XL", "T 4096"  # sizes are of one law at one T
_LABELS = {
    "flops": "training FLOPs",
    "seconds": "seconds of training",
    "tokens": "bytes of training",
}


def figures(rows: Sequence[Row]) -> dict[str, bytes]:
    """Return the figures that the runs so far suffice for, by file name."""
    groups = find_groups(rows)
    found: dict[str, bytes] = {}
    for name, draw in _drawn(groups):
        found[name] = render(draw, [LIGHT])["light"]
    return found


def _drawn(
    groups: Sequence[Group],
) -> Iterator[tuple[str, Callable[[Theme], Figure]]]:
    text = [group for group in groups if "recall" not in group.setting]
    if fronts := [group for group in text if len(group.steps) > 1]:
        yield "a_flops.png", lambda theme: _fronts(theme, fronts, "flops")
        yield "b_seconds.png", lambda theme: _fronts(theme, fronts, "seconds")
    if (found := _law(text)) is not None:
        yield "c_law.png", lambda theme: _draw_law(theme, found, text)
    if attention := [g for g in text if _named(g, "local") and _base(g)]:
        group = max(attention, key=lambda g: g.steps[-1])
        yield "d_positions.png", lambda theme: _positions(theme, group)
        yield "f_cache.png", lambda theme: _cache(theme, group)
    for group in groups:
        if "recall" in group.setting:
            yield "e_recall.png", lambda theme, group=group: _recall(theme, group)
            break
    for group in text:
        if any(" at " in model for model in group.models):
            yield "h_budgets.png", lambda theme, group=group: _budgets(theme, group)
            break
    ladders = [g for g in text if len(_steps(g)) > 1 and _base(g)]
    if ladders:
        ladder = max(ladders, key=lambda g: (len(_steps(g)), g.steps[-1]))
        yield "g_ladder.png", lambda theme: _ladder(theme, ladder)


def _named(group: Group, word: str) -> bool:
    return any(word in model for model in group.models)


def _base(group: Group) -> str | None:
    """Return the dense model that attentions are compared with."""
    return group.resolve("dense + conv") or group.resolve("dense")


def _steps(group: Group) -> list[str]:
    return [model for model in LADDER if model in group.models]


def _looks(theme: Theme, number: int) -> dict:
    colors = theme.colors
    return {
        "color": colors[number % len(colors)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 5,
        "fillstyle": "full" if number < len(colors) else "none",
    }


def _log(axes: Axes) -> None:
    """Make x logarithmic with few numbers, in units."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    # A short axis would have one number, or none.
    subs = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _doublings(axes: Axes, ends: Sequence[int]) -> None:
    """Make x logarithmic with a number for each doubling."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ends))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.tick_params(axis="x", labelsize=8)


def _half(group: Group, seeds: int, length: int) -> float:
    """Return half of the 95% interval of a model's mean."""
    spread = group.spread(group.corpora[0], length)
    if spread is None:
        return 0.0
    return Difference(0.0, spread.deviation / math.sqrt(seeds), spread.freedom).half


def _fronts(theme: Theme, groups: Sequence[Group], axis: str) -> Figure:
    """Draw (a), (b): loss against what is spent, a panel a setting."""
    columns = min(len(groups), 3)
    rows = -(-len(groups) // columns)
    size = (5.2 * columns, 4.6 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, group in zip(panels, groups, strict=False):
        corpus = group.corpora[0]
        for number, (model, runs) in enumerate(group.models.items()):
            x, y, half = [], [], []
            for place, steps in enumerate(group.steps):
                x.append(statistics.fmean(spent(row, axis, steps) for row in runs))
                y.append(statistics.fmean(group.losses(model, corpus, place)))
                half.append(_half(group, len(runs), place))
            low, high = np.array(y) - half, np.array(y) + half
            axes.plot(x, y, label=model, **_looks(theme, number))
            color = theme.colors[number % len(theme.colors)]
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        _log(axes)
        axes.set(title=group.title, xlabel=_LABELS[axis])
        axes.set_ylabel(f"test bits/byte, {corpus}")
        axes.legend(fontsize=7.5)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    return figure


def _law(groups: Sequence[Group]) -> tuple[Law, dict[str, list], str] | None:
    """Return the law of the families over sizes, its points, what its bounds are."""
    points: dict[str, list[tuple[float, float]]] = {}
    fitted = [g for g in groups if _at(g, *_FITTED_SIZES) and len(g.steps) > 2]
    for group in fitted:
        for name in FITTED:
            if model := group.resolve(name):
                points.setdefault(name, []).append(_end(group, model))
    deviations = [
        spread.deviation for g in fitted if (spread := g.spread(g.corpora[0]))
    ]
    if len(points) < 2 or not deviations:
        return None
    family, base = FITTED[-1], FITTED[0]
    try:
        law = fit_law(points)
        bounds = law_intervals(points, max(deviations), family, base)
    except ConfigError:  # too few sizes so far
        return None
    except KeyError:  # a family isn't trained yet
        return None
    low, high = bounds["exponent"]
    text = f"exponent {law.exponent:.3f} ({low:.3f} to {high:.3f})"
    low, high = bounds["multiplier"]
    text += f"; {base} needs {law.multiplier(family, base):.2f} times ({low:.2f} to "
    return law, points, text + f"{high:.2f}) the FLOPs of {family}"


def _at(group: Group, *sizes: str) -> bool:
    """Whether a group is of one of these sizes, at the T of the one held out."""
    size, length = group.setting.split(", ")[:2]
    return size in sizes and length == _LAW_LENGTH


def _end(group: Group, model: str) -> tuple[float, float]:
    runs = group.models[model]
    flops = spent(runs[0], "flops", group.steps[-1])
    return flops, statistics.fmean(group.losses(model, group.corpora[0]))


def _draw_law(
    theme: Theme, found: tuple[Law, dict[str, list], str], groups: Sequence[Group]
) -> Figure:
    """Draw (c): the law of S, M and L, and XL beside what it predicts."""
    law, points, text = found
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    held = [g for g in groups if _at(g, _HELD_OUT)]
    for number, (model, pairs) in enumerate(points.items()):
        looks = _looks(theme, number)
        axes.plot(*zip(*pairs, strict=True), linestyle="none", label=model, **looks)
        largest = max(x for x, _ in pairs)
        for group in held:
            if found_model := group.resolve(model):
                x, y = _end(group, found_model)
                largest = max(largest, x)
                ring = looks | {"markersize": 9, "fillstyle": "none"}
                label = f"XL: {y:.4f}, predicted {law.loss(model, x):.4f}"
                axes.plot([x], [y], linestyle="none", label=label, **ring)
        xs = np.geomspace(min(x for x, _ in pairs), largest, 50)
        axes.plot(xs, [law.loss(model, x) for x in xs], color=looks["color"])
    _log(axes)
    axes.set(xlabel=_LABELS["flops"], ylabel="test bits/byte", title=text)
    axes.title.set_fontsize(8.5)
    axes.legend(fontsize=8)
    return figure


def _positions(theme: Theme, group: Group) -> Figure:
    """Draw (d): loss by position, less the dense model's."""
    base, corpora = _base(group), group.corpora
    figure = Figure(figsize=(5.4 * len(corpora), 4.4), layout="constrained")
    panels = figure.subplots(1, len(corpora), squeeze=False)[0]
    for axes, corpus in zip(panels, corpora, strict=True):
        table = {model: _by_position(runs, corpus) for model, runs in
                 group.models.items()}  # fmt: skip
        zero = table[str(base)]
        for number, (model, losses) in enumerate(table.items()):
            ends = [end for end, _ in losses]
            less = [a - b for (_, a), (_, b) in zip(losses, zero, strict=True)]
            axes.plot(ends, less, label=model, **_looks(theme, number))
        _doublings(axes, [end for end, _ in zero])
        axes.set(title=f"{group.title}, {corpus}", xlabel="position, up to")
        axes.set_ylabel(f"test bits/byte, less {base}")
    handles, labels = panels[0].get_legend_handles_labels()
    columns = 2 * len(corpora)  # as wide as the figure
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=7.5
    )
    return figure


def _by_position(runs: Sequence[Row], corpus: str) -> list[tuple[int, float]]:
    """Return the mean loss of each doubling of the position, by its end."""
    seeds = [row["lengths"][-1]["positions"][corpus] for row in runs]
    return [
        (parts[0]["last"], statistics.fmean(part["bits"] for part in parts))
        for parts in zip(*seeds, strict=True)
    ]


def _recall(theme: Theme, group: Group) -> Figure:
    """Draw (e): right answers by how far back they stand."""
    figure = Figure(figsize=(6.6, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, (model, runs) in enumerate(group.models.items()):
        seeds = [row["lengths"][-1]["recall"] for row in runs]
        ends = [part["last"] for part in seeds[0]]
        mean = [
            statistics.fmean(part["right"] for part in parts)
            for parts in zip(*seeds, strict=True)
        ]
        axes.plot(ends, mean, label=model, **_looks(theme, number))
    _doublings(axes, ends)
    axes.set(title=group.title, xlabel="tokens back, up to", ylabel="right answers")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=7.5)
    return figure


def _cache(theme: Theme, group: Group) -> Figure:
    """Draw (f): loss against the bytes of a sequence's keys and values."""
    figure = Figure(figsize=(6.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (model, runs) in enumerate(group.models.items()):
        loss = statistics.fmean(group.losses(model, group.corpora[0]))
        looks = _looks(theme, number) | {"linestyle": "none", "capsize": 3}
        error = _half(group, len(runs), -1)
        axes.errorbar(runs[0]["cache_bytes"], loss, yerr=error, label=model, **looks)
    _log(axes)
    axes.set(title=group.title, xlabel="bytes of cache, a sequence of T")
    axes.set_ylabel(f"test bits/byte, {group.corpora[0]}")
    axes.legend(fontsize=7.5)
    return figure


def _budgets(theme: Theme, group: Group) -> Figure:
    """Draw (h): loss by experts used, of one model and of models made for each."""
    figure = Figure(figsize=(6.6, 4.4), layout="constrained")
    axes = figure.subplots()
    corpus = group.corpora[0]
    mean = lambda model: statistics.fmean(group.losses(model, corpus))
    plain = {m: int(m.split()[1]) for m in group.models if _WORDS.fullmatch(m)}
    looks = _looks(theme, 0) | {"linestyle": "none", "capsize": 3}
    losses = [mean(model) for model in plain]
    half = [_half(group, len(group.models[model]), -1) for model in plain]
    axes.errorbar(
        list(plain.values()), losses, yerr=half, label="trained for it", **looks
    )
    every = {m: m.split(" at ") for m in group.models if " at " in m}
    for number, name in enumerate(dict.fromkeys(n for n, _ in every.values()), 1):
        points = sorted((int(x), mean(m)) for m, (n, x) in every.items() if n == name)
        axes.plot(*zip(*points, strict=True), label=name, **_looks(theme, number))
    _doublings(axes, sorted(plain.values()) or [int(x) for _, x in every.values()])
    axes.set(title=group.title, xlabel="experts that a token uses")
    axes.set_ylabel(f"test bits/byte, {corpus}")
    axes.legend(fontsize=8)
    return figure


def _ladder(theme: Theme, group: Group) -> Figure:
    """Draw (g): what each change of attention brings, less the dense model."""
    base, corpus = str(_base(group)), group.corpora[0]
    steps = _steps(group)
    zero = statistics.fmean(group.losses(base, corpus))
    figure = Figure(figsize=(7.6, 1.2 + 0.42 * len(steps)), layout="constrained")
    axes = figure.subplots()
    for place, model in enumerate(steps):
        losses = group.losses(model, corpus)
        mean, half = statistics.fmean(losses) - zero, _half(group, len(losses), -1)
        axes.barh(place, mean, 0.6, color=theme.colors[0], alpha=0.35)
        axes.errorbar(mean, place, xerr=half, fmt="D", ms=4, color=theme.colors[0])
        dots = [loss - zero for loss in losses]
        axes.plot(dots, [place] * len(dots), "o", ms=3, color=theme.ink, alpha=0.5)
    axes.axvline(0, color=theme.ink, linewidth=1)
    axes.set_yticks(range(len(steps)), steps)
    axes.set_ylim(len(steps) - 0.4, -0.6)
    axes.set_xlabel(f"test bits/byte, {corpus}, less {base}'s {zero:.3f}")
    axes.set_title(group.title)
    return figure

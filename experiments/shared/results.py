"""Results of runs as JSON files; the table and the plot made from them."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.shared.case import Study
from uoe_jax.integrity import write_atomically
from uoe_jax.report.style import LIGHT, MARKERS, render
from uoe_jax.report.table import si

Result = dict[str, Any]


def result_file(folder: Path, case: str, seed: int) -> Path:
    """Return where a run's result is."""
    return folder / "results" / f"{case}-{seed}.json"


def write_result(folder: Path, result: Result) -> None:
    """Write a run's result."""
    file = result_file(folder, result["case"], result["seed"])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(result, indent=1) + "\n")


def read_results(folder: Path, study: Study) -> dict[str, list[Result]]:
    """Return the results of a study's cases in its order, by case."""
    found: dict[str, list[Result]] = {}
    for case in study.cases:
        files = [result_file(folder, case.name, seed) for seed in case.seeds]
        results = [json.loads(f.read_text()) for f in files if f.is_file()]
        if results:
            found[case.name] = results
    return found


def choose(study: Study, found: dict[str, list[Result]]) -> list[str]:
    """Return the cases to report: of each group the one that validation prefers."""
    best: dict[str, str] = {}
    for case in study.cases:
        if case.name not in found:
            continue
        key = case.group or case.name
        if key not in best or _better(study, found[case.name], found[best[key]]):
            best[key] = case.name
    return [case.name for case in study.cases if case.name in best.values()]


def _better(study: Study, new: list[Result], old: list[Result]) -> bool:
    a, b = (_mean(_values(r, "valid", study.metric)) for r in (new, old))
    return a < b if study.metric == "bits_per_byte" else a > b


def _values(results: list[Result], split: str, key: str) -> list[float]:
    """Return the seeds' values; a run that diverged has none and counts as infinite."""
    worst = float("inf") if key != "accuracy" else 0.0
    return [r[split][key] if split in r else worst for r in results]


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)


def spread(values: list[float]) -> float:
    """Return the sample standard deviation, 0 for one value or one that is infinite."""
    known = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.stdev(values) if known else 0.0


def table(study: Study, found: dict[str, list[Result]]) -> str:
    """Return a Markdown table: quality, FLOPs, time and speed of every case."""
    base = found.get(study.baseline)
    unit = base[0]["forward_flops_per_token"] if base else None
    percent = study.metric == "accuracy"
    name = "accuracy, %" if percent else "bits/byte"
    lines = [
        f"| model | parameters | FLOPs | seeds | valid {name} | test {name} "
        "| seconds | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    chosen = choose(study, found)
    for case, results in found.items():
        first = results[0]
        flops = first["forward_flops_per_token"]
        share = f"{flops / unit:.0%}" if unit else si(flops)
        tokens = first["tokens_per_step"] * first["steps"]
        seconds = statistics.median(r["seconds"] for r in results)
        shown = f"**{case}**" if case in chosen and len(chosen) < len(found) else case
        cells = [
            shown,
            si(first["parameters"]),
            share,
            str(len(results)),
            *(_cell(_values(results, s, study.metric), percent)
              for s in ("valid", "test")),
            f"{seconds:.0f}",
            si(tokens / seconds),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float], percent: bool) -> str:
    scale, digits = (100.0, 2) if percent else (1.0, 4)
    scaled = [v * scale for v in values]
    if not all(map(math.isfinite, scaled)):
        return "diverged"
    text = f"{_mean(scaled):.{digits}f}"
    return text + (f" ± {spread(scaled):.{digits}f}" if len(values) > 1 else "")


def plot(study: Study, found: dict[str, list[Result]]) -> bytes:
    """Return a PNG: test quality against FLOPs, seconds, and the learning curves."""

    def draw(theme: Any) -> Figure:
        figure = Figure(figsize=(12.5, 4.6), layout="constrained")
        panels = figure.subplots(1, 3)
        scale = 100.0 if study.metric == "accuracy" else 1.0
        for number, (case, results) in enumerate(found.items()):
            values = [scale * v for v in _values(results, "test", study.metric)]
            values = [v for v in values if math.isfinite(v)]
            if not values:
                continue
            color = theme.colors[number % len(theme.colors)]
            style = {
                "color": color,
                "marker": MARKERS[(number // len(theme.colors)) % len(MARKERS)],
                "markersize": 6,
                "linestyle": "none",
            }
            first = results[0]
            flops = first["training_flops_per_step"] * first["steps"]
            seconds = statistics.median(r["seconds"] for r in results)
            for axes, x in zip(panels, (flops, seconds), strict=False):
                axes.errorbar(
                    x, _mean(values), yerr=spread(values), capsize=3, label=case,
                    **style,
                )  # fmt: skip
            points = [c for c in first["curve"] if "valid" in c]
            panels[2].plot(
                [c["seconds"] for c in points],
                [scale * c["valid"][study.metric] for c in points],
                **style | {"linestyle": "-", "markersize": 4},
            )
        percent = ", %" if study.metric == "accuracy" else ""
        label = study.metric.replace("_", " ").replace("bits per byte", "bits/byte")
        panels[0].set(xlabel="training FLOPs", ylabel=f"test {label}{percent}")
        panels[1].set(xlabel="training seconds", ylabel=f"test {label}{percent}")
        panels[2].set(
            xlabel="training seconds", ylabel=f"validation {label}{percent}, one seed"
        )
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=6, fontsize=8.5
        )
        return figure

    return render(draw, [LIGHT])["light"]


def write_summary(folder: Path, study: Study) -> str:
    """Write table.md and plot.png from a folder's results; return the table."""
    folder.mkdir(parents=True, exist_ok=True)
    found = read_results(folder, study)
    text = table(study, found)
    write_atomically(folder / "table.md", f"# {study.title}\n\n{text}")
    if found:
        (folder / "plot.png").write_bytes(plot(study, found))
    return text

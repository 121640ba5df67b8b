"""The results as a Markdown table and as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from uoe_jax.files import write_atomically
from uoe_jax.report.style import LIGHT, Theme, render

TEXTS = ("wikipedia", "python")


def write_summary(out: Path, results: Mapping[str, Any]) -> None:
    """Write table.md and plot.png of what is there."""
    write_atomically(out / "table.md", table(results))
    if any(found.get("curve") for found in results["entries"].values()):
        write_atomically(out / "plot.png", plot(results))


def table(results: Mapping[str, Any]) -> str:
    """Return a row for each model: losses by tokens trained on, FLOPs and speeds."""
    entries = results["entries"]
    marks = sorted(
        {int(m) for found in entries.values() for m in found.get("curve", {})}
    )
    heads = [f"after {mark / 1e6:.3g}M" for mark in marks]
    columns = ["model", "FLOPs", "plain, at once", "at once", *heads]
    columns += ["trains, tokens/s", "decodes, tokens/s (rows)"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, found in entries.items():
        share = found.get("flops_share")
        cells = [name, "" if share is None else f"{share:.0%}"]
        cells += [losses(found.get(key)) for key in ("plain_at_once", "at_once")]
        curve = found.get("curve", {})
        cells += [losses(curve.get(str(mark))) for mark in marks]
        rate = found.get("train_tokens_per_second")
        cells.append("" if rate is None else f"{rate:,.0f}")
        rates = found.get("decode_tokens_per_second", {})
        cells.append(", ".join(f"{r:,.0f} ({rows})" for rows, r in rates.items()))
        lines.append(f"| {' | '.join(cells)} |")
    about = (
        f"Nats a token on held-out Wikipedia / Python source; {results.get('model')}, "
        f"{results.get('device')}, jax {results.get('jax')}.\n\n"
    )
    return about + "\n".join(lines) + "\n"


def losses(found: Mapping[str, float] | None) -> str:
    """Return both losses as text."""
    return "" if found is None else " / ".join(f"{found[t]:.4f}" for t in TEXTS)


def plot(results: Mapping[str, Any]) -> bytes:
    """Return a PNG: each model's loss against the tokens it trained on."""

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(10, 4.8), layout="constrained")
        axes = figure.subplots(1, len(TEXTS))
        shown = [(n, f) for n, f in results["entries"].items() if f.get("curve")]
        for side, text in zip(axes, TEXTS, strict=True):
            for name, found in shown:
                group, line = _style(name)
                points = {0: found["at_once"]} if "at_once" in found else {}
                points |= {int(mark): loss for mark, loss in found["curve"].items()}
                at = sorted(points)
                side.plot(
                    [mark / 1e6 for mark in at],
                    [points[mark][text] for mark in at],
                    line,
                    color=theme.colors[group],
                    label=name,
                    markersize=4,
                )
            side.set_xlabel("million tokens trained on")
            side.set_ylabel(f"nats a token, {text}")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
        return figure

    return render(draw, [LIGHT])["light"]


def _style(name: str) -> tuple[int, str]:
    """Return a model's colour, the same for all of one size, and its kind of line."""
    found = re.search(r"(\d+) of (\d+)|(\d+)%", name)
    if found is None:
        return 0, "o-"
    on, experts, percent = found.groups()
    share = int(percent) / 100 if percent else int(on) / int(experts)
    group = 1 + 2 * ("heads" in name) + (share < 0.7)
    kinds = {"pruned": "s--", "taught": "^:", "warm-up": "v-."}
    return group, next((line for word, line in kinds.items() if word in name), "o-")

"""The results as Markdown tables, and the healing as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from uoe_jax.files import write_atomically
from uoe_jax.report.style import LIGHT, Theme, render

TEXTS = ("wikipedia", "python")

Row = Mapping[str, Any]


def write_summary(out: Path, results: Mapping[str, Any]) -> None:
    """Write table.md and, of cuts that were healed, healing.png.

    Nothing without the dense model's row, of a call that had no time for it.
    """
    rows = [row for row in results["rows"] if "refused" not in row]
    if not any(row["method"] == "dense" for row in rows):
        return
    write_atomically(out / "table.md", tables(rows))
    if healed := [row for row in rows if row.get("steps")]:
        write_atomically(out / "healing.png", plot(healed))


def tables(rows: Sequence[Row]) -> str:
    """Return perplexities by method and cut, of small cuts, and of healed cuts."""
    dense = next(row for row in rows if row["method"] == "dense")
    cut = [row for row in rows if "blocks" in row and "rank" not in row]
    whole = [row for row in cut if row["cut"] >= 0.1]
    parts = [f"Perplexity, Wikipedia / Python; dense is {_pair(dense)}."]
    parts.append("\n".join(_by_cut([r for r in whole if not _by_ranks(r)])))
    ranks = [
        row for row in rows if "blocks" in row and ("rank" in row or _by_ranks(row))
    ]
    small = [row for row in cut if row["cut"] <= 0.1
             and (row["method"], row["allocate"]) == ("modegpt", "curve")]  # fmt: skip
    if ranks:
        parts.append("\n".join(_by_size([*ranks, *small], dense)))
    if healed := [row for row in rows if row.get("steps")]:
        parts.append("\n".join(_healed(healed)))
    return "\n\n".join(parts) + "\n"


def _by_ranks(row: Row) -> bool:
    """Whether a row has ranks by curves, which are tried at small cuts alone."""
    return row["method"] == "lord" and row.get("allocate") == "curve"


def _by_cut(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table: a row a method and allocation, a column a cut, the best bold."""
    cuts = sorted({row["cut"] for row in rows})
    lead = {cut: {t: min(r[t] for r in rows if r["cut"] == cut) for t in TEXTS}
            for cut in cuts}  # fmt: skip
    yield _line("method", "allocation", *(f"{cut:.0%}" for cut in cuts))
    yield "|---" * (2 + len(cuts)) + "|"
    kinds = dict.fromkeys((row["method"], row["allocate"]) for row in rows)
    at = {(row["method"], row["allocate"], row["cut"]): row for row in rows}
    last = lambda kind: at.get((*kind, 0.2), {}).get("wikipedia", 0.0)
    for kind in sorted(kinds, key=last):
        cells = [
            _pair(at[*kind, cut], lead[cut]) if (*kind, cut) in at else ""
            for cut in cuts
        ]
        yield _line(kind[0], kind[1] or "", *cells)


def _by_size(rows: Sequence[Row], dense: Row) -> Iterator[str]:
    """Yield a table: low ranks and small cuts by what they leave of the blocks."""
    yield _line("method", "ranks or cut", "blocks", "perplexity", "over dense")
    yield "|---" * 5 + "|"
    for row in sorted(rows, key=lambda row: -row["blocks"]):
        how = f"rank {row['rank']}" if "rank" in row else f"curve, {row['cut']:.0%}"
        over = [row[text] / dense[text] - 1 for text in TEXTS]
        shown = [f"{o:+.2%}" if o < 10 else f"{o + 1:,.0f} times" for o in over]
        yield _line(
            row["method"], how, f"{row['blocks']:.1%}", _pair(row), " / ".join(shown)
        )


def _healed(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table: perplexities before and after the same steps."""
    after = f"after {rows[0]['steps']} steps"
    yield _line("method", "allocation", "cut", "before", after, "seconds")
    yield "|---" * 6 + "|"
    for row in rows:
        ends = (_pair(row["before"]), _pair(row["after"]))
        name = (row["method"], row["allocate"] or "", f"{row['cut']:.0%}")
        yield _line(*name, *ends, f"{row['seconds']:.0f}")


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _pair(row: Row, lead: Row | None = None) -> str:
    """Return both perplexities as text, those that are the least in bold."""
    number = lambda v: f"{v:.2f}" if v < 1e4 else f"{v:.1e}"
    best = lambda text: lead is not None and row[text] == lead[text]
    mark = lambda text: f"**{number(row[text])}**" if best(text) else number(row[text])
    return " / ".join(map(mark, TEXTS))


def plot(rows: Sequence[Row]) -> bytes:
    """Return a PNG: the training loss while cuts are healed, a panel a share."""
    cuts = sorted({row["cut"] for row in rows})

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(1 + 4.4 * len(cuts), 4), layout="constrained")
        panels = figure.subplots(1, len(cuts), squeeze=False)[0]
        for number, row in enumerate(rows):
            axes = panels[cuts.index(row["cut"])]
            every = row["steps"] // len(row["losses"])  # `heal` keeps some
            steps = [every * n for n in range(len(row["losses"]))]
            label = ", ".join(filter(None, (row["method"], row["allocate"])))
            look = {"color": theme.colors[number % len(theme.colors)], "label": label}
            axes.plot(steps, row["losses"], "osD^vP*"[number % 7] + "-", **look)
        for axes, cut in zip(panels, cuts, strict=True):
            axes.set(title=f"{cut:.0%} of the blocks cut", xlabel="steps of LoRA")
            axes.legend(frameon=False, fontsize=9)
        panels[0].set_ylabel("training loss, nats a token")
        return figure

    return render(draw, [LIGHT])["light"]
